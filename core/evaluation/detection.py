"""Boxes against boxes: overlap, suppression, greedy matching and average precision.

Boxes are x1, y1, x2, y2 in pixels, without the extra pixel that VOC's first devkit added to every side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from core.kit import InputError

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]
Bools = NDArray[np.bool_]

Predictions = Mapping[str, np.ndarray]
"""Image id -> (n, 6): x1, y1, x2, y2, confidence, label (from 0)."""
Truths = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Image id -> (boxes (n, 4), labels (n,), from 0)."""

Interpolation = Literal["none", "all-point", "coco"]
COCO_THRESHOLDS: tuple[float, ...] = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))
"""The overlaps 0.50, 0.55 .. 0.95 that mAP50-95 is the mean over."""

_COCO_RECALLS = np.linspace(0, 1, 101)
_MANY = 1024  # boxes from which those that lie apart are not compared
_CROWD = 32  # pairs a box from which OpenCV's loop, which forgets what went, does less


def box_iou(a: np.ndarray, b: np.ndarray) -> Floats:
    """Intersection over union of each of `a` (n, 4) with each of `b` (m, 4), shape (n, m); 0 for empty boxes."""
    a, b = np.asarray(a, dtype=np.float64).reshape(-1, 4), np.asarray(b, dtype=np.float64).reshape(-1, 4)
    width = np.minimum(a[:, None, 2], b[:, 2]) - np.maximum(a[:, None, 0], b[:, 0])
    height = np.minimum(a[:, None, 3], b[:, 3]) - np.maximum(a[:, None, 1], b[:, 1])
    inter = np.maximum(width, 0) * np.maximum(height, 0)
    area_a = (a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1])
    area_b = (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
    union = area_a[:, None] + area_b - inter
    return np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)


def suppress(boxes: np.ndarray, scores: np.ndarray, iou_threshold: float, limit: int | None = None) -> Ints:
    """Greedy non-maximum suppression over all classes: the indices kept, most confident first.

    `boxes` (n, 4), `scores` (n,). A box goes when it overlaps a kept, more confident one by more than
    `iou_threshold`; of equal scores the earlier index wins. At most `limit` are kept. Memory stays
    bounded at any n, and boxes that lie apart are not compared, so that the detections of a whole scan can be merged.
    """
    order = np.argsort(-np.asarray(scores), kind="stable")
    ranked = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)[order]
    if len(order) > _MANY and (alive := _alive(ranked.T, iou_threshold)) is not None:
        return order[alive][:limit]
    if len(order) == 0:
        return order
    corners = ranked.astype(np.float64)
    corners[:, 2:] -= corners[:, :2]
    # ranks for scores, so that of equal ones the earlier wins
    ranks = np.arange(len(order), 0, -1, dtype=np.float32)
    kept = cv2.dnn.NMSBoxes(corners, ranks, 0.0, iou_threshold)  # type: ignore[arg-type]
    return order[np.asarray(kept, dtype=np.intp)][:limit]


def _alive(columns: np.ndarray, threshold: float) -> Bools | None:
    """Which of many boxes, columns (4, n) in falling confidence, stay; None where they are too crowded for it."""
    pairs = overlapping(columns.T, _CROWD * columns.shape[1])
    if pairs is None:
        return None
    one, other = pairs
    hit = _conflicts(columns[:, one], columns[:, other], threshold)
    order = np.argsort(one[hit], kind="stable")
    stronger, starts = np.unique(one[hit][order], return_index=True)
    alive = np.ones(columns.shape[1], dtype=bool)
    for box, weaker in zip(stronger, np.split(other[hit][order], starts[1:])):
        if alive[box]:
            alive[weaker] = False
    return alive


