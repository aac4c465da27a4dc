"""Mixed precision: the step MixedPrecision, which decides by measured sensitivity which layers may be INT8 and FP16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from core.compress import Outcome, Skipped, handles
from core.kit import Context, InputError, Step
from core.quantization.half import Half, halvable, halve
from core.quantization.half import restore as restore_half
from core.quantization.layer_sensitivity import (
    Precisions,
    choose_precisions,
    half_errors,
    precision_errors,
    sensitivity_rows,
)
from core.quantization.prepare import Plan
from core.quantization.ptq import CalibrationInputs, Quantize, quantize_model
from core.quantization.ptq import restore as restore_quantized


@dataclass(frozen=True, kw_only=True)
class MixedPrecision(Plan, Step):
    """INT8 for `layers`, FP16 for `half`, except where the outputs would lose too much.

    Each layer alone is tried in INT8 and in FP16 on `probes` calibration inputs; those that cost most are raised to
    FP16 or FP32 until the summed relative squared error of the outputs is at most `budget`. (Preset "smoke": on one
    input, and layers of `half` alone are first tried all at once, which settles them where it costs a tenth of the
    budget at most.) The rest is `Quantize` and `Half` with the layers that were chosen. `keep` stays in FP32. `judged`
    names the outputs of the graph that count (default: all): rows in the order of their scores say nothing, for the
    least change turns them over.
    """

    half: tuple[str, ...] = ()
    budget: float = 1e-2
    probes: int = 4
    judged: tuple[str, ...] = ()
    bias_correction: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.budget >= 0:
            raise InputError(f"MixedPrecision.budget is {self.budget}; expected a relative squared error of 0 or more")
        if self.probes < 1:
            raise InputError(f"MixedPrecision.probes is {self.probes}; expected at least 1")


def restore(model: nn.Module, step: MixedPrecision, structure: dict[str, Any]) -> nn.Module:
    """The modules of a finished step again, for weights to be loaded into."""
    if structure["quantized"]["layers"]:
        model = restore_quantized(model, _quantize(step, structure["quantized"]["layers"]), structure["quantized"])
    return restore_half(model, Half(), {"layers": structure["half"]})


@handles(MixedPrecision, restore=restore)
def mix_precisions(model: nn.Module, step: MixedPrecision, context: Context) -> Outcome:
    """Measure every layer alone, choose, then quantize and halve."""
    wanted = [n for n in halvable(model) if _any(n, step.half) and not _any(n, step.keep)]
    graphs = [g for g in context.kit.exports() if not g.part]
    outputs = graphs[0].outputs if len(graphs) == 1 else ()
    errors, at_once = _measured(model, step, context, wanted, outputs)
    counted = _counted(errors, step.judged, outputs)
    cost = _mean(at_once, step.judged, outputs)
    chosen = choose_precisions(counted, step.budget - cost)
    total = cost + sum(sum(row[p]) / len(row[p]) for n, row in counted.items() if (p := chosen[n]) != "fp32")
    settled = [n for n in wanted if n not in errors]
    chosen |= dict.fromkeys(settled, "fp16")
    counts = {p: sum(c == p for c in chosen.values()) for p in ("int8", "fp16", "fp32")}
    what = "sensitivity: " + ", ".join(f"{n} layers in {p.upper()}" for p, n in counts.items())
    changed: list[dict[str, Any]] = [{"layer": "", "what": what, "summed_error": total, "budget": step.budget}]
    if settled:
        what = f"sensitivity: {len(settled)} layers tried in FP16 all at once, not one by one (a short trial)"
        changed.append({"layer": "", "what": what, "fp16_error": cost})
    changed += sensitivity_rows(errors, chosen, outputs)
    skipped = [Skipped(n, "stays in FP32: chosen under the budget") for n, p in chosen.items() if p == "fp32"]
    structure: dict[str, Any] = {"quantized": {"folded": [], "layers": [], "shared": [], "outputs": []}, "half": []}
    if names := [n for n, p in chosen.items() if p == "int8"]:
        done = quantize_model(model, _quantize(step, names), context)
        structure["quantized"] = done.structure
        changed += done.changed
        skipped += [s for s in done.skipped if s.layer not in chosen]
    if names := [n for n, p in chosen.items() if p == "fp16"]:
        done = halve(model, [_literal(n) for n in names])
        structure["half"] = done.structure["layers"]
        changed += done.changed
        skipped += done.skipped
    return Outcome(model, changed, skipped, structure)


def _measured(
    model: nn.Module, step: MixedPrecision, context: Context, wanted: Sequence[str], outputs: Sequence[str]
) -> tuple[Precisions, list[float]]:
    """What each layer costs alone, and what the others of `wanted` cost at once, where all of them may be FP16."""
    if context.preset == "full":
        return precision_errors(model, CalibrationInputs(context, step.probes, model), step, wanted), []
    probes: list[tuple[torch.Tensor, ...]] = []
    with torch.no_grad():
        for batch in CalibrationInputs(context, 1, model):
            model(*batch)  # a stream wants to see the answer
            probes = [batch]  # the last one of a stream, which has a past
    errors = precision_errors(model, probes, step, [])
    rest = [n for n in wanted if n not in errors]
    at_once = half_errors(model, probes, rest) if rest else []
    if _mean(at_once, step.judged, outputs) <= step.budget / 10:
        return errors, at_once
    return precision_errors(model, probes, step, wanted), []


def _mean(errors: Sequence[float], judged: Sequence[str], outputs: Sequence[str]) -> float:
    """The mean error of the outputs that are judged, 0 of none."""
    row = _counted({"": {"fp16": list(errors)}}, judged if errors else (), outputs)[""]["fp16"]
    return sum(row) / len(row) if row else 0.0


def _counted(errors: Precisions, judged: Sequence[str], outputs: Sequence[str]) -> Precisions:
    """The errors of the outputs that are judged."""
    if not judged:
        return errors
    if wrong := [name for name in judged if name not in outputs]:
        known = ", ".join(outputs) or "none: it has several graphs"
        raise InputError(f"MixedPrecision.judged: no output {wrong[0]!r}; the model's outputs are {known}")
    places = [list(outputs).index(name) for name in judged]
    return {n: {p: [values[i] for i in places] for p, values in row.items()} for n, row in errors.items()}


def _quantize(step: MixedPrecision, names: list[str]) -> Quantize:
    shared = {f.name: getattr(step, f.name) for f in fields(Plan)}
    return Quantize(**shared | {"layers": tuple(_literal(n) for n in names)}, bias_correction=step.bias_correction)


def _literal(name: str) -> str:
    """A pattern that matches this name alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
