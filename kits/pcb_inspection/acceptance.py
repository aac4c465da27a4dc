"""What a customer accepts: DeepPCB's official metric, recall at a frozen threshold, and the gates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from core.evaluation.detection import (
    COCO_THRESHOLDS,
    Bools,
    Floats,
    Ints,
    Predictions,
    Truths,
    average_precision,
    detections_of,
    match_classes,
    mean_over,
)
from core.evaluation.intervals import clopper_pearson, group_bootstrap
from core.figures import Gate
from core.kit import InputError
from kits.pcb_inspection.data.deeppcb import CLASSES
from kits.pcb_inspection.matching import OFFICIAL_IOU, Matching, match_official, sweep
from kits.pcb_inspection.predictions import check_alone

PX_PER_MM = 48
"""The resolution of DeepPCB's line scan camera."""
HALF_MM = 0.5 * PX_PER_MM
"""0.5 mm in pixels: the longest side from which a defect counts for `recall_half_mm`."""
TILE_CM2 = (640 / PX_PER_MM / 10) ** 2
"""The area of one DeepPCB image, cm2."""

SIZE_EDGES = (0, HALF_MM, 32, 48, 64, math.inf)  # longest side, px

GATES: tuple[Gate, ...] = (
    Gate("DeepPCB's pooled AP", "official_ap", ">= 98.6", "%"),
    Gate("mAP@0.33", "map33", ">= 99.3", "%"),
    Gate("mAP@0.50:0.95", "map5095", ">= 80", "%"),
    Gate("F-score", "official_f", ">= 99.0", "%"),
    Gate("recall of the right class", "recall_right", ">= 99.6", "%"),
    Gate("precision at that recall", "precision", ">= 98", "%"),
    Gate("recall of defects of 0.5 mm or more", "recall_half_mm", ">= 99.6", "%"),
    Gate("parameters", "parameters", "<= 2.8e6"),
    Gate("INT8 loss of mAP@0.33", "accuracy_loss", "<= 0.2", "points"),
    Gate("the same detections in both runtimes", "runtime_agreement", ">= 99.9", "%"),
    Gate("loss by conditional compute", "gated_official_ap_loss", "<= 0.1", "points"),
    Gate("speed end to end", "fps", ">= 120", "1/s", device="this-host"),
    Gate("speed against YOLOv8n FP32", "speedup_yolov8n", ">= 6", "x", device="this-host"),
    Gate("scan of 16,384 x 16,384 px", "scan_seconds", "<= 8", "s", device="this-host"),
    Gate("memory of that scan", "scan_memory", "<= 1000", "MB", device="this-host"),
    Gate("power", "power", "<= 1.0", "W", device="edge-1w"),
)


@dataclass(frozen=True)
class Metrics:
    """The score of one set of predictions; rates in %, intervals of 95 %.

    `values` is name -> (value, unit); `intervals` name -> {"clopper_pearson": [low, high], "group_bootstrap":
    [low, high] or None where fewer than two board groups hold defects}; `by_class`, `by_size`, `by_group` name ->
    counts and recall; `confusion` has a row a class and then false calls, a column a class and then missed;
    `misses` is one entry a defect that was not found as its own class, with why.
    """

    threshold: float
    values: Mapping[str, tuple[float, str]]
    intervals: Mapping[str, Mapping[str, list[float] | None]]
    ap33: Mapping[str, float]
    by_class: Mapping[str, Mapping[str, Any]]
    by_size: Mapping[str, Mapping[str, Any]]
    by_group: Mapping[str, Mapping[str, Any]]
    confusion: list[list[int]]
    misses: list[dict[str, Any]]
    counts: Mapping[str, int] = field(default_factory=dict)

    def figures(self) -> dict[str, tuple[float, str]]:
        """{name: (value, unit)}; a rate over nothing is NaN, figures of clean boards are absent without any."""
        return dict(self.values)

    def to_json(self) -> dict[str, Any]:
        """The content of `metrics.json`: "threshold" beside the figures, NaN as null."""
        return {
            "threshold": self.threshold,
            **{name: _number(value) for name, (value, _) in self.values.items()},
            "units": {name: unit for name, (_, unit) in self.values.items()},
            "intervals": {name: dict(kinds) for name, kinds in self.intervals.items()},
            "ap33": {name: _number(value) for name, value in self.ap33.items()},
            "by_class": {name: dict(row) for name, row in self.by_class.items()},
            "by_size": {name: dict(row) for name, row in self.by_size.items()},
            "by_group": {name: dict(row) for name, row in self.by_group.items()},
            "confusion": {"rows": [*CLASSES, "false call"], "columns": [*CLASSES, "missed"], "counts": self.confusion},
            "misses": self.misses,
            "counts": dict(self.counts),
        }


