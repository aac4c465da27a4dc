"""Board templates like those of DeepPCB: copper of a bare board, 640 x 640 pixels at 48 px/mm, one style a board group.

A board is placed part by part (footprints, traces and buses, vias, arcs, pours, letters); a part goes where it keeps
its clearance from what is there. Lengths are in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from kits.pcb_inspection.data.deeppcb import Grey

SIZE = 640
PX_PER_MM = 48

Points = NDArray[np.float64]
Rng = np.random.Generator


@dataclass(frozen=True)
class Style:
    """What the boards of a group have in common; `parts` are (name of a part, how many are tried)."""

    parts: tuple[tuple[str, int], ...]
    trace: tuple[int, ...]
    clearance: int
    pad: int
    drill: float
    flood: float = 0.0  # the chance that the rest is filled with copper


FAMILIES = {
    "buses": Style((("polygon", 2), ("soic", 2), ("bus", 10), ("trace", 8), ("via", 6)), (9, 12, 16), 10, 34, 0.3),
    "fine": Style((("qfp", 1), ("bga", 1), ("trace", 26), ("via", 40), ("text", 2)), (4, 5, 7), 7, 20, 0.0),
    "through": Style((("dip", 2), ("chip", 2), ("trace", 16), ("polygon", 1), ("via", 4)), (10, 14, 22), 12, 52, 0.42),
    "power": Style((("polygon", 5), ("chip", 2), ("trace", 5), ("via", 5)), (20, 30, 42), 14, 60, 0.35, 0.3),
    "flooded": Style((("frame", 2), ("bus", 3), ("chip", 3), ("dip", 1), ("via", 5)), (8, 12, 18), 12, 44, 0.35, 1.0),
    "round": Style((("ring", 3), ("arc", 4), ("polygon", 2), ("trace", 5), ("via", 6)), (9, 14, 20), 12, 46, 0.45, 0.4),
    "connector": Style((("fingers", 2), ("bus", 6), ("trace", 6), ("via", 8), ("text", 1)), (6, 8, 10), 9, 28, 0.4),
}


def style(family: str, rng: Rng) -> Style:
    """The style of one board group: that of its family, with its own widths, clearance and pads."""
    base = FAMILIES[family]
    scale = float(rng.uniform(0.8, 1.25))
    return replace(
        base,
        trace=tuple(max(4, round(width * scale)) for width in base.trace),
        clearance=max(6, round(base.clearance * scale)),
        pad=round(base.pad * float(rng.uniform(0.85, 1.2))),
    )


def draw_board(style: Style, rng: Rng) -> Grey:
    """Copper (640, 640) of a board of a style, 1 where copper is."""
    canvas = Canvas(style, rng)
    for name, count in style.parts:
        for _ in range(count):
            PARTS[name](canvas)
    if rng.random() < style.flood:
        canvas.flood()
    # Parts are drawn upright; a quarter turn makes crops of one board less alike.
    return np.ascontiguousarray(np.rot90(canvas.copper & (1 - canvas.drills), int(rng.integers(4))))


class Canvas:
    """The copper so far and where new copper may not go."""

    def __init__(self, style: Style, rng: Rng) -> None:
        self.style, self.rng = style, rng
        self.copper = np.zeros((SIZE, SIZE), np.uint8)
        self.blocked = np.zeros((SIZE, SIZE), np.uint8)
        self.pads: list[tuple[float, float]] = []
        self.drills = np.zeros((SIZE, SIZE), np.uint8)

    def place(self, part: Grey, pads: list[tuple[float, float]] | None = None, joins: Points | None = None) -> bool:
        """Add a part's copper (640, 640) if it keeps clear; `pads` may start traces, `joins` (n, 2) touches copper."""
        x, y, w, h = cv2.boundingRect(part)
        reach = self.style.clearance
        # Only the part's surroundings matter: whole-image arithmetic would cost ten times as much.
        near = np.s_[max(y - reach, 0) : y + h + reach, max(x - reach, 0) : x + w + reach]
        blocked, part = self.blocked[near], part[near]
        if joins is not None:
            blocked = self.blocked.copy()
            for px, py in joins:
                cv2.circle(blocked, (int(px), int(py)), self.style.pad // 2 + reach + 2, 0, -1)
            blocked = blocked[near]
        if not w or (blocked & part).any():
            return False
        self.copper[near] |= part
        around = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
        self.blocked[near] |= np.asarray(cv2.dilate(part, around), np.uint8)
        self.pads += pads or []
        return True

    def width(self) -> int:
        """A trace width of the style."""
        return int(self.rng.choice(self.style.trace))

    def point(self, border: int = -20) -> tuple[float, float]:
        """A place on the board or just off it."""
        x, y = self.rng.uniform(border, SIZE - border, 2)
        return float(x), float(y)

    def flood(self) -> None:
        """Fill with copper what keeps clear of the rest, and drop what is too thin to be made."""
        free = 1 - self.blocked
        thin = 2 * self.style.trace[0] + 1
        pour = cv2.morphologyEx(free, cv2.MORPH_OPEN, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (thin, thin)))
        self.copper |= np.asarray(pour, np.uint8)


