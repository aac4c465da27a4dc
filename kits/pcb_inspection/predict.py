"""`fitkit predict pcb_inspection`: a person's own boards in, JSON, CSV and pictures out."""

from __future__ import annotations

import argparse
import csv
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from torch import nn

from core.kit import InputError
from core.progress import progress
from kits.pcb_inspection.acceptance import PX_PER_MM
from kits.pcb_inspection.data.deeppcb import CLASSES, Pair, find_pairs, read_image
from kits.pcb_inspection.inspection import overlay, png
from kits.pcb_inspection.model.inspector import Inspection, inspect, tile_count
from kits.pcb_inspection.model.pair import Grey

POOR_MATCH = 0.12
"""Share of differing pixels from which the template is probably that of another board."""
LONGEST_PICTURE = 2000
COLUMNS = ("image", "verdict", "class", "type", "confidence", "x1", "y1", "x2", "y2", "longest_mm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `predict` that are about boards."""
    parser.add_argument("--threshold", type=float, help="report detections from this confidence (default: the frozen one)")
    parser.add_argument("--roi", type=Path, help="inspect only here: a mask image (white = inspect) or regions as JSON")
    parser.add_argument("--ignore", type=Path, help="ignore defects here: a mask image (white = ignore) or regions as JSON")
    parser.add_argument("--px-per-mm", type=float, default=float(PX_PER_MM), help="resolution of the images (default 48)")
    parser.add_argument("--no-pictures", action="store_true", help="leave out the overlay pictures")


def predict(module: nn.Module, inputs: Sequence[str], meta: Mapping[str, Any], out: Path, options: argparse.Namespace) -> str:
    """Inspect a pair, a folder or a list; leaves results.json, results.csv and overlays/ in `out`.

    Every board is accepted or rejected at the threshold. All inputs are checked before the first board
    is inspected; a board whose image turns out to be broken stops the run with what was done so far kept.
    """
    pairs = find_pairs(*inputs)
    threshold = float(meta["threshold"]) if options.threshold is None else float(options.threshold)
    if not 0 < threshold <= 1:
        raise InputError(f"--threshold {threshold}: expected a confidence above 0 and up to 1")
    if not 4 <= options.px_per_mm <= 1000:
        raise InputError(f"--px-per-mm {options.px_per_mm}: expected 4 to 1000 pixels a millimetre")
    roi, ignore = (Regions.read(path) if path else None for path in (options.roi, options.ignore))
    out.mkdir(parents=True, exist_ok=True)
    boards: list[dict[str, Any]] = []
    try:
        for pair in pairs:
            boards.append(_board(module, pair, threshold, roi, ignore, options, out))
    finally:
        _write(out, boards, threshold)
    rejected = sum(b["verdict"] == "reject" for b in boards)
    lines = [f"{len(boards)} board(s): {len(boards) - rejected} accepted, {rejected} rejected at threshold {threshold:.3f}"]
    for board in boards[:20]:
        kinds = ", ".join(f"{d['class']} {d['confidence']:.2f}" for d in board["detections"][:6])
        more = f" and {len(board['detections']) - 6} more" if len(board["detections"]) > 6 else ""
        lines.append(f"  {board['image']}: {board['verdict']}{' - ' + kinds + more if kinds else ''}")
        lines += [f"    warning: {text}" for text in board["warnings"]]
    return "\n".join([*lines, f"results in {out}"])


def _board(
    module: nn.Module, pair: Pair, threshold: float, roi: Regions | None, ignore: Regions | None, options: Any, out: Path
) -> dict[str, Any]:
    test, template = pair.load()
    scale = PX_PER_MM / options.px_per_mm
    started = time.perf_counter()
    inspection = _inspect(module, test, template, scale, pair.image_id)
    seconds = time.perf_counter() - started
    detections = inspection.detections[inspection.detections[:, 4] >= threshold]
    for regions, inside in ((roi, True), (ignore, False)):
        if regions is not None:
            detections = detections[regions.cover(detections, test.shape) == inside]
    if not options.no_pictures:
        _picture(out / "overlays" / f"{pair.image_id}.png", test, detections, threshold)
    worst = max(inspection.registrations, key=lambda r: r.residual)
    warnings = []
    if worst.residual > POOR_MATCH:
        warnings.append(
            f"{worst.residual:.0%} of the pixels of a tile differ from {pair.template.name} after registration; "
            "is it the template of this board, and within 16 px of it?"
        )
    return {
        "image": pair.image_id, "test": str(pair.test), "template": str(pair.template), "size": list(test.shape[::-1]),
        "verdict": "reject" if len(detections) else "accept", "seconds": round(seconds, 4), "warnings": warnings,
        "registration": {"dx": worst.dx, "dy": worst.dy, "residual": round(worst.residual, 5), "by_tiles": worst.warped},
        "detections": [_detection(row, options.px_per_mm) for row in detections],
    }  # fmt: skip


def _inspect(module: nn.Module, test: Grey, template: Grey, scale: float, name: str) -> Inspection:
    """Inspect at the resolution that the network knows, and give the boxes back at that of the image."""
    if abs(scale - 1) > 0.02:
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        small = [np.asarray(cv2.resize(image, None, fx=scale, fy=scale, interpolation=how), np.uint8) for image in (test, template)]
    else:
        scale, small = 1.0, [test, template]
    with progress(f"inspecting {name}", tile_count(*small[0].shape)) as bar:
        inspection = inspect(module, small[0], small[1], on_tile=bar.advance)
    inspection.detections[:, :4] /= scale
    return inspection


def _detection(row: np.ndarray, px_per_mm: float) -> dict[str, Any]:
    x1, y1, x2, y2, confidence, label = (float(v) for v in row)
    return {
        "class": CLASSES[int(label)], "type": int(label) + 1, "confidence": round(confidence, 4),
        "box": [round(v, 1) for v in (x1, y1, x2, y2)], "longest_mm": round(max(x2 - x1, y2 - y1) / px_per_mm, 3),
    }  # fmt: skip


def _picture(path: Path, test: Grey, detections: np.ndarray, threshold: float) -> None:
    """The overlay; a large scan is shown reduced, its boxes drawn after the reduction so that they stay visible."""
    factor = min(1.0, LONGEST_PICTURE / max(test.shape))
    shown = detections.copy()
    if factor < 1:
        test = np.asarray(cv2.resize(test, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA), np.uint8)
        shown[:, :4] *= factor
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(overlay(test, shown, threshold)))


