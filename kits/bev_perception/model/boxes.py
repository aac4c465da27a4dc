"""Boxes and their code.

A box is cx, cy, cz, w, l, h, yaw, vx, vy in metres, radians and metres a second, in the LiDAR's frame (x right,
y forward, z up), (cx, cy, cz) its middle, w across its heading and l along it. The network's yaw is that of
mmdet3d before 1.0: `flip_yaw` turns it into nuScenes' (from x, counterclockwise) and back. The code is
cx, cy, log w, log l, cz, log h, sin, cos, vx, vy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kits.bev_perception.model.configs import Config


@dataclass(frozen=True)
class Detections:
    """Boxes (n, 9) with the network's yaw, scores (n,) in 0..1 and labels (n,), the highest score first."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    @property
    def bottom(self) -> Tensor:
        """The boxes with z at their bottom, as mmdet3d's box class takes them."""
        lowered = self.boxes.clone()
        lowered[:, 2] -= lowered[:, 5] / 2
        return lowered


def encode(boxes: Tensor) -> Tensor:
    """Boxes (..., 9) -> codes (..., 10)."""
    x, y, z, w, length, h, yaw, vx, vy = boxes.unbind(-1)
    return torch.stack((x, y, w.log(), length.log(), z, h.log(), yaw.sin(), yaw.cos(), vx, vy), -1)


def decode(codes: Tensor) -> Tensor:
    """Codes (..., 10) -> boxes (..., 9)."""
    x, y, w, length, z, h, sin, cos, vx, vy = codes.unbind(-1)
    return torch.stack((x, y, z, w.exp(), length.exp(), h.exp(), torch.atan2(sin, cos), vx, vy), -1)


def flip_yaw(yaw: Tensor) -> Tensor:
    """The network's yaw -> nuScenes' in the same frame, and back: -yaw - pi / 2, within -pi..pi."""
    return torch.remainder(math.pi / 2 - yaw, 2 * math.pi) - math.pi


def detections(cls_scores: Tensor, bbox_preds: Tensor, config: Config) -> Detections:
    """What one sample's logits (O, K) and codes (O, 10) say: no threshold and no suppression.

    The `max_num` highest scores over queries and classes, then those with their centre in `post_center_range`.
    """
    classes = cls_scores.shape[-1]
    scores, index = cls_scores.sigmoid().flatten().topk(min(config.max_num, cls_scores.numel()))
    boxes = decode(bbox_preds[torch.div(index, classes, rounding_mode="floor")])
    bounds = boxes.new_tensor(config.post_center_range)
    inside = ((boxes[:, :3] >= bounds[:3]) & (boxes[:, :3] <= bounds[3:])).all(1)
    return Detections(boxes[inside], scores[inside], (index % classes)[inside])
