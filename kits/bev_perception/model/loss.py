"""Training loss of the detector: focal loss of the classes and L1 of the box codes, in every decoder layer.

Letters: B batch, O object queries, L decoder layers, K classes, G boxes of a sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kits.bev_perception.model import boxes
from kits.bev_perception.model.configs import CLASSES
from kits.bev_perception.model.detector import Predictions
from kits.bev_perception.model.matching import ALPHA, GAMMA, match

CLASS_WEIGHT = 2.0
BOX_WEIGHT = 0.25
VELOCITY_WEIGHT, MOVING = 3.0, 2.0
"""Of a velocity beside its code weight, and the metres a second at which it counts twice that."""
BARRIER = CLASSES.index("barrier")
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


def focal(cls_scores: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """The summed sigmoid focal loss of logits (..., K) for labels (...) as in `Targets`, by weights (K,) or 1."""
    classes = cls_scores.shape[-1]
    kept = labels != IGNORED
    scores, wanted = cls_scores[kept], F.one_hot(labels[kept], classes + 1)[:, :classes].to(cls_scores.dtype)
    p = scores.sigmoid()
    missed = torch.where(wanted > 0, 1 - p, p)
    balance = torch.where(wanted > 0, ALPHA, 1 - ALPHA)
    lost = F.binary_cross_entropy_with_logits(scores, wanted, reduction="none") * balance * missed.pow(GAMMA)
    return (lost if class_weights is None else lost * class_weights).sum()


def layer_loss(
    cls_scores: Tensor,
    bbox_preds: Tensor,
    targets: Targets,
    code_weights: Tensor,
    class_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The class and the box loss of one layer's logits (B, O, K) and codes (B, O, 10), classes by weights (K,) or 1.

    Both are sums over the batch by the number of boxes in it, at least 1.
    """
    chosen = (targets.labels >= 0) & (targets.labels < cls_scores.shape[-1])
    count = chosen.sum().clamp(min=1)
    apart = code_error(bbox_preds[chosen], targets.codes[chosen], code_weights, targets.labels[chosen])
    if class_weights is not None:
        apart = apart * class_weights[targets.labels[chosen]][:, None]
    classes = focal(cls_scores, targets.labels, class_weights)
    return CLASS_WEIGHT * classes / count, BOX_WEIGHT * apart.sum() / count


def code_error(found: Tensor, wanted: Tensor, code_weights: Tensor, labels: Tensor) -> Tensor:
    """Absolute differences of codes (G, 10) of boxes with labels (G,) by weights (10,), 0 for what is not known.

    A barrier looks the same from behind, and the score asks no more: whichever heading is nearer counts. Without that
    the best guess between two headings is one across them.
    A velocity counts VELOCITY_WEIGHT * (1 + speed / MOVING) times: most things stand, and of a plain difference the
    best guess for what might move is that it stands as well.
    """
    known = wanted.isfinite()
    wanted = facing(found, torch.where(known, wanted, 0.0), labels)
    apart = torch.where(known, found - wanted, 0.0).abs() * code_weights
    moving = VELOCITY_WEIGHT * (1 + wanted[:, 8:].norm(dim=1, keepdim=True) / MOVING)
    return torch.cat((apart[:, :8], apart[:, 8:] * moving), 1)


def facing(found: Tensor, wanted: Tensor, labels: Tensor) -> Tensor:
    """Wanted codes (G, 10), those of barriers turned half around where that is nearer to what was found."""
    away, back = (apart.abs().sum(-1) for apart in (found[:, 6:8] - wanted[:, 6:8], found[:, 6:8] + wanted[:, 6:8]))
    turned = (labels == BARRIER) & (back < away)
    sign = torch.where(turned, -1.0, 1.0)[:, None]
    return torch.cat((wanted[:, :6], wanted[:, 6:8] * sign, wanted[:, 8:]), 1)


def targets_of(cls_scores: Tensor, bbox_preds: Tensor, truths: Sequence[Truth]) -> Targets:
    """Targets of one layer's logits (B, O, K) and codes (B, O, 10) by `matching.match`."""
    labels = torch.full(cls_scores.shape[:2], cls_scores.shape[-1], dtype=torch.long, device=cls_scores.device)
    codes = torch.zeros_like(bbox_preds)
    for index, truth in enumerate(truths):
        wanted = boxes.encode(truth.boxes)
        rows, columns = match(cls_scores[index], bbox_preds[index], truth.labels, wanted)
        labels[index, rows], codes[index, rows] = truth.labels[columns], wanted[columns].to(codes.dtype)
    return Targets(labels, codes)


def matched_loss(
    found: Predictions, truths: Sequence[Truth], code_weights: Tensor, class_weights: Tensor | None = None
) -> dict[str, Tensor]:
    """Losses by name, "0.cls", "0.box", "1.cls", ...: every layer is matched anew."""
    parts: dict[str, Tensor] = {}
    for layer, (scores, codes) in enumerate(zip(found.cls_scores, found.bbox_preds)):
        targets = targets_of(scores, codes, truths)
        losses = layer_loss(scores, codes, targets, code_weights, class_weights)
        parts[f"{layer}.cls"], parts[f"{layer}.box"] = losses
    return parts


def assigned_loss(
    found: Predictions, targets: Targets, code_weights: Tensor, class_weights: Tensor | None = None
) -> dict[str, Tensor]:
    """As `matched_loss`, where it is known beforehand which query learns what."""
    parts: dict[str, Tensor] = {}
    for layer, (scores, codes) in enumerate(zip(found.cls_scores, found.bbox_preds)):
        losses = layer_loss(scores, codes, targets, code_weights, class_weights)
        parts[f"{layer}.cls"], parts[f"{layer}.box"] = losses
    return parts


def rarity(truths: Iterable[Truth], classes: int) -> Tensor:
    """Weights of the classes (K,): the square root of how much rarer than the mean class each is, 0.5 to 3.

    The score asks for all classes alike, and a street holds twenty cars for each bus.
    """
    counts = sum((truth.labels.bincount(minlength=classes) for truth in truths), torch.zeros(classes))
    return (counts.mean() / counts.clamp(min=1)).sqrt().clamp(0.5, 3.0)
