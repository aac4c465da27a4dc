"""Who is on the streets and how they move: a scene's actors with their tracks at 10 Hz, and the ego car's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kits.bev_perception.data.world.shapes import MODELS, Model, draw_size
from kits.bev_perception.data.world.town import (
    DIRECTIONS,
    LANE,
    PARKING,
    SIDEWALK,
    Dressing,
    Path,
    Town,
    dress,
    route,
)

Floats = NDArray[np.float64]

TICK = 0.1
"""Seconds between two states of the world, the LiDAR's period."""
KEYFRAME_TICKS = 5
EGO_SIZE = (1.73, 4.08, 1.56)
"""Width, length, height of the car that carries the sensors; its origin is on the ground 1.0 m behind its centre."""
EGO_CENTRE = 1.0
EVENTS = ("cut-in", "dart-out")
FACADES = 6


@dataclass
class Actor:
    """One thing that boxes are written for. Tracks are (T, 3): x, y, heading of the box's ground centre."""

    kind: str
    size: Floats
    """Width, length, height in metres."""
    model: Model
    track: Floats
    role: str = "moving"
    """moving, parked, standing: what decides attributes and lamps."""

    def speeds(self) -> Floats:
        """(T,) metres a second."""
        if len(self.track) < 2:
            return np.zeros(len(self.track))
        return np.linalg.norm(np.gradient(self.track[:, :2], TICK, axis=0), axis=1)

    def attribute(self, speed: float) -> str:
        """The nuScenes attribute at a speed, "" where the class has none."""
        if self.kind == "pedestrian":
            return "pedestrian.moving" if speed > 0.2 else "pedestrian.standing"
        if self.kind in ("bicycle", "motorcycle"):
            return "cycle.with_rider" if self.size[2] > 1.35 else "cycle.without_rider"
        if self.kind in ("traffic_cone", "barrier"):
            return ""
        if self.role == "parked":
            return "vehicle.parked"
        return "vehicle.moving" if speed > 0.2 else "vehicle.stopped"


@dataclass
class Event:
    """A sudden obstacle: which actor, of what kind, and the tick at which it is first seen."""

    actor: int
    kind: str
    tick: int = -1


@dataclass
class Scene:
    """Everything that stands and moves, without any light."""

    seed: tuple[int, ...]
    town: Town
    dressing: Dressing
    actors: list[Actor]
    ego: Floats
    """(T, 3): x, y, heading."""
    moves: list[str]
    event: Event | None

    @property
    def ticks(self) -> int:
        """States at 10 Hz."""
        return len(self.ego)


def build_scene(town: Town, seed: tuple[int, ...], samples: int, event: str | None) -> Scene:
    """A scene of `samples` keyframes somewhere in the town, with the sudden obstacle `event` or none."""
    rng = np.random.default_rng([*seed, 202])
    ticks = (samples - 1) * KEYFRAME_TICKS + 1
    n = len(town.xs)
    crossing = (int(rng.integers(2, n - 2)), int(rng.integers(2, n - 2)))
    direction = int(rng.integers(0, 4))
    moves = [str(m) for m in rng.choice(["straight", "left", "right"], 3, p=[0.34, 0.33, 0.33])]
    before = float(rng.uniform(22.0, 60.0))
    speed = float(rng.uniform(6.5, 10.5))
    lane = int(rng.integers(0, 2))
    if event:
        # the obstacle waits at the kerb, so ego drives in the lane beside it, on a street without a turn
        moves[0], lane, before, speed = "straight", 1, float(rng.uniform(40.0, 58.0)), float(rng.uniform(7.5, 9.5))
    ego_path = route(town, crossing, direction, before, lane, moves)
    reach = ego_path.points[: int(16.0 * ticks * TICK / Path.STEP) + 20]
    low, high = reach.min(0) - 85.0, reach.max(0) + 85.0
    region = (float(low[0]), float(low[1]), float(high[0]), float(high[1]))
    dressing = dress(town, region, rng, FACADES)
    crowd = _Crowd(town, dressing, ego_path, rng, ticks)
    story = crowd.stage(event, speed) if event else None
    crowd.work_zones()
    crowd.park()
    crowd.walkers()
    crowd.traffic(speed, clear_ahead=event is not None)
    ego, actors = crowd.run()
    return Scene(seed, town, dressing, actors, ego, ego_path.moves, story)


