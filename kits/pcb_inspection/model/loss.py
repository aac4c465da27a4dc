"""Training targets and loss of the detector: task-aligned assignment, quality focal loss, GIoU.

Sources: TOOD (Feng 2021) for the assignment, GFL (Li 2020) for the quality focal loss, Rezatofighi
2019 for GIoU. Letters: N images, A cells (h * w), G boxes of an image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kits.pcb_inspection.model.network import STRIDE

TOP_CELLS = 8
"""Cells that may learn a box."""
BOX_WEIGHT = 2.0
DISTANCE_WEIGHT = 0.5


def centres(height: int, width: int, device: torch.device) -> Tensor:
    """Centres of the cells in pixels (A, 2), x first."""
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    return (torch.stack((x, y), -1).reshape(-1, 2).float() + 0.5) * STRIDE


def to_boxes(points: Tensor, distances: Tensor) -> Tensor:
    """Boxes x1 y1 x2 y2 in pixels (..., A, 4) from centres (A, 2) and log distances (..., A, 4)."""
    d = distances.clamp(-4, 4).exp() * STRIDE
    return torch.cat((points - d[..., :2], points + d[..., 2:]), -1)


def giou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU of boxes (..., 4) that broadcast."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    inner = (high - low).clamp(min=0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inner
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    iou = inner / union.clamp(min=1e-6)
    return iou, iou - (hull - union) / hull.clamp(min=1e-6)


@torch.no_grad()
def assign(
    scores: Tensor, boxes: Tensor, points: Tensor, truth: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Which cells learn which box of one image: (cells, boxes, quality in 0..1).

    scores (A, 6) are probabilities, boxes (A, 4) predictions, truth (G, 4), labels (G,). A cell can
    learn a box that contains its centre; the TOP_CELLS best by score^0.5 * IoU^3 and closeness to the
    box's centre do, and the best of them has quality 1. A cell wanted by two boxes goes to the one where
    it fits better.
    """
    inside = torch.cat((points[None] - truth[:, None, :2], truth[:, None, 2:] - points[None]), -1).amin(-1) > 0
    # the centre cell always counts, also for a box so thin that no centre lies in it
    middle = (truth[:, :2] + truth[:, 2:]) / 2
    nearest = (points[None] - middle[:, None]).abs().amax(-1)
    inside |= nearest <= nearest.amin(1, keepdim=True)
    iou, _ = giou(boxes[None], truth[:, None])
    closeness = torch.exp(-((points[None] - middle[:, None]).pow(2).sum(-1)) / (2 * (1.5 * STRIDE) ** 2))
    fit = scores[:, labels].T.clamp(min=1e-4).sqrt() * iou.clamp(min=1e-2).pow(3) * closeness * inside
    best = fit.topk(min(TOP_CELLS, fit.shape[1]), dim=1)
    chosen = torch.zeros_like(fit).scatter_(1, best.indices, best.values)
    owner = chosen.argmax(0)
    cells = (chosen.amax(0) > 0).nonzero().squeeze(1)
    owners = owner[cells]
    peak = chosen.amax(1).clamp(min=1e-9)
    return cells, owners, chosen[owners, cells] / peak[owners]


def detection_loss(logits: Tensor, distances: Tensor, truths: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The loss of a batch, a scalar; logits (N, 6, h, w), distances (N, 4, h, w), truths (boxes, labels) an image."""
    count, _, height, width = logits.shape
    points = centres(height, width, logits.device)
    logits = logits.flatten(2).transpose(1, 2)
    distances = distances.flatten(2).transpose(1, 2)
    boxes = to_boxes(points, distances)
    target = torch.zeros_like(logits)
    wanted, found, sides, weights = [], [], [], []
    for i in range(count):
        truth, labels = truths[i]
        if len(truth) == 0:
            continue
        cells, owners, quality = assign(logits[i].sigmoid(), boxes[i], points, truth, labels)
        target[i, cells, labels[owners]] = quality
        wanted.append(truth[owners])
        found.append(boxes[i, cells])
        goal = torch.cat((points[cells] - truth[owners, :2], truth[owners, 2:] - points[cells]), -1).clamp(min=1.0)
        sides.append(F.smooth_l1_loss(distances[i, cells], (goal / STRIDE).log(), reduction="none", beta=0.2).mean(-1))
        weights.append(quality)
    total = target.sum().clamp(min=1.0)
    focus = (target - logits.sigmoid()).abs().pow(2)
    loss = (F.binary_cross_entropy_with_logits(logits, target, reduction="none") * focus).sum() / total
    if weights:
        weight = torch.cat(weights)
        box = 1 - giou(torch.cat(found), torch.cat(wanted))[1]
        loss = loss + ((BOX_WEIGHT * box + DISTANCE_WEIGHT * torch.cat(sides)) * weight).sum() / total
    return loss


def response_loss(logits: Tensor, taught: Tensor) -> Tensor:
    """How far class logits (N, 6, h, w) are from a teacher's probabilities of the same shape, a scalar.

    Response distillation in the form of the quality focal loss, with the teacher's probability as the target.
    """
    focus = (taught - logits.sigmoid()).abs().pow(2)
    pointwise = F.binary_cross_entropy_with_logits(logits, taught, reduction="none")
    return (pointwise * focus).sum() / taught.sum().clamp(min=1.0)
