"""A town: streets in a grid, what lines them (buildings, trees, lamps), the look of the ground, and routes."""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LANE = 3.5
PARKING = 2.3
SIDEWALK = 3.2
RESOLUTION = 0.1
"""Metres a pixel of the ground's picture and of the map mask."""

DIRECTIONS = ((1, 0), (0, 1), (-1, 0), (0, -1))
"""East, north, west, south."""


@dataclass(frozen=True)
class Street:
    """A straight street along one axis: its centre on the other axis and the lanes each way."""

    centre: float
    lanes: int

    @property
    def half(self) -> float:
        """Metres from the centre to the kerb."""
        return self.lanes * LANE + PARKING


@dataclass(frozen=True)
class Town:
    """`xs` run north-south at their x, `ys` run east-west at their y."""

    xs: tuple[Street, ...]
    ys: tuple[Street, ...]

    def street(self, crossing: tuple[int, int], direction: int) -> Street:
        """The street one is on when driving in `direction` at a crossing."""
        return self.xs[crossing[0]] if direction % 2 else self.ys[crossing[1]]

    @property
    def extent(self) -> tuple[float, float]:
        """East and north end of the town in metres; west and south end are 0."""
        return self.xs[-1].centre + 60.0, self.ys[-1].centre + 60.0


def build_town(seed: int, streets: int = 8) -> Town:
    """A grid of `streets` x `streets` with uneven blocks; one street in three has two lanes each way."""
    rng = np.random.default_rng([seed, 101])

    def line() -> tuple[Street, ...]:
        at = 60.0 + np.concatenate([[0.0], np.cumsum(rng.uniform(64.0, 100.0, streets - 1))])
        return tuple(Street(float(round(a, 1)), 2 if rng.random() < 0.33 else 1) for a in at)

    return Town(line(), line())


def map_mask(town: Town) -> NDArray[np.uint8]:
    """Drivable area (255) of the whole town, row 0 in the north as in nuScenes, RESOLUTION metres a pixel."""
    width, height = (int(np.ceil(e / RESOLUTION)) for e in town.extent)
    mask = np.zeros((height, width), np.uint8)
    for s in town.xs:
        mask[:, round((s.centre - s.half) / RESOLUTION) : round((s.centre + s.half) / RESOLUTION)] = 255
    for s in town.ys:
        top, bottom = height - (s.centre + s.half) / RESOLUTION, height - (s.centre - s.half) / RESOLUTION
        mask[round(top) : round(bottom)] = 255
    return mask


@dataclass
class Path:
    """A way to drive: points every half metre with heading, and where it meets the stop line of each crossing."""

    points: Floats
    yaw: Floats
    stops: list[tuple[float, tuple[int, int], int]] = field(default_factory=list)
    moves: list[str] = field(default_factory=list)

    STEP = 0.5

    @property
    def length(self) -> float:
        """Metres."""
        return (len(self.points) - 1) * self.STEP

    def at(self, s: float) -> tuple[float, float, float]:
        """x, y and heading at `s` metres from the start; beyond an end the path goes straight on."""
        k = s / self.STEP
        i = int(np.clip(np.floor(k), 0, len(self.points) - 2))
        a, b = self.points[i], self.points[i + 1]
        x, y = a + (b - a) * (k - i)
        f = float(np.clip(k - i, 0.0, 1.0))
        turn = (self.yaw[i + 1] - self.yaw[i] + np.pi) % (2 * np.pi) - np.pi
        return float(x), float(y), float(self.yaw[i] + f * turn)


def path_through(points: Floats) -> tuple[Floats, Floats]:
    """A polyline resampled to Path.STEP, with headings smoothed over about two metres."""
    points = points[np.r_[True, np.linalg.norm(np.diff(points, axis=0), axis=1) > 1e-6]]
    along = np.r_[0.0, np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))]
    s = np.arange(0.0, along[-1], Path.STEP)
    xy = np.stack([np.interp(s, along, points[:, i]) for i in (0, 1)], -1)
    step = np.gradient(xy, axis=0)
    kernel = np.ones(5) / 5
    step = np.stack([np.convolve(np.pad(step[:, i], 2, mode="edge"), kernel, "valid") for i in (0, 1)], -1)
    return xy, np.unwrap(np.arctan2(step[:, 1], step[:, 0]))