def blank() -> Grey:
    """An empty layer (640, 640)."""
    return np.zeros((SIZE, SIZE), np.uint8)


def line(layer: Grey, points: Points, width: int) -> None:
    """Draw a polyline (n, 2) of x, y with round ends."""
    fixed = np.round(points * 16).astype(np.int32).reshape(-1, 1, 2)
    cv2.polylines(layer, [fixed], False, 1, width, cv2.LINE_8, 4)


def fill(layer: Grey, points: Points, value: int = 1) -> None:
    """Fill a polygon (n, 2) of x, y."""
    cv2.fillPoly(layer, [np.round(points * 16).astype(np.int32).reshape(-1, 1, 2)], value, cv2.LINE_8, 4)


def disc(layer: Grey, x: float, y: float, radius: float, value: int = 1) -> None:
    """Fill a circle."""
    cv2.circle(layer, (round(x * 16), round(y * 16)), round(radius * 16), value, -1, cv2.LINE_8, 4)


def box(layer: Grey, x: float, y: float, w: float, h: float, corner: float = 0.0, *, round_: bool = False) -> None:
    """Fill a w x h box about (x, y), its corners chamfered or rounded by `corner`."""
    a, b, c = w / 2, h / 2, min(corner, w / 2, h / 2)
    if round_:
        turns = np.linspace(0, math.pi / 2, 8)
        quarter = np.stack([a - c + c * np.cos(turns), b - c + c * np.sin(turns)], 1)
    else:
        quarter = np.array([[a, b - c], [a - c, b]])
    signs = ((1, 1), (-1, 1), (-1, -1), (1, -1))
    corners = [(quarter if sx * sy > 0 else quarter[::-1]) * (sx, sy) for sx, sy in signs]
    fill(layer, np.vstack(corners) + np.array([x, y]))


def pad(canvas: Canvas, layer: Grey, x: float, y: float, shape: str, size: float) -> None:
    """A round, square or oblong pad, with a drill hole where the style has them."""
    if shape == "square":
        box(layer, x, y, size, size, size * 0.08)
    elif shape == "oblong":
        box(layer, x, y, size * 1.7, size, size / 2, round_=True)
    else:
        disc(layer, x, y, size / 2)
    if canvas.style.drill:
        disc(layer, x, y, size * canvas.style.drill / 2, 0)


def drill(canvas: Canvas, points: list[tuple[float, float]], radius: float) -> None:
    """Keep holes free of the traces that start in their middle."""
    for x, y in points if canvas.style.drill else []:
        disc(canvas.drills, x, y, radius)


def octilinear(start: Points, heading: int, legs: list[float], turns: list[int]) -> Points:
    """A path (n, 2) in steps of 45 degrees: from `start` with `heading` (eighths), a leg, a turn (eighths), ..."""
    points = [start]
    for leg, turn in zip(legs, [*turns, 0], strict=True):
        angle = heading * math.pi / 4
        points.append(points[-1] + leg * np.array([math.cos(angle), math.sin(angle)]))
        heading += turn
    return np.array(points)


