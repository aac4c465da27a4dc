"""From two images of any size to the defects between them: registration, network, suppression, seams."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from core.evaluation.detection import suppress
from kits.pcb_inspection.model.decode import FLOOR, decode
from kits.pcb_inspection.model.decode import OVERLAP as IOU
from kits.pcb_inspection.model.pair import Grey, Registration, binarise, register, stack

TILE = 640
"""Side of the network's input in pixels."""
OVERLAP = 192
"""Pixels that neighbouring tiles share: a defect up to this long is whole in the tile that owns its centre."""
_SLACK = 8.0
_CONTAINED = 0.7


@dataclass(frozen=True)
class Inspection:
    """Detections (n, 6) x1 y1 x2 y2 score label in pixels, best first, and the registration of every tile."""

    detections: NDArray[np.float32]
    registrations: tuple[Registration, ...]

    @property
    def residual(self) -> float:
        """The largest share of differing pixels in a tile after registration: a wrong template shows here."""
        return max(r.residual for r in self.registrations)


def inspect(module: nn.Module, test: Grey, template: Grey, *, floor: float = FLOOR, on_tile: Callable[[], None] | None = None) -> Inspection:
    """Find the defects of a tested image against its template, both grey uint8 (H, W) of any size.

    Larger images go through the network tile by tile. Each tile owns the detections whose centre lies
    in its part of the image; what two tiles still both claim, within 8 px of a seam, is suppressed.
    """
    height, width = test.shape
    found, registrations = [], []
    for top, bottom, owned_rows in spans(height):
        for left, right, owned_columns in spans(width):
            here = np.s_[top:bottom, left:right]
            part, registration = _inspect_tile(module, test[here], template[here], floor)
            x, y = (part[:, 0] + part[:, 2]) / 2 + left, (part[:, 1] + part[:, 3]) / 2 + top
            mine = (
                (x >= owned_columns[0] - _SLACK) & (x < owned_columns[1] + _SLACK)
                & (y >= owned_rows[0] - _SLACK) & (y < owned_rows[1] + _SLACK)
            )  # fmt: skip
            found.append(part[mine] + np.array([left, top, left, top, 0, 0], np.float32))
            registrations.append(registration)
            if on_tile is not None:
                on_tile()
    detections = np.concatenate(found)
    if len(found) > 1:
        detections = detections[suppress(detections[:, :4], detections[:, 4], IOU)]
        detections = _without_parts(detections)
    return Inspection(detections, tuple(registrations))


def tile_count(height: int, width: int) -> int:
    """How many tiles an image is cut into."""
    return sum(1 for _ in spans(height)) * sum(1 for _ in spans(width))


def spans(length: int) -> Iterator[tuple[int, int, tuple[float, float]]]:
    """(start, end, owned interval) of the tiles along one side; the owned intervals cover it without overlap."""
    if length <= TILE:
        yield 0, length, (-np.inf, np.inf)
        return
    count = -(-(length - OVERLAP) // (TILE - OVERLAP))
    starts = [round(i * (length - TILE) / (count - 1)) for i in range(count)]
    borders = [-np.inf, *((a + TILE + b) / 2 for a, b in zip(starts, starts[1:], strict=False)), np.inf]
    for start, low, high in zip(starts, borders, borders[1:], strict=False):
        yield start, start + TILE, (low, high)


def _inspect_tile(module: nn.Module, test: Grey, template: Grey, floor: float) -> tuple[NDArray[np.float32], Registration]:
    height, width = test.shape
    test, template = binarise(test), binarise(template)
    template, registration = register(test, template)
    planes = stack(test, template)
    if planes.shape[1:] != (TILE, TILE):  # bare board around an image smaller than a tile
        padded = np.zeros((4, TILE, TILE), np.uint8)
        padded[:2] = 255
        padded[:, :height, :width] = planes
        planes = padded
    with torch.inference_mode():
        logits, distances = module(to_input(planes))
    found = decode(logits[0].numpy(), distances[0].numpy(), floor)
    found[:, :4] = found[:, :4].clip(0, np.array([width, height, width, height], np.float32))
    return found[(found[:, 2] - found[:, 0] >= 1) & (found[:, 3] - found[:, 1] >= 1)], registration


def to_input(planes: Grey) -> torch.Tensor:
    """The network's input (1, 4, H, W) float32 in 0..1 from planes (4, H, W) uint8."""
    return torch.from_numpy(np.multiply(planes, np.float32(1 / 255), dtype=np.float32))[None]


def _without_parts(detections: NDArray[np.float32]) -> NDArray[np.float32]:
    """Drop a weaker detection that lies mostly inside a stronger one of the same class, as a cut at a seam does."""
    kept: list[int] = []
    for i, (x1, y1, x2, y2, _, label) in enumerate(detections):
        near = detections[kept] if kept else detections[:0]
        near = near[near[:, 5] == label]
        wide = (np.minimum(near[:, 2], x2) - np.maximum(near[:, 0], x1)).clip(0)
        high = (np.minimum(near[:, 3], y2) - np.maximum(near[:, 1], y1)).clip(0)
        smaller = np.minimum((near[:, 2] - near[:, 0]) * (near[:, 3] - near[:, 1]), (x2 - x1) * (y2 - y1))
        if not len(near) or (wide * high / smaller).max() < _CONTAINED:
            kept.append(i)
    return detections[kept]
