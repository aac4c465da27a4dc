"""From two images of any size to the defects between them: registration, network, suppression, seams."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import nn

from core.evaluation.detection import overlapping, suppress
from core.export.artifact import origin_of
from core.export.openvino import takes_bytes
from kits.pcb_inspection.model.decode import FLOOR, decode_all
from kits.pcb_inspection.model.decode import OVERLAP as IOU
from kits.pcb_inspection.model.design import Design
from kits.pcb_inspection.model.naming import Names, named
from kits.pcb_inspection.model.packed import Packed
from kits.pcb_inspection.model.pair import LEVEL, MAX_SHIFT, Grey, Registration, binarise, level, register, stack
from kits.pcb_inspection.model.shrink import shrink

TILE = 640
"""Side in pixels of what a network is shown of a board at a time; its input may be smaller, see `Design.size`."""
OVERLAP = 128
"""Pixels that neighbouring tiles share: a defect up to this long is whole in the tile that owns its centre."""
_SLACK = 8.0
_CONTAINED = 0.7
_AT_EDGE = MAX_SHIFT + 8.0
"""A box that ends this near the side of its tile is cut there: where the template moved, the rim shows nothing."""

_MANY = 16
"""Tiles from which several are looked at side by side: copies of the network take a moment to make."""

Floats = NDArray[np.float32]
_Place = tuple[int, int, tuple[float, float], int, int, tuple[float, float]]
"""Top, bottom and owned rows of a tile, left, right and owned columns."""


@dataclass(frozen=True)
class Inspection:
    """Detections (n, 6) x1 y1 x2 y2 score label in pixels, best first, and the registration of every tile."""

    detections: Floats
    registrations: tuple[Registration, ...]

    @property
    def residual(self) -> float:
        """The largest share of differing pixels in a tile after registration: a wrong template shows here."""
        return max(r.residual for r in self.registrations)


def inspect(
    module: nn.Module,
    test: Grey | Packed,
    template: Grey | Packed,
    *,
    floor: float = FLOOR,
    scale: float = 1.0,
    names: Names | None = None,
    on_tile: Callable[[], None] | None = None,
) -> Inspection:
    """Find the defects of a tested image against its template, both grey uint8 (H, W) of any size, or packed.

    Larger images go through the network tile by tile. Each tile owns the detections whose centre lies
    in its part of the image; what two tiles both claim, within 8 px of a seam, is suppressed, and the
    parts of a defect that no tile shows whole are joined. `scale` is the network's resolution over the
    image's; tiles are resized one at a time, so that beyond the images themselves memory stays that of a tile.
    `names` is what `naming.counted` gave, by default that of the module's artifact.
    """
    names = names_of(module) if names is None else names
    levels = _level(test), _level(template)
    sure: list[Floats] = []
    doubtful: list[Floats] = []  # near a seam, where another tile may have seen the same
    tiles: list[Floats] = []  # the tile of each doubtful one; the image's own sides are infinite
    registrations = []
    height, width = test.shape
    side = input_side(module)
    slack, near = _SLACK / scale, _AT_EDGE / scale
    places = [(*rows, *columns) for rows in spans(height, scale) for columns in spans(width, scale)]

    def look(module: nn.Module, place: _Place) -> tuple[Floats, Registration]:
        top, bottom, _, left, right, _ = place
        here = np.s_[top:bottom, left:right]
        return _inspect_tile(module, test[here], template[here], levels, scale, side, floor, names)

    for place, (part, registration) in zip(places, _each(module, look, places)):
        top, bottom, rows, left, right, columns = place
        part[:, :4] += np.array([left, top, left, top], np.float32)
        far = right if right < width else np.inf, bottom if bottom < height else np.inf
        sides = np.array((left or -np.inf, top or -np.inf, *far), np.float32)
        mine = _owned(part, columns, rows, slack)
        safe = _owned(part, columns, rows, -slack) & ~_cut(part, sides, near).any(1)
        sure.append(part[safe])
        doubtful.append(part[mine & ~safe])
        tiles.append(np.tile(sides, (len(doubtful[-1]), 1)))
        registrations.append(registration)
        if on_tile is not None:
            on_tile()
    joined = _joined(np.concatenate(doubtful), np.concatenate(tiles), near)
    detections = np.concatenate([*sure, joined])
    if len(registrations) > 1:
        detections = detections[suppress(detections[:, :4], detections[:, 4], IOU)]
    if any(shift := shift_of(module)):
        sides = np.array((width, height) * 2, np.float32)
        detections[:, :4] = (detections[:, :4] + np.array(shift * 2, np.float32)).clip(0, sides)
    return Inspection(detections, tuple(registrations))


def _each(
    module: nn.Module, look: Callable[[nn.Module, _Place], tuple[Floats, Registration]], places: Sequence[_Place]
) -> Iterator[tuple[Floats, Registration]]:
    """What is found at every place, in order: of many side by side, each by a copy of the network on one thread.

    Registration and suppression take one thread as well, so that a thread a tile keeps all of them busy.
    """
    origin = origin_of(module)
    # a copy takes a while to make: none for less than half of _MANY tiles
    threads = 1 if origin is None else min(origin.threads or os.cpu_count() or 1, max(1, 2 * len(places) // _MANY))
    torches = origin is None or origin.artifact.variant(origin.variant).runtime == "torch"
    if origin is None or torches or threads == 1 or len(places) < _MANY:
        yield from (look(module, place) for place in places)
        return
    alone: Callable[[], nn.Module] | None = getattr(module, "alone", None)
    free: SimpleQueue[nn.Module] = SimpleQueue()
    for _ in range(threads):
        free.put(alone() if alone is not None else origin.artifact.as_module(origin.variant, 1))

    def one(place: _Place) -> tuple[Floats, Registration]:
        taken = free.get()
        try:
            return look(taken, place)
        finally:
            free.put(taken)

    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(one, places)


def _level(image: Grey | Packed) -> int:
    return LEVEL - 1 if isinstance(image, Packed) else level(image)


def input_side(module: nn.Module) -> int:
    """The side in pixels of a network's input: of an artifact's graph, or by its design."""
    origin = origin_of(module)
    if origin is not None:
        return int(origin.artifact.graphs["detector"]["inputs"][0]["example"][-1])
    design = getattr(module, "design", None)
    return design.size if isinstance(design, Design) else TILE


def shift_of(module: nn.Module) -> tuple[float, float]:
    """Pixels (x, y) by which an artifact's boxes are moved: frozen on validation boards, see `freeze_shift`."""
    origin = origin_of(module)
    x, y = origin.artifact.meta.get("shift", (0.0, 0.0)) if origin is not None else (0.0, 0.0)
    return float(x), float(y)