def route(
    town: Town,
    crossing: tuple[int, int],
    direction: int,
    before: float,
    lane: int,
    moves: list[str],
    extra: float = 0.0,
) -> Path:
    """The path that starts `before` metres ahead of a crossing and takes `moves` (straight, left, right) in turn.

    `lane` counts from the middle of the street; `extra` metres shift to the right (cyclists). Left turns leave from
    and arrive in the same lane. The path ends 60 m after its last crossing or at the town's edge.
    """
    points: list[Floats] = []
    stops: list[tuple[float, tuple[int, int], int]] = []
    taken: list[str] = []
    length = 0.0
    for move in [*moves, "end"]:
        street = town.street(crossing, direction)
        cross = town.street(crossing, direction + 1)
        forward, right = _axes(direction)
        middle = np.array([town.xs[crossing[0]].centre, town.ys[crossing[1]].centre])
        offset = (min(lane, street.lanes - 1) + 0.5) * LANE + extra
        entry = middle + right * offset - forward * (cross.half + 1.0)
        if not points:
            points.append(entry - forward * max(before - cross.half, 1.0))
        length += float(np.linalg.norm(entry - points[-1]))
        stops.append((length - 2.5, crossing, direction))
        points.append(entry)
        if move == "end":
            points.append(entry + forward * 80.0)
            break
        taken.append(move)
        after = (direction + {"straight": 0, "left": 1, "right": -1}[move]) % 4
        new_forward, new_right = _axes(after)
        new_street = town.street(crossing, after)
        clear = (street if move != "straight" else cross).half + 1.0
        new_offset = (min(lane, new_street.lanes - 1) + 0.5) * LANE + extra
        leave = middle + new_right * new_offset + new_forward * clear
        if move != "straight":
            corner = middle + right * offset + new_right * new_offset
            t = np.linspace(0.0, 1.0, 24)[1:, None]
            # a cubic that keeps to both lanes at its ends: a quarter circle within a few centimetres
            a, b = entry + (corner - entry) * 0.56, leave + (corner - leave) * 0.56
            curve = (1 - t) ** 3 * entry + 3 * (1 - t) ** 2 * t * a + 3 * (1 - t) * t**2 * b + t**3 * leave
            length += float(np.linalg.norm(np.diff(np.vstack([entry, curve]), axis=0), axis=1).sum())
            points.extend(curve)
        else:
            length += float(np.linalg.norm(leave - points[-1]))
            points.append(leave)
        direction = after
        step = DIRECTIONS[direction]
        crossing = (crossing[0] + step[0], crossing[1] + step[1])
        if not (0 <= crossing[0] < len(town.xs) and 0 <= crossing[1] < len(town.ys)):
            points.append(points[-1] + new_forward * 80.0)
            break
    xy, yaw = path_through(np.asarray(points))
    return Path(xy, yaw, stops, taken)


def _axes(direction: int) -> tuple[Floats, Floats]:
    """Unit vectors forward and to the right."""
    dx, dy = DIRECTIONS[direction % 4]
    return np.array([dx, dy], float), np.array([dy, -dx], float)


@dataclass
class Dressing:
    """What stands still beside the streets of a region, in world metres."""

    region: tuple[float, float, float, float]
    """x0, y0, x1, y1."""
    buildings: Floats
    """(n, 5): x0, y0, x1, y1, height."""
    styles: NDArray[np.intp]
    """(n,) index into the renderer's facades."""
    trees: Floats
    """(n, 4): x, y, height, crown radius."""
    lamps: Floats
    """(n, 3): x, y, heading of the arm towards the road."""
    lots: Floats
    """(n, 4): x0, y0, x1, y1 of open plots with parked cars."""


