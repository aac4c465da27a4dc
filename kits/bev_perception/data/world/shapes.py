"""What things look like: convex faces for the renderer and boxes for the LiDAR, in the frame of each thing.

A thing's frame has its origin on the ground below the centre of its box: x forward, y left, z up, metres.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Colour = tuple[float, float, float]
"""BGR, 0 to 255, as a camera would store it in flat light."""

CORNERS = 8
"""Corners stored for every face; faces with fewer repeat the last one."""

MATTE, PAINT, GLASS, HEADLAMP, TAILLAMP, LIT, LEAF = range(7)

TYRE: Colour = (34, 33, 32)
DARK: Colour = (46, 44, 42)
WINDOW: Colour = (74, 62, 52)
WHITE: Colour = (226, 228, 228)
RED: Colour = (40, 36, 170)
CHROME: Colour = (178, 176, 172)

PAINTS: tuple[Colour, ...] = (
    (228, 228, 226), (222, 222, 220), (188, 186, 184), (160, 158, 156), (110, 108, 106), (78, 76, 74),
    (52, 50, 50), (44, 42, 42), (50, 44, 152), (128, 74, 46), (98, 60, 36), (86, 122, 62), (120, 158, 178),
    (58, 178, 216), (60, 96, 190), (146, 116, 64),
)  # fmt: skip
CLOTHES: tuple[Colour, ...] = (
    (60, 52, 46), (96, 70, 40), (52, 48, 150), (210, 210, 208), (120, 116, 112), (44, 42, 42), (76, 118, 66),
    (70, 150, 200), (138, 108, 60), (90, 84, 172), (160, 150, 100), (46, 84, 128),
)  # fmt: skip
SKINS: tuple[Colour, ...] = ((150, 178, 214), (112, 144, 190), (74, 100, 140), (52, 70, 98))
HAIRS: tuple[Colour, ...] = ((30, 28, 28), (36, 46, 62), (70, 100, 140), (130, 130, 132))

SIZES: dict[str, tuple[Floats, Floats]] = {
    # mean and spread of width, length, height: the mean sizes of nuScenes, trailers shorter
    "car": (np.array([1.90, 4.55, 1.60]), np.array([0.08, 0.25, 0.10])),
    "truck": (np.array([2.50, 7.00, 2.95]), np.array([0.10, 0.70, 0.25])),
    "bus": (np.array([2.90, 11.2, 3.40]), np.array([0.06, 0.70, 0.12])),
    "trailer": (np.array([2.55, 8.60, 3.50]), np.array([0.08, 0.90, 0.20])),
    "construction_vehicle": (np.array([2.70, 6.30, 3.10]), np.array([0.12, 0.50, 0.18])),
    "pedestrian": (np.array([0.66, 0.72, 1.74]), np.array([0.05, 0.05, 0.09])),
    "motorcycle": (np.array([0.80, 2.10, 1.55]), np.array([0.05, 0.10, 0.08])),
    "bicycle": (np.array([0.62, 1.75, 1.70]), np.array([0.04, 0.07, 0.08])),
    "traffic_cone": (np.array([0.42, 0.42, 0.90]), np.array([0.03, 0.03, 0.12])),
    "barrier": (np.array([2.40, 0.52, 1.02]), np.array([0.12, 0.03, 0.05])),
}


@dataclass
class Model:
    """A thing's geometry; `faces` has one array for each pose of the gait (one for rigid things)."""

    faces: list[Floats]
    """(P, CORNERS, 3) each; corners run counter-clockwise seen from outside."""
    colours: Floats
    """(P, 3)."""
    materials: NDArray[np.intp]
    """(P,)."""
    parts: NDArray[np.intp]
    """(P,) convex part that the face belongs to; parts of a thing are drawn far to near."""
    boxes: Floats
    """(n, 6): centre and half size of what the LiDAR meets."""
    lamps: Floats
    """(n, 4): place of each lamp and +1 (head) or -1 (tail)."""
    ordered: bool = False
    """Parts are drawn in their own order, not far to near (what stands on top comes last)."""