def offset(path: Points, distance: float) -> Points:
    """The path parallel to (n, 2) at a distance, mitred."""
    steps = np.diff(path, axis=0)
    normals = np.stack([-steps[:, 1], steps[:, 0]], 1) / np.hypot(*steps.T)[:, None]
    middle = normals[:-1] + normals[1:]
    middle = middle / (1 + (normals[:-1] * normals[1:]).sum(1, keepdims=True))
    return path + distance * np.vstack([normals[:1], middle, normals[-1:]])


def _route(rng: Rng, start: Points, heading: int, shortest: float = 40) -> Points:
    legs = int(rng.integers(2, 5))
    turns = [int(t) for t in rng.choice([-2, -1, -1, 1, 1, 2], legs - 1)]
    return octilinear(start, heading, [float(v) for v in rng.uniform(shortest, shortest + 180, legs)], turns)


def trace(canvas: Canvas) -> None:
    """A trace from a pad or from off the board, ending in a via."""
    rng = canvas.rng
    for _ in range(8):
        from_pad = bool(canvas.pads) and rng.random() < 0.7
        start = canvas.pads[int(rng.integers(len(canvas.pads)))] if from_pad else canvas.point()
        path = _route(rng, np.array(start), int(rng.integers(8)))
        layer = blank()
        width = canvas.width()
        line(layer, path, width)
        ends = [path[-1]] if from_pad else [path[0], path[-1]]
        for x, y in ends:
            disc(layer, x, y, max(canvas.style.pad * 0.4, width))
        if canvas.place(layer, joins=path[:1] if from_pad else None):
            if rng.random() < 0.7:
                drill(canvas, [(float(x), float(y)) for x, y in ends], max(canvas.style.pad * 0.16, 4))
            return


def bus(canvas: Canvas) -> None:
    """Several parallel traces that turn together."""
    rng = canvas.rng
    for _ in range(8):
        width, lanes = canvas.width(), int(rng.integers(3, 8))
        pitch = width + canvas.style.clearance * float(rng.uniform(0.9, 1.6))
        edge, along = float(rng.choice([-10, SIZE + 10])), float(rng.uniform(0, SIZE))
        start, heading = (
            ((edge, along), 0 if edge < 0 else 4) if rng.random() < 0.5 else ((along, edge), 2 if edge < 0 else 6)
        )
        path = _route(rng, np.array(start), heading, shortest=lanes * pitch)
        layer = blank()
        for lane in range(lanes):
            line(layer, offset(path, (lane - (lanes - 1) / 2) * pitch), width)
        if canvas.place(layer):
            return


def _several(canvas: Canvas, pads: list[tuple[float, float]], draw: Callable[[Grey, float, float], None]) -> bool:
    layer = blank()
    for x, y in pads:
        draw(layer, x, y)
    return canvas.place(layer, pads)


def dip(canvas: Canvas) -> None:
    """Two rows of drilled pads, the first one square."""
    rng = canvas.rng
    size = canvas.style.pad
    pitch = size * float(rng.uniform(1.5, 2.0))
    shape = str(rng.choice(["round", "oblong"]))
    for _ in range(6):
        x, y = canvas.point(40)
        n, apart = int(rng.integers(3, 8)), pitch * float(rng.uniform(2.2, 3.5))
        pins = [(x + side * apart, y + i * pitch) for side in range(2) for i in range(n)]
        layer = blank()
        for a, b in pins:
            pad(canvas, layer, a, b, "square" if (a, b) == pins[0] else shape, size)
        if canvas.place(layer, pins):
            drill(canvas, pins, size * canvas.style.drill / 2)
            return


