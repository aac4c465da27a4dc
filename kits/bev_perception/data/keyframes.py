"""The samples of this kit: keyframes in the order of time, each with what the network takes and what it should say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from kits.bev_perception.data.boxes import Boxes
from kits.bev_perception.data.can_bus import CanBus
from kits.bev_perception.data.classes import CAMERAS
from kits.bev_perception.data.classes import CLASSES as TABLE_CLASSES
from kits.bev_perception.data.geometry import about_z
from kits.bev_perception.data.nuscenes import NuScenes, Scene
from kits.bev_perception.data.recordings import Sample, Views
from kits.bev_perception.model.boxes import flip_yaw
from kits.bev_perception.model.configs import CLASSES, Images
from kits.bev_perception.model.loss import Truth
from kits.bev_perception.model.state import Frame


@dataclass(frozen=True)
class Keyframe:
    """One keyframe of a nuScenes-format folder: `root` is the folder, `scene` the scene's name, `index` its place."""

    root: Path
    scene: str
    token: str
    index: int
    data: NuScenes = field(repr=False, compare=False)
    can_bus: CanBus = field(repr=False, compare=False)

    @property
    def sample(self) -> Sample:
        """Its recordings."""
        return self.data.sample(self.token)

    @property
    def before(self) -> Keyframe | None:
        """The keyframe before it in its scene."""
        if not self.index:
            return None
        token = self.data.scenes[self.scene].samples[self.index - 1]
        return replace(self, token=token, index=self.index - 1)

    def views(self, images: Images) -> Views:
        """The six cameras at the network's size; one that cannot be read is black and named in `missing`."""
        return self.sample.views((images.height, images.width))

    def frame(self, views: Views | None = None) -> Frame:
        """Where and when it was taken, for `BevState`; cameras that `views` misses are marked."""
        sample = self.sample
        return Frame(
            self.scene,
            sample.timestamp * 1e-6,
            self.can_bus(sample),
            None if views is None or not views.missing else camera_mask(views),
        )

    def truth(self, pc_range: Sequence[float]) -> Truth:
        """The boxes that a detector can know: a LiDAR point within or not counted, centre in `pc_range`."""
        found = self.data.annotations(self.token).boxes
        found = found[found.num_pts != 0].moved(self.sample.pose.inverse)
        low, high = np.array(pc_range[:3]), np.array(pc_range[3:])
        inside = np.all((found.centers > low) & (found.centers < high), axis=1)
        found = found[np.asarray(inside)]
        yaw = flip_yaw(torch.from_numpy(found.yaws))[:, None]
        parts = (
            torch.from_numpy(found.centers),
            torch.from_numpy(found.sizes),
            yaw,
            torch.from_numpy(found.velocities),
        )
        return Truth(torch.cat(parts, 1).float(), torch.from_numpy(LABELS[found.labels]))


LABELS = np.array([CLASSES.index(name) for name in TABLE_CLASSES])
"""The network's label of every label of the tables' classes."""
NAMES = np.array([TABLE_CLASSES.index(name) for name in CLASSES])
"""And back."""


def camera_mask(views: Views) -> tuple[bool, ...]:
    """Which of the six cameras came."""
    return tuple(channel not in views.missing for channel in CAMERAS)


def keyframes(data: NuScenes, scenes: Sequence[Scene]) -> list[Keyframe]:
    """All keyframes of the scenes, one scene after the other in the order of time."""
    can_bus = CanBus(data)
    return [
        Keyframe(data.root, scene.name, token, index, data, can_bus)
        for scene in scenes
        for index, token in enumerate(scene.samples)
    ]


def in_scenes(samples: Sequence[Keyframe]) -> list[list[Keyframe]]:
    """Runs of keyframes that follow each other in a scene, in their order."""
    runs: list[list[Keyframe]] = []
    for sample in samples:
        last = runs[-1][-1] if runs else None
        if last is not None and (last.root, last.scene, last.index + 1) == (sample.root, sample.scene, sample.index):
            runs[-1].append(sample)
        else:
            runs.append([sample])
    return runs


def to_global(boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, sample: Sample) -> Boxes:
    """Detections of the LiDAR frame, (n, 9) with the network's yaw, scores and labels (n,), in the global frame."""
    found = boxes.detach().double().cpu()
    heading = flip_yaw(found[:, 6]).numpy()
    there = Boxes.of(
        found[:, :3].numpy(),
        found[:, 3:6].numpy(),
        about_z(heading).reshape(-1, 4),
        found[:, 7:9].numpy(),
        NAMES[labels.cpu().numpy()],
        scores.detach().double().cpu().numpy(),
    )
    return there.moved(sample.pose)
