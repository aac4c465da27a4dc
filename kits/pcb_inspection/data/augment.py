"""Training crops: registered pairs in memory, cut and varied in ways that a line and an etching bath vary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from core.progress import progress
from kits.pcb_inspection.data.boards import FAMILIES, draw_board, style
from kits.pcb_inspection.data.deeppcb import Pair, read_image
from kits.pcb_inspection.data.defects import add_defects
from kits.pcb_inspection.model.network import DUAL
from kits.pcb_inspection.model.pair import binarise, register

Grey = NDArray[np.uint8]

BLEMISHED = 0.2
"""Share of the crops whose template has a flaw that the board has not: a difference, and no defect."""


@dataclass(frozen=True)
class Ready:
    """A pair that is decoded, binarised and registered: test and template (H, W), boxes (n, 4), labels (n,)."""

    image_id: str
    group: str
    test: Grey
    template: Grey
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]


def prepare(pairs: Sequence[Pair]) -> list[Ready]:
    """Decode and register pairs once, so that an epoch only cuts crops (0.8 MB of memory a pair of 640 px)."""
    ready = []
    with progress("reading pairs", len(pairs)) as bar:
        for pair in pairs:
            test, template = _registered(pair.test, pair.template)
            ready.append(Ready(pair.image_id, pair.group, test, template, pair.boxes, pair.labels))
            bar.advance()
    return ready


@lru_cache(maxsize=2048)
def _registered(test: Path, template: Path) -> tuple[Grey, Grey]:
    """The binary test image and the registered template of two files."""
    board, golden = binarise(read_image(test)), binarise(read_image(template))
    return board, register(board, golden)[0]


def drawn(count: int, seed: int, *more: int) -> list[Ready]:
    """Clean boards of the generator, no two of one style, so that training sees more layouts than a data set has."""
    rng = np.random.default_rng((seed, count, *more))
    families, nothing = list(FAMILIES), (np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    boards = []
    with progress("drawing boards", count) as bar:
        for index in range(count):
            copper = draw_board(style(families[index % len(families)], rng), rng)
            board = np.where(copper > 0, 0, 255).astype(np.uint8)
            boards.append(Ready(f"drawn{index}", "drawn", board, board, *nothing))
            bar.advance()
    return boards


@dataclass(frozen=True)
class Crop:
    """One training example: test and template (size, size), boxes (n, 4) in its pixels, labels (n,).

    `dual` says that copper and board have changed places.
    """

    test: Grey
    template: Grey
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    dual: bool = False


def crops(ready: Sequence[Ready], size: int, each: int, seed: int, epoch: int) -> Iterator[Crop]:
    """`each` crops of every pair in random order, varied; the same for the same seed and epoch."""
    rng = np.random.default_rng((seed, epoch))
    for index in rng.permutation(np.repeat(np.arange(len(ready)), each)):
        yield _vary(_cut(ready[index], size, rng), not len(ready[index].boxes), rng)


def _cut(pair: Ready, size: int, rng: np.random.Generator) -> Crop:
    """A window that mostly holds a defect, taken at 0.85 to 1.2 times the scale in a third of the cases."""
    scale = float(rng.uniform(0.85, 1.2)) if rng.random() < 0.35 else 1.0
    height, width = pair.test.shape
    window = min(round(size / scale), height, width)
    if len(pair.boxes) and rng.random() < 0.7:
        x1, y1, x2, y2 = pair.boxes[rng.integers(len(pair.boxes))]
        left = int(rng.integers(max(0, int(x2) - window), max(1, int(x1) + 1))) if x2 - x1 < window else int(x1)
        top = int(rng.integers(max(0, int(y2) - window), max(1, int(y1) + 1))) if y2 - y1 < window else int(y1)
    else:
        left, top = int(rng.integers(0, width - window + 1)), int(rng.integers(0, height - window + 1))
    left, top = min(left, width - window), min(top, height - window)
    here = np.s_[top : top + window, left : left + window]
    # what registration leaves is imitated by a window of the template that lies a little off
    dx, dy = rng.integers(-2, 3, 2) if rng.random() < 0.35 else (0, 0)
    there_top, there_left = int(np.clip(top + dy, 0, height - window)), int(np.clip(left + dx, 0, width - window))
    test = pair.test[here].copy()
    template = pair.template[there_top : there_top + window, there_left : there_left + window]
    boxes, labels = _visible(pair, left, top, window, test, pair.template[here])
    if window != size:
        test, template = (_resize(image, size) for image in (test, template))
        boxes = (boxes * (size / window)).clip(0, size)
    return Crop(test, template, boxes.astype(np.float32), labels)


def _visible(
    pair: Ready, left: int, top: int, window: int, test: Grey, clean: Grey
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The boxes in a window, clipped; a defect with less than 60 % of its box inside is erased from `test`."""
    boxes = pair.boxes - np.array([left, top, left, top], np.float32)
    clipped = boxes.clip(0, window)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    share = (clipped[:, 2:] - clipped[:, :2]).prod(1) / np.maximum(area, 1)
    for x1, y1, x2, y2 in clipped[(share > 0) & (share < 0.6)].astype(int):
        test[y1:y2, x1:x2] = clean[y1:y2, x1:x2]
    keep = share >= 0.6
    return clipped[keep], pair.labels[keep]


