"""The questions a user asks of a device: what will it cost, does it fit, will it really be faster."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import nn

from core.figures import Basis, Estimated, Figure, Figures, Measured
from core.hardware.energy import ERROR_BAND, Energy, assumptions, energy
from core.hardware.memory import Choice, MemoryPlan, dtype_of, plan
from core.hardware.profile import WHOLE, LayerProfile, Matrix, parameters_of, trace
from core.hardware.roofline import LANES, LayerCost, bits_of_weight, roofline
from core.hardware.targets import BITS, Target
from core.kit import Graph, InputError

T = TypeVar("T")

_NAMED = 5  # layers named in one sentence
_NOTABLE = 0.05  # share of the time from which memory-bound layers are worth a warning
_SPARSE = 0.3  # share of zeros from which a layer is meant to be sparse


@dataclass(frozen=True)
class FitVerdict:
    """Whether a model can run on a target; `failures` say what does not fit, `notes` what runs differently."""

    fits: bool
    failures: tuple[str, ...]
    notes: tuple[str, ...]
    weight_bytes: int
    arena: MemoryPlan


def estimate(
    model: nn.Module,
    graphs: Sequence[Graph],
    target: Target,
    *,
    precision: Choice = "fp32",
    weight_bits: Mapping[str, int] | None = None,
    rate_hz: float | None = None,
) -> Figures:
    """What one inference (every graph once) costs on a target.

    `precision` and `weight_bits` are for all layers or by layer name. parameters [count] and macs [GMAC]
    are counted exactly; size [MB], latency_p50 [ms], fps [1/s], energy [mJ], efficiency [TOPS/W], peak_memory [MB]
    (activations) and, at `rate_hz` inferences a second, power [W] are estimates with their error bands.
    """
    if rate_hz is not None and rate_hz <= 0:
        raise InputError(f"rate_hz: found {rate_hz}, expected a positive number of inferences a second")
    layers, arena = _survey(model, graphs, target, precision)
    costs = roofline(layers, target, precision, weight_bits)
    seconds = sum(c.seconds for c in costs)
    spent = energy(costs, target)
    macs = sum(layer.macs for layer in layers)
    counted = Measured(device="count", runtime="torch module", runs=1, spread=0.0)
    count = sum(tensor.numel() for _, tensor, _ in parameters_of(model))
    figures = [
        Figure("parameters", count, "count", counted),
        Figure("macs", macs / 1e9, "GMAC", counted),
        Figure("size", stored_bytes(model, precision, weight_bits) / 1e6, "MB", _SIZE),
        Figure("peak_memory", arena.arena / 1e6, "MB", _memory_basis(arena)),
    ]
    timed = _latency_basis(costs, target)
    powered = Estimated("energy table and roofline", assumptions(target, spent, seconds), ERROR_BAND)
    if seconds > 0:
        figures += [Figure("latency_p50", seconds * 1e3, "ms", timed), Figure("fps", 1 / seconds, "1/s", timed)]
        figures += [Figure("energy", spent.total * 1e3, "mJ", powered)]
        figures += [Figure("efficiency", 2 * macs / spent.total / 1e12, "TOPS/W", powered)]
    if rate_hz is not None:
        figures.append(Figure("power", *_power(spent, seconds, rate_hz, target, powered)))
    return Figures(figures)


def fit(
    model: nn.Module,
    graphs: Sequence[Graph],
    target: Target,
    precision: Choice = "fp32",
    weight_bits: Mapping[str, int] | None = None,
) -> FitVerdict:
    """Whether weights and activations fit the target's memories, and its data types and operators the model."""
    layers, arena = _survey(model, graphs, target, precision)
    weights = stored_bytes(model, precision, weight_bits)
    failures, notes = [], []
    kept, used = target.level_for("weights", weights), target.level_for("activations", arena.arena)
    if kept == used:
        needed = {kept.name: (kept, weights + arena.arena, "weights and activations")}
    else:
        needed = {kept.name: (kept, weights, "weights"), used.name: (used, arena.arena, "activations")}
    for level, size, content in needed.values():
        sentence = f"{content} take {_amount(size)} of the {_amount(level.bytes.value)} of {level.name}"
        if size > level.bytes.value:
            peak = f"; the most is alive at {arena.at}" if content != "weights" else ""
            failures.append(f"{sentence}: {_amount(size - level.bytes.value)} too much{peak}.")
        else:
            notes.append(f"{sentence}.")
    for dtype, names in _by_dtype(layers, precision).items():
        runs_as = target.runs_as(dtype)
        if runs_as is None:
            failures.append(f"No {dtype} on {target.title}, and nothing wider: {_list(names)}.")
        elif runs_as != dtype:
            notes.append(f"No {dtype} on {target.title}: {_list(names)} would run in {runs_as}.")
    for kind in target.missing_operators:
        if names := _unique(layer.name for layer in layers if layer.kind == kind):
            failures.append(f"No operator {kind} on {target.title}: {_list(names)}.")
    return FitVerdict(not failures, tuple(failures), tuple(notes), weights, arena)


