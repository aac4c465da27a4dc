"""Box codes as the car sees them: along and across the ray from the LiDAR to the place that a box is told from.

What a camera shows of a car is its angle to the ray, not its heading in the car's frame; said in this way, what is
learnt at one place holds all around, as in the polar frames of PolarFormer (Jiang 2023). Letters: ... any axes.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEAREST = 0.1
"""Metres: places that are nearer to the LiDAR have no bearing to speak of."""


def bearing(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the ray to places in metres (...)."""
    length = (x * x + y * y).sqrt().clamp(min=NEAREST)
    return x / length, y / length


def to_frame(code: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Codes (..., 10) along and across rays (...) -> the same in the LiDAR's frame.

    Its x, y are from the place, along and across; the network's yaw (see `boxes`) turns against the heading.
    """
    along, across, w, length, z, h, s, c, v_along, v_across = code.unbind(-1)
    return torch.stack(
        (
            cos * along - sin * across, sin * along + cos * across, w, length, z, h,
            s * cos - c * sin, c * cos + s * sin,
            cos * v_along - sin * v_across, sin * v_along + cos * v_across,
        ),
        -1,
    )  # fmt: skip


def local_yaw(yaw: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and cosine of the network's yaw (...) against rays, which `to_frame` brings back."""
    s, c = yaw.sin(), yaw.cos()
    return s * cos + c * sin, c * cos - s * sin