def soic(canvas: Canvas) -> None:
    """Two rows of long pads without holes."""
    rng = canvas.rng
    w, h = canvas.style.pad * float(rng.uniform(1.2, 1.8)), canvas.style.pad * float(rng.uniform(0.4, 0.6))
    pitch = h + canvas.style.clearance * float(rng.uniform(1.0, 1.5))
    for _ in range(6):
        x, y = canvas.point(40)
        n, apart = int(rng.integers(4, 9)), w * float(rng.uniform(2.0, 3.0))
        pins = [(x + side * apart, y + i * pitch) for side in range(2) for i in range(n)]
        if _several(canvas, pins, lambda m, a, b: box(m, a, b, w, h, h * 0.15, round_=True)):
            return


def qfp(canvas: Canvas) -> None:
    """Long pads on four sides about a ground pad."""
    rng = canvas.rng
    long, short = canvas.style.pad * float(rng.uniform(1.4, 2.0)), max(canvas.style.pad * 0.45, 6)
    pitch = short + canvas.style.clearance * float(rng.uniform(1.0, 1.4))
    for _ in range(6):
        x, y = canvas.point(120)
        n = int(rng.integers(6, 13))
        reach = (n / 2 + 0.5) * pitch + long / 2
        slots = [(i - (n - 1) / 2) * pitch for i in range(n)]
        layer, pads = blank(), []
        for slot in slots:
            for side in (-1, 1):
                box(layer, x + slot, y + side * reach, short, long)
                box(layer, x + side * reach, y + slot, long, short)
                pads += [(x + slot, y + side * (reach + long / 2)), (x + side * (reach + long / 2), y + slot)]
        inner = 2 * (reach - long / 2 - 1.5 * canvas.style.clearance)
        box(layer, x, y, inner, inner, inner * 0.1)
        if canvas.place(layer, pads):
            return


def bga(canvas: Canvas) -> None:
    """A grid of round pads, some missing."""
    rng = canvas.rng
    pitch = canvas.style.pad + canvas.style.clearance * float(rng.uniform(1.3, 2.2))
    for _ in range(6):
        x, y = canvas.point(40)
        grid = [
            (x + i * pitch, y + j * pitch)
            for i in range(int(rng.integers(4, 8)))
            for j in range(int(rng.integers(4, 8)))
        ]
        kept = [p for p in grid if rng.random() < 0.85]
        if _several(canvas, kept, lambda m, a, b: disc(m, a, b, canvas.style.pad / 2)):
            return


def chip(canvas: Canvas) -> None:
    """Two big pads of a resistor or capacitor."""
    rng = canvas.rng
    w, h = (canvas.style.pad * v for v in rng.uniform(0.9, 1.8, 2))
    for _ in range(6):
        x, y = canvas.point(40)
        gap = w + canvas.style.pad * float(rng.uniform(0.6, 1.4))
        pins = [(x, y), (x + gap, y)] if rng.random() < 0.5 else [(x, y), (x, y + gap + h - w)]
        corner = float(rng.choice([0.0, 0.2])) * min(w, h)
        layer = blank()
        for a, b in pins:
            box(layer, a, b, w, h, corner)
        if canvas.place(layer, pins):
            return


def via(canvas: Canvas) -> None:
    """An annular ring or a filled via."""
    size = canvas.style.pad * float(canvas.rng.uniform(0.6, 1.0))
    for _ in range(4):
        x, y = canvas.point()
        if _several(canvas, [(x, y)], lambda m, a, b: pad(canvas, m, a, b, "round", size)):
            drill(canvas, [(x, y)], size * canvas.style.drill / 2)
            return


def polygon(canvas: Canvas) -> None:
    """A pour with 45-degree or rounded corners, with holes in it."""
    rng = canvas.rng
    for _ in range(8):
        x, y = canvas.point(0)
        w, h = (float(v) for v in rng.uniform(90, 320, 2))
        layer = blank()
        box(layer, x, y, w, h, float(rng.uniform(0, 60)), round_=bool(rng.random() < 0.4))
        if canvas.style.drill:
            for _ in range(int(rng.integers(0, 4))):
                disc(
                    layer,
                    x + float(rng.uniform(-0.3, 0.3)) * w,
                    y + float(rng.uniform(-0.3, 0.3)) * h,
                    float(rng.uniform(8, 16)),
                    0,
                )
        if canvas.place(layer, [(x + w / 2, y), (x - w / 2, y)]):
            return


