"""Pictures of the world: what `raster.draw` found, coloured and lit.

Everything is coloured in flat light at `ss` samples a pixel, averaged down, and then lit by where each pixel lies, in
linear light; so a day and a night picture of a scene differ in light alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from kits.bev_perception.data.world import light as lights
from kits.bev_perception.data.world.light import Light, build_light, lamp_maps, sky_picture
from kits.bev_perception.data.world.night import develop, rain_on_lens, wet_ground
from kits.bev_perception.data.world.raster import Drawing, Frame, Stage, camera_pose, clip_near, disc_materials, draw
from kits.bev_perception.data.world.rig import View, view
from kits.bev_perception.data.world.shapes import GLASS, HEADLAMP, LEAF, LIT, PAINT, TAILLAMP
from kits.bev_perception.data.world.town import RESOLUTION, ground

Floats = NDArray[np.floating]
Picture = NDArray[np.uint8]

LEVELS = (1, 4, 12)
"""Pixels of the ground's picture that one pixel of each coarser copy stands for."""


@dataclass(frozen=True)
class Facade:
    """A style of wall: colours BGR, window grid in metres, share of a cell that is window."""

    wall: tuple[float, float, float]
    frame: tuple[float, float, float]
    column: float
    floor: float
    wide: float
    tall: float


FACADES = (
    Facade((84, 104, 158), (198, 202, 206), 2.9, 3.2, 0.44, 0.55),  # brick
    Facade((176, 196, 208), (120, 122, 124), 3.3, 3.2, 0.50, 0.52),  # plaster
    Facade((150, 152, 154), (96, 98, 100), 2.4, 3.4, 0.72, 0.58),  # concrete
    Facade((128, 112, 96), (86, 82, 78), 1.7, 3.6, 0.90, 0.86),  # glass
    Facade((120, 158, 190), (222, 224, 226), 3.1, 3.1, 0.42, 0.58),  # sandstone
    Facade((206, 208, 206), (70, 72, 74), 3.8, 3.3, 0.62, 0.50),  # white
)
AWNINGS = np.array([(58, 56, 160), (60, 110, 60), (150, 92, 48), (52, 150, 206), (200, 200, 198), (60, 60, 64)], float)


class Look:
    """A scene's surfaces, and how each of its lights changes them; built once a scene."""

    def __init__(self, stage: Stage, names: tuple[str, ...]) -> None:
        scene = stage.scene
        rng = np.random.default_rng([*scene.seed, 606])
        self.stage = stage
        self.ground = _levels(ground(scene.town, scene.dressing, rng))
        self.grain = rng.normal(0.0, 1.0, (256, 256)).astype(np.float32)
        self.lights = {name: build_light(name, scene.seed) for name in names}
        self.skies = {name: sky_picture(light, scene.seed) for name, light in self.lights.items()}
        self.shadows: dict[str, NDArray[np.float32]] = {}
        self.lit_ground: dict[str, list[Picture]] = {}
        for name, light in self.lights.items():
            if light.direct > 0:
                shadow = self._still_shadows(light)
                self.shadows[name] = shadow
                up = light.ambient + light.direct * light.sun[2] * shadow[..., None]
                factor = np.clip(up ** (1 / 2.2) * 128, 0, 255).astype(np.uint8)
                big = cv2.resize(factor, self.ground[0].shape[1::-1], interpolation=cv2.INTER_LINEAR)
                lit = cv2.multiply(self.ground[0], big, scale=1 / 128)
                self.lit_ground[name] = _levels(lit)
        count = len(scene.dressing.buildings)
        self.wall_tint = rng.uniform(0.82, 1.12, (count, 1)) * rng.uniform(0.94, 1.06, (count, 3))

    def _still_shadows(self, light: Light) -> NDArray[np.float32]:
        """Share of sunlight on the ground, four pixels of its picture a pixel: buildings and trees."""
        scene = self.stage.scene
        x0, y0, x1, y1 = scene.dressing.region
        cell = RESOLUTION * 4
        sheet = np.full((int((y1 - y0) / cell), int((x1 - x0) / cell)), 255, np.uint8)
        reach = -light.sun[:2] / light.sun[2]
        for a, b, c, d, height in scene.dressing.buildings:
            foot = np.array([[a, b], [c, b], [c, d], [a, d]])
            outline = cv2.convexHull(np.concatenate([foot, foot + reach * height]).astype(np.float32))
            cv2.fillConvexPoly(sheet, ((outline - (x0, y0)) / cell * 16).astype(np.int32), 0, 8, 4)
        for thing in self.stage.things:
            if thing.crown is not None:
                for x, y, z, r in thing.crown:
                    middle = (np.array([x, y]) + reach * z - (x0, y0)) / cell
                    cv2.circle(sheet, tuple((middle * 16).astype(int).tolist()), int(r * 0.9 / cell * 16), 60, -1, 8, 4)
        return cv2.GaussianBlur(sheet, (3, 3), 0).astype(np.float32) / 255.0

    def sunlight(self, name: str, points: Floats) -> Floats:
        """Share of sunlight (n,) at world points (n, 2)."""
        shadow = self.shadows.get(name)
        if shadow is None or not len(points):
            return np.ones(len(points))
        cell = RESOLUTION * 4
        x0, y0 = self.stage.scene.dressing.region[:2]
        i = np.clip(((points[:, 1] - y0) / cell).astype(int), 0, shadow.shape[0] - 1)
        j = np.clip(((points[:, 0] - x0) / cell).astype(int), 0, shadow.shape[1] - 1)
        return shadow[i, j]