def overlapping(boxes: np.ndarray, most: int | None = None) -> tuple[Ints, Ints] | None:
    """The pairs i < j of boxes (n, 4) that share an area, as two arrays; None if more than `most` were to be looked at.

    Without `most` it is never None. A sweep along x in strips along y, a few boxes high: boxes that lie apart are not
    compared.
    """
    boxes = np.asarray(boxes).reshape(-1, 4)
    first: list[Ints] = [np.zeros(0, np.intp)]
    second: list[Ints] = [np.zeros(0, np.intp)]
    tops = boxes[:, 1]
    strip = max(4 * float(np.median(boxes[:, 3] - tops)), 1.0) if len(boxes) else 1.0
    start, end = ((side / strip).astype(np.intp) for side in (tops, boxes[:, 3]))
    looked = 0
    by_left = np.argsort(boxes[:, 0], kind="stable")
    for number in np.unique(start):  # a pair meets in the strip where the lower one begins
        here = by_left[(start[by_left] <= number) & (end[by_left] >= number)]
        left, right = boxes[here, 0], boxes[here, 2]
        follow = (np.searchsorted(left, right) - np.arange(1, len(here) + 1)).clip(0)
        upto = follow.cumsum()
        if most is not None and (looked := looked + int(upto[-1])) > most:
            return None
        place = np.repeat(np.arange(len(here)), follow)
        one, other = here[place], here[place + 1 + np.arange(len(place)) - (upto - follow)[place]]
        low, high = np.maximum(tops[one], tops[other]), np.minimum(boxes[one, 3], boxes[other, 3])
        shared = (low < high) & (np.maximum(start[one], start[other]) == number)
        first.append(np.minimum(one, other)[shared])
        second.append(np.maximum(one, other)[shared])
    return np.concatenate(first), np.concatenate(second)


