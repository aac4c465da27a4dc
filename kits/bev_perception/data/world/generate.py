"""Writes a generated world as a nuScenes v1.0 folder."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from core.kit import InputError
from core.progress import progress
from kits.bev_perception.data.world.actors import EVENTS, KEYFRAME_TICKS, Scene, build_scene
from kits.bev_perception.data.world.lidar import sweep
from kits.bev_perception.data.world.light import LIGHTS
from kits.bev_perception.data.world.raster import Stage, visible_shares
from kits.bev_perception.data.world.render import LEVELS, Look, render
from kits.bev_perception.data.world.rig import CAMERAS, View, view
from kits.bev_perception.data.world.tables import SceneRows, fixed_rows, timestamp, visibility_level, write_tables
from kits.bev_perception.data.world.town import RESOLUTION, build_town, map_mask

ANNOTATED = 75.0
"""Metres around ego within which boxes are written."""
SIGHT = (400, 225)
"""Size of the drawings that visibility is counted in, whatever size the pictures have."""
QUALITY = 90
"""JPEG."""
TRIES = 6
"""Scenes tried until a sudden obstacle is hidden first and seen later."""


@dataclass(frozen=True)
class Plan:
    """One geometry with the scenes that show it, each in its own light."""

    world: str
    seed: tuple[int, ...]
    town_seed: int
    event: str | None
    scenes: tuple[tuple[int, str, str], ...]
    """(number, name, light) of each."""
    samples: int
    size: tuple[int, int]
    lidar_sweeps: bool
    camera_sweeps: bool
    supersample: int


def generate_world(
    out: Path,
    scenes: int = 2,
    seed: int = 0,
    *,
    samples: int = 20,
    size: tuple[int, int] = (800, 450),
    lights: tuple[str, ...] = ("day", "night"),
    paired: str = "all",
    val_share: float = 0.2,
    event_share: float = 0.3,
    lidar_sweeps: bool = True,
    camera_sweeps: bool = False,
    supersample: int = 2,
    version: str = "v1.0-mini",
    workers: int = 2,
    quiet: bool = False,
) -> Path:
    """Write `scenes` scenes of `samples` keyframes at 2 Hz to `out` and return it; same arguments, same bytes.

    `size` is the pictures' width and height; `lights` (day, night, rain, night-rain) take turns over the scenes.
    `paired` says which scenes share their geometry between lights: "all", "val" or "none". The last `val_share` of
    the geometries is the split `val`, the others are `train`. `event_share` of the geometries hold a sudden obstacle.
    Sweeps between keyframes come at 10 Hz. `supersample` squared points are looked at for each pixel. With `workers`
    above 1 the work is spread over processes that start afresh (`spawn`), so a script that calls this needs
    the usual `if __name__ == "__main__"`.

    Besides the thirteen tables the folder of the version holds `splits.json` and `events.json`; CAN-bus poses lie in
    `can_bus/`. Raises InputError for arguments that make no world and for a folder that already holds one.
    """
    out = Path(out)
    _check(scenes, samples, size, lights, paired, supersample)
    if (out / version / "scene.json").exists():
        raise InputError(f"{out}: already holds {version}; name another folder or delete it first")
    town = build_town(seed)
    world = f"{LABEL}/{seed}"
    plans = _plan(world, scenes, seed, samples, size, lights, paired, val_share, event_share)
    plans = [
        Plan(**{**vars(p), "lidar_sweeps": lidar_sweeps, "camera_sweeps": camera_sweeps, "supersample": supersample})
        for p in plans
    ]
    for kind in ("samples", "sweeps"):
        for channel in (*CAMERAS, "LIDAR_TOP"):
            if kind == "samples" or (lidar_sweeps if channel == "LIDAR_TOP" else camera_sweeps):
                (out / kind / channel).mkdir(parents=True, exist_ok=True)
    for name in ("maps", "can_bus", version):
        (out / name).mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(out / "maps" / "town.png"), map_mask(town))
    # few geometries: their keyframes are dealt out, so that every worker has something to do
    parts = -(-workers // len(plans)) if workers > 1 else 1
    jobs = [(k, part) for k in range(len(plans)) for part in range(parts)]
    done: dict[tuple[int, int], Part] = {}
    with progress("world", scenes * samples, quiet=quiet) as bar:
        if workers > 1:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=_one_thread) as pool:
                futures = {pool.submit(build, plans[k], out, part, parts): (k, part) for k, part in jobs}
                for future in as_completed(futures):
                    done[futures[future]] = future.result()
                    bar.advance(steps=future.result().made)
        else:
            with _single_thread():
                for k, part in jobs:
                    done[k, part] = build(plans[k], out, part, parts)
                    bar.advance(steps=done[k, part].made)
    rows = fixed_rows(world, size, "maps/town.png")
    events: list[dict[str, Any]] = []
    for k in range(len(plans)):
        for other in range(1, parts):
            done[k, 0].seen.update(done[k, other].seen)
        for box in done[k, 0].rows["sample_annotation"]:
            box["visibility_token"], box["num_lidar_pts"] = done[k, 0].seen[box["token"]]
        for name, more in done[k, 0].rows.items():
            rows[name].extend(more)
        events.extend(done[k, 0].events)
    write_tables(out / version, rows)
    _write(out / version / "splits.json", _splits(plans, _val_count(scenes, lights, paired, val_share)))
    _write(out / version / "events.json", events)
    return out


LABEL = "fitkit-world-1"
"""Goes into every token; changes when the same seed gives another world."""


def _check(
    scenes: int, samples: int, size: tuple[int, int], lights: tuple[str, ...], paired: str, supersample: int
) -> None:
    if scenes < 1 or samples < 2:
        raise InputError(f"a world needs at least 1 scene of 2 samples, not {scenes} of {samples}")
    if min(size) < 32 or max(size) > 1600:
        raise InputError(f"size {size[0]}x{size[1]}: width and height must lie between 32 and 1600 pixels")
    if unknown := [name for name in lights if name not in LIGHTS]:
        raise InputError(f"light {unknown[0]!r} is not known; known are {', '.join(LIGHTS)}")
    if not lights or len(set(lights)) < len(lights):
        raise InputError("lights must name at least one light, each once")
    if paired not in ("all", "val", "none"):
        raise InputError(f"paired={paired!r} is not known; known are all, val, none")
    if supersample not in (1, 2, 3):
        raise InputError(f"supersample={supersample} is not known; known are 1, 2, 3")


def _plan(
    world: str,
    scenes: int,
    seed: int,
    samples: int,
    size: tuple[int, int],
    lights: tuple[str, ...],
    paired: str,
    val_share: float,
    event_share: float,
) -> list[Plan]:
    """Spread scenes over geometries: those of `val` last, sudden obstacles evenly."""
    val = _val_count(scenes, lights, paired, val_share)
    groups: list[list[str]] = []
    for count, pair in ((scenes - val, paired == "all"), (val, paired in ("all", "val"))):
        step = len(lights) if pair else 1
        for first in range(0, count, step):
            turn = range(first, min(first + step, count))
            groups.append([lights[i % len(lights)] for i in turn])
    plans: list[Plan] = []
    number, owed = 0, 0.0
    for k, group in enumerate(groups):
        owed += event_share
        event = None
        if owed >= 1.0 - 1e-9 or (k == 0 and event_share >= 0.3):
            owed -= 1.0
            event = EVENTS[sum(p.event is not None for p in plans) % len(EVENTS)]
        members = []
        for name in group:
            members.append((number, f"scene-{number + 1:04d}", name))
            number += 1
        plans.append(Plan(world, (seed, k), seed, event, tuple(members), samples, size, True, False, 2))
    return plans


def _val_count(scenes: int, lights: tuple[str, ...], paired: str, val_share: float) -> int:
    """Scenes of the split `val`: a whole number of geometries."""
    step = len(lights) if paired in ("all", "val") else 1
    return min(round(scenes * val_share / step) * step, scenes)


def _splits(plans: list[Plan], val: int) -> dict[str, list[str]]:
    names = [name for plan in plans for _, name, _ in plan.scenes]
    return {"all": names, "train": names[: len(names) - val], "val": names[len(names) - val :]}


def _write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _one_thread() -> None:
    cv2.setNumThreads(1)


@contextmanager
def _single_thread() -> Iterator[None]:
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


@dataclass
class Part:
    """What comes of some keyframes of a geometry; rows and events come with the first part alone."""

    made: int
    rows: dict[str, list[dict[str, Any]]]
    events: list[dict[str, Any]]
    seen: dict[str, tuple[str, int]]
    """Visibility and LiDAR points of each box by token."""


def build(plan: Plan, out: Path, part: int = 0, parts: int = 1) -> Part:
    """Make one geometry in all its lights: write the files of every `parts`-th keyframe with the sweeps before it."""
    stage = stage_of(plan)
    scene = stage.scene
    names = tuple(light for _, _, light in plan.scenes)
    look = Look(stage, names)
    books = [SceneRows(plan.world, n, name, describe(light, scene), scene) for n, name, light in plan.scenes]
    seen: dict[str, tuple[str, int]] = {}
    made = 0
    for tick in range(scene.ticks):
        key = tick % KEYFRAME_TICKS == 0
        mine = -(-tick // KEYFRAME_TICKS) % parts == part
        owner = np.zeros(0, np.intp)
        if key or plan.lidar_sweeps:
            targets = [book.record("LIDAR_TOP", tick, plan.size) for book in books]
            if mine:
                cloud, owner = sweep(stage, tick, look.ground[1], RESOLUTION * LEVELS[1])
                for target in targets:
                    cloud.tofile(out / target)
        if key or plan.camera_sweeps:
            frame = stage.frame(tick)
            for channel in CAMERAS:
                targets = [book.record(channel, tick, plan.size) for book in books]
                pictures = render(look, frame, tick, channel, plan.size, plan.supersample) if mine else {}
                for target, light in zip(targets, names if mine else ()):
                    cv2.imwrite(str(out / target), pictures[light], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
        if key:
            shares = visible_shares(stage, frame, _sights()) if mine else {}
            points = np.bincount(owner[owner >= 0], minlength=len(scene.actors))
            made += len(books) * mine
            for n, actor in enumerate(scene.actors):
                if float(np.hypot(*(actor.track[tick, :2] - scene.ego[tick, :2]))) < ANNOTATED:
                    for book in books:
                        box = book.annotate(tick, n)
                        if mine:
                            seen[box] = (visibility_level(shares.get(n, 0.0)), int(points[n]))
    if part:
        return Part(made, {}, [], seen)
    rows: dict[str, list[dict[str, Any]]] = {}
    events = []
    for book in books:
        for table, more in book.finish().items():
            rows.setdefault(table, []).extend(more)
        _write(out / "can_bus" / f"{book.name}_pose.json", book.can_bus())
        if scene.event is not None:
            events.append(
                {
                    "scene_token": book.token,
                    "instance_token": book.instance(scene.event.actor),
                    "kind": scene.event.kind,
                    "timestamp": timestamp(book.number, scene.event.tick),
                }
            )
    return Part(made, rows, events, seen)


def _sights() -> list[View]:
    return [view(channel, SIGHT) for channel in CAMERAS]


def stage_of(plan: Plan) -> Stage:
    """The scene of a plan, its sudden obstacle stamped; seeds are tried in order until the obstacle surprises."""
    town = build_town(plan.town_seed)
    if plan.event is not None:
        for attempt in range(TRIES):
            stage = Stage(build_scene(town, (*plan.seed, attempt), plan.samples, plan.event))
            tick = appearance(stage)
            if tick is not None and stage.scene.event is not None:
                stage.scene.event.tick = tick
                return stage
    return Stage(build_scene(town, (*plan.seed, TRIES), plan.samples, None))


def appearance(stage: Stage) -> int | None:
    """The tick from which at least 40 % of the sudden obstacle is seen; None unless it was hidden at first.

    40 % is the border between the visibility levels 1 and 2. At every keyframe before, less is seen; at the first
    keyframe after, at least as much.
    """
    event = stage.scene.event
    assert event is not None
    sights = _sights()

    def seen(tick: int) -> bool:
        return visible_shares(stage, stage.frame(tick), sights, event.actor).get(event.actor, 0.0) >= 0.4

    keys = range(0, stage.scene.ticks, KEYFRAME_TICKS)
    first = next((tick for tick in keys if seen(tick)), None)
    if first is None or first < 2 * KEYFRAME_TICKS or first + KEYFRAME_TICKS >= stage.scene.ticks:
        return None
    for tick in range(first, first - KEYFRAME_TICKS, -1):
        if not seen(tick - 1):
            return tick
    return None


def describe(light: str, scene: Scene) -> str:
    """The scene in words, with the light as nuScenes names it (Night, Rain)."""
    words = {"day": "Day", "night": "Night", "rain": "Rain", "night-rain": "Night, rain"}[light]
    turns = {"straight": "straight on", "left": "turn left", "right": "turn right"}
    kinds = [a.kind for a in scene.actors if np.hypot(*(a.track[0, :2] - scene.ego[0, :2])) < 40.0]
    parts = [words, turns[scene.moves[0]] if scene.moves else "straight on"]
    if scene.event is not None:
        parts.append("car cuts in" if scene.event.kind == "cut-in" else "pedestrian darts out")
    parts += [f"{kinds.count(k)} {p}" for k, p in (("pedestrian", "pedestrians"), ("car", "cars")) if kinds.count(k)]
    if "construction_vehicle" in kinds:
        parts.append("construction")
    return ", ".join(parts) + " (generated)"
