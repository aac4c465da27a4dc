"""`fitkit predict pcb_inspection`: a person's own boards in, JSON, CSV and pictures out."""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from torch import nn

from core.export.artifact import origin_of
from core.files import write_text, writing
from core.kit import InputError
from core.progress import progress
from kits.pcb_inspection.acceptance import PX_PER_MM
from kits.pcb_inspection.audit import AuditLog, hash_of
from kits.pcb_inspection.conditional import conditional
from kits.pcb_inspection.data.deeppcb import CLASSES, Pair, find_pairs, image_size, read_image
from kits.pcb_inspection.drift import DriftAlarm, statistics
from kits.pcb_inspection.inspection import contact_sheet, overlay, png
from kits.pcb_inspection.model.decode import FLOOR
from kits.pcb_inspection.model.inspector import inspect, tile_count
from kits.pcb_inspection.model.packed import Packed
from kits.pcb_inspection.model.pair import Grey

POOR_MATCH = 0.12
"""Share of differing pixels from which the template is probably that of another board."""
SAME = 0.02
"""Resolutions closer than this share need no resizing."""
LONGEST_PICTURE = 2000
PACKED = 64_000_000
"""Pixels from which on an image is kept at a bit a pixel."""
WHITE = 128
"""Grey level of a mask from which a pixel belongs to its region."""
DEFECTS = "_defects"
"""Ends the name of the picture that shows a scan's detections one by one."""
COLUMNS = ("image", "verdict", "class", "type", "confidence", "x1", "y1", "x2", "y2", "longest_mm", "serial")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `predict` that are about boards."""
    parser.add_argument(
        "--threshold", type=float, help="report detections from this confidence (default: the frozen one)"
    )
    parser.add_argument("--roi", type=Path, help="inspect only here: a mask image (white = inspect) or regions as JSON")
    parser.add_argument(
        "--ignore", type=Path, help="ignore defects here: a mask image (white = ignore) or regions as JSON"
    )
    parser.add_argument(
        "--px-per-mm", type=float, default=float(PX_PER_MM), help="resolution of the images (default 48)"
    )
    parser.add_argument(
        "--serials", type=Path, help='serial numbers of the boards: CSV with the columns "image" and "serial"'
    )
    parser.add_argument(
        "--audit", type=Path, help="append every verdict to this log, whose entries carry the hash of the one before"
    )
    parser.add_argument(
        "--gated",
        action="store_true",
        help="look only where board and template differ: faster on boards with few defects",
    )
    parser.add_argument("--no-pictures", action="store_true", help="leave out the overlay pictures")


def predict(
    module: nn.Module, inputs: Sequence[str], meta: Mapping[str, Any], out: Path, options: argparse.Namespace
) -> str:
    """Inspect a pair, a folder or a list; leaves results.json, results.csv and overlays/ in `out`.

    Every board is accepted or rejected at the threshold. All inputs are checked before the first board
    is inspected; a board whose image turns out to be broken stops the run with what was done so far kept.
    """
    pairs = _named_apart(find_pairs(*inputs))
    threshold = float(meta["threshold"]) if options.threshold is None else float(options.threshold)
    if not 0 < threshold <= 1:
        raise InputError(f"--threshold {threshold}: expected a confidence above 0 and up to 1")
    if not 4 <= options.px_per_mm <= 1000:
        raise InputError(f"--px-per-mm {options.px_per_mm}: expected 4 to 1000 pixels a millimetre")
    roi, ignore = (Regions.read(path) if path else None for path in (options.roi, options.ignore))
    scale = PX_PER_MM / options.px_per_mm
    if abs(scale - 1) <= SAME:
        scale = 1.0
    if options.gated:
        origin = origin_of(module)
        if origin is None:
            raise InputError("--gated: needs an exported artifact; give one with --artifact")
        module = conditional(origin.artifact, origin.variant, origin.threads)
    serials = read_serials(options.serials, [pair.image_id for pair in pairs]) if options.serials else {}
    log = AuditLog(options.audit) if options.audit else None
    alarm = DriftAlarm(meta["drift"]) if "drift" in meta else None
    tiles = 0
    for pair in pairs:
        width, height = image_size(pair.test)
        tiles += tile_count(height, width, scale)
        for regions in (roi, ignore):
            if regions is not None:
                regions.check((height, width))
    out.mkdir(parents=True, exist_ok=True)
    boards: list[dict[str, Any]] = []
    try:
        with progress("inspecting", tiles) as bar:
            for pair in pairs:
                on_tile = partial(bar.advance, pair.image_id)
                board = _board(module, pair, threshold, scale, roi, ignore, options, out, on_tile, alarm)
                board["serial"] = serials.get(pair.image_id)
                if log is not None:
                    log.add(_audited(board, pair, module, threshold))
                boards.append(board)
    finally:
        _write(out, boards, threshold, log)
    rejected = sum(b["verdict"] == "reject" for b in boards)
    lines = [
        f"{len(boards)} board(s): {len(boards) - rejected} accepted, {rejected} rejected at threshold {threshold:.3f}"
    ]
    for board in boards[:20]:
        kinds = ", ".join(f"{d['class']} {d['confidence']:.2f}" for d in board["detections"][:6])
        more = f" and {len(board['detections']) - 6} more" if len(board["detections"]) > 6 else ""
        lines.append(f"  {board['image']}: {board['verdict']}{' - ' + kinds + more if kinds else ''}")
        lines += [f"    warning: {text}" for text in board["warnings"]]
    return "\n".join([*lines, f"results in {out}"])


def _named_apart(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs, where a list names images of one name in several folders with _2, _3 ... added, one picture each."""
    taken: set[str] = set()
    named = []
    for pair in pairs:
        name, number = pair.image_id, 1
        while {name, name + DEFECTS} & taken:
            number += 1
            name = f"{pair.image_id}_{number}"
        taken |= {name, name + DEFECTS}
        named.append(replace(pair, image_id=name))
    return named