def _levels(picture: Any) -> list[Picture]:
    height, width = picture.shape[:2]
    small = [cv2.resize(picture, (width // k, height // k), interpolation=cv2.INTER_AREA) for k in LEVELS[1:]]
    return [picture, *small]


def render(look: Look, frame: Frame, tick: int, channel: str, size: tuple[int, int], ss: int = 2) -> dict[str, Picture]:
    """The picture of one camera, BGR (H, W, 3), in each light of `look`."""
    cam = view(channel, size)
    fine = view(channel, (size[0] * ss, size[1] * ss))
    drawing = draw(look.stage, frame, cam, fine, ss)
    depth = _depth(drawing, cam, ss)
    wall_mask = drawing.ids >= drawing.first_wall
    facade = _facade(look, drawing, frame, fine, wall_mask)
    face_mask = (drawing.ids > 0) & ~wall_mask
    ids = drawing.ids[face_mask] - 1
    leaves = disc_materials(frame)[ids] == LEAF
    speckle = _speckle(look, fine, face_mask)[leaves]
    pictures: dict[str, Picture] = {}
    maps: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
    for name, light in look.lights.items():
        base = _backdrop(look, name, light, frame, cam, fine, ss)
        if light.direct > 0:
            _moving_shadows(look, name, light, frame, cam, ss, base)
        elif not light.night:
            _contact(look, frame, cam, ss, base)
        base[wall_mask] = _lit_walls(facade, light)
        colours = _face_colours(look, frame, name, light)[ids]
        colours[leaves] *= 1.0 + 0.16 * speckle[:, None]
        base[face_mask] = np.clip(colours, 0, 255).astype(np.uint8)
        flat = cv2.resize(base, size, interpolation=cv2.INTER_AREA) if ss > 1 else base
        rng = np.random.default_rng([*look.stage.scene.seed, 707, tick, _number(channel), _number(name)])
        linear = _DECODE[flat]
        sky = ~cam.below & (depth >= 399.0)
        if light.night:
            maps = maps or lamp_maps(look.stage.scene, tick)
            emission = _emission(look, frame, drawing, fine, facade, wall_mask, face_mask, ids, size, ss, light)
            glow = _lamp_glow(look, frame, cam, depth, tick)
            linear = _lit_by_lamps(linear, depth, cam, light, maps, sky)
            linear += _bloom(emission, glow, size[0])
        fog = (1.0 - np.exp(-np.minimum(depth, 400.0) / light.haze_length))[..., None].astype(np.float32)
        fog[sky] = 0.0
        air = light.haze.astype(np.float32) * (0.3 + 4.0 * light.gain if light.night else 1.0)
        linear = linear * (1 - fog) + air * fog
        if light.rain:
            linear = wet_ground(linear, cam, depth)
        picture = develop(linear, light, rng)
        pictures[name] = rain_on_lens(picture, light, rng) if light.rain else picture
    return pictures


_DECODE = ((np.arange(256) / 255.0) ** 2.2).astype(np.float32)


def _number(text: str) -> int:
    return sum(ord(c) * (i + 1) for i, c in enumerate(text))


def _depth(drawing: Drawing, cam: View, ss: int) -> NDArray[np.float32]:
    """Depth (H, W) at about the middle of each pixel; the ground's where nothing stands, 400 for the sky."""
    height, width = cam.size[1], cam.size[0]
    at = ss // 2
    depth = drawing.depth[at::ss, at::ss][:height, :width]
    return np.where(depth > 0, depth, cam.ground_depth)


def _speckle(look: Look, fine: View, mask: NDArray[np.bool_]) -> Floats:
    rows, columns = np.nonzero(mask)
    return look.grain[(rows // 2) & 255, (columns // 2) & 255]


def _backdrop(look: Look, name: str, light: Light, frame: Frame, cam: View, fine: View, ss: int) -> Picture:
    """Sky and ground at `ss` samples a pixel."""
    width, height = fine.size
    sky = look.skies[name]
    # azimuth runs to the left, columns of the sky's picture with it
    x = (
        ((fine.azimuth + np.float32(frame.ego[2])) / np.float32(2 * np.pi) + np.float32(0.5))
        % 1
        * np.float32(sky.shape[1])
    )
    y = (1 - np.clip(fine.elevation / np.float32(lights.SKY_TOP), 0, 1)) * np.float32(sky.shape[0] - 1)
    ground_rows, sky_rows = np.flatnonzero(fine.below.any(1)), np.flatnonzero(~fine.below.all(1))
    first = int(ground_rows[0]) if len(ground_rows) else height
    last = int(sky_rows[-1]) + 1 if len(sky_rows) else 0
    out = np.zeros((height, width, 3), np.uint8)
    out[:last] = cv2.remap(sky, x[:last], y[:last], cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    rotation, place = camera_pose(cam, frame.ego)
    K = cam.K
    ray = rotation @ np.array([[1 / K[0, 0], 0, -K[0, 2] / K[0, 0]], [0, 1 / K[1, 1], -K[1, 2] / K[1, 1]], [0, 0, 1]])
    ray = ray @ np.array([[1 / ss, 0, 0.5 / ss], [0, 1 / ss, (first + 0.5) / ss], [0, 0, 1]])
    ground = np.stack([place[0] * ray[2] - place[2] * ray[0], place[1] * ray[2] - place[2] * ray[1], ray[2]])
    x0, y0 = look.stage.scene.dressing.region[:2]
    levels = look.lit_ground.get(name, look.ground)
    depth = fine.ground_depth[first:]
    focal = K[0, 0] * ss
    area = out[first:]
    for level, (picture, factor) in enumerate(zip(levels, LEVELS)):
        cell = RESOLUTION * factor
        affine = np.array([[1 / cell, 0, -x0 / cell - 0.5], [0, 1 / cell, -y0 / cell - 0.5], [0, 0, 1]])
        flat = (62, 66, 66) if level else (80, 84, 84)
        start = 0.0 if level == 0 else float(np.sqrt(1.6 * cell * place[2] * focal))
        rows = np.flatnonzero((depth >= start).any(1))
        if not len(rows):
            continue
        # farther is higher up: a coarser copy replaces the rows from the top down to where it starts
        below = int(rows[-1]) + 1
        warped = cv2.warpPerspective(
            picture, affine @ ground, (width, below), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderValue=flat
        )
        mask = (fine.below[first : first + below] & (depth[:below] >= start)).astype(np.uint8)
        cv2.copyTo(warped, mask, area[:below])
    if name not in look.lit_ground:
        # no sun: level ground keeps the sky's light
        gain = ((light.ambient if not light.night else np.ones(3)) ** (1 / 2.2) * 256).astype(np.int32)
        if light.rain:
            gain = (gain * 0.80).astype(np.int32)
        scaled = np.minimum(area.astype(np.int32) * gain >> 8, 255).astype(np.uint8)
        cv2.copyTo(scaled, fine.below[first:].astype(np.uint8), area)
    return out


def _outlines(corners: list[Floats], frame: Frame, cam: View, ss: int) -> list[NDArray[np.int32]]:
    """World polygons on the ground as outlines in the picture, cut at the near plane."""
    rotation, place = camera_pose(cam, frame.ego)
    found = []
    for polygon in corners:
        flat = np.column_stack([polygon, np.zeros(len(polygon))])
        cut: Floats = (flat - place) @ rotation
        if (cut[:, 2] < 0.3).any():
            cut = clip_near(cut)
        if len(cut) < 3:
            continue
        pixels = (cut[:, :2] / cut[:, 2:] * [cam.K[0, 0], cam.K[1, 1]] + cam.K[:2, 2]) * ss - 0.5
        found.append(np.rint(np.clip(pixels * 16, -1e7, 1e7)).astype(np.int32))
    return found


def _feet(look: Look, frame: Frame, grow: float) -> list[tuple[Floats, float, int]]:
    """Footprint (4, 2), height and number of each thing near enough for its shadow to matter."""
    found = []
    for k, n in enumerate(frame.things):
        if n >= look.stage.actors or np.hypot(*(frame.centres[k, :2] - frame.ego[:2])) > 60.0:
            continue
        actor = look.stage.scene.actors[n]
        w, length = float(actor.size[0]) * grow / 2, float(actor.size[1]) * grow / 2
        x, y = frame.centres[k, :2]
        yaw = actor.track[frame.tick, 2]
        turn = np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])
        corners = np.array([[length, w], [-length, w], [-length, -w], [length, -w]]) @ turn.T + (x, y)
        found.append((corners, float(actor.size[2]), k))
    return found


def _moving_shadows(look: Look, name: str, light: Light, frame: Frame, cam: View, ss: int, base: Picture) -> None:
    """Darken the ground where actors take the sun away."""
    reach = -light.sun[:2] / light.sun[2]
    polygons = []
    lit = look.sunlight(name, frame.centres[:, :2])
    for corners, height, k in _feet(look, frame, 0.92):
        if lit[k] > 0.5:
            outline = np.concatenate([corners, corners + reach * height * 0.9]).astype(np.float32)
            polygons.append(cv2.convexHull(outline)[:, 0].astype(float))
    shade = float(np.mean((light.ambient / (light.ambient + light.direct * light.sun[2])) ** (1 / 2.2)))
    _darken(_outlines(polygons, frame, cam, ss), base, shade)
    _contact(look, frame, cam, ss, base)


def _contact(look: Look, frame: Frame, cam: View, ss: int, base: Picture) -> None:
    """Darken the ground right under actors."""
    _darken(_outlines([c for c, _, _ in _feet(look, frame, 1.0)], frame, cam, ss), base, 0.55)


def _darken(outlines: list[NDArray[np.int32]], base: Picture, gain: float) -> None:
    if not outlines:
        return
    mask = np.zeros(base.shape[:2], np.uint8)
    for outline in outlines:
        cv2.fillConvexPoly(mask, outline, 255, 8, 4)
    rows = np.flatnonzero(mask.any(1))
    if not len(rows):
        return
    part = slice(int(rows[0]), int(rows[-1]) + 1)
    dark = cv2.convertScaleAbs(base[part], alpha=gain)
    cv2.copyTo(dark, mask[part], base[part])


def _face_colours(look: Look, frame: Frame, name: str, light: Light) -> Floats:
    """Gamma-encoded colour (n, 3) of every face and disc in a light."""
    colours = np.concatenate([frame.colours, frame.disc_colours])
    normals = np.concatenate([frame.normals, np.tile([0.0, 0.0, 0.4], (len(frame.discs), 1))])
    owner = np.r_[frame.owner, frame.disc_owner]
    materials = disc_materials(frame)
    if light.night:
        # a camera's head lights come from its own side: faces are lit flat, a little less from above
        return colours * (0.95 - 0.15 * np.abs(normals[:, 2:]))
    lit = look.sunlight(name, frame.centres[:, :2])[owner] if len(owner) else np.zeros(0)
    sun = light.direct * np.clip(normals @ light.sun, 0, None) * lit
    sun[materials == LEAF] = light.direct * 0.45 * lit[materials == LEAF]
    shade = light.ambient * (0.80 + 0.28 * normals[:, 2:]) + sun[:, None]
    linear = (colours / 255.0) ** 2.2 * shade
    up = np.clip(normals[:, 2:], 0, 1)
    glossy = (materials == PAINT)[:, None]
    glass = (materials == GLASS)[:, None] | (materials == LIT)[:, None]
    linear = np.where(glossy, linear + light.haze * 0.09 * up, linear)
    linear = np.where(glass, linear * 0.6 + light.haze * (0.07 + 0.30 * up), linear)
    return (np.clip(linear, 0, 1) ** (1 / 2.2) * 255).astype(np.float32)


@dataclass
class _Walls:
    flat: NDArray[np.float32]
    """(M, 3) gamma-encoded colour in flat light of each wall pixel."""
    which: NDArray[np.int32]
    """(M,) which wall of the drawing: index into `normals`."""
    normals: Floats
    windows: NDArray[np.bool_]
    glow: NDArray[np.float32]
    """(M,) light behind the window at night, 0 to 1."""


def _facade(look: Look, drawing: Drawing, frame: Frame, fine: View, mask: NDArray[np.bool_]) -> _Walls:
    """Bricks, windows, shops and ledges at every pixel that sees a wall."""
    stage = look.stage
    rotation, place = camera_pose(fine, frame.ego)
    which = drawing.ids[mask] - drawing.first_wall
    points = fine.camera_rays[mask] @ rotation.T.astype(np.float32)
    points *= drawing.depth[mask][:, None]
    points += place.astype(np.float32)

    # what holds for a whole wall, then spread over its pixels
    wall = drawing.walls
    building = stage.wall_building[wall]
    style = stage.scene.dressing.styles[building]
    start, along = stage.wall_start[wall], stage.wall_end[wall] - stage.wall_start[wall]
    long = np.abs(along).sum(1)
    axis = along / long[:, None]
    facades = [FACADES[k] for k in style]
    columns = np.maximum(np.round(long / [f.column for f in facades]), 1)
    shops = np.maximum(np.round(long / 4.2), 1)

    def spread(values: Any) -> NDArray[np.float32]:
        return np.asarray(values, np.float32)[which]

    v = points[:, 2]
    u = points[:, 0] * spread(axis[:, 0]) + points[:, 1] * spread(axis[:, 1]) - spread((start * axis).sum(1))
    shop = v < 4.0
    cu = u * np.where(shop, spread(shops / long), spread(columns / long))
    iu = np.floor(cu)
    ru = np.abs(cu - iu - np.float32(0.5))
    cv = (v - np.float32(4.0)) * spread([1 / f.floor for f in facades])
    iv = np.floor(cv)
    part = cv - iv
    rv = np.abs(part - np.float32(0.47))
    top = spread(stage.wall_height[wall]) - v
    half_wide, half_tall = spread([f.wide / 2 for f in facades]), spread([f.tall / 2 for f in facades])
    window = np.where(shop, (ru < 0.43) & (v > 0.6) & (v < 2.9), (ru < half_wide) & (rv < half_tall) & (top > 0.7))
    border = np.where(shop, (ru < 0.47) & (v > 0.4) & (v < 3.0), (ru < half_wide + 0.035) & (rv < half_tall + 0.035))
    # a number of its own for each window, from 0 to 4095
    code = iu.astype(np.int32) * 7919 + iv.astype(np.int32) * 5381 + (wall.astype(np.int32) * 6101)[which]
    code = ((code ^ (code >> 5)) * 2741) & 4095
    chance = (code & 1023).astype(np.float32) / np.float32(1023.0)
    grime = look.grain[(v * 9).astype(np.int32) & 255, (u * 9).astype(np.int32) & 255]
    shade = np.minimum(0.78 + 0.11 * v, 1.0, dtype=np.float32) * (1.0 + np.float32(0.03) * grime)
    shade[(np.abs(part) < 0.06) & ~shop] *= 0.86
    shade[top < 0.5] *= 1.12
    tint = np.array([f.wall for f in facades]).reshape(-1, 3) * look.wall_tint[building]
    flat = tint.astype(np.float32)[which] * shade[:, None]
    frames = np.array([f.frame for f in facades], np.float32).reshape(-1, 3)
    flat[border] = frames[which[border]]
    glass = (0.42 + 0.5 * chance[window] + 0.012 * v[window])[:, None] * np.array([104, 84, 66], np.float32)
    glass[((chance > 0.72) & (part > 0.45) & ~shop)[window]] = (182, 190, 194)
    flat[window] = glass
    awning = shop & (v > 2.9) & (v < 3.7)
    sign = (building[which[awning]] * 7 + iu[awning].astype(np.intp) // 2) % len(AWNINGS)
    flat[awning] = AWNINGS[sign] * (0.9 + 0.1 * np.sign(np.sin(u[awning] * 9)))[:, None]
    glow = np.zeros(len(v), np.float32)
    shining = np.flatnonzero(window & np.where(shop, chance > 0.35, chance < 0.24))
    uneven = 0.8 + 0.12 * np.sin(u[shining] * 4.3 + style[which[shining]]) + 0.08 * np.sin(v[shining] * 7.0)
    rise = np.where(shop[shining], 0.6 + 0.25 * v[shining], 1.0)
    glow[shining] = (0.25 + 0.75 * (code[shining] >> 4) / 255.0) * uneven * rise
    return _Walls(flat, which, stage.wall_normal[wall], window, glow)


def _lit_walls(facade: _Walls, light: Light) -> Picture:
    """The wall pixels in a light."""
    if light.night:
        return np.clip(facade.flat * 0.9, 0, 255).astype(np.uint8)
    sun = light.direct * np.clip(facade.normals @ light.sun[:2], 0, None)
    shade = ((light.ambient * 0.86 + sun[:, None]) ** (1 / 2.2)).astype(np.float32)
    lit = facade.flat * shade[facade.which]
    # glass shows the sky
    sky = (light.haze ** (1 / 2.2) * 255).astype(np.float32)
    lit[facade.windows] = lit[facade.windows] * 0.72 + sky * 0.20
    return np.clip(lit, 0, 255).astype(np.uint8)


def _emission(
    look: Look,
    frame: Frame,
    drawing: Drawing,
    fine: View,
    facade: _Walls,
    wall_mask: NDArray[np.bool_],
    face_mask: NDArray[np.bool_],
    ids: NDArray[np.int32],
    size: tuple[int, int],
    ss: int,
    light: Light,
) -> NDArray[np.float32]:
    """What shines by itself, (H, W, 3) linear: lit windows, lamps of moving vehicles, street lamps."""
    scene = look.stage.scene
    awake = np.array([n >= look.stage.actors or scene.actors[n].role == "moving" for n in frame.things], bool)
    table = np.zeros((len(frame.faces) + len(frame.discs), 3), np.float32)
    on = awake[frame.owner]
    for material, colour in ((HEADLAMP, (0.95, 1.0, 1.0)), (TAILLAMP, (0.06, 0.05, 0.85)), (LIT, (0.10, 0.17, 0.21))):
        table[: len(frame.faces)][(frame.materials == material) & on] = colour
    sheet = np.zeros((fine.size[1], fine.size[0], 3), np.float32)
    sheet[face_mask] = table[ids]
    warm = np.array([0.16, 0.34, 0.46], np.float32)
    sheet[wall_mask] = facade.glow[:, None] * warm * 0.32
    return np.asarray(cv2.resize(sheet, size, interpolation=cv2.INTER_AREA)) if ss > 1 else sheet


def _lamp_glow(look: Look, frame: Frame, cam: View, depth: NDArray[np.float32], tick: int) -> NDArray[np.float32]:
    """Halos of the lamps that are seen, (H, W, 3) linear; far lamps stay bright although they are small."""
    glow = np.zeros((cam.size[1], cam.size[0], 3), np.float32)
    scene = look.stage.scene
    rotation, place = camera_pose(cam, frame.ego)
    spots: list[tuple[Floats, float, tuple[float, float, float]]] = []
    for n in frame.things:
        if n >= look.stage.actors:
            model = look.stage.things[n].model
            if len(model.boxes) and look.stage.things[n].crown is None:
                x, y, yaw = scene.dressing.lamps[n - look.stage.actors]
                spots.append((np.array([x + 2.1 * np.cos(yaw), y + 2.1 * np.sin(yaw), 7.6]), 0.16, (0.5, 0.8, 1.0)))
            continue
        actor = scene.actors[n]
        if actor.role != "moving":
            continue
        x, y, yaw = actor.track[tick]
        heading = np.array([np.cos(yaw), np.sin(yaw)])
        side = np.array([-heading[1], heading[0]])
        for lx, ly, lz, end in actor.model.lamps:
            at = np.array([*(np.array([x, y]) + heading * lx + side * ly), lz])
            towards = float((place[:2] - at[:2]) @ heading * end)
            reach = float(np.linalg.norm(place - at))
            if towards / max(reach, 0.1) > 0.15:
                facing = towards / reach
                colour = (0.9, 0.97, 1.0) if end > 0 else (0.05, 0.06, 1.0)
                spots.append((at, (0.20 if end > 0 else 0.11) * facing, colour))
    for at, radius, colour in spots:
        u, v, z = cam.project(((at - place) @ rotation) @ cam.R.T + cam.t)
        if z < 0.5 or not (0 <= u < cam.size[0] and 0 <= v < cam.size[1]) or depth[int(v), int(u)] < z - 0.7:
            continue
        pixels = cam.K[0, 0] * radius / z
        strength = min(1.0, 0.35 + pixels)
        cv2.circle(
            glow,
            (int(u * 16 - 8), int(v * 16 - 8)),
            int(max(pixels, 0.7) * 16),
            tuple(strength * c for c in colour),
            -1,
            8,
            4,
        )
    return glow


def _lit_by_lamps(
    linear: NDArray[np.float32],
    depth: NDArray[np.float32],
    cam: View,
    light: Light,
    maps: tuple[NDArray[np.float32], NDArray[np.float32]],
    sky: NDArray[np.bool_],
) -> NDArray[np.float32]:
    """Flat colours under the night's light: a little from the sky, the rest from lamps by place and height."""
    at = cam.rays * np.minimum(depth, 200.0)[..., None] + cam.t.astype(np.float32)
    x = (at[..., 0] + lights.SPAN) / lights.CELL
    y = (at[..., 1] + lights.SPAN) / lights.CELL
    street = cv2.remap(maps[0], x, y, cv2.INTER_LINEAR, borderValue=0.03)
    beams = cv2.remap(maps[1], x, y, cv2.INTER_LINEAR, borderValue=0.0)
    z = at[..., 2]
    street *= np.clip((8.2 - z) / 3.0, 0.0, 1.0)
    beams *= 1.0 / (1.0 + np.exp(np.minimum((z - 1.15) * 3.2, 60.0)))
    warm, white = np.array([0.36, 0.66, 0.92], np.float32), np.array([0.84, 0.92, 0.94], np.float32)
    sum_ = (light.gain * light.ambient).astype(np.float32)
    total = sum_ + street[..., None] * (warm * 0.20) + beams[..., None] * (white * 0.42)
    total[sky] = 1.0 / light.exposure
    return linear * total


def _bloom(emission: NDArray[np.float32], glow: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """Lamps and the halo that lens and air put around them."""
    lamps = emission * 0.55 + glow * 0.8
    half = cv2.resize(lamps, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    narrow = cv2.GaussianBlur(half, (0, 0), width / 520)
    wide = cv2.GaussianBlur(half, (0, 0), width / 130)
    halo = narrow * 0.45 + wide * 0.5
    return lamps + np.asarray(
        cv2.resize(halo, (lamps.shape[1], lamps.shape[0]), interpolation=cv2.INTER_LINEAR), np.float32
    )