def names_of(module: nn.Module) -> Names | None:
    """What an artifact knows of names, see `naming.counted`: counted on training boards."""
    origin = origin_of(module)
    return origin.artifact.meta.get("names") if origin is not None else None


def tile_count(height: int, width: int, scale: float = 1.0) -> int:
    """How many tiles an image is cut into."""
    return sum(1 for _ in spans(height, scale)) * sum(1 for _ in spans(width, scale))


def spans(length: int, scale: float = 1.0) -> Iterator[tuple[int, int, tuple[float, float]]]:
    """(start, end, owned interval) of the tiles along one side; the owned intervals cover it without overlap."""
    tile, overlap = int(TILE / scale), int(OVERLAP / scale)
    if length <= tile:
        yield 0, length, (-np.inf, np.inf)
        return
    count = -(-(length - overlap) // (tile - overlap))
    starts = [round(i * (length - tile) / (count - 1)) for i in range(count)]
    borders = [-np.inf, *((a + tile + b) / 2 for a, b in zip(starts, starts[1:], strict=False)), np.inf]
    for start, low, high in zip(starts, borders, borders[1:], strict=False):
        yield start, start + tile, (low, high)


def _inspect_tile(
    module: nn.Module,
    test: Grey,
    template: Grey,
    levels: tuple[int, int],
    scale: float,
    side: int,
    floor: float,
    names: Names | None,
) -> tuple[Floats, Registration]:
    """The detections of one tile in its own pixels, and how the template was registered."""
    size = np.array(test.shape[::-1] * 2, np.float32)
    if scale != 1:
        test, template = _resize(test, scale), _resize(template, scale)
    test, template = binarise(test, levels[0]), binarise(template, levels[1])
    template, registration = register(test, template)
    if side != TILE:  # after registration, as in training: else a shift leaves a part of a pixel between the two
        test, template = (shrink(image, side / TILE) for image in (test, template))
    height, width = test.shape
    planes = pad(stack(test, template), side, side)
    with torch.inference_mode():
        logits, distances = module(shown_to(module, planes))
    found, said = decode_all(logits[0].numpy(), distances[0].numpy(), floor)
    if names is not None:
        found = named(found, said, planes, names)
    inside = np.array([width, height, width, height], np.float32)
    found[:, :4] = found[:, :4].clip(0, inside)
    found = found[(found[:, 2] - found[:, 0] >= 1) & (found[:, 3] - found[:, 1] >= 1)]
    found[:, :4] *= size / inside
    return found, registration


def pad(planes: Grey, height: int, width: int) -> Grey:
    """Planes (4, H, W) with bare board to the right and below, so that they measure (4, height, width)."""
    if planes.shape[1:] == (height, width):
        return planes
    padded = np.zeros((4, height, width), np.uint8)
    padded[:2] = 255
    padded[:, : planes.shape[1], : planes.shape[2]] = planes
    return padded


def shown_to(module: nn.Module, planes: Grey) -> torch.Tensor:
    """Planes (4, H, W) as a module takes them, (1, 4, H, W): in bytes where it can, which spares 1 ms a tile."""
    return torch.from_numpy(planes)[None] if takes_bytes(module) else to_input(planes)


def to_input(planes: Grey) -> torch.Tensor:
    """The network's input (1, 4, H, W) float32 in 0..1 from planes (4, H, W) uint8."""
    return torch.from_numpy(np.multiply(planes, np.float32(1 / 255), dtype=np.float32))[None]


def _resize(image: Grey, scale: float) -> Grey:
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    return np.asarray(
        cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR), np.uint8
    )