def frame(canvas: Canvas) -> None:
    """Nested rounded frames, cut open in places."""
    rng = canvas.rng
    for _ in range(8):
        x, y = canvas.point(60)
        w, h = (float(v) for v in rng.uniform(160, 420, 2))
        corner = float(rng.uniform(10, 40))
        layer, width = blank(), canvas.width()
        step = width + canvas.style.clearance
        for i in range(int(rng.integers(2, 5))):
            shrink = 2 * i * step
            if min(w, h) - shrink < 4 * step:
                break
            outer, inner = blank(), blank()
            box(outer, x, y, w - shrink, h - shrink, max(corner - i * step, 4), round_=True)
            box(
                inner,
                x,
                y,
                w - shrink - 2 * width,
                h - shrink - 2 * width,
                max(corner - width - i * step, 3),
                round_=True,
            )
            layer |= outer & ~inner & 1
        gap = int(canvas.style.clearance)
        layer[max(int(y), 0) : max(int(y) + gap, 0), max(int(x), 0) :] = 0
        if canvas.place(layer):
            return


def ring(canvas: Canvas) -> None:
    """A wide ring about a hole, as about a mounting hole."""
    rng = canvas.rng
    for _ in range(8):
        x, y = canvas.point(-40)
        radius = float(rng.uniform(60, 200))
        layer = blank()
        disc(layer, x, y, radius)
        disc(layer, x, y, radius * float(rng.uniform(0.45, 0.8)), 0)
        if canvas.place(layer):
            return


def arc(canvas: Canvas) -> None:
    """Concentric arcs."""
    rng = canvas.rng
    for _ in range(8):
        x, y = canvas.point(-100)
        radius, start, sweep = float(rng.uniform(80, 300)), float(rng.uniform(0, 6.3)), float(rng.uniform(1, 4))
        layer, width = blank(), canvas.width()
        turns = np.linspace(start, start + sweep, 60)
        for i in range(int(rng.integers(1, 4))):
            r = radius + i * (width + 1.3 * canvas.style.clearance)
            line(layer, np.stack([x + r * np.cos(turns), y + r * np.sin(turns)], 1), width)
        if canvas.place(layer):
            return


def fingers(canvas: Canvas) -> None:
    """A row of connector fingers from the board's edge."""
    rng = canvas.rng
    w = canvas.style.pad * float(rng.uniform(0.6, 1.1))
    h, pitch = w * float(rng.uniform(2.5, 5)), w + canvas.style.clearance * float(rng.uniform(1.1, 1.8))
    for _ in range(6):
        x, y = float(rng.uniform(0, 300)), float(rng.choice([h * 0.4, SIZE - h * 0.4, rng.uniform(h, SIZE - h)]))
        row = [(x + i * pitch, y) for i in range(int(rng.integers(4, 11)))]
        layer = blank()
        for a, b in row:
            box(layer, a, b, w, h, w * 0.3, round_=True)
        side = h / 2 if y < SIZE / 2 else -h / 2
        if canvas.place(layer, [(a, b + side) for a, b in row]):
            return


def text(canvas: Canvas) -> None:
    """A reference designator in copper."""
    rng = canvas.rng
    word = f"{rng.choice(list('CRUJQD'))}{int(rng.integers(1, 99))}"
    for _ in range(6):
        x, y = canvas.point(60)
        layer = blank()
        scale, width = float(rng.uniform(1.2, 2.2)), max(4, canvas.style.trace[0])
        cv2.putText(layer, word, (int(x), int(y)), cv2.FONT_HERSHEY_SIMPLEX, scale, 1, width)
        if canvas.place(layer):
            return


PARTS: dict[str, Callable[[Canvas], None]] = {
    part.__name__: part
    for part in (trace, bus, dip, soic, qfp, bga, chip, via, polygon, frame, ring, arc, fingers, text)
}
