"""Experts by the sign of a difference: one small network that knows copper lost, and sees copper gained as lost.

The six defects come in pairs that turn into one another when copper and board change places: open and short, mousebite
and spur, pin-hole and spurious copper. So a network that only knows the three in which copper is lost finds the other
three in the inverted crop. A crop with differences of both signs, or with none that tells, is looked at both ways.
Letters: N crops, h = CROP / 8.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from core.train import Fit, Schedule
from kits.pcb_inspection import PcbInspection, training
from kits.pcb_inspection.conditional import NOTHING, Looking, Window, freeze_gate, least_area, stacked
from kits.pcb_inspection.data.augment import Ready, prepare
from kits.pcb_inspection.data.deeppcb import Pair
from kits.pcb_inspection.data.resolution import seen_at
from kits.pcb_inspection.model.design import Design
from kits.pcb_inspection.model.network import CLASS_COUNT, DUAL, PairDetector
from kits.pcb_inspection.model.pair import differences

Planes = TypeVar("Planes", Tensor, NDArray[Any])

LOST = (0, 2, 5)
"""Open, mousebite and pin-hole: copper is missing. The others are their duals."""
DESIGN = Design(widths=(16, 32, 64, 64), deepest=16, head=32)
"""Of the expert: nothing at stride 32, since a crop measures four of its cells."""


def inverted(planes: Planes) -> Planes:
    """Crops (N, 4, H, W) with copper and board changed: copper gained becomes copper lost."""
    found = planes[:, [0, 1, 3, 2]]
    found[:, :2] = (255 if planes.itemsize == 1 else 1) - found[:, :2]
    return found


class Experts:
    """Crops through the expert `lost`, each as it is, inverted, or both ways, as its differences ask for.

    A sign of which the owned part of a crop has at least `area` pixels is looked for; of none so large, both are.
    """

    def __init__(self, lost: Looking, area: int) -> None:
        self._lost, self.area = lost, area
        self.looks = 0

    def __call__(self, batch: Tensor, owned: Sequence[Window] | None = None) -> tuple[Tensor, Tensor]:
        """(N, 4, H, W) -> class logits (N, 6, h, w) and distances (N, 4, h, w)."""
        parts = owned or [(0, batch.shape[2], 0, batch.shape[3])] * len(batch)
        crops = batch.numpy()
        gained, lost = (
            torch.tensor([
                np.count_nonzero(crop[plane, a:b, c:d] > 0.5) >= self.area
                for crop, (a, b, c, d) in zip(crops, parts, strict=True)
            ]) for plane in (2, 3)
        )  # fmt: skip
        neither = ~gained & ~lost
        as_is, turned = (lost | neither).nonzero()[:, 0], (gained | neither).nonzero()[:, 0]
        self.looks += len(as_is) + len(turned)
        said, far = self._lost(stacked([*crops[as_is.numpy()], *inverted(crops[turned.numpy()])]))
        return merged(len(batch), said, far, as_is, turned)

    def alone(self) -> Experts:
        return Experts(self._lost.alone(), self.area)


def merged(count: int, said: Tensor, far: Tensor, as_is: Tensor, turned: Tensor) -> tuple[Tensor, Tensor]:
    """What the expert said of crops `as_is` and then of those `turned`, in the classes of the crops as they are.

    A cell's distances are those of the way in which it is surer.
    """
    logits = said.new_full((count, CLASS_COUNT, *said.shape[2:]), NOTHING)
    distances = far.new_zeros(count, *far.shape[1:])
    surest = said.new_full((count, 1, *said.shape[2:]), -torch.inf)
    known = torch.tensor(LOST)
    for crops, part, classes in (
        (as_is, slice(0, len(as_is)), known),
        (turned, slice(len(as_is), None), torch.from_numpy(DUAL)[known]),
    ):
        answer = said[part][:, known]
        logits[crops[:, None], classes] = answer
        sure = answer.amax(1, keepdim=True)
        distances[crops] = torch.where(sure > surest[crops], far[part], distances[crops])
        surest[crops] = torch.maximum(sure, surest[crops])
    return logits, distances


class BothWays(nn.Module):
    """An expert as a detector of whole pairs, each looked at both ways: what validation scores."""

    def __init__(self, expert: nn.Module) -> None:
        super().__init__()
        self.expert = expert

    def forward(self, planes: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 4, H, W) -> class logits (N, 6, h, w) and distances (N, 4, h, w)."""
        said, far = self.expert(torch.cat((planes, inverted(planes))))
        every = torch.arange(len(planes))
        return merged(len(planes), said, far, every, every)


def one_way(batches: Iterable[dict[str, Any]], rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Training batches as an expert sees them: every other crop inverted, the defects of copper lost alone."""
    for batch in batches:
        turn = torch.from_numpy(rng.random(len(batch["images"])) < 0.5)
        shown = torch.where(turn[:, None, None, None], inverted(batch["images"]), batch["images"])
        truths = []
        for (boxes, labels), turned in zip(batch["truths"], turn.tolist()):
            now = torch.from_numpy(DUAL)[labels] if turned else labels
            keep = torch.isin(now, torch.tensor(LOST))
            truths.append((boxes[keep], now[keep]))
        yield {**batch, "images": shown.contiguous(memory_format=torch.channels_last), "truths": truths}


class OneWay:
    """See `training.View`."""

    known: tuple[int, ...] = LOST

    def shown(self, batches: Iterable[dict[str, Any]], rng: np.random.Generator) -> Iterator[dict[str, Any]]:
        """Every other crop inverted, the defects of copper lost alone."""
        return one_way(batches, rng)

    def judged(self, network: nn.Module) -> nn.Module:
        """Both ways."""
        return BothWays(network)


def train_expert(
    train: Sequence[Ready], validation: Sequence[Ready], schedule: Schedule, folder: Path, resume: bool,
    larger: Sequence[PairDetector] = (),
) -> Fit:  # fmt: skip
    """Train an expert from random weights, beside the annotations towards `larger` detectors of pairs.

    The epoch is chosen by mAP50-95 on `validation`, looked at both ways.
    """

    return training.train_detector(
        train, validation, schedule, folder, resume, start=PairDetector(DESIGN), larger=larger, view=OneWay()
    )  # fmt: skip


def freeze_sign(pairs: Sequence[Pair], side: int) -> dict[str, int]:
    """From how many pixels on a sign is looked for: half of the least that a defect of it showed on these boards."""
    areas: list[int] = []
    for seen in (seen_at(pair, side) for pair in prepare(pairs)):
        gained, lost = differences(seen.test, seen.template)
        nothing = np.zeros_like(gained)
        loses = np.isin(seen.labels, LOST)
        areas += least_area(nothing, lost, seen.boxes[loses]) + least_area(gained, nothing, seen.boxes[~loses])
    area = freeze_gate(areas)
    return {"area": area, "boards": len(pairs), "defects": len(areas), "missed": sum(a < area for a in areas)}


class ExpertKit(PcbInspection):
    """The kit for what compresses an expert: its batches are shown one way."""

    def batches(
        self, samples: Sequence[Pair], batch_size: int, *, train: bool, seed: int = 0
    ) -> Iterable[dict[str, Any]]:
        """Varied crops for training, whole pairs otherwise, every other one inverted."""
        return one_way(super().batches(samples, batch_size, train=train, seed=seed), np.random.default_rng(seed))
