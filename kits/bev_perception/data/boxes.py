"""Boxes of one sample as arrays: truth or prediction, in whatever frame they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kits.bev_perception.data import geometry
from kits.bev_perception.data.geometry import Array, Pose

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Boxes:
    """n boxes: `centers` (n, 3) m at half height, `sizes` (n, 3) width, length, height in m, `rotations` (n, 4)
    w, x, y, z, `velocities` (n, 2) m/s (NaN: not known), `labels` (n,) into CLASSES, `scores` (n,) (truth: -1),
    `attributes` (n,) into ATTRIBUTES (-1: none), `num_pts` (n,) LiDAR and radar points within (-1: not counted).
    """

    centers: Array
    sizes: Array
    rotations: Array
    velocities: Array
    labels: Ints
    scores: Array
    attributes: Ints
    num_pts: Ints

    @staticmethod
    def of(
        centers: ArrayLike,
        sizes: ArrayLike,
        rotations: ArrayLike,
        velocities: ArrayLike,
        labels: ArrayLike,
        scores: ArrayLike | None = None,
        attributes: ArrayLike | None = None,
        num_pts: ArrayLike | None = None,
    ) -> Boxes:
        """From anything that NumPy takes; raises ValueError where the lengths differ."""
        label = np.asarray(labels, dtype=np.int64).reshape(-1)
        n = len(label)

        def table(name: str, value: ArrayLike, width: int) -> Array:
            found = np.asarray(value, dtype=np.float64)
            found = found.reshape(0, width) if found.size == 0 else found
            if found.shape != (n, width):
                raise ValueError(f"{name} {found.shape} for {n} labels, expected ({n}, {width})")
            return found

        def column(name: str, value: ArrayLike | None, kind: Any) -> NDArray[Any]:
            found = np.full(n, -1, dtype=kind) if value is None else np.asarray(value, dtype=kind).reshape(-1)
            if len(found) != n:
                raise ValueError(f"{name} {found.shape} for {n} labels, expected ({n},)")
            return found

        return Boxes(
            table("centers", centers, 3),
            table("sizes", sizes, 3),
            table("rotations", rotations, 4),
            table("velocities", velocities, 2),
            label,
            column("scores", scores, np.float64),
            column("attributes", attributes, np.int64),
            column("num_pts", num_pts, np.int64),
        )

    @staticmethod
    def none() -> Boxes:
        """No boxes."""
        return Boxes.of([], [], [], [], [])

    @staticmethod
    def join(parts: Sequence[Boxes]) -> Boxes:
        """All boxes of `parts`, in their order."""
        if not parts:
            return Boxes.none()
        return Boxes(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Boxes)))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: NDArray[Any] | slice | list[int]) -> Boxes:
        """The boxes of a mask, of indices, or of a slice."""
        return Boxes(*(getattr(self, f.name)[chosen] for f in fields(self)))

    @property
    def yaws(self) -> Array:
        """(n,) headings of the boxes' x axes in this frame, -pi..pi."""
        return geometry.yaw(self.rotations)

    @property
    def corners(self) -> Array:
        """(n, 8, 3), in the order of `geometry.corners`."""
        return geometry.corners(self.centers, self.sizes, self.rotations)

    def moved(self, pose: Pose) -> Boxes:
        """The same boxes seen from the outer frame of `pose`; velocities turn with it, taken to be level."""
        level = np.concatenate([self.velocities, np.zeros((len(self), 1))], axis=1)
        return replace(
            self,
            centers=pose.apply(self.centers),
            rotations=geometry.multiply(pose.rotation, self.rotations),
            velocities=pose.turn(level)[:, :2],
        )

    def after(self, seconds: float) -> Boxes:
        """Where the boxes are a little later at the velocity they have; those of unknown velocity stay."""
        shift = np.zeros_like(self.centers)
        shift[:, :2] = np.nan_to_num(self.velocities) * seconds
        return replace(self, centers=self.centers + shift)
