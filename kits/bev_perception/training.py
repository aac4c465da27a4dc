"""How `nano` is trained: along streams of frames, with dense losses and denoising beside the matched loss."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from core.train import Fit, Schedule, fit
from core.weights import load_weights, save_weights
from kits.bev_perception.data.keyframes import Keyframe, in_scenes
from kits.bev_perception.data.streams import Shot, collate, streams
from kits.bev_perception.model.configs import NANO, Config
from kits.bev_perception.model.denoising import Noise
from kits.bev_perception.model.detector import BEVFormer, empty_memory
from kits.bev_perception.model.learner import Batch, Learner
from kits.bev_perception.model.loss import rarity

LANES = 2
"""Scenes that a process shows side by side."""
HEADS = "heads.safetensors"
"""What trains along, in the folder of a training."""
PROCESSES = 2
"""Of the training of the shipped weights, one a core: `accelerate launch` or `torch.distributed.run`."""

SCHEDULES = {
    "full": Schedule(epochs=24, batch_size=LANES, lr=6e-4, weight_decay=0.01, warmup=0.03, ema=0.998, clip=10.0),
    "smoke": Schedule(epochs=1, batch_size=LANES, lr=3e-4, weight_decay=0.01, warmup=0.2, ema=0.5, clip=10.0),
}


def shown(
    samples: Sequence[Keyframe], lanes: int, share: float, seed: int, nights: int = 1
) -> tuple[Callable[[int], Iterator[list[Shot]]], int]:
    """What each epoch shows, a `share` of the scenes and others each time, and how many rows of `lanes` that are.

    Scenes by night are there `nights` times, each time cut and varied in another way.

    Where several processes train, each takes a row of its own a step.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    scenes = [s for s in in_scenes(samples) for _ in range(nights if s[0].data.scenes[s[0].scene].night else 1)]
    frames = sum(len(scene) for scene in scenes)
    order = np.random.default_rng(seed).permutation(len(scenes))
    count = max(1, round(share * len(scenes)))

    def batches(epoch: int) -> Iterator[list[Shot]]:
        chosen = [scenes[order[(epoch * count + i) % len(scenes)]] for i in range(count)]
        for row in streams([k for scene in chosen for k in scene], lanes * processes, seed * 1009 + epoch, train=True):
            for process in range(processes):
                yield row[process * lanes : (process + 1) * lanes]

    return batches, max(1, -(-round(share * frames) // (lanes * processes))) * processes


def learner_of(detector: BEVFormer, samples: Iterable[Keyframe]) -> Learner:
    """The losses that every training of a detector has: denoising, pixels, and classes by their rarity in `samples`."""
    config = detector.config
    weights = rarity((sample.truth(config.pc_range) for sample in samples), len(config.classes))
    return Learner(detector, Noise(groups=3), pixels=True, class_weights=weights)


class Memory:
    """The loss of rows of shots along a stream: keeps what the detector remembers of the row before."""

    def __init__(self, config: Config, lanes: int) -> None:
        self.config, self.lanes = config, lanes
        self._bev: Tensor | None = None

    def batch(self, shots: Sequence[Shot], device: torch.device) -> Batch:
        """The row as a batch; where a scene begins, what is remembered is not looked at."""
        view, truths = collate(shots, self.config)
        moved = type(view)(*(t.to(device) for t in vars(view).values()))
        there = [type(t)(t.boxes.to(device), t.labels.to(device)) for t in truths]
        return Batch(moved, there, (), self.remembered(len(shots), device))

    def remembered(self, rows: int, device: torch.device) -> Tensor:
        """The memory before the next row (B, Q, C)."""
        return (self._bev if self._bev is not None else empty_memory(self.config, rows)).to(device)

    def keep(self, bev: Tensor) -> None:
        """Remember for the row that follows."""
        self._bev = bev.detach()


class Streaming(nn.Module):
    """A learner whose forward takes shots and returns the loss, so that several processes can share its gradient."""

    def __init__(self, learner: Learner, memory: Memory) -> None:
        super().__init__()
        self.learner, self.memory = learner, memory

    def forward(self, shots: Sequence[Shot]) -> Tensor:
        device = self.learner.detector.pts_bbox_head.code_weights.device
        found = self.learner.losses(self.memory.batch(shots, device))
        self.memory.keep(found.bev)
        return found.total


def train_detector(
    samples: Sequence[Keyframe],
    schedule: Schedule,
    folder: Path,
    resume: bool,
    *,
    config: Config = NANO,
    evaluate: Callable[[BEVFormer], float] | None = None,
    on_epoch: Callable[[int, BEVFormer], bool | None] | None = None,
    start: BEVFormer | None = None,
    heads: Path | None = None,
    share: float = 1.0,
) -> Fit:
    """Train a detector from random weights, or from `start`; `fit.model` is the detector.

    `evaluate` tells the epochs apart; the best one's weights are returned. `heads` is a file of `Learner.heads` to go
    on with: at random they disturb a trained detector for most of an epoch. They are left in `folder` as HEADS.
    An epoch shows a `share` of the scenes, others each time.
    """
    torch.manual_seed(schedule.seed)
    lanes = schedule.batch_size
    detector = start if start is not None else BEVFormer(config)
    learner = learner_of(detector, samples)
    if heads is not None:
        load_weights(learner.heads(), heads)
    model = Streaming(learner, Memory(detector.config, lanes))
    batches, steps = shown(samples, lanes, share, schedule.seed)

    def loss(net: nn.Module, shots: Sequence[Shot]) -> Tensor:
        value: Tensor = net(shots)
        return value

    trained = fit(
        model,
        batches,
        loss,
        schedule,
        steps_per_epoch=steps,
        folder=folder,
        resume=resume,
        evaluate=None if evaluate is None else lambda m: evaluate(_detector(m)),
        on_epoch=None if on_epoch is None else lambda epoch, m: on_epoch(epoch, _detector(m)),
        label="training",
    )
    save_weights(learner.heads(), folder / HEADS)
    return Fit(_detector(trained.model), trained.history)


def _detector(model: nn.Module) -> BEVFormer:
    found = model.get_submodule("learner.detector")
    assert isinstance(found, BEVFormer)
    return found
