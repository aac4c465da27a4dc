"""Which face of the world each pixel sees: projection, near-plane clipping, painter's algorithm, exact depth.

Faces are painted as their numbers, far to near, in three layers (walls, long vehicles, everything else). Every face
is a plane, so the depth at a pixel is exact, and the layers are merged by depth: a person beside a bus is right
although painting by distance alone would not be.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from kits.bev_perception.data.world.actors import Scene
from kits.bev_perception.data.world.rig import View
from kits.bev_perception.data.world.shapes import CORNERS, LEAF, Model, lamp_post, trunk

Floats = NDArray[np.floating]
Ints = NDArray[np.intp]

NEAR = 0.3
"""Metres along the camera's axis; what is nearer is cut off."""
REACH = 95.0
"""Metres around ego within which things are drawn."""
LONG = 5.6
"""Metres from which on a thing belongs to the layer of long ones."""
SHIFT = 4


@dataclass
class Thing:
    """Something drawn that is made of faces: an actor, a lamp post or a tree."""

    model: Model
    centre: Floats
    radius: float
    long: bool
    still: Floats | None
    """World faces where it never moves."""
    crown: Floats | None = None
    """(n, 4) world centre and radius of a tree's leafy discs."""


@dataclass
class Frame:
    """The faces near ego at one tick, in the world frame."""

    tick: int
    ego: Floats
    """x, y, heading."""
    things: list[int]
    """Number of each thing drawn, in the scene's order; the first `actors` are the scene's actors."""
    centres: Floats
    radii: Floats
    long: NDArray[np.bool_]
    ordered: NDArray[np.bool_]
    faces: Floats
    """(F, CORNERS, 3)."""
    normals: Floats
    owner: Ints
    """(F,) index into `things`."""
    part: Ints
    """(F,) number of the part, unique over the frame."""
    own_part: Ints
    colours: Floats
    materials: Ints
    discs: Floats
    """(D, 4) world centre and radius."""
    disc_owner: Ints
    disc_colours: Floats


