"""Denoising queries (DN-DETR, Li 2022; with rejected ones as in DINO, Zhang 2023): training only.

The true boxes, moved and mislabelled at random, are given to the decoder as further queries that learn to find them
again, which needs no matching. Letters: B batch, O object queries, T denoising queries, G boxes of a sample, C
channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from kits.bev_perception.model import boxes
from kits.bev_perception.model.configs import Config
from kits.bev_perception.model.decoder import Queries, inverse_sigmoid
from kits.bev_perception.model.loss import IGNORED, Targets, Truth


@dataclass(frozen=True)
class Noise:
    """How the true boxes are disturbed.

    A centre moves by up to its half size and `margin` metres; those that moved by more than `split` of that are to be
    rejected. A label is another one with the probability `flip`; sizes change by up to a factor of 1 + `size`. Every
    box is given `groups` times.
    """

    groups: int = 4
    margin: float = 0.5
    split: float = 0.7
    flip: float = 0.2
    size: float = 0.4


class Denoiser(nn.Module):
    """Makes denoising queries. Its parameters are needed for training only and are no part of the detector."""

    def __init__(self, config: Config, noise: Noise | None = None) -> None:
        super().__init__()
        self.config, self.noise = config, noise or Noise()
        dims = config.embed_dims
        self.label = nn.Embedding(len(config.classes), dims)
        self.place = nn.Sequential(nn.Linear(6, dims), nn.ReLU(), nn.Linear(dims, dims))

    def forward(self, queries: Queries, truths: Sequence[Truth]) -> tuple[Queries, Targets]:
        """The queries with T = groups * (most boxes of a sample) before them, and what those T learn.

        Neither the groups see each other nor the plain queries any of them. Slots that a sample with fewer boxes
        leaves over learn nothing.
        """
        noise, classes = self.noise, len(self.config.classes)
        B, plain = queries.content.shape[:2]
        most = max(len(truth.labels) for truth in truths)
        T, device = noise.groups * most, queries.content.device
        labels = torch.full((B, T), IGNORED, dtype=torch.long, device=device)
        codes = torch.zeros(B, T, 10, device=device)
        given = torch.zeros(B, T, dtype=torch.long, device=device)
        place = torch.full((B, T, 6), 0.5, device=device)
        low = torch.tensor(self.config.pc_range[:3], device=device)
        extent = torch.tensor(self.config.extent, device=device)
        for index, truth in enumerate(truths):
            count = len(truth.labels)
            if not count:
                continue
            first = torch.arange(noise.groups, device=device)[:, None] * most
            slots = (first + torch.arange(count, device=device)).flatten()
            box, label = truth.boxes.repeat(noise.groups, 1).float(), truth.labels.repeat(noise.groups)
            way = F.normalize(torch.randn(len(box), 3, device=device), dim=-1)
            far = torch.rand(len(box), 1, device=device)
            centre = box[:, :3] + way * far * (box[:, 3:6] / 2 + noise.margin)
            size = box[:, 3:6] * (1 + noise.size * (2 * torch.rand(len(box), 3, device=device) - 1))
            other = torch.randint(0, classes, label.shape, device=device)
            given[index, slots] = torch.where(torch.rand(label.shape, device=device) < noise.flip, other, label)
            place[index, slots] = torch.cat(((centre - low) / extent, size.log()), -1)
            labels[index, slots] = torch.where(far[:, 0] > noise.split, classes, label)
            codes[index, slots] = boxes.encode(box)
        reference = place[..., :3].clamp(0, 1)
        position = self.place(torch.cat((inverse_sigmoid(reference), place[..., 3:]), -1))
        hidden = torch.zeros(T + plain, T + plain, dtype=torch.bool, device=device)
        hidden[T:, :T] = True
        group = torch.arange(T, device=device) // max(most, 1)
        hidden[:T, :T] = group[:, None] != group
        extended = Queries(
            torch.cat((self.label(given), queries.content), 1),
            torch.cat((position, queries.position), 1),
            torch.cat((reference, queries.reference), 1),
            hidden,
        )
        return extended, Targets(labels, codes)