@dataclass
class _Builder:
    faces: list[list[tuple[float, float, float]]] = field(default_factory=list)
    colours: list[Colour] = field(default_factory=list)
    materials: list[int] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    boxes: list[tuple[float, ...]] = field(default_factory=list)
    lamps: list[tuple[float, ...]] = field(default_factory=list)
    part: int = 0

    def face(
        self,
        corners: Floats | list[tuple[float, float, float]],
        colour: Colour,
        material: int = MATTE,
        outward: tuple[float, float, float] | None = None,
    ) -> None:
        """A convex face; with `outward` its corners are turned to run counter-clockwise seen from that side."""
        points = [(float(p[0]), float(p[1]), float(p[2])) for p in corners]
        if outward is not None:
            nx = ny = nz = 0.0
            for (ax, ay, az), (bx, by, bz) in zip(points, points[1:] + points[:1]):
                nx, ny, nz = nx + (ay - by) * (az + bz), ny + (az - bz) * (ax + bx), nz + (ax - bx) * (ay + by)
            if nx * outward[0] + ny * outward[1] + nz * outward[2] < 0:
                points.reverse()
        self.faces.append(points + points[-1:] * (CORNERS - len(points)))
        self.colours.append(colour)
        self.materials.append(material)
        self.parts.append(self.part)

    def solid(self, faces: list[tuple[Any, Colour, int]]) -> None:
        """The faces (corners, colour, material) of one convex solid, turned outward."""
        every = [p for corners, _, _ in faces for p in corners]
        centre = [sum(p[i] for p in every) / len(every) for i in range(3)]
        for corners, colour, material in faces:
            middle = [sum(p[i] for p in corners) / len(corners) - centre[i] for i in range(3)]
            self.face(corners, colour, material, (middle[0], middle[1], middle[2]))

    def loft(
        self,
        profile: list[tuple[float, float]],
        half_width: Callable[[float, float], float],
        side: Colour,
        edges: list[tuple[Colour, int]],
        material: int = PAINT,
    ) -> None:
        """A solid from a convex outline in x, z (counter-clockwise seen from the right, y = -w) and its half width."""
        right = [(x, -half_width(x, z), z) for x, z in profile]
        left = [(x, half_width(x, z), z) for x, z in profile]
        faces: list[tuple[Any, Colour, int]] = []
        for i in range(len(profile)):
            k = (i + 1) % len(profile)
            faces.append(([right[i], left[i], left[k], right[k]], *edges[i % len(edges)]))
        self.solid([*faces, (right, side, material), (left, side, material)])

    def box(
        self,
        centre: tuple[float, float, float],
        size: tuple[float, float, float],
        colour: Colour,
        material: int = MATTE,
        solid: bool = True,
    ) -> None:
        """An upright box; `solid` boxes are also met by the LiDAR."""
        (x, y, z), (dx, dy, dz) = centre, (size[0] / 2, size[1] / 2, size[2] / 2)
        outline = [(x - dx, z - dz), (x + dx, z - dz), (x + dx, z + dz), (x - dx, z + dz)]
        right = [(a, y - dy, b) for a, b in outline]
        left = [(a, y + dy, b) for a, b in outline]
        faces: list[tuple[Any, Colour, int]] = [(right, colour, material), (left, colour, material)]
        for i in range(4):
            k = (i + 1) % 4
            faces.append(([right[k], left[k], left[i], right[i]], colour, material))
        self.solid(faces)
        if solid:
            self.boxes.append((x, y, z, dx, dy, dz))

    def beam(self, a: Floats, b: Floats, thick: float, colour: Colour, wide: float | None = None) -> None:
        """A square bar between two points."""
        axis = (b - a) / np.linalg.norm(b - a)
        other = np.array([0.0, 1.0, 0.0]) if abs(axis[1]) < 0.9 else np.array([1.0, 0.0, 0.0])
        u = np.cross(axis, other)
        u *= thick / 2 / np.linalg.norm(u)
        v = np.cross(axis, u)
        v *= (wide or thick) / 2 / np.linalg.norm(v)
        ring = [u + v, -u + v, -u - v, u - v]
        faces: list[tuple[Any, Colour, int]] = [
            ([b + r for r in ring], colour, MATTE),
            ([a + r for r in ring], colour, MATTE),
        ]
        for i in range(4):
            k = (i + 1) % 4
            faces.append(([a + ring[i], b + ring[i], b + ring[k], a + ring[k]], colour, MATTE))
        self.solid(faces)

    def disc(self, centre: tuple[float, float, float], radius: float, side: int, colour: Colour) -> None:
        """An octagon facing +y (side 1) or -y (side -1)."""
        angles = np.arange(8) * np.pi / 4 + np.pi / 8
        ring = np.stack([np.cos(angles), np.zeros(8), np.sin(angles)], -1) * radius + centre
        self.face(ring, colour, MATTE, (0.0, side, 0.0))

    def plate(
        self, x: float, y: tuple[float, float], z: tuple[float, float], colour: Colour, kind: int = MATTE
    ) -> None:
        """A rectangle facing forward (x > 0) or back (x < 0)."""
        corners = [(x, y[0], z[0]), (x, y[1], z[0]), (x, y[1], z[1]), (x, y[0], z[1])]
        self.face(corners, colour, kind, (x, 0.0, 0.0))

    def side(self, y: float, x: tuple[float, float], z: tuple[float, float], colour: Colour, kind: int = MATTE) -> None:
        """A rectangle facing left (y > 0) or right (y < 0)."""
        corners = [(x[0], y, z[0]), (x[1], y, z[0]), (x[1], y, z[1]), (x[0], y, z[1])]
        self.face(corners, colour, kind, (0.0, y, 0.0))

    def wheels(self, xs: tuple[float, ...], y: float, radius: float) -> None:
        for x in xs:
            for side in (-1, 1):
                self.disc((x, side * y, radius), radius, side, TYRE)
                self.disc((x, side * (y + 0.005), radius), radius * 0.58, side, CHROME)

    def lights(self, length: float, width: float, front: tuple[float, float], rear: tuple[float, float]) -> None:
        """Head lamps, tail lamps and number plates between the given heights."""
        x = length / 2 + 0.004
        for side in (-1, 1):
            a, b = sorted((side * width * 0.29, side * width * 0.45))
            self.plate(x, (a, b), front, (224, 222, 214), HEADLAMP)
            self.plate(-x, (a, b), rear, RED, TAILLAMP)
            self.lamps.append((x, (a + b) / 2, sum(front) / 2, 1.0))
            self.lamps.append((-x, (a + b) / 2, sum(rear) / 2, -1.0))
        self.plate(-x, (-0.26, 0.26), (rear[0] - 0.2, rear[0] - 0.08), WHITE)
        self.plate(x, (-0.26, 0.26), (front[0] - 0.16, front[0] - 0.04), WHITE)

    def model(self, ordered: bool = False) -> Model:
        return Model(
            [np.asarray(self.faces)],
            np.asarray(self.colours, float),
            np.asarray(self.materials),
            np.asarray(self.parts),
            np.asarray(self.boxes, float).reshape(-1, 6),
            np.asarray(self.lamps, float).reshape(-1, 4),
            ordered,
        )


