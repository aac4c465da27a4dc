"""Grounds of the scenes: three plain ones and four painted as soft gradients, in colours that no thing has."""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray

BACKGROUNDS = ("white", "black", "grey", "meadow", "sea", "night sky", "sunset")
VARIANTS = 32  # paintings of each ground
_SIZE = 64


@cache
def backdrop(name: str, variant: int) -> NDArray[np.float32]:
    """One painting of a ground, float32 RGB (64, 64, 3) in 0..255; do not write into it."""
    rng = np.random.default_rng([BACKGROUNDS.index(name), variant])
    if name == "white":
        painted = _gradient([(0, (252, 252, 252)), (1, (242, 243, 245))])
    elif name == "black":
        painted = _gradient([(0, (10, 10, 11)), (1, (20, 20, 21))])
    elif name == "grey":
        painted = _gradient([(0, (140, 141, 143)), (1, (122, 123, 125))])
    elif name == "meadow":
        painted = _meadow(rng)
    elif name == "sea":
        painted = _sea(rng)
    elif name == "night sky":
        painted = _night(rng)
    else:
        painted = _sunset(rng)
    return np.clip(painted, 0, 255).astype(np.float32)


def _gradient(stops: list[tuple[float, tuple[int, int, int]]]) -> NDArray[np.float64]:
    """A picture whose rows run through colours at heights from 0 (top) to 1 (bottom)."""
    heights = (np.arange(_SIZE) + 0.5) / _SIZE
    places = [at for at, _ in stops]
    rows = np.stack([np.interp(heights, places, [c[i] for _, c in stops]) for i in range(3)], -1)
    return np.repeat(rows[:, None], _SIZE, 1)


def _soft_noise(rng: np.random.Generator, sigma_x: float, sigma_y: float) -> NDArray[np.float64]:
    """Smooth noise of mean 0 and deviation 1, (64, 64, 1)."""
    noise = cv2.GaussianBlur(rng.normal(size=(_SIZE, _SIZE)), (0, 0), sigmaX=sigma_x, sigmaY=sigma_y)
    return ((noise - noise.mean()) / noise.std())[..., None]


def _meadow(rng: np.random.Generator) -> NDArray[np.float64]:
    """Pale sky above two soft hills in sage."""
    painted = _gradient([(0, (206, 226, 238)), (0.45, (232, 240, 238)), (1, (232, 240, 238))])
    x, y = np.meshgrid(np.arange(_SIZE) + 0.5, np.arange(_SIZE) + 0.5)
    for base, swing, top, bottom in (
        (20, 3.0, (186, 208, 164), (172, 198, 148)),
        (30, 4.0, (168, 194, 136), (138, 168, 106)),
    ):
        ridge = base + rng.uniform(-2, 2) + swing * np.sin(x * rng.uniform(0.05, 0.09) + rng.uniform(0, 2 * np.pi))
        cover = np.clip(y - ridge, 0, 1)[..., None]
        depth = np.clip((y - ridge) / (_SIZE - base), 0, 1)[..., None]
        painted = painted * (1 - cover) + cover * ((1 - depth) * np.array(top) + depth * np.array(bottom))
    return painted + 2.5 * _soft_noise(rng, 0.8, 1.6) * np.clip(y - 26, 0, 8)[..., None] / 8


def _sea(rng: np.random.Generator) -> NDArray[np.float64]:
    """Hazy sky above slate-blue water with long soft waves."""
    horizon = rng.uniform(0.26, 0.34)
    sky = [(0.0, (196, 212, 224)), (horizon, (226, 232, 234))]
    painted = _gradient([*sky, (horizon + 0.02, (128, 164, 182)), (1, (82, 122, 148))])
    y = np.arange(_SIZE)[:, None, None] / _SIZE
    return painted + 4.5 * _soft_noise(rng, 6, 0.9) * (y > horizon + 0.03)


def _night(rng: np.random.Generator) -> NDArray[np.float64]:
    """Deep indigo, lighter towards the ground, with a few faint stars."""
    painted = _gradient([(0, (26, 28, 58)), (1, (66, 66, 108))]) + 2.0 * _soft_noise(rng, 9, 6)
    for _ in range(14):
        x, y = rng.integers(1, _SIZE - 1, size=2)
        glow = rng.uniform(40, 110)
        painted[y, x] += glow
        for dx, dy in ((0, 1), (1, 0), (0, -1), (-1, 0)):
            painted[y + dy, x + dx] += 0.25 * glow
    return painted


def _sunset(rng: np.random.Generator) -> NDArray[np.float64]:
    """Mauve over rose and peach, with the glow of a sun that has just gone."""
    painted = _gradient(
        [
            (0, (122, 106, 138)),
            (0.45, (196, 152, 158)),
            (0.75, (240, 204, 172)),
            (0.8, (150, 122, 128)),
            (1, (112, 94, 108)),
        ]
    )
    x, y = np.meshgrid(np.arange(_SIZE) + 0.5, np.arange(_SIZE) + 0.5)
    away = np.hypot((x - rng.uniform(16, 48)) / 16, (y - 48) / 11)
    glow = np.exp(-(away**2))[..., None] * (y < 49)[..., None]
    painted = painted + glow * np.array([12, 26, 10])
    return painted + 2.5 * _soft_noise(rng, 8, 1.5)
