"""The shipped weights on the published boards: FITKIT_DEEPPCB names the folder of DeepPCB, else these are skipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.kit import load
from core.shipped import shipped_artifact
from kits.pcb_inspection.data.deeppcb import split

pytestmark = [pytest.mark.real_data, pytest.mark.slow]


def test_published_counts(deeppcb: Path) -> None:
    sets = {name: split(deeppcb, name) for name in ("train", "val", "holdout")}
    assert {name: len(pairs) for name, pairs in sets.items()} == {"train": 839, "val": 50, "holdout": 111}
    assert sum(len(p.boxes) for pairs in sets.values() for p in pairs) == 6873


def test_shipped_int8_keeps_its_accuracy_on_boards_held_out(deeppcb: Path) -> None:
    kit = load("pcb_inspection")
    artifact = shipped_artifact(kit)
    pairs = kit.dataset(deeppcb, "holdout")
    scores = {name: kit.score(artifact.as_module(name, 2), pairs, artifact.meta) for name in artifact.variants}
    for name, found in scores.items():
        assert found["official_ap"][0] >= 97.0, f"{name}: {found['official_ap']}"
        assert found["map33"][0] >= scores["fp32-onnxruntime"]["map33"][0] - 0.5, f"{name}: {found['map33']}"
