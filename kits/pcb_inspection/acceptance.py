"""What a customer accepts: DeepPCB's official metric, recall at a frozen threshold, and the gates."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
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
    box_iou,
    check,
    detections_of,
    match_classes,
    mean_over,
)
from core.evaluation.intervals import clopper_pearson, group_bootstrap
from core.figures import Gate
from core.files import writing
from core.kit import InputError
from kits.pcb_inspection.data.deeppcb import CLASSES

PX_PER_MM = 48
"""The resolution of DeepPCB's line scan camera."""
OFFICIAL_IOU = 0.33
SHIFTED = 20
"""Found defects from which on it is told where the annotators' boxes lie."""
"""A detection counts above this overlap (not at it)."""
HALF_MM = 0.5 * PX_PER_MM
"""0.5 mm in pixels: the longest side from which a defect counts for `recall_half_mm`."""
TILE_CM2 = (640 / PX_PER_MM / 10) ** 2
"""The area of one DeepPCB image, cm2."""
CONFIDENCE_FLOOR = 0.01
"""Predictions are handed over down to this confidence."""
SLACK = 0.2
"""Points of F that the frozen threshold gives up for recall."""

SIZE_EDGES = (0, HALF_MM, 32, 48, 64, math.inf)  # longest side, px
LINE = "x1,y1,x2,y2,confidence,type"

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
    Gate("power", "power", "<= 1.0", "W", device="edge-1w"),
)


@dataclass(frozen=True)
class Matching:
    """All detections and all defects of a set under DeepPCB's official, class-blind matching.

    Because a defect takes the most confident detection that is free, what is below a threshold never
    changes what is above it: one matching serves every threshold.
    """

    scores: Floats  # (n,) confidence of each detection
    classes: Ints  # (n,) its class
    owner: Ints  # (n,) the defect that took it, or -1
    right: Bools  # (n,) taken by a defect of its own class
    boxes: Floats  # (m, 4) defects, pixels
    labels: Ints  # (m,)
    images: tuple[str, ...]  # (m,) image id of each defect
    taken: Ints  # (m,) the detection that each defect took, or -1

    def at(self, threshold: float) -> tuple[Bools, Bools, Bools]:
        """(detections submitted (n,), defects found as any class (m,), as their own class (m,)) at a threshold."""
        submitted = self.scores >= threshold
        found, right = np.zeros(len(self.taken), bool), np.zeros(len(self.taken), bool)
        has = self.taken >= 0
        found[has] = submitted[self.taken[has]]
        right[has] = found[has] & self.right[self.taken[has]]
        return submitted, found, right


def match_official(predictions: Predictions, truths: Truths) -> Matching:
    """DeepPCB's matching: in each image the defects, in file order, each take the most confident free
    detection with IoU > 0.33, whatever its class; a detection of the wrong class is used up and not correct.

    IoU is taken on the coordinates as given: the published script cuts them to whole pixels. Source: the
    evaluation of the DeepPCB repository, after that of ICDAR 2015. Raises InputError as `check` does.
    """
    check(predictions, truths, len(CLASSES))
    rows, owner, taken = [np.zeros((0, 6))], [np.zeros(0, np.intp)], [np.zeros(0, np.intp)]
    boxes, labels, images = [np.zeros((0, 4))], [np.zeros(0, np.intp)], []
    detections = defects = 0
    for image, (true_boxes, true_labels) in truths.items():
        mine, count = detections_of(predictions, image), len(true_labels)
        near = box_iou(true_boxes, mine[:, :4]) > OFFICIAL_IOU
        mine_owner, mine_taken = np.full(len(mine), -1, np.intp), np.full(count, -1, np.intp)
        for defect in np.flatnonzero(near.any(axis=1)):
            candidates = near[defect] & (mine_owner < 0)
            first = int(candidates.argmax())  # the rows are in falling confidence
            if candidates[first]:
                mine_owner[first], mine_taken[defect] = defects + defect, detections + first
        rows.append(mine)
        owner.append(mine_owner)
        taken.append(mine_taken)
        boxes.append(np.asarray(true_boxes, dtype=np.float64).reshape(-1, 4))
        labels.append(np.asarray(true_labels, dtype=np.intp))
        images += [image] * count
        detections, defects = detections + len(mine), defects + count
    found, owners, kinds = np.concatenate(rows), np.concatenate(owner), np.concatenate(labels)
    classes = found[:, 5].astype(np.intp)
    right = np.zeros(len(found), dtype=bool)
    right[owners >= 0] = classes[owners >= 0] == kinds[owners[owners >= 0]]
    return Matching(
        found[:, 4], classes, owners, right, np.concatenate(boxes), kinds, tuple(images), np.concatenate(taken)
    )


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
    cuts, f = _sweep(matching)
    lowest = int(np.flatnonzero(f >= f.max() - slack - 1e-9)[-1])
    low = float(cuts[lowest + 1]) if lowest + 1 < len(cuts) else min(float(cuts[lowest]), CONFIDENCE_FLOOR)
    middle = (float(cuts[lowest]) + low) / 2
    return middle if low < middle else float(cuts[lowest])  # neighbouring floats have no middle


