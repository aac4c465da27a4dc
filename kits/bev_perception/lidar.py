"""Cross-modal distillation: a teacher that sees with LiDAR, and the step in which the cameras learn from it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.compress import Outcome, handles
from core.distillation import guided_loss
from core.kit import Context, InputError, Step
from core.progress import progress
from core.train import Fit, Schedule, fit
from core.weights import load_weights
from kits.bev_perception.data.boxes import Boxes
from kits.bev_perception.data.keyframes import Keyframe, to_global
from kits.bev_perception.data.streams import Shot, Variation, boxes_of
from kits.bev_perception.metrics.results import with_attributes
from kits.bev_perception.model.boxes import detections
from kits.bev_perception.model.configs import NANO, Config
from kits.bev_perception.model.dense_loss import heatmap
from kits.bev_perception.model.detector import BEVFormer
from kits.bev_perception.model.learner import Learner
from kits.bev_perception.model.loss import Truth
from kits.bev_perception.model.teacher import LidarTeacher
from kits.bev_perception.training import LANES, Memory, learner_of, shown

SCHEDULES: Mapping[str, Schedule] = {
    "full": Schedule(epochs=8, batch_size=4, lr=1e-3, weight_decay=0.01, warmup=0.05, ema=0.99, clip=10.0),
    "smoke": Schedule(epochs=1, batch_size=2, lr=5e-4, weight_decay=0.01, warmup=0.2, ema=0.5, clip=10.0),
}
"""Of the teacher."""


@dataclass(frozen=True)
class LearnFromLidar(Step):
    """Train the cameras' detector as it was trained and, `weight` times, towards the BEV of a LiDAR teacher.

    `teacher` is a safetensors file of `train_teacher`, `heads` one of what only training has (see `train_detector`),
    which otherwise begins at random. The BEVs are compared where something stands, through a linear
    layer that is thrown away after, since the two have no common channels. With `weight` 0 the same training without a
    teacher, which is what its gain is told against. An epoch shows a `share` of the scenes, others each time.
    """

    teacher: str
    epochs: int = 2
    lr: float = 2e-4
    weight: float = 1.0
    share: float = 1.0
    seed: int = 0
    heads: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"LearnFromLidar.share: {self.share}, expected more than 0 and at most 1")


def cloud(shot: Shot) -> Tensor:
    """The LiDAR's points (n, 4) x, y, z, intensity of a shot, mirrored and turned with it."""
    points = shot.keyframe.sample.lidar.points()[:, :4].astype(np.float64)
    varied: Variation = shot.variation
    if varied.mirror:
        points[:, 0] *= -1
    sin, cos = np.sin(varied.turn), np.cos(varied.turn)
    x, y = points[:, 0].copy(), points[:, 1].copy()
    points[:, 0], points[:, 1] = cos * x + sin * y, cos * y - sin * x
    return torch.from_numpy(points).float()


class _Teaching(nn.Module):
    """A teacher whose forward takes shots and returns the loss."""

    def __init__(self, teacher: LidarTeacher) -> None:
        super().__init__()
        self.teacher = teacher

    def forward(self, shots: Sequence[Shot]) -> Tensor:
        device = self.teacher.pts_bbox_head.code_weights.device
        truths = boxes_of(shots, self.teacher.config)
        there = [Truth(t.boxes.to(device), t.labels.to(device)) for t in truths]
        return self.teacher.loss([cloud(shot).to(device) for shot in shots], there)