def _pick(rng: np.random.Generator, colours: tuple[Colour, ...]) -> Colour:
    return colours[int(rng.integers(0, len(colours)))]


def _dim(colour: Colour, gain: float) -> Colour:
    return (min(colour[0] * gain, 255.0), min(colour[1] * gain, 255.0), min(colour[2] * gain, 255.0))


def car(size: Floats, rng: np.random.Generator) -> Model:
    """Saloon, hatchback, estate or van: body, tapered cabin with glass, wheels, lamps."""
    w, long, h = size
    b, paint = _Builder(), _pick(rng, PAINTS)
    belt, sill = 0.57 * h, 0.13 * h
    body = [
        (-0.48 * long, sill), (0.47 * long, sill), (0.5 * long, 0.24 * h), (0.495 * long, 0.43 * h),
        (0.24 * long, belt), (-0.38 * long, belt), (-0.492 * long, 0.54 * h), (-0.5 * long, 0.26 * h),
    ]  # fmt: skip
    style = rng.random()
    if style < 0.4:
        back, tail = -0.24, -0.43  # saloon
    elif style < 0.75:
        back, tail = -0.36, -0.465  # hatchback
    else:
        back, tail = -0.44, -0.485  # estate or van
    nose = 0.30 if style > 0.9 else 0.25
    cabin = [
        (tail * long, belt - 0.02),
        (nose * long, belt - 0.02),
        (0.07 * long, 0.975 * h),
        (-0.05 * long, h),
        (back * long, 0.98 * h),
    ]

    def belly(x: float, z: float) -> float:
        return w / 2 * (1.0 if 0.2 * h < z < 0.5 * h else 0.955)

    def house(x: float, z: float) -> float:
        return w / 2 * (0.93 - 0.17 * (z - belt) / (h - belt))

    plain = (paint, PAINT)
    b.loft(
        body, belly, paint, [(DARK, MATTE), (_dim(paint, 0.5), MATTE), plain, plain, plain, plain, plain, (DARK, MATTE)]
    )
    b.boxes.append((0.0, 0.0, (sill + belt) / 2, long / 2 * 0.99, w / 2 * 0.98, (belt - sill) / 2))
    for s in (-1, 1):
        b.side(s * (w / 2 + 0.002), (-0.46 * long, 0.47 * long), (sill, 0.22 * h), _dim(DARK, 1.1))
        b.side(s * (w / 2 + 0.003), (-0.02 * long, -0.005 * long), (0.25 * h, 0.52 * h), _dim(paint, 0.55))
        b.side(s * (w / 2 + 0.003), (0.215 * long, 0.225 * long), (0.25 * h, 0.52 * h), _dim(paint, 0.55))
        b.side(s * (w / 2 + 0.004), (-0.1 * long, -0.06 * long), (0.45 * h, 0.475 * h), _dim(paint, 0.6))
    radius = 0.205 * h
    b.wheels((0.31 * long, -0.30 * long), w / 2 + 0.004, radius)
    b.plate(0.5 * long + 0.002, (-0.3 * w, 0.3 * w), (0.25 * h, 0.36 * h), DARK)
    b.lights(long, w, (0.37 * h, 0.45 * h), (0.42 * h, 0.53 * h))
    b.part = 1
    glass = (WINDOW, GLASS)
    roof = paint if rng.random() < 0.85 else (44.0, 42.0, 42.0)
    b.loft(cabin, house, paint, [(DARK, MATTE), glass, (roof, PAINT), (roof, PAINT), glass])
    for s in (-1, 1):
        for x0, x1, top0, top1 in (
            ((nose - 0.035) * long, -0.01 * long, 0.085, -0.01),
            (-0.035 * long, tail * long * 0.93, -0.035, back),
        ):
            z0, z1 = belt + 0.02, 0.945 * h
            t0, t1 = top0 * long - 0.02, max(top1 * long + 0.06, back * long + 0.08)
            corners = [(x, s * (house(x, z) + 0.006), z) for x, z in ((x0, z0), (t0, z1), (t1, z1), (x1, z0))]
            b.face(corners, WINDOW, GLASS, (0.0, s, 0.0))
        b.box((0.2 * long, s * (w / 2 * 0.97), belt + 0.03), (0.12, 0.14, 0.12), paint, PAINT, solid=False)
    b.boxes.append(
        (
            (nose * 0.7 + tail) / 2 * long,
            0.0,
            (belt + h * 0.985) / 2,
            (nose * 0.7 - tail) / 2 * long,
            w * 0.42,
            (h * 0.985 - belt) / 2,
        )
    )
    return b.model(ordered=True)


