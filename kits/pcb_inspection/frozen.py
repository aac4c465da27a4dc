"""What is learnt of boards and frozen into an artifact: the threshold, where annotators' boxes lie, how they name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from core.evaluation.detection import Predictions, Truths, box_iou
from core.kit import InputError
from kits.pcb_inspection.data.augment import Ready
from kits.pcb_inspection.data.resolution import seen_at
from kits.pcb_inspection.matching import OFFICIAL_IOU, match_official, sweep
from kits.pcb_inspection.model.naming import Names, counted
from kits.pcb_inspection.model.pair import stack
from kits.pcb_inspection.predictions import CONFIDENCE_FLOOR

SHIFTED = 20
"""Found defects from which on it is told where the annotators' boxes lie."""
SLACK = 0.5
"""Points of F that the frozen threshold gives up for recall."""


def freeze_names(pairs: Sequence[Ready], side: int) -> Names:
    """What defects of a name do to pieces of copper, counted on training pairs as a network of `side` px sees them."""
    seen = (seen_at(pair, side) for pair in pairs)
    return counted((stack(pair.test, pair.template), pair.boxes, pair.labels) for pair in seen)


def freeze_shift(predictions: Predictions, truths: Truths) -> tuple[float, float]:
    """Pixels (x, y) to move boxes by so that they lie as the annotators' do, chosen on validation data.

    The median from the boxes of found defects to the true ones, (0, 0) where fewer than SHIFTED were found. Presumably
    annotators round to pixels in one direction, which pictures that are mirrored in training hide from the network.
    """
    moves = []
    for image, (boxes, labels) in truths.items():
        found = predictions[image]
        if not len(found) or not len(boxes):
            continue
        over = np.where(found[:, 5] == labels[:, None], box_iou(boxes, found[:, :4]), 0.0)
        best = over.argmax(1)
        met = over[np.arange(len(boxes)), best] > OFFICIAL_IOU
        moves.append((boxes[met] - found[best[met], :4]).reshape(-1, 2, 2).mean(1))
    every = np.concatenate(moves) if moves else np.zeros((0, 2))
    if len(every) < SHIFTED:
        return 0.0, 0.0
    x, y = np.median(every, axis=0)
    return round(float(x), 2), round(float(y), 2)


def shifted(predictions: Predictions, shift: tuple[float, float]) -> dict[str, Any]:
    """Detections with their boxes moved by so many pixels (x, y)."""
    by = np.array((*shift, *shift, 0.0, 0.0), np.float32)
    return {image: found + by for image, found in predictions.items()}


def freeze_threshold(predictions: Predictions, truths: Truths, *, slack: float = SLACK) -> float:
    """The threshold to freeze, chosen on validation data: detections at or above it are reported.

    The lowest whose official F is at most `slack` points below the best, since a missed defect costs an
    inspection more than a false call; with a slack of 0 the best F, of equal ones the lower. The value
    lies in the middle of the gap between the last confidence kept and the next one, so that rounding and
    another runtime's arithmetic change nothing; below the last of all, in the middle between it and
    CONFIDENCE_FLOOR. Raises InputError where there are no defects or no detections.
    """
    matching = match_official(predictions, truths)
    defects = len(matching.labels)
    if not defects or not len(matching.scores):
        raise InputError(
            f"{defects} defects and {len(matching.scores)} detections in {len(truths)} images: a threshold needs both; "
            "give a validation split with annotated boards and a trained model"
        )
    cuts, f = sweep(matching)
    lowest = int(np.flatnonzero(f >= f.max() - slack - 1e-9)[-1])
    low = float(cuts[lowest + 1]) if lowest + 1 < len(cuts) else min(float(cuts[lowest]), CONFIDENCE_FLOOR)
    middle = (float(cuts[lowest]) + low) / 2
    return middle if low < middle else float(cuts[lowest])  # neighbouring floats have no middle
