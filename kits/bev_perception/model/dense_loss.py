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
from kits.bev_perception.model.lift import bin_of, focal, told
from kits.bev_perception.model.local import bearing, local_yaw
from kits.bev_perception.model.loss import Truth, code_error
from kits.bev_perception.model.proposals import NAIVE, Dense

BOX_WEIGHT = 1.0
DEPTH_WEIGHT = 0.5
BIN_WEIGHT = 1.5
SHAPE_WEIGHT = 0.25
SHAPE = 8
"""What a pixel says of the box there beside the log of its distance: how far its centre lies to the right and below in
metres, the distance in tens of metres, log w, l, h, sine and cosine of its angle to the ray."""
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


def heat_loss(logits: Tensor, wanted: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """CenterNet's focal loss of logits (..., K, h, w) against heatmaps, by the number of peaks (at least 1); classes
    count by weights (K,) or 1.
    """
    peak = wanted >= 1 - 1e-4
    p = logits.sigmoid().clamp(1e-4, 1 - 1e-4)
    missed = torch.where(peak, (1 - p) ** FOCUS * p.log(), (1 - wanted) ** BALANCE * p**FOCUS * (1 - p).log())
    if class_weights is not None:
        missed = missed * class_weights[:, None, None]
    return -missed.sum() / peak.sum().clamp(min=1)


def cell_loss(
    dense: Dense, truths: Sequence[Truth], config: Config, class_weights: Tensor | None = None
) -> dict[str, Tensor]:
    """The losses "heat" and "box" of the dense head, classes by weights (K,) or 1."""
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
    found = torch.cat(said)
    labels = torch.cat([truth.labels for truth in truths])
    apart = code_error(found, torch.cat(wanted), found.new_tensor(CODE_WEIGHTS), labels)
    if class_weights is not None:
        apart = apart * class_weights[labels][:, None]
    return {
        "heat": heat_loss(dense.logits, torch.stack(maps), class_weights),
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

    def forward(
        self,
        features: Tensor,
        lidar2img: Tensor,
        truths: Sequence[Truth],
        distances: Tensor | None = None,
        class_weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The losses "heat", "depth" and "shape" of features (B, N, C, h, w) for matrices (B, N, 4, 4), and "bin" of
        the detector's own `distances` (B, N, E, h, w), see `lift.Distances`.

        Every pixel that a box covers learns what it can of it, all pixels of a box as much as those of another.
        """
        said = self.layers(features.flatten(0, 1)).unflatten(0, features.shape[:2])
        K, (h, w) = said.shape[2] - 1 - SHAPE, said.shape[-2:]
        images = self.config.images
        stride = said.new_tensor((images.width / w, images.height / h))
        sure = distances.log_softmax(2) if distances is not None else None
        maps, wrong, count = [], said.new_zeros(3), 0
        for index, truth in enumerate(truths):
            turned = torch.stack(local_yaw(truth.boxes[:, 6], *bearing(truth.boxes[:, 0], truth.boxes[:, 1])), -1)
            homogeneous = F.pad(truth.boxes[:, :3], (0, 1), value=1.0)
            for camera, matrix in enumerate(lidar2img[index, :, :3]):
                seen = homogeneous @ matrix.T
                place = seen[:, :2] / seen[:, 2:].clamp(min=0.5) / stride
                inside = (seen[:, 2] > 0.5) & (place >= 0).all(-1) & (place[:, 0] < w) & (place[:, 1] < h)
                box, place, depth = truth.boxes[inside], place[inside], seen[inside, 2]
                far = told(depth, matrix, images.width)
                scale = focal(matrix) / depth[:, None] / stride  # pixels of the map in a metre at the box
                spreads = (box[:, 5] * scale[:, 1] / 6).clamp(0.6, 2.0)
                maps.append(heatmap(place.floor(), spreads, truth.labels[inside], (K, h, w)))
                reach = torch.stack(((box[:, 3] + box[:, 4]) / 4, box[:, 5] / 2), -1) * scale
                owner, row, column = covered(place, reach.clamp(min=0.7), depth, (h, w))
                if not len(owner):
                    continue
                here = torch.stack((column, row), -1) + 0.5
                real = torch.cat(
                    (
                        far[owner, None].log(),
                        (place[owner] - here) / scale[owner],
                        far[owner, None] / 10,
                        box[owner, 3:6].log(),
                        turned[inside][owner],
                    ),
                    -1,
                )
                apart = (said[index, camera, K:, row, column].T - real).abs()
                share = 1 / owner.bincount(minlength=len(box))[owner]
                lost = [(apart[:, 0] * share).sum(), (apart[:, 1:].sum(1) * share).sum()]
                if sure is not None:
                    lost.append((_unsure(sure[index, camera, :, row, column], far[owner]) * share).sum())
                wrong = wrong + F.pad(torch.stack(lost), (0, 3 - len(lost)))
                count += len(owner.unique())
        depth_wrong, shape_wrong, bin_wrong = (wrong / max(1, count)).unbind()
        found = {
            "heat": heat_loss(said[:, :, :K].flatten(0, 1), torch.stack(maps), class_weights),
            "depth": DEPTH_WEIGHT * depth_wrong,
            "shape": SHAPE_WEIGHT * shape_wrong,
        }
        return found if distances is None else found | {"bin": BIN_WEIGHT * bin_wrong}


def _unsure(sure: Tensor, far: Tensor) -> Tensor:
    """The cross entropy (P,) of log probabilities (E, P) with distances (P,), which lie between two bins each."""
    place = bin_of(far, len(sure))
    low = place.floor().clamp(max=len(sure) - 2)
    share, first = place - low, low.long()[None]
    below, above = sure.gather(0, first)[0], sure.gather(0, first + 1)[0]
    return -(1 - share) * below - share * above


def covered(place: Tensor, reach: Tensor, depth: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Which box every covered pixel shows, its row and its column (P,) each: the nearest of those about `place` (G, 2).

    A box covers pixels whose centre lies within `reach` (G, 2) of it, x first.
    """
    h, w = shape
    x, y = torch.arange(w, device=place.device) + 0.5, torch.arange(h, device=place.device) + 0.5
    over = ((y - place[:, 1:]).abs() <= reach[:, 1:])[:, :, None] & ((x - place[:, :1]).abs() <= reach[:, :1])[:, None]
    if not len(place):
        nothing = torch.zeros(0, dtype=torch.long, device=place.device)
        return nothing, nothing, nothing
    far = torch.where(over, depth[:, None, None], torch.inf)
    near, owner = far.min(0)
    row, column = near.isfinite().nonzero().unbind(1)
    return owner[row, column], row, column
