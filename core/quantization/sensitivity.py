"""What a model's output loses when one layer alone is packed, at each width that it may get."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from core.files import replaced
from core.kit import InputError
from core.quantization.packed import FloatLayer, pack_module
from core.quantization.packing import Rounding

FLOAT_BITS = 16
Errors = dict[str, dict[int, float]]


def bit_errors(
    model: nn.Module,
    layers: Sequence[str],
    widths: Sequence[int],
    group_size: int,
    batches: Iterable[tuple[Tensor, ...]],
    rounding: Rounding = "nearest",
    *,
    done: Mapping[str, Mapping[int, float]] | None = None,
    on_layer: Callable[[str, dict[int, float]], None] | None = None,
) -> Errors:
    """{layer: {bits: error}}: the relative squared error of the model's output with that layer alone packed so.

    The error is the sum of squares over all `batches` (tuples of positional arguments, read once for each layer and
    width) over that of the model as it is, the mean of all float outputs, so that none outweighs the others by its
    size; FP16 counts as 0. `done` holds what is known already;
    `on_layer(name, errors)` is called after each layer. The model is left as it was.
    """
    model.eval()
    undisturbed = Undisturbed(model, batches)
    errors: Errors = {}
    for name in layers:
        known = dict((done or {}).get(name, {}))
        layer = model.get_submodule(name)
        assert isinstance(layer, FloatLayer)
        for bits in widths:
            if bits >= FLOAT_BITS:
                known[bits] = 0.0
            if bits in known:
                continue
            with _rounded(layer, bits, group_size, rounding, name):
                known[bits] = undisturbed.error()
        errors[name] = {bits: known[bits] for bits in widths}
        if on_layer is not None:
            on_layer(name, errors[name])
    return errors


class Undisturbed:
    """What a model puts out on batches (tuples of positional arguments) as it is when this is made."""

    def __init__(self, model: nn.Module, batches: Iterable[tuple[Tensor, ...]]) -> None:
        """Runs the model once on every batch; InputError where there are none, or where all outputs are zero."""
        self._model, self._batches = model, batches
        self._kept = [outputs(model, batch) for batch in batches]
        self._signal = [sum(float(y.double().square().sum()) for y in ys) for ys in zip(*self._kept, strict=True)]
        if not self._kept or not any(self._signal):
            found = "no batches" if not self._kept else "an output of zeros only"
            raise InputError(f"sensitivity: found {found}; expected calibration inputs that give an output")

    def errors(self) -> list[float]:
        """The relative squared error of each output by now, 0 for an output of zeros and infinity for a broken one."""
        noise = [0.0] * len(self._signal)
        for batch, expected in zip(self._batches, self._kept):
            for i, (y, right) in enumerate(zip(outputs(self._model, batch), expected, strict=True)):
                noise[i] += float((y - right).double().square().sum())
        found = [n / s if s else 0.0 for n, s in zip(noise, self._signal, strict=True)]
        # Not a number, and so worse than any, where the model broke down.
        return [error if error == error else float("inf") for error in found]

    def error(self) -> float:
        """The mean of `errors`, so that no output outweighs the others by its size."""
        found = self.errors()
        return sum(found) / len(found)


def outputs(model: nn.Module, batch: tuple[Tensor, ...]) -> list[Tensor]:
    """All float tensors in what the model returns, in order and in float32."""
    with torch.no_grad():
        leaves = pytree.tree_leaves(model(*batch))
    return [leaf.float() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def read_errors(path: Path, key: Mapping[str, Any]) -> Errors:
    """What an earlier run left in `path` for the same `key`; {} where there is nothing to go on from."""
    try:
        record = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    if record.get("key") != json.loads(json.dumps(key)):
        return {}
    return {name: {int(bits): float(e) for bits, e in row.items()} for name, row in record["errors"].items()}


def write_errors(path: Path, key: Mapping[str, Any], errors: Mapping[str, Mapping[int, float]]) -> None:
    """Leave errors for a later run."""
    with replaced(path) as fresh:
        fresh.write_text(json.dumps({"key": key, "errors": errors}))


@contextmanager
def _rounded(layer: FloatLayer, bits: int, group_size: int, rounding: Rounding, name: str) -> Iterator[None]:
    """Within it the float weight holds the values of the packed one."""
    weight = layer.weight.data
    layer.weight.data = pack_module(layer, bits, group_size, rounding, name=name).dequantized(weight.dtype)
    try:
        yield
    finally:
        layer.weight.data = weight