def dress(town: Town, region: tuple[float, float, float, float], rng: np.random.Generator, styles: int) -> Dressing:
    """Line the streets inside `region`: buildings along every block's edge, some plots left open, trees and lamps."""
    buildings: list[tuple[float, ...]] = []
    lots: list[tuple[float, ...]] = []
    tall = rng.uniform(0.7, 1.5)
    for i in range(-1, len(town.xs)):
        for j in range(-1, len(town.ys)):
            x0 = town.xs[i].centre + town.xs[i].half + SIDEWALK if i >= 0 else -60.0
            y0 = town.ys[j].centre + town.ys[j].half + SIDEWALK if j >= 0 else -60.0
            east, north = i + 1 < len(town.xs), j + 1 < len(town.ys)
            x1 = town.xs[i + 1].centre - town.xs[i + 1].half - SIDEWALK if east else town.extent[0] + 60.0
            y1 = town.ys[j + 1].centre - town.ys[j + 1].half - SIDEWALK if north else town.extent[1] + 60.0
            if x1 < region[0] or x0 > region[2] or y1 < region[1] or y0 > region[3]:
                continue
            for plot in _plots(x0, y0, x1, y1, rng):
                if rng.random() < 0.8:
                    storeys = rng.integers(2, 9) if rng.random() < 0.85 else rng.integers(9, 16)
                    buildings.append((*plot, 4.2 + tall * 3.1 * float(storeys)))
                else:
                    lots.append(plot)
    trees, lamps = _along_kerbs(town, region, rng)
    return Dressing(
        region,
        np.asarray(buildings).reshape(-1, 5),
        rng.integers(0, styles, len(buildings)),
        trees,
        lamps,
        np.asarray(lots).reshape(-1, 4),
    )


def _plots(
    x0: float, y0: float, x1: float, y1: float, rng: np.random.Generator
) -> list[tuple[float, float, float, float]]:
    """Plots around the edge of a block: rows in the south and north, columns between them."""
    plots: list[tuple[float, float, float, float]] = []
    depth = float(rng.uniform(11.0, 16.0))
    for south in (True, False):
        x = x0
        while x < x1 - 6.0:
            width = float(rng.uniform(10.0, 22.0))
            end = x1 if x1 - (x + width) < 8.0 else x + width
            back = float(rng.uniform(0.0, 1.2))
            plots.append((x, y0 + back, end, y0 + depth) if south else (x, y1 - depth, end, y1 - back))
            x = end
    for west in (True, False):
        y = y0 + depth
        while y < y1 - depth - 3.0:
            width = float(rng.uniform(10.0, 22.0))
            end = y1 - depth if y1 - depth - (y + width) < 8.0 else y + width
            back = float(rng.uniform(0.0, 1.2))
            plots.append((x0 + back, y, x0 + depth, end) if west else (x1 - depth, y, x1 - back, end))
            y = end
    return plots