def truck(size: Floats, rng: np.random.Generator) -> Model:
    """A cab in front of a cargo box, or of an open bed."""
    w, long, h = size
    b, paint = _Builder(), _pick(rng, PAINTS)
    cargo = _pick(rng, ((226, 228, 228), (210, 212, 212), (150, 152, 154), (110, 84, 52), (60, 58, 160), (92, 128, 80)))
    split, floor = 0.5 * long - 0.27 * long, 0.32 * h
    b.box((0.0, 0.0, 0.24 * h), (0.97 * long, 0.8 * w, 0.14 * h), DARK)
    b.wheels((0.36 * long, -0.22 * long, -0.38 * long), w / 2 - 0.02, min(0.16 * h, 0.5))
    b.part = 1
    rear = split - 0.06
    height = h if rng.random() < 0.8 else 0.55 * h
    b.box(((rear - 0.5 * long) / 2, 0.0, (floor + height) / 2), (rear + 0.5 * long, w, height - floor), cargo, PAINT)
    for s in (-1, 1):
        b.side(
            s * (w / 2 + 0.004),
            (-0.45 * long, rear - 0.05 * long),
            (0.55 * height, 0.72 * height),
            _dim(paint, 0.9),
            PAINT,
        )
        b.side(s * (w / 2 + 0.004), (-0.5 * long, rear), (floor, floor + 0.09), CHROME)
    x = -0.5 * long - 0.004
    b.plate(x, (-0.008, 0.008), (floor, height), DARK)
    for y in (-0.2, 0.2):
        b.plate(x, (y * w - 0.02, y * w + 0.02), (floor, height), CHROME)
    b.part = 2
    cab = [
        (split, 0.17 * h),
        (0.5 * long, 0.17 * h),
        (0.5 * long, 0.5 * h),
        (0.455 * long, 0.84 * h),
        (split, 0.88 * h),
    ]
    b.loft(
        cab,
        lambda x, z: w / 2 * 0.96,
        paint,
        [(DARK, MATTE), (paint, PAINT), (WINDOW, GLASS), (paint, PAINT), (paint, PAINT)],
    )
    b.boxes.append(((split + 0.5 * long) / 2, 0.0, 0.5 * h, (0.5 * long - split) / 2, w * 0.47, 0.34 * h))
    for s in (-1, 1):
        b.side(s * (w / 2 * 0.96 + 0.005), (split + 0.1, 0.45 * long), (0.52 * h, 0.78 * h), WINDOW, GLASS)
        b.disc((0.36 * long, s * (w / 2 * 0.96 + 0.006), 0.16 * h), min(0.16 * h, 0.5), s, TYRE)
        b.disc((0.36 * long, s * (w / 2 * 0.96 + 0.008), 0.16 * h), min(0.16 * h, 0.5) * 0.55, s, CHROME)
    b.plate(0.5 * long + 0.003, (-0.36 * w, 0.36 * w), (0.22 * h, 0.42 * h), DARK)
    b.lights(long, w, (0.2 * h, 0.26 * h), (0.24 * h, 0.3 * h))
    return b.model()


