"""What a candidate costs before anything is trained: multiplications, parameters, bytes, and memory while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from core.hardware.memory import plan
from core.hardware.profile import remembered, trace
from core.hardware.roofline import roofline
from core.hardware.targets import BITS, Target
from core.nas import Bound, Candidate
from core.search.latency import LatencyTable, operators

Build = Callable[[Candidate], tuple[nn.Module, tuple[Tensor, ...]]]
"""A candidate as a plain network with any weights, and inputs of one sample."""


@dataclass(frozen=True)
class Cost:
    """Of one inference of one sample: `peak` is the most bytes of activations that are alive at once."""

    macs: int
    parameters: int
    bytes: int
    peak: int


def cost(model: nn.Module, inputs: Sequence[Tensor], precision: str = "fp32") -> Cost:
    """What a plain network costs with weights and activations of one data type."""
    run = trace(model, inputs)
    parameters = sum(layer.parameters for layer in run.layers)
    return Cost(
        sum(layer.macs for layer in run.layers),
        parameters,
        -(-parameters * BITS[precision] // 8),
        plan(run, precision).peak,
    )


def estimated_latency(model: nn.Module, inputs: Sequence[Tensor], target: Target, precision: str = "fp32") -> float:
    """Milliseconds on a target by its roofline: an estimate, whose error `core.hardware` states."""
    return 1e3 * sum(found.seconds for found in roofline(trace(model, inputs).layers, target, precision))


@dataclass
class Costs:
    """The costs of the candidates of a space, each network built and looked at only once."""

    build: Build
    precision: str = "fp32"
    table: LatencyTable | None = None
    target: Target | None = None
    _known: dict[tuple[tuple[str, object], ...], dict[str, float]] = field(default_factory=dict)

    def of(self, candidate: Candidate) -> dict[str, float]:
        """ "macs", "parameters", "bytes", "peak", with a table "latency" in ms, with a target "estimated_latency"."""
        key = tuple(sorted(candidate.items()))
        if key not in self._known:
            model, inputs = self.build(candidate)
            with remembered():
                found = {k: float(v) for k, v in vars(cost(model, inputs, self.precision)).items()}
                if self.table is not None:
                    found["latency"] = self.table.latency(operators(model, inputs))
                if self.target is not None:
                    found["estimated_latency"] = estimated_latency(model, inputs, self.target, self.precision)
            self._known[key] = found
        return self._known[key]

    def bound(self, name: str, at_most: float, unit: str = "") -> Bound:
        """A bound of a space on one of these."""
        return Bound(name, lambda candidate: self.of(candidate)[name], at_most, unit)
