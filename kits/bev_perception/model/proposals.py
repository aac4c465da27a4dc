"""Object queries that begin where something is seen: a dense head over the BEV grid, whose best cells they are.

As in BEVFormer v2 (Yang 2023) and TransFusion (Bai 2022), with a head after CenterPoint (Yin 2021). Letters: B batch,
C channels, O object queries, K classes; h, w are twice the rows and columns of the BEV grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kits.bev_perception.model.configs import Config
from kits.bev_perception.model.decoder import Queries, inverse_sigmoid
from kits.bev_perception.model.local import bearing, to_frame

FINE = 2
"""Cells of the dense head along one of the BEV."""
NAIVE = -4.6
"""Bias of the classes to begin with: every one has the probability 0.01."""


@dataclass(frozen=True)
class Dense:
    """What every fine cell says: class logits (B, K, h, w), codes (B, 10, h, w) and features (B, c, h, w).

    A code is that of `boxes` with x and y in cells from the cell's centre, and z in metres; `local` (B, 10, h, w) is
    the same as the head says it, see `local.to_frame`.
    """

    logits: Tensor
    codes: Tensor
    features: Tensor
    local: Tensor


class Proposals(nn.Module):
    """The dense head, and how its cells become queries."""

    place: Tensor
    ray: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        C, K = config.embed_dims, len(config.classes)
        self.conv1 = nn.Conv2d(C, C, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(C)
        self.conv2 = nn.Conv2d(C, C * FINE**2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(C)
        self.classify = nn.Conv2d(C, K, 1)
        self.regress = nn.Conv2d(C, 10, 1)
        nn.init.constant_(cast(Tensor, self.classify.bias), NAIVE)
        self.content = nn.Linear(C + K + 10, C)
        self.position = nn.Sequential(nn.Linear(3, C), nn.ReLU(), nn.Linear(C, C))
        h, w = FINE * config.bev_h, FINE * config.bev_w
        y, x = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
        self.register_buffer("place", torch.stack((x, y)).flatten(1), persistent=False)
        low, extent = config.pc_range[:2], config.extent[:2]
        ray = torch.stack(bearing(x * extent[0] + low[0], y * extent[1] + low[1]))
        self.register_buffer("ray", ray, persistent=False)

    def forward(self, bev: Tensor) -> Dense:
        """BEV (B, Q, C) -> what its fine cells say."""
        B, _, C = bev.shape
        x = bev.transpose(1, 2).reshape(B, C, self.config.bev_h, self.config.bev_w)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(F.pixel_shuffle(self.conv2(x), FINE)))
        local = self.regress(x)
        if not self.config.local_codes:
            return Dense(self.classify(x), local, x, local)
        codes = to_frame(local.permute(0, 2, 3, 1), *self.ray.unbind(0)).permute(0, 3, 1, 2)
        return Dense(self.classify(x), codes, x, local)

    def queries(self, dense: Dense) -> Queries:
        """The cells with the highest scores that are the highest of their 3 x 3 neighbours, as queries.

        References and what they are found by carry no gradient; the content does.
        """
        scores = dense.logits.detach().sigmoid()
        peak = (scores == F.max_pool2d(scores, 3, 1, 1)).to(scores.dtype)
        best = (scores * peak).amax(1).flatten(1)
        chosen = best.topk(min(self.config.num_query, best.shape[-1]), -1).indices
        found = torch.cat((dense.features, dense.logits.sigmoid(), dense.local, dense.codes), 1).flatten(2)
        found = found.gather(2, chosen[:, None].expand(-1, found.shape[1], -1)).transpose(1, 2)
        content, codes = found[..., :-10], found[..., -10:].detach()
        h, w = dense.logits.shape[-2:]
        x, y = self.place[0][chosen] + codes[..., 0] / w, self.place[1][chosen] + codes[..., 1] / h
        low, height = self.config.pc_range[2], self.config.extent[2]
        reference = torch.stack((x, y, (codes[..., 4] - low) / height), -1).clamp(0.001, 0.999)
        return Queries(self.content(content), self.position(inverse_sigmoid(reference)), reference)
