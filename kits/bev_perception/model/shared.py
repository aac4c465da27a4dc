"""One detector's weights for all that are smaller: what a candidate of a search takes of the largest one's.

As in once-for-all networks (Cai et al. 2020): the first layers, the first hidden features; what belongs to the cells of
the BEV grid is brought to another number of them between its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from core.kit import InputError

CELLS = "bev_embedding.weight"
LINES = ("row_embed.weight", "col_embed.weight")


def taken(shared: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors of the shapes `wanted` by name, of the larger ones in `shared`, through which gradients flow.

    A tensor of the same shape is the shared one itself, so that statistics are kept where they belong. Raises
    InputError for a name that is not there and for a shape that is larger.
    """
    found = {}
    for name, shape in wanted.items():
        whole = shared.get(name)
        if whole is None:
            raise InputError(f"{name}: the largest detector has no such weights")
        if tuple(whole.shape) == shape:
            found[name] = whole
        elif name.endswith(CELLS):
            side, into = math.isqrt(len(whole)), math.isqrt(shape[0])
            grid = whole.T.reshape(1, -1, side, side)
            found[name] = resampled(grid, into).flatten(2)[0].T
        elif name.endswith(LINES):
            found[name] = F.interpolate(whole.T[None], size=shape[0], mode="linear", align_corners=False)[0].T
        elif len(whole.shape) == len(shape) and all(a >= b for a, b in zip(whole.shape, shape)):
            found[name] = whole[tuple(slice(0, size) for size in shape)]
        else:
            raise InputError(f"{name}: {shape} wanted, the largest detector has {tuple(whole.shape)}")
    return found


def resampled(grid: Tensor, side: int) -> Tensor:
    """Maps of square cells (B, C, h, w) as (B, C, side, side), linear between the old ones."""
    return F.interpolate(grid, size=(side, side), mode="bilinear", align_corners=False)


def memory_of(bev: Tensor, side: int) -> Tensor:
    """A memory (B, Q, C) of a square grid for a grid of `side` cells a side, (B, side * side, C)."""
    old = math.isqrt(bev.shape[1])
    if old == side:
        return bev
    grid = bev.transpose(1, 2).unflatten(2, (old, old))
    return resampled(grid, side).flatten(2).transpose(1, 2)


def grown(smaller: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights for a larger detector to begin with: those of a smaller one, where it has them, the rest as in `wanted`.

    Raises InputError where neither a cell grid nor the first of several is what differs.
    """
    found = {}
    for name, fresh in wanted.items():
        have = smaller.get(name)
        if have is None or have.shape == fresh.shape:
            found[name] = fresh if have is None else have
        elif name.endswith((CELLS, *LINES)):
            found[name] = taken({name: have}, {name: tuple(fresh.shape)})[name]
        elif all(a <= b for a, b in zip(have.shape, fresh.shape)):
            found[name] = fresh.clone()
            found[name][tuple(slice(0, size) for size in have.shape)] = have
        else:
            raise InputError(f"{name}: {tuple(have.shape)} does not fit into {tuple(fresh.shape)}")
    return {name: tensor.detach().clone() if isinstance(tensor, Tensor) else torch.as_tensor(tensor)
            for name, tensor in found.items()}  # fmt: skip
