"""From a pair of images to the network's input: registration of the template and signed differences.

Shapes: H rows, W columns; images are uint8 grey, copper black (0) on bare board white (255).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Grey = NDArray[np.uint8]

LEVEL = 128
"""Grey level between copper (below) and bare board."""
MAX_SHIFT = 16
"""Largest shift in pixels that the search covers in each direction."""
_TILE = 160
_LOCAL = 3
_KERNEL = np.ones((3, 3), np.uint8)
_STRAIGHT, _DIAGONAL = ((-1, 0), (1, 0), (0, -1), (0, 1)), ((-1, -1), (1, -1), (-1, 1), (1, 1))


@dataclass(frozen=True)
class Registration:
    """Where the template lies: shift (dx, dy) in pixels, and the share of pixels that differ afterwards.

    `warped` tells that tiles moved apart from one another, as for a slight stretch or turn.
    """

    dx: int
    dy: int
    residual: float
    warped: bool


def level(image: Grey) -> int:
    """The grey level up to which pixels are copper: Otsu's for a grey photograph, 127 for a binary image.

    Found once for a whole image: a tile of a scan that shows bare board alone has no level of its own. Of
    more than 4 million pixels a regular sample is looked at.
    """
    return level_of(lambda step: image[::step, ::step], image.size)


def level_of(every: Callable[[int], Grey], size: int) -> int:
    """The same of an image of `size` pixels, of which `every(n)` gives each n-th row and column."""
    sample = every(8)
    if np.count_nonzero((sample > 40) & (sample < 215)) <= 0.2 * sample.size:
        return LEVEL - 1
    sample = np.ascontiguousarray(every(max(1, round((size / 4e6) ** 0.5))))
    return int(cv2.threshold(sample, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)[0])


def binarise(image: Grey, highest: int | None = None) -> Grey:
    """0 for copper (grey levels up to `highest`, by default `level(image)`), 255 for bare board."""
    highest = level(image) if highest is None else highest
    return np.asarray(cv2.threshold(image, highest, 255, cv2.THRESH_BINARY)[1], np.uint8)


def register(test: Grey, template: Grey) -> tuple[Grey, Registration]:
    """The binary template moved onto the binary test image (H, W), and how far it moved.

    Global translation first (a coarse search at a quarter of the size where little agrees, then pixel
    by pixel), then each tile of about 160 px by up to 3 px of its own, which follows a slight stretch
    or turn. Pixels that the moved template does not cover are taken from the test image, so that the
    seam shows no difference.
    """
    best, cost = _climb(test, template, (0, 0), MAX_SHIFT)
    if cost > 0.02 and min(test.shape) >= 8 * MAX_SHIFT:
        coarse = _climb(test, template, _coarse(test, template), MAX_SHIFT)
        best, cost = min((best, cost), coarse, key=lambda found: found[1])
    moved = _shift(test, template, *best)
    warped = False
    if cost > 0.004 and min(test.shape) >= 2 * _TILE:
        warped = _by_tiles(test, template, best, moved)
    return moved, Registration(*best, _differing(test, moved), warped)


def differences(test: Grey, template: Grey) -> tuple[Grey, Grey]:
    """Copper gained and copper lost against the template, with one pixel of tolerance: 255 where it is so."""
    gain, loss = np.empty((2, *test.shape), np.uint8)
    _differences(test, template, gain, loss)
    return gain, loss


def _differences(test: Grey, template: Grey, gain: Grey, loss: Grey) -> None:
    """The same, into two arrays that are there: making them takes as long as filling them."""
    cv2.erode(template, _KERNEL, dst=gain)
    cv2.bitwise_and(gain, cv2.bitwise_not(test, dst=loss), dst=gain)
    cv2.dilate(template, _KERNEL, dst=loss)
    cv2.bitwise_and(test, cv2.bitwise_not(loss, dst=loss), dst=loss)


def stack(test: Grey, template: Grey) -> Grey:
    """The network's input (4, H, W) uint8: test, registered template, copper gained, copper lost."""
    planes = np.empty((4, *test.shape), np.uint8)
    planes[0], planes[1] = test, template
    _differences(planes[0], planes[1], planes[2], planes[3])
    return planes