class Stage:
    """A scene made ready to be drawn: everything that stands still is placed once."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        rng = np.random.default_rng([*scene.seed, 303])
        self.things: list[Thing] = []
        for actor in scene.actors:
            fixed = bool((actor.track == actor.track[0]).all())
            still = _place(actor.model.faces[0], actor.track[0]) if fixed else None
            radius = float(np.linalg.norm(actor.size)) / 2
            centre = np.array([*actor.track[0, :2], actor.size[2] / 2])
            self.things.append(Thing(actor.model, centre, radius, bool(actor.size[1] > LONG), still))
        self.actors = len(self.things)
        post = lamp_post()
        for x, y, yaw in scene.dressing.lamps:
            still = _place(post.faces[0], (x, y, yaw))
            self.things.append(Thing(post, np.array([x, y, 4.0]), 5.0, False, still))
        self._leaf = np.array([[52.0, 92.0, 62.0], [46.0, 84.0, 70.0], [58.0, 104.0, 84.0]])[int(rng.integers(0, 3))]
        for x, y, height, crown in scene.dressing.trees:
            wood = trunk(float(height))
            count = 20
            at = rng.normal(size=(count, 3))
            at *= (rng.uniform(0.35, 0.95, count) / np.linalg.norm(at, axis=1))[:, None]
            middle = height - crown * 1.1
            places = np.column_stack(
                [
                    x + at[:, 0] * crown,
                    y + at[:, 1] * crown,
                    middle + at[:, 2] * crown * 0.9,
                    crown * rng.uniform(0.24, 0.44, count),
                ]
            )
            thing = Thing(
                wood, np.array([x, y, height / 2]), float(height), False, _place(wood.faces[0], (x, y, 0.0)), places
            )
            self.things.append(thing)
        self._normals = [None if t.still is None else face_normals(t.still) for t in self.things]
        b = scene.dressing.buildings
        lo, hi = b[:, :2], b[:, 2:4]
        # four walls each: west, south, east, north; corners run along the wall, the normal points outward
        starts = [np.c_[lo[:, 0], hi[:, 1]], lo, np.c_[hi[:, 0], lo[:, 1]], hi]
        ends = [lo, np.c_[hi[:, 0], lo[:, 1]], hi, np.c_[lo[:, 0], hi[:, 1]]]
        self.wall_start = np.stack(starts, 1).reshape(-1, 2)
        self.wall_end = np.stack(ends, 1).reshape(-1, 2)
        self.wall_height = np.repeat(b[:, 4], 4)
        self.wall_building = np.repeat(np.arange(len(b)), 4)
        self.wall_normal = np.tile(np.array([[-1.0, 0.0], [0.0, -1.0], [1.0, 0.0], [0.0, 1.0]]), (len(b), 1))

    def frame(self, tick: int) -> Frame:
        """Everything within REACH of ego at a tick."""
        scene = self.scene
        ego = scene.ego[tick]
        for actor, thing in zip(scene.actors, self.things):
            thing.centre[:2] = actor.track[tick, :2]
        centres = np.array([t.centre for t in self.things]).reshape(-1, 3)
        near = np.flatnonzero(np.hypot(*(centres[:, :2] - ego[:2]).T) < REACH)
        faces, normals, owner, part, own, colours, materials = [], [], [], [], [], [], []
        discs, disc_owner, disc_colours = [], [], []
        parts = 0
        for k, n in enumerate(near):
            thing = self.things[n]
            model = thing.model
            if thing.still is not None:
                placed, out = thing.still, self._normals[n]
            else:
                pose = scene.actors[n].track[tick]
                placed = _place(model.faces[_gait(scene, int(n), tick)], pose)
                out = face_normals(placed)
            assert out is not None
            faces.append(placed)
            normals.append(out)
            owner.append(np.full(len(placed), k))
            part.append(model.parts + parts)
            own.append(model.parts)
            colours.append(model.colours)
            materials.append(model.materials)
            parts += int(model.parts.max()) + 1
            if thing.crown is not None:
                discs.append(thing.crown)
                disc_owner.append(np.full(len(thing.crown), k))
                z = thing.crown[:, 2]
                light = 0.62 + 0.55 * (z - z.min()) / max(float(np.ptp(z)), 0.1)
                disc_colours.append(self._leaf * light[:, None])
        empty = np.zeros((0, CORNERS, 3))
        return Frame(
            tick,
            ego,
            [int(n) for n in near],
            centres[near],
            np.array([self.things[n].radius for n in near]),
            np.array([self.things[n].long for n in near], bool),
            np.array([self.things[n].model.ordered for n in near], bool),
            np.concatenate([empty, *faces]),
            np.concatenate([empty[:, 0], *normals]),
            np.concatenate([np.zeros(0, np.intp), *owner]),
            np.concatenate([np.zeros(0, np.intp), *part]),
            np.concatenate([np.zeros(0, np.intp), *own]),
            np.concatenate([empty[:, 0], *colours]),
            np.concatenate([np.zeros(0, np.intp), *materials]),
            np.concatenate([np.zeros((0, 4)), *discs]),
            np.concatenate([np.zeros(0, np.intp), *disc_owner]),
            np.concatenate([empty[:, 0], *disc_colours]),
        )


def _gait(scene: Scene, n: int, tick: int) -> int:
    """The pose of the gait: by the way walked, 0.36 m a pose."""
    actor = scene.actors[n]
    if len(actor.model.faces) == 1:
        return 0
    way = np.hypot(*np.diff(actor.track[: tick + 1, :2], axis=0).T).sum()
    return int(way / (0.36 if actor.kind == "pedestrian" else 0.6) + n) % len(actor.model.faces)


def _place(faces: Floats, pose: Floats | tuple[float, float, float]) -> Floats:
    cos, sin = np.cos(pose[2]), np.sin(pose[2])
    turned = faces @ np.array([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]])
    return turned + np.array([pose[0], pose[1], 0.0])


def face_normals(faces: Floats) -> Floats:
    """Unit normals (P, 3) of faces (P, CORNERS, 3), from the whole outline (Newell)."""
    following = np.roll(faces, -1, axis=1)
    normal = np.cross(faces, following).sum(1)
    return normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)


@dataclass
class Drawing:
    """What one camera sees, at `ss` samples a pixel each way."""

    ids: NDArray[np.int32]
    """(H * ss, W * ss): 0 for ground and sky, then faces, discs (`1 + n`), then walls (`1 + faces + n`)."""
    depth: NDArray[np.float32]
    """The same shape, metres along the camera's axis; 0 where ids are 0."""
    first_wall: int
    walls: Ints
    """Number in the stage of each wall drawn."""
    disc_faces: int