def _write(out: Path, boards: list[dict[str, Any]], threshold: float) -> None:
    fresh = out / "results.json.new"
    fresh.write_text(json.dumps({"threshold": threshold, "boards": boards}, indent=1) + "\n", encoding="utf-8")
    os.replace(fresh, out / "results.json")
    with (out / "results.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for board in boards:
            for d in board["detections"]:
                table.writerow([board["image"], board["verdict"], d["class"], d["type"], d["confidence"], *d["box"], d["longest_mm"]])
            if not board["detections"]:
                table.writerow([board["image"], board["verdict"], *[""] * (len(COLUMNS) - 2)])


@dataclass(frozen=True)
class Regions:
    """Where to inspect or not: a mask image, or polygons that may name the classes they are about."""

    path: Path
    mask: Grey | None
    polygons: tuple[tuple[np.ndarray, frozenset[int]], ...]

    @staticmethod
    def read(path: Path) -> Regions:
        """A mask image, or JSON [{"polygon": [[x, y], ...], "classes": ["spur", ...]}]; classes left out means all."""
        if path.suffix.lower() != ".json":
            return Regions(path, read_image(path), ())
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read as JSON ({error}); mend the file or its path") from error
        polygons = []
        for number, entry in enumerate(entries if isinstance(entries, list) else [entries]):
            where = f"{path}: region {number}"
            corners = np.array(entry.get("polygon", []), np.float32) if isinstance(entry, dict) else np.zeros(0)
            if corners.ndim != 2 or corners.shape[1] != 2 or len(corners) < 3:
                raise InputError(f"{where}: expected \"polygon\" with at least three [x, y] corners in pixels")
            names = entry.get("classes", CLASSES)
            if unknown := set(names) - set(CLASSES):
                raise InputError(f"{where}: class {sorted(unknown)[0]!r} is not known; known are {', '.join(CLASSES)}")
            polygons.append((corners, frozenset(CLASSES.index(n) for n in names)))
        return Regions(path, None, tuple(polygons))

    def cover(self, detections: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Whether the centre of each detection (n, 6) lies in a region that is about its class, (n,)."""
        centres = (detections[:, :2] + detections[:, 2:4]) / 2
        if self.mask is not None:
            if self.mask.shape != tuple(shape):
                raise InputError(
                    f"{self.path}: mask of {self.mask.shape[1]} x {self.mask.shape[0]} on an image of {shape[1]} x {shape[0]}; "
                    "give a mask of the image's size"
                )
            x, y = (centres[:, i].astype(int).clip(0, shape[1 - i] - 1) for i in (0, 1))
            return np.asarray(self.mask[y, x] >= 128)
        inside = np.zeros(len(detections), bool)
        for corners, labels in self.polygons:
            for i, (x, y) in enumerate(centres):
                hit = cv2.pointPolygonTest(corners, (float(x), float(y)), False) >= 0
                inside[i] |= hit and int(detections[i, 5]) in labels
        return inside
