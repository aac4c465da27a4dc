"""What ships: model and student that belong together, and the step that takes the student instead of training one."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from core.compress import compress
from core.kit import InputError, Recipe
from core.quantization import Pack, packed_layers
from core.weights import state_hash
from kits.mobile_diffusion import shipped
from kits.mobile_diffusion.kit import MobileDiffusion
from kits.mobile_diffusion.model.architectures import build
from kits.mobile_diffusion.model.pipeline import Diffusion, load_diffusion, save_diffusion
from kits.mobile_diffusion.recipes import RECIPES

PACK = Recipe("whole", (Pack(bits=4, group_size=64, rounding="nearest"),), "seconds", "stands for the whole stack")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of a training and of a run of recipe `whole`."""
    place = tmp_path_factory.mktemp("ship")
    save_diffusion(build("toy"), place / "trained" / "model", torch.float16)
    original = load_diffusion(place / "trained" / "model")
    run = place / "run"
    small, trace = compress(original, PACK, MobileDiffusion(original), folder=run / "steps")
    assert isinstance(small, Diffusion)
    small.save(run / "artifact" / "int4")
    figures = [
        {"name": "alignment", "stage": stage, "value": v} for stage, v in (("original", 91.5), ("compressed", 90))
    ]
    figures.append({"name": "alignment_relation", "stage": "compressed", "value": 88.25})
    report = {"recipe": PACK.to_json(), "trace": [entry.to_json() for entry in trace], "figures": figures}
    (run / "report.json").write_text(json.dumps(report))
    return place / "trained", run


@pytest.fixture
def weights(made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both shipped into a folder that the kit takes for its own."""
    place = tmp_path / "weights"
    shipped.ship(*made, place)
    for name, path in (("DEFAULT", "default"), ("WHOLE", "whole"), ("CARD", "card.json")):
        monkeypatch.setattr(shipped, name, place / path)
    return place


def test_the_student_is_taken_for_the_default_model_alone(weights: Path) -> None:
    kit = MobileDiffusion()
    original = kit.model()
    small, trace = compress(original, RECIPES["shipped"], kit.of(original))
    expected = load_diffusion(weights / "whole")
    assert state_hash(small) == state_hash(expected)
    assert any("Pack, when the student was made: " in row["what"] for row in trace[0].changed)

    other = copy.deepcopy(original)
    with torch.no_grad():
        next(iter(other.parameters())).add_(0.5)
    with pytest.raises(InputError, match="use --recipe int4"):
        compress(other, RECIPES["shipped"], kit.of(other))


def test_the_default_recipe_is_that_of_the_model(weights: Path) -> None:
    kit = MobileDiffusion()
    assert kit.default_recipe == "shipped" == kit.of(kit.model()).default_recipe
    assert kit.of(build("toy", seed=5)).default_recipe == "int4"
    models, _ = kit.shipped()
    assert list(models) == ["fp32", "int4"]


def test_the_card_names_every_weight_file_by_its_hash(weights: Path) -> None:
    card = json.loads((weights / "card.json").read_text())
    names = {str(p.relative_to(weights)) for p in weights.rglob("*.safetensors")}
    assert set(card["sha256"]) == names and len(names) >= 6
    text = (weights / "README.md").read_text()
    assert "| alignment | 91.5 | 90.0 |" in text and "| relation | - | 88.2 |" in text
    assert card["parameters"] == sum(p.numel() for p in load_diffusion(weights / "default").parameters())


def test_a_run_of_another_model_is_not_shipped_and_of_another_recipe_no_student(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    trained, run = made
    save_diffusion(build("toy", seed=9), tmp_path / "model", torch.float16)
    with pytest.raises(InputError, match="began from another model"):
        shipped.ship(tmp_path, run, tmp_path / "weights")
    report = json.loads((run / "report.json").read_text())
    (tmp_path / "report.json").write_text(json.dumps({**report, "recipe": RECIPES["int4"].to_json()}))
    shipped.ship(trained, tmp_path, tmp_path / "weights")
    assert not (tmp_path / "weights" / "whole").exists() and not (tmp_path / "weights" / "card.json").exists()
    assert "| demand | as trained | int4 |" in (tmp_path / "weights" / "README.md").read_text()


def test_without_a_student_the_model_is_packed(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "CARD", weights / "none.json")
    kit = MobileDiffusion()
    assert kit.default_recipe == "int4" == kit.of(kit.model()).default_recipe
    packed = kit.shipped()[0]["int4"]
    assert packed_layers(packed) and not packed_layers(kit.model())
    with pytest.raises(InputError, match="no student ships"):
        compress(kit.model(), RECIPES["shipped"], kit)


def test_too_much_is_not_shipped(made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "MOST", 1000)
    with pytest.raises(InputError, match="at most 1,000 may ship"):
        shipped.ship(*made, tmp_path / "weights")