@dataclass
class _Batch:
    """Faces in the camera frame, in the order of painting."""

    corners: Floats
    pixels: NDArray[np.int32]
    crossing: NDArray[np.bool_]
    numbers: Ints


def camera_pose(view: View, ego: Floats) -> tuple[Floats, Floats]:
    """Rotation camera to world (3, 3) and the camera's place in the world (3,)."""
    cos, sin = np.cos(ego[2]), np.sin(ego[2])
    turn = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
    return turn @ view.R, turn @ view.t + np.array([ego[0], ego[1], 0.0])


def _seen(frame: Frame, view: View, rotation: Floats, place: Floats) -> NDArray[np.bool_]:
    """Things that can be in the picture."""
    c = (frame.centres - place) @ rotation
    z, r = c[:, 2], frame.radii
    slope_x = max(view.K[0, 2], view.size[0] - view.K[0, 2]) / view.K[0, 0]
    return (z > -r + NEAR) & (np.abs(c[:, 0]) < slope_x * np.maximum(z, 0) + r * np.hypot(1, slope_x))


def _batch(corners: Floats, numbers: Ints, view: View, ss: int) -> _Batch:
    """Project camera-frame faces; those wholly outside the picture or too small to matter are dropped."""
    z = corners[..., 2]
    nearest = z.min(1)
    crossing = nearest < NEAR
    safe = np.maximum(z, NEAR)
    u = (corners[..., 0] / safe * view.K[0, 0] + view.K[0, 2]) * ss - 0.5
    v = (corners[..., 1] / safe * view.K[1, 1] + view.K[1, 2]) * ss - 0.5
    low_u, high_u, low_v, high_v = u.min(1), u.max(1), v.min(1), v.max(1)
    width, height = view.size[0] * ss, view.size[1] * ss
    inside = (high_u > -1) & (low_u < width) & (high_v > -1) & (low_v < height)
    keep = (crossing & (z.max(1) > NEAR)) | (inside & ~crossing & ((high_u - low_u) * (high_v - low_v) > 0.12))
    pixels = np.stack([u[keep], v[keep]], -1) * (1 << SHIFT)
    return _Batch(corners[keep], np.rint(np.clip(pixels, -1e7, 1e7)).astype(np.int32), crossing[keep], numbers[keep])


def _paint(
    batch: _Batch, image: NDArray[np.int32] | NDArray[np.uint8], view: View, ss: int, value: int | None = None
) -> None:
    """Fill every face with its number (or with `value`), in order."""
    fill = cv2.fillConvexPoly
    for k, number in enumerate(batch.numbers.tolist()):
        outline = batch.pixels[k]
        if batch.crossing[k]:
            cut = clip_near(batch.corners[k])
            if len(cut) < 3:
                continue
            outline = _pixels(cut, view, ss)
        fill(image, outline, number if value is None else value, 8, SHIFT)


def _pixels(points: Floats, view: View, ss: int) -> NDArray[np.int32]:
    u = (points[:, 0] / points[:, 2] * view.K[0, 0] + view.K[0, 2]) * ss - 0.5
    v = (points[:, 1] / points[:, 2] * view.K[1, 1] + view.K[1, 2]) * ss - 0.5
    return np.rint(np.clip(np.stack([u, v], -1) * (1 << SHIFT), -1e7, 1e7)).astype(np.int32)


def clip_near(corners: Floats) -> Floats:
    """The part of a camera-frame polygon (n, 3) in front of the near plane."""
    kept: list[Floats] = []
    for a, b in zip(corners, np.roll(corners, -1, axis=0)):
        if a[2] >= NEAR:
            kept.append(a)
        if (a[2] >= NEAR) != (b[2] >= NEAR):
            kept.append(a + (b - a) * ((NEAR - a[2]) / (b[2] - a[2])))
    return np.array(kept).reshape(-1, 3)