def bus(size: Floats, rng: np.random.Generator) -> Model:
    """A city bus: bands of windows, doors on the right, a bright sign."""
    w, long, h = size
    b = _Builder()
    paint = _pick(rng, ((52, 50, 176), (150, 96, 42), (82, 140, 60), (220, 222, 222), (52, 150, 214)))
    trim = _pick(rng, ((226, 228, 228), (60, 58, 56)))
    b.box((0.0, 0.0, h * 0.54), (long, w, h * 0.92), paint, PAINT)
    for s in (-1, 1):
        y = s * (w / 2 + 0.004)
        b.side(y, (-long / 2, long / 2), (0.08 * h, 0.2 * h), trim)
        for k in range(6):
            x = -0.46 * long + k * 0.152 * long
            b.side(y, (x, x + 0.14 * long), (0.48 * h, 0.82 * h), WINDOW, LIT)
        if s < 0:
            for x in (0.36 * long, -0.05 * long):
                b.side(y * 1.001, (x, x + 0.1 * long), (0.12 * h, 0.82 * h), WINDOW, LIT)
    b.wheels((0.3 * long, -0.28 * long), w / 2 + 0.006, 0.48)
    b.plate(long / 2 + 0.003, (-0.46 * w, 0.46 * w), (0.36 * h, 0.82 * h), WINDOW, GLASS)
    b.plate(long / 2 + 0.004, (-0.36 * w, 0.36 * w), (0.86 * h, 0.95 * h), (60, 160, 230), LIT)
    b.plate(-long / 2 - 0.003, (-0.4 * w, 0.4 * w), (0.5 * h, 0.8 * h), WINDOW, GLASS)
    b.plate(-long / 2 - 0.003, (-0.42 * w, 0.42 * w), (0.14 * h, 0.44 * h), _dim(paint, 0.6))
    b.lights(long, w, (0.2 * h, 0.27 * h), (0.22 * h, 0.34 * h))
    return b.model()


def trailer(size: Floats, rng: np.random.Generator) -> Model:
    """A box trailer on rear axles and legs."""
    w, long, h = size
    b = _Builder()
    paint = _pick(rng, ((226, 228, 228), (214, 210, 200), (130, 88, 48), (58, 54, 150), (96, 130, 84)))
    b.box((0.0, 0.0, 0.3 * h), (0.96 * long, 0.4 * w, 0.1 * h), DARK)
    b.wheels((-0.26 * long, -0.38 * long), w / 2 - 0.06, 0.48)
    b.box((0.36 * long, 0.0, 0.16 * h), (0.12, 0.7 * w, 0.32 * h), DARK)
    b.part = 1
    b.box((0.0, 0.0, 0.67 * h), (long, w, 0.66 * h), paint, PAINT)
    for s in (-1, 1):
        b.side(s * (w / 2 + 0.004), (-0.5 * long, 0.5 * long), (0.34 * h, 0.37 * h), CHROME)
        for k in range(1, 6):
            x = (-0.5 + k / 6) * long
            b.side(s * (w / 2 + 0.004), (x - 0.02, x + 0.02), (0.38 * h, 0.99 * h), _dim(paint, 0.75))
    b.plate(-long / 2 - 0.004, (-0.02, 0.02), (0.36 * h, 0.98 * h), DARK)
    for side in (-1, 1):
        a, c = sorted((side * w * 0.3, side * w * 0.46))
        b.plate(-long / 2 - 0.005, (a, c), (0.26 * h, 0.32 * h), RED, TAILLAMP)
    return b.model()


def construction_vehicle(size: Floats, rng: np.random.Generator) -> Model:
    """An excavator or a wheel loader in yellow."""
    w, long, h = size
    b = _Builder()
    yellow = _pick(rng, ((42, 172, 232), (36, 150, 226), (50, 120, 228)))
    if rng.random() < 0.5:
        for s in (-1, 1):
            b.box((-0.16 * long, s * 0.39 * w, 0.14 * h), (0.62 * long, 0.22 * w, 0.28 * h), TYRE)
    else:
        b.box((-0.1 * long, 0.0, 0.22 * h), (0.66 * long, 0.6 * w, 0.16 * h), DARK)
        for s in (-1, 1):
            for x in (0.14 * long, -0.34 * long):
                b.box((x, s * 0.4 * w, 0.2 * h), (0.4 * h, 0.18 * w, 0.36 * h), TYRE)
                b.disc((x, s * (0.49 * w + 0.005), 0.2 * h), 0.1 * h, s, yellow)
    b.part = 1
    b.box((-0.26 * long, 0.0, 0.46 * h), (0.48 * long, 0.88 * w, 0.34 * h), yellow, PAINT)
    b.side(0.44 * w + 0.004, (-0.46 * long, -0.2 * long), (0.38 * h, 0.52 * h), DARK)
    b.side(-0.44 * w - 0.004, (-0.46 * long, -0.2 * long), (0.38 * h, 0.52 * h), DARK)
    b.part = 2
    b.box((-0.12 * long, 0.2 * w, 0.79 * h), (0.24 * long, 0.4 * w, 0.42 * h), WINDOW, GLASS)
    b.box((-0.12 * long, 0.2 * w, 0.985 * h), (0.26 * long, 0.44 * w, 0.03 * h), yellow)
    b.part = 3
    a, c, e = (
        np.array([0.0, -0.15 * w, 0.5 * h]),
        np.array([0.3 * long, -0.15 * w, 0.95 * h]),
        np.array([0.45 * long, -0.15 * w, 0.3 * h]),
    )
    b.beam(a, c, 0.32, yellow)
    b.beam(c, e, 0.26, yellow)
    b.boxes.append((0.15 * long, -0.15 * w, 0.72 * h, 0.15 * long, 0.13, 0.2 * h))
    b.boxes.append((0.38 * long, -0.15 * w, 0.6 * h, 0.07 * long, 0.13, 0.3 * h))
    b.part = 4
    b.box((0.43 * long, -0.15 * w, 0.14 * h), (0.14 * long, 0.5 * w, 0.28 * h), (70, 72, 76))
    return b.model()


