"""`compress` on a toy model: trace, checkpoints, and going on after a real kill -9 to the same bytes.

Run as a script (`python test_compress.py FOLDER WHERE`) this file compresses once and kills itself at WHERE.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from core.compress import _HANDLERS, Outcome, Skipped, TraceEntry, compress, file_hash, handles
from core.kit import Context, InputError, Kit, Recipe, Step

ROOT = Path(__file__).resolve().parents[2]
KIT = cast(Kit, SimpleNamespace(name="toy"))  # the steps below ask nothing of their kit


@dataclass(frozen=True)
class ToyScale(Step):
    factor: float


@dataclass(frozen=True)
class ToyCut(Step):
    """Keeps the first channels of layer 0, and kills its process half way when the environment says so."""

    keep: int


@dataclass(frozen=True)
class ToyNoise(Step):
    amount: float


@dataclass(frozen=True)
class ToyUnknown(Step):
    pass


@handles(ToyScale)
def scale(model: nn.Module, step: ToyScale, context: Context) -> Outcome:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(step.factor)
    return Outcome(model, [{"layer": "0", "what": "scaled", "factor": step.factor}], [Skipped("1", "has no weights")])


def narrowed(model: nn.Module, step: ToyCut, structure: dict[str, Any]) -> nn.Module:
    layers = cast(nn.Sequential, model)
    layers[0], layers[2] = nn.Linear(structure["in"], step.keep), nn.Linear(step.keep, structure["out"])
    return layers


@handles(ToyCut, restore=narrowed)
def cut(model: nn.Module, step: ToyCut, context: Context) -> Outcome:
    first, last = cast(nn.Linear, model.get_submodule("0")), cast(nn.Linear, model.get_submodule("2"))
    kept = {"0.weight": first.weight[: step.keep], "0.bias": first.bias[: step.keep],
            "2.weight": last.weight[:, : step.keep], "2.bias": last.bias}  # fmt: skip
    structure = {"in": first.in_features, "out": last.out_features}
    if context.folder is not None:
        (context.folder / "half").write_text("seen" if (context.folder / "half").exists() and context.resume else "new")
    if os.environ.get("TOY_KILL") == "in the step":
        os.kill(os.getpid(), signal.SIGKILL)
    found = (context.folder / "half").read_text() if context.folder is not None else "none"
    model = narrowed(model, step, structure)
    model.load_state_dict(kept)
    return Outcome(model, [{"layer": "0", "what": f"kept {step.keep}", "half": found}], structure=structure)


@handles(ToyNoise)
def noise(model: nn.Module, step: ToyNoise, context: Context) -> Outcome:
    generator = torch.Generator().manual_seed(context.seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(step.amount * torch.randn(parameter.shape, generator=generator))
    return Outcome(model)


RECIPE = Recipe("toy", (ToyScale(0.5), ToyCut(3), ToyNoise(0.01)), "no time", "fewer channels")


def toy() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def bytes_of(model: nn.Module, folder: Path) -> str:
    save_file(state(model), folder / "final.safetensors")
    return file_hash(folder / "final.safetensors")


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def run_and_kill(folder: Path, where: str) -> None:
    environment = os.environ | {"TOY_KILL": where, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, __file__, str(folder)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == -signal.SIGKILL, run.stderr


def test_the_original_is_unchanged_and_the_copy_is_small() -> None:
    model = toy()
    before = state(model)
    small, trace = compress(model, RECIPE, KIT)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert small.get_submodule("0").weight.shape == (3, 4)
    assert sum(p.numel() for p in small.parameters()) == 3 * 4 + 3 + 2 * 3 + 2
    assert [entry.step for entry in trace] == list(RECIPE.steps)
    assert not small.training


def test_the_steps_do_what_they_say() -> None:
    """Scaling and cutting in closed form: the output of the small model is that of the masked, scaled original."""
    model = toy()
    small, _ = compress(model, Recipe("toy", RECIPE.steps[:2], "", ""), KIT)
    x = torch.randn(5, 4)
    hidden = torch.relu(0.5 * (x @ model[0].weight[:3].T + model[0].bias[:3]))  # type: ignore[operator, index, union-attr]
    torch.testing.assert_close(small(x), 0.5 * (hidden @ model[2].weight[:, :3].T + model[2].bias))  # type: ignore[operator, index, union-attr]


def test_skipped_layers_are_in_the_trace() -> None:
    _, trace = compress(toy(), RECIPE, KIT)
    assert trace[0].skipped == [Skipped("1", "has no weights")]
    assert trace[0].changed == [{"layer": "0", "what": "scaled", "factor": 0.5}]


def test_trace_comes_back_from_json_text() -> None:
    _, trace = compress(toy(), RECIPE, KIT)
    assert [TraceEntry.from_json(json.loads(json.dumps(entry.to_json()))) for entry in trace] == trace


def test_checkpoints_hold_every_step(tmp_path: Path) -> None:
    seen: list[tuple[int, Step, int]] = []
    small, _ = compress(
        toy(), RECIPE, KIT, folder=tmp_path / "steps",
        on_step=lambda index, step, model: seen.append((index, step, len(model.state_dict()["0.bias"]))),
    )  # fmt: skip
    assert checkpoints(tmp_path / "steps") == ["00-toyscale", "01-toycut", "02-toynoise"]
    assert seen == [(0, ToyScale(0.5), 8), (1, ToyCut(3), 3), (2, ToyNoise(0.01), 3)]
    stored = load_file(tmp_path / "steps" / "02-toynoise" / "model.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in small.state_dict().items())


@pytest.mark.parametrize("where", ["in the step", "before the move"])
def test_resume_after_kill_ends_with_the_same_bytes(tmp_path: Path, where: str) -> None:
    whole, whole_trace = compress(toy(), RECIPE, KIT, folder=tmp_path / "whole")

    killed = tmp_path / "killed"
    run_and_kill(killed, where)
    assert not (killed / "01-toycut").exists()
    first = (killed / "00-toyscale" / "step.json").read_bytes()

    again, trace = compress(toy(), RECIPE, KIT, folder=killed, resume=True)
    assert bytes_of(again, tmp_path) == bytes_of(whole, tmp_path)
    last = "02-toynoise/model.safetensors"
    assert file_hash(killed / last) == file_hash(tmp_path / "whole" / last)
    assert [entry.step for entry in trace] == [entry.step for entry in whole_trace]
    assert (killed / "00-toyscale" / "step.json").read_bytes() == first, "the finished step ran again"
    assert trace[1].changed[0]["half"] == "seen", "the step did not find its own checkpoint"
    assert checkpoints(killed) == ["00-toyscale", "01-toycut", "02-toynoise"], "something half-done was left behind"


def test_resume_of_a_finished_run_computes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, trace = compress(toy(), RECIPE, KIT, folder=tmp_path / "steps")

    def refuse(model: nn.Module, step: Step, context: Context) -> Outcome:
        raise AssertionError(f"{step} ran again")

    for step in (ToyScale, ToyCut, ToyNoise):
        monkeypatch.setitem(_HANDLERS, step, (refuse, _HANDLERS[step][1]))
    again, same_trace = compress(toy(), RECIPE, KIT, folder=tmp_path / "steps", resume=True)
    assert bytes_of(again, tmp_path) == bytes_of(small, tmp_path)
    assert same_trace == trace


def test_without_resume_a_folder_is_made_anew(tmp_path: Path) -> None:
    compress(toy(), RECIPE, KIT, folder=tmp_path / "steps")
    compress(toy(), Recipe("short", (ToyScale(0.1),), "", ""), KIT, folder=tmp_path / "steps")
    assert checkpoints(tmp_path / "steps") == ["00-toyscale"]


def flip_a_weight(place: Path) -> None:
    file = place / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def cut_short(place: Path) -> None:
    file = place / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


@pytest.mark.parametrize("damage", [flip_a_weight, cut_short], ids=lambda damage: damage.__name__)
def test_changed_checkpoint_bytes_are_refused(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    compress(toy(), RECIPE, KIT, folder=tmp_path)
    damage(tmp_path / "01-toycut")
    with pytest.raises(InputError, match=r"01-toycut/model.safetensors: bytes differ.*--resume") as caught:
        compress(toy(), RECIPE, KIT, folder=tmp_path, resume=True)
    assert "\n" not in str(caught.value)


def test_missing_checkpoint_weights_are_refused(tmp_path: Path) -> None:
    compress(toy(), RECIPE, KIT, folder=tmp_path)
    (tmp_path / "01-toycut" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="01-toycut"):
        compress(toy(), RECIPE, KIT, folder=tmp_path, resume=True)


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    compress(toy(), RECIPE, KIT, folder=tmp_path)
    other = Recipe("other", (ToyScale(0.25), *RECIPE.steps[1:]), "", "")
    with pytest.raises(InputError, match=r"00-toyscale: holds another step.*ToyScale\(factor=0.25\)"):
        compress(toy(), other, KIT, folder=tmp_path, resume=True)


def test_resume_with_another_seed_is_refused(tmp_path: Path) -> None:
    compress(toy(), RECIPE, KIT, folder=tmp_path, seed=0)
    with pytest.raises(InputError, match="seed"):
        compress(toy(), RECIPE, KIT, folder=tmp_path, seed=1, resume=True)


def test_resume_from_another_model_is_refused(tmp_path: Path) -> None:
    compress(toy(), RECIPE, KIT, folder=tmp_path)
    other = toy()
    torch.nn.init.zeros_(other[2].bias)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="model"):
        compress(other, RECIPE, KIT, folder=tmp_path, resume=True)


def test_unknown_step_is_refused_before_anything_runs(tmp_path: Path) -> None:
    recipe = Recipe("odd", (ToyScale(0.5), ToyUnknown()), "", "")
    with pytest.raises(InputError, match="recipe 'odd': no handler for step ToyUnknown"):
        compress(toy(), recipe, KIT, folder=tmp_path / "steps")
    assert not (tmp_path / "steps").exists()


if __name__ == "__main__":
    if os.environ["TOY_KILL"] == "before the move":
        move = os.replace

        def killed_in_second(source: Path, target: Path) -> None:
            if "01-" in str(target):
                os.kill(os.getpid(), signal.SIGKILL)
            move(source, target)

        os.replace = killed_in_second  # type: ignore[assignment]
    compress(toy(), RECIPE, KIT, folder=Path(sys.argv[1]))
