"""Parity: whether a runtime agrees with torch, and if not, which layer is the first to drift."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from core.export.choices import Choice, Choosing
from core.export.layers import Call, Layers
from core.kit import Graph

# SQNR of identical tensors is infinite, which JSON cannot hold
SQNR_CEILING = 200.0
DEFAULT_TOLERANCE: Mapping[str, float] = {"fp32": 1e-4}
DEFAULT_SQNR = 25.0


class ParityError(RuntimeError):
    """An exported graph disagrees with torch; the message names the first layer that drifts."""


@dataclass(frozen=True)
class Criterion:
    """When two tensors agree.

    fp32: max |difference| <= limit x max(1, peak of the reference). Every other precision: the SQNR,
    10 log10(power of the reference / power of the difference), is at least `limit` in dB, because
    torch's simulation of integers and the integers themselves may round one step apart.
    """

    relative: bool
    limit: float

    @staticmethod
    def of(precision: str, tolerance: Mapping[str, float] | None) -> Criterion:
        """The criterion of a precision: the given tolerance, or 1e-4 for fp32 and 25 dB for all others.

        "fp32-pruned" and the like are fp32 as well.
        """
        relative = precision.split("-")[0] == "fp32"
        default = DEFAULT_TOLERANCE["fp32"] if relative else DEFAULT_SQNR
        return Criterion(relative, float((tolerance or {}).get(precision, default)))

    def holds(self, found: Deviation) -> bool:
        """Whether a deviation is within the limit."""
        if self.relative:
            return found.max_abs <= self.limit * max(1.0, found.peak)
        return found.sqnr >= self.limit

    def __str__(self) -> str:
        if self.relative:
            return f"max |difference| <= {self.limit:g} x max(1, peak)"
        return f"SQNR >= {self.limit:g} dB"


@dataclass(frozen=True)
class Deviation:
    """How far a tensor is from its reference: largest difference, peak of the reference, SQNR in dB."""

    max_abs: float
    peak: float
    sqnr: float

    def to_json(self) -> dict[str, float]:
        """Three numbers, rounded."""
        return {"max_abs": float(f"{self.max_abs:.4g}"), "peak": float(f"{self.peak:.4g}"), "sqnr": round(self.sqnr, 2)}

    def __str__(self) -> str:
        return f"max |difference| {self.max_abs:.3g} at peak {self.peak:.3g}, SQNR {self.sqnr:.1f} dB"


_NOTHING_ALIKE = Deviation(1e300, 0.0, -SQNR_CEILING)


def deviation(reference: Tensor, found: Tensor) -> Deviation:
    """Compare two tensors of one shape; infinities and NaN must sit in the same places."""
    if reference.shape != found.shape:
        return _NOTHING_ALIKE
    a, b = reference.detach().cpu().double(), found.detach().cpu().double()
    finite = torch.isfinite(a)
    odd = ~finite & ~((a == b) | (torch.isnan(a) & torch.isnan(b)))
    if odd.any() or not torch.isfinite(b[finite]).all():
        return _NOTHING_ALIKE
    a, b = a[finite], b[finite]
    if a.numel() == 0:
        return Deviation(0.0, 0.0, SQNR_CEILING)
    signal, noise = a.square().sum().item(), (a - b).square().sum().item()
    if noise == 0.0:
        sqnr = SQNR_CEILING
    else:
        sqnr = 10 * math.log10(signal / noise) if signal > 0.0 else -SQNR_CEILING
    sqnr = min(SQNR_CEILING, max(-SQNR_CEILING, sqnr))
    return Deviation((a - b).abs().max().item(), a.abs().max().item(), sqnr)


@dataclass(frozen=True)
class Reference:
    """What torch computes: the outputs of a graph, and every call of every submodule that returned one tensor."""

    outputs: tuple[Tensor, ...]
    as_tuple: bool
    calls: Mapping[str, Sequence[Tensor | None]]

    chosen: Sequence[tuple[Tensor, Tensor]] = ()

    @staticmethod
    def of(module: nn.Module, inputs: Sequence[Tensor], given: Sequence[Tensor] = ()) -> Reference:
        """Run the module once with forward hooks on all submodules.

        `chosen` is then what torch's own `topk` chose, values and places; with `given` it went on with those places.
        """
        calls: dict[str, list[Tensor | None]] = defaultdict(list)

        def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
                # copied, because a later operation may write into the same memory (an in-place ReLU)
                calls[name].append(output.detach().clone() if isinstance(output, Tensor) else None)

            return keep

        handles = [m.register_forward_hook(hook(n)) for n, m in module.named_modules() if n]
        try:
            with torch.no_grad(), Choosing(given) as choosing:
                result = module(*inputs)
        finally:
            for handle in handles:
                handle.remove()
        outputs = tuple(t for t in tree_leaves(result) if isinstance(t, Tensor))
        return Reference(outputs, not isinstance(result, Tensor), dict(calls), choosing.seen)


def described(graph: Graph, reference: Reference) -> dict[str, Any]:
    """Names, data types and shapes of a graph's inputs and outputs, for whoever runs it without torch."""

    def value(name: str, tensor: Tensor) -> dict[str, Any]:
        free = graph.dynamic.get(name, {})
        shape = [free.get(axis, size) for axis, size in enumerate(tensor.shape)]
        example = list(tensor.shape)
        return {"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": shape, "example": example}

    outputs = zip(graph.outputs, reference.outputs, strict=True)
    return {
        "inputs": [value(n, t) for n, t in graph.inputs.items()],
        "outputs": [{"name": n, "dtype": str(t.dtype).removeprefix("torch.")} for n, t in outputs],
        "tuple": reference.as_tuple,
        "part": graph.part,
    }