def _person(
    b: _Builder, h: float, base: Floats, phase: float, look: tuple[Colour, Colour, Colour, Colour], seated: bool = False
) -> None:
    """Legs, torso, arms and head; `phase` swings the limbs, `seated` bends them as on a saddle."""
    shirt, trousers, skin, hair = look
    hip, shoulder = 0.48 * h, 0.82 * h
    swing = 0.30 * h * np.sin(phase) * 0.62
    first = b.part
    for n, s in enumerate((-1, 1)):
        b.part = first + n
        top = base + np.array([0.0, s * 0.055 * h, hip])
        if seated:
            knee = top + np.array([0.20 * h, 0.0, -0.10 * h])
            foot = knee + np.array([-0.07 * h, 0.0, -0.24 * h + 0.06 * h * np.sin(phase) * s])
            b.beam(top, knee, 0.085 * h, trousers)
            b.beam(knee, foot, 0.07 * h, trousers)
        else:
            foot = base + np.array([s * swing, s * 0.05 * h, 0.03 * h])
            knee = (top + foot) / 2 + np.array([0.03 * h * abs(np.sin(phase)), 0.0, 0.0])
            b.beam(foot, knee, 0.07 * h, trousers)
            b.beam(knee, top, 0.09 * h, trousers)
            b.box((foot[0] + 0.03 * h, foot[1], 0.02 * h), (0.13 * h, 0.055 * h, 0.04 * h), TYRE, solid=False)
    b.part = first + 2
    lean = np.array([0.12 * h, 0.0, 0.0]) if seated else np.zeros(3)
    low, high = base + np.array([0.0, 0.0, hip - 0.02 * h]), base + lean + np.array([0.0, 0.0, shoulder])
    b.beam(low, (low + high) / 2, 0.115 * h, shirt, wide=0.17 * h)
    b.beam((low + high) / 2, high, 0.125 * h, shirt, wide=0.225 * h)
    b.part = first + 3
    neck = high + np.array([0.01 * h, 0.0, 0.0])
    angles = np.arange(8) * np.pi / 4
    ring = np.stack([np.cos(angles) * 0.058 * h, np.sin(angles) * 0.048 * h], -1)
    z0, z1, z2 = neck[2] + 0.015 * h, neck[2] + 0.11 * h, min(neck[2] + 0.175 * h, 0.999 * h + base[2])
    faces: list[tuple[Any, Colour, int]] = []
    for i in range(8):
        k = (i + 1) % 8
        p, q = neck[:2] + ring[i], neck[:2] + ring[k]
        back = abs(angles[i] + np.pi / 8 - np.pi) < 1.8
        faces.append(([(*p, z0), (*q, z0), (*q, z1), (*p, z1)], hair if back else skin, MATTE))
        brow = [(*p, z1), (*q, z1), (*(neck[:2] + ring[k] * 0.75), z2), (*(neck[:2] + ring[i] * 0.75), z2)]
        faces.append((brow, hair, MATTE))
    b.solid([*faces, ([(*(neck[:2] + r * 0.75), z2) for r in ring], hair, MATTE)])
    for n, s in enumerate((-1, 1)):
        b.part = first + 4 + n
        top = high + np.array([0.0, s * 0.135 * h, -0.02 * h])
        if seated:
            hand = top + np.array([0.22 * h, s * 0.02 * h, -0.17 * h])
        else:
            hand = top + np.array([-s * swing * 0.7, s * 0.025 * h, -0.34 * h])
        elbow = (top + hand) / 2 + np.array([-0.02 * h, s * 0.01 * h, 0.0])
        b.beam(elbow, top, 0.062 * h, shirt)
        b.beam(hand, elbow, 0.05 * h, skin)


