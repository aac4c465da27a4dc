"""BEVFormer's encoder: a grid of queries that gathers the history and the images.

Letters: B batch, N cameras, C channels, Q BEV cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kits.bev_perception.model.attention import FeedForward, SpatialCrossAttention, TemporalSelfAttention, Views
from kits.bev_perception.model.configs import Config
from kits.bev_perception.model.lift import Far


@dataclass(frozen=True)
class History:
    """What is known of the frame before.

    `bev` (B, Q, C) is already turned, `shift` (B, 2) its distance in fractions of the grid, `known` (B, 1, 1) is False
    for samples that begin a scene: what the others hold there is not looked at.
    """

    bev: Tensor
    shift: Tensor
    known: Tensor


class EncoderLayer(nn.Module):
    """Temporal self-attention, spatial cross-attention and feed-forward, a layer norm after each."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        dims, heads, drop = config.embed_dims, config.heads, config.dropout
        levels, near = config.backbone.levels, config.pillar_heights is not None
        self.attentions = nn.ModuleList(
            (
                TemporalSelfAttention(dims, heads, config.temporal_points, config.bev_h, config.bev_w, drop, near),
                SpatialCrossAttention(dims, heads, levels, config.spatial_points, drop, near),
            )
        )
        self.ffns = nn.ModuleList((FeedForward(dims, config.ffn_dims, drop),))
        self.norms = nn.ModuleList(nn.LayerNorm(dims) for _ in range(3))

    def forward(
        self,
        query: Tensor,
        position: Tensor,
        value: Tensor,
        reference: Tensor,
        images: Tensor,
        shapes: list[tuple[int, int]],
        views: Views,
        far: Far | None = None,
    ) -> Tensor:
        x = self.norms[0](self.attentions[0](query, position, value, reference))
        x = self.norms[1](self.attentions[1](x, images, shapes, views, far))
        return self.norms[2](self.ffns[0](x))


class Encoder(nn.Module):
    """BEV queries -> BEV features of this frame.

    With a history, temporal attention looks at it and at the first query (embedding and CAN bus) in every layer;
    without, at the layer's own query twice.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))

    def forward(
        self,
        query: Tensor,
        position: Tensor,
        reference: Tensor,
        history: History,
        images: Tensor,
        shapes: list[tuple[int, int]],
        views: Views,
        far: Far | None = None,
    ) -> Tensor:
        """query and position (B, Q, C), reference (Q, 2), images (B, N, sum of h * w, C) -> (B, Q, C)."""
        known = history.known
        past = reference + torch.where(known, history.shift[:, None], 0.0)
        both = torch.stack((past, reference.expand_as(past)), 1)
        x = query
        for layer in self.layers:
            value = torch.stack((torch.where(known, history.bev, x), torch.where(known, query, x)), 1)
            x = layer(x, position, value, both, images, shapes, views, far)
        return x
