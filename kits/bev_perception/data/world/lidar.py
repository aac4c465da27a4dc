"""The LiDAR: 32 beams by 360 columns against the boxes that things are made of, walls and the ground."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kits.bev_perception.data.world.raster import Stage
from kits.bev_perception.data.world.rig import LIDAR, rotation_matrix

Floats = NDArray[np.floating]

BEAMS, COLUMNS = 32, 360
LOWEST, HIGHEST = np.radians(-30.67), np.radians(10.67)
RANGE = 70.0
"""Metres."""
NOISE = 0.012
"""Standard deviation of a range in metres, cut off at two of them."""
INSET = 0.025
"""Metres that surfaces lie inside the box of their actor, so that noise does not carry points out of it."""

_R = rotation_matrix(LIDAR.rotation)
_T = np.asarray(LIDAR.translation)
_ELEVATION = np.linspace(LOWEST, HIGHEST, BEAMS)
_AZIMUTH = (np.arange(COLUMNS) + 0.5) * 2 * np.pi / COLUMNS - np.pi
_RAYS = np.stack(
    [
        np.cos(_ELEVATION)[:, None] * np.cos(_AZIMUTH),
        np.cos(_ELEVATION)[:, None] * np.sin(_AZIMUTH),
        np.broadcast_to(np.sin(_ELEVATION)[:, None], (BEAMS, COLUMNS)),
    ],
    -1,
)
"""(BEAMS, COLUMNS, 3) in the sensor frame."""


def sweep(
    stage: Stage, tick: int, ground: NDArray[np.uint8] | None = None, cell: float = 0.4
) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """One turn of the LiDAR, taken at one instant.

    Returns the points (N, 5) float32 (x, y, z in the sensor frame, intensity 0 to 255, ring from the lowest) and the
    actor that each point lies on (N,), -1 for anything else. `ground` is a picture of the ground, `cell` metres a
    pixel, whose brightness becomes the intensity of the road's returns.
    """
    scene = stage.scene
    ex, ey, yaw = scene.ego[tick]
    cos, sin = np.cos(yaw), np.sin(yaw)
    turn = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
    to_world = turn @ _R
    origin = turn @ _T + np.array([ex, ey, 0.0])
    rays = _RAYS @ to_world.T
    depth = np.full((BEAMS, COLUMNS), np.inf)
    owner = np.full((BEAMS, COLUMNS), -2)
    down = rays[..., 2] < -1e-4
    depth[down] = -origin[2] / rays[..., 2][down]
    owner[down & (depth < RANGE)] = -1

    def columns(x: float, y: float, radius: float) -> NDArray[np.intp]:
        """Columns that may meet an upright cylinder."""
        away = np.array([x - origin[0], y - origin[1], 0.0]) @ to_world
        distance = float(np.hypot(away[0], away[1]))
        if distance - radius > RANGE:
            return np.zeros(0, np.intp)
        if distance <= radius * 1.05:
            return np.arange(COLUMNS)
        half = int(np.ceil(np.degrees(np.arcsin(radius / distance)) * COLUMNS / 360)) + 2
        middle = int((np.arctan2(away[1], away[0]) + np.pi) / (2 * np.pi) * COLUMNS)
        return np.arange(middle - half, middle + half + 1) % COLUMNS

    def meet(boxes: Floats, pose: tuple[float, float, float], pick: NDArray[np.intp], mark: int) -> None:
        """Shorten the rays in some columns where they enter one of the boxes (n, 6) of a thing."""
        c, s = np.cos(pose[2]), np.sin(pose[2])
        shift = origin - np.array([pose[0], pose[1], 0.0])
        start = np.array([shift[0] * c + shift[1] * s, -shift[0] * s + shift[1] * c, shift[2]])
        part = rays[:, pick]
        local = np.stack([part[..., 0] * c + part[..., 1] * s, -part[..., 0] * s + part[..., 1] * c, part[..., 2]], -1)
        local = np.where(np.abs(local) < 1e-9, 1e-9, local)[:, :, None]
        low, high = boxes[:, :3] - boxes[:, 3:] - start, boxes[:, :3] + boxes[:, 3:] - start
        a, b = low / local, high / local
        enter, leave = np.minimum(a, b).max(-1), np.maximum(a, b).min(-1)
        hit = np.where((enter < leave) & (enter > 0.3), enter, np.inf).min(-1)
        old = depth[:, pick]
        nearer = hit < old
        depth[:, pick] = np.where(nearer, hit, old)
        owner[:, pick] = np.where(nearer, mark, owner[:, pick])

    for x0, y0, x1, y1, height in scene.dressing.buildings:
        x, y, dx, dy = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2, (y1 - y0) / 2
        pick = columns(x, y, float(np.hypot(dx, dy)))
        if len(pick):
            meet(np.array([[x, y, height / 2, dx, dy, height / 2]]), (0.0, 0.0, 0.0), pick, -3)
    for n, thing in enumerate(stage.things):
        boxes = thing.model.boxes
        if n < stage.actors:
            pose = scene.actors[n].track[tick]
            boxes = np.concatenate([boxes[:, :3], np.maximum(boxes[:, 3:] - INSET, 0.012)], 1)
            pick = columns(pose[0], pose[1], float(np.hypot(*scene.actors[n].size[:2])) / 2)
            if len(pick) and len(boxes):
                meet(boxes, (float(pose[0]), float(pose[1]), float(pose[2])), pick, n)
        elif thing.crown is not None:
            x, y = thing.centre[:2]
            pick = columns(x, y, float(thing.crown[:, 3].max() + np.abs(thing.crown[:, :2] - thing.centre[:2]).max()))
            if len(pick):
                half = thing.crown[:, 3:] * 0.75
                leaves = np.concatenate([thing.crown[:, :3], half, half, half], 1)
                leaves[:, :2] -= (x, y)
                stem = np.array([[0.0, 0.0, thing.centre[2] * 0.6, 0.14, 0.14, thing.centre[2] * 0.6]])
                meet(np.concatenate([stem, leaves]), (float(x), float(y), 0.0), pick, -4)
        else:
            x, y, arm = scene.dressing.lamps[n - stage.actors]
            pick = columns(x, y, 0.15)
            if len(pick):
                meet(boxes, (float(x), float(y), float(arm)), pick, -5)
    rng = np.random.default_rng([*scene.seed, 808, tick])
    chance = rng.random(depth.shape)
    noise = np.clip(rng.standard_normal(depth.shape), -2, 2) * NOISE
    lost = (
        0.02 + 0.10 * np.clip(depth / RANGE, 0, 1) ** 2 + np.where(owner == -1, np.clip((depth - 25) / 70, 0, 0.6), 0.0)
    )
    lost = np.where(owner == -4, 0.35, lost)
    kept = (depth < RANGE) & (depth > 1.0) & (owner > -6) & (owner != -2) & (chance > lost)
    beam, column = np.nonzero(kept)
    far = depth[kept] + noise[kept]
    points = _RAYS[beam, column] * far[:, None]
    marks = owner[kept]
    shine = rng.random(len(far))
    base = np.array([16.0, 22.0, 18.0, 34.0, 26.0])
    intensity = np.where(marks < 0, base[np.clip(-marks - 1, 0, 4)], 20.0 + (marks * 37) % 60) * (0.7 + 0.6 * shine)
    if ground is not None:
        road = marks == -1
        at = points[road] @ to_world.T + origin
        i = np.clip(((at[:, 1] - scene.dressing.region[1]) / cell).astype(int), 0, ground.shape[0] - 1)
        j = np.clip(((at[:, 0] - scene.dressing.region[0]) / cell).astype(int), 0, ground.shape[1] - 1)
        intensity[road] = ground[i, j, 1] * 0.25 * (0.7 + 0.6 * shine[road])
    cloud = np.column_stack([points, np.floor(np.clip(intensity, 0, 255)), beam]).astype(np.float32)
    return cloud, np.where(marks >= 0, marks, -1)