def _differing(test: Grey, template: Grey) -> float:
    return cv2.countNonZero(cv2.bitwise_xor(test, template)) / test.size


def _climb(test: Grey, template: Grey, start: tuple[int, int], reach: int) -> tuple[tuple[int, int], float]:
    """Walk from a shift to the neighbouring one with fewer differing pixels until there is none.

    All shifts are compared on the same pixels, those that every shift covers: else one that pushes a defect
    over the rim would win. A quarter of the rows is counted, which ranks shifts as well as all of them do.
    """
    known: dict[tuple[int, int], float] = {}
    reach = min(reach, min(test.shape) // 4)  # half of a small image goes on being compared
    height, width = test.shape
    bottom, right = height - reach, width - reach
    inner = test[reach:bottom:4, reach:right]

    def cost(dx: int, dy: int) -> float:
        found = known.get((dx, dy))
        if found is None:
            under = template[reach - dy : bottom - dy : 4, reach - dx : right - dx]
            found = known[dx, dy] = cv2.norm(inner, under, cv2.NORM_L1)
        return found

    best, least = start, cost(*start)
    while least:
        (x, y), lower = best, least
        for moves in (_STRAIGHT, _DIAGONAL):
            for dx, dy in moves:
                there = x + dx, y + dy
                if abs(there[0]) <= reach and abs(there[1]) <= reach and (found := cost(*there)) < lower:
                    best, lower = there, found
            if lower < least:
                break
        if lower == least:
            break
        least = lower
    return best, least / (255 * inner.size)


def _coarse(test: Grey, template: Grey) -> tuple[int, int]:
    """The best shift on a grid of four pixels."""
    reach = MAX_SHIFT // 4
    small = cv2.resize(test, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
    middle = cv2.resize(template, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)[reach:-reach, reach:-reach]
    _, _, (x, y), _ = cv2.minMaxLoc(cv2.matchTemplate(small, np.ascontiguousarray(middle), cv2.TM_SQDIFF))
    return 4 * (x - reach), 4 * (y - reach)


def _shift(test: Grey, template: Grey, dx: int, dy: int) -> Grey:
    moved = test.copy()
    height, width = test.shape
    covered = template[max(0, -dy) : height + min(0, -dy), max(0, -dx) : width + min(0, -dx)]
    moved[max(0, dy) : height + min(0, dy), max(0, dx) : width + min(0, dx)] = covered
    return moved


def _by_tiles(test: Grey, template: Grey, shift: tuple[int, int], moved: Grey) -> bool:
    """Move each tile of `moved` (changed in place) by its own best local shift; True when tiles moved.

    A stretch or turn moves many tiles. One that would move alone has a defect that looks like an edge moved.
    """
    height, width = test.shape
    rows, columns = height // _TILE, width // _TILE
    moves = []
    for i in range(rows):
        for j in range(columns):
            here = np.s_[
                i * height // rows : (i + 1) * height // rows, j * width // columns : (j + 1) * width // columns
            ]
            (dx, dy), _ = _climb(test[here], moved[here], (0, 0), _LOCAL)
            if dx or dy:
                moves.append((here, dx, dy))
    if len(moves) < 2:
        return False
    for (down, across), dx, dy in moves:
        x, y = across.start - shift[0] - dx, down.start - shift[1] - dy  # where this tile comes from in the template
        tile = moved[down, across]
        y1, y2 = max(0, -y), min(tile.shape[0], height - y)
        x1, x2 = max(0, -x), min(tile.shape[1], width - x)
        tile[:] = test[down, across]  # stays where the template does not reach
        tile[y1:y2, x1:x2] = template[y + y1 : y + y2, x + x1 : x + x2]
    return True