def _conflicts(a: np.ndarray, b: np.ndarray, threshold: float) -> Bools:
    """Whether boxes given as columns overlap by more than the threshold: (4, ...) and (4, ...), which broadcast."""
    width = np.minimum(a[2], b[2])
    width -= np.maximum(a[0], b[0])
    np.maximum(width, 0, out=width)
    inter = np.minimum(a[3], b[3])
    inter -= np.maximum(a[1], b[1])
    inter *= width  # a negative height leaves it at or below 0, where it overlaps nothing
    area_a, area_b = (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
    # inter > t * (area_a + area_b - inter), without a division
    share = np.float32(threshold / (1 + threshold))
    return np.greater(inter, area_a * share + area_b * share)


def match(iou: Floats, thresholds: Sequence[float]) -> Ints:
    """Give detections to truths greedily at several overlaps at once: index of the truth or -1, (thresholds, n).

    `iou` (n, m) has its detections in falling confidence; each in turn takes, of the truths still free,
    the one that it overlaps most, when that is at least the threshold (> 0), as COCO's evaluation does.
    Set pairs that must not meet (other classes) to 0.
    """
    least = np.asarray(thresholds, dtype=np.float64)
    found = np.full((len(least), len(iou)), -1, dtype=np.intp)
    if iou.size == 0:
        return found
    taken = np.zeros((len(least), iou.shape[1]), dtype=bool)
    rows = np.arange(len(least))
    for d in np.flatnonzero(iou.max(axis=1) >= least.min()):
        free = np.where(taken, -1.0, iou[d])
        best = free.argmax(axis=1)
        hit = free[rows, best] >= least
        taken[rows[hit], best[hit]] = True
        found[hit, d] = best[hit]
    return found


def average_precision(scores: np.ndarray, hits: Bools, positives: int, interpolation: Interpolation) -> float:
    """The area under the precision-recall curve, 0..1; NaN when there is nothing to find.

    `scores` (n,), `hits` (n,) bool, `positives` the number of truths. "none" averages the precision at each
    hit; "all-point" first raises it to the best precision at any higher recall (VOC 2010); "coco" samples
    that envelope at recall 0, 0.01 .. 1. Equal scores keep the order that they came in.
    """
    if positives == 0:
        return float("nan")
    ranked = np.asarray(hits, dtype=bool)[np.argsort(-np.asarray(scores), kind="stable")]
    correct = np.cumsum(ranked)
    precision = correct / np.arange(1, len(ranked) + 1)
    if interpolation == "none":
        return float(precision[ranked].sum() / positives)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    if interpolation == "all-point":
        return float(envelope[ranked].sum() / positives)
    at = np.searchsorted(correct / positives, _COCO_RECALLS, side="left")
    return float(np.append(envelope, 0.0)[at].mean())  # recalls that were never reached count 0


@dataclass(frozen=True)
class ClassMatches:
    """Detections of a whole set, matched within their class at several overlaps."""

    thresholds: tuple[float, ...]
    scores: Floats  # (n,)
    labels: Ints  # (n,)
    hits: Bools  # (thresholds, n)
    positives: Ints  # (classes,)

    def average_precisions(self, interpolation: Interpolation) -> Floats:
        """AP of every class at every overlap, (thresholds, classes), 0..1; NaN for a class without truths."""
        table = np.full((len(self.thresholds), len(self.positives)), np.nan)
        for c, positives in enumerate(self.positives):
            mine = self.labels == c
            for t, hits in enumerate(self.hits):
                table[t, c] = average_precision(self.scores[mine], hits[mine], int(positives), interpolation)
        return table


def match_classes(
    predictions: Predictions, truths: Truths, classes: int, thresholds: Sequence[float] = COCO_THRESHOLDS
) -> ClassMatches:
    """Match every image of `truths` within classes; all detections take part (COCO stops at 100 an image).

    An image without predictions counts as one without detections. Raises InputError for arrays of the wrong
    shape, values that are not finite, boxes turned around, labels outside 0..classes-1, or an unknown image.
    """
    check(predictions, truths, classes)
    scores, labels, hits = [np.zeros(0)], [np.zeros(0, np.intp)], [np.zeros((len(thresholds), 0), bool)]
    positives = np.zeros(classes, dtype=np.intp)
    for image, (boxes, kinds) in truths.items():
        found, wanted = detections_of(predictions, image), np.asarray(kinds, dtype=np.intp)
        mine = found[:, 5].astype(np.intp)
        iou = np.where(mine[:, None] == wanted, box_iou(found[:, :4], boxes), 0.0)
        positives += np.bincount(wanted, minlength=classes)
        scores.append(found[:, 4])
        labels.append(mine)
        hits.append(match(iou, thresholds) >= 0)
    return ClassMatches(
        tuple(thresholds), np.concatenate(scores), np.concatenate(labels), np.concatenate(hits, axis=1), positives
    )


def mean_average_precision(
    predictions: Predictions,
    truths: Truths,
    classes: int,
    thresholds: Sequence[float] = COCO_THRESHOLDS,
    interpolation: Interpolation = "coco",
) -> float:
    """The mean AP over overlaps and classes that have truths, 0..1 (default: mAP50-95); NaN without truths."""
    return mean_over(match_classes(predictions, truths, classes, thresholds).average_precisions(interpolation))


def mean_over(table: Floats) -> float:
    """The mean of the entries that are numbers; NaN when none is."""
    known = table[~np.isnan(table)]
    return float(known.mean()) if known.size else float("nan")


def detections_of(predictions: Predictions, image: str) -> Floats:
    """The detections of one image, (n, 6), most confident first, ties in the order given."""
    found = np.asarray(predictions.get(image, ()), dtype=np.float64).reshape(-1, 6)
    return found[np.argsort(-found[:, 4], kind="stable")]


def check(predictions: Predictions, truths: Truths, classes: int) -> None:
    """Raise InputError, naming the image, for what cannot be scored."""
    if unknown := sorted(set(predictions) - set(truths)):
        raise InputError(
            f"predictions for image {unknown[0]!r}, which is not among the {len(truths)} images with truths; "
            "score a split against its own list"
        )
    for image, found in predictions.items():
        _check_rows(f"predictions of image {image!r}", np.asarray(found), 6)
        _check_labels(f"predictions of image {image!r}", np.asarray(found).reshape(-1, 6)[:, 5], classes)
    for image, (boxes, labels) in truths.items():
        _check_rows(f"truths of image {image!r}", np.asarray(boxes), 4)
        count = np.size(boxes) // 4
        if np.shape(labels) != (count,):
            raise InputError(f"truths of image {image!r}: {count} boxes, but labels of shape {np.shape(labels)}")
        _check_labels(f"truths of image {image!r}", np.asarray(labels), classes)


def _check_rows(what: str, rows: np.ndarray, columns: int) -> None:
    if rows.size and (rows.ndim != 2 or rows.shape[1] != columns):
        raise InputError(f"{what}: array of shape {rows.shape}, expected (n, {columns})")
    if not np.isfinite(rows).all():
        raise InputError(f"{what}: a value is not a finite number; look at the model's output")
    boxes = rows.reshape(-1, columns)[:, :4]
    if (turned := (boxes[:, 2:] < boxes[:, :2]).any(axis=1)).any():
        box = ", ".join(f"{x:g}" for x in boxes[turned][0])
        raise InputError(f"{what}: box {box} is turned around, expected x1 <= x2 and y1 <= y2")


def _check_labels(what: str, labels: np.ndarray, classes: int) -> None:
    bad = labels[(labels < 0) | (labels >= classes) | (labels != np.floor(labels))] if labels.size else labels
    if bad.size:
        raise InputError(f"{what}: label {bad[0]:g}, expected 0 to {classes - 1}")
