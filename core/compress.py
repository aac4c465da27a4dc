"""`compress`: apply a recipe step by step, with a trace, a checkpoint after every step, and resume."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from core.files import write_text
from core.kit import Context, InputError, Kit, Recipe, Step
from core.weights import load_weights, save_weights, state_hash


@dataclass(frozen=True)
class Skipped:
    """A layer that a step left alone, and why."""

    layer: str
    why: str


@dataclass(frozen=True)
class Outcome:
    """What a handler returns.

    `changed` lists {"layer": name, "what": sentence, ...numbers}. `structure` is plain JSON from which
    `restore` rebuilds the modules (not the weights), so that a checkpoint needs no pickle.
    """

    model: nn.Module
    changed: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    structure: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TraceEntry:
    """What one step changed, skipped and took."""

    step: Step
    changed: list[dict[str, Any]]
    skipped: list[Skipped]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The entry as in `report.json`."""
        skipped = [{"layer": s.layer, "why": s.why} for s in self.skipped]
        return {"step": self.step.to_json(), "changed": self.changed, "skipped": skipped, "seconds": self.seconds}

    @staticmethod
    def from_json(data: dict[str, Any]) -> TraceEntry:
        """Read back `to_json`."""
        skipped = [Skipped(s["layer"], s["why"]) for s in data["skipped"]]
        return TraceEntry(Step.from_json(data["step"]), data["changed"], skipped, data["seconds"])


Trace = list[TraceEntry]
Apply = Callable[[nn.Module, Any, Context], Outcome]
Restore = Callable[[nn.Module, Any, dict[str, Any]], nn.Module]
_HANDLERS: dict[type[Step], tuple[Apply, Restore]] = {}


def _same_structure(model: nn.Module, step: Any, structure: dict[str, Any]) -> nn.Module:
    return model


def handles(step: type[Step], restore: Restore = _same_structure) -> Callable[[Apply], Apply]:
    """Register the decorated function as the handler of a step class.

    The handler may change the model it is given in place (it is a copy) and returns an `Outcome`.
    `restore(model, step, structure)` makes the same modules again from `Outcome.structure`; leave it
    out when a step changes weights only.
    """

    def register(apply: Apply) -> Apply:
        _HANDLERS[step] = (apply, restore)
        return apply

    return register


def compress(
    model: nn.Module,
    recipe: Recipe,
    kit: Kit,
    *,
    data: Path | None = None,
    preset: str = "full",
    folder: Path | None = None,
    resume: bool = False,
    seed: int = 0,
    on_step: Callable[[int, Step, nn.Module], None] | None = None,
) -> tuple[nn.Module, Trace]:
    """Return the compressed copy of a model and the trace of its steps; the model itself is unchanged.

    With `folder`, every finished step leaves `NN-step/model.safetensors` and `step.json` there, and
    `resume` goes on after the last one that is whole. `on_step(index, step, model)` is called after
    each step, restored ones included. Raises InputError for a step without a handler or a folder
    that holds another recipe, or steps that began from another model, data, preset or seed.
    """
    for step in recipe.steps:
        if type(step) not in _HANDLERS:
            raise InputError(f"recipe {recipe.name!r}: no handler for step {type(step).__name__}")
    context = Context(kit, model, data, preset, None, resume, seed)
    origin = _origin(context) if folder is not None else {}
    small = copy.deepcopy(model)
    trace: Trace = []
    if folder is not None and not resume:
        for left in folder.glob("[0-9][0-9]-*"):  # its own only: the user chose the folder
            shutil.rmtree(left)
    for index, step in enumerate(recipe.steps):
        apply, restore = _HANDLERS[type(step)]
        place = folder / f"{index:02d}-{type(step).__name__.lower()}" if folder is not None else None
        saved = _read(place, step, origin) if resume and place is not None else None
        if saved is not None and place is not None:
            small = restore(small, step, saved["structure"])
            load_weights(small, place / "model.safetensors")
            trace.append(TraceEntry.from_json(saved["trace"]))
        else:
            work = place.with_suffix(".partial") if place is not None else None
            if work is not None:
                work.mkdir(parents=True, exist_ok=True)
            started = time.perf_counter()
            outcome = apply(small, step, replace(context, folder=work))
            small = outcome.model
            entry = TraceEntry(step, outcome.changed, outcome.skipped, round(time.perf_counter() - started, 3))
            trace.append(entry)
            if place is not None and work is not None:
                _write(place, small, entry, outcome.structure, origin)
                shutil.rmtree(work, ignore_errors=True)
        small.eval()
        if on_step is not None:
            on_step(index, step, small)
    return small, trace


def history(folder: Path) -> list[dict[str, Any]]:
    """The finished steps in a checkpoint folder, [{"step", "structure"}], from which `replay` rebuilds a model."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*/step.json"))]
    return [{"step": r["trace"]["step"], "structure": r["structure"]} for r in records]


def replay(model: nn.Module, steps: list[dict[str, Any]]) -> nn.Module:
    """Give a model the modules of finished steps (see `history`), in place; its weights are then to be loaded."""
    for record in steps:
        step = Step.from_json(record["step"])
        if type(step) not in _HANDLERS:
            raise InputError(f"no handler for step {type(step).__name__}")
        model = _HANDLERS[type(step)][1](model, step, record["structure"])
    return model


def file_hash(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _origin(context: Context) -> dict[str, Any]:
    """What a run began from; one that is resumed from elsewhere would mix two runs in its figures."""
    data = str(context.data.resolve()) if context.data is not None else None
    return {"model": state_hash(context.original), "data": data, "preset": context.preset, "seed": context.seed}


def _write(place: Path, model: nn.Module, entry: TraceEntry, structure: dict[str, Any], origin: dict[str, Any]) -> None:
    """Write a checkpoint beside its place and move it there whole, so that a kill leaves all or nothing."""
    fresh = place.with_suffix(".new")
    shutil.rmtree(fresh, ignore_errors=True)
    save_weights(model, fresh / "model.safetensors")
    digest = file_hash(fresh / "model.safetensors")
    record = {"trace": entry.to_json(), "structure": structure, "origin": origin, "sha256": digest}
    write_text(fresh / "step.json", json.dumps(record, indent=1))
    shutil.rmtree(place, ignore_errors=True)
    os.replace(fresh, place)


def _read(place: Path, step: Step, origin: dict[str, Any]) -> dict[str, Any] | None:
    if not (place / "step.json").exists():
        return None
    record: dict[str, Any] = json.loads((place / "step.json").read_text())
    weights = place / "model.safetensors"
    mend = "use another --out or leave out --resume"
    if Step.from_json(record["trace"]["step"]) != step:
        raise InputError(f"{place}: holds another step than the recipe's {step}; {mend}")
    if other := [key for key, value in origin.items() if record.get("origin", {}).get(key) != value]:
        raise InputError(f"{place}: began from another {other[0]} than this run; {mend}")
    if not weights.exists() or file_hash(weights) != record["sha256"]:
        raise InputError(f"{weights}: bytes differ from its step.json; delete {place} and --resume again")
    return record
