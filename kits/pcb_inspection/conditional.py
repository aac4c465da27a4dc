"""Compute where something differs: clean tiles leave at once, others are looked at in crops, crowded ones as a whole.

The signed differences that the network takes as input say where anything can be: a board without a difference of some
size has no defect. The gate's size is frozen on validation boards so that it missed none there; how many crops cost as
much as the whole tile is measured on the machine. Letters: N crops, S side of the tile, h = S / 8.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from core.export import Artifact, reshaped
from core.export.artifact import Origin
from core.export.openvino import takes_bytes
from core.kit import InputError
from kits.pcb_inspection.data.augment import prepare
from kits.pcb_inspection.data.deeppcb import Pair
from kits.pcb_inspection.data.resolution import seen_at
from kits.pcb_inspection.model.design import COARSEST
from kits.pcb_inspection.model.inspector import shown_to
from kits.pcb_inspection.model.network import CLASS_COUNT, STRIDE
from kits.pcb_inspection.model.pair import Grey, differences

CROP = 128
"""Side of a crop in pixels."""
RIM = 24
"""Pixels at the rim of a crop whose answers are not taken: there the network lacks what lies beside them."""
BATCHES = (1, 2, 4, 8)
"""Crops that are looked at together; more are split."""
NOTHING = -20.0
"""The logit of cells that were not looked at."""
MARGIN = 0.5
"""Of the smallest difference that a defect showed on validation boards, the gate's size."""

OUTLINES = (cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)

Window = tuple[int, int, int, int]
"""Top, bottom, left and right in pixels."""
Place = tuple[int, int]
"""Upper left corner of a crop, row and column in pixels, on the grid of COARSEST."""


def planes_that_differ(planes: Tensor) -> tuple[Grey, Grey]:
    """What a network's input (1, 4, S, S) says is gained and lost, each (S, S), 0 where nothing is."""
    both = planes[0, 2:].numpy()
    gained, lost = both if both.dtype == np.uint8 else (both > 0.5).view(np.uint8)
    return gained, lost


def blobs(gained: Grey, lost: Grey) -> NDArray[np.int64]:
    """The pieces of difference (n, 5): left, top, width, height, and the pixels that differ in that box.

    Found by their outlines, which takes far less time than labelling every pixel; what lies within one is its part.
    """
    differs = cv2.bitwise_or(gained, lost)
    boxes = [cv2.boundingRect(line) for line in cv2.findContours(differs, *OUTLINES)[0]]
    found = [(x, y, w, h, cv2.countNonZero(differs[y : y + h, x : x + w])) for x, y, w, h in boxes]
    return np.array(found, np.int64).reshape(-1, 5)


def least_area(gained: Grey, lost: Grey, boxes: NDArray[np.float32]) -> list[int]:
    """Of every box (n, 4) the area of its largest piece of difference, 0 without one."""
    pieces = blobs(gained, lost)
    centres = pieces[:, :2] + pieces[:, 2:4] / 2
    found = []
    for x1, y1, x2, y2 in boxes:
        inside = (centres[:, 0] >= x1 - 4) & (centres[:, 0] <= x2 + 4) & (centres[:, 1] >= y1 - 4) & (
            centres[:, 1] <= y2 + 4
        )  # fmt: skip
        found.append(int(pieces[inside, 4].max(initial=0)))
    return found


def freeze_gate(areas: Sequence[int]) -> int:
    """The area in pixels from which the gate lets a difference pass, from `least_area` of validation boards.

    MARGIN times the smallest of any defect, at least 1: a defect without any difference cannot be gated, and is not
    counted here.
    """
    seen = [area for area in areas if area]
    return max(1, int(MARGIN * min(seen))) if seen else 1


def gate_on(pairs: Sequence[Pair], side: int) -> dict[str, int]:
    """The gate frozen on boards for a network of `side` px: its "area", how many of their "defects" it "missed"."""
    areas: list[int] = []
    for seen in (seen_at(pair, side) for pair in prepare(pairs)):
        areas += least_area(*differences(seen.test, seen.template), seen.boxes)
    area = freeze_gate(areas)
    return {"area": area, "boards": len(pairs), "defects": len(areas), "missed": sum(a < area for a in areas)}