def train_teacher(
    samples: Sequence[Keyframe], schedule: Schedule, folder: Path, resume: bool, *, config: Config = NANO
) -> Fit:
    """Train a LiDAR teacher from random weights; `fit.model` is the teacher."""
    torch.manual_seed(schedule.seed)
    model, lanes = _Teaching(LidarTeacher(config)), schedule.batch_size
    processes = int(os.environ.get("WORLD_SIZE", "1"))

    def batches(epoch: int) -> Iterator[list[Shot]]:
        rng = np.random.default_rng(schedule.seed * 1009 + epoch)
        order = rng.permutation(len(samples))
        for start in range(0, len(samples) - lanes + 1, lanes):
            yield [Shot(samples[i], None, Variation.drawn(rng)) for i in order[start : start + lanes]]

    def loss(net: nn.Module, shots: Sequence[Shot]) -> Tensor:
        value: Tensor = net(shots)
        return value

    steps = max(processes, len(samples) // lanes)
    trained = fit(model, batches, loss, schedule, steps_per_epoch=steps, folder=folder, resume=resume, label="teacher")
    return Fit(trained.model.get_submodule("teacher"), trained.history)


@torch.no_grad()
def observed_by_lidar(teacher: LidarTeacher, samples: Sequence[Keyframe]) -> dict[str, Boxes]:
    """What a teacher finds, boxes in the global frame by token."""
    found = {}
    teacher.eval()
    with progress("watching with LiDAR", len(samples)) as bar:
        for keyframe in samples:
            scores, codes, _ = teacher([cloud(Shot(keyframe, None, Variation()))])
            said = detections(scores[0], codes[0], teacher.config)
            found[keyframe.token] = with_attributes(to_global(said.boxes, said.scores, said.labels, keyframe.sample))
            bar.advance()
    return found


class _Learning(nn.Module):
    """A learner that also moves its BEV towards the teacher's."""

    def __init__(self, learner: Learner, teacher: LidarTeacher | None, weight: float) -> None:
        super().__init__()
        self.learner, self.weight = learner, weight
        config = learner.detector.config
        self.memory = Memory(config, LANES)
        self.adapter = nn.Linear(config.embed_dims, config.embed_dims)
        self._teacher = [teacher]  # in a list, so that it is no part of what is trained

    def forward(self, shots: Sequence[Shot]) -> Tensor:
        config = self.learner.detector.config
        device = self.learner.detector.pts_bbox_head.code_weights.device
        batch = self.memory.batch(shots, device)
        found = self.learner.losses(batch)
        self.memory.keep(found.bev)
        (teacher,) = self._teacher
        if teacher is None:
            return found.total + 0 * self.adapter.weight.sum() + 0 * self.adapter.bias.sum()
        with torch.no_grad():
            told = teacher.pillars([cloud(shot).to(device) for shot in shots])
        grid = (config.bev_h, config.bev_w)
        ours, theirs = (bev.transpose(1, 2).unflatten(2, grid) for bev in (self.adapter(found.bev), told))
        return found.total + self.weight * guided_loss(ours, theirs, foreground(batch.truths, config))


def foreground(truths: Sequence[Truth], config: Config) -> Tensor:
    """(B, 1, bev_h, bev_w): 1 where something stands, less around it, 0 elsewhere."""
    maps = []
    for truth in truths:
        low, extent = (truth.boxes.new_tensor(v) for v in (config.pc_range[:2], config.extent[:2]))
        cells = ((truth.boxes[:, :2] - low) / extent * extent.new_tensor((config.bev_w, config.bev_h))).floor()
        spread = torch.full((len(cells),), 0.8, device=cells.device)
        maps.append(heatmap(cells, spread, torch.zeros_like(truth.labels), (1, config.bev_h, config.bev_w)))
    return torch.stack(maps)


@handles(LearnFromLidar)
def learn_from_lidar(model: nn.Module, step: LearnFromLidar, context: Context) -> Outcome:
    """Train a detector beside a teacher; its modules stay what they are."""
    if not isinstance(model, BEVFormer):
        raise InputError(
            f"LearnFromLidar: takes a BEVFormer, this is a {type(model).__name__}; put it before the others"
        )
    teacher = None
    if step.weight:
        teacher = LidarTeacher(model.config)
        path = Path(step.teacher)
        if not path.is_file():
            raise InputError(f"LearnFromLidar.teacher: {step.teacher!r}: no such file; train one with train_teacher")
        load_weights(teacher, path)
        teacher.eval()
    samples = context.kit.dataset(context.data, "train", context.preset)
    learner = learner_of(model, samples)
    if step.heads:
        if not Path(step.heads).is_file():
            raise InputError(f"LearnFromLidar.heads: {step.heads!r}: no such file; leave it out to begin at random")
        load_weights(learner.heads(), Path(step.heads))
    learning = _Learning(learner, teacher, step.weight)
    schedule = Schedule(step.epochs, LANES, step.lr, weight_decay=0.01, warmup=0.1, clip=10.0, seed=step.seed)

    batches, steps = shown(samples, LANES, step.share, step.seed)

    def loss(net: nn.Module, shots: Sequence[Shot]) -> Tensor:
        value: Tensor = net(shots)
        return value

    folder = context.folder / "lidar" if context.folder is not None else None
    trained = fit(
        learning, batches, loss, schedule, steps_per_epoch=steps, folder=folder,
        resume=context.resume, label="learning from LiDAR",
    )  # fmt: skip
    losses = [round(entry["loss"], 4) for entry in trained.history]
    what = (
        f"trained for {step.epochs} epochs beside a LiDAR teacher" if step.weight else f"trained {step.epochs} epochs"
    )
    detector: Any = trained.model.get_submodule("learner.detector")
    return Outcome(detector, [{"layer": "(model)", "what": f"{what}; loss {losses[0]:.4g} -> {losses[-1]:.4g}"}])
