"""Quaternions, poses and pinhole cameras in nuScenes' conventions; NumPy float64 throughout.

Quaternions are w, x, y, z. The ego frame is x forward, y left, z up; the LiDAR frame x right, y forward, z up; a
camera's x right, y down, z forward. Lengths are metres, angles radians.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def rotation_matrix(quaternion: ArrayLike) -> Array:
    """(..., 4) quaternions of any length but zero to (..., 3, 3) rotations; a zero quaternion gives zeros."""
    q = np.asarray(quaternion, dtype=np.float64)
    norm = np.linalg.norm(q, axis=-1, keepdims=True)
    w, x, y, z = np.moveaxis(q / np.where(norm > 0, norm, 1), -1, 0)
    rows = [
        [w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), w * w - x * x - y * y + z * z],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def quaternion(matrix: ArrayLike) -> Array:
    """(..., 3, 3) rotations to (..., 4) unit quaternions with w >= 0.

    Source: Bar-Itzhack (2000) by way of Shepperd: of the four ways to divide, the one whose divisor is largest.
    """
    m = np.asarray(matrix, dtype=np.float64)
    xx, yy, zz = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    a, b, c = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    d, e, f = m[..., 0, 1] + m[..., 1, 0], m[..., 0, 2] + m[..., 2, 0], m[..., 1, 2] + m[..., 2, 1]
    # Row i is 4 * q_i * q: each is the quaternion but for its length.
    rows = np.stack(
        [
            np.stack([1 + xx + yy + zz, a, b, c], -1),
            np.stack([a, 1 + xx - yy - zz, d, e], -1),
            np.stack([b, d, 1 - xx + yy - zz, f], -1),
            np.stack([c, e, f, 1 - xx - yy + zz], -1),
        ],
        axis=-2,
    )
    best = np.argmax(np.diagonal(rows, axis1=-2, axis2=-1), axis=-1)
    found = np.take_along_axis(rows, best[..., None, None], axis=-2)[..., 0, :]
    found = found / np.linalg.norm(found, axis=-1, keepdims=True)
    return found * np.where(found[..., :1] < 0, -1.0, 1.0)


def multiply(a: ArrayLike, b: ArrayLike) -> Array:
    """The Hamilton product of (..., 4) quaternions: first the turn `b`, then `a`."""
    w1, x1, y1, z1 = np.moveaxis(np.asarray(a, dtype=np.float64), -1, 0)
    w2, x2, y2, z2 = np.moveaxis(np.asarray(b, dtype=np.float64), -1, 0)
    return np.stack(
        [
            w1 * w2 - x1 * x2 - y1 * y2 - z1 * z2,
            w1 * x2 + x1 * w2 + y1 * z2 - z1 * y2,
            w1 * y2 - x1 * z2 + y1 * w2 + z1 * x2,
            w1 * z2 + x1 * y2 - y1 * x2 + z1 * w2,
        ],
        axis=-1,
    )


def yaw(quaternion: ArrayLike) -> Array:
    """(..., 4) to (...): the heading of the x axis seen from above, -pi..pi."""
    w, x, y, z = np.moveaxis(np.asarray(quaternion, dtype=np.float64), -1, 0)
    return np.arctan2(2 * (x * y + w * z), w * w + x * x - y * y - z * z)


def about_z(angle: ArrayLike) -> Array:
    """(...) headings to (..., 4) quaternions."""
    half = np.asarray(angle, dtype=np.float64) / 2
    zero = np.zeros_like(half)
    return np.stack([np.cos(half), zero, zero, np.sin(half)], axis=-1)


@dataclass(frozen=True)
class Pose:
    """A rigid motion from a frame to the one around it: turn by `rotation` (4,), then shift by `translation` (3,)."""

    translation: Array
    rotation: Array

    @staticmethod
    def of(translation: Sequence[float], rotation: Sequence[float]) -> Pose:
        """From the lists of a table; the quaternion is brought to length 1."""
        q = np.asarray(rotation, dtype=np.float64)
        return Pose(np.asarray(translation, dtype=np.float64), q / (np.linalg.norm(q) or 1.0))

    @property
    def matrix(self) -> Array:
        """The same as (4, 4)."""
        m = np.eye(4)
        m[:3, :3], m[:3, 3] = rotation_matrix(self.rotation), self.translation
        return m

    @property
    def inverse(self) -> Pose:
        """The way back."""
        back = self.rotation * [1, -1, -1, -1]
        return Pose(-rotation_matrix(back) @ self.translation, back)

    def __matmul__(self, inner: Pose) -> Pose:
        """First `inner`, then this."""
        return Pose(self.apply(inner.translation), multiply(self.rotation, inner.rotation))

    def apply(self, points: ArrayLike) -> Array:
        """Points (..., 3) of the inner frame in the outer one."""
        return np.asarray(points, dtype=np.float64) @ rotation_matrix(self.rotation).T + self.translation

    def turn(self, vectors: ArrayLike) -> Array:
        """Vectors (..., 3), such as velocities, without the shift."""
        return np.asarray(vectors, dtype=np.float64) @ rotation_matrix(self.rotation).T


@dataclass(frozen=True)
class Fit:
    """How an image of (width, height) `source` comes into (height, width) `size`: scaled, then padded below and right.

    The ratio of the sides is kept; the picture starts at the upper left corner, as BEVFormer pads.
    """

    source: tuple[int, int]
    size: tuple[int, int]

    @property
    def scale(self) -> float:
        """Target pixels per source pixel."""
        return min(self.size[1] / self.source[0], self.size[0] / self.source[1])

    @property
    def scaled(self) -> tuple[int, int]:
        """(width, height) of the picture within the target."""
        return int(self.source[0] * self.scale + 1e-6), int(self.source[1] * self.scale + 1e-6)

    def intrinsic(self, intrinsic: ArrayLike) -> Array:
        """The camera's (3, 3) for the target image."""
        k = np.array(intrinsic, dtype=np.float64)
        k[:2] *= self.scale
        return k


