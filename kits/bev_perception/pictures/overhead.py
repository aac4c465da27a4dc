"""The map from above: LiDAR points by height, rings of distance, the car itself, predictions and truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from kits.bev_perception.data.boxes import Boxes
from kits.bev_perception.data.geometry import Array, Pose
from kits.bev_perception.pictures.paper import (
    BAD,
    DIM,
    GROUND,
    LINE,
    PALETTE,
    TRUTH,
    Colour,
    Paper,
    Picture,
    fill,
    line,
    outline,
)

REACH = 54.0  # m from the LiDAR to the map's borders
SIGHT = 45.0  # m that the sight of a missing camera is drawn
RINGS = range(10, 51, 10)
HEIGHTS = (-0.5, 4.0)  # m above the ground between the first and the last colour
SHADES = np.array([(62, 76, 112), (58, 116, 146), (88, 160, 146), (176, 186, 124), (232, 206, 140)], np.float64)
BODY = np.array([(3.4, 0.62), (3.1, 0.87), (-0.75, 0.87), (-0.85, 0.7), (-0.85, -0.7), (-0.75, -0.87), (3.1, -0.87),
                 (3.4, -0.62)])  # fmt: skip
"""Outline of nuScenes' car in the ego frame, m: x forward from the middle of the rear axle, y left."""
SMALL = 6.0  # px from the middle to the front of a box that is drawn thin
TOP = [0, 1, 5, 4]  # corners of a box seen from above, the front first


def overhead(
    paper: Paper,
    place: tuple[int, int, int],
    points: NDArray[np.float32],
    sensor: Pose | None,
    predictions: Boxes,
    truth: Boxes,
    blind: Sequence[tuple[float, float, float, float]] = (),
) -> None:
    """The map at `place` (x, y, side), forward up. `points` (n, 3 or more) and boxes are in the LiDAR's frame.

    `sensor` takes that frame to the ego frame. `blind` are the sights of missing cameras: where they stand (x, y),
    their heading and half their angle, in radians.
    """
    x, y, side = place
    pixels = paper.area(x, y, side, side)
    pixels[:] = (12, 14, 19)
    scale = side / (2 * REACH)

    def at(xy: Array) -> Array:
        return np.stack([side / 2 + xy[..., 0] * scale, side / 2 - xy[..., 1] * scale], axis=-1)

    for px, py, heading, half in blind:
        turns = np.linspace(heading - half, heading + half, 24)
        arc = np.array([px, py]) + SIGHT * np.stack([np.cos(turns), np.sin(turns)], axis=1)
        fill(pixels, at(np.concatenate([[[px, py]], arc])), BAD, 0.16)
    _points(pixels, points, sensor, at)
    middle = (side << 3, side << 3)
    for ring in RINGS:
        colour = LINE if ring % 20 else tuple(v + 16 for v in LINE)
        cv2.circle(pixels, middle, round(ring * scale * 16), colour, 1, cv2.LINE_AA, 4)
    if sensor is not None:
        body = sensor.inverse.apply(np.concatenate([BODY, np.zeros((len(BODY), 1))], axis=1))
        fill(pixels, at(body), (255, 255, 255), 0.9)
        outline(pixels, at(body), (20, 22, 28))
    for i in np.argsort(predictions.scores):
        _box(pixels, at(predictions[[int(i)]].corners[0][TOP]), PALETTE[predictions.labels[i]], 0.35)
    for i in range(len(truth)):
        _box(pixels, at(truth[[i]].corners[0][TOP]), TRUTH, 0.0)
    for ring in RINGS:
        if ring % 20 == 0 or ring == RINGS[-1]:
            corner = np.array([0.7071, -0.7071]) * ring
            u, v = at(corner)
            paper.plate(x + int(u) + 1, y + int(v) + 1, 36, 18, GROUND, 0.7)
            paper.text(x + int(u) + 4, y + int(v) + 15, f"{ring} m", 13, DIM)
    cv2.rectangle(pixels, (0, 0), (side - 1, side - 1), LINE, 1)


def shades(heights: Array) -> Array:
    """(n,) m above the ground to colours (n, 3)."""
    place = (heights - HEIGHTS[0]) / (HEIGHTS[1] - HEIGHTS[0]) * (len(SHADES) - 1)
    return np.stack([np.interp(place, range(len(SHADES)), SHADES[:, c]) for c in range(3)], axis=1)


def _points(pixels: Picture, points: NDArray[np.float32], sensor: Pose | None, at: Callable[[Array], Array]) -> None:
    xyz = points[:, :3].astype(np.float64)
    heights = (sensor.apply(xyz) if sensor is not None else xyz)[:, 2]
    place = np.floor(at(xyz[:, :2])).astype(int)
    side = len(pixels)
    seen = ((place >= 0) & (place < side)).all(axis=1)
    place, heights = place[seen], heights[seen]
    order = np.argsort(heights, kind="stable")  # the highest point of a pixel is the one that is seen
    place, heights = place[order], heights[order]
    colours = shades(heights)
    for right, down in ((1, 1), (0, 1), (1, 0), (0, 0)):  # two pixels wide, its own pixel last
        near = np.minimum(place + [right, down], side - 1)
        pixels[near[:, 1], near[:, 0]] = colours


def _box(pixels: Picture, corners: Array, colour: Colour, alpha: float) -> None:
    """A box of corners (4, 2), its front first, with a line from its middle through its front; thin without `alpha`."""
    middle, front = corners.mean(axis=0), corners[:2].mean(axis=0)
    way = front - middle
    half = float(np.hypot(*way))
    width = 2 if alpha and half > SMALL else 1
    if alpha:
        fill(pixels, corners, colour, alpha)
    outline(pixels, corners, colour, width)
    line(pixels, middle, front + way / max(half, 1e-6) * (5 if half > SMALL else 2), colour, width)
