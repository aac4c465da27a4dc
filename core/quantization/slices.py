"""Large packed layers run in slices of their output channels, so that only a part of the float weight is ever made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn import functional as F

from core.kit import InputError
from core.quantization.packed import PackedConv2d, PackedLinear, packed_layers
from core.quantization.packing import dequantize_rows

SLICE = 16_000_000
"""Bytes of float weight a slice: deep convolutions of Stable Diffusion have 118 MB."""


@contextmanager
def in_slices(model: nn.Module, limit: int = SLICE) -> Iterator[None]:
    """Within it no packed layer makes more than `limit` bytes of float weight at once (but at least a channel).

    The results are those of the whole weight, up to the rounding of float sums. It is for inference: a gradient would
    keep every slice. Grouped convolutions are small and run whole.
    """
    if limit < 1:
        raise InputError(f"slices of {limit} bytes: expected a positive size; core.quantization.slices.SLICE is usual")
    changed: list[nn.Module] = []
    try:
        for layer in packed_layers(model).values():
            if isinstance(layer, PackedLinear) or (isinstance(layer, PackedConv2d) and layer.groups == 1):
                row = layer.weight_shape[1:].numel() * layer.compute_dtype.itemsize
                rows = max(1, limit // row)
                if rows < layer.weight_shape[0]:
                    layer.forward = _sliced(layer, rows)  # type: ignore[method-assign, assignment]
                    changed.append(layer)
        yield
    finally:
        for module in changed:
            del module.forward


def _sliced(layer: PackedLinear | PackedConv2d, rows: int) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        out = None
        channels = layer.weight_shape[0]
        for first in range(0, channels, rows):
            here = slice(first, min(first + rows, channels))
            part = _run(layer, x, here)
            if out is None:
                shape = list(part.shape)
                shape[_axis(layer)] = channels
                out = part.new_empty(shape)
            out.narrow(_axis(layer), first, here.stop - first).copy_(part)
            del part
        assert out is not None
        return layer.with_low_rank(x, out)

    return forward


def _run(layer: PackedLinear | PackedConv2d, x: Tensor, here: slice) -> Tensor:
    """The layer's output channels `here`."""
    length = layer.weight_shape[1:].numel()
    made = dequantize_rows(
        layer.weight_packed[here], layer.weight_scale[here], layer.bits, layer.group_size, length, x.dtype
    )
    weight = made.view(-1, *layer.weight_shape[1:])
    bias = layer.bias[here].to(x.dtype) if isinstance(layer.bias, Tensor) else None
    if isinstance(layer, PackedLinear):
        return F.linear(x, weight, bias)
    if layer.padding_mode == "zeros":
        return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation)
    padded = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    return F.conv2d(padded, weight, bias, layer.stride, 0, layer.dilation)


def _axis(layer: nn.Module) -> int:
    return -1 if isinstance(layer, PackedLinear) else 1