def cover(pieces: NDArray[np.int64], area: int, side: int, most: int | None = None) -> list[Place] | None:
    """Crops that show every piece of at least `area` away from their rims; None where a piece is larger than a crop,
    or where that takes `most` crops or more.

    Greedy: the crop is laid about the first piece that is not shown yet, and shows whatever else lies in it. At the
    sides of the tile a crop's rim counts, since nothing lies beyond.
    """
    boxes = pieces[pieces[:, 4] >= area]
    corners = np.stack((boxes[:, 1], boxes[:, 0], boxes[:, 1] + boxes[:, 3], boxes[:, 0] + boxes[:, 2]), 1)
    if len(corners) and (corners[:, 2:] - corners[:, :2]).max() > CROP - 2 * RIM - COARSEST:
        return None
    places: list[Place] = []
    left = corners[np.lexsort((corners[:, 1], corners[:, 0]))].tolist()  # few: faster than as an array
    while left:
        if len(places) + 1 == most:
            return None
        y, x, y2, x2 = left[0]
        place = _start(y, y2, side), _start(x, x2, side)
        places.append(place)
        (top, bottom), (start, end) = (_inner(s, side) for s in place)
        left = [p for p in left[1:] if not (p[0] >= top and p[1] >= start and p[2] <= bottom and p[3] <= end)]
    return places


def _start(low: int, high: int, side: int) -> int:
    """Where a crop begins that has `low` to `high` in its middle, on the grid and within the tile."""
    wanted = round(((low + high) / 2 - CROP / 2) / COARSEST) * COARSEST
    return int(min(max(wanted, 0), side - CROP))


def _owned(place: Place, side: int) -> Window:
    """The part of a crop whose answers are taken, in its own pixels."""
    (top, bottom), (left, right) = (_inner(start, side) for start in place)
    return top - place[0], bottom - place[0], left - place[1], right - place[1]


def _inner(start: int, side: int) -> tuple[int, int]:
    """The part of a crop whose answers are taken."""
    return (start + RIM if start else 0), (start + CROP - RIM if start + CROP < side else side)


class Looking(Protocol):
    """What looks at crops: (N, 4, CROP, CROP) to class logits (N, 6, h, w) and distances (N, 4, h, w), h = CROP / 8.

    `owned` are the parts of the crops whose answers are taken, all of them by default.
    """

    def __call__(self, batch: Tensor, owned: Sequence[Window] | None = None) -> tuple[Tensor, Tensor]: ...

    def alone(self) -> Looking:
        """The same on one thread."""
        ...


class Crops:
    """A network for any number of crops: `modules` take as many as their names in BATCHES say, more are split."""

    def __init__(
        self, modules: Mapping[int, nn.Module], again: Callable[[], Mapping[int, nn.Module]] | None = None
    ) -> None:
        """`again` makes the modules on one thread."""
        self._modules, self._again = dict(modules), again

    def __call__(self, batch: Tensor, owned: Sequence[Window] | None = None) -> tuple[Tensor, Tensor]:
        answers = []
        for part, size in _batched(batch):
            if size > len(part):
                part = stacked([*part.numpy(), *[np.zeros_like(part[0].numpy())] * (size - len(part))])
            answers.append(self._modules[size](part))
        logits, distances = (torch.cat(parts)[: len(batch)] for parts in zip(*answers))
        return logits, distances

    def alone(self) -> Crops:
        return self if self._again is None else Crops(self._again())