def _ordered_faces(frame: Frame, view: View) -> tuple[Floats, Ints, Ints, Floats, NDArray[np.bool_]]:
    """Faces and discs that face the camera, far to near: corners, numbers from 1, things, planes, in the long layer."""
    rotation, place = camera_pose(view, frame.ego)
    seen = _seen(frame, view, rotation, place)
    pick = np.flatnonzero(seen[frame.owner])
    corners = (frame.faces[pick] - place) @ rotation
    normals = frame.normals[pick] @ rotation
    towards = (normals * corners[:, 0]).sum(1) < -1e-4
    pick, corners, normals = pick[towards], corners[towards], normals[towards]
    discs = np.flatnonzero(seen[frame.disc_owner])
    middle = (frame.discs[discs, :3] - place) @ rotation
    angles = np.arange(CORNERS) * 2 * np.pi / CORNERS
    ragged = 1.0 + 0.16 * np.sin(angles[None] * 3 + discs[:, None] * 1.7)
    ring = np.stack([np.cos(angles), np.sin(angles), np.zeros(CORNERS)], -1)
    rings = middle[:, None] + ring[None] * (frame.discs[discs, 3:, None] * ragged[..., None])
    owner = np.r_[frame.owner[pick], frame.disc_owner[discs]]
    distance = np.linalg.norm((frame.centres - place) @ rotation, axis=1)
    # the centre of each part that is left decides the order of parts within a thing
    part = frame.part[pick]
    count = np.bincount(part, minlength=1)
    mid = corners.mean(1)
    sums = np.stack([np.bincount(part, mid[:, i], minlength=1) for i in range(3)], -1)
    part_distance = np.linalg.norm(sums / np.maximum(count, 1)[:, None], axis=1)[part] if len(pick) else np.zeros(0)
    part_distance = np.where(frame.ordered[frame.owner[pick]], -frame.own_part[pick], part_distance)
    inner = np.r_[part_distance, np.linalg.norm(middle, axis=1)]
    numbers = np.r_[pick, len(frame.faces) + discs] + 1
    order = np.lexsort((numbers, -inner, -distance[owner]))
    every = np.concatenate([corners, rings])[order]
    planes = np.concatenate([normals, np.tile([0.0, 0.0, -1.0], (len(discs), 1))])[order]
    return every, numbers[order], owner[order], planes, frame.long[owner[order]]


def _depth(ids: NDArray[np.int32], mask: NDArray[np.bool_], rays: Floats, table: Floats) -> NDArray[np.float32]:
    """Depth at the masked pixels from the planes (n, 6): normal, offset, nearest and farthest depth of each number."""
    plane = table[ids[mask]]
    along = np.einsum("ij,ij->i", plane[:, :3], rays[mask])
    depth = plane[:, 3] / np.where(np.abs(along) < 1e-7, -1e-7, along)
    return np.clip(depth, plane[:, 4], plane[:, 5]).astype(np.float32)


def _planes(corners: Floats, normals: Floats) -> Floats:
    z = np.maximum(corners[..., 2], NEAR)
    offset = (normals * corners.mean(1)).sum(1)
    return np.column_stack([normals, offset, z.min(1), z.max(1)]).astype(np.float32)


def draw(stage: Stage, frame: Frame, view: View, ss_view: View, ss: int) -> Drawing:
    """Paint a frame as one camera sees it; `ss_view` is the same camera at `ss` times the size (for its rays)."""
    width, height = ss_view.size
    rays = ss_view.camera_rays
    corners, numbers, _, normals, long = _ordered_faces(frame, view)
    first_wall = 1 + len(frame.faces) + len(frame.discs)
    ids = np.zeros((height, width), np.int32)
    depth = np.zeros((height, width), np.float32)
    walls, wall_corners, wall_normals = _walls(stage, frame.ego, view)
    if len(walls):
        batch = _batch(wall_corners, np.arange(len(walls)) + first_wall, view, ss)
        _paint(batch, ids, view, ss)
        table = np.zeros((first_wall + len(walls), 6), np.float32)
        table[first_wall:] = _planes(wall_corners, wall_normals)
        mask = ids > 0
        depth[mask] = _depth(ids, mask, rays, table)
    table = np.zeros((first_wall, 6), np.float32)
    table[numbers] = _planes(corners, normals)
    for layer in (long, ~long):
        batch = _batch(corners[layer], numbers[layer], view, ss)
        if not len(batch.numbers):
            continue
        over = np.zeros_like(ids)
        _paint(batch, over, view, ss)
        mask = over > 0
        here = _depth(over, mask, rays, table)
        before = depth[mask]
        wins = (before == 0) | (here < before)
        ids[mask] = np.where(wins, over[mask], ids[mask])
        depth[mask] = np.where(wins, here, before)
    return Drawing(ids, depth, first_wall, walls, len(frame.faces))


