"""What lights a scene: sun and sky by day, lamps and head lights by night, a grey sky in the rain."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from kits.bev_perception.data.world.actors import Scene

Floats = NDArray[np.floating]

LIGHTS = ("day", "night", "rain", "night-rain")
SKY_SIZE = (1024, 192)
"""Columns over the full turn, rows from the zenith side (60 degrees) down to the horizon."""
SKY_TOP = np.pi / 3
CELL = 0.5
"""Metres a cell of the map of lamp light."""
SPAN = 60.0
"""Metres from ego to the edge of that map."""


@dataclass(frozen=True)
class Light:
    """The light of one rendering; colours are BGR factors in linear light."""

    name: str
    night: bool
    rain: bool
    sun: Floats
    """Unit vector towards the sun."""
    direct: float
    """Sunlight on a face that looks at the sun; 0 when overcast or at night."""
    ambient: Floats
    haze: Floats
    """Colour of the air far away, linear."""
    haze_length: float
    """Metres after which two thirds of a colour are haze."""
    gain: float
    """Linear gain of the scene's ambient light: 1 by day, 0.02 to 0.1 by night."""
    exposure: float
    """Gain of the camera."""
    electrons: float
    """Electrons at white and exposure 1; fewer are noisier."""
    read_noise: float
    """Electrons."""
    blur: float
    """Sigma of the lens and motion blur, in pixels of an 800-pixel picture."""


def build_light(name: str, seed: tuple[int, ...]) -> Light:
    """The light called day, night, rain or night-rain for a scene's seed."""
    rng = np.random.default_rng([*seed, 404])
    azimuth, elevation = rng.uniform(-np.pi, np.pi), rng.uniform(np.radians(24), np.radians(62))
    sun = np.array([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)])
    cloudy, murk, dark = float(rng.uniform(0, 1)), float(rng.uniform(0, 1)), float(rng.uniform(0, 1))
    rain = "rain" in name
    if "night" in name:
        haze = np.array([0.030, 0.022, 0.018]) * (1.6 if rain else 1.0)
        return Light(
            name, True, rain, sun, 0.0, np.array([1.15, 1.0, 0.9]), haze, 140.0 if rain else 260.0,
            0.02 + 0.08 * dark**2, 1.3 + 0.8 * murk, 420.0 + 500.0 * (1 - murk), 2.6, 0.75,
        )  # fmt: skip
    if rain:
        return Light(
            name, False, True, sun, 0.0, np.array([0.82, 0.78, 0.75]), np.array([0.50, 0.48, 0.47]),
            90.0 + 60.0 * murk, 1.0, 0.88, 5000.0, 2.0, 0.7,
        )  # fmt: skip
    direct = min(0.52 / sun[2], 1.1) * (1.0 if cloudy < 0.7 else 0.35)
    shade = 0.5 if cloudy < 0.7 else 0.75
    return Light(
        name, False, False, sun, direct, np.array([1.12, 1.0, 0.94]) * shade, np.array([0.66, 0.60, 0.55]),
        230.0 + 260.0 * murk, 1.0, 0.95 + 0.12 * dark, 9000.0, 2.0, 0.35,
    )  # fmt: skip


