"""From linear light to a stored picture: exposure, photon and read noise, blur, gamma; and what rain adds."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from kits.bev_perception.data.world.light import Light
from kits.bev_perception.data.world.rig import View

Picture = NDArray[np.uint8]


def develop(linear: NDArray[np.float32], light: Light, rng: np.random.Generator) -> Picture:
    """What the camera stores, BGR (H, W, 3), of a scene in linear light (1 is white).

    Photons arrive at random (Poisson), the read-out adds Gaussian noise, and both are amplified by the exposure. By
    day photons are so many that the Poisson distribution is drawn as its normal limit.
    """
    width = linear.shape[1]
    sigma = light.blur * width / 800
    image = cv2.GaussianBlur(linear, (0, 0), max(sigma, 0.25)) if sigma > 0.1 else linear
    expected = np.clip(image, 0.0, 4.0) * np.float32(light.electrons)
    if light.night:
        counted = rng.poisson(expected).astype(np.float32)
        noise = rng.standard_normal(expected.shape, dtype=np.float32) * np.float32(light.read_noise)
    else:
        counted = expected
        spread = np.sqrt(expected + np.float32(light.read_noise**2))
        noise = rng.standard_normal(expected.shape, dtype=np.float32) * spread
    signal = (counted + noise) * np.float32(light.exposure / light.electrons)
    return _GAMMA[np.clip(signal * 4095.0, 0, 4095).astype(np.uint16)]


_GAMMA = ((np.arange(4096) / 4095.0) ** (1 / 2.2) * 255 + 0.5).astype(np.uint8)


def wet_ground(linear: NDArray[np.float32], cam: View, depth: NDArray[np.float32]) -> NDArray[np.float32]:
    """Puddles and wet asphalt: level ground mirrors what stands above the horizon line, smeared downwards."""
    height, width = depth.shape
    ground = cam.below & (np.abs(depth - cam.ground_depth) < 0.02)
    rows = np.flatnonzero(cam.below.mean(1) > 0.5)
    if not len(rows):
        return linear
    horizon = int(rows[0])
    shift = np.array([[1, 0, 0], [0, -1, 2 * horizon]], np.float32)
    mirror = cv2.warpAffine(linear, shift, (width, height), borderMode=cv2.BORDER_REPLICATE)
    mirror = cv2.GaussianBlur(mirror, (0, 0), sigmaX=max(width / 300, 0.5), sigmaY=max(width / 60, 0.8))
    share = (0.10 + 0.26 * np.clip(depth / 40.0, 0, 1))[..., None].astype(np.float32) * ground[..., None]
    return linear * (1 - share) + mirror * share


def rain_on_lens(picture: Picture, light: Light, rng: np.random.Generator) -> Picture:
    """Streaks of falling rain and a few blurred drops on the lens."""
    height, width = picture.shape[:2]
    streaks = np.zeros((height, width), np.uint8)
    for _ in range(int(rng.integers(40, 110))):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        length = rng.uniform(0.02, 0.06) * height
        lean = rng.normal(0.1, 0.05) * length
        ends = ((int(x * 16), int(y * 16)), (int((x + lean) * 16), int((y + length) * 16)))
        cv2.line(streaks, ends[0], ends[1], int(rng.integers(25, 60)), 1, cv2.LINE_AA, 4)
    lift = cv2.GaussianBlur(streaks, (0, 0), 0.5).astype(np.float32) * (0.5 if light.night else 0.8)
    out = np.clip(picture + lift[..., None], 0, 255).astype(np.uint8)
    soft = cv2.GaussianBlur(out, (0, 0), max(width / 60, 1.0))
    drops = np.zeros((height, width), np.uint8)
    for _ in range(int(rng.integers(2, 8))):
        at = (int(rng.integers(0, width)), int(rng.integers(0, height)))
        cv2.circle(drops, at, int(width * rng.uniform(0.008, 0.03)) + 1, 255, -1, cv2.LINE_AA)
    share = cv2.GaussianBlur(drops, (0, 0), max(width / 200, 0.6)).astype(np.float32)[..., None] / 255.0 * 0.85
    return (out * (1 - share) + soft * share).astype(np.uint8)
