"""Steps as data, recipes, graphs, and loading a kit."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from core.kit import Graph, InputError, Recipe, Step, load


@dataclass(frozen=True)
class Shrink(Step):
    ratio: float
    layers: tuple[str, ...] = ()
    scheme: str | None = None


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the import path; what is imported from it is forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_step_comes_back_from_json_text() -> None:
    step = Shrink(0.3, ("stem.conv", "head"), "int8")
    text = json.dumps(step.to_json())
    assert json.loads(text) == {"step": "Shrink", "ratio": 0.3, "layers": ["stem.conv", "head"], "scheme": "int8"}
    assert Step.from_json(json.loads(text)) == step
    assert hash(Step.from_json(json.loads(text))) == hash(step)


def test_step_fields_left_out_take_their_defaults() -> None:
    assert Step.from_json({"step": "Shrink", "ratio": 0.5}) == Shrink(0.5)


def test_step_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Shrink(0.5).ratio = 0.6  # type: ignore[misc]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"step": "Explode"}, "step 'Explode' is not known; known are .*Shrink"),
        ({"ratio": 0.5}, "step None is not known"),
        ({"step": "object"}, "step 'object' is not known"),
        ({"step": "Shrink", "ratio": 0.5, "amount": 1}, "step Shrink: unknown field 'amount'; .*layers, ratio, scheme"),
        ({"step": "Shrink", "ratio": 0.5, "__class__": "x"}, "unknown field '__class__'"),
    ],
)
def test_step_refuses_what_it_does_not_know(data: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Step.from_json(data)


def test_step_with_a_missing_field_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="step Shrink: .*ratio"):
        Step.from_json({"step": "Shrink"})


def test_recipe_as_json() -> None:
    recipe = Recipe("small", (Shrink(0.3), Shrink(0.5, scheme="int4")), "1 minute", "half the size")
    data = json.loads(json.dumps(recipe.to_json()))
    assert data["name"] == "small"
    assert tuple(Step.from_json(step) for step in data["steps"]) == recipe.steps


def test_graph_finds_its_submodule() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))
    inputs = {"x": torch.zeros(1, 3)}
    assert Graph("whole", inputs, ("y",)).module(model) is model
    assert Graph("tail", {"x": torch.zeros(1, 4)}, ("y",), part="1.1").module(model) is model[1][1]  # type: ignore[index]


@pytest.mark.parametrize("name", ["no_such_kit", "kits.no_such_kit", "no_such_package.kit"])
def test_load_names_a_kit_that_is_not_there(name: str) -> None:
    with pytest.raises(InputError, match=f"no kit '{name}'.*`fitkit list` shows the kits") as caught:
        load(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "KIT = None", "class KIT:\n    name = 'x'"], ids=["no KIT", "None", "unfinished"])
def test_load_refuses_what_is_no_kit(own_folder: Path, text: str) -> None:
    (own_folder / "bench_of_kits").mkdir()
    (own_folder / "bench_of_kits" / "odd.py").write_text(text)
    with pytest.raises(InputError, match="bench_of_kits.odd has no KIT that fulfils core.kit.Kit"):
        load("bench_of_kits.odd")


def test_load_does_not_hide_a_missing_dependency_of_a_kit(own_folder: Path) -> None:
    """A kit that is there but needs a package that is not says which package, instead of "no kit"."""
    (own_folder / "needy_kit").mkdir()
    (own_folder / "needy_kit" / "kit.py").write_text("import no_such_package_for_it")
    with pytest.raises(ModuleNotFoundError, match="no_such_package_for_it"):
        load("needy_kit.kit")