def sky_picture(light: Light, seed: tuple[int, ...]) -> NDArray[np.uint8]:
    """The sky as (rows, columns, 3) BGR over azimuth and elevation, gamma encoded."""
    columns, rows = SKY_SIZE
    rng = np.random.default_rng([*seed, 505])
    elevation = np.linspace(SKY_TOP, 0.0, rows)[:, None]
    azimuth = np.linspace(-np.pi, np.pi, columns, endpoint=False)[None]
    noise = np.zeros((rows, columns), np.float32)
    for octave in range(4):
        cells = rng.normal(size=(4 + 5 * 2**octave, 8 * 2**octave)).astype(np.float32)
        cells = np.concatenate([cells, cells[:, :1]], 1)
        big = cv2.resize(cells, (columns + columns // 8, rows), interpolation=cv2.INTER_CUBIC)[:, :columns]
        noise += big * 0.55**octave
    # the last columns run into the first ones, so that the seam does not show
    blend = np.clip((np.arange(columns) - 0.9 * columns) / (0.1 * columns), 0, 1)[None]
    noise = noise * (1 - blend) + noise[:, :1] * blend
    skyline = _skyline(rng, elevation, columns)
    if light.night:
        base = light.haze * (0.25 + 0.75 * np.exp(-elevation * 5.0))[..., None]
        sky = base * (1.0 + 0.25 * noise[..., None] * 0.4) * (0.6 + 6.0 * light.gain)
        return _encode(_before(sky, skyline, light.haze * (0.5 + 3.0 * light.gain)) * light.exposure)
    if light.rain:
        sky = light.haze * (1.0 - 0.12 * np.sin(elevation))[..., None] * (1.0 + 0.08 * noise[..., None])
        return _encode(_before(sky, skyline, light.haze * 0.8))
    zenith = np.array([0.62, 0.32, 0.17])
    fade = np.exp(-elevation * 2.6)[..., None]
    sky = zenith * (1 - fade) + light.haze * 1.08 * fade
    facing = np.cos(elevation) * np.cos(azimuth) * light.sun[0] + np.cos(elevation) * np.sin(azimuth) * light.sun[1]
    facing = facing + np.sin(elevation) * light.sun[2]
    clear = light.direct > 0.5
    cover = (
        np.clip((noise - (0.35 if clear else -0.9)) * 0.9, 0, 1)[..., None] * np.clip(elevation * 9, 0, 1)[..., None]
    )
    cloud = np.array([0.86, 0.84, 0.83]) * (0.86 + 0.14 * np.clip(noise, -1, 1))[..., None]
    sky = sky * (1 - 0.85 * cover) + cloud * 0.85 * cover
    if clear:
        glow = 0.5 * np.clip(facing, 0, 1) ** 16 + 3.0 * np.clip(facing, 0, 1) ** 400
        sky = sky + np.array([0.7, 0.9, 1.0]) * glow[..., None]
    return _encode(_before(sky, skyline, light.haze * np.array([0.80, 0.72, 0.66])))


def _skyline(rng: np.random.Generator, elevation: Floats, columns: int) -> NDArray[np.bool_]:
    """Where far roofs and trees stand before the sky, (rows, columns)."""
    roofs = np.repeat(rng.uniform(0.012, 0.075, columns // 8), 8)
    crowns = 0.018 + 0.010 * np.abs(np.sin(np.arange(columns) * 0.37) + np.sin(np.arange(columns) * 0.23))
    return np.asarray(elevation < np.maximum(roofs * (rng.random(columns // 8).repeat(8) < 0.7), crowns)[None])


def _before(sky: Floats, skyline: NDArray[np.bool_], colour: Floats) -> Floats:
    return np.where(skyline[..., None], sky * 0.25 + colour * 0.75, sky)


def _encode(linear: Floats) -> NDArray[np.uint8]:
    return (np.clip(linear, 0, 1) ** (1 / 2.2) * 255 + 0.5).astype(np.uint8)


def lamp_maps(scene: Scene, tick: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Light on the ground around ego from street lamps and from head lights, each (n, n) in the ego frame.

    Cell [i, j] lies at x = -SPAN + j * CELL, y = -SPAN + i * CELL.
    """
    n = int(2 * SPAN / CELL) + 1
    axis = (np.arange(n) * CELL - SPAN).astype(np.float32)
    ex, ey, heading = scene.ego[tick]
    cos, sin = np.cos(heading), np.sin(heading)

    def to_ego(x: Floats, y: Floats) -> tuple[Floats, Floats]:
        return (x - ex) * cos + (y - ey) * sin, -(x - ex) * sin + (y - ey) * cos

    street = np.zeros((n, n), np.float32)
    lamps = scene.dressing.lamps
    lx, ly = to_ego(lamps[:, 0] + 2.1 * np.cos(lamps[:, 2]), lamps[:, 1] + 2.1 * np.sin(lamps[:, 2]))
    for x, y in zip(lx, ly):
        if abs(x) < SPAN + 15 and abs(y) < SPAN + 15:
            rows, columns = _window(y, 24.0, n), _window(x, 24.0, n)
            square = (axis[rows, None] - y) ** 2 + (axis[None, columns] - x) ** 2
            street[rows, columns] += 1.0 / (1.0 + square / 38.0) ** 2
    beams = np.zeros((n, n), np.float32)
    sources = [(3.1, 0.0, 0.0, 1.0)]
    for actor in scene.actors:
        if actor.role == "moving" and (actor.model.lamps[:, 3] > 0).any():
            x, y, yaw = actor.track[tick]
            nose = float(actor.size[1]) / 2
            ax, ay = to_ego(x + np.cos(yaw) * nose, y + np.sin(yaw) * nose)
            if abs(ax) < SPAN and abs(ay) < SPAN:
                sources.append((float(ax), float(ay), float(yaw - heading), 0.75))
    for x, y, yaw, strength in sources:
        rows, columns = _window(y, 48.0, n), _window(x, 48.0, n)
        dx, dy = axis[None, columns] - x, axis[rows, None] - y
        along, across = dx * np.cos(yaw) + dy * np.sin(yaw), -dx * np.sin(yaw) + dy * np.cos(yaw)
        ahead = np.maximum(along, 0.01)
        cone = np.exp(-((across / (0.36 * ahead + 0.7)) ** 2)) * np.clip(along / 1.5, 0, 1)
        beams[rows, columns] += strength * cone / (1.0 + (ahead / 13.0) ** 2)
    return street, beams


def _window(at: float, reach: float, n: int) -> slice:
    low = int(np.clip((at - reach + SPAN) / CELL, 0, n))
    return slice(low, int(np.clip((at + reach + SPAN) / CELL + 1, low, n)))
