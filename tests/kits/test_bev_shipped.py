"""What ships beside the detector: taken from a run, known by its original, rebuilt, and refused where it cannot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.compress import compress, file_hash
from core.kit import InputError, Recipe
from core.pruning import Sparsify
from kits.bev_perception import shipped
from kits.bev_perception.card import SHOWN
from kits.bev_perception.model.detector import BEVFormer
from kits.bev_perception.shipped import TakeWhole, ship, tell
from kits.bev_perception.stem import DepthStem
from tests.kits.bev_models import MICRO
from tests.kits.test_bev_lidar import Data

CONFIG = replace(MICRO, proposals=True)
STEPS = (DepthStem(), Sparsify())


def detector(seed: int = 0) -> BEVFormer:
    torch.manual_seed(seed)
    return BEVFormer(CONFIG).eval()


def kit() -> Any:
    found: Any = Data([])
    found.name = "bev"
    return found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """As `fitkit run --recipe whole` leaves it, of two steps."""
    out = tmp_path / "run"
    recipe = Recipe("whole", STEPS, "", "")
    _, trace = compress(detector(), recipe, kit(), folder=out / "steps")
    audit = {"step": {"step": "Audited"}, "changed": [{"layer": "", "what": "ran as INT8"}], "seconds": 99.0}
    report = {"recipe": recipe.to_json(), "trace": [*(entry.to_json() for entry in trace), audit]}
    (out / "report.json").write_text(json.dumps(report))
    return out


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setattr(shipped, "WHOLE", folder / "whole.safetensors")
    monkeypatch.setattr(shipped, "CARD", folder / "whole.json")
    return folder


def taken(model: BEVFormer) -> tuple[torch.nn.Module, Any]:
    return compress(model, Recipe("shipped", (TakeWhole(),), "", ""), kit())


def test_what_a_run_made_is_taken_without_its_training(run: Path, weights: Path) -> None:
    assert not shipped.is_there() and not shipped.is_default(detector())
    ship(run, detector(), weights)
    assert shipped.is_there() and shipped.is_default(detector()) and not shipped.is_default(detector(1))
    small, trace = taken(detector())
    made, _ = compress(detector(), Recipe("whole", STEPS, "", ""), kit())
    state = small.state_dict()
    assert state.keys() == made.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in made.state_dict().items())
    said = [row["what"] for row in trace[0].changed]
    assert not any("INT8" in what for what in said), "the audit is made anew"


def test_another_detector_and_changed_bytes_are_refused(run: Path, weights: Path) -> None:
    with pytest.raises(InputError, match="none ships"):
        taken(detector())
    ship(run, detector(), weights)
    with pytest.raises(InputError, match="this is another"):
        taken(detector(1))
    whole = weights / "whole.safetensors"
    whole.write_bytes(whole.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(InputError, match="install the kit anew"):
        taken(detector())


@pytest.fixture
def scored(run: Path, weights: Path, tmp_path: Path) -> Path:
    """As `fitkit run --recipe shipped` leaves it, of what `run` made."""
    ship(run, detector(), weights)
    about = {"data": "streets", "frames": {"train": 2, "val": 3, "test": 4}, "parameters": 5, "seed": 6, "command": "c",
             "seconds": 60, "device": "a CPU"}  # fmt: skip
    card = {"threshold": 0.1, "int8": [], "about": about, "scores": {}, "sha256": {}, "date": "2020-01-01"}
    (weights / "card.json").write_text(json.dumps(card))
    out = tmp_path / "scored"
    compress(detector(), Recipe("shipped", (TakeWhole(),), "", ""), kit(), folder=out / "steps")
    (out / "artifact").mkdir()
    (out / "artifact" / "manifest.json").write_text(json.dumps({"meta": {"threshold": 0.25, "alarm": 4.0, "more": 1}}))
    found = {name: [50.0, ""] for name, _ in SHOWN} | {"nds_night": [float("nan"), "%"]}
    (out / "stage-scores.json").write_text(json.dumps({"int8-openvino": found}))
    (out / "report.json").write_text(json.dumps({"recipe": {"name": "shipped"}}))
    (out / "run.json").write_text(json.dumps({"data": None, "preset": "full"}))
    return out


def test_the_card_tells_what_a_run_of_what_ships_has_scored(scored: Path, weights: Path) -> None:
    tell(scored, detector(), weights)
    card = json.loads((weights / "card.json").read_text())
    assert (card["threshold"], card["alarm"]) == (0.25, 4.0) and "more" not in card
    assert card["scores"]["int8-openvino"]["nds"] == 50.0 and card["scores"]["int8-openvino"]["nds_night"] is None
    assert card["sha256"]["whole.safetensors"] == file_hash(weights / "whole.safetensors")
    assert card["about"]["seed"] == 6 and card["date"] > "2026"
    text = (weights / "README.md").read_text()
    assert "| NDS [%] | 50.00 |" in text and "| NDS by night [%] | - |" in text


@pytest.mark.parametrize("what", ["recipe", "data", "preset", "weights"])
def test_a_run_of_something_else_does_not_change_the_card(scored: Path, weights: Path, what: str) -> None:
    before = (weights / "card.json").read_text()
    if what == "recipe":
        (scored / "report.json").write_text(json.dumps({"recipe": {"name": "mixed"}}))
    elif what == "weights":
        (stored,) = (scored / "steps").glob("*/model.safetensors")
        tensors = load_file(stored)
        save_file({name: t + 1 if t.is_floating_point() else t for name, t in tensors.items()}, stored)
    else:
        run = {"data": None, "preset": "full"} | {what: "else"}
        (scored / "run.json").write_text(json.dumps(run))
    expected = {"recipe": "'mixed'", "data": "on else", "preset": "on a part", "weights": "scored other weights"}
    with pytest.raises(InputError, match=expected[what]):
        tell(scored, detector(), weights)
    assert (weights / "card.json").read_text() == before


@pytest.mark.parametrize("what", ["recipe", "steps", "original"])
def test_a_run_that_does_not_fit_is_refused(run: Path, weights: Path, what: str) -> None:
    report, original = json.loads((run / "report.json").read_text()), detector()
    if what == "recipe":
        report["recipe"]["name"] = "mixed"
    elif what == "steps":
        report["recipe"]["steps"].append({"step": "Sparsify"})
    else:
        original = detector(2)
    (run / "report.json").write_text(json.dumps(report))
    expected = {"recipe": "run of recipe 'mixed'", "steps": "2 of 3 steps", "original": "another detector"}
    with pytest.raises(InputError, match=expected[what]):
        ship(run, original, weights)
    assert not list(weights.iterdir())