def _board(
    module: nn.Module,
    pair: Pair,
    threshold: float,
    scale: float,
    roi: Regions | None,
    ignore: Regions | None,
    options: argparse.Namespace,
    out: Path,
    on_tile: Callable[[], None],
    alarm: DriftAlarm | None,
) -> dict[str, Any]:
    width, height = image_size(pair.test)
    large = scale == 1 and width * height > PACKED
    test, template = pair.load_packed() if large else pair.load()
    started = time.perf_counter()
    inspection = inspect(module, test, template, floor=min(FLOOR, threshold), scale=scale, on_tile=on_tile)
    seconds = time.perf_counter() - started
    detections = inspection.detections[inspection.detections[:, 4] >= threshold]
    for regions, inside in ((roi, True), (ignore, False)):
        if regions is not None:
            detections = detections[regions.cover(detections, test.shape) == inside]
    if not options.no_pictures:
        _pictures(out / "overlays", pair.image_id, test, template, detections, threshold)
    worst = max(inspection.registrations, key=lambda r: r.residual)
    warnings = []
    if worst.residual > POOR_MATCH:
        warnings.append(
            f"{worst.residual:.0%} of the pixels of a tile differ from {pair.template.name} after registration; "
            "is it the template of this board, and within 16 px of it?"
        )
    elif alarm is not None and len(inspection.registrations) == 1 and scale == 1:
        if not isinstance(test, Packed) and not isinstance(template, Packed):  # one tile, so not packed
            warnings += alarm.look(statistics(test, template, worst))
    return {
        "image": pair.image_id, "test": str(pair.test), "template": str(pair.template), "size": list(test.shape[::-1]),
        "verdict": "reject" if len(detections) else "accept", "seconds": round(seconds, 4), "warnings": warnings,
        "registration": {
            "dx": worst.dx, "dy": worst.dy, "residual": round(worst.residual, 5), "by_tiles": worst.warped,
        },
        "detections": [_detection(row, options.px_per_mm) for row in detections],
    }  # fmt: skip


def _audited(board: Mapping[str, Any], pair: Pair, module: nn.Module, threshold: float) -> dict[str, Any]:
    """What the audit log keeps of a board: who said what, of which pictures."""
    origin = origin_of(module)
    return {
        "serial": board["serial"], "image": board["image"], "verdict": board["verdict"], "threshold": threshold,
        "defects": [{"class": d["class"], "confidence": d["confidence"], "box": d["box"]} for d in board["detections"]],
        "test_sha256": hash_of(pair.test), "template_sha256": hash_of(pair.template),
        "artifact_sha256": origin.artifact.sha256 if origin is not None else None,
        "variant": origin.variant if origin is not None else None,
    }  # fmt: skip