def score(
    predictions: Predictions,
    truths: Truths,
    threshold: float,
    groups: Mapping[str, str],
    clean_predictions: Predictions | None = None,
    *,
    tile_cm2: float = TILE_CM2,
) -> Metrics:
    """All metrics of `predictions` (down to CONFIDENCE_FLOOR) at one frozen threshold.

    Average precisions use every detection. `map33` is the mean over classes of AP at IoU >= 0.33, matched within
    the class, by confidence, all-point interpolation; `map50` and `map5095` are COCO's with 101 points and
    no limit a picture. `official_ap` pools the classes, without interpolation; `official_f`, `precision`,
    `recall_right` and `recall_any` are those of the official matching of what is at or above the threshold;
    `precision_any` counts a wrong class as right. `f_best` is a diagnostic: the best F over thresholds of this very
    set. `groups` names each image's board group; `clean_predictions` are those on boards without defects;
    `tile_cm2` is the area of one image. Raises InputError as `check` does and for an image without a group.
    """
    if missing := sorted(set(truths) - set(groups)):
        raise InputError(f"image {missing[0]!r} has no board group; give one for each of the {len(truths)} images")
    matching = match_official(predictions, truths)
    submitted, found, right = matching.at(threshold)
    half_mm = _longest(matching.boxes) >= HALF_MM
    board = np.array([groups[image] for image in matching.images], dtype=object)
    defects, called, false_calls = len(found), int(submitted.sum()), int((submitted & (matching.owner < 0)).sum())
    correct = int(right.sum())

    per_class = match_classes(predictions, truths, len(CLASSES), (OFFICIAL_IOU, *COCO_THRESHOLDS))
    ap33, coco = per_class.average_precisions("all-point")[0], per_class.average_precisions("coco")[1:]
    ap = average_precision(matching.scores, matching.right, defects, "none")
    best_f = sweep(matching)[1] if defects else np.zeros(0)

    percent = {
        "map33": 100 * mean_over(ap33),
        "map50": 100 * mean_over(coco[0]),
        "map5095": 100 * mean_over(coco),
        "official_ap": 100 * ap,
        "official_f": _rate(2 * correct, called + defects) if defects else math.nan,
        "f_best": float(best_f.max(initial=0.0)) if defects else math.nan,
        "recall_any": _rate(int(found.sum()), defects),
        "recall_right": _rate(correct, defects),
        "recall_half_mm": _rate(int((found & half_mm).sum()), int(half_mm.sum())),
        "precision": _rate(correct, called),
        "precision_any": _rate(called - false_calls, called),
        "escape_rate": _rate(defects - int(found.sum()), defects),
    }
    values = {name: (value, "%") for name, value in percent.items()}
    area = len(truths) * tile_cm2
    values["false_calls_cm2"] = (false_calls / area if area else math.nan, "1/cm2")
    counts = {"images": len(truths), "defects": defects, "detections": called, "correct": correct,
              "found_any": int(found.sum()), "false_calls": false_calls}  # fmt: skip
    everything = np.ones(defects, bool)
    intervals: dict[str, dict[str, list[float] | None]] = {
        "recall_any": _intervals(found, everything, board),
        "recall_right": _intervals(right, everything, board),
        "recall_half_mm": _intervals(found, half_mm, board),
        "escape_rate": _intervals(~found, everything, board),
    }
    if clean_predictions is not None:
        calls = _clean_calls(clean_predictions, threshold)
        rejected, boards = int((calls > 0).sum()), len(calls)
        values["overkill_rate"] = (_rate(rejected, boards), "%")
        values["clean_false_calls_cm2"] = (float(calls.mean()) / tile_cm2 if boards else math.nan, "1/cm2")
        counts |= {"clean_boards": boards, "clean_boards_rejected": rejected}
        intervals["overkill_rate"] = {"clopper_pearson": _percent(clopper_pearson(rejected, boards))}
    return Metrics(
        threshold=float(threshold),
        values=values,
        intervals=intervals,
        ap33={name: 100 * float(value) for name, value in zip(CLASSES, ap33, strict=True)},
        by_class={name: _recalls(matching.labels == c, found, right) for c, name in enumerate(CLASSES)},
        by_size={name: _recalls(mask, found, right) for name, mask in _size_bins(matching.boxes)},
        by_group={name: _recalls(board == name, found, right) for name in sorted({groups[i] for i in truths})},
        confusion=_confusion(matching, submitted, found),
        misses=list(_misses(matching, found, right)),
        counts=counts,
    )


