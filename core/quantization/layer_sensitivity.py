"""What each layer alone costs in INT8 and in FP16, and from that the precision of every layer under a budget."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from core.kit import InputError
from core.progress import progress
from core.quantization.half import halvable, halved
from core.quantization.modules import QuantLayer, quant_layers, quantizers
from core.quantization.prepare import Plan, build, calibrate, survey
from core.quantization.sensitivity import Undisturbed

PRECISIONS = ("int8", "fp16", "fp32")
Precisions = dict[str, dict[str, list[float]]]


def precision_errors(
    model: nn.Module, batches: Iterable[tuple[Tensor, ...]], plan: Plan, half: Sequence[str] | None = None
) -> Precisions:
    """{layer: {"int8": errors, "fp16": errors}} with that layer alone in INT8 (by `plan`) or in FP16.

    `errors` has the relative squared error of each float output of the model, in their order. "int8" is there for the
    layers that the plan can quantize, weights and activations, "fp16" for the names in `half` (default: every layer
    that can be halved) and those layers. Batches are tuples of positional arguments; they are kept, so a few suffice.
    The model is left as it was; layers keep the names they have when batch norms are folded.
    """
    work = copy.deepcopy(model).eval()
    kept: list[tuple[Tensor, ...]] = []
    for batch in batches:
        if not kept:
            structure, _ = survey(work, plan, batch)
        kept.append(batch)
        if isinstance(batches, Sequence):
            continue
        model(*batch)
    if not kept:
        raise InputError("sensitivity: found no batches; expected calibration inputs that give an output")
    # every layer gets quantizers of its own: one that is shared would take the other readers along
    build(work, plan, replace(structure, shared=()))
    calibrate(work, kept, plan.calibration)
    for quantizer in quantizers(work):
        quantizer.active = False
    quantized = quant_layers(work)
    halves = [n for n in (halvable(model) if half is None else half) if n not in quantized]
    undisturbed = Undisturbed(work, kept)
    found: Precisions = {name: {} for name in [*quantized, *halves]}
    trials = [(name, "int8") for name in quantized] + [(name, "fp16") for name in found]
    with progress("sensitivity", len(trials), quiet=len(trials) < 20) as bar:
        for name, precision in trials:
            layer = work.get_submodule(name)
            with _quantized(quantized[name]) if precision == "int8" else halved(layer):
                found[name][precision] = undisturbed.errors()
            bar.advance()
    return found


def half_errors(model: nn.Module, batches: Iterable[tuple[Tensor, ...]], names: Sequence[str]) -> list[float]:
    """The relative squared error of each float output with all of these layers in FP16 at once.

    Batches are tuples of positional arguments; the model is left as it was.
    """
    work = copy.deepcopy(model).eval()
    undisturbed = Undisturbed(work, list(batches))
    with ExitStack() as all_of_them:
        for name in names:
            all_of_them.enter_context(halved(work.get_submodule(name)))
        return undisturbed.errors()


def choose_precisions(
    errors: Mapping[str, Mapping[str, Sequence[float]]], budget: float, costs: Mapping[str, float] | None = None
) -> dict[str, str]:
    """{layer: "int8" | "fp16" | "fp32"} whose errors sum to at most `budget`, with as much in few bits as it goes.

    A layer's error is the mean over the outputs; FP32 costs nothing. All layers begin in their lowest precision, and
    the one whose next precision takes most off the sum for each unit of `costs` (its multiplications; default the
    same for all) is raised, until the budget is kept. Errors of layers are taken to add up, which holds while each is
    small. Raises InputError for a budget that is negative or no number.
    """
    if not budget >= 0:
        raise InputError(f"budget is {budget}; expected a relative squared error of 0 or more, such as 1e-3")
    mean = {
        name: {p: sum(row[p]) / len(row[p]) for p in PRECISIONS if p in row} | {"fp32": 0.0}
        for name, row in errors.items()
    }
    chosen = {name: next(iter(row)) for name, row in mean.items()}
    while sum(mean[name][p] for name, p in chosen.items()) > budget:
        best = max((name for name in chosen if chosen[name] != "fp32"), key=lambda n: _gain(n, mean, chosen, costs)[0])
        chosen[best] = _gain(best, mean, chosen, costs)[1]
    return chosen


def sensitivity_rows(
    errors: Mapping[str, Mapping[str, Sequence[float]]], chosen: Mapping[str, str], outputs: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Lines of the trace, the most sensitive layer first: errors in both precisions, by output, and what was chosen."""
    rows = []
    for name, row in errors.items():
        line: dict[str, Any] = {"layer": name, "what": f"sensitivity: {chosen[name].upper()} chosen"}
        for precision, values in row.items():
            line[f"{precision}_error"] = sum(values) / len(values)
            if len(values) > 1:
                labels = outputs if len(outputs) == len(values) else [str(i) for i in range(len(values))]
                line[f"{precision}_by_output"] = dict(zip(labels, values, strict=True))
        rows.append(line)
    return sorted(rows, key=lambda r: -max(r.get("int8_error", 0.0), r.get("fp16_error", 0.0)))


def _gain(
    name: str, mean: Mapping[str, Mapping[str, float]], chosen: Mapping[str, str], costs: Mapping[str, float] | None
) -> tuple[float, str]:
    """(error that the next better precision takes off for each unit of cost, that precision)."""
    row, now = mean[name], chosen[name]
    better = [p for p in row if PRECISIONS.index(p) > PRECISIONS.index(now) and row[p] < row[now]] or ["fp32"]
    lost = row[now] - row[better[0]]
    return (lost / max((costs or {}).get(name, 1.0), 1e-12) if lost else -1.0), better[0]


@contextmanager
def _quantized(layer: QuantLayer) -> Iterator[None]:
    """Within it the quantizers of one layer are on."""
    own = [q for q in (layer.input_quantizer, layer.weight_quantizer, layer.output_quantizer) if q is not None]
    for quantizer in own:
        quantizer.active = True
    try:
        yield
    finally:
        for quantizer in own:
            quantizer.active = False
