"""Losses that every place learns from, since Hungarian matching alone takes long: of the fine BEV cells and of pixels.

Gaussian heatmaps after CenterNet (Zhou 2019). Letters: B batch, N cameras, C channels, K classes, G boxes of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kits.bev_perception.model import boxes
from kits.bev_perception.model.configs import Config
from kits.bev_perception.model.detector import CODE_WEIGHTS
from kits.bev_perception.model.local import bearing, local_yaw
from kits.bev_perception.model.loss import Truth
from kits.bev_perception.model.proposals import NAIVE, Dense

BOX_WEIGHT = 1.0
DEPTH_WEIGHT = 0.5
SHAPE_WEIGHT = 0.25
SHAPE = 7
"""What a pixel says of the box there beside its distance: x and y in the pixel, log w, l, h, sine and cosine of its
angle to the ray."""
SPREAD = (0.7, 2.0)
"""Standard deviation of a heatmap's peak in cells: of the smallest and of the largest things."""
BALANCE, FOCUS = 4.0, 2.0


def heatmap(places: Tensor, spreads: Tensor, labels: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Peaks of 1 at whole cells `places` (G, 2), x first, with standard deviations (G,) -> (K, h, w) of `shape`."""
    K, h, w = shape
    found = places.new_zeros(shape)
    if not len(labels):
        return found
    x = torch.exp(-((torch.arange(w, device=places.device) - places[:, :1]) ** 2) / (2 * spreads[:, None] ** 2))
    y = torch.exp(-((torch.arange(h, device=places.device) - places[:, 1:]) ** 2) / (2 * spreads[:, None] ** 2))
    peaks = y[:, :, None] * x[:, None, :]
    for label in labels.unique().tolist():
        found[label] = peaks[labels == label].amax(0)
    return found


def heat_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """CenterNet's focal loss of logits against heatmaps of the same shape, by the number of peaks (at least 1)."""
    peak = wanted >= 1 - 1e-4
    p = logits.sigmoid().clamp(1e-4, 1 - 1e-4)
    missed = torch.where(peak, (1 - p) ** FOCUS * p.log(), (1 - wanted) ** BALANCE * p**FOCUS * (1 - p).log())
    return -missed.sum() / peak.sum().clamp(min=1)


def cell_loss(dense: Dense, truths: Sequence[Truth], config: Config) -> dict[str, Tensor]:
    """The losses "heat" and "box" of the dense head."""
    K, h, w = dense.logits.shape[1:]
    maps, said, wanted = [], [], []
    low, extent = (dense.logits.new_tensor(v) for v in (config.pc_range[:2], config.extent[:2]))
    grid = dense.logits.new_tensor((w, h))
    for index, truth in enumerate(truths):
        place = (truth.boxes[:, :2] - low) / extent * grid
        cell = place.floor().clamp(min=torch.zeros_like(grid), max=grid - 1)
        size = (truth.boxes[:, 3] * truth.boxes[:, 4]).sqrt() / (extent[0] / w)
        maps.append(heatmap(cell, (size / 3).clamp(*SPREAD), truth.labels, (K, h, w)))
        code = boxes.encode(truth.boxes)
        code[:, :2] = place - cell - 0.5
        column, row = cell.long().unbind(-1)
        said.append(dense.codes[index][:, row, column].T)
        wanted.append(code)
    found, target = torch.cat(said), torch.cat(wanted)
    known = target.isfinite()
    apart = torch.where(known, found - torch.where(known, target, 0.0), 0.0).abs() * found.new_tensor(CODE_WEIGHTS)
    return {
        "heat": heat_loss(dense.logits, torch.stack(maps)),
        "box": BOX_WEIGHT * apart.sum() / max(1, len(found)),
    }


class PixelHead(nn.Module):
    """Asks every pixel of the finest feature map what stands there, how far, how large and turned how: training only.

    Drives the backbone before anything of the BEV is right, as the perspective head of BEVFormer v2 does.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        C, K = config.embed_dims, len(config.classes)
        self.layers = nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.ReLU(), nn.Conv2d(C, K + 1 + SHAPE, 1))
        nn.init.constant_(cast(Tensor, self.layers[2].bias)[:K], NAIVE)

    def forward(self, features: Tensor, lidar2img: Tensor, truths: Sequence[Truth]) -> dict[str, Tensor]:
        """The losses "heat", "depth" and "shape" of features (B, N, C, h, w) for matrices (B, N, 4, 4)."""
        said = self.layers(features.flatten(0, 1)).unflatten(0, features.shape[:2])
        K = said.shape[2] - 1 - SHAPE
        h, w = said.shape[-2:]
        images = self.config.images
        stride = said.new_tensor((images.width / w, images.height / h))
        maps, depths, wanted, shapes, real = [], [], [], [], []
        for index, truth in enumerate(truths):
            turned = torch.stack(local_yaw(truth.boxes[:, 6], *bearing(truth.boxes[:, 0], truth.boxes[:, 1])), -1)
            shape = torch.cat((truth.boxes[:, 3:6].log(), turned), -1)
            homogeneous = F.pad(truth.boxes[:, :3], (0, 1), value=1.0)
            seen = torch.einsum("nij,gj->ngi", lidar2img[index, :, :3], homogeneous)
            depth = seen[..., 2]
            place = seen[..., :2] / depth.clamp(min=0.5)[..., None] / stride
            cell = place.floor()
            inside = (depth > 0.5) & (cell >= 0).all(-1) & (cell[..., 0] < w) & (cell[..., 1] < h)
            for camera in range(lidar2img.shape[1]):
                mine = inside[camera]
                places = cell[camera, mine]
                tall = truth.boxes[mine, 5] * lidar2img[index, camera, 1, :3].norm() / depth[camera, mine]
                spreads = (tall / stride[1] / 6).clamp(0.6, 2.0)
                maps.append(heatmap(places, spreads, truth.labels[mine], (K, h, w)))
                column, row = places.long().unbind(-1)
                depths.append(said[index, camera, K, row, column])
                wanted.append(depth[camera, mine].log())
                shapes.append(said[index, camera, K + 1 :, row, column].T)
                real.append(torch.cat((place[camera, mine] - places - 0.5, shape[mine]), -1))
        apart = (torch.cat(depths) - torch.cat(wanted)).abs()
        heat = heat_loss(said[:, :, :K].flatten(0, 1), torch.stack(maps))
        wrong, count = (torch.cat(shapes) - torch.cat(real)).abs(), max(1, len(apart))
        return {
            "heat": heat,
            "depth": DEPTH_WEIGHT * apart.sum() / count,
            "shape": SHAPE_WEIGHT * wrong.sum() / count,
        }
