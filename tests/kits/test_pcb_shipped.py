"""What ships is taken from a run, with its design and cards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from core.compress import compress, file_hash
from core.kit import InputError
from core.weights import save_weights
from kits.pcb_inspection import KIT, WEIGHTS, shipped
from kits.pcb_inspection.data.default import default_set
from kits.pcb_inspection.model.design import FILE, Design, load_design, save_design
from kits.pcb_inspection.model.network import PairDetector
from kits.pcb_inspection.recipes import RECIPES

SCORES = {"int8-openvino": {"map33": [91.5, "%"], "precision": [float("nan"), "%"]}}
MADE = {"command": "python train.py", "seconds": 90, "seed": 4, "history": "from the first search"}
SMALL = Design(widths=(8, 16, 16, 16), head=16)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a small detector, as `fitkit run --preset full --weights` leaves it."""
    place = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    detector = PairDetector(SMALL)
    save_weights(detector, place / "given" / "fp32.safetensors")
    save_design(SMALL, place / "given" / FILE)
    compress(detector.eval(), RECIPES["int8"], KIT, preset="smoke", folder=place / "steps")
    asked = {"recipe": {"name": "qat"}, "preset": "full", "data": str(default_set()), "weights": str(place / "given")}
    (place / "run.json").write_text(json.dumps(asked))
    (place / "stage-scores.json").write_text(json.dumps(SCORES))
    (place / "artifact").mkdir()
    meta = {"threshold": 0.25, "names": [[0.0] * 6] * 11, "frozen_on": "2 boards"}
    (place / "artifact" / "manifest.json").write_text(json.dumps({"meta": meta}))
    return place


def test_both_networks_ship_with_design_and_cards(run: Path, tmp_path: Path) -> None:
    shipped.ship(run, MADE, tmp_path)
    assert load_design(tmp_path / FILE) == SMALL
    assert file_hash(tmp_path / "fp32.safetensors") == file_hash(run / "given" / "fp32.safetensors")
    last = sorted((run / "steps").glob("*/model.safetensors"))[-1]
    assert file_hash(tmp_path / "int8.safetensors") == file_hash(last)
    card: dict[str, Any] = json.loads((tmp_path / "card.json").read_text())
    assert card["threshold"] == 0.25 and len(card["names"]) == 11 and "frozen_on" not in card
    assert card["scores"] == {"int8-openvino": {"map33": 91.5, "precision": None}}
    parameters = sum(p.numel() for p in PairDetector(SMALL).parameters())
    assert card["about"]["parameters"] == parameters and card["about"]["seed"] == 4
    text = (tmp_path / "README.md").read_text()
    assert "**command** `python train.py`" in text and "**History**: from the first search." in text


def test_the_shipped_files_are_those_of_their_card() -> None:
    card = json.loads((WEIGHTS / "card.json").read_text())
    assert {name: file_hash(WEIGHTS / name) for name in card["sha256"]} == card["sha256"]
    models, frozen = KIT.shipped()
    assert len(frozen["names"]) == 11 and set(models) == {"fp32", "int8"}
    assert sum(p.numel() for p in models["fp32"].parameters()) == card["about"]["parameters"]


def test_a_run_that_cannot_ship_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="say how these weights were made, with --made and --minutes"):
        shipped.ship(run, None, tmp_path)
    with pytest.raises(InputError, match=r"nowhere/run.json: missing; give the folder of a run"):
        shipped.ship(tmp_path / "nowhere", MADE, tmp_path)
    other = Path(shutil.copytree(run, tmp_path / "other"))
    asked = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps({**asked, "preset": "smoke"}))
    with pytest.raises(InputError, match="preset 'smoke'.*what ships is of recipe 'qat' and --preset full on --data"):
        shipped.ship(other, MADE, tmp_path)
    (other / "run.json").write_text(json.dumps(asked))
    (other / "stage-scores.json").unlink()
    with pytest.raises(InputError, match=r"stage-scores.json: missing"):
        shipped.ship(other, MADE, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
