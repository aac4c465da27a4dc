"""The decoder: object queries that look into the BEV and move their reference points from layer to layer.

Letters: B batch, C channels, O object queries, L decoder layers, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kits.bev_perception.model.attention import DeformableAttention, FeedForward, SelfAttention
from kits.bev_perception.model.configs import Config
from kits.bev_perception.model.local import bearing, to_frame

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
        near = config.pillar_heights is not None
        self.attentions = nn.ModuleList(
            (
                SelfAttention(dims, heads, drop),
                DeformableAttention(dims, heads, config.decoder_points, config.bev_h, config.bev_w, drop, near),
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
        self.config = config
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
                reference = place(regress[index](x), reference, self.config)[1].detach()
        return states, references


def place(code: Tensor, reference: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """What regressed codes (B, O, 10) say of references (B, O, 3): codes with centres in metres, and new references."""
    low, size = (reference.new_tensor(v) for v in (config.pc_range[:3], config.extent))
    if config.local_codes:
        ground = reference * size + low
        parts = list(to_frame(code, *bearing(ground[..., 0], ground[..., 1])).unbind(-1))
        for axis, where in enumerate(CENTRE):
            parts[where] = parts[where] + ground[..., axis]
        centre = torch.stack([parts[where] for where in CENTRE], -1)
        return torch.stack(parts, -1), ((centre - low) / size).clamp(0, 1)
    new = (torch.stack([code[..., i] for i in CENTRE], -1) + inverse_sigmoid(reference)).sigmoid()
    parts = list(code.unbind(-1))
    for axis, where in enumerate(CENTRE):
        parts[where] = new[..., axis] * size[axis] + low[axis]
    return torch.stack(parts, -1), new