def _rate(part: int, whole: int) -> float:
    return 100 * part / whole if whole else math.nan


def _percent(interval: tuple[float, float]) -> list[float]:
    return [100 * bound for bound in interval]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _longest(boxes: Floats) -> Floats:
    return np.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])


def _size_bins(boxes: Floats) -> Iterable[tuple[str, Bools]]:
    longest = _longest(boxes)
    for low, high in zip(SIZE_EDGES, SIZE_EDGES[1:], strict=False):
        name = f"{low:g} to under {high:g} px" if math.isfinite(high) else f"{low:g} px and more"
        yield name, (longest >= low) & (longest < high)


def _intervals(hit: Bools, of: Bools, board: np.ndarray) -> dict[str, list[float] | None]:
    """Both intervals of the share of `hit` among `of`, in %."""
    exact = _percent(clopper_pearson(int((hit & of).sum()), int(of.sum())))
    names, index = np.unique(board[of].astype(str), return_inverse=True)
    if len(names) < 2:
        return {"clopper_pearson": exact, "group_bootstrap": None}
    drawn = group_bootstrap(np.bincount(index, weights=hit[of]), np.bincount(index))
    return {"clopper_pearson": exact, "group_bootstrap": _percent(drawn)}


def _recalls(mask: Bools, found: Bools, right: Bools) -> dict[str, Any]:
    """Counts and recall of the defects under a mask."""
    defects, any_class, own_class = int(mask.sum()), int(found[mask].sum()), int(right[mask].sum())
    return {
        "defects": defects,
        "missed": defects - any_class,
        "wrong_class": any_class - own_class,
        "recall_any": _number(_rate(any_class, defects)),
        "recall_right": _number(_rate(own_class, defects)),
        "recall_any_interval": _percent(clopper_pearson(any_class, defects)),
    }


def _confusion(matching: Matching, submitted: Bools, found: Bools) -> list[list[int]]:
    size = len(CLASSES)
    table = np.zeros((size + 1, size + 1), dtype=int)
    np.add.at(table, (matching.labels[found], matching.classes[matching.taken[found]]), 1)
    table[:size, size] = np.bincount(matching.labels[~found], minlength=size)
    table[size, :size] = np.bincount(matching.classes[submitted & (matching.owner < 0)], minlength=size)
    return [[int(n) for n in row] for row in table]


def _misses(matching: Matching, found: Bools, right: Bools) -> Iterable[dict[str, Any]]:
    for i in np.flatnonzero(~right):
        entry = {"image": matching.images[i], "box": [float(x) for x in matching.boxes[i]],
                 "class": CLASSES[matching.labels[i]]}  # fmt: skip
        if matching.taken[i] < 0:
            yield {**entry, "why": "no detection"}
            continue
        detection = matching.taken[i]
        why = "wrong class" if found[i] else "low confidence"
        yield {**entry, "why": why, "confidence": float(matching.scores[detection]),
               "detected": CLASSES[matching.classes[detection]]}  # fmt: skip


def _clean_calls(predictions: Predictions, threshold: float) -> Ints:
    """Detections at or above the threshold on each clean board, (boards,)."""
    check_alone(predictions)
    calls = [(detections_of(predictions, image)[:, 4] >= threshold).sum() for image in predictions]
    return np.array(calls, dtype=np.intp)
