"""Detections as text files, one an image, as DeepPCB's evaluation takes them."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np

from core.evaluation.detection import Predictions, check, detections_of
from core.files import writing
from core.kit import InputError
from kits.pcb_inspection.data.deeppcb import CLASSES

CONFIDENCE_FLOOR = 0.01
"""Predictions are handed over down to this confidence."""
LINE = "x1,y1,x2,y2,confidence,type"


def write_predictions(folder: Path, predictions: Predictions) -> None:
    """Write `<folder>/<image id>.txt`, lines `x1,y1,x2,y2,confidence,type`, most confident first.

    Coordinates in pixels to 0.001, confidence exact to float32, type 1 to 6; what is below CONFIDENCE_FLOOR is left
    out; an image without detections has an empty file. Raises InputError as `check` does, for an image id that is
    no plain file name, and when the folder holds files of other images, which would be read back with these.
    """
    for image in predictions:
        if not re.fullmatch(r"[\w][\w.\- ]*", image):
            raise InputError(f"image id {image!r} cannot name a file; use letters, digits, dots, dashes or underscores")
    check_alone(predictions)
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


def check_alone(predictions: Predictions) -> None:
    """InputError for detections that are not well formed, whatever there is to find."""
    nothing = (np.zeros((0, 4)), np.zeros(0, np.intp))
    check(predictions, dict.fromkeys(predictions, nothing), len(CLASSES))