@dataclass
class _Driver:
    """Someone who follows a path and keeps a distance (intelligent driver model)."""

    path: Path
    s: float
    speed: float
    wish: float
    size: Floats
    actor: Actor | None
    start: int = 0
    """Tick at which a waiting one sets off."""
    trigger: float | None = None
    """Sets off once ego is this near (metres along the street)."""
    blind: bool = False
    """Does not look ahead."""


class _Crowd:
    """Fills a scene step by step; what is placed first is respected by what comes later."""

    def __init__(self, town: Town, dressing: Dressing, ego_path: Path, rng: np.random.Generator, ticks: int) -> None:
        self.town, self.dressing, self.ego_path, self.rng, self.ticks = town, dressing, ego_path, rng, ticks
        self.actors: list[Actor] = []
        self.drivers: list[_Driver] = []
        self.taken: list[tuple[float, float, float]] = []
        """Places at the kerb that are used: x, y, radius."""

    def _still(self, kind: str, x: float, y: float, yaw: float, role: str, size: Floats | None = None) -> int:
        size = draw_size(kind, self.rng) if size is None else size
        track = np.tile([x, y, yaw], (self.ticks, 1))
        self.actors.append(Actor(kind, size, MODELS[kind](size, self.rng), track, role))
        self.taken.append((x, y, float(size[1]) / 2 + 0.6))
        return len(self.actors) - 1

    def _free(self, x: float, y: float, radius: float) -> bool:
        return all((x - a) ** 2 + (y - b) ** 2 > (radius + r) ** 2 for a, b, r in self.taken)

    def stage(self, event: str, speed: float) -> Event:
        """A truck at the kerb hides who comes out before ego when ego is near."""
        rng, path = self.rng, self.ego_path
        stop = path.stops[0][0]
        # ego drives freely until it is `gap` short of the obstacle, about half way through the scene
        gap = float(rng.uniform(15.0, 19.0))
        options = np.arange(26.0, path.length - 60.0, 1.0)
        cross = self.town.street(path.stops[0][1], path.stops[0][2] + 1)
        bare = (stop - 9.0, stop + 2.5 + 2 * (cross.half + 1.0) + 14.0)
        options = options[(options < bare[0]) | (options > bare[1])]
        wanted = speed * self.ticks * TICK * float(rng.uniform(0.3, 0.6)) + gap
        front = float(options[np.argmin(np.abs(options - wanted))])
        x, y, yaw = path.at(front)
        right = np.array([np.sin(yaw), -np.cos(yaw)])
        size = draw_size("truck", rng)
        size[2] = max(size[2], 2.9)
        model = MODELS["truck"](size, np.random.default_rng(rng.integers(0, 2**31)))
        aside = LANE / 2 + PARKING / 2 - 0.05
        place = np.array([x, y]) + right * aside - np.array([np.cos(yaw), np.sin(yaw)]) * float(size[1]) / 2
        self.actors.append(Actor("truck", size, model, np.tile([*place, yaw], (self.ticks, 1)), "parked"))
        self.taken.append((float(place[0]), float(place[1]), float(size[1]) / 2 + 1.0))
        kind = "pedestrian" if event == "dart-out" else "car"
        body = draw_size(kind, rng)
        ahead = 1.0 if kind == "pedestrian" else float(body[1]) / 2 + 1.3
        sx, sy, _ = path.at(front + ahead)
        spot = np.array([sx, sy]) + right * (aside + (0.25 if kind == "pedestrian" else 0.12))
        if kind == "pedestrian":
            across = np.linspace(0.0, 16.0, 33)[:, None]
            line = spot - right * across
            way = Path(line, np.full(len(line), yaw + np.pi / 2))
            pace = float(rng.uniform(2.4, 3.6))
        else:
            forward = np.array([np.cos(yaw), np.sin(yaw)])
            t = np.linspace(0.0, 1.0, 40)[:, None]
            ease = t**2 * (3 - 2 * t)
            line = spot + forward * (t * 13.0) - right * (ease * (aside + 0.12))
            line = np.vstack([line, line[-1] + forward * np.arange(1.0, 90.0)[:, None]])
            along = np.r_[0.0, np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))]
            s = np.arange(0.0, along[-1], Path.STEP)
            xy = np.stack([np.interp(s, along, line[:, i]) for i in (0, 1)], -1)
            step = np.gradient(xy, axis=0)
            way, pace = Path(xy, np.unwrap(np.arctan2(step[:, 1], step[:, 0]))), 6.5
            self.taken.append((float(spot[0] + forward[0] * 6), float(spot[1] + forward[1] * 6), 8.0))
        track = np.tile([*spot, way.yaw[0]], (self.ticks, 1))
        actor = Actor(kind, body, MODELS[kind](body, np.random.default_rng(rng.integers(0, 2**31))), track)
        self.actors.append(actor)
        self.taken.append((float(spot[0]), float(spot[1]), float(body[1]) / 2 + 1.0))
        self.drivers.append(_Driver(way, 0.0, 0.0, pace, body, actor, trigger=gap + ahead, blind=True))
        self.event_at = front + ahead
        return Event(len(self.actors) - 1, event)

    def _kerbs(self) -> list[tuple[bool, float, int, float, float]]:
        """Stretches of kerb between crossings in the region: vertical?, kerb, side (+1 high), start, end."""
        found = []
        x0, y0, x1, y1 = self.dressing.region
        for vertical, streets, others in ((True, self.town.xs, self.town.ys), (False, self.town.ys, self.town.xs)):
            low, high = (y0, y1) if vertical else (x0, x1)
            near, far = (x0, x1) if vertical else (y0, y1)
            for s in streets:
                if not near < s.centre < far:
                    continue
                cuts = [low, *(o.centre + e * (o.half + 11.0) for o in others for e in (-1, 1)), high]
                for a, b in zip(cuts[0::2], cuts[1::2]):
                    a, b = max(a, low), min(b, high)
                    if b - a > 8.0:
                        found += [(vertical, s.centre + side * s.half, side, a, b) for side in (-1, 1)]
        return found

    def park(self) -> None:
        """Cars, vans, now and then a trailer, a bus or a leaning bicycle along the kerbs; cars on open plots."""
        rng = self.rng
        busy = rng.uniform(0.2, 0.45)
        for vertical, kerb, side, start, end in self._kerbs():
            along = start + float(rng.uniform(0.0, 4.0))
            while along < end - 6.0:
                if rng.random() > busy:
                    along += 6.2
                    continue
                draw = float(rng.random())
                shares = (("truck", 0.10), ("trailer", 0.13), ("bus", 0.08), ("construction_vehicle", 0.05))
                kind = next((k for i, (k, _) in enumerate(shares) if draw < sum(s for _, s in shares[: i + 1])), "car")
                size = draw_size(kind, rng)
                middle = along + float(size[1]) / 2
                at = kerb - side * (float(size[0]) / 2 + float(rng.uniform(0.15, 0.4)))
                x, y = (at, middle) if vertical else (middle, at)
                yaw = (np.pi / 2 if side > 0 else -np.pi / 2) if vertical else (np.pi if side > 0 else 0.0)
                if middle + float(size[1]) / 2 < end and self._free(x, y, float(size[1]) / 2):
                    self._still(kind, x, y, yaw + float(rng.normal(0.0, 0.02)), "parked", size)
                along += float(size[1]) + float(rng.uniform(0.9, 2.2))
        for x0, y0, x1, y1 in self.dressing.lots:
            turn = float(rng.uniform(-np.pi, np.pi))
            for x in np.arange(x0 + 2.5, x1 - 2.5, 3.2):
                for y in np.arange(y0 + 3.5, y1 - 3.5, 7.5):
                    if rng.random() < 0.2:
                        self._still("car", float(x), float(y), turn + float(rng.normal(0, 0.05)), "parked")
        for vertical, kerb, side, start, end in self._kerbs():
            if rng.random() < 0.4:
                kind = "bicycle" if rng.random() < 0.5 else "motorcycle"
                size = draw_size(kind, rng)
                size[2] = round(float(size[2]) * 0.66, 2)
                along, at = float(rng.uniform(start, end)), kerb + side * 0.75
                x, y = (at, along) if vertical else (along, at)
                self._still(kind, x, y, float(rng.uniform(-np.pi, np.pi)), "parked", size)

    def work_zones(self) -> None:
        """Barriers, cones, a worker and perhaps a machine at a few stretches of kerb near ego's route."""
        rng = self.rng
        near = [k for k in self._kerbs() if self._distance_to_route(k) < 14.0]
        for n in rng.permutation(len(near))[: int(rng.integers(2, 5))]:
            vertical, kerb, side, start, end = near[int(n)]
            panels = int(rng.integers(4, 10))
            length = min(panels * 2.6 + 8.0, end - start)
            first = start + float(rng.uniform(0.0, max(end - start - length, 0.0))) + 7.0
            yaw = 0.0 if vertical else np.pi / 2
            along_street = np.pi / 2 - yaw
            spots: list[tuple[str, float, float, float]] = []
            if rng.random() < 0.75:
                machine = float(rng.uniform(-0.15, 0.15)) + along_street
                spots.append(("construction_vehicle", kerb - side * 0.3, first + panels * 1.3, machine))
            spots += [("barrier", kerb - side * 2.2, first + 1.3 + 2.6 * k, yaw) for k in range(panels)]
            spots += [("traffic_cone", kerb - side * (0.4 + 0.45 * k), first - 1.3 * (5 - k), 0.0) for k in range(5)]
            for _ in range(int(rng.integers(1, 3))):
                at = first + panels * float(rng.uniform(1.9, 2.6))
                spots.append(("pedestrian", kerb - side * float(rng.uniform(0.2, 1.4)), at, float(rng.uniform(-3, 3))))
            for kind, across, along, heading in spots:
                x, y = (across, along) if vertical else (along, across)
                radius = {"barrier": 0.3, "construction_vehicle": 2.5}.get(kind, -0.3)
                if start < along < end and self._free(x, y, radius):
                    role = "standing" if kind == "pedestrian" else "parked"
                    self._still(kind, x, y, heading + float(rng.normal(0, 0.03)), role)
                    self.taken[-1] = (x, y, 0.9 if kind != "construction_vehicle" else 1.2)

    def _distance_to_route(self, kerb: tuple[bool, float, int, float, float]) -> float:
        points = self.ego_path.points[:260:4]
        vertical, at, _, start, end = kerb
        across, along = (points[:, 0], points[:, 1]) if vertical else (points[:, 1], points[:, 0])
        beside = (along > start) & (along < end)
        return float(np.abs(across - at)[beside].min()) if beside.sum() > 3 else np.inf

    def walkers(self) -> None:
        """Pedestrians along the sidewalks, alone and in pairs, some standing, some on zebra crossings."""
        rng = self.rng
        for vertical, kerb, side, start, end in self._kerbs():
            near = self._distance_to_route((vertical, kerb, side, start - 20, end + 20))
            count = int(rng.poisson((end - start) * (0.075 if near < 16.0 else 0.012)))
            for _ in range(count):
                along, at = float(rng.uniform(start, end)), kerb + side * float(rng.uniform(1.4, SIDEWALK - 0.4))
                if rng.random() < 0.22:
                    x, y = (at, along) if vertical else (along, at)
                    if self._free(x, y, 0.3):
                        self._still("pedestrian", x, y, float(rng.uniform(-np.pi, np.pi)), "standing")
                        self.taken.pop()
                    continue
                pace = float(rng.uniform(0.9, 1.7)) * (1 if rng.random() < 0.5 else -1)
                for friend in range(2 if rng.random() < 0.3 else 1):
                    self._walk(vertical, at - side * 0.75 * friend, along, pace)
        for vertical, streets, others in ((True, self.town.xs, self.town.ys), (False, self.town.ys, self.town.xs)):
            for s in streets:
                for o in others:
                    middle = np.array([s.centre, o.centre] if vertical else [o.centre, s.centre])
                    if np.abs(self.ego_path.points[:240] - middle).sum(1).min() > 25.0 or rng.random() < 0.35:
                        continue
                    # over the street `s`, on the zebra beside `o`; they begin anywhere on their way
                    at = o.centre + float(rng.choice([-1, 1])) * (o.half + 2.2)
                    pace = float(rng.uniform(1.0, 1.6)) * float(rng.choice([-1, 1]))
                    self._walk(not vertical, at, s.centre + float(rng.uniform(-12, 12)) - pace * 4.0, pace)

    def _walk(self, vertical: bool, at: float, along: float, pace: float) -> None:
        rng = self.rng
        time = np.arange(self.ticks) * TICK
        sway = 0.12 * np.sin(time * rng.uniform(0.3, 0.8) + rng.uniform(0, 6))
        across, ahead = at + sway, along + pace * time
        xy = np.stack([across, ahead] if vertical else [ahead, across], -1)
        yaw = (np.pi / 2 if vertical else 0.0) + (0.0 if pace > 0 else np.pi)
        size = draw_size("pedestrian", rng)
        if rng.random() < 0.12:
            size = np.round(size * [0.8, 0.8, 0.7], 2)
        track = np.column_stack([xy, np.full(self.ticks, yaw)])
        self.actors.append(Actor("pedestrian", size, MODELS["pedestrian"](size, rng), track))

    def traffic(self, speed: float, clear_ahead: bool) -> None:
        """Moving vehicles on lanes within reach of ego; ego is the first driver."""
        rng, town = self.rng, self.town
        ego = _Driver(self.ego_path, 1.0, speed, speed, np.asarray(EGO_SIZE), None)
        self.drivers.insert(0, ego)
        used = [np.array(self.ego_path.at(1.0)[:2])]
        anchor = self.ego_path.points[:200:10]
        wanted = int(rng.integers(16, 27))
        for _ in range(wanted * 7):
            if len(self.drivers) > wanted:
                break
            on_route = rng.random() < 0.6
            stop = self.ego_path.stops[int(rng.integers(0, min(2, len(self.ego_path.stops))))]
            crossing, direction = stop[1], stop[2]
            if on_route:
                direction = (direction + 2 * int(rng.integers(0, 2))) % 4
                step = DIRECTIONS[direction]
                shift = int(rng.integers(-1, 2))
                crossing = (crossing[0] + shift * step[0], crossing[1] + shift * step[1])
            else:
                direction = int(rng.integers(0, 4))
                crossing = (crossing[0] + int(rng.integers(-1, 2)), crossing[1] + int(rng.integers(-1, 2)))
            if not (0 <= crossing[0] < len(town.xs) and 0 <= crossing[1] < len(town.ys)):
                continue
            draw = float(rng.random())
            kind = "car"
            for name, share in (("bicycle", 0.1), ("motorcycle", 0.1), ("bus", 0.09), ("truck", 0.13)):
                if draw < share:
                    kind = name
                    break
                draw -= share
            moves = [str(m) for m in rng.choice(["straight", "left", "right"], 3, p=[0.6, 0.15, 0.25])]
            lane, extra = int(rng.integers(0, 2)), 0.0
            if kind == "bicycle":
                lane, extra, moves = 1, 1.1, ["straight"] * 3
            path = route(town, crossing, direction, float(rng.uniform(20.0, 85.0)), lane, moves, extra)
            size = draw_size(kind, rng)
            x, y, yaw = path.at(float(size[1]) / 2)
            here = np.array([x, y])
            room = 7.0 + float(size[1]) / 2
            if min(float(np.linalg.norm(here - u)) for u in used) < room:
                continue
            if float(np.linalg.norm(anchor - here, axis=1).min()) > 70.0:
                continue
            offset = self.ego_path.points - here
            ahead = np.hypot(*offset.T) < 2.5
            if clear_ahead and ahead.any() and np.argmax(ahead) * Path.STEP < self.event_at + 60.0:
                continue
            if not self._free(x, y, float(size[1]) / 2 - 1.0):
                continue
            used.append(here)
            pace = float(rng.uniform(3.0, 5.0)) if kind == "bicycle" else float(rng.uniform(6.0, 11.0))
            actor = Actor(kind, size, MODELS[kind](size, rng), np.zeros((self.ticks, 3)))
            self.actors.append(actor)
            self.drivers.append(_Driver(path, float(size[1]) / 2, pace * 0.8, pace, size, actor))

    def run(self) -> tuple[Floats, list[Actor]]:
        """Drive everyone for all ticks; returns ego's track and the actors."""
        drivers, rng = self.drivers, self.rng
        red = self._signals(rng)
        ego_track = np.zeros((self.ticks, 3))
        driven = {id(d.actor) for d in drivers}
        feet = np.array([a.track[:, :2] for a in self.actors if a.role == "moving" and id(a) not in driven])
        feet = feet.reshape(-1, self.ticks, 2)
        places = np.zeros((len(drivers), 3, 2))
        for tick in range(self.ticks):
            for n, d in enumerate(drivers):
                x, y, yaw = d.path.at(d.s)
                if d.actor is not None:
                    d.actor.track[tick] = x, y, yaw
                    reach = float(d.size[1]) / 2
                else:
                    cos, sin = np.cos(yaw), np.sin(yaw)
                    ego_track[tick] = x - cos * EGO_CENTRE, y - sin * EGO_CENTRE, yaw
                    reach = EGO_SIZE[1] / 2
                axis = np.array([np.cos(yaw), np.sin(yaw)]) * reach
                places[n] = np.array([x, y]) + np.array([-1.0, 0.0, 1.0])[:, None] * axis
            for n, d in enumerate(drivers):
                if d.trigger is not None:
                    x, y, _ = d.path.at(d.s)
                    if float(np.hypot(*(places[0, 1] - (x, y)))) > d.trigger + 1.0:
                        continue
                    d.trigger = None
                self._drive(n, d, places, feet[:, tick], red)
        return ego_track, self.actors

    def _signals(self, rng: np.random.Generator) -> set[tuple[int, int, int]]:
        """Approaches (crossing, direction) that face red for the whole scene; ego's own never do."""
        red: set[tuple[int, int, int]] = set()
        ego = {stop[1]: (stop[2], move) for stop, move in zip(self.ego_path.stops, [*self.ego_path.moves, "straight"])}
        for i in range(len(self.town.xs)):
            for j in range(len(self.town.ys)):
                direction, move = ego.get((i, j), (int(rng.integers(0, 4)), "straight"))
                green = {direction} if move == "left" else {direction, (direction + 2) % 4}
                red |= {(i, j, d) for d in range(4) if d not in green}
        return red

    def _drive(self, n: int, d: _Driver, places: Floats, feet: Floats, red: set[tuple[int, int, int]]) -> None:
        """One step of the intelligent driver model: keep the distance to whoever is on the path ahead."""
        gap, lead = np.inf, 0.0
        half = float(d.size[1]) / 2
        if not d.blind:
            first = int(max(d.s + half, 0.0) / Path.STEP)
            ahead = d.path.points[first : first + 60 : 2]
            if len(ahead):
                others = np.concatenate([places[:n].reshape(-1, 2), places[n + 1 :].reshape(-1, 2), feet])
                middle = ahead[len(ahead) // 2]
                near = np.flatnonzero(np.abs(others - middle).max(1) < 18.0)
                close = ((ahead[:, None] - others[near][None]) ** 2).sum(2) < 1.75**2
                hit = close.any(1)
                if hit.any():
                    k = int(np.argmax(hit))
                    which = int(near[int(np.argmax(close[k]))]) // 3
                    which += which >= n
                    gap, lead = k * 2 * Path.STEP, self.drivers[which].speed if which < len(self.drivers) else 0.0
            for at, crossing, direction in d.path.stops:
                if (*crossing, direction) in red and d.s + half < at + 1.0 and at - d.s - half < gap:
                    gap, lead = at - d.s - half, 0.0
        curve = self._bend(d)
        wish = min(d.wish, curve)
        keep = 2.0 + max(0.0, d.speed * 1.1 + d.speed * (d.speed - lead) / (2 * np.sqrt(1.6 * 3.0)))
        change = 1.6 * (1.0 - (d.speed / max(wish, 0.1)) ** 4 - (keep / max(gap, 0.3)) ** 2)
        if d.blind:
            change = 4.0 if d.actor is not None and d.actor.kind == "pedestrian" else 2.8
        speed = float(np.clip(d.speed + np.clip(change, -7.5, 4.0) * TICK, 0.0, d.wish))
        d.s += (d.speed + speed) / 2 * TICK
        d.speed = speed

    def _bend(self, d: _Driver) -> float:
        """The speed that the next bend allows at 2.5 m/s2 across."""
        i = int(d.s / Path.STEP)
        yaw = d.path.yaw[i : i + 24 : 3]
        if len(yaw) < 2:
            return d.wish
        bend = float(np.abs(np.diff(yaw)).max()) / (3 * Path.STEP)
        return float(np.sqrt(2.5 / max(bend, 1e-3)))
