"""Latency by the roofline: every layer takes as long as its arithmetic or its traffic, whichever is longer.

Source: Williams, Waterman and Patterson, "Roofline: an insightful visual performance model", 2009.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from core.hardware.memory import Choice, dtype_of, lookup
from core.hardware.profile import LayerProfile
from core.hardware.targets import BITS, MemoryLevel, Target
from core.kit import InputError

LANES = 8
"""Channels that vector units and matrix tiles take at a time, at the least."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that a layer moves to and from one memory level."""

    level: MemoryLevel
    bytes: float


@dataclass(frozen=True)
class LayerCost:
    """What a layer costs on a target: seconds of arithmetic and of traffic, and the data types behind them."""

    layer: LayerProfile
    dtype: str
    runs_as: str
    compute: float
    memory: float
    traffic: tuple[Traffic, ...]

    @property
    def seconds(self) -> float:
        """The longer of arithmetic and traffic."""
        return max(self.compute, self.memory)

    @property
    def memory_bound(self) -> bool:
        """True where moving the data takes longer than computing with it."""
        return self.memory > self.compute


def roofline(
    layers: Sequence[LayerProfile],
    target: Target,
    precision: Choice = "fp32",
    weight_bits: Mapping[str, int] | None = None,
) -> list[LayerCost]:
    """The cost of every layer.

    Activations are served by the nearest memory that holds the layer's inputs and outputs, weights by the
    nearest that holds all weights together, since they are read anew for every inference. Fused
    element-wise layers cost nothing. A layer that falls back moves its activations in the wider type.
    Raises InputError where the target computes in no data type that can stand for a layer's.
    """
    total = sum(weight_bytes(layer, precision, weight_bits) for layer in layers)
    weights = target.level_for("weights", total)
    costs = []
    for layer in layers:
        dtype = dtype_of(precision, layer.name)
        runs_as = target.runs_as(dtype)
        if runs_as is None:
            has = ", ".join(target.dtypes)
            mend = f"choose one of {has}, or another target"
            raise InputError(f"target {target.name}: layer {layer.name} is {dtype}, it computes only in {has}; {mend}")
        compute = 2 * layer.macs / (target.peak[runs_as].value * target.efficiency.value * lanes_filled(layer))
        traffic: tuple[Traffic, ...] = ()
        if not layer.fused:
            moved = (layer.input_elements + layer.output_elements) * BITS[runs_as] / 8
            traffic = (
                Traffic(target.level_for("activations", moved), moved),
                Traffic(weights, weight_bytes(layer, precision, weight_bits)),
            )
        memory = sum(t.bytes / t.level.bandwidth.value for t in traffic)
        costs.append(LayerCost(layer, dtype, runs_as, compute, memory, traffic))
    return costs


def lanes_filled(layer: LayerProfile) -> float:
    """Share of the arithmetic lanes that a layer fills, taking input channels `LANES` at a time.

    A depthwise convolution sums over one channel and so fills one lane of `LANES`.
    """
    if layer.channels is None:
        return 1.0
    channels = layer.channels[0] // layer.groups
    return channels / (math.ceil(channels / LANES) * LANES)


def weight_bytes(layer: LayerProfile, precision: Choice, weight_bits: Mapping[str, int] | None) -> float:
    """Bytes of a layer's weight matrices, at `weight_bits` where given and else at its data type."""
    return layer.weight_elements * bits_of_weight(layer.name, precision, weight_bits) / 8


def bits_of_weight(layer: str, precision: Choice, weight_bits: Mapping[str, int] | None) -> int:
    """Bits of each weight of a layer; raises InputError outside 1 to 32."""
    bits = lookup(weight_bits or {}, layer, BITS[dtype_of(precision, layer)])
    if not 1 <= bits <= 32:
        raise InputError(f"layer {layer}: {bits} bits a weight, expected 1 to 32")
    return bits
