"""A dark sheet to draw on: pixels, lines below a pixel, translucent areas, and text that is set last."""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from kits.bev_perception.data.classes import CLASSES

Picture = NDArray[np.uint8]
Colour = tuple[int, int, int]

GROUND: Colour = (17, 20, 26)
PANEL: Colour = (27, 31, 39)
LINE: Colour = (62, 70, 84)
DIM: Colour = (140, 150, 166)
INK: Colour = (232, 236, 242)
WARN: Colour = (255, 190, 92)
BAD: Colour = (255, 107, 107)
TRUTH: Colour = (176, 255, 184)
COLOURS: dict[str, Colour] = {
    "car": (255, 176, 32),
    "truck": (255, 112, 56),
    "construction_vehicle": (205, 158, 108),
    "bus": (255, 82, 140),
    "trailer": (190, 136, 255),
    "barrier": (168, 180, 196),
    "motorcycle": (255, 84, 84),
    "bicycle": (240, 120, 255),
    "pedestrian": (74, 178, 255),
    "traffic_cone": (20, 214, 200),
}
"""One a class, told apart on dark ground and from the truth's green."""
PALETTE = tuple(COLOURS[name] for name in CLASSES)
SUBPIXEL = 4  # bits of a coordinate that OpenCV takes below a pixel


class Paper:
    """A picture (H, W, 3) RGB in the making; `finished` sets the text."""

    def __init__(self, width: int, height: int) -> None:
        self.pixels: Picture = np.full((height, width, 3), GROUND, np.uint8)
        self._words: list[tuple[tuple[float, float], str, int, Colour, str]] = []

    def area(self, x: int, y: int, width: int, height: int) -> Picture:
        """A part of the pixels, to draw on."""
        return self.pixels[y : y + height, x : x + width]

    def text(self, x: float, y: float, words: str, size: int = 15, colour: Colour = INK, anchor: str = "ls") -> float:
        """Words at a point that `anchor` explains as Pillow does; returns their width."""
        self._words.append(((x, y), words, size, colour, anchor))
        return width_of(words, size)

    def plate(self, x: int, y: int, width: int, height: int, colour: Colour, alpha: float) -> None:
        """A translucent rectangle under the text."""
        part = self.area(x, y, width, height)
        part[:] = np.round(part * (1 - alpha) + np.array(colour) * alpha)

    def finished(self) -> Picture:
        """The picture with its text."""
        image = Image.fromarray(self.pixels)
        draw = ImageDraw.Draw(image)
        for place, words, size, colour, anchor in self._words:
            draw.text(place, words, font=font(size), fill=colour, anchor=anchor)
        return np.array(image)


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, the same on every machine."""
    found = ImageFont.load_default(size)
    assert isinstance(found, ImageFont.FreeTypeFont)  # a size is given, and Pillow's wheels hold FreeType
    return found


def width_of(words: str, size: int) -> float:
    """Pixels that a line of text takes."""
    return float(font(size).getlength(words))


def shortened(words: str, size: int, width: float) -> str:
    """The words, or as much of them as has room."""
    if width_of(words, size) <= width:
        return words
    low, high = 0, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if width_of(words[:middle] + "...", size) <= width else (low, middle - 1)
    return words[:low].rstrip() + "..."


def line(pixels: Picture, a: NDArray[np.float64], b: NDArray[np.float64], colour: Colour, width: int = 1) -> None:
    """A smooth line between two points (x, y), its ends within some thousand pixels of the picture."""
    ends = [tuple(int(v) for v in np.round(p * (1 << SUBPIXEL))) for p in (a, b)]
    cv2.line(pixels, ends[0], ends[1], colour, width, cv2.LINE_AA, SUBPIXEL)


def outline(pixels: Picture, corners: NDArray[np.float64], colour: Colour, width: int = 1) -> None:
    """A closed smooth line through corners (n, 2)."""
    points = np.round(corners * (1 << SUBPIXEL)).astype(np.int32)
    cv2.polylines(pixels, [points], True, colour, width, cv2.LINE_AA, SUBPIXEL)


def fill(pixels: Picture, corners: NDArray[np.float64], colour: Colour, alpha: float) -> None:
    """A translucent convex area within corners (n, 2)."""
    low = np.floor(corners.min(axis=0)).astype(int).clip(0) - 1
    high = np.ceil(corners.max(axis=0)).astype(int) + 2
    x, y = int(max(0, low[0])), int(max(0, low[1]))
    part = pixels[y : max(y, int(high[1])), x : max(x, int(high[0]))]
    if not part.size:
        return
    over = np.ascontiguousarray(part)
    points = np.round((corners - [x, y]) * (1 << SUBPIXEL)).astype(np.int32)
    cv2.fillConvexPoly(over, points, colour, cv2.LINE_AA, SUBPIXEL)
    part[:] = cv2.addWeighted(np.ascontiguousarray(part), 1 - alpha, over, alpha, 0)
