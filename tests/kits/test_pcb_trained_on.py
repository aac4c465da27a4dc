"""The benchmarks that train a search's winner or supernet on: what they leave, and that a second start goes on."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import pcb_names, pcb_supernet, pcb_winner
from core.weights import load_weights, save_weights
from kits.pcb_inspection import training
from kits.pcb_inspection.model.design import BY_HAND, FILE, load_design, save_design
from kits.pcb_inspection.model.network import PairDetector
from kits.pcb_inspection.search import Supernet


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small crops, six boards, two drawn beside them."""
    monkeypatch.setattr(training, "SIZE", 160)
    monkeypatch.setattr(training, "drawn_beside", lambda pairs: 2)
    shown = training.training_batches
    monkeypatch.setattr(training, "training_batches", lambda ready, *others: shown(ready[-8:], *others))


def test_a_winner_is_trained_on_with_new_boards(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    design, before = replace(BY_HAND, widths=(8, 16, 16, 16), head=16), tmp_path / "before"
    before.mkdir()
    start = PairDetector(design)
    save_weights(start, before / "fp32.safetensors")
    save_design(design, before / FILE)
    asked: list[tuple[int, ...]] = []
    drawn = training.drawn

    def counted(*numbers: int) -> list[training.Ready]:
        asked.append(numbers)
        return drawn(*numbers)

    monkeypatch.setattr(training, "drawn", counted)
    out = tmp_path / "out"
    command = ["pcb_winner.py", "--weights", str(before), "--out", str(out), "--epochs", "2", "--fresh", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--seed", "3", "--expert", str(before), "--preset", "smoke"])
    pcb_winner.main()
    assert "mAP50-95 on the validation boards" in capsys.readouterr().out
    assert asked == [(2, 3, 0), (2, 3, 1)], "new boards in every epoch"
    history = json.loads((out / "training.json").read_text())
    assert [entry["epoch"] for entry in history] == [0, 1]
    after = PairDetector(load_design(out / FILE))
    load_weights(after, out / "fp32.safetensors")
    assert any(not torch.equal(a, b) for a, b in zip(start.parameters(), after.parameters(), strict=True))
    pcb_winner.main()
    assert json.loads((out / "training.json").read_text()) == history, "what is done is not done again"
    assert len(asked) == 2


def test_a_supernet_is_trained_on(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net, before, out = Supernet(), tmp_path / "before.safetensors", tmp_path / "out"
    save_weights(net, before)
    command = ["pcb_supernet.py", "--weights", str(before), "--out", str(out), "--epochs", "1", "--preset", "smoke"]
    monkeypatch.setattr(sys, "argv", command)
    pcb_supernet.main()
    after = Supernet()
    load_weights(after, out / "supernet.safetensors")
    assert any(not torch.equal(a, b) for a, b in zip(net.parameters(), after.parameters(), strict=True))


def test_names_are_judged_on_designs_that_a_detector_has_not_seen(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    save_design(replace(BY_HAND, widths=(8, 16, 16, 16), head=16), tmp_path / FILE)
    seen: list[set[str]] = []
    train = training.train_detector
    monkeypatch.setattr(
        training, "train_detector", lambda *a, **k: seen.append({pair.group for pair in a[0]}) or train(*a, **k)
    )
    command = ["pcb_names.py", "--out", str(tmp_path / "out"), "--weights", str(tmp_path), "--epochs", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--preset", "smoke"])
    pcb_names.main()
    found = json.loads((tmp_path / "out" / "names.json").read_text())
    designs = [row["design"] for row in found["designs"]]
    assert len(designs) > 1 and [set(designs) - groups for groups in seen] == [{name} for name in designs]
    assert all(row["pieces"] > 90 for row in found["designs"]), "drawn defects are what their names say"
    assert (tmp_path / "out" / "names.md").read_text() == pcb_names.markdown(found)
    pcb_names.main()
    assert len(seen) == len(designs), "what is trained is not trained again"
