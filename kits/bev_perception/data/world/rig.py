"""The sensors of the generated car: six cameras and a LiDAR with the calibration of a nuScenes vehicle (n015)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

FULL_SIZE = (1600, 900)
"""Width and height that the intrinsics below are given for, pixels."""


@dataclass(frozen=True)
class Mount:
    """Where a sensor sits: ego-frame translation in metres, quaternion w, x, y, z; cameras add focal length, cx, cy."""

    translation: tuple[float, float, float]
    rotation: tuple[float, float, float, float]
    intrinsic: tuple[float, float, float] | None = None


CAMERAS: dict[str, Mount] = {
    "CAM_FRONT": Mount(
        (1.700791, 0.015946, 1.510958), (-0.499802, 0.503032, -0.499780, 0.497371), (1266.4172, 816.2670, 491.5071)
    ),
    "CAM_FRONT_RIGHT": Mount(
        (1.550848, -0.493405, 1.495748), (0.206035, -0.202694, 0.682451, -0.671361), (1260.8474, 807.9682, 495.3344)
    ),
    "CAM_FRONT_LEFT": Mount(
        (1.523878, 0.494631, 1.509328), (0.675727, -0.673627, 0.212140, -0.211228), (1272.5979, 826.6155, 479.7517)
    ),
    "CAM_BACK": Mount(
        (0.028326, 0.003451, 1.579103), (0.503787, -0.497402, -0.494185, 0.504550), (809.2210, 829.2196, 481.7784)
    ),
    "CAM_BACK_LEFT": Mount(
        (1.035691, 0.484795, 1.590970), (-0.692419, 0.703162, 0.116483, -0.112033), (1256.7415, 792.1126, 492.7757)
    ),
    "CAM_BACK_RIGHT": Mount(
        (1.014878, -0.480568, 1.562395), (-0.122810, 0.132401, 0.700431, -0.690496), (1259.5137, 807.2529, 501.1958)
    ),
}
LIDAR = Mount((0.943713, 0.0, 1.840230), (0.707796, -0.006492, 0.010646, -0.706307))


def rotation_matrix(quaternion: tuple[float, ...] | Floats) -> Floats:
    """The rotation matrix (3, 3) of a quaternion w, x, y, z of any length."""
    w, x, y, z = np.asarray(quaternion, float) / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def unit_quaternion(mount: Mount) -> tuple[float, ...]:
    """The mount's quaternion at length one, as the tables hold it."""
    q = np.asarray(mount.rotation) / np.linalg.norm(mount.rotation)
    return tuple(float(v) for v in q)


def intrinsic_matrix(mount: Mount, size: tuple[int, int]) -> Floats:
    """The camera matrix (3, 3) for a picture of `size` (width, height): pixel i spans [i, i + 1)."""
    assert mount.intrinsic is not None
    focal, cx, cy = mount.intrinsic
    sx, sy = size[0] / FULL_SIZE[0], size[1] / FULL_SIZE[1]
    return np.array([[focal * sx, 0.0, cx * sx], [0.0, focal * sy, cy * sy], [0.0, 0.0, 1.0]])


class View:
    """A camera at one picture size: the pixels' rays in the ego frame and where they meet the ground."""

    def __init__(self, channel: str, size: tuple[int, int]) -> None:
        mount = CAMERAS[channel]
        self.channel, self.size = channel, size
        self.K = intrinsic_matrix(mount, size)
        self.R = rotation_matrix(mount.rotation)
        """Camera to ego."""
        self.t = np.asarray(mount.translation)
        width, height = size
        u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
        camera = np.stack([(u - self.K[0, 2]) / self.K[0, 0], (v - self.K[1, 2]) / self.K[1, 1], np.ones_like(u)], -1)
        self.camera_rays = camera.astype(np.float32)
        """(H, W, 3) in the camera frame, z = 1."""
        rays = camera @ self.R.T
        self.rays = rays.astype(np.float32)
        """(H, W, 3) in the ego frame; a point at depth z is t + z * ray."""
        down = np.minimum(rays[..., 2], -1e-6)
        self.below = rays[..., 2] < -0.004
        """(H, W): the ray meets the ground within about 400 m."""
        self.ground_depth = np.where(self.below, -self.t[2] / down, 400.0).astype(np.float32)
        """(H, W), metres along the camera's axis."""
        flat = np.linalg.norm(rays, axis=-1)
        self.azimuth = np.arctan2(rays[..., 1], rays[..., 0]).astype(np.float32)
        self.elevation = np.arcsin(rays[..., 2] / flat).astype(np.float32)

    def project(self, ego_points: Floats) -> Floats:
        """Ego-frame points (..., 3) as pixel coordinates and depth (..., 3)."""
        camera = (ego_points - self.t) @ self.R
        z = camera[..., 2:]
        return np.concatenate([camera @ self.K[:2].T / z, z], -1)


@lru_cache(maxsize=24)
def view(channel: str, size: tuple[int, int]) -> View:
    """The camera of that name at a picture size (width, height); kept, since every frame needs the same."""
    return View(channel, size)
