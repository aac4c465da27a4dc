"""Boxes in the picture of a camera, cut off where it ends and where they reach behind it."""

from __future__ import annotations

import cv2
import numpy as np

from kits.bev_perception.data.boxes import Boxes
from kits.bev_perception.data.classes import CLASSES
from kits.bev_perception.data.geometry import Array, pinhole
from kits.bev_perception.pictures.paper import (
    BAD,
    DIM,
    INK,
    LINE,
    PALETTE,
    PANEL,
    TRUTH,
    Colour,
    Paper,
    Picture,
    fill,
    line,
    shortened,
    width_of,
)

NEAR = 0.3  # m before the camera from which something is drawn
MARGIN = 8.0  # px beyond the border where lines end, so that they do not run along it
FRONT = [0, 1, 2, 3]
EDGES = np.array([(0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7)])
TAG, TAG_HEIGHT = 12, 15
SMALLEST_TAGGED = 9.0  # px of height of a box that is worth a tag


def planes(width: float, height: float) -> tuple[Array, Array]:
    """The sight of a picture as half-spaces of (u*d, v*d, d): A (5, 3), b (5,), within where A p + b >= 0."""
    m = MARGIN
    a = [[0, 0, 1], [1, 0, m], [-1, 0, width + m], [0, 1, m], [0, -1, height + m]]
    return np.array(a, dtype=np.float64), np.array([-NEAR, 0, 0, 0, 0])


def cut_lines(segments: Array, sight: tuple[Array, Array]) -> Array:
    """Segments (n, 2, 3) of (u*d, v*d, d) to what is seen of them, (m, 2, 2) in pixels."""
    value = segments @ sight[0].T + sight[1]
    start, end = value[:, 0], value[:, 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        at = start / (start - end)
    first = np.where((start < 0) & (end >= 0), at, 0).max(axis=1)
    last = np.where((end < 0) & (start >= 0), at, 1).min(axis=1)
    seen = ~((start < 0) & (end < 0)).any(axis=1) & (first < last)
    a, way = segments[seen, 0], segments[seen, 1] - segments[seen, 0]
    ends = a[:, None] + way[:, None] * np.stack([first[seen], last[seen]], axis=1)[..., None]
    return np.asarray(ends[..., :2] / ends[..., 2:])


def cut_area(corners: Array, sight: tuple[Array, Array]) -> Array:
    """A convex polygon (n, 3) of (u*d, v*d, d) to what is seen of it, (m, 2) in pixels; m is 0 where nothing is.

    Source: Sutherland and Hodgman, Reentrant polygon clipping (1974).
    """
    for normal, offset in zip(*sight):
        value = corners @ normal + offset
        kept = []
        for i in range(len(corners)):
            j = (i + 1) % len(corners)
            if value[i] >= 0:
                kept.append(corners[i])
            if (value[i] < 0) != (value[j] < 0):
                kept.append(corners[i] + (corners[j] - corners[i]) * (value[i] / (value[i] - value[j])))
        if len(kept) < 3:
            return np.zeros((0, 2))
        corners = np.array(kept)
    return np.asarray(corners[:, :2] / corners[:, 2:])


def panel(
    paper: Paper,
    place: tuple[int, int, int, int],
    title: str,
    picture: Picture | str,
    lidar2img: Array | None,
    predictions: Boxes,
    truth: Boxes,
) -> None:
    """A camera at `place` (x, y, width, height): its picture, or the words why there is none, and the boxes in it.

    `lidar2img` (4, 4) is that of the whole picture, boxes are in the LiDAR's frame.
    """
    x, y, width, height = place
    area = paper.area(*place)
    area[:] = PANEL
    if isinstance(picture, str):
        _absent(paper, place, picture)
    else:
        scale = min(width / picture.shape[1], height / picture.shape[0])
        w, h = max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))
        left, top = (width - w) // 2, (height - h) // 2
        inner = area[top : top + h, left : left + w]
        inner[:] = cv2.resize(picture, (w, h), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        if lidar2img is not None:
            fit = np.diag([w / picture.shape[1], h / picture.shape[0], 1.0])
            _boxes(paper, (x + left, y + top, w, h), pinhole(fit) @ lidar2img, predictions, truth)
    paper.plate(x, y, round(width_of(title, 13)) + 14, 21, (0, 0, 0), 0.55)
    paper.text(x + 7, y + 15, title, 13, INK)


def _absent(paper: Paper, place: tuple[int, int, int, int], why: str) -> None:
    x, y, width, height = place
    cv2.rectangle(paper.area(*place), (0, 0), (width - 1, height - 1), LINE, 1)
    paper.text(x + width / 2, y + height / 2 - 8, "no picture", 20, BAD, "ms")
    paper.text(x + width / 2, y + height / 2 + 14, shortened(why, 12, width - 24), 12, DIM, "ms")


def _boxes(paper: Paper, place: tuple[int, int, int, int], camera: Array, predictions: Boxes, truth: Boxes) -> None:
    """Truth thin and green, over it predictions in the colours of their classes, the farther ones first."""
    pixels = paper.area(*place)
    sight = planes(place[2], place[3])
    for boxes, colour in ((truth, TRUTH), (predictions, None)):
        found = boxes.corners @ camera[:3, :3].T + camera[:3, 3]
        tops: list[tuple[float, str, Colour, Array]] = []
        for i in np.argsort(-found[..., 2].mean(axis=1)):
            corners = found[i]
            if not (corners[:, 2] > NEAR).any():
                continue
            seen = cut_lines(corners[EDGES], sight)
            if not len(seen):
                continue
            if colour is not None:
                for a, b in seen:
                    line(pixels, a, b, colour)
                continue
            own = PALETTE[boxes.labels[i]]
            tall = float(np.ptp(seen[..., 1]))
            front = cut_area(corners[FRONT], sight)
            if len(front):
                fill(pixels, front, own, 0.38)
            bottom = np.array([[corners[[2, 3, 6, 7]].mean(axis=0), corners[[2, 3]].mean(axis=0)]])
            for a, b in (*seen, *cut_lines(bottom, sight)):
                line(pixels, a, b, own, 2 if tall > 28 else 1)
            if tall >= SMALLEST_TAGGED:
                name = CLASSES[boxes.labels[i]].replace("_", " ")
                tops.append((float(boxes.scores[i]), f"{name} {boxes.scores[i]:.2f}", own, seen.reshape(-1, 2)))
        _tags(paper, place, tops)


def _tags(paper: Paper, place: tuple[int, int, int, int], tops: list[tuple[float, str, Colour, Array]]) -> None:
    """Class and score above each box, the surest first; one that would cover another is left out."""
    x, y, width, height = place
    taken: list[tuple[int, int, int, int]] = [(0, 0, 110, 21)]  # the camera's name
    for _, words, colour, points in sorted(tops, key=lambda top: -top[0]):
        wide = round(width_of(words, TAG)) + 8
        left = int(np.clip(points[:, 0].min(), 0, max(0, width - wide)))
        top = int(np.clip(points[:, 1].min() - TAG_HEIGHT - 1, 0, height - TAG_HEIGHT))
        if any(left < a + c and a < left + wide and top < b + d and b < top + TAG_HEIGHT for a, b, c, d in taken):
            continue
        taken.append((left, top, wide, TAG_HEIGHT))
        paper.plate(x + left, y + top, wide, TAG_HEIGHT, colour, 0.9)
        paper.text(x + left + 4, y + top + 12, words, TAG, (12, 14, 18))
