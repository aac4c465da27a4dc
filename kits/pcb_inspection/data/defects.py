"""The six defects of DeepPCB, drawn on any binary board image as its authors did by hand: pen strokes on the copper.

The classes are dual. A stroke of the background's colour makes a pin-hole (inside copper), a mousebite (over one
edge) or an open (right across); a stroke of copper makes, in the same three places of the background, a copper
island, a spur or a short. Sizes follow the 6,873 defects of DeepPCB's trainval.txt, whose boxes are the bounding
box of the whole stroke, with the part that changed nothing, and 10 pixels on each side.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
from numpy.typing import NDArray

from core.kit import InputError
from kits.pcb_inspection.data.deeppcb import CLASSES, Grey

MARGIN = 10  # pixels between a stroke and its box
COMPONENT = 15  # pixels from which a piece counts as a conductor or an opening; textured strokes leave smaller crumbs
GAP = 2  # pixels that an island or a pin-hole keeps from the edge
REACH = 90  # pixels, the widest trace or gap that a stroke crosses
FREQUENCY = np.array([1283, 1028, 1379, 1142, 1010, 1031]) / 6873  # of the classes in trainval.txt
LENGTH = {"mousebite": (16.5, 0.42), "spur": (17.5, 0.36), "copper": (26.0, 0.42), "pin-hole": (25.0, 0.42)}
WIDTH = {"open": 5.5, "short": 5.5, "mousebite": 5.5, "spur": 6.0, "copper": 7.5, "pin-hole": 6.5}  # of the pen
CORNERS = 0.08  # share of the opens that cut off a corner and not a trace
CORNER_BITES = 0.15  # share of the mousebites and spurs that are looked for at corners
TRIES = 40

Points = NDArray[np.float64]

_AROUND = np.ones((2 * GAP + 1, 2 * GAP + 1), np.uint8)
_DISC = np.stack([o.ravel() for o in np.mgrid[-4:5, -4:5][::-1]])
_DISC = _DISC[:, np.hypot(*_DISC) <= 4]


def add_defects(
    template: Grey,
    rng: np.random.Generator,
    count: int | None = None,
    *,
    kinds: Sequence[str] = CLASSES,
    avoid: NDArray[np.float32] | None = None,
) -> tuple[Grey, NDArray[np.float32], NDArray[np.int64]]:
    """A tested image made of a template: (image (H, W) uint8, boxes (n, 4) float32 xyxy, labels (n,) int64 in 0..5).

    Copper is dark (below 128). `count` defects of `kinds` in the frequency of DeepPCB (None: 1 to 15, mean 7), no
    two boxes overlapping nor touching those of `avoid` (m, 4). Each is verified after drawing: an open adds a piece
    of copper and a short takes one away, in the neighbourhood of the stroke; mousebites and spurs change the number of
    neither conductors nor openings; copper adds a conductor, a pin-hole an opening. Where a kind does not fit (a bare
    template has nothing to cut) another takes its place; where none fits, fewer are returned.
    """
    if template.ndim != 2 or template.dtype != np.uint8:
        raise InputError(f"template: found {template.dtype} {template.shape}, expected a grey uint8 image (H, W)")
    if not kinds or (unknown := set(kinds) - set(CLASSES)):
        raise InputError(f"kinds: found {sorted(unknown) if kinds else 'none'}, expected some of {', '.join(CLASSES)}")
    board = Board(template, [] if avoid is None else avoid.tolist())
    wanted = int(np.clip(round(rng.normal(6.9, 1.9)), 1, 15)) if count is None else count
    names = np.array(kinds)
    share = FREQUENCY[[CLASSES.index(name) for name in kinds]]
    order = rng.choice(len(names), size=wanted, p=share / share.sum())
    boxes, labels = [], []
    full: set[str] = set()  # the kinds that no longer fit, not tried again
    for first in order:
        others = rng.permutation(len(names))
        for kind in (str(names[i]) for i in (first, *others[others != first])):
            if kind in full:
                continue
            if (box := board.draw(kind, rng)) is not None:
                boxes.append(box)
                labels.append(CLASSES.index(kind))
                break
            full.add(kind)
    return board.image, np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64)


@dataclass(frozen=True)
class Stroke:
    """Pen marks: `mask` (h, w) of 0 and 1 with its top left corner at (x, y) of the board."""

    x: int
    y: int
    mask: Grey

    @staticmethod
    def of(path: Points, widths: Iterable[float], texture: Grey | None = None) -> Stroke:
        """A polyline (n, 2) of x, y in board pixels, drawn with a width a segment; `texture` tiles it with holes."""
        pens = [max(1, round(width)) for width in widths]
        pad = max(pens) // 2 + 2
        x, y = (math.floor(v) - pad for v in path.min(0))
        w, h = (math.ceil(v) + pad + 1 - o for v, o in zip(path.max(0), (x, y), strict=True))
        mask = np.zeros((h, w), np.uint8)
        fixed = np.round((path - (x, y)) * 16).astype(int).tolist()
        for start, end, pen in zip(fixed[:-1], fixed[1:], pens, strict=True):
            cv2.line(mask, start, end, 1, pen, cv2.LINE_8, 4)
        if texture is not None:
            rows, columns = (-(-n // m) for n, m in zip(mask.shape, texture.shape, strict=True))
            mask &= np.tile(texture, (rows, columns))[:h, :w]
        return Stroke(x, y, mask)

    @staticmethod
    def patch(outline: Points) -> Stroke:
        """The filled polygon (n, 2) of x, y in board pixels."""
        x, y = (math.floor(v) - 1 for v in outline.min(0))
        w, h = (math.ceil(v) + 2 - o for v, o in zip(outline.max(0), (x, y), strict=True))
        mask = np.zeros((h, w), np.uint8)
        cv2.fillPoly(mask, [np.round((outline - (x, y)) * 16).astype(np.int32)], 1, cv2.LINE_8, 4)
        return Stroke(x, y, mask)


class Board:
    """A board image under the pen: `image` is the tested image so far, `taken` the boxes on it."""

    def __init__(self, template: Grey, taken: list[list[float]]) -> None:
        self.image = template.copy()
        self.taken = taken
        self._copper = (template < 128).astype(np.uint8)

    def draw(self, kind: str, rng: np.random.Generator) -> list[float] | None:
        """Draw one defect and return its box x1 y1 x2 y2, or None if it fits nowhere that was tried."""
        removes = kind in ("open", "mousebite", "pin-hole")
        for attempt in range(TRIES):
            shrink = 1 - 0.6 * attempt / TRIES
            if kind in ("open", "short"):
                stroke = self._cut(kind, removes, rng)
            elif kind in ("mousebite", "spur"):
                stroke = self._bite(kind, removes, rng, shrink)
            else:
                stroke = self._hole(kind, removes, rng, shrink)
            if stroke is not None and (box := self._apply(kind, stroke)) is not None:
                return box
        return None

    def _apply(self, kind: str, stroke: Stroke) -> list[float] | None:
        """Put the stroke on the board if its place is free and it makes the defect that it should."""
        height, width = self.image.shape
        columns, rows = np.flatnonzero(stroke.mask.any(0)), np.flatnonzero(stroke.mask.any(1))
        if not len(columns):
            return None
        left, right = stroke.x + int(columns[0]), stroke.x + int(columns[-1])
        top, bottom = stroke.y + int(rows[0]), stroke.y + int(rows[-1])
        if left < 3 or top < 3 or right > width - 4 or bottom > height - 4:
            return None
        x1, y1 = max(left - MARGIN, 0), max(top - MARGIN, 0)
        x2, y2 = min(right + MARGIN, width - 1), min(bottom + MARGIN, height - 1)
        if any(x1 < b[2] and b[0] < x2 and y1 < b[3] and b[1] < y2 for b in self.taken):
            return None
        # The neighbourhood in which pieces are counted: the box and a little, so a loop far off counts for nothing.
        a, b, c, d = max(x1 - 6, 0), max(y1 - 6, 0), min(x2 + 7, width), min(y2 + 7, height)
        before = (self.image[b:d, a:c] < 128).astype(np.uint8)
        pen = np.zeros_like(before)
        pen[top - b : bottom + 1 - b, left - a : right + 1 - a] = stroke.mask[
            rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1
        ]
        after = before & (1 - pen) if kind in ("open", "mousebite", "pin-hole") else before | pen
        if int((before != after).sum()) < (20 if kind in ("mousebite", "spur") else 30) or not makes(
            kind, before, after
        ):
            return None
        self.image[b:d, a:c][pen > 0] = 0 if kind in ("short", "spur", "copper") else 255
        box = [float(x1), float(y1), float(x2), float(y2)]
        self.taken.append(box)
        return box

    def _cut(self, kind: str, removes: bool, rng: np.random.Generator) -> Stroke | None:
        """A stroke across a trace (open) or across the gap between two (short)."""
        points, normals, widths = self._crossings(removes, rng)
        if removes and len(points) and widths[0] > 24 and rng.random() < CORNERS:
            return _loop(points[0], normals[0], rng)
        if not len(closed := np.flatnonzero(widths < REACH)):
            return None
        weights = widths[closed] ** -1.5
        chosen = closed[int(rng.choice(len(closed), p=weights / weights.sum()))]
        point, normal, width = points[chosen], normals[chosen], float(widths[chosen])
        pen = float(np.clip(WIDTH[kind] * rng.lognormal(0, 0.3), 3, 16))
        style = rng.random()
        tilt = 0.0 if style < 0.25 else rng.normal(0, 0.35)
        across = _turn(normal, tilt)
        over = rng.uniform(0, 5, 2)
        length = width / max(math.cos(tilt), 0.5)
        start, end = point - across * over[0], point + across * (length + over[1])
        side = _turn(across, math.pi / 2)
        if style < 0.2:  # a clean block, as drawn with the eraser or the rectangle tool
            half = side * pen * rng.uniform(0.5, 1.0)
            return Stroke.patch(np.array([start - half, end - half, end + half, start + half]))
        path = _wobbly(start, end, rng, bend=0.12 if style < 0.7 else 0.25)
        if style < 0.8:
            return Stroke.of(path, np.linspace(pen, pen * rng.uniform(0.5, 1.3), len(path) - 1))
        if style < 0.9:  # the pen goes there and back
            back = path[::-1] + side * rng.uniform(0.5, 1.2) * pen
            return Stroke.of(np.vstack([path, back]), [pen * 0.7] * (2 * len(path) - 1))
        return Stroke.of(path, [pen * 2] * (len(path) - 1), _texture(rng))

    def _bite(self, kind: str, removes: bool, rng: np.random.Generator, shrink: float) -> Stroke | None:
        """A stroke from outside over one edge, into copper (mousebite) or out of it (spur), not to the other side."""
        points, normals, widths = self._crossings(removes, rng, corners=rng.random() < CORNER_BITES)
        if not len(points):
            return None
        point, normal, width = points[0], normals[0], float(widths[0])
        median, sigma = LENGTH[kind]
        length = float(np.clip(median * shrink * rng.lognormal(0, sigma), 7, 60))
        pen = float(np.clip(WIDTH[kind] * rng.lognormal(0, 0.3), 3, 0.8 * length))
        depth = min(length - rng.uniform(0.1, 0.4) * pen, rng.uniform(0.4, 0.75) * width)
        style = rng.random()
        if style < 0.25:  # a lump on the edge, drawn as a patch
            along = _turn(normal, math.pi / 2)
            half = np.array([length / 2, depth * rng.uniform(0.6, 1.0)])
            angles = np.sort(rng.uniform(0, 2 * math.pi, 14))
            radii = rng.uniform(0.75, 1.1, 14)[:, None]
            return Stroke.patch(
                point + radii * (np.cos(angles)[:, None] * along * half[0] + np.sin(angles)[:, None] * normal * half[1])
            )
        direction = _turn(normal, rng.normal(0, 0.5))
        path = _wobbly(
            point - direction * max(length - depth, 1), point + direction * (depth - pen / 2), rng, bend=0.25
        )
        if style < 0.8:
            return Stroke.of(path, np.linspace(pen, pen * rng.uniform(0.4, 1.2), len(path) - 1))
        if style < 0.92:
            return _scribble(point + normal * depth * 0.3, length, rng)
        return Stroke.of(path, [pen * 1.6] * (len(path) - 1), _texture(rng))

    def _hole(self, kind: str, removes: bool, rng: np.random.Generator, shrink: float) -> Stroke | None:
        """A stroke all inside copper (pin-hole) or all in the open (copper)."""
        median, sigma = LENGTH[kind]
        length = float(np.clip(median * shrink * rng.lognormal(0, sigma), 7, 80))
        pen = float(np.clip(WIDTH[kind] * rng.lognormal(0, 0.35), 3, 0.9 * length))
        depth = self._depth[removes]
        places = rng.integers(0, depth.size, 64)
        places = places[depth.ravel()[places] > pen / 2 + GAP]
        if not len(places):
            return None
        centre = 2.0 * np.array([places[0] % depth.shape[1], places[0] // depth.shape[1]])
        style = rng.random()
        if style < 0.3:  # a dot, drawn as a patch
            angles = np.linspace(0, 2 * math.pi, 12, endpoint=False)
            radii = length / 2 * rng.uniform(0.7, 1.0, 12) * (0.8 if kind == "copper" else 0.7)
            stroke = Stroke.patch(
                centre + np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None] * rng.uniform(0.6, 1, 2)
            )
        elif style < 0.8:
            angle = rng.choice([0.0, math.pi / 2]) if style < 0.4 else rng.uniform(0, math.pi)
            half = np.array([math.cos(angle), math.sin(angle)]) * max(length - pen, 1) / 2
            path = _wobbly(centre - half, centre + half, rng, bend=0.0 if style < 0.4 else 0.3)
            stroke = Stroke.of(path, np.linspace(pen, pen * rng.uniform(0.4, 1.3), len(path) - 1))
        elif style < 0.93:
            stroke = _scribble(centre, length, rng)
        else:
            half = np.array([max(length - pen, 1) / 2, 0])[:: int(rng.choice([1, -1]))]
            stroke = Stroke.of(np.array([centre - half, centre + half]), [pen * 1.5], _texture(rng))
        wide = cv2.dilate(cv2.copyMakeBorder(stroke.mask, GAP, GAP, GAP, GAP, cv2.BORDER_CONSTANT, value=0), _AROUND)
        x, y = stroke.x - GAP, stroke.y - GAP
        h, w = wide.shape
        if x < 0 or y < 0 or x + w > self._copper.shape[1] or y + h > self._copper.shape[0]:
            return None
        return stroke if (self._copper[y : y + h, x : x + w][wide > 0] == removes).all() else None

    def _crossings(
        self, removes: bool, rng: np.random.Generator, corners: bool = False
    ) -> tuple[Points, Points, NDArray[np.int64]]:
        """Up to 6 random edge points (n, 2), their unit normals into copper or out of it (n, 2), and the width there.

        The width (n,) is in pixels along the normal, REACH where the far side is further or off the image. With
        `corners` the points are those of 120 about which the least of the material lies.
        """
        height, width = self._copper.shape
        edges = self._edges
        place = edges[rng.integers(0, len(edges), 120 if corners else 6)] if len(edges) else edges
        if corners and len(place):
            around = cv2.blur(self._copper * 255, (17, 17)).ravel()[place]
            place = place[np.argsort(around if removes else 255 - around, kind="stable")[:6]]
        x, y = place % width, place // width
        within = (x >= 8) & (x < width - 8) & (y >= 8) & (y < height - 8)
        x, y = x[within], y[within]
        # The edge's direction is the centre of gravity of the copper about it: steady on rough edges.
        slope = self._copper[y[:, None] + _DISC[1], x[:, None] + _DISC[0]].astype(float) @ _DISC.T
        size = np.hypot(slope[:, 0], slope[:, 1])
        steep = size > 12
        x, y, normal = x[steep], y[steep], slope[steep] / size[steep, None] * (1 if removes else -1)
        steps = np.arange(2, REACH)
        xs, ys = (
            np.round(o[:, None] + n[:, None] * steps).astype(int) for o, n in ((x, normal[:, 0]), (y, normal[:, 1]))
        )
        inside = (xs >= 0) & (xs < width) & (ys >= 0) & (ys < height)
        material = self._copper[ys.clip(0, height - 1), xs.clip(0, width - 1)] == removes
        ends = inside & ~material
        # A ray that leaves the image before the far side has no known width.
        far = np.where(ends.any(1), steps[ends.argmax(1)], REACH)
        good = material[:, 0]
        return np.stack([x, y], 1)[good].astype(float), normal[good], far[good]

    @cached_property
    def _edges(self) -> NDArray[np.int64]:
        """Flat indices of the copper pixels at an edge."""
        return np.flatnonzero(self._copper - cv2.erode(self._copper, np.ones((3, 3), np.uint8)))

    @cached_property
    def _depth(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Distance (H/2, W/2) in pixels (of background to copper, of copper to background), to choose places by."""
        small = self._copper[::2, ::2]
        bare, copper = (cv2.distanceTransform(np.ascontiguousarray(m), cv2.DIST_L2, 3) for m in (1 - small, small))
        # Where there is no edge at all, OpenCV's distance is the largest float.
        return 2 * np.minimum(bare, 1e4, dtype=np.float32), 2 * np.minimum(copper, 1e4, dtype=np.float32)


