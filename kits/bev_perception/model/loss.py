"""Training loss of the detector: focal loss of the classes and L1 of the box codes, in every decoder layer.

Letters: B batch, O object queries, L decoder layers, K classes, G boxes of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kits.bev_perception.model import boxes
from kits.bev_perception.model.detector import Predictions
from kits.bev_perception.model.matching import ALPHA, GAMMA, match

CLASS_WEIGHT = 2.0
BOX_WEIGHT = 0.25
IGNORED = -1
"""The label of a query that learns nothing."""


@dataclass(frozen=True)
class Truth:
    """The boxes of a sample: (G, 9) with the network's yaw (`boxes.flip_yaw`), and their labels (G,), G may be 0.

    A velocity that is not known is NaN and is not learnt.
    """

    boxes: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Targets:
    """What queries learn: labels (B, O), K for "nothing here" and IGNORED for nothing to learn, and codes (B, O, 10).

    Codes count where a label is in 0..K-1.
    """

    labels: Tensor
    codes: Tensor


def focal(cls_scores: Tensor, labels: Tensor) -> Tensor:
    """The summed sigmoid focal loss of logits (..., K) for labels (...) as in `Targets`."""
    classes = cls_scores.shape[-1]
    kept = labels != IGNORED
    scores, wanted = cls_scores[kept], F.one_hot(labels[kept], classes + 1)[:, :classes].to(cls_scores.dtype)
    p = scores.sigmoid()
    missed = torch.where(wanted > 0, 1 - p, p)
    balance = torch.where(wanted > 0, ALPHA, 1 - ALPHA)
    return (F.binary_cross_entropy_with_logits(scores, wanted, reduction="none") * balance * missed.pow(GAMMA)).sum()


def layer_loss(cls_scores: Tensor, bbox_preds: Tensor, targets: Targets, code_weights: Tensor) -> tuple[Tensor, Tensor]:
    """The class and the box loss of one layer's logits (B, O, K) and codes (B, O, 10).

    Both are sums over the batch by the number of boxes in it, at least 1.
    """
    chosen = (targets.labels >= 0) & (targets.labels < cls_scores.shape[-1])
    count = chosen.sum().clamp(min=1)
    wanted, found = targets.codes[chosen], bbox_preds[chosen]
    known = wanted.isfinite()
    apart = torch.where(known, found - torch.where(known, wanted, 0.0), 0.0).abs() * code_weights
    return CLASS_WEIGHT * focal(cls_scores, targets.labels) / count, BOX_WEIGHT * apart.sum() / count


def targets_of(cls_scores: Tensor, bbox_preds: Tensor, truths: Sequence[Truth]) -> Targets:
    """Targets of one layer's logits (B, O, K) and codes (B, O, 10) by `matching.match`."""
    labels = torch.full(cls_scores.shape[:2], cls_scores.shape[-1], dtype=torch.long, device=cls_scores.device)
    codes = torch.zeros_like(bbox_preds)
    for index, truth in enumerate(truths):
        wanted = boxes.encode(truth.boxes)
        rows, columns = match(cls_scores[index], bbox_preds[index], truth.labels, wanted)
        labels[index, rows], codes[index, rows] = truth.labels[columns], wanted[columns].to(codes.dtype)
    return Targets(labels, codes)


def matched_loss(found: Predictions, truths: Sequence[Truth], code_weights: Tensor) -> dict[str, Tensor]:
    """Losses by name, "0.cls", "0.box", "1.cls", ...: every layer is matched anew."""
    parts: dict[str, Tensor] = {}
    for layer, (scores, codes) in enumerate(zip(found.cls_scores, found.bbox_preds)):
        targets = targets_of(scores, codes, truths)
        parts[f"{layer}.cls"], parts[f"{layer}.box"] = layer_loss(scores, codes, targets, code_weights)
    return parts


def assigned_loss(found: Predictions, targets: Targets, code_weights: Tensor) -> dict[str, Tensor]:
    """As `matched_loss`, where it is known beforehand which query learns what."""
    parts: dict[str, Tensor] = {}
    for layer, (scores, codes) in enumerate(zip(found.cls_scores, found.bbox_preds)):
        parts[f"{layer}.cls"], parts[f"{layer}.box"] = layer_loss(scores, codes, targets, code_weights)
    return parts