def pinhole(intrinsic: ArrayLike) -> Array:
    """A (3, 3) intrinsic as the (4, 4) that takes camera coordinates to u*d, v*d, d, 1."""
    k = np.eye(4)
    k[:3, :3] = intrinsic
    return k


def project(points: ArrayLike, camera: ArrayLike) -> tuple[Array, Array]:
    """Points (..., 3) through a (4, 4) such as lidar2img: pixels (..., 2) and depths (...) in metres.

    Pixels of points at or behind the camera (depth <= 1e-5) are NaN.
    """
    p = np.asarray(points, dtype=np.float64)
    m = np.asarray(camera, dtype=np.float64)
    found = p @ m[:3, :3].T + m[:3, 3]
    depth = found[..., 2]
    return found[..., :2] / np.where(depth > 1e-5, depth, np.nan)[..., None], depth


def corners(centers: ArrayLike, sizes: ArrayLike, rotations: ArrayLike) -> Array:
    """(n, 8, 3): the corners of boxes with centers (n, 3), sizes (n, 3) width, length, height, rotations (n, 4).

    Length is along the box's x, width along y. The first four are the front, the last four the back, each in the order
    left top, right top, right bottom, left bottom.
    """
    w, l, h = np.moveaxis(np.asarray(sizes, dtype=np.float64).reshape(-1, 3), -1, 0)  # noqa: E741
    x = l[:, None] / 2 * [1, 1, 1, 1, -1, -1, -1, -1]
    y = w[:, None] / 2 * [1, -1, -1, 1, 1, -1, -1, 1]
    z = h[:, None] / 2 * [1, 1, -1, -1, 1, 1, -1, -1]
    turn = rotation_matrix(np.asarray(rotations, dtype=np.float64).reshape(-1, 4))
    return np.stack([x, y, z], -1) @ turn.swapaxes(-1, -2) + np.asarray(centers, dtype=np.float64).reshape(-1, 1, 3)


def inside_box(points: ArrayLike, center: ArrayLike, size: ArrayLike, rotation: ArrayLike) -> NDArray[np.bool_]:
    """Which of the points (n, 3) lie in the one box, its faces included."""
    w, l, h = np.asarray(size, dtype=np.float64)  # noqa: E741
    local = (np.asarray(points, dtype=np.float64) - np.asarray(center, dtype=np.float64)) @ rotation_matrix(rotation)
    return np.asarray((np.abs(local) <= np.array([l, w, h]) / 2).all(axis=-1))