def makes(kind: str, before: Grey, after: Grey) -> bool:
    """Whether two cut-outs of 0 and 1 (copper) differ in their pieces as a defect of this kind must make them."""
    copper = pieces(after, 8) - pieces(before, 8)
    if kind == "open":
        return copper > 0
    if kind == "short":
        return copper < 0
    if kind == "copper":
        return copper > 0
    openings = pieces(1 - after, 4) - pieces(1 - before, 4)
    return openings > 0 if kind == "pin-hole" else copper == 0 and openings == 0


def pieces(mask: Grey, connectivity: int) -> int:
    """The number of connected pieces of at least COMPONENT pixels."""
    stats = cv2.connectedComponentsWithStats(mask, connectivity=connectivity)[2]
    return int((stats[1:, cv2.CC_STAT_AREA] >= COMPONENT).sum())


def _turn(vector: Points, angle: float) -> Points:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([c * vector[0] - s * vector[1], s * vector[0] + c * vector[1]])


def _wobbly(start: Points, end: Points, rng: np.random.Generator, bend: float) -> Points:
    """A hand-drawn line (5, 2): a bow of `bend` of its length and a tremor of a pixel."""
    t = np.linspace(0, 1, 5)[:, None]
    along = end - start
    bow = np.sin(math.pi * t) * np.array([-along[1], along[0]]) * rng.normal(0, bend or 1e-9)
    tremor = rng.normal(0, 0.7 if bend else 0.0, (5, 2)) * np.sin(math.pi * t)
    return np.asarray(start + along * t + bow + tremor)


