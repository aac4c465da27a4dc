"""A defect's name by what it does to the pieces of copper and bare board, beside what the network calls it.

An open parts copper, a short joins it, a pin-hole and a piece of copper lie apart, a mousebite and a spur do none of
that: it holds on every design of board, where a network's names carry less far than its boxes. How often
annotators name what does so how is counted on training boards (`counted`) and frozen into an artifact.

Shapes: n detections, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from kits.pcb_inspection.model.network import CLASS_COUNT, DUAL
from kits.pcb_inspection.model.pair import Grey

Floats = NDArray[np.float32]
Names = Sequence[Sequence[float]]
"""Log probabilities (STATES, 6) of what a defect of a class does to pieces."""

STATES = 11
"""Copper lost or gained, times pieces that the difference joins: 0, 1, and 2 or more, the latter two times whether it
parts others; last, no difference at all."""
SURE = 3.0
"""Logits between a detection's first and second name from which on the network's stands; chosen, as MARGINS, on board
designs that networks had not seen (`benchmarks/pcb_names.py`)."""
FLOOR = 0.1
"""Detections below this score keep the network's name."""
MARGINS = (0, 2)
"""Pixels about a box that are looked at: twice, since a found box is off by a pixel or two."""
JOINED, PARTED = 16, 48
"""Pixels from which a piece counts: of those that were there before, and of those that are there since."""
_BEFORE = 0.5  # of a defect for every state and name, so that what was never seen is rare and not impossible
_NOTHING = STATES - 1
_SIGN = _NOTHING // 2


def state_of(planes: Grey, box: NDArray[np.float32], margin: int = 0) -> int:
    """What the difference in a box x1 y1 x2 y2 does, one of STATES, by the planes (4, H, W) of `pair.stack`."""
    height, width = planes.shape[1:]
    x1, y1, x2, y2 = (round(v) for v in box.tolist())
    rows = slice(max(0, y1 - margin), max(0, min(height, y2 + margin)))
    columns = slice(max(0, x1 - margin), max(0, min(width, x2 + margin)))
    test, template, gained, lost = np.ascontiguousarray(planes[:, rows, columns])
    more, less = (cv2.countNonZero(plane) if plane.size else 0 for plane in (gained, lost))
    if not more and not less:
        return _NOTHING
    gains = more >= less
    if gains:  # copper joins copper and parts board, as else board joins board and parts copper
        test, template = cv2.bitwise_not(test), cv2.bitwise_not(template)
    where = (gained if gains else lost) > 0
    joined = _pieces(template, _holding(test, where, 8)[0], JOINED)
    if not joined:
        return _SIGN * gains
    whole, before = _holding(cv2.bitwise_not(template), where, 4)
    parted = _pieces(cv2.bitwise_not(test), whole, PARTED) > before
    return _SIGN * gains + (1 if joined == 1 else 3) + parted


def _holding(material: np.ndarray, where: NDArray[np.bool_], connectivity: int) -> tuple[np.ndarray, int]:
    """The pieces of a material (H, W), above 0, that share a pixel with `where`, as a mask, and their number."""
    pieces = cv2.connectedComponents(material, connectivity=connectivity)[1]
    held = np.bincount(pieces[where])
    held[:1] = 0
    (numbers,) = held.nonzero()
    mask = pieces == numbers[0] if len(numbers) == 1 else np.isin(pieces, numbers)
    return mask.view(np.uint8), len(numbers)


def _pieces(material: np.ndarray, within: np.ndarray, least: int) -> int:
    """How many pieces a material has in a mask, of `least` pixels or more."""
    pieces = cv2.connectedComponents(material & within, connectivity=4)[1]
    return int(np.count_nonzero(np.bincount(pieces.ravel())[1:] >= least))


def counted(boards: Iterable[tuple[Grey, NDArray[np.float32], NDArray[np.int64]]]) -> Names:
    """Names of boards: planes, boxes (m, 4), labels (m,).

    A defect counts as its dual as well, with copper and board changed.
    """
    seen = np.full((STATES, CLASS_COUNT), _BEFORE)
    for planes, boxes, labels in boards:
        for box, label in zip(boxes, labels, strict=True):
            for margin in MARGINS:
                state = state_of(planes, box, margin)
                seen[state, label] += 1
                seen[state if state == _NOTHING else (state + _SIGN) % _NOTHING, DUAL[label]] += 1
    return [[round(float(v), 3) for v in row] for row in np.log(seen / seen.sum(0))]


def told(planes: Grey, box: NDArray[np.float32], names: Names) -> Floats:
    """Log probabilities (6,) of what the difference in a box does, of each class."""
    said: Floats = np.mean([names[state_of(planes, box, margin)] for margin in MARGINS], 0, np.float32)
    return said


def named(found: Floats, logits: Floats, planes: Grey, names: Names) -> Floats:
    """Detections (n, 6) with the names that the network's logits (n, 6) and the pieces agree on; scores stay.

    Looked at are those whose two best names lie less than SURE apart.
    """
    ranked = np.partition(logits, -2, 1)
    doubtful = np.flatnonzero((ranked[:, -1] - ranked[:, -2] < SURE) & (found[:, 4] >= FLOOR))
    if len(doubtful):
        found = found.copy()
    for row in doubtful:
        found[row, 5] = (logits[row] + told(planes, found[row, :4], names)).argmax()
    return found
