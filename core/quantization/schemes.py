"""Schemes: how many bits, which range of integers, and how many elements share one scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from core.kit import InputError


@dataclass(frozen=True)
class PerTensor:
    """One scale for all elements: shape (...) -> scale shape ()."""

    def scale_shape(self, shape: Sequence[int], layer: str = "") -> tuple[int, ...]:
        """Always ()."""
        return ()


@dataclass(frozen=True)
class PerChannel:
    """One scale for each output channel: shape (out, ...) -> scale shape (out,)."""

    def scale_shape(self, shape: Sequence[int], layer: str = "") -> tuple[int, ...]:
        """(out,)."""
        return (shape[0],)


@dataclass(frozen=True)
class PerGroup:
    """One scale for `size` neighbours of the flattened kernel: (out, ...) -> scale shape (out, prod(...) / size)."""

    size: int

    def scale_shape(self, shape: Sequence[int], layer: str = "") -> tuple[int, ...]:
        """(out, groups); InputError names the layer if `size` does not divide the flattened kernel."""
        length = prod(shape[1:])
        if self.size < 1 or length % self.size:
            raise InputError(
                f"layer {layer!r}: group_size {self.size} does not divide its kernel of {length} elements "
                f"(shape {tuple(shape)}); choose a divisor, or put the layer's name into `keep`"
            )
        return (shape[0], length // self.size)


Granularity = PerTensor | PerChannel | PerGroup


@dataclass(frozen=True)
class Scheme:
    """Uniform affine quantization, real = (integer - zero_point) * scale.

    Symmetric schemes use signed integers and a zero point of 0, asymmetric ones unsigned integers.
    `reduce_range` leaves the top bit unused: 8-bit weights then lie in [-64, 63], which keeps the
    16-bit sums of the U8S8 instructions of AVX2 processors without VNNI from saturating.
    """

    bits: int = 8
    symmetric: bool = True
    granularity: Granularity = PerTensor()
    reduce_range: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise InputError(f"bits is {self.bits}; a quantization scheme takes 2 to 8")
        if self.reduce_range and self.bits < 3:
            raise InputError(f"reduce_range needs at least 3 bits, found {self.bits}; leave it out")

    @property
    def quant_min(self) -> int:
        """The smallest integer."""
        return -(2 ** (self._range_bits - 1)) if self.symmetric else 0

    @property
    def quant_max(self) -> int:
        """The largest integer."""
        return 2 ** (self._range_bits - self.symmetric) - 1

    @property
    def dtype(self) -> torch.dtype:
        """The type that holds the integers: int8 if symmetric, else uint8."""
        return torch.int8 if self.symmetric else torch.uint8

    @property
    def _range_bits(self) -> int:
        return self.bits - self.reduce_range

    def __str__(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        share = {PerTensor: "per tensor", PerChannel: "per channel"}.get(type(self.granularity))
        if isinstance(self.granularity, PerGroup):
            share = f"per group of {self.granularity.size}"
        return f"{self.bits} bit {kind} {share} [{self.quant_min}, {self.quant_max}]"