def _walls(stage: Stage, ego: Floats, view: View) -> tuple[Ints, Floats, Floats]:
    """Walls that face the camera, far to near: numbers, camera-frame corners (n, CORNERS, 3), normals."""
    rotation, place = camera_pose(view, ego)
    start, end = stage.wall_start, stage.wall_end
    facing = ((start - place[:2]) * stage.wall_normal).sum(1) < -0.01
    b = stage.scene.dressing.buildings
    gap = np.maximum(np.maximum(b[:, :2] - place[:2], place[:2] - b[:, 2:4]), 0.0)
    distance = np.hypot(*gap.T)[stage.wall_building]
    ahead = np.maximum(((start - place[:2]) @ rotation[:2, 2]), (end - place[:2]) @ rotation[:2, 2]) > NEAR
    pick = np.flatnonzero(facing & ahead & (distance < 160.0))
    pick = pick[np.argsort(-distance[pick], kind="stable")]
    corners = np.zeros((len(pick), CORNERS, 3))
    corners[:, 0, :2] = start[pick]
    corners[:, 3:, :2] = start[pick, None]
    corners[:, 1, :2] = corners[:, 2, :2] = end[pick]
    corners[:, 2:, 2] = stage.wall_height[pick, None]
    normals = np.column_stack([stage.wall_normal[pick], np.zeros(len(pick))])
    return pick, (corners - place) @ rotation, normals @ rotation


def visible_shares(stage: Stage, frame: Frame, views: list[View], only: int | None = None) -> dict[int, float]:
    """Share of each actor's pixels that other things leave free, over the given cameras.

    Actors outside every picture are not in the answer. `only` asks for one actor.
    """
    free: dict[int, int] = {}
    alone: dict[int, int] = {}
    for view in views:
        if (
            only is not None
            and not (_seen(frame, view, *camera_pose(view, frame.ego)) & (np.array(frame.things) == only)).any()
        ):
            continue
        drawing = draw(stage, frame, view, view, 1)
        corners, numbers, owner, _, _ = _ordered_faces(frame, view)
        faces = drawing.ids[(drawing.ids > 0) & (drawing.ids < drawing.first_wall)] - 1
        owners = np.concatenate([frame.owner, frame.disc_owner])
        counts = np.bincount(owners[faces], minlength=len(frame.things)) if len(faces) else np.zeros(len(frame.things))
        sheet = np.zeros(drawing.ids.shape, np.uint8)
        for k in np.unique(owner).tolist():
            n = frame.things[k]
            if n >= stage.actors or only not in (None, n):
                continue
            own = owner == k
            batch = _batch(corners[own], numbers[own], view, 1)
            if not len(batch.numbers):
                continue
            if batch.crossing.any():
                x0, y0, x1, y1 = 0, 0, view.size[0], view.size[1]
            else:
                flat = batch.pixels.reshape(-1, 2) >> SHIFT
                x0, y0 = np.maximum(flat.min(0), 0).tolist()
                x1, y1 = (np.minimum(flat.max(0), np.array(view.size)) + 2).tolist()
            _paint(batch, sheet, view, 1, 255)
            window = sheet[y0:y1, x0:x1]
            alone[n] = alone.get(n, 0) + int(np.count_nonzero(window))
            free[n] = free.get(n, 0) + int(counts[k])
            window[:] = 0
    return {n: min(free[n] / alone[n], 1.0) if alone[n] else 0.0 for n in alone}


def disc_materials(frame: Frame) -> Ints:
    """Materials of faces and discs by number - 1."""
    return np.r_[frame.materials, np.full(len(frame.discs), LEAF)]
