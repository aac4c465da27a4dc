"""Conventions that go wrong unseen: order of quaternions, handedness, mountings, intrinsics, boxes against sensors.

A wrong convention leaves tables that read well and a detector that is quietly bad. Each check holds one kind of record
against something it was not made from: names against bearings, headings against motion, boxes against points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from core.kit import InputError
from kits.bev_perception.data.classes import BEARINGS, CAMERAS, CYCLES, LABELS, LIDAR, VEHICLES
from kits.bev_perception.data.geometry import Array, project, rotation_matrix, yaw
from kits.bev_perception.data.nuscenes import NuScenes
from kits.bev_perception.data.recordings import Sample
from kits.bev_perception.data.tables import is_numbers

Severity = Literal["error", "warning"]

UPRIGHT = 0.8  # cosine of the tilt that a car, a road or a mounting can have
ASIDE = 45.0  # degrees by which a mounting may differ from nuScenes' car
NEAR = 50.0  # m within which a box should be in some image
MANY = 5  # records from which a majority says anything
SWAPPED = "give quaternions as w, x, y, z"


@dataclass(frozen=True)
class Finding:
    """One fault: an "error" makes results wrong or impossible, a "warning" makes them worse. `token` may be ""."""

    severity: Severity
    table: str
    token: str
    what: str
    mend: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.table} {self.token}: {self.what}; {self.mend}".replace(" :", ":")


def swapped(quaternions: Array) -> Array:
    """(n, 4) read anew as if they had been written x, y, z, w."""
    return np.roll(quaternions, 1, axis=-1)


def pose_doubts(data: NuScenes) -> Iterator[Finding]:
    """Ego poses and boxes that do not stand upright, and a car that does not drive the way it looks."""
    for table in ("ego_pose", "sample_annotation"):
        yield from _tilted(data, table)
    moves, headings, tokens = [], [], []
    for scene in data.scenes.values():
        rows = []
        for token in scene.samples:
            try:
                rows.append((token, data.sample(token).lidar.ego))
            except InputError:
                continue
        for (token, a), (_, b) in zip(rows, rows[1:]):
            if np.hypot(*(step := b.translation - a.translation)[:2]) > 0.5:
                moves.append(np.arctan2(step[1], step[0]))
                headings.append(a.rotation)
                tokens.append(data.get("sample", token)["token"])
    if len(moves) >= 3 and (off := _aside(headings, moves)) > 60:
        what = f"the car drives {off:.0f} degrees (median of {len(moves)} steps) aside of where its ego frame looks"
        if _aside(swapped(np.array(headings)), moves) < 30:
            yield Finding("error", "ego_pose", "", f"{what}; read as x, y, z, w it does not", SWAPPED)
        else:
            yield Finding("warning", "ego_pose", "", what, "let the ego frame be x forward, y left, z up")


def box_doubts(data: NuScenes) -> Iterator[Finding]:
    """Vehicles that are wider than long, or do not drive the way they look."""
    movers = [LABELS[name] for name in (*VEHICLES, *CYCLES)]
    headings: list[Array] = []
    moves: list[float] = []
    ratios: list[float] = []
    for token in data.tables["sample"]:
        try:
            boxes = data.annotations(token).boxes
        except InputError:
            continue
        boxes = boxes[np.isin(boxes.labels, movers) & (boxes.sizes > 0).all(axis=1)]
        ratios.extend((boxes.sizes[:, 0] / boxes.sizes[:, 1]).tolist())
        fast = boxes[np.asarray(np.nan_to_num(np.linalg.norm(boxes.velocities, axis=1)) > 1.0)]
        headings.extend(fast.rotations)
        moves.extend(np.arctan2(fast.velocities[:, 1], fast.velocities[:, 0]).tolist())
    if len(ratios) >= MANY and np.median(ratios) > 1:
        what = f"vehicles are {np.median(ratios):.2g} times as wide as long (median of {len(ratios)})"
        yield Finding("error", "sample_annotation", "", what, "give sizes as width, length, height")
    if len(moves) >= MANY and (off := _aside(headings, moves)) > ASIDE:
        what = f"moving vehicles drive {off:.0f} degrees aside of their heading (median of {len(moves)})"
        if _aside(swapped(np.array(headings)), moves) < 30:
            yield Finding("error", "sample_annotation", "", f"{what}; read as x, y, z, w they do not", SWAPPED)
        else:
            yield Finding("error", "sample_annotation", "", what, "let a box's x axis, its length, point forward")


def _aside(headings: Sequence[Array] | Array, moves: Sequence[float]) -> float:
    """The median of the angles between headings and moves, degrees."""
    turn = yaw(np.array(headings)) - np.array(moves)
    return float(np.degrees(np.median(np.abs((turn + np.pi) % (2 * np.pi) - np.pi))))


def _tilted(data: NuScenes, table: str) -> Iterator[Finding]:
    rows = [row for row in data.tables[table].values() if _quaternion(row.get("rotation"))]
    if not rows:
        return
    q = np.array([row["rotation"] for row in rows], dtype=np.float64)
    tilted = rotation_matrix(q)[:, 2, 2] < UPRIGHT
    if not tilted.any():
        return
    first = int(np.argmax(tilted))
    if tilted.mean() > 0.2:
        what = f"{int(tilted.sum())} of {len(rows)} do not stand upright"
        if (rotation_matrix(swapped(q))[:, 2, 2] >= UPRIGHT).mean() > 1 - tilted.mean():
            yield Finding("error", table, rows[first]["token"], f"{what}; read as x, y, z, w they do", SWAPPED)
        else:
            yield Finding("error", table, rows[first]["token"], what, "let z point up in the global frame")
        return
    for i in np.flatnonzero(tilted):
        yield Finding("warning", table, rows[i]["token"], "it does not stand upright", "mend the rotation")


def mount_doubts(data: NuScenes) -> Iterator[Finding]:
    """Mountings against the names of the sensors, intrinsics against the size of the images."""
    sizes: dict[str, tuple[int, int]] = {}
    for row in data.tables["sample_data"].values():
        width: Any = row.get("width")
        height: Any = row.get("height")
        if is_numbers([width, height], 2) and min(width, height) > 0:
            sizes.setdefault(str(row.get("calibrated_sensor_token")), (width, height))
    cameras: dict[str, tuple[str, Array]] = {}
    for token, row in data.tables["calibrated_sensor"].items():
        if not _quaternion(row.get("rotation")):
            continue
        channel = data.tables["sensor"].get(str(row.get("sensor_token")), {}).get("channel")
        place: Any = row.get("translation")
        if is_numbers(place, 3) and max(map(abs, place)) > 10:
            what = f"{channel} is mounted at {place}"
            yield Finding("error", "calibrated_sensor", token, what, "give the place in the ego frame, in metres")
        if channel in CAMERAS:
            cameras[token] = channel, np.array(row["rotation"], dtype=np.float64)
            yield from _intrinsic(token, channel, row.get("camera_intrinsic"), sizes.get(token))
        elif channel == LIDAR:
            yield from _lidar_mount(token, rotation_matrix(row["rotation"]))
    yield from _bearings(cameras)


def _lidar_mount(token: str, turn: Array) -> Iterator[Finding]:
    if turn[2, 2] < UPRIGHT:
        yield Finding("error", "calibrated_sensor", token, f"the z axis of {LIDAR} does not point up", SWAPPED)
    elif turn[0, 1] < np.cos(np.radians(ASIDE)):
        what = f"the y axis of {LIDAR} does not look forward"
        mend = "turn points and rotation to x right, y forward, as nuScenes has them: detectors are trained so"
        yield Finding("warning", "calibrated_sensor", token, what, mend)


def _intrinsic(token: str, channel: str, value: object, size: tuple[int, int] | None) -> Iterator[Finding]:
    k = np.array(value, dtype=np.float64) if _square(value) else np.zeros((0, 0))
    if k.shape != (3, 3) or not np.allclose(k[2], [0, 0, 1]) or abs(k[1, 0]) > 1e-6:
        what = f"camera_intrinsic of {channel} is {value!r}"
        yield Finding("error", "calibrated_sensor", token, what, "give [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] in pixels")
        return
    if size is None:
        return
    (fx, _, cx), (_, fy, cy) = k[0], k[1]
    width, height = size
    mend = "give the intrinsics for images of the size in sample_data.json, or mend that size"
    if min(fx, fy) <= 0:
        what = f"focal lengths {fx:.6g}, {fy:.6g} of {channel} are not above 0"
        yield Finding("error", "calibrated_sensor", token, what, "mend the sign: x is right and y down in the image")
    elif not 0.15 <= fx / width <= 4 or not 0.8 <= fx / fy <= 1.25:
        what = f"focal lengths {fx:.6g}, {fy:.6g} of {channel} do not suit an image of {width} x {height}"
        yield Finding("error", "calibrated_sensor", token, what, mend)
    away = max(abs(cx / width - 0.5), abs(cy / height - 0.5))
    if away > 0.1:
        what = f"principal point {cx:.6g}, {cy:.6g} of {channel} is far from the middle of {width} x {height}"
        yield Finding("error" if away > 0.2 else "warning", "calibrated_sensor", token, what, mend)


def _bearings(cameras: dict[str, tuple[str, Array]]) -> Iterator[Finding]:
    """Where the cameras look against their names; one explanation for all where there is one."""
    if not cameras:
        return
    names = [channel for channel, _ in cameras.values()]
    q = np.array([rotation for _, rotation in cameras.values()])
    turns = rotation_matrix(q)

    def fits(turn: Array) -> NDArray[np.bool_]:
        return _level(turn) & (_off(turn, names) <= ASIDE)

    right = fits(turns)
    if right.all():
        return
    first = list(cameras)[int(np.argmin(right))]
    mirror = np.diag([1.0, -1.0, 1.0])
    stories: tuple[tuple[str, str, Callable[[], Array]], ...] = (
        ("read as x, y, z, w they do", SWAPPED, lambda: rotation_matrix(swapped(q))),
        ("turned the other way they do", "give the rotation from sensor to ego frame", lambda: turns.swapaxes(1, 2)),
        (
            "mirrored they do",
            "let y point left in the ego frame, as in a right-handed one",
            lambda: mirror @ turns,
        ),
        (
            "with x, y, z as forward, left, up they do",
            "let a camera's frame be x right, y down, z forward",
            lambda: turns @ np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]]),
        ),
    )
    for story, mend, read in stories:
        if len(names) >= 3 and fits(read()).all():
            what = f"{int((~right).sum())} of {len(names)} cameras do not look where their names say; {story}"
            yield Finding("error", "calibrated_sensor", first, what, mend)
            return
    for (token, (channel, _)), turn in zip(cameras.items(), turns):
        if not _level(turn):
            what = f"{channel} does not stand upright or looks up or down"
            yield Finding("error", "calibrated_sensor", token, what, f"{SWAPPED}, from sensor to ego frame")
        elif (away := float(_off(turn, [channel])[0])) > ASIDE:
            like = [name for name in CAMERAS if float(_off(turn, [name])[0]) <= ASIDE / 2]
            where = f"where {like[0]} should" if like else f"{away:.0f} degrees aside"
            what = f"{channel} looks {where}"
            yield Finding("error", "calibrated_sensor", token, what, "exchange the calibrations or the channels' names")


def _level(turn: Array) -> NDArray[np.bool_]:
    """Whether cameras (..., 3, 3) look along the ground with their y axis down."""
    return (turn[..., 2, 1] < -0.5) & (np.abs(turn[..., 2, 2]) < 0.7)


def _off(turn: Array, names: Sequence[str]) -> Array:
    """(n,) degrees between where cameras (n, 3, 3) look and where their names say."""
    looks = np.degrees(np.arctan2(turn[..., 1, 2], turn[..., 0, 2])).reshape(-1)
    return np.abs((looks - [BEARINGS[name] for name in names] + 180) % 360 - 180)


def view_doubts(data: NuScenes, samples: Sequence[Sample]) -> Iterator[Finding]:
    """Boxes that no camera sees, and boxes that say they hold LiDAR points but hold none."""
    hidden, near, empty, counted, mirrored = 0, 0, 0, 0, 0
    doubts = []
    for sample in samples:
        try:
            found = data.annotations(sample.token)
            boxes = found.boxes.moved(sample.pose.inverse)
            matrices = [(sample.lidar2img(c), sample.recordings[c].size) for c in CAMERAS if c in sample.recordings]
        except InputError:
            continue
        if not len(boxes) or len(matrices) < len(CAMERAS):
            continue
        close = np.hypot(*boxes.centers[:, :2].T) < NEAR
        marks = np.concatenate([boxes.corners, boxes.centers[:, None]], axis=1)
        seen = np.zeros(len(boxes), dtype=bool)
        for matrix, (width, height) in matrices:
            pixels, _ = project(marks, matrix)
            with np.errstate(invalid="ignore"):
                seen |= ((pixels >= 0) & (pixels < [width, height])).all(axis=-1).any(axis=-1)
        for i in np.flatnonzero(close & ~seen):
            what = f"the box projects outside every camera of sample {sample.token!r}"
            mend = "check box, calibration and ego pose, or know that no camera can find it"
            doubts.append(Finding("warning", "sample_annotation", found.tokens[i], what, mend))
        hidden, near = hidden + int((close & ~seen).sum()), near + int(close.sum())
        full = boxes[close & (boxes.num_pts >= 5)]
        if len(full):
            try:
                points = sample.lidar.points()[:, :3].astype(np.float64)
            except InputError:
                continue
            counted += len(full)
            empty += _without(full.centers, full.sizes, full.rotations, points)
            mirrored += _without(full.centers, full.sizes, full.rotations, points * [-1, 1, 1])
    if near >= MANY and hidden > near / 2:
        what = f"{hidden} of {near} boxes within {NEAR:.0f} m project outside every camera"
        yield Finding("error", "calibrated_sensor", "", what, "mend the rotations of cameras, ego poses or boxes")
    yield from doubts
    if counted >= MANY and empty > counted / 2:
        what = f"{empty} of {counted} boxes that should hold 5 LiDAR points or more hold none"
        if mirrored < empty / 2:
            what += f"; of mirrored points only {mirrored}"
        mend = "mend axes and handedness of the points, the rotation of the LiDAR, or the boxes"
        yield Finding("error", "calibrated_sensor", "", what, mend)


def _without(centers: Array, sizes: Array, rotations: Array, points: Array) -> int:
    """How many boxes hold no point."""
    empty = 0
    points = points[np.argsort(points[:, 0])]
    for center, (w, l, h), turn in zip(centers, sizes, rotation_matrix(rotations)):  # noqa: E741
        first, last = np.searchsorted(points[:, 0], [center[0] - max(w, l), center[0] + max(w, l)])
        near = points[first:last]
        empty += not (np.abs((near - center) @ turn) <= np.array([l, w, h]) / 2).all(axis=1).any()
    return empty


def _quaternion(value: Any) -> bool:
    return is_numbers(value, 4) and any(value)


def _square(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(is_numbers(row, 3) for row in value)
