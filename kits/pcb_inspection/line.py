"""How the detector stands what a line does to pictures, and whether it says the same of one board twice.

A board is shown moved, turned, stretched, blurred, etched otherwise, or beside a template with a corner missing; and
many times under the small jitter of a station that works, as a gauge study does. Letters: n defects of a board.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import nn

from core.evaluation.intervals import clopper_pearson
from core.progress import progress
from kits.pcb_inspection.data.deeppcb import Pair
from kits.pcb_inspection.matching import match_official
from kits.pcb_inspection.model.inspector import inspect
from kits.pcb_inspection.model.pair import Grey

Boxes = NDArray[np.float32]
Shown = tuple[Grey, Grey, Boxes]
"""Test, template (H, W), and the defects' boxes (n, 4) where they now are."""
CORNER = 96
"""Side in pixels of the corner that a template misses: 2 mm."""


def moved(test: Grey, template: Grey, boxes: Boxes, *, dx: float = 0, dy: float = 0, turn: float = 0,
          scale: float = 1) -> Shown:  # fmt: skip
    """The board moved by pixels, turned by degrees and stretched about its middle; boxes keep their size but for it."""
    height, width = test.shape
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), turn, scale)
    matrix[:, 2] += np.array([dx, dy])
    seen = cv2.warpAffine(test, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    centres = np.concatenate(((boxes[:, :2] + boxes[:, 2:]) / 2, np.ones((len(boxes), 1))), 1) @ matrix.T
    half = (boxes[:, 2:] - boxes[:, :2]) / 2 * scale
    placed = np.concatenate((centres - half, centres + half), 1).clip(0, [width, height, width, height])
    return np.asarray(seen, np.uint8), template, placed.astype(np.float32)


def blurred(test: Grey, template: Grey, boxes: Boxes, *, sigma: float) -> Shown:
    """The board out of focus, in grey."""
    return np.asarray(cv2.GaussianBlur(test, (0, 0), sigma), np.uint8), template, boxes


def etched(test: Grey, template: Grey, boxes: Boxes, *, level: float) -> Shown:
    """The board, a little soft, binarised at another grey level than the middle one: below it copper shrinks."""
    soft = cv2.GaussianBlur(test, (0, 0), 2.0)
    return np.where(soft >= level, 255, 0).astype(np.uint8), template, boxes


def torn(test: Grey, template: Grey, boxes: Boxes, *, corner: int) -> Shown:
    """A template that shows bare board in a corner of CORNER pixels (0 to 3, clockwise from the upper left)."""
    seen = template.copy()
    rows = slice(0, CORNER) if corner in (0, 1) else slice(-CORNER, None)
    columns = slice(0, CORNER) if corner in (0, 3) else slice(-CORNER, None)
    seen[rows, columns] = 255
    return test, seen, boxes


def as_it_is(test: Grey, template: Grey, boxes: Boxes) -> Shown:
    """Nothing changed."""
    return test, template, boxes


Change = Callable[[Grey, Grey, Boxes], Shown]


def changes(number: int) -> dict[str, Change]:
    """What is done to board `number`, by name; directions and corners go round."""
    sign, other = (-1) ** number, (-1) ** (number // 2)
    return {
        "as it is": as_it_is,
        "moved by 5 px": lambda *b: moved(*b, dx=5 * sign, dy=3 * other),
        "moved by 10 px": lambda *b: moved(*b, dx=10 * sign, dy=10 * other),
        "out of focus, 1 px": lambda *b: blurred(*b, sigma=1.0),
        "out of focus, 2 px": lambda *b: blurred(*b, sigma=2.0),
        "threshold 25 % low": lambda *b: etched(*b, level=96),
        "threshold 25 % high": lambda *b: etched(*b, level=160),
        "turned by 0.5 degrees": lambda *b: moved(*b, turn=0.5 * sign),
        "turned by 1 degree": lambda *b: moved(*b, turn=1.0 * sign),
        "stretched by 1 %": lambda *b: moved(*b, scale=1 + 0.01 * sign),
        "template without a corner": lambda *b: torn(*b, corner=number % 4),
    }


@dataclass(frozen=True)
class Stood:
    """What came of one change: recall of any and of the right class in %, and false calls a board."""

    boards: int
    defects: int
    recall_any: float
    recall_right: float
    false_calls: float


def stress(module: nn.Module, pairs: Sequence[Pair], threshold: float) -> dict[str, Stood]:
    """Every change on every board, at a frozen threshold; NaN recalls where the boards have no defects."""
    names = list(changes(0))
    predictions: dict[str, dict[str, Any]] = {name: {} for name in names}
    truths: dict[str, dict[str, Any]] = {name: {} for name in names}
    with progress("changing boards", len(pairs) * len(names)) as bar:
        for number, pair in enumerate(pairs):
            test, template = pair.load()
            for name, change in changes(number).items():
                shown, golden, boxes = change(test, template, pair.boxes)
                predictions[name][pair.image_id] = inspect(module, shown, golden).detections
                truths[name][pair.image_id] = boxes, pair.labels
                bar.advance(name)
    found = {}
    for name in names:
        matching = match_official(predictions[name], truths[name])
        called, any_, right = matching.at(threshold)
        false = int((called & (matching.owner < 0)).sum())
        recalls = [100 * float(v.mean()) if len(v) else float("nan") for v in (any_, right)]
        found[name] = Stood(len(pairs), len(any_), recalls[0], recalls[1], false / max(1, len(pairs)))
    return found


@dataclass(frozen=True)
class Repeated:
    """What many shots of the same boards came to.

    `agreement` is the share of shots, in %, whose verdict is that of most shots of the board. `false_reject` is the
    share of shots of good boards that were rejected, `false_accept` that of defective ones that were accepted, each
    with its 95 % interval over the shots; `steady` the share of defects that every shot found.
    """

    boards: int
    shots: int
    agreement: float
    false_reject: float
    false_reject_interval: tuple[float, float]
    false_accept: float
    false_accept_interval: tuple[float, float]
    steady: float


def jittered(test: Grey, rng: np.random.Generator) -> Grey:
    """Another shot of a board: moved by up to 2 px, turned by up to 0.1 degrees, focus and level a little off."""
    none = np.zeros((0, 4), np.float32)
    seen, _, _ = moved(test, test, none, dx=rng.uniform(-2, 2), dy=rng.uniform(-2, 2), turn=rng.uniform(-0.1, 0.1))
    soft = np.asarray(cv2.GaussianBlur(seen, (0, 0), rng.uniform(0.5, 1.0)), np.float32)
    grain = cv2.GaussianBlur(rng.normal(0, 40, soft.shape).astype(np.float32), (0, 0), 0.8)
    return np.where(soft + grain >= 128 + rng.normal(0, 8), 255, 0).astype(np.uint8)


def repeat(module: nn.Module, pairs: Sequence[Pair], threshold: float, shots: int, seed: int = 0) -> Repeated:
    """Show every board, and its template as a good board, `shots` times under jitter."""
    rejected: dict[bool, list[NDArray[np.bool_]]] = {True: [], False: []}
    steady: list[bool] = []
    with progress("repeating boards", 2 * shots * len(pairs)) as bar:
        for number, pair in enumerate(pairs):
            test, template = pair.load()
            for defective in (True, False):
                rng = np.random.default_rng((seed, number, defective))
                verdicts, hits = [], np.ones(len(pair.boxes), bool)
                for _ in range(shots):
                    found = inspect(module, jittered(test if defective else template, rng), template).detections
                    called = found[found[:, 4] >= threshold]
                    verdicts.append(len(called) > 0)
                    if defective:
                        _, any_, _ = match_official({"b": found}, {"b": (pair.boxes, pair.labels)}).at(threshold)
                        hits &= any_
                    bar.advance(pair.image_id)
                rejected[defective].append(np.array(verdicts))
                if defective:
                    steady += hits.tolist()
    bad, good = (np.stack(rejected[kind]) for kind in (True, False))
    shares = np.concatenate((bad, good)).mean(1)
    return Repeated(
        len(pairs), shots, 100 * float(np.maximum(shares, 1 - shares).mean()),
        100 * float(good.mean()), _interval(int(good.sum()), good.size),
        100 * float((~bad).mean()), _interval(int((~bad).sum()), bad.size),
        100 * float(np.mean(steady)) if steady else float("nan"),
    )  # fmt: skip


def _interval(count: int, of: int) -> tuple[float, float]:
    low, high = clopper_pearson(count, of)
    return 100 * low, 100 * high


def tables(stood: Mapping[str, Stood], repeated: Repeated) -> list[dict[str, Any]]:
    """Both studies as tables of a report."""
    rows = [
        [name, _percent(s.recall_any), _percent(s.recall_right), round(s.false_calls, 3)] for name, s in stood.items()
    ]
    first = next(iter(stood.values()))
    low, high = repeated.false_reject_interval
    accept = repeated.false_accept_interval
    return [
        {
            "title": "As a line sees it",
            "columns": ["change", "recall [%]", "recall of the right class [%]", "false calls a board"],
            "rows": rows,
            "note": f"{first.boards} boards with {first.defects} defects of the report split, at the frozen threshold; "
            f"a template without a corner lacks {CORNER} x {CORNER} px of copper",
        },
        {
            "title": "The same board again",
            "columns": ["boards", "shots each", "agreement [%]", "false reject [%]", "false accept [%]",
                        "defects that every shot found [%]"],
            "rows": [[
                2 * repeated.boards, repeated.shots, _percent(repeated.agreement),
                f"{_percent(repeated.false_reject)} ({low:.2f} to {high:.2f})",
                f"{_percent(repeated.false_accept)} ({accept[0]:.2f} to {accept[1]:.2f})", _percent(repeated.steady),
            ]],
            "note": "each board and its template as a good one, moved by up to 2 px, turned by up to 0.1 degrees, "
            "focus and grey level a little off; intervals of 95 % over the shots, which are not independent",
        },
    ]  # fmt: skip


def _percent(value: float) -> float | str:
    return "" if np.isnan(value) else round(value, 2)