def _owned(found: Floats, columns: tuple[float, float], rows: tuple[float, float], slack: float) -> NDArray[np.bool_]:
    """Whether the centre of each detection lies in a tile's own part of the image, widened by `slack`."""
    x, y = (found[:, 0] + found[:, 2]) / 2, (found[:, 1] + found[:, 3]) / 2
    across = (x >= columns[0] - slack) & (x < columns[1] + slack)
    return across & (y >= rows[0] - slack) & (y < rows[1] + slack)


def _cut(found: Floats, tiles: Floats, near: float) -> NDArray[np.bool_]:
    """At which sides (n, 4) of their tiles detections end."""
    return np.abs(found[:, :4] - tiles) <= near


def _joined(found: Floats, tiles: Floats, near: float) -> Floats:
    """Join what different tiles saw of one defect: the box around the parts, with the score and class of the best.

    Detections (n, 6) and the tile (n, 4) of each. A detection that is owned by its tile and cut at its side (ends
    within `near` of it) is longer than the overlap, so it crosses all of it: it goes on in a detection of the same
    class that the other tile cut on the side facing it. A detection that lies mostly in one of another tile is a
    part of it, where it is cut or has the same class: two tiles drew one defect differently.
    """
    if len(found) == 0:
        return found
    pairs = overlapping(found[:, :4])
    assert pairs is not None  # without a bound there is always an answer
    one, other = pairs
    cut = _cut(found, tiles, near)
    area = (found[:, 2] - found[:, 0]) * (found[:, 3] - found[:, 1])
    shared = np.minimum(found[one, 2], found[other, 2]) - np.maximum(found[one, 0], found[other, 0])
    shared *= np.minimum(found[one, 3], found[other, 3]) - np.maximum(found[one, 1], found[other, 1])
    alike = found[one, 5] == found[other, 5]
    same = alike & (cut[one] & cut[other][:, [2, 3, 0, 1]]).any(1)
    for part, whole in ((one, other), (other, one)):
        inside = (area[whole] >= area[part]) & (shared >= _CONTAINED * area[part])
        same |= inside & (alike | cut[part].any(1))
    same &= (tiles[one] != tiles[other]).any(1)
    edges = coo_array((same[same], (one[same], other[same])), shape=(len(found), len(found)))
    group = connected_components(edges, directed=False)[1]
    by_group = found[np.argsort(group, kind="stable")]
    joined = []
    for parts in np.split(by_group, np.flatnonzero(np.diff(np.sort(group))) + 1):
        best = parts[parts[:, 4].argmax()].copy()
        best[:2], best[2:4] = parts[:, :2].min(0), parts[:, 2:4].max(0)
        joined.append(best)
    return np.stack(joined)