@dataclass(frozen=True)
class Drift:
    """One layer's deviation; `layer` is its dotted name, with "#2" for its second call."""

    layer: str
    deviation: Deviation

    def to_json(self) -> dict[str, Any]:
        """Layer and numbers."""
        return {"layer": self.layer, **self.deviation.to_json()}


def comparable(reference: Reference, layers: Layers) -> list[Call]:
    """The calls of modules that are both in the ONNX graph and in torch, in the order of execution."""
    calls = layers.calls()
    counted: dict[str, int] = defaultdict(int)
    for call in calls:
        counted[call.layer] = max(counted[call.layer], call.index + 1)
    return [c for c in calls if len(reference.calls.get(c.layer, ())) == counted[c.layer]]


def compare_layers(
    reference: Reference,
    model: Any,
    layers: Layers,
    inputs: Sequence[Tensor],
    runtime: str,
    work: Path,
    criterion: Criterion,
) -> tuple[list[Drift], Drift | None]:
    """All layers' deviations in the order of execution, and the first beyond the criterion.

    A copy of the ONNX model gets the layers' values as extra outputs, is written into the folder
    `work` and run in the runtime. The extra outputs keep the runtime from fusing across them, so a
    quantized layer may round a step apart from the artifact itself.
    """
    import onnx

    from core.export.artifact import load_module
    from core.export.onnx import save_onnx

    already = [o.name for o in model.graph.output]
    calls = comparable(reference, layers)
    extra = [c.value for c in calls if c.value not in already]
    path = work / "layers.onnx"
    model.graph.output.extend([onnx.ValueInfoProto(name=name) for name in extra])
    try:
        save_onnx(model, path, check=False)
    finally:
        del model.graph.output[len(already) :]
    results = load_module(runtime, path, None, as_tuple=True)(*inputs)
    values = dict(zip([*already, *extra], results, strict=True))
    drifts = []
    for call in calls:
        wanted = reference.calls[call.layer][call.index]
        # a module that returns a view or a part of its last value cannot be told from the graph
        if wanted is not None and wanted.shape == values[call.value].shape:
            name = layers.full(call.layer) + (f"#{call.index + 1}" if call.index else "")
            drifts.append(Drift(name, deviation(wanted, values[call.value])))
    for left in work.glob("layers.onnx*"):
        left.unlink()
    return drifts, next((d for d in drifts if not criterion.holds(d.deviation)), None)


def check(
    variant: str,
    graph: str,
    names: Sequence[str],
    reference: Reference,
    found: Sequence[Tensor],
    layerwise: tuple[list[Drift], Drift | None],
    criterion: Criterion,
    chosen: Sequence[Choice] = (),
) -> dict[str, Any]:
    """The record of one graph for the manifest; raises ParityError when an output is beyond the criterion.

    `chosen` are the choices that `reference` was given, if it was given any.
    """
    outputs = {n: deviation(a, b) for n, a, b in zip(names, reference.outputs, found, strict=True)}
    drifts, first = layerwise
    for name, d in outputs.items():
        if not criterion.holds(d):
            where = (
                f"the first layer that drifts is {first.layer} ({first.deviation})"
                if first is not None
                else f"none of the {len(drifts)} layers compared drifts by itself, so it happens between or after them"
            )
            raise ParityError(
                f"{variant}, graph {graph!r}: output {name!r} disagrees with torch: {d}; wanted {criterion}; {where}"
            )
    told = choices_agree(variant, graph, reference, chosen, criterion)
    worst = min(outputs.values(), key=lambda d: d.sqnr)
    text = f"agrees with torch ({criterion}): {worst}; {len(drifts)} layers compared"
    if first is not None:
        text += f"; inside, {first.layer} is the first beyond that ({first.deviation})"
    if moved := sum(c["moved"] for c in told):
        text += f"; {moved} places of TopK differ at scores that agree, torch was given those of the runtime"
    return {
        "outputs": {n: d.to_json() for n, d in outputs.items()},
        "layers": [d.to_json() for d in drifts],
        "first_drift": first.to_json() if first is not None else None,
        "choices": told,
        "text": text,
    }


def choices_agree(
    variant: str, graph: str, reference: Reference, chosen: Sequence[Choice], criterion: Criterion
) -> list[dict[str, Any]]:
    """The record of every choice; raises ParityError where the scores of what was chosen are beyond the criterion."""
    records: list[dict[str, Any]] = []
    if chosen and len(chosen) != len(reference.chosen):
        raise RuntimeError(f"graph {graph!r}: {len(chosen)} TopK in the file, {len(reference.chosen)} calls in torch")
    for choice, (values, places) in zip(chosen, reference.chosen, strict=False):
        found = deviation(values, choice.values)
        if not criterion.holds(found):
            raise ParityError(
                f"{variant}, graph {graph!r}: the best scores in {choice.layer} disagree with torch: {found}; "
                f"wanted {criterion}"
            )
        moved = int((places != choice.indices).sum())
        records.append({"layer": choice.layer, "moved": moved, "of": places.numel(), "values": found.to_json()})
    return records
