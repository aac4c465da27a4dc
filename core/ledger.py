"""The stacking ledger: what the metric, the parameters and the bytes are after each step of a recipe."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from core.compress import Trace, history, replay
from core.kit import Kit
from core.progress import progress
from core.quantization.packed import packed_layers
from core.weights import load_weights

COLUMNS = ["after step", "parameters", "weights [MB]", "change [points]", "seconds"]


def ledger(
    kit: Kit, original: nn.Module, trace: Trace, folder: Path, samples: Sequence[Any], meta: Mapping[str, Any]
) -> dict[str, Any] | None:
    """A table with a row for the original and one for the model after each step; None for a recipe of one step.

    `folder` is where `compress` left a checkpoint of every step. Models are scored in torch, before they are exported;
    a change is that of the kit's headline against the row above, so that the changes add up to the whole loss.
    """
    if len(trace) < 2:
        return None
    steps = history(folder)
    places = sorted(path.parent for path in folder.glob("*/step.json"))
    rows: list[list[Any]] = []
    above: float | None = None
    with progress("scoring after each step", len(steps) + 1) as bar:
        for count in range(len(steps) + 1):
            model = copy.deepcopy(original)
            if count:
                model = replay(model, steps[:count])
                load_weights(model, places[count - 1] / "model.safetensors")
            value = kit.score(model.eval(), samples, meta).get(kit.headline)
            points = value[0] if value is not None else None
            name = type(trace[count - 1].step).__name__ if count else "(original)"
            change = round(points - above, 2) if points is not None and above is not None else ""
            seconds = round(trace[count - 1].seconds, 1) if count else ""
            shown = round(points, 2) if points is not None else ""
            rows.append([name, parameters(model), round(weight_bytes(model) / 1e6, 2), shown, change, seconds])
            above = points
            bar.advance(name)
    return {
        "title": "Ledger: the steps stacked one on another",
        "columns": [*COLUMNS[:3], f"{kit.headline} in torch", *COLUMNS[3:]],
        "rows": rows,
        "note": f"{len(samples)} samples; a change is against the row above; seconds are those that the step took",
    }


def parameters(model: nn.Module) -> int:
    """The number of weights, packed ones counted as what they stand for."""
    held = sum(p.numel() for p in model.parameters())
    return held + sum(layer.weight_shape.numel() for layer in packed_layers(model).values())


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights as they are held: packed with their scales, the rest in its own data type."""
    packed = sum(t.numel() * t.element_size() for layer in packed_layers(model).values() for t in layer.buffers())
    return packed + sum(p.numel() * p.element_size() for p in model.parameters())
