"""Multi-scale deformable attention (Zhu 2021) on `grid_sample`, and BEVFormer's two attentions (Li 2022) made of it.

Letters: B batch, N cameras, C channels, Q BEV cells in rows (index = row * bev_w + column) or object queries, D points
in a pillar, P sampling points, K cameras that a cell looks into. Every tensor is batch first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kits.bev_perception.model.lift import Far, weigh

QUARTERS, OWN = 4, 3.0
"""Quarters of a cell, and the logit by which a head begins to prefer the points of its own."""


@dataclass(frozen=True)
class Views:
    """Where BEV cells lie in the cameras' images.

    `points` (B, Q, K, D, 2) are x, y in 0..1 of the image, `cameras` (B, Q, K) the numbers of the cameras they are
    points of, `weights` (B, Q, K) one over the number of cameras that see the cell, and 0 for those that do not;
    `depth` (B, Q, K, D) is how far away they are, see `lift.told`.
    """

    points: Tensor
    cameras: Tensor
    weights: Tensor
    depth: Tensor


def _linear(inputs: int, outputs: int, *, zero: bool = False) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    if zero:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _rays(heads: int, groups: int, points: int, near: bool = False) -> Tensor:
    """Offsets to begin with (heads * groups * points * 2,): each head looks one way, its point p p + 1 cells far.

    With `near` it is p / 2 cells far, so that the first is the place itself.
    """
    angle = torch.arange(heads, dtype=torch.float32) * (2 * math.pi / heads)
    ray = torch.stack((angle.cos(), angle.sin()), -1)
    ray = ray / ray.abs().amax(-1, keepdim=True)
    steps = torch.arange(points, dtype=torch.float32) / 2 if near else torch.arange(1.0, points + 1)
    return (ray[:, None, None] * steps[:, None]).expand(heads, groups, points, 2).reshape(-1)


def _spread(samples: Tensor, weights: Tensor) -> Tensor:
    """Samples (G, d, P, Q) weighted by (G, P, Q) -> (G, d, Q)."""
    return (samples * weights.unsqueeze(1)).sum(2)


def _sample(maps: Tensor, grid: Tensor) -> Tensor:
    """Maps (G, d, h, w) at places (G, P, Q, 2), x and y in -1..1 from border to border -> (G, d, P, Q), 0 outside."""
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


class _Sampling(nn.Module):
    """What the sampling attentions share: heads, and values that pruning may have made narrower than the queries."""

    heads: int
    value_proj: nn.Linear

    @property
    def head_dim(self) -> int:
        """Channels of the values of one head."""
        return self.value_proj.out_features // self.heads


class TemporalSelfAttention(_Sampling):
    """BEV cells attend to the history and to the present, each with its own points; the two results are averaged.

    Linear outputs are laid out heads, queue (0 history, 1 present), points, (x, y).
    """

    def __init__(
        self, dims: int, heads: int, points: int, bev_h: int, bev_w: int, dropout: float, near: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.points, self.bev_h, self.bev_w = heads, points, bev_h, bev_w
        self.sampling_offsets = _linear(2 * dims, heads * 2 * points * 2, zero=True)
        self.attention_weights = _linear(2 * dims, heads * 2 * points, zero=True)
        self.value_proj = _linear(dims, dims)
        self.output_proj = _linear(dims, dims)
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(_rays(heads, 2, points, near))

    def forward(self, query: Tensor, position: Tensor, value: Tensor, reference: Tensor) -> Tensor:
        """query and position (B, Q, C), value (B, 2, Q, C) and reference (B, 2, Q, 2) history first -> (B, Q, C)."""
        B, Q, _ = query.shape
        H, P, h, w = self.heads, self.points, self.bev_h, self.bev_w
        both = torch.cat((value[:, 0], query + position), -1)
        offsets = self.sampling_offsets(both).view(B, Q, H, 2, P, 2)
        weights = self.attention_weights(both).view(B, Q, H, 2, P).permute(0, 3, 2, 4, 1).softmax(3)
        places = reference.transpose(1, 2)[:, :, None, :, None] + offsets / offsets.new_tensor((w, h))
        grid = (2 * places - 1).permute(0, 3, 2, 4, 1, 5).reshape(B * 2 * H, P, Q, 2)
        maps = self.value_proj(value).view(B * 2, h, w, H, self.head_dim).permute(0, 3, 4, 1, 2)
        maps = maps.reshape(B * 2 * H, self.head_dim, h, w)
        out = _spread(_sample(maps, grid), weights.reshape(B * 2 * H, P, Q))
        mean = out.view(B, 2, H * self.head_dim, Q).mean(1).transpose(1, 2)
        return query + self.dropout(self.output_proj(mean))


class CameraAttention(_Sampling):
    """The sampling inside of spatial cross-attention: no output projection.

    Linear outputs are laid out heads, levels, points / D, D, (x, y): the points of the pillar vary fastest.
    """

    def __init__(self, dims: int, heads: int, levels: int, points: int, near: bool = False) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = _linear(dims, heads * levels * points * 2, zero=True)
        self.attention_weights = _linear(dims, heads * levels * points, zero=True)
        self.value_proj = _linear(dims, dims)
        with torch.no_grad():
            if near:
                # each head begins at its own quarter of the cell, whose points follow each other
                own = torch.arange(heads)[:, None] % QUARTERS == torch.arange(points) // (points // QUARTERS)
                self.attention_weights.bias.copy_((OWN * own)[:, None].expand(heads, levels, points).flatten())
            else:
                self.sampling_offsets.bias.copy_(_rays(heads, levels, points))

    def forward(
        self, query: Tensor, value: Tensor, shapes: list[tuple[int, int]], views: Views, far: Far | None = None
    ) -> Tensor:
        """query (B, Q, C), value (B, N, sum of h * w, C) with the (h, w) of its levels -> (B, Q, C).

        With `far` samples of the finest level count by how likely what they show is as far away as the cell.
        """
        B, Q, _ = query.shape
        N = value.shape[1]
        K, D = views.points.shape[2:4]
        H, L, P, d = self.heads, self.levels, self.points, self.head_dim
        offsets = self.sampling_offsets(query).view(B, Q, H, L, 1, P // D, D, 2)
        weights = self.attention_weights(query).view(B, Q, H, L * P).permute(0, 2, 3, 1).softmax(2)
        weights = weights.view(B, H, L, 1, P, Q) * views.weights.transpose(1, 2)[:, None, None, :, None]
        value = self.value_proj(value)
        result, start = value.new_zeros(()), 0
        for level, (h, w) in enumerate(shapes):
            places = views.points[:, :, None, :, None] + offsets[:, :, :, level] / offsets.new_tensor((w, h))
            tall = _tall(places, views.cameras, N, h, w).permute(0, 2, 3, 4, 5, 1, 6)
            grid = tall.reshape(B * H, K * P, Q, 2)
            counts = weights[:, :, level].reshape(B * H, K * P, Q)
            if far is not None and level == 0:
                depth = views.depth.permute(0, 2, 3, 1)[:, None, :, None].expand(tall.shape[:-1])
                pixels = tall * tall.new_tensor((w / 2, 1.0)) + tall.new_tensor((w / 2, 0.0))
                likely = weigh(far.picture, pixels.reshape(B, -1, 2), depth.reshape(B, -1), far.bins, (N, h, w))
                counts = counts * likely.view_as(counts)
            maps = value[:, :, start : start + h * w].reshape(B, N, h, w, H, d).permute(0, 4, 5, 1, 2, 3)
            # one picture of all cameras, one above the other, a row of zeros below each: a cell then samples only the
            # cameras that see it, with shapes that do not depend on the data
            maps = F.pad(maps, (0, 0, 0, 1)).reshape(B * H, d, N * (h + 1), w)
            part = _spread(_sample(maps, grid), counts)
            result, start = result + part, start + h * w
        return result.view(B, H * d, Q).transpose(1, 2)


def _tall(places: Tensor, cameras: Tensor, count: int, h: int, w: int) -> Tensor:
    """Places (B, Q, heads, K, P / D, D, 2) in 0..1 of an image (h, w) -> the same in -1..1 of the tall picture.

    Half a cell outside of an image there is nothing to see any more, so nothing is lost where places are clamped.
    """
    # x and y stay side by side throughout: taken apart and put together again they cost as much as the sampling
    size = places.new_tensor((w, h))
    inside = (places * size).clamp(min=-0.5).minimum(size + 0.5)
    above = (cameras * (h + 1)).to(places.dtype)[..., None] * places.new_tensor((0.0, 1.0))
    return (inside + above[:, :, None, :, None, None]) * places.new_tensor((2 / w, 2 / (count * (h + 1)))) - 1


class SpatialCrossAttention(nn.Module):
    """BEV cells attend to the images of the cameras that see them; the mean over those cameras is projected and added.

    A cell that no camera sees still gets the bias of `output_proj`.
    """

    def __init__(self, dims: int, heads: int, levels: int, points: int, dropout: float, near: bool = False) -> None:
        super().__init__()
        self.deformable_attention = CameraAttention(dims, heads, levels, points, near)
        self.output_proj = _linear(dims, dims)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, query: Tensor, value: Tensor, shapes: list[tuple[int, int]], views: Views, far: Far | None = None
    ) -> Tensor:
        """As `CameraAttention.forward`, with the residual."""
        return query + self.dropout(self.output_proj(self.deformable_attention(query, value, shapes, views, far)))


class DeformableAttention(_Sampling):
    """Object queries attend to the BEV around their reference points.

    Linear outputs are laid out heads, points, (x, y).
    """

    def __init__(
        self, dims: int, heads: int, points: int, bev_h: int, bev_w: int, dropout: float, near: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.points, self.bev_h, self.bev_w = heads, points, bev_h, bev_w
        self.sampling_offsets = _linear(dims, heads * points * 2, zero=True)
        self.attention_weights = _linear(dims, heads * points, zero=True)
        self.value_proj = _linear(dims, dims)
        self.output_proj = _linear(dims, dims)
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(_rays(heads, 1, points, near))

    def forward(self, query: Tensor, position: Tensor, bev: Tensor, reference: Tensor) -> Tensor:
        """query and position (B, Q, C), bev (B, cells, C), reference (B, Q, 2) in 0..1 -> (B, Q, C)."""
        B, Q, _ = query.shape
        H, P, h, w = self.heads, self.points, self.bev_h, self.bev_w
        placed = query + position
        offsets = self.sampling_offsets(placed).view(B, Q, H, P, 2)
        weights = self.attention_weights(placed).view(B, Q, H, P).permute(0, 2, 3, 1).softmax(2)
        places = reference[:, :, None, None] + offsets / offsets.new_tensor((w, h))
        grid = (2 * places - 1).permute(0, 2, 3, 1, 4).reshape(B * H, P, Q, 2)
        maps = self.value_proj(bev).view(B, h, w, H, self.head_dim).permute(0, 3, 4, 1, 2)
        maps = maps.reshape(B * H, self.head_dim, h, w)
        out = _spread(_sample(maps, grid), weights.reshape(B * H, P, Q))
        return query + self.dropout(self.output_proj(out.view(B, H * self.head_dim, Q).transpose(1, 2)))


class SelfAttention(nn.Module):
    """Object queries attend to each other; the position is added to query and key, not to the value."""

    def __init__(self, dims: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(dims, heads, dropout, batch_first=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, query: Tensor, position: Tensor, hidden: Tensor | None = None) -> Tensor:
        """query and position (B, Q, C); hidden (Q, Q) is True where a row may not look -> (B, Q, C)."""
        placed = query + position
        found, _ = self.attn(placed, placed, query, attn_mask=hidden, need_weights=False)
        return query + self.dropout(cast(Tensor, found))


class FeedForward(nn.Module):
    """Two linear layers and the residual, under the names of mmcv's FFN."""

    def __init__(self, dims: int, hidden: int, dropout: float) -> None:
        super().__init__()
        first = nn.Sequential(_linear(dims, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.layers = nn.Sequential(first, _linear(hidden, dims), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)