def will_it_be_faster(
    model: nn.Module,
    graphs: Sequence[Graph],
    target: Target,
    precision: Choice = "fp32",
    weight_bits: Mapping[str, int] | None = None,
) -> list[str]:
    """What keeps a smaller model from being a faster one on a target, as sentences that name the layers."""
    layers, _ = _survey(model, graphs, target, precision)
    warnings = []
    for dtype, names in _by_dtype(layers, precision).items():
        runs_as = target.runs_as(dtype)
        if runs_as is None:
            warnings.append(f"{target.title} cannot compute in {dtype}: {_list(names)}.")
        elif runs_as != dtype:
            warnings.append(f"No {dtype} on {target.title}: {_list(names)} would fall back to {runs_as}, no faster.")
        elif dtype != "fp32" and "fp32" in target.peak:
            gain = target.peak[dtype].value / target.peak["fp32"].value
            if gain < 1.5:
                said = f"{dtype} is at most {gain:.2g} times as fast as fp32 on {target.title}"
                warnings.append(f"{said}: {_list(names)}.")
    odd = [layer for layer in layers if _misaligned(layer)]
    if odd:
        named = _list(_unique(f"{layer.name} ({layer.channels[0]} to {layer.channels[1]})" for layer in odd
                              if layer.channels))  # fmt: skip
        warnings.append(f"Channels that are no multiple of {LANES} leave vector lanes idle: {named}.")
    if all(target.runs_as(dtype) for dtype in _by_dtype(layers, precision)):
        costs = roofline(layers, target, precision, weight_bits)
        bound = [c for c in costs if c.memory_bound]
        share = sum(c.seconds for c in bound) / (sum(c.seconds for c in costs) or 1.0)
        if share >= _NOTABLE:
            slowest = sorted(bound, key=lambda c: -c.seconds)
            named = _list(_unique(c.layer.name for c in slowest))
            warnings.append(f"Bound by memory, so fewer operations do not help ({share:.0%} of the time): {named}.")
    warnings += _sparsity(model, target)
    return warnings


def stored_bytes(model: nn.Module, precision: Choice = "fp32", weight_bits: Mapping[str, int] | None = None) -> int:
    """Bytes of a model's parameters on disk.

    Weight matrices take their layer's bits, with one FP32 scale for each output channel from 8 bits
    down; biases and norms take 16 bits in a 16 bit layer and else 32.
    """
    bits = 0
    for layer, tensor, is_matrix in parameters_of(model):
        if is_matrix:
            each = bits_of_weight(layer, precision, weight_bits)
            bits += tensor.numel() * each + (32 * tensor.shape[0] if each <= 8 else 0)
        else:
            bits += tensor.numel() * (16 if BITS[dtype_of(precision, layer)] == 16 else 32)
    return math.ceil(bits / 8)


_SIZE = Estimated(
    "parameters times their bits",
    ("one FP32 scale for each output channel of a weight of 8 bits or less", "graph, names and padding not counted"),
    0.1,
)


def _survey(
    model: nn.Module, graphs: Sequence[Graph], target: Target, precision: Choice
) -> tuple[list[LayerProfile], MemoryPlan]:
    """The layers of all graphs under the names they have in the model, and the plan of the graph that needs most."""
    if not graphs:
        raise InputError("graphs: none given, expected at least one with example inputs")
    layers: list[LayerProfile] = []
    plans = []
    for graph in graphs:
        prefix = f"{graph.part}." if graph.part else ""
        run = trace(graph.module(model), tuple(graph.inputs.values()))
        for layer in run.layers:
            whole = bool(graph.part) and layer.name == WHOLE  # the part is itself one layer, which has a name here
            layers.append(replace(layer, name=graph.part if whole else prefix + layer.name))
        plans.append(plan(run, _as_run(precision, target), prefix))
    return layers, max(plans, key=lambda p: p.arena)