def _loop(point: Points, normal: Points, rng: np.random.Generator) -> Stroke:
    """An arc about an edge point that cuts the piece within off, as drawn around the corners of pads."""
    middle = math.atan2(normal[1], normal[0])
    reach = math.radians(rng.uniform(100, 140))
    angles = np.linspace(middle - reach, middle + reach, 9)
    radii = rng.uniform(9, 20) * rng.uniform(0.85, 1.15, 9)
    path = point + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
    return Stroke.of(path, [float(rng.uniform(3, 6))] * 8)


def _scribble(centre: Points, length: float, rng: np.random.Generator) -> Stroke:
    """A thin pen going to and fro within `length` pixels."""
    angle = rng.uniform(0, math.pi)
    axis = np.array([math.cos(angle), math.sin(angle)])
    n = int(rng.integers(4, 9))
    along = rng.uniform(-0.5, 0.5, n) * length
    across = rng.uniform(-0.25, 0.25, n) * length
    path = centre + along[:, None] * axis + across[:, None] * _turn(axis, math.pi / 2)
    return Stroke.of(path, [float(rng.choice([2, 3, 3, 4]))] * (n - 1))


def _texture(rng: np.random.Generator) -> Grey:
    """A tile (32, 32) of a dry brush: short streaks along one axis, about three quarters covered."""
    grain = cv2.blur(rng.random((32, 32)), (5, 1) if rng.random() < 0.5 else (1, 5))
    return (grain > np.quantile(grain, 0.25)).astype(np.uint8)
