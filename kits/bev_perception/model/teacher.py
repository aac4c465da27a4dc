"""A teacher that sees with LiDAR: pillars of points make the BEV, the detector's own head finds boxes in it.

As PointPillars (Lang 2019). Letters: B batch, C channels, Q BEV cells in rows, n points.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kits.bev_perception.model.configs import Config
from kits.bev_perception.model.detector import Head
from kits.bev_perception.model.learner import head_losses
from kits.bev_perception.model.loss import Truth

FINER = 4
"""Pillars along a BEV cell."""
POINT = 8
"""What a point says: x, y, z, intensity, and its way from the pillar's middle in x and y, height, distance."""


class Pillars(nn.Module):
    """Points -> BEV features, with convolutions that see far enough for large vehicles."""

    def __init__(self, config: Config, width: int = 32) -> None:
        super().__init__()
        self.config, self.width = config, width
        C = config.embed_dims
        self.points = nn.Sequential(nn.Linear(POINT, width), nn.ReLU(), nn.Linear(width, width))
        self.stem = _Conv(width, width, 2)
        self.fine = _Conv(width, C, 2)
        self.near = nn.Sequential(_Conv(C, C, 1), _Conv(C, C, 1))
        self.far = nn.Sequential(_Conv(C, C, 2), _Conv(C, C, 1), _Conv(C, C, 1))
        self.norm = nn.LayerNorm(C)

    def forward(self, clouds: Sequence[Tensor]) -> Tensor:
        """B clouds (n, 4 or more) x, y, z in metres of the LiDAR's frame and intensity in 0..255 -> (B, Q, C)."""
        x = self.stem(torch.stack([self._scatter(cloud) for cloud in clouds]))
        x = self.fine(x)
        x = self.near(x) + F.interpolate(self.far(x), size=x.shape[-2:], mode="bilinear", align_corners=False)
        return self.norm(x.flatten(2).transpose(1, 2))

    def _scatter(self, cloud: Tensor) -> Tensor:
        """The largest of its points' features in every pillar (width, h, w), 0 where there is none."""
        config, h, w = self.config, FINER * self.config.bev_h, FINER * self.config.bev_w
        low, size = cloud.new_tensor(config.pc_range[:3]), cloud.new_tensor(config.extent)
        share = (cloud[:, :3] - low) / size
        inside = ((share >= 0) & (share < 1)).all(1)
        cloud, share = cloud[inside], share[inside]
        grid = cloud.new_tensor((w, h))
        place = share[:, :2] * grid
        cell = place.floor().clamp(max=grid - 1)
        distance = cloud[:, :2].norm(dim=1, keepdim=True) / 50
        parts = (
            share[:, :2],
            cloud[:, 2:4] * cloud.new_tensor((1, 1 / 255)),
            place - cell - 0.5,
            share[:, 2:],
            distance,
        )
        said = torch.cat(parts, 1)
        features = self.points(said)
        index = (cell[:, 1] * w + cell[:, 0]).long()[:, None].expand(-1, self.width)
        flat = features.new_zeros(h * w, self.width).scatter_reduce(0, index, features, "amax", include_self=False)
        return flat.T.reshape(self.width, h, w)


class _Conv(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        )


class LidarTeacher(nn.Module):
    """`forward` gives logits (B, O, K), codes (B, O, 10) and the BEV (B, Q, C), as the detector does."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.pillars = Pillars(config)
        self.pts_bbox_head = head = Head(config)
        # what makes a BEV of pictures is not asked
        del head.positional_encoding, head.bev_embedding
        for name in ("encoder", "can_bus_mlp", "level_embeds", "cams_embeds"):
            delattr(head.transformer, name)
        head.distances = head.fusion = None

    def forward(self, clouds: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        bev, head = self.pillars(clouds), self.pts_bbox_head
        found = head.decode(bev, head.queries(bev), last_only=True)
        return found.cls_scores[0], found.bbox_preds[0], bev

    def loss(self, clouds: Sequence[Tensor], truths: Sequence[Truth]) -> Tensor:
        """The loss of every decoder layer and of the dense head, a scalar."""
        bev, head = self.pillars(clouds), self.pts_bbox_head
        parts = head_losses(head, bev, head.dense(bev), truths)
        return torch.stack(list(parts.values())).sum()
