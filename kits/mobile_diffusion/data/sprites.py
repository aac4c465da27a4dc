"""Sprites of the scenes: a shaded, antialiased shape with a soft shadow, as one multiply and one add."""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray

SHAPES = ("circle", "square", "triangle", "cross")
# Far apart in hue, or in lightness where the hue is near; none grey, so that shadows and plain grounds never collide.
PALETTE = {
    "red": (216, 30, 40),
    "orange": (244, 126, 22),
    "yellow": (250, 214, 40),
    "green": (34, 150, 62),
    "cyan": (30, 200, 216),
    "blue": (36, 78, 220),
    "purple": (128, 46, 176),
    "pink": (246, 112, 184),
}
COLOURS = tuple(PALETTE)
_SUPERSAMPLE = 8
_SHADOW = 0.30  # how much light the shadow takes at its darkest
_SHADOW_OFFSET = 1.5  # pixels to the right and down
_SHADOW_SIGMA = 1.4

# Half width and half height of a shape over its radius, chosen so that all look about as large as the circle.
_HALF_BOX = {"circle": (1.0, 1.0), "square": (0.89, 0.89), "triangle": (1.15, 1.0), "cross": (1.04, 1.04)}
_ARM = 0.37  # half width of the cross's arms over the radius
# Area over radius squared, by which a judge finds the radius again.
AREAS = {"circle": np.pi, "square": 4 * 0.89**2, "triangle": 2 * 1.15, "cross": 4 * _ARM * (2 * 1.04 - _ARM)}


def half_box(shape: str, radius: float) -> tuple[float, float]:
    """Half the width and half the height of a shape's box, in pixels."""
    width, height = _HALF_BOX[shape]
    return width * radius, height * radius


def cover(shape: str, radius: float, reach: int) -> NDArray[np.float32]:
    """The share of each pixel that a shape covers, (2 reach, 2 reach), the centre of its box in the middle."""
    fine = (np.arange(2 * reach * _SUPERSAMPLE) + 0.5) / _SUPERSAMPLE - reach
    x, y = np.meshgrid(fine, fine)
    blocks = (2 * reach, _SUPERSAMPLE, 2 * reach, _SUPERSAMPLE)
    return _inside(shape, x / radius, y / radius).reshape(blocks).mean((1, 3)).astype(np.float32)


@cache
def sprite(shape: str, colour: str, radius: float) -> tuple[NDArray[np.float32], NDArray[np.float32], int]:
    """What stays of the ground (h, h, 1), what is added to it (h, h, 3) in 0..255, and half the side h in pixels."""
    reach = int(np.ceil(1.15 * radius + _SHADOW_OFFSET + 3 * _SHADOW_SIGMA))
    alpha = cover(shape, radius, reach)

    shift = np.array([[1, 0, _SHADOW_OFFSET], [0, 1, _SHADOW_OFFSET]], np.float32)
    shadow = cv2.warpAffine(alpha, shift, (2 * reach, 2 * reach), flags=cv2.INTER_LINEAR)
    shadow = _SHADOW * cv2.GaussianBlur(shadow, (0, 0), _SHADOW_SIGMA)

    centres = np.arange(2 * reach) + 0.5 - reach
    across, down = np.meshgrid(centres / radius, centres / radius)
    # Light from the upper left: brighter there by a tenth, darker by a tenth opposite; the hue stays what it is.
    light = 1 - 0.09 * np.clip(across + 1.4 * down, -1.6, 1.6)
    shaded = np.clip(np.array(PALETTE[colour]) * light[..., None], 0, 255)
    paint = (alpha[..., None] * shaded).astype(np.float32)
    keep = ((1 - shadow) * (1 - alpha)).astype(np.float32)[..., None]
    return keep, paint, reach


def _inside(shape: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 where a point, in units of the radius with y downwards, is inside the shape."""
    width, height = _HALF_BOX[shape]
    if shape == "circle":
        inside = x**2 + y**2 <= 1
    elif shape == "square":
        inside = np.maximum(abs(x), abs(y)) <= width
    elif shape == "triangle":
        inside = (y <= height) & (abs(x) * 2 * height <= width * (y + height))
    else:
        inside = (np.minimum(abs(x), abs(y)) <= _ARM) & (np.maximum(abs(x), abs(y)) <= width)
    return inside.astype(np.float64)
