"""Inspect many annotated pairs: predictions, good boards for the false rejects, pictures for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from torch import nn

from core.evaluation.detection import box_iou
from core.progress import progress
from kits.pcb_inspection.data.deeppcb import CLASSES, Pair
from kits.pcb_inspection.matching import OFFICIAL_IOU
from kits.pcb_inspection.model.inspector import inspect
from kits.pcb_inspection.model.naming import Names
from kits.pcb_inspection.model.packed import Packed
from kits.pcb_inspection.model.pair import Grey

FOUND, MISSED, FALSE = (90, 160, 0), (0, 0, 220), (0, 150, 240)  # blue, green, red of OpenCV
SHOWN = 4
CROP, CROPS = 128, 48


@dataclass(frozen=True)
class GoodBoard(Pair):
    """A board without defects: a pair's template, seen once more a little shifted and with other edges."""

    def load(self) -> tuple[Grey, Grey]:
        """(test, template): the template as a second shot would show it, and itself."""
        template = super().load()[1]
        rng = np.random.default_rng([int(b) for b in self.image_id.encode()])
        shift = rng.uniform(-2, 2, 2)
        matrix = np.array([[1, 0, shift[0]], [0, 1, shift[1]]])
        moved = cv2.warpAffine(template, matrix, template.shape[::-1], borderMode=cv2.BORDER_REPLICATE)
        soft = np.asarray(cv2.GaussianBlur(moved, (0, 0), 1.0), np.float32)
        grain = cv2.GaussianBlur(rng.normal(0, 60, soft.shape).astype(np.float32), (0, 0), 0.8)
        return np.where(soft + grain >= 128 + rng.normal(0, 8), 255, 0).astype(np.uint8), template


def clean_boards(pairs: Sequence[Pair]) -> list[Pair]:
    """The templates of pairs as good boards, for the share of them that is rejected."""
    return [GoodBoard(p.image_id, p.group, p.test, p.template, p.boxes[:0], p.labels[:0]) for p in pairs]


def detect(module: nn.Module, pairs: Sequence[Pair], label: str, names: Names | None = None) -> dict[str, np.ndarray]:
    """Image id -> detections (n, 6) x1 y1 x2 y2 score label, each pair taken through the whole job.

    `names` are an artifact's own unless they are given.
    """
    found = {}
    with progress(label, len(pairs)) as bar:
        for pair in pairs:
            found[pair.image_id] = inspect(module, *pair.load(), names=names).detections
            bar.advance()
    return found


def overlay(test: Grey, detections: np.ndarray, threshold: float, boxes: np.ndarray | None = None) -> np.ndarray:
    """The tested image (H, W, 3) with detections at or above the threshold, named with class and confidence.

    With true `boxes` (m, 4) given, what was found is green, what was missed red, a false call orange.
    """
    picture = cv2.cvtColor(cv2.addWeighted(test, 0.35, np.full_like(test, 255), 0.65, 0), cv2.COLOR_GRAY2BGR)
    shown = detections[detections[:, 4] >= threshold]
    hit: np.ndarray = np.ones(len(shown), bool)
    if boxes is not None:
        over = box_iou(boxes, shown[:, :4]) > OFFICIAL_IOU
        hit = np.asarray(over.any(0))
        for box in boxes[~over.any(1)]:
            _frame(picture, box, "missed", MISSED)
    for row, true in zip(shown, hit, strict=True):
        _frame(picture, row[:4], f"{CLASSES[int(row[5])]} {row[4]:.2f}", FOUND if true else FALSE)
    return picture


def contact_sheet(test: Grey | Packed, template: Grey | Packed, detections: np.ndarray) -> np.ndarray:
    """The first CROPS detections (n, 6) of a scan at full size: test beside template, class and confidence below.

    A detection larger than a crop is reduced to fit; x and y are those in the scan.
    """
    cells = []
    for x1, y1, x2, y2, score, label in detections[:CROPS].tolist():
        half = max(CROP, x2 - x1 + 16, y2 - y1 + 16) / 2
        left, top = round((x1 + x2) / 2 - half), round((y1 + y2) / 2 - half)
        pair = [_crop(image, left, top, round(2 * half)) for image in (test, template)]
        factor = CROP / pair[0].shape[0]
        corners = [round((v - start) * factor) for v, start in ((x1, left), (y1, top), (x2, left), (y2, top))]
        sized = [cv2.resize(image, (CROP, CROP), interpolation=cv2.INTER_AREA) for image in pair]
        views = [cv2.cvtColor(cv2.addWeighted(v, 0.5, np.full_like(v, 255), 0.5, 0), cv2.COLOR_GRAY2BGR) for v in sized]
        cv2.rectangle(views[0], corners[:2], corners[2:], FOUND, 1)
        cell = np.full((CROP + 40, 2 * CROP + 12, 3), 255, np.uint8)
        cell[:CROP, : 2 * CROP + 4] = np.hstack((views[0], np.full((CROP, 4, 3), 255, np.uint8), views[1]))
        title = f"{CLASSES[int(label)]} {score:.2f}", f"x {x1:.0f} y {y1:.0f}"
        for line, text in enumerate(title):
            place = (2, CROP + 14 + 15 * line)
            cv2.putText(cell, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.42, (60, 60, 60), 1, cv2.LINE_AA)
        cells.append(cell)
    columns = min(4, len(cells))
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % columns)
    return np.vstack([np.hstack(cells[i : i + columns]) for i in range(0, len(cells), columns)])


def sheet(module: nn.Module, pairs: Sequence[Pair], threshold: float) -> list[dict[str, Any]]:
    """Some boards of different groups as pictures for the report."""
    by_group: dict[str, Pair] = {}
    for pair in pairs:
        by_group.setdefault(pair.group, pair)
    first = {p.image_id for p in by_group.values()}
    chosen = [*by_group.values(), *(p for p in pairs if p.image_id not in first)]
    pictures = []
    for pair in chosen[:SHOWN]:
        test, template = pair.load()
        detections = inspect(module, test, template).detections
        picture = overlay(test, detections, threshold, pair.boxes)
        title = f"{pair.group} {pair.image_id}: found green, missed red, false call orange"
        pictures.append({"title": title, "png": png(picture)})
    return pictures


def png(picture: np.ndarray) -> bytes:
    """A picture (H, W, 3) as PNG."""
    return bytes(cv2.imencode(".png", picture, [cv2.IMWRITE_PNG_COMPRESSION, 6])[1])


def _frame(picture: np.ndarray, box: np.ndarray, text: str, colour: tuple[int, int, int]) -> None:
    x1, y1, x2, y2 = (round(float(v)) for v in box)
    size = max(1, round(picture.shape[0] / 900))
    cv2.rectangle(picture, (x1, y1), (x2, y2), colour, 1 + size)
    font, scale = cv2.FONT_HERSHEY_SIMPLEX, 0.42 * size
    (width, height), _ = cv2.getTextSize(text, font, scale, size)
    left = min(x1, max(0, picture.shape[1] - width - 4))
    base = y1 - 4 if y1 > height + 8 else y2 + height + 6
    cv2.rectangle(picture, (left, base - height - 3), (left + width + 4, base + 3), (255, 255, 255), -1)
    cv2.putText(picture, text, (left + 2, base), font, scale, colour, size, cv2.LINE_AA)


def _crop(image: Grey | Packed, left: int, top: int, side: int) -> Grey:
    """A square part of an image (side, side), white where it reaches beyond the image."""
    part = np.full((side, side), 255, np.uint8)
    inside = image[max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)]
    y, x = max(0, -top), max(0, -left)
    part[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
    return part