def _as_run(precision: Choice, target: Target) -> Choice:
    """The data types that activations really have where a target falls back to wider ones."""
    if isinstance(precision, str):
        return (precision in BITS and target.runs_as(precision)) or precision
    return {layer: (dtype in BITS and target.runs_as(dtype)) or dtype for layer, dtype in precision.items()}


def _latency_basis(costs: Sequence[LayerCost], target: Target) -> Estimated:
    total = sum(c.seconds for c in costs) or 1.0
    bound = sorted((c for c in costs if c.memory_bound), key=lambda c: -c.seconds)
    share = sum(c.seconds for c in bound) / total
    names = _list(_unique(c.layer.name for c in bound)) if bound else "none"
    peaks = "; ".join(f"{d} {target.peak[d].value / 1e12:g} TOPS ({target.peak[d].source})"
                      for d in _unique(c.runs_as for c in costs))  # fmt: skip
    return Estimated(
        "roofline, layer after layer",
        (
            f"peak: {peaks}",
            f"efficiency {target.efficiency.value:g} of the peak ({target.efficiency.source})",
            "element-wise work on one tensor is fused into the layer before it; no start-up cost of operators",
            f"input channels taken {LANES} at a time, so a depthwise convolution runs at an eighth of that",
            f"memory-bound, {share:.0%} of the time: {names}",
        ),
        target.latency_band.value,
    )


def _memory_basis(arena: MemoryPlan) -> Estimated:
    return Estimated(
        "activation arena, greedy by size",
        (
            "activations only, weights and the runtime's own memory not counted",
            f"{_amount(arena.peak)} alive at {arena.at}",
            "order of operators as in eager torch; element-wise results written over their input",
        ),
        0.25,
    )


def _power(spent: Energy, seconds: float, rate: float, target: Target, basis: Estimated) -> tuple[float, str, Basis]:
    static = target.power["static"].value
    said = [f"{rate:g} inferences a second, static power drawn all the time"]
    if rate * seconds > 1:
        said.append(f"one takes about {seconds * 1e3:.3g} ms, so this is the power at {1 / seconds:.3g} a second")
        rate = 1 / seconds
    own = spent.dynamic * rate
    said.append(f"of it {own:.3g} W for this network, {static:g} W of the whole device before it does anything")
    return own + static, "W", replace(basis, assumptions=(*said, *basis.assumptions))


def _misaligned(layer: LayerProfile) -> bool:
    """True for odd channels; the few that a sensor gives (grey, colour, two of a pair) cannot be chosen."""
    if layer.channels is None or layer.macs == 0:
        return False
    given, made = layer.channels
    return made % LANES > 0 or (given % LANES > 0 and given > 4)


def _sparsity(model: nn.Module, target: Target) -> list[str]:
    """Layers with many zeros in a pattern that the target does not skip."""
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, Matrix) or module.weight.numel() == 0:
            continue
        zero = module.weight.detach() == 0
        if (share := zero.float().mean().item()) < _SPARSE:
            continue
        rows = zero.movedim(1, -1).flatten(1)  # the pattern runs along the input channels
        halves = zero.shape[1] % 4 == 0 and bool((rows.reshape(-1, 4).sum(1) >= 2).all())
        pattern = "2:4" if halves else "unstructured"
        if pattern not in target.sparsity:
            found.setdefault(pattern, []).append(f"{name} ({share:.0%})")
    return [f"{target.title} does not skip {pattern} zeros: {_list(names)}." for pattern, names in found.items()]


def _by_dtype(layers: Sequence[LayerProfile], precision: Choice) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for layer in layers:
        if layer.macs:
            found.setdefault(dtype_of(precision, layer.name), []).append(layer.name)
    return {dtype: _unique(names) for dtype, names in found.items()}


def _unique(items: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(items))


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _amount(size: float) -> str:
    return f"{size / 1e6:.3g} MB" if size >= 1e6 else f"{size / 1e3:.3g} kB"