def _resize(image: Grey, size: int) -> Grey:
    sized = cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)
    return cv2.threshold(sized, 127, 255, cv2.THRESH_BINARY)[1].astype(np.uint8)


def _vary(crop: Crop, bare: bool, rng: np.random.Generator) -> Crop:
    """A crop varied; `bare` says that it comes from a board without any annotated defect, which gets some drawn."""
    test, template, boxes, labels = crop.test, crop.template, crop.boxes, crop.labels
    drawn = rng.random()
    fresh = drawn < 0.05 or drawn < (0.9 if bare else 0.25)
    if drawn < 0.05:  # a good board: the template against itself, edges apart
        test, boxes, labels = template, boxes[:0], labels[:0]
    elif fresh:  # new defects on the clean template, so that no two epochs see the same
        test, boxes, labels = add_defects(template, rng, int(rng.integers(1, 5)))
    if rng.random() < BLEMISHED:
        template = _blemished(template, boxes, rng)
    test, template = _edges(test, rng, 0.7 if fresh else 0.3), _edges(template, rng, 0.15)
    if dual := rng.random() < 0.4:
        test, template, labels = 255 - test, 255 - template, DUAL[labels]
    size = test.shape[0]
    if rng.random() < 0.5:
        test, template = test[:, ::-1], template[:, ::-1]
        boxes = np.stack((size - boxes[:, 2], boxes[:, 1], size - boxes[:, 0], boxes[:, 3]), 1)
    if rng.random() < 0.5:
        test, template = test[::-1], template[::-1]
        boxes = np.stack((boxes[:, 0], size - boxes[:, 3], boxes[:, 2], size - boxes[:, 1]), 1)
    if rng.random() < 0.5:
        test, template, boxes = test.T, template.T, boxes[:, [1, 0, 3, 2]]
    return Crop(np.ascontiguousarray(test), np.ascontiguousarray(template), boxes, labels, dual)


def _blemished(template: Grey, boxes: NDArray[np.float32], rng: np.random.Generator) -> Grey:
    """A template with one or two flaws of its own away from the boxes (n, 4): the board is good there."""
    return add_defects(template, rng, int(rng.integers(1, 3)), kinds=("pin-hole", "mousebite"), avoid=boxes)[0]


def _edges(image: Grey, rng: np.random.Generator, chance: float) -> Grey:
    """Ragged or moved edges: over- and under-etching by a pixel, blur and noise before the threshold."""
    if rng.random() >= chance:
        return image
    variants: list[Callable[[Grey], Grey]] = [_rough(rng), _rough(rng), _etched(rng)]
    return variants[rng.integers(len(variants))](image)


def _rough(rng: np.random.Generator) -> Callable[[Grey], Grey]:
    sigma, level, grain = rng.uniform(0.6, 1.3), rng.uniform(95, 160), rng.uniform(5, 40)

    def apply(image: Grey) -> Grey:
        soft = cv2.GaussianBlur(image, (0, 0), sigma)
        noise = np.empty(image.shape, np.int16)
        cv2.setRNGSeed(int(rng.integers(1 << 30)))
        cv2.randn(noise, np.zeros(1), np.full(1, grain))
        return np.where(soft + noise >= level, 255, 0).astype(np.uint8)

    return apply


def _etched(rng: np.random.Generator) -> Callable[[Grey], Grey]:
    change = (cv2.erode, cv2.dilate)[rng.integers(2)]
    kernel = np.ones((2, 2) if rng.random() < 0.7 else (3, 3), np.uint8)
    return lambda image: change(image, kernel).astype(np.uint8)