class Conditional(nn.Module):
    """The network of a tile as a module of the same inputs and outputs that looks only where something differs.

    `dense` takes (1, 4, S, S), `crops` (N, 4, CROP, CROP); from `crossover` crops on the whole tile is looked at.
    `ways` counts which way tiles went: "clean", "crops", "dense".
    """

    def __init__(
        self, dense: nn.Module, crops: Looking, area: int, crossover: int,
        gate: Callable[[Grey, Grey], list[Place] | None] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dense, self.crops, self.area, self.crossover = dense, crops, area, crossover
        self._gate = gate
        self.ways: Counter[str] = Counter()
        origin: Any = getattr(dense, "origin", None)
        if origin is not None:
            self.origin = origin

    @property
    def takes_bytes(self) -> bool:
        """Whether the planes may be bytes, see `core.export.openvino.takes_bytes`."""
        return takes_bytes(self.dense)

    def forward(self, planes: Tensor) -> tuple[Tensor, Tensor]:
        """(1, 4, S, S) -> class logits (1, 6, h, h) and distances (1, 4, h, h), as the network's."""
        side = int(planes.shape[-1])
        gained, lost = planes_that_differ(planes)
        if self._gate is not None:
            places = self._gate(gained, lost)
        else:
            places = cover(blobs(gained, lost), self.area, side, self.crossover)
        if places is None or len(places) >= self.crossover:
            self.ways["dense"] += 1
            found: tuple[Tensor, Tensor] = self.dense(planes)
            return found
        cells = side // STRIDE
        logits = torch.from_numpy(np.full((1, CLASS_COUNT, cells, cells), NOTHING, np.float32))
        distances = torch.from_numpy(np.zeros((1, 4, cells, cells), np.float32))
        self.ways["crops" if places else "clean"] += 1
        if places:
            tile = planes[0].numpy()
            batch = stacked([tile[:, top : top + CROP, left : left + CROP] for top, left in places])
            for place, *answer in zip(places, *self.crops(batch, [_owned(place, side) for place in places])):
                self._paste(place, side, answer, (logits, distances))
        return logits, distances

    def alone(self) -> Conditional:
        """The same on one thread, of an artifact; it counts ways of its own."""
        origin: Origin = self.origin
        dense = origin.artifact.as_module(origin.variant, 1)
        return Conditional(dense, self.crops.alone(), self.area, self.crossover, self._gate)

    def _paste(self, place: Place, side: int, answer: Sequence[Tensor], into: tuple[Tensor, Tensor]) -> None:
        (top, bottom), (left, right) = (_inner(start, side) for start in place)
        here = np.s_[top // STRIDE : bottom // STRIDE, left // STRIDE : right // STRIDE]
        there = np.s_[
            (top - place[0]) // STRIDE : (bottom - place[0]) // STRIDE,
            (left - place[1]) // STRIDE : (right - place[1]) // STRIDE,
        ]
        into[0][0][:, here[0], here[1]] = answer[0][:, there[0], there[1]]
        into[1][0][:, here[0], here[1]] = answer[1][:, there[0], there[1]]


def stacked(crops: Sequence[NDArray[Any]]) -> Tensor:
    """Crops (C, h, w) as (N, C, h, w), by NumPy.

    torch would share the work out among threads that then wait for more by spinning, for milliseconds in which a
    runtime's own threads do not get the core: a tile that is looked at as a whole took 4.2 ms after them, and not 2.4.
    """
    return torch.from_numpy(np.stack(crops))


def _batched(crops: Tensor) -> list[tuple[Tensor, int]]:
    """Crops (N, ...) in batches, each with the size of the graph that takes it."""
    found: list[tuple[Tensor, int]] = []
    rest = crops
    while len(rest):
        size = next((b for b in BATCHES if b >= len(rest)), BATCHES[-1])
        found.append((rest[:size], size))
        rest = rest[size:]
    return found


def crops_of(artifact: Artifact, variant: str | None, threads: int | None) -> Crops:
    """The network for crops, from the file of the artifact."""

    def on(threads: int | None) -> dict[int, nn.Module]:
        return {size: reshaped(artifact, [(size, 4, CROP, CROP)], variant, threads) for size in BATCHES}

    return Crops(on(threads), lambda: on(1))


def crossover(dense: nn.Module, crops: Looking, side: int, repeats: int = 7) -> int:
    """The number of crops from which the whole tile is no slower, measured here: medians of `repeats` in turns.

    With what cutting crops out and putting their answers together costs; finding out where they lie is spent by then.
    Crops have to be no faster twice in succession, as one count's times may be chance.
    """
    tile = torch.rand(1, 4, side, side).round()
    tile[:, 2] = 0.0  # copper is lost, and none gained, as in most crops
    tile = shown_to(dense, (255 * tile[0]).byte().numpy())
    starts = range(0, side - CROP + 1, CROP - 2 * RIM)
    places = [(row, column) for row in starts for column in starts]
    least = len(places) + 1
    for count in range(1, len(places) + 1):
        cut = Conditional(dense, crops, 1, len(places) + 1, lambda _gained, _lost, n=count: places[:n])  # type: ignore[misc]
        whole, parts = _medians((dense, cut), tile, repeats)
        if parts < whole:
            least = len(places) + 1
        elif least < count:
            break
        else:
            least = count
    return least


def _medians(modules: Sequence[nn.Module], tile: Tensor, repeats: int) -> list[float]:
    """Seconds that each takes for a tile, after a first call that does not count."""
    taken: list[list[float]] = [[] for _ in modules]
    with torch.inference_mode():
        for _ in range(repeats + 1):
            for times, module in zip(taken, modules):
                began = time.perf_counter()
                module(tile)
                times.append(time.perf_counter() - began)
    return [float(np.median(times[1:])) for times in taken]


def conditional(artifact: Artifact, variant: str | None, threads: int | None) -> Conditional:
    """The conditional network of an artifact; InputError where it was frozen without a gate."""
    if "gate" not in artifact.meta:
        raise InputError(
            f"{artifact.folder}: no gate was frozen for it; `fitkit run` on data with a validation split freezes one"
        )
    dense = artifact.as_module(variant, threads)
    side = int(artifact.graphs["detector"]["inputs"][0]["example"][-1])
    crops = crops_of(artifact, variant, threads)
    return Conditional(dense, crops, int(artifact.meta["gate"]["area"]), crossover(dense, crops, side))
