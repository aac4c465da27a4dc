"""Calibration: the range of values that a quantizer should cover, from what passes through it.

minmax       everything that was seen
percentile   all but a share of the values, the same at both ends
mse          the clipping range with the least squared error (searched on a histogram)
entropy      the clipping range whose quantized histogram loses least information, by Kullback-Leibler
             divergence (S. Migacz, "8-bit inference with TensorRT", GTC 2017)

All but min-max read the data twice: first its range, then a histogram with fixed bins in that range, which
needs no bins to be merged or stretched on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from core.kit import InputError
from core.quantization.numerics import block_range, choose_qparams, fake_quantize
from core.quantization.schemes import PerTensor, Scheme

Method = Literal["minmax", "percentile", "mse", "entropy"]
METHODS: tuple[Method, ...] = ("minmax", "percentile", "mse", "entropy")
BINS = 8192
OUTSIDE = 1e-4  # the share of values that "percentile" leaves outside, half at each end
_SHRINK = np.geomspace(1 / 256, 1, 160)


class MinMax:
    """The least and the largest value seen."""

    def __init__(self) -> None:
        self.low, self.high = float("inf"), float("-inf")

    def __call__(self, x: Tensor) -> None:
        """Look at a tensor of any shape."""
        low, high = x.detach().aminmax()
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))


class Histogram:
    """Counts of values in equal bins between `low` and `high`, widened to include 0."""

    def __init__(self, low: float, high: float, bins: int = BINS) -> None:
        self.low, self.high = min(low, 0.0), max(high, 0.0)
        if self.high == self.low:
            self.high = self.low + 1.0
        self.edges = np.linspace(self.low, self.high, bins + 1)
        self.counts = np.zeros(bins)

    def __call__(self, x: Tensor) -> None:
        """Add the values of a tensor of any shape."""
        counts = torch.histc(x.detach().float().flatten().cpu(), len(self.counts), self.low, self.high)
        self.counts += counts.double().numpy()


def choose_range(histogram: Histogram, method: Method, scheme: Scheme) -> tuple[float, float]:
    """(low, high) to cover with the integers of a scheme."""
    return _CHOICES[method](histogram, scheme)


def calibrate_range(tensors: Iterable[Tensor], method: Method, scheme: Scheme) -> tuple[float, float]:
    """(low, high) of values that are at hand; `tensors` is read twice unless the method is min-max."""
    seen = MinMax()
    for x in tensors:
        seen(x)
    if method == "minmax":
        return seen.low, seen.high
    histogram = Histogram(seen.low, seen.high)
    for x in tensors:
        histogram(x)
    return choose_range(histogram, method, scheme)


def check_method(method: str) -> None:
    """Raise InputError for a method that is not known."""
    if method not in METHODS:
        raise InputError(f"calibration is {method!r}; known are {', '.join(METHODS)}")


def weight_qparams(weight: Tensor, scheme: Scheme, method: Method, layer: str = "") -> tuple[Tensor, Tensor]:
    """Scale and zero point of a weight [out, ...], of the granularity's scale shape.

    Min-max, unless there are fewer than 8 bits or the method is "mse": then each block's range is shrunk
    by the factor (1.00, 0.98, ... 0.30) that leaves the least squared error.
    """
    low, high = block_range(weight, scheme, layer)
    scale, zero_point = choose_qparams(low, high, scheme)
    if scheme.bits == 8 and method != "mse":
        return scale, zero_point
    weight = weight.detach()
    best = torch.full_like(scale, float("inf"))
    for percent in range(100, 29, -2):
        s, z = choose_qparams(low * (percent / 100), high * (percent / 100), scheme)
        error = (fake_quantize(weight, s, z, scheme) - weight).square().reshape(max(s.numel(), 1), -1)
        total = error.sum(dim=1).reshape(s.shape)
        better = total < best
        best = torch.where(better, total, best)
        scale, zero_point = torch.where(better, s, scale), torch.where(better, z, zero_point)
    return scale, zero_point


def _percentile(histogram: Histogram, scheme: Scheme) -> tuple[float, float]:
    share = np.cumsum(histogram.counts) / max(histogram.counts.sum(), 1)
    first = int(np.searchsorted(share, OUTSIDE / 2, side="right"))
    last = int(np.searchsorted(share, 1 - OUTSIDE / 2, side="left"))
    return float(histogram.edges[first]), float(histogram.edges[min(last, len(share) - 1) + 1])


def _mse(histogram: Histogram, scheme: Scheme) -> tuple[float, float]:
    centres = torch.from_numpy((histogram.edges[1:] + histogram.edges[:-1]) / 2)
    counts = torch.from_numpy(histogram.counts)
    one = Scheme(scheme.bits, scheme.symmetric, PerTensor(), scheme.reduce_range)

    def loss(low: float, high: float) -> float:
        scale, zero_point = choose_qparams(torch.tensor(low), torch.tensor(high), one)
        error = fake_quantize(centres, scale.double(), zero_point, one) - centres
        return float((counts * error.square()).sum())

    return _least(histogram, loss)


def _entropy(histogram: Histogram, scheme: Scheme) -> tuple[float, float]:
    edges, counts = histogram.edges, histogram.counts
    levels = scheme.quant_max - scheme.quant_min + 1

    def loss(low: float, high: float) -> float:
        first = int(np.searchsorted(edges, low, side="right")) - 1
        last = int(np.searchsorted(edges, high, side="left"))
        inside = counts[first:last]
        if len(inside) < levels:
            return float("inf")
        reference = inside.copy()
        reference[0] += counts[:first].sum()
        reference[-1] += counts[last:].sum()
        # Each level spreads its mass evenly over those of its bins that hold anything.
        starts = np.arange(levels) * len(inside) // levels
        width = np.diff(np.append(starts, len(inside)))
        filled = reference > 0
        mass, bins = np.add.reduceat(inside, starts), np.add.reduceat(filled, starts, dtype=float)
        coded = np.repeat(mass / np.maximum(bins, 1), width) * filled
        p, q = reference / reference.sum(), coded / max(coded.sum(), 1e-300)
        q = np.maximum(q, 1e-12)
        return float((p[filled] * np.log(p[filled] / q[filled])).sum())

    return _least(histogram, loss)


def _least(histogram: Histogram, loss: Callable[[float, float], float]) -> tuple[float, float]:
    """The range with the least loss among those clipped at +-t, t from 1/256 of the largest magnitude to all of it."""
    largest = max(-histogram.low, histogram.high)
    ranges = [(max(histogram.low, -t), min(histogram.high, t)) for t in (_SHRINK * largest).tolist()]
    return min(ranges, key=lambda r: loss(*r))


_CHOICES: dict[Method, Callable[[Histogram, Scheme], tuple[float, float]]] = {
    "minmax": lambda histogram, scheme: (histogram.low, histogram.high),
    "percentile": _percentile,
    "mse": _mse,
    "entropy": _entropy,
}