def pedestrian(size: Floats, rng: np.random.Generator) -> Model:
    """A person in four phases of the gait (the first one stands)."""
    look = (_pick(rng, CLOTHES), _pick(rng, CLOTHES), _pick(rng, SKINS), _pick(rng, HAIRS))
    h = float(size[2])
    phases: list[Model] = []
    for phase in (0.08, 0.5 * np.pi, np.pi, 1.5 * np.pi):
        b = _Builder()
        _person(b, h, np.zeros(3), phase, look)
        b.boxes = [
            (0.0, 0.0, 0.26 * h, 0.12 * h, 0.09 * h, 0.26 * h),
            (0.0, 0.0, 0.68 * h, 0.07 * h, 0.15 * h, 0.16 * h),
        ]
        b.boxes.append((0.01 * h, 0.0, 0.92 * h, 0.06 * h, 0.05 * h, 0.075 * h))
        phases.append(b.model())
    phases[0].faces = [m.faces[0] for m in phases]
    return phases[0]


def _wheel_ring(b: _Builder, x: float, radius: float, thick: float, colour: Colour) -> None:
    """A wheel seen from both sides: its rim as eight strips, or a full disc where the tyre is thick."""
    if thick > 0.08:
        for s in (-1, 1):
            b.disc((x, s * thick / 2, radius), radius, s, colour)
            b.disc((x, s * (thick / 2 + 0.004), radius), radius * 0.55, s, CHROME)
        return
    angles = np.arange(9) * np.pi / 4
    ring = np.stack([np.cos(angles), np.zeros(9), np.sin(angles)], -1)
    centre = np.array([x, 0.0, radius])
    for i in range(8):
        strip = [centre + ring[i] * radius, centre + ring[i + 1] * radius]
        strip += [centre + ring[i + 1] * radius * 0.82, centre + ring[i] * radius * 0.82]
        b.face(strip, colour, MATTE, (0.0, 1.0, 0.0))
        b.face(strip, colour, MATTE, (0.0, -1.0, 0.0))


def _cycle(size: Floats, rng: np.random.Generator, motor: bool) -> Model:
    w, long, h = size
    paint, rider = _pick(rng, PAINTS), h > 1.35
    look = (_pick(rng, CLOTHES), _pick(rng, CLOTHES), _pick(rng, SKINS), _pick(rng, HAIRS))
    radius = 0.16 * long if motor else 0.19 * long
    phases: list[Model] = []
    for phase in (0.0, 0.5 * np.pi, np.pi, 1.5 * np.pi):
        b = _Builder()
        front, rear = 0.5 * long - radius, -0.5 * long + radius
        for x in (front, rear):
            _wheel_ring(b, x, radius, 0.13 if motor else 0.04, TYRE)
        b.part = 1
        saddle, bar = np.array([-0.1 * long, 0.0, 0.5 * h]), np.array([0.26 * long, 0.0, 0.6 * h])
        if motor:
            b.box((0.0, 0.0, radius + 0.12), (0.42 * long, 0.22, 0.3), DARK)
            b.box((0.02 * long, 0.0, 0.44 * h), (0.5 * long, 0.24, 0.22), paint, PAINT)
            b.beam(np.array([front, 0.0, radius]), bar, 0.1, paint)
            b.lamps += [(0.34 * long, 0.0, 0.52 * h, 1.0), (-0.36 * long, 0.0, 0.44 * h, -1.0)]
            b.plate(0.34 * long, (-0.1, 0.1), (0.46 * h, 0.58 * h), (224, 222, 214), HEADLAMP)
            b.plate(-0.36 * long, (-0.08, 0.08), (0.4 * h, 0.48 * h), RED, TAILLAMP)
        else:
            crank = np.array([-0.04 * long, 0.0, radius])
            for a, c in ((crank, saddle), (crank, bar), (saddle, bar), (np.array([front, 0.0, radius]), bar)):
                b.beam(a, c, 0.05, paint)
            b.beam(np.array([rear, 0.0, radius]), saddle, 0.04, paint)
            b.lamps.append((-0.3 * long, 0.0, 0.42 * h, -1.0))
        b.beam(bar + np.array([0.0, -0.45 * w, 0.0]), bar + np.array([0.0, 0.45 * w, 0.0]), 0.05, DARK)
        b.boxes.append((0.0, 0.0, 0.2 * h, 0.48 * long, 0.12 if motor else 0.07, 0.2 * h))
        b.part = 2
        if rider:
            scale = 1.74 * h / 1.75
            base = np.array([-0.1 * long, 0.0, h - scale * 0.998])
            _person(b, scale, base, phase, look, seated=True)
            b.boxes.append((-0.02 * long, 0.0, 0.68 * h, 0.15 * h, 0.14 * h, 0.18 * h))
            b.boxes.append((0.04 * long, 0.0, 0.92 * h, 0.07 * h, 0.06 * h, 0.07 * h))
        phases.append(b.model())
    phases[0].faces = [m.faces[0] for m in phases]
    return phases[0]


def motorcycle(size: Floats, rng: np.random.Generator) -> Model:
    """A motorcycle, with a rider where its box is higher than 1.35 m."""
    return _cycle(size, rng, True)


