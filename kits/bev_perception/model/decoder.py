"""The decoder: object queries that look into the BEV and move their reference points from layer to layer.

Letters: B batch, C channels, O object queries, L decoder layers, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kits.bev_perception.model.attention import DeformableAttention, FeedForward, SelfAttention
from kits.bev_perception.model.configs import Config

CENTRE = (0, 1, 4)
"""Where x, y and z stand in the box code."""


@dataclass(frozen=True)
class Queries:
    """Object queries: `content` and `position` (B, O, C), `reference` (B, O, 3) in 0..1 of `pc_range`.

    `hidden` (O, O) is True where the query of a row may not look at that of a column; None hides nothing.
    """

    content: Tensor
    position: Tensor
    reference: Tensor
    hidden: Tensor | None = None


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """log(x / (1 - x)) for x in 0..1, both sides held above `eps`."""
    x = x.clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()


class DecoderLayer(nn.Module):
    """Self-attention, attention to the BEV and feed-forward, a layer norm after each."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        dims, heads, drop = config.embed_dims, config.heads, config.dropout
        self.attentions = nn.ModuleList(
            (
                SelfAttention(dims, heads, drop),
                DeformableAttention(dims, heads, config.decoder_points, config.bev_h, config.bev_w, drop),
            )
        )
        self.ffns = nn.ModuleList((FeedForward(dims, config.ffn_dims, drop),))
        self.norms = nn.ModuleList(nn.LayerNorm(dims) for _ in range(3))

    def forward(self, x: Tensor, position: Tensor, bev: Tensor, reference: Tensor, hidden: Tensor | None) -> Tensor:
        x = self.norms[0](self.attentions[0](x, position, hidden))
        x = self.norms[1](self.attentions[1](x, position, bev, reference))
        return self.norms[2](self.ffns[0](x))


class Decoder(nn.Module):
    """Queries and BEV -> for every layer its state (B, O, C) and the references before it (B, O, 3)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))

    def forward(self, queries: Queries, bev: Tensor, regress: nn.ModuleList) -> tuple[list[Tensor], list[Tensor]]:
        """`regress` are the layers' regression branches; each moves the references for the layers after it."""
        x, reference = queries.content, queries.reference
        states, references = [], []
        for index, layer in enumerate(self.layers):
            x = layer(x, queries.position, bev, reference[..., :2], queries.hidden)
            states.append(x)
            references.append(reference)
            if index + 1 < len(self.layers):
                reference = moved(regress[index](x), reference).detach()
        return states, references


def moved(code: Tensor, reference: Tensor) -> Tensor:
    """References (B, O, 3) moved by a regressed box code (B, O, 10)."""
    delta = torch.stack([code[..., i] for i in CENTRE], -1)
    return (delta + inverse_sigmoid(reference)).sigmoid()
