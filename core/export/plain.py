"""Say norms, attention, nearest upsampling and splits in the few operators that XNNPACK takes over.

XNNPACK has no group norm, layer norm, nearest upsampling or split. Left as they are, each cuts the graph: a UNet of
33 convolutions falls into 55 pieces, with a copy at every seam. In the words below it stays in a few.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def decompositions() -> dict[Any, Callable[..., Any]]:
    """A table for `ExportedProgram.run_decompositions`, by operator of aten."""
    aten = torch.ops.aten
    return {
        aten.group_norm.default: group_norm,
        aten.layer_norm.default: layer_norm,
        aten.scaled_dot_product_attention.default: attention,
        aten.upsample_nearest2d.vec: upsample,
        aten.split.Tensor: split,
    }


def mean(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """The mean (rows, 1) over the last axes, of the given sizes, of a tensor with rows x prod(sizes) values.

    One product with a constant vector for each axis: XNNPACK's own mean wants channels last, and so two transposes of
    the whole tensor. Short sums of short sums lose less in float32 than one long sum.
    """
    rows = values
    for size in reversed([s for s in sizes if s > 1]):
        rows = F.linear(rows.reshape(-1, size), torch.full((1, size), 1.0 / size, dtype=values.dtype))
    return rows.reshape(-1, 1)


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, _: bool = True
) -> Tensor:
    """torch's group norm of x (N, C, ...)."""
    channels = x.shape[1]
    shape = (1, channels) + (1,) * (x.dim() - 2)
    y = _normalized(x, (channels // groups, *x.shape[2:]), eps)
    y = y if weight is None else y * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape)


def layer_norm(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    _: bool = True,
) -> Tensor:
    """torch's layer norm over the last axes of x."""
    y = _normalized(x, shape, eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _normalized(x: Tensor, sizes: Sequence[int], eps: float) -> Tensor:
    centred = x.reshape(-1, math.prod(sizes))
    centred = centred - mean(centred, sizes)
    return (centred * torch.rsqrt(mean(centred * centred, sizes) + eps)).reshape(x.shape)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(q k^T scale + mask) v of (..., L, D), without torch's care for rows that are masked out whole.

    Dropout is left out, since a model is lowered for inference.
    """
    batch, length, width = query.shape[:-2], query.shape[-2], query.shape[-1]
    if enable_gqa or key.shape[:-2] != batch:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    scores = torch.bmm(_flat(query * (width**-0.5 if scale is None else scale)), _flat(key).transpose(1, 2))
    if causal:
        mask = torch.ones(length, key.shape[-2], dtype=torch.bool).tril()
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        scores = (scores.reshape(*batch, *scores.shape[1:]) + mask).reshape(scores.shape)
    return torch.bmm(torch.softmax(scores, -1), _flat(value)).reshape(*batch, length, value.shape[-1])


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[-2:])


def upsample(x: Tensor, size: Sequence[int] | None, scales: Sequence[float] | None) -> Tensor:
    """Nearest upsampling of x (N, C, H, W) by whole factors, as a product that repeats; others stay as they are."""
    batch, channels, height, width = x.shape
    tall, wide = size if size is not None else (int(s * f) for s, f in zip((height, width), scales or (0, 0)))
    if tall < height or wide < width or tall % height or wide % width:
        left: Any = NotImplemented
        return left
    ones = torch.ones((1, tall // height, 1, wide // width), dtype=x.dtype)
    return (x.reshape(-1, 1, width, 1) * ones).reshape(batch, channels, tall, wide)


def split(x: Tensor, size: int, dim: int = 0) -> list[Tensor]:
    """torch's split as slices."""
    return [x.narrow(dim, i, min(size, x.shape[dim] - i)) for i in range(0, x.shape[dim], size)]
