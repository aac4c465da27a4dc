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

STATES = 13
"""Copper lost or gained, times pieces that the difference joins (0, 1, 2 or more), times whether it parts others;
last, no difference at all."""
WEIGHT = 0.4
"""Of the pieces beside the network's logits, which are of one who was sure of too much; chosen on board designs that
the network had not seen (`benchmarks/pcb_names.py`)."""
FLOOR = 0.1
"""Detections below this score keep the network's name."""
MARGIN = 1
"""Pixels about a box that are looked at."""
JOINED, PARTED = 16, 48
"""Pixels from which a piece counts: of those that were there before, and of those that are there since."""
_BEFORE = 0.5  # of a defect for every state and name, so that what was never seen is rare and not impossible
_NOTHING = STATES - 1


def state_of(planes: Grey, box: NDArray[np.float32]) -> int:
    """What the difference in a box x1 y1 x2 y2 does, one of STATES, by the planes (4, H, W) of `pair.stack`."""
    height, width = planes.shape[1:]
    x1, y1, x2, y2 = (round(float(v)) for v in box)
    rows = slice(max(0, y1 - MARGIN), min(height, y2 + MARGIN))
    columns = slice(max(0, x1 - MARGIN), min(width, x2 + MARGIN))
    test, template, gained, lost = np.ascontiguousarray(planes[:, rows, columns])
    more, less = cv2.countNonZero(gained), cv2.countNonZero(lost)
    if not more and not less:
        return _NOTHING
    gains = more >= less
    if gains:  # where it was board and is copper now: copper joins, board is parted
        test, template = cv2.bitwise_not(test), cv2.bitwise_not(template)
    where = (gained if gains else lost) > 0
    joined = _pieces(template, _holding(test, where, 8)[0], JOINED)
    behind = cv2.bitwise_not(template)
    whole, before = _holding(behind, where, 4)
    parted = _pieces(cv2.bitwise_not(test), whole, PARTED) > before
    return 6 * gains + 2 * min(joined, 2) + parted


def _holding(material: np.ndarray, where: NDArray[np.bool_], connectivity: int) -> tuple[NDArray[np.bool_], int]:
    """The pieces of a material (H, W), above 0, that share a pixel with `where`, as a mask, and how many they are."""
    count, pieces = cv2.connectedComponents(material, connectivity=connectivity)
    held = np.zeros(count, bool)
    held[pieces[where]] = True
    held[0] = False
    return held[pieces], int(held.sum())


def _pieces(material: np.ndarray, within: NDArray[np.bool_], least: int) -> int:
    """How many pieces of a material have `least` pixels or more in a mask."""
    count, pieces = cv2.connectedComponents(material, connectivity=4)
    return int(np.count_nonzero(np.bincount(pieces[within], minlength=count)[1:] >= least))


def counted(boards: Iterable[tuple[Grey, NDArray[np.float32], NDArray[np.int64]]]) -> Names:
    """Names of boards: planes, boxes (m, 4), labels (m,).

    A defect counts as its dual as well, with copper and board changed.
    """
    seen = np.full((STATES, CLASS_COUNT), _BEFORE)
    for planes, boxes, labels in boards:
        for box, label in zip(boxes, labels, strict=True):
            state = state_of(planes, box)
            seen[state, label] += 1
            seen[state if state == _NOTHING else (state + 6) % 12, DUAL[label]] += 1
    return [[round(float(v), 3) for v in row] for row in np.log(seen / seen.sum(0))]


def named(found: Floats, logits: Floats, planes: Grey, names: Names) -> Floats:
    """Detections (n, 6), best first, with the names that the network's logits (n, 6) and the pieces agree on.

    Looked at are those whose second name the pieces can lift above the first; their score falls by the root of the
    probability of the name that they get.
    """
    said = WEIGHT * np.asarray(names, np.float32)
    ranked = np.sort(logits, 1)
    doubtful = (ranked[:, -1] - ranked[:, -2] < np.ptp(said, 1).max()) & (found[:, 4] >= FLOOR)
    if not doubtful.any():
        return found
    found = found.copy()
    for row in np.flatnonzero(doubtful):
        sure = logits[row] + said[state_of(planes, found[row, :4])]
        label = int(sure.argmax())
        found[row, 4] *= np.exp(sure - sure[label]).sum() ** -0.5
        found[row, 5] = label
    return found[np.argsort(-found[:, 4], kind="stable")]