def _sweep(matching: Matching) -> tuple[Floats, Floats]:
    """(distinct confidences, falling; official F in %) when that one is the last kept."""
    order = np.argsort(-matching.scores, kind="stable")
    scores = matching.scores[order]
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True)) if len(scores) else np.zeros(0, np.intp)
    defects = max(len(matching.labels), 1)
    correct = np.cumsum(matching.right[order])[last]
    return scores[last], 200.0 * correct / (last + 1 + defects)


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
    best_f = _sweep(matching)[1] if defects else np.zeros(0)

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
    _check_alone(predictions)
    calls = [(detections_of(predictions, image)[:, 4] >= threshold).sum() for image in predictions]
    return np.array(calls, dtype=np.intp)


def _check_alone(predictions: Predictions) -> None:
    nothing = (np.zeros((0, 4)), np.zeros(0, np.intp))
    check(predictions, dict.fromkeys(predictions, nothing), len(CLASSES))


def write_predictions(folder: Path, predictions: Predictions) -> None:
    """Write `<folder>/<image id>.txt`, lines `x1,y1,x2,y2,confidence,type`, most confident first.

    Coordinates in pixels to 0.001, confidence exact to float32, type 1 to 6; what is below CONFIDENCE_FLOOR is left
    out; an image without detections has an empty file. Raises InputError as `check` does, for an image id that is
    no plain file name, and when the folder holds files of other images, which would be read back with these.
    """
    for image in predictions:
        if not re.fullmatch(r"[\w][\w.\- ]*", image):
            raise InputError(f"image id {image!r} cannot name a file; use letters, digits, dots, dashes or underscores")
    _check_alone(predictions)
    folder.mkdir(parents=True, exist_ok=True)
    if stale := sorted(p.name for p in folder.glob("*.txt") if p.stem not in predictions):
        raise InputError(f"{folder}: holds {stale[0]} from another run; give an empty folder")
    for image in predictions:
        rows = detections_of(predictions, image)
        lines = [
            f"{x1:.3f},{y1:.3f},{x2:.3f},{y2:.3f},{confidence:.9g},{int(label) + 1}\n"
            for x1, y1, x2, y2, confidence, label in rows[rows[:, 4] >= CONFIDENCE_FLOOR]
        ]
        with writing(folder / f"{image}.txt"):
            (folder / f"{image}.txt").write_text("".join(lines), encoding="utf-8")


def read_predictions(folder: Path) -> dict[str, np.ndarray]:
    """Read the files of `write_predictions`: image id -> (n, 6) float64, labels from 0.

    Raises InputError, naming file and line, for anything that is not such a line.
    """
    files = sorted(folder.glob("*.txt")) if folder.is_dir() else []
    if not files:
        raise InputError(f"{folder}: no prediction files; expected <image id>.txt, one an image")
    return {file.stem: _read_file(file) for file in files}


def _read_file(file: Path) -> np.ndarray:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not a text file (byte {error.start}); expected lines {LINE}") from error
    rows = [_read_line(f"{file}:{n}", line) for n, line in enumerate(lines, 1) if line.strip()]
    return np.array(rows, dtype=np.float64).reshape(-1, 6)


def _read_line(where: str, line: str) -> list[float]:
    fields = line.split(",")
    if len(fields) != 6:
        raise InputError(f"{where}: {len(fields)} fields, expected 6: {LINE}")
    try:
        *numbers, kind = [float(text) for text in fields]
    except ValueError as error:
        raise InputError(f"{where}: {line.strip()!r} is not all numbers; expected {LINE}") from error
    x1, y1, x2, y2, confidence = numbers
    if not all(math.isfinite(n) for n in numbers):
        raise InputError(f"{where}: {line.strip()!r} holds a value that is not finite")
    if x2 < x1 or y2 < y1:
        raise InputError(f"{where}: box {x1:g},{y1:g},{x2:g},{y2:g} is turned around; expected x1 <= x2 and y1 <= y2")
    if not 0 <= confidence <= 1:
        raise InputError(f"{where}: confidence {confidence:g}, expected 0 to 1")
    if kind not in range(1, len(CLASSES) + 1):
        raise InputError(f"{where}: type {fields[5].strip()!r}, expected a whole number from 1 to {len(CLASSES)}")
    return [*numbers, kind - 1]
