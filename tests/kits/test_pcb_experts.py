"""Experts by the sign of a difference: what they are shown, and that their answers mean the crops as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from core.train import Schedule
from kits.pcb_inspection import KIT
from kits.pcb_inspection.conditional import BATCHES, CROP, NOTHING, Conditional, Crops
from kits.pcb_inspection.data.augment import prepare
from kits.pcb_inspection.experts import (
    LOST,
    BothWays,
    ExpertKit,
    Experts,
    OneWay,
    freeze_sign,
    inverted,
    one_way,
    train_expert,
)
from kits.pcb_inspection.model.network import DUAL, PairDetector
from kits.pcb_inspection.training import told, training_batches

GAINED = tuple(int(DUAL[n]) for n in LOST)


class Loses(nn.Module):
    """Says an open where copper is lost, and how far by the test's own pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(8)
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append(len(x))
        pooled = self.pool(x)
        logits = torch.full((len(x), 6, *pooled.shape[2:]), 7.0)  # of classes that it does not know nothing is taken
        logits[:, list(LOST)] = -5.0
        logits[:, LOST[0]] += 10 * pooled[:, 3]
        return logits, pooled[:, :1].expand(-1, 4, -1, -1)


def crop(gained: tuple[int, int] | None = None, lost: tuple[int, int] | None = None) -> Tensor:
    """Bare board with squares of 8 px of copper gained, and lost, at these cells."""
    planes = torch.zeros(1, 4, CROP, CROP)
    planes[:, :2] = 1.0
    for place, plane in ((gained, 2), (lost, 3)):
        if place is not None:
            planes[:, plane, 8 * place[0] : 8 * place[0] + 8, 8 * place[1] : 8 * place[1] + 8] = 1.0
    return planes


def test_copper_gained_is_told_as_the_dual_of_copper_lost() -> None:
    net = Loses()
    experts = Experts(Crops(dict.fromkeys(BATCHES, net)), 16)
    batch = torch.cat((crop(lost=(3, 4)), crop(gained=(5, 6)), crop((1, 2), (9, 10)), crop()))
    logits, distances = experts(batch)
    assert experts.looks == 1 + 1 + 2 + 2 and sum(net.seen) >= 6
    opened, shorted = LOST[0], GAINED[0]
    assert logits[0, opened, 3, 4] == 5 and (logits[0, list(GAINED)] == NOTHING).all()
    assert logits[1, shorted, 5, 6] == 5 and (logits[1, list(LOST)] == NOTHING).all()
    assert logits[2, shorted, 1, 2] == 5 and logits[2, opened, 9, 10] == 5
    assert (logits[3] == -5).all(), "without a sign it is looked at both ways"
    assert distances[2, 0, 9, 10] == 1.0 and distances[2, 0, 1, 2] == 0.0, "of the surer way: the test, and its inverse"


def test_differences_below_the_area_call_for_no_look() -> None:
    net = Loses()
    experts = Experts(Crops(dict.fromkeys(BATCHES, net)), 64)
    batch = crop(lost=(3, 4))
    batch[:, 2, 0, :63] = 1.0
    experts(batch)
    assert experts.looks == 1
    batch[:, 2, 0, 63] = 1.0
    experts(batch)
    assert experts.looks == 3


def test_what_lies_at_the_rim_of_a_crop_is_none_of_its_business() -> None:
    net = Loses()
    experts = Experts(Crops(dict.fromkeys(BATCHES, net)), 1)
    batch = crop(gained=(0, 0), lost=(8, 8))
    experts(batch, [(24, 104, 24, 104)])
    assert experts.looks == 1
    experts(batch, [(0, 104, 0, 104)])
    assert experts.looks == 3


def test_both_ways_an_inverted_pair_has_the_dual_defects() -> None:
    torch.manual_seed(0)
    both = BothWays(PairDetector()).eval()
    planes = torch.rand(2, 4, 64, 64).round()
    with torch.no_grad():
        (logits, distances), (turned, far) = both(planes), both(inverted(planes))
    assert torch.allclose(turned[:, DUAL.tolist()], logits, atol=1e-5) and torch.allclose(far, distances, atol=1e-5)
    assert torch.equal(inverted(inverted(planes)), planes)


def test_an_expert_is_shown_every_defect_as_one_of_copper_lost() -> None:
    ready = prepare(list(KIT.dataset(None, "train", "smoke"))[:8])
    plain = list(training_batches(ready, 4, 6, 0, 0))
    shown = list(one_way(training_batches(ready, 4, 6, 0, 0), np.random.default_rng(0)))
    turned = kept = 0
    for before, after in zip(plain, shown):
        for i, ((boxes, labels), (now, names)) in enumerate(zip(before["truths"], after["truths"])):
            same = torch.equal(before["images"][i], after["images"][i])
            wanted = torch.isin(labels, torch.tensor(LOST if same else GAINED))
            assert torch.equal(now, boxes[wanted]) and torch.isin(names, torch.tensor(LOST)).all()
            assert same or torch.equal(after["images"][i], inverted(before["images"][i : i + 1])[0])
            turned, kept = turned + (not same), kept + len(now)
    assert 5 < turned < 19 and kept > 0


def test_a_teacher_says_nothing_of_classes_that_an_expert_does_not_know() -> None:
    torch.manual_seed(0)
    images = torch.rand(1, 4, 64, 64).round()
    whole, part = told([PairDetector()], images), told([PairDetector().eval()], images, OneWay())
    assert part.shape == whole.shape and (part[:, list(GAINED)] == 0).all() and (part[:, list(LOST)] > 0).all()


def test_the_sign_is_frozen_where_no_defect_is_missed() -> None:
    boards = KIT.dataset(None, "val", "smoke")
    found = freeze_sign(boards, 640)
    assert found["area"] >= 1 and found["boards"] == len(boards)
    assert found["defects"] == sum(len(pair.boxes) for pair in boards) > 10
    assert found["missed"] <= 0.05 * found["defects"]


def test_an_expert_trains_and_goes_through_crops(tmp_path: Path) -> None:
    ready = prepare(list(KIT.dataset(None, "train", "smoke"))[:6])
    schedule = Schedule(epochs=1, batch_size=4, lr=1e-3, warmup=0.2, ema=0.5)
    expert = train_expert(ready[:4], ready[4:], schedule, tmp_path / "t", False, [PairDetector()]).model.eval()
    assert isinstance(expert, PairDetector) and expert.design.deepest == 16
    module = Conditional(PairDetector(), Experts(Crops(dict.fromkeys(BATCHES, expert)), 4), 4, 99)
    tile = torch.zeros(1, 4, 640, 640)
    tile[0, :2] = 1.0
    tile[0, 3, 200:208, 304:312] = 1.0
    with torch.no_grad():
        logits, _ = module(tile)
    assert dict(module.ways) == {"crops": 1} and (logits[0, list(LOST)] > NOTHING).any()


@pytest.mark.parametrize("train", [True, False])
def test_what_compresses_an_expert_shows_it_copper_lost_alone(train: bool) -> None:
    samples = list(KIT.dataset(None, "train", "smoke"))[:4]
    batches: list[dict[str, Any]] = list(ExpertKit().batches(samples, 2, train=train))
    labels = torch.cat([names for batch in batches for _, names in batch["truths"]])
    assert len(labels) and torch.isin(labels, torch.tensor(LOST)).all()