def bicycle(size: Floats, rng: np.random.Generator) -> Model:
    """A bicycle, with a rider where its box is higher than 1.35 m."""
    return _cycle(size, rng, False)


def traffic_cone(size: Floats, rng: np.random.Generator) -> Model:
    """An orange cone with a white band on a square foot."""
    w, long, h = size
    b = _Builder()
    b.box((0.0, 0.0, 0.03 * h), (long, w, 0.06 * h), (40, 44, 60), solid=False)
    b.part = 1
    angles = np.arange(7) * np.pi / 3
    ring = np.stack([np.cos(angles), np.sin(angles)], -1) * 0.4 * w
    orange: Colour = (30, 92, 232)
    bands = ((0.06, 0.4, orange), (0.4, 0.62, WHITE), (0.62, 1.0, orange))
    for low, high, colour in bands:
        r0, r1 = 1.0 - 0.86 * low, 1.0 - 0.86 * high
        for i in range(6):
            p, q = ring[i], ring[i + 1]
            corners = [(*(p * r0), low * h), (*(q * r0), low * h), (*(q * r1), high * h), (*(p * r1), high * h)]
            b.face(corners, colour, MATTE, (p[0] + q[0], p[1] + q[1], 0.01))
    b.boxes.append((0.0, 0.0, 0.25 * h, 0.36 * w, 0.36 * w, 0.25 * h))
    b.boxes.append((0.0, 0.0, 0.74 * h, 0.16 * w, 0.16 * w, 0.24 * h))
    return b.model(ordered=True)


def barrier(size: Floats, rng: np.random.Generator) -> Model:
    """A plastic or concrete barrier: wide across (y), thin along (x)."""
    w, long, h = size
    b = _Builder()
    colour = _pick(rng, ((52, 66, 206), (40, 96, 226), (214, 216, 218), (168, 170, 172), (206, 208, 208)))
    foot, neck = 0.5 * long, 0.18 * long
    profile = [
        (-foot, 0.0),
        (foot, 0.0),
        (foot, 0.16 * h),
        (neck, 0.5 * h),
        (neck, h),
        (-neck, h),
        (-neck, 0.5 * h),
        (-foot, 0.16 * h),
    ]
    # two convex parts: the foot and the wall on it
    b.loft(profile[:4] + [(-neck, 0.5 * h), (-foot, 0.16 * h)], lambda x, z: w / 2, colour, [(colour, MATTE)], MATTE)
    b.boxes.append((0.0, 0.0, 0.25 * h, 0.4 * long, w / 2, 0.25 * h))
    b.part = 1
    b.box((0.0, 0.0, 0.75 * h), (2 * neck, w, 0.5 * h), colour)
    stripe: Colour = WHITE if colour[2] > 200 and colour[0] < 100 else (50, 62, 200)
    if rng.random() < 0.5:
        for side in (-1, 1):
            for k in range(3):
                y = (-0.4 + 0.3 * k) * w
                b.plate(side * (neck + 0.004), (y, y + 0.16 * w), (0.68 * h, 0.9 * h), stripe)
    return b.model(ordered=True)


MODELS: dict[str, Callable[[Floats, np.random.Generator], Model]] = {
    "car": car,
    "truck": truck,
    "bus": bus,
    "trailer": trailer,
    "construction_vehicle": construction_vehicle,
    "pedestrian": pedestrian,
    "motorcycle": motorcycle,
    "bicycle": bicycle,
    "traffic_cone": traffic_cone,
    "barrier": barrier,
}


def draw_size(kind: str, rng: np.random.Generator) -> Floats:
    """A size (width, length, height) in centimetre steps from the kind's distribution, within two spreads."""
    mean, spread = SIZES[kind]
    return np.round(mean + spread * np.clip(rng.normal(size=3), -2.0, 2.0), 2)


def lamp_post(height: float = 7.5) -> Model:
    """A street lamp whose arm reaches forward (x) over the road."""
    b = _Builder()
    grey: Colour = (120, 122, 122)
    b.beam(np.array([0.0, 0.0, 0.0]), np.array([0.0, 0.0, height]), 0.16, grey)
    b.beam(np.array([0.0, 0.0, height]), np.array([1.8, 0.0, height + 0.25]), 0.1, grey)
    b.box((2.1, 0.0, height + 0.22), (0.7, 0.26, 0.1), (200, 206, 208), LIT, solid=False)
    b.boxes.append((0.0, 0.0, height / 2, 0.08, 0.08, height / 2))
    return b.model()


def trunk(height: float) -> Model:
    """The trunk of a tree; its crown is drawn as discs that face the camera."""
    b = _Builder()
    b.beam(np.array([0.0, 0.0, 0.0]), np.array([0.0, 0.0, height * 0.6]), 0.28, (52, 66, 80))
    return b.model()