def _along_kerbs(
    town: Town, region: tuple[float, float, float, float], rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """Trees and lamps on the sidewalks, clear of the crossings."""
    trees: list[tuple[float, ...]] = []
    lamps: list[tuple[float, ...]] = []
    for vertical, streets, others in ((True, town.xs, town.ys), (False, town.ys, town.xs)):
        low, high = (region[1], region[3]) if vertical else (region[0], region[2])
        near, far = (region[0], region[2]) if vertical else (region[1], region[3])
        for street in streets:
            green = rng.random() < 0.75
            for side in (-1, 1):
                kerb = street.centre + side * street.half
                if not near - 5 < kerb < far + 5:
                    continue
                along = low + float(rng.uniform(0, 10))
                count = int(rng.integers(0, 3))
                while along < high:
                    clear = all(abs(along - o.centre) > o.half + SIDEWALK + 4.0 for o in others)
                    if clear and count % 3 == 0:
                        at = kerb + side * 0.5
                        yaw = (np.pi if side > 0 else 0.0) if vertical else (-np.pi / 2 if side > 0 else np.pi / 2)
                        lamps.append((at, along, yaw) if vertical else (along, at, yaw))
                    elif clear and green and rng.random() < 0.65:
                        at = kerb + side * 1.1
                        shape = (float(rng.uniform(5.0, 9.5)), float(rng.uniform(1.5, 2.8)))
                        trees.append((at, along, *shape) if vertical else (along, at, *shape))
                    count += 1
                    along += float(rng.uniform(8.5, 11.0))
    return np.asarray(trees).reshape(-1, 4), np.asarray(lamps).reshape(-1, 3)


def ground(town: Town, dressing: Dressing, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A picture of the ground of the region from above, (H, W, 3) BGR; row 0 is the region's south edge."""
    x0, y0, x1, y1 = dressing.region
    canvas = _Canvas(x0, y0, x1, y1)
    grass, paving = (62, 96, 78), (142, 146, 150)
    canvas.picture[:] = paving if rng.random() < 0.5 else grass
    for a, b, c, d in dressing.lots.tolist():
        canvas.box(a, b, c, d, (96, 96, 98) if rng.random() < 0.6 else grass)
    asphalt = rng.integers(74, 104, len(town.xs) + len(town.ys))
    lines = (True, False)
    for vertical in lines:
        for s in town.xs if vertical else town.ys:
            canvas.strip(vertical, s.centre - s.half - SIDEWALK, s.centre + s.half + SIDEWALK, (150, 153, 156))
    _tiles(canvas, town)
    for vertical in lines:
        for s in town.xs if vertical else town.ys:
            canvas.strip(vertical, s.centre - s.half - 0.3, s.centre + s.half + 0.3, (176, 178, 180))
            canvas.strip(vertical, s.centre - s.half - 0.08, s.centre + s.half + 0.08, (88, 90, 92))
    for n, s in enumerate(town.xs + town.ys):
        grey = int(asphalt[n])
        canvas.strip(n < len(town.xs), s.centre - s.half, s.centre + s.half, (grey + 2, grey, grey - 1))
    _wear(canvas, town, rng)
    _markings(canvas, town, rng)
    return _grain(canvas.picture, rng)


class _Canvas:
    """Draws on the ground's picture in world metres."""

    def __init__(self, x0: float, y0: float, x1: float, y1: float) -> None:
        self.x0, self.y0, self.x1, self.y1 = x0, y0, x1, y1
        shape = (round((y1 - y0) / RESOLUTION), round((x1 - x0) / RESOLUTION), 3)
        self.picture = np.zeros(shape, np.uint8)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: tuple[int, int, int]) -> None:
        """Fill a rectangle; edges are rounded to pixels so that lines keep their width."""
        left, right = round((x0 - self.x0) / RESOLUTION), round((x1 - self.x0) / RESOLUTION)
        bottom, top = round((y0 - self.y0) / RESOLUTION), round((y1 - self.y0) / RESOLUTION)
        self.picture[max(bottom, 0) : max(top, 0), max(left, 0) : max(right, 0)] = colour

    def strip(self, vertical: bool, a: float, b: float, colour: tuple[int, int, int]) -> None:
        """Fill from a to b across, the whole region along."""
        if vertical:
            self.box(a, self.y0, b, self.y1, colour)
        else:
            self.box(self.x0, a, self.x1, b, colour)

    def across(
        self, vertical: bool, a: float, b: float, start: float, end: float, colour: tuple[int, int, int]
    ) -> None:
        """Fill from a to b across a street and from start to end along it."""
        if vertical:
            self.box(a, start, b, end, colour)
        else:
            self.box(start, a, end, b, colour)


def _tiles(canvas: _Canvas, town: Town) -> None:
    """Joints of the sidewalk's slabs."""
    joint = (128, 131, 134)
    for vertical in (True, False):
        low, high = (canvas.y0, canvas.y1) if vertical else (canvas.x0, canvas.x1)
        for s in town.xs if vertical else town.ys:
            for side in (-1, 1):
                a, b = sorted((s.centre + side * s.half, s.centre + side * (s.half + SIDEWALK)))
                for along in np.arange(np.ceil(low), high, 1.6):
                    canvas.across(vertical, a, b, along, along + 0.1, joint)
                canvas.across(vertical, (a + b) / 2, (a + b) / 2 + 0.1, low, high, joint)


def _wear(canvas: _Canvas, town: Town, rng: np.random.Generator) -> None:
    """Patches, tyre tracks, cracks, stains and manholes."""
    picture = canvas.picture
    tint = np.zeros(picture.shape[:2], np.int16)
    shape = tint.shape
    for vertical in (True, False):
        low = canvas.x0 if vertical else canvas.y0
        for s in town.xs if vertical else town.ys:
            for lane in range(s.lanes):
                for side in (-1, 1):
                    for wheel in (-0.75, 0.75):
                        at = s.centre + side * (lane + 0.5) * LANE + wheel - low
                        a, b = max(round((at - 0.25) / RESOLUTION), 0), max(round((at + 0.25) / RESOLUTION), 0)
                        if vertical:
                            tint[:, a:b] -= 6
                        else:
                            tint[a:b] -= 6
    area = shape[0] * shape[1] * RESOLUTION**2
    for _ in range(int(area / 220)):
        h, w = rng.integers(8, 60, 2)
        y, x = int(rng.integers(0, shape[0])), int(rng.integers(0, shape[1]))
        tint[y : y + h, x : x + w] += int(rng.integers(-16, 9))
    for _ in range(int(area / 160)):
        start = np.array([rng.integers(0, shape[1]), rng.integers(0, shape[0])], float)
        steps = np.cumsum(rng.normal(0, 1, (12, 2)) * 3 + rng.normal(0, 1, 2) * 6, axis=0) + start
        cv2.polylines(tint, [steps.astype(np.int32)], False, -22, 1)
    for _ in range(int(area / 260)):
        centre = (int(rng.integers(0, shape[1])), int(rng.integers(0, shape[0])))
        cv2.circle(tint, centre, int(rng.integers(2, 9)), int(rng.integers(-20, -6)), -1)
    for _ in range(int(area / 900)):
        cv2.circle(tint, (int(rng.integers(0, shape[1])), int(rng.integers(0, shape[0]))), 4, -38, -1)
    cv2.add(picture, cv2.merge([tint, tint, tint]), dst=picture, dtype=cv2.CV_8U)


def _markings(canvas: _Canvas, town: Town, rng: np.random.Generator) -> None:
    """Centre and lane lines, parking bays, stop lines, zebra crossings; crossings themselves stay bare."""
    white, yellow = (205, 208, 208), (70, 178, 214)
    low_x, low_y = canvas.x0, canvas.y0
    for vertical in (True, False):
        streets, others = (town.xs, town.ys) if vertical else (town.ys, town.xs)
        low, high = (low_y, canvas.y1) if vertical else (low_x, canvas.x1)
        edges = [o.centre + side * (o.half + 5.5) for o in others for side in (-1, 1)]
        stretches = list(zip([low, *edges[1::2]], [*edges[0::2], high]))
        for s in streets:
            double = rng.random() < 0.5
            for a, b in stretches:
                if b <= a:
                    continue
                for shift in (-0.2, 0.1) if double else ():
                    canvas.across(vertical, s.centre + shift, s.centre + shift + 0.1, a, b, yellow)
                for along in () if double else np.arange(a, b, 6.0):
                    canvas.across(vertical, s.centre - 0.1, s.centre + 0.1, along, min(along + 3.0, b), white)
                for lane in range(1, s.lanes):
                    for side in (-1, 1):
                        at = s.centre + side * lane * LANE
                        for along in np.arange(a, b, 6.0):
                            canvas.across(vertical, at - 0.1, at + 0.1, along, min(along + 2.5, b), white)
                for side in (-1, 1):
                    at = s.centre + side * s.lanes * LANE
                    canvas.across(vertical, at - 0.05, at + 0.05, a, b, white)
                    for along in np.arange(a, b, 6.2):
                        bay = sorted((at, at + side * 2.0))
                        canvas.across(vertical, bay[0], bay[1], along, along + 0.1, white)
            for o in others:
                for side in (-1, 1):
                    near = o.centre + side * (o.half + 0.8)
                    for at in np.arange(s.centre - s.half + 0.4, s.centre + s.half - 0.4, 1.0):
                        start, end = sorted((near, near + side * 2.6))
                        canvas.across(vertical, at, at + 0.5, start, end, white)
                    # right-hand traffic: who comes from the south drives east of the centre
                    lanes = s.lanes * LANE
                    a, b = (s.centre - lanes, s.centre) if vertical == (side > 0) else (s.centre, s.centre + lanes)
                    start, end = sorted((near + side * 3.4, near + side * 3.8))
                    canvas.across(vertical, a, b, start, end, white)


def _grain(picture: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Fine grain and slow drift of brightness over the whole ground."""
    height, width = picture.shape[:2]
    fine = rng.normal(0.0, 5.0, (512, 512)).astype(np.float32)
    slow = rng.normal(0.0, 5.0, (height // 40 + 2, width // 40 + 2)).astype(np.float32)
    coarse = np.asarray(cv2.resize(slow, (width, height)), np.float32)
    coarse += np.tile(fine, (height // 512 + 1, width // 512 + 1))[:height, :width]
    drift = coarse.astype(np.int16)
    return np.asarray(cv2.add(picture, cv2.merge([drift, drift, drift]), dtype=cv2.CV_8U))