def read_serials(path: Path, images: Sequence[str]) -> dict[str, str]:
    """Serial numbers by image; InputError naming file and line for what is no such table, or of no such image."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as CSV ({error}); mend the file or its path") from error
    found: dict[str, str] = {}
    for number, row in enumerate(rows, 2):
        image, serial = (row.get("image") or "").strip(), (row.get("serial") or "").strip()
        if not image or not serial:
            raise InputError(f'{path}:{number}: expected the columns "image" and "serial", both filled in')
        if image not in images:
            raise InputError(f"{path}:{number}: no image {image!r} among the {len(images)} inputs")
        if image in found:
            raise InputError(f"{path}:{number}: a second serial for image {image!r}")
        found[image] = serial
    if missing := [image for image in images if image not in found]:
        raise InputError(f"{path}: no serial for image {missing[0]!r}; add a line for it")
    return found


def _detection(row: np.ndarray, px_per_mm: float) -> dict[str, Any]:
    x1, y1, x2, y2, confidence, label = (float(v) for v in row)
    return {
        "class": CLASSES[int(label)], "type": int(label) + 1, "confidence": round(confidence, 4),
        "box": [round(v, 1) for v in (x1, y1, x2, y2)], "longest_mm": round(max(x2 - x1, y2 - y1) / px_per_mm, 3),
    }  # fmt: skip


def _pictures(
    folder: Path, name: str, test: Grey | Packed, template: Grey | Packed, detections: np.ndarray, threshold: float
) -> None:
    """The overlay; a large scan is shown reduced, with a sheet of its detections at full size beside it.

    Boxes are drawn after the reduction so that they stay visible.
    """
    path = folder / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    factor = LONGEST_PICTURE / max(test.shape)
    if factor >= 1 and not isinstance(test, Packed):
        _save(path, overlay(test, detections, threshold))
        return
    width, height = (max(1, round(side * factor)) for side in test.shape[::-1])
    if isinstance(test, Packed):
        reduced = test.reduced((width, height))
    else:
        reduced = np.asarray(cv2.resize(test, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
    shown = detections.copy()
    shown[:, :4] *= factor
    _save(path, overlay(reduced, shown, threshold))
    if len(detections):
        _save(folder / f"{name}{DEFECTS}.png", contact_sheet(test, template, detections))


def _save(path: Path, picture: np.ndarray) -> None:
    with writing(path):
        path.write_bytes(png(picture))


def _write(out: Path, boards: list[dict[str, Any]], threshold: float, log: AuditLog | None) -> None:
    by_serial: dict[str, list[str]] = {}
    for board in boards:
        if board["serial"] is not None:
            by_serial.setdefault(board["serial"], []).append(board["image"])
    whole: dict[str, Any] = {"threshold": threshold, "boards": boards}
    if by_serial:
        rejected = {b["serial"] for b in boards if b["verdict"] == "reject"}
        whole["by_serial"] = {
            serial: {"verdict": "reject" if serial in rejected else "accept", "images": images}
            for serial, images in by_serial.items()
        }
    if log is not None:
        whole["audit"] = {"log": str(log.path), "entries": log.count, "last_hash": log.last}
    write_text(out / "results.json", json.dumps(whole, indent=1) + "\n")
    with writing(out / "results.csv"), (out / "results.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for board in boards:
            for d in board["detections"]:
                table.writerow(
                    [
                        board["image"],
                        board["verdict"],
                        d["class"],
                        d["type"],
                        d["confidence"],
                        *d["box"],
                        d["longest_mm"],
                        board["serial"],
                    ]
                )
            if not board["detections"]:
                table.writerow([board["image"], board["verdict"], *[""] * (len(COLUMNS) - 3), board["serial"]])


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
            mask = read_image(path)
            if mask.max() < WHITE:
                raise InputError(
                    f"{path}: no white in this mask, its brightest pixel is {mask.max()}; "
                    "paint the region 255 or leave the option out"
                )
            return Regions(path, mask, ())
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read as JSON ({error}); mend the file or its path") from error
        entries = entries if isinstance(entries, list) else [entries]
        if not entries:
            raise InputError(f"{path}: no region in it; add one or leave the option out")
        return Regions(path, None, tuple(_region(entry, f"{path}: region {n}") for n, entry in enumerate(entries)))

    def check(self, shape: tuple[int, ...]) -> None:
        """InputError if a mask does not have the (height, width) of an image."""
        if self.mask is not None and self.mask.shape != tuple(shape):
            found, expected = (f"{size[1]} x {size[0]}" for size in (self.mask.shape, shape))
            raise InputError(f"{self.path}: mask of {found} on an image of {expected}; give a mask of the image's size")

    def cover(self, detections: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Whether the centre of each detection (n, 6) lies in a region that is about its class, (n,)."""
        centres = (detections[:, :2] + detections[:, 2:4]) / 2
        if self.mask is not None:
            x, y = (centres[:, i].astype(int).clip(0, shape[1 - i] - 1) for i in (0, 1))
            return np.asarray(self.mask[y, x] >= WHITE)
        inside = np.zeros(len(detections), bool)
        for corners, labels in self.polygons:
            for i, (x, y) in enumerate(centres):
                hit = cv2.pointPolygonTest(corners, (float(x), float(y)), False) >= 0
                inside[i] |= hit and int(detections[i, 5]) in labels
        return inside


def _region(entry: Any, where: str) -> tuple[np.ndarray, frozenset[int]]:
    """Corners (n, 2) in pixels and classes of a region in JSON; InputError says `where` something is wrong."""
    corners = entry.get("polygon") if isinstance(entry, dict) else None
    if not (isinstance(corners, list) and len(corners) >= 3 and all(_is_point(corner) for corner in corners)):
        raise InputError(f'{where}: expected "polygon" with at least three [x, y] corners in pixels')
    names = entry.get("classes", list(CLASSES))
    if not isinstance(names, list) or not names:
        raise InputError(f'{where}: expected "classes" to be a list of some of {", ".join(CLASSES)}')
    for name in names:
        if name not in CLASSES:
            raise InputError(f"{where}: class {name!r} is not known; known are {', '.join(CLASSES)}")
    return np.array(corners, np.float32), frozenset(CLASSES.index(name) for name in names)


def _is_point(corner: Any) -> bool:
    return (
        isinstance(corner, list) and len(corner) == 2 and all(type(v) in (int, float) and abs(v) < 1e6 for v in corner)
    )
