"""An alarm on the pictures themselves: before recall falls, light, focus, etching and fixture have moved.

Of every board a few statistics that no defect changes much; a station's last boards are held against those on which the
threshold was frozen.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from core.kit import InputError
from kits.pcb_inspection.data.deeppcb import Pair
from kits.pcb_inspection.model.pair import Grey, Registration, binarise, level, register

WINDOW = 12
"""Boards that an alarm looks back on."""
LIMIT = 4.0
"""Standard errors of the window's mean from the reference's at which it rings: by chance once in 16,000 windows."""
STATISTICS = ("copper", "edges", "residual", "shift", "greys", "level")
"""Copper's share beside the template's; length of edges over the template's; differing pixels after registration;
pixels of shift; share of pixels that are neither dark nor bright; the grey level that tells copper from board."""


def statistics(test: Grey, template: Grey, registration: Registration) -> dict[str, float]:
    """The statistics of a board (H, W) and its template, registered so."""
    high = level(test)
    board, golden = binarise(test, high), binarise(template)
    mine, theirs = _edges(board), _edges(golden)
    return {
        "copper": float(np.mean(board == 0) - np.mean(golden == 0)),
        "edges": mine / max(theirs, 1),
        "residual": registration.residual,
        "shift": math.hypot(registration.dx, registration.dy),
        "greys": float(np.mean((test > 40) & (test < 215))),
        "level": float(high),
    }


def _edges(board: Grey) -> int:
    """Pixels at which a binary image changes, down or to the right."""
    return int(
        cv2.countNonZero(cv2.absdiff(board[1:], board[:-1]))
        + cv2.countNonZero(cv2.absdiff(board[:, 1:], board[:, :-1]))
    )


def reference(pairs: Sequence[Pair]) -> dict[str, list[float]]:
    """Mean and standard deviation of every statistic on boards of a station as it should be."""
    seen = []
    for pair in pairs:
        test, template = pair.load()
        _, registration = register(binarise(test), binarise(template))
        seen.append(statistics(test, template, registration))
    # a statistic that never varied (shift on a perfect fixture) gets the smallest step that would be seen
    return {
        name: [float(np.mean([s[name] for s in seen])), max(float(np.std([s[name] for s in seen])), LEAST[name])]
        for name in STATISTICS
    }


LEAST = {"copper": 0.002, "edges": 0.01, "residual": 0.001, "shift": 0.5, "greys": 0.005, "level": 2.0}
"""Standard deviations that are taken at the least."""


class DriftAlarm:
    """Looks at boards one after the other and says which statistic has left the reference."""

    def __init__(self, known: Mapping[str, Any]) -> None:
        try:
            self._known = {name: (float(known[name][0]), float(known[name][1])) for name in STATISTICS}
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise InputError(
                f"drift reference: {error!r} is missing or no [mean, deviation]; freeze it anew"
            ) from error
        self._last: deque[dict[str, float]] = deque(maxlen=WINDOW)

    def look(self, found: Mapping[str, float]) -> list[str]:
        """Warnings after one more board; none before WINDOW boards were seen."""
        self._last.append(dict(found))
        if len(self._last) < WINDOW:
            return []
        warnings = []
        for name, (mean, deviation) in self._known.items():
            here = float(np.mean([s[name] for s in self._last]))
            off = (here - mean) / (deviation / math.sqrt(WINDOW))
            if abs(off) > LIMIT:
                warnings.append(
                    f"drift: {MEANING[name]} of the last {WINDOW} boards is {here:.4g}, {off:+.1f} standard errors "
                    f"from {mean:.4g} where the threshold was frozen; check {CHECK[name]}"
                )
        return warnings


MEANING = {
    "copper": "copper's share beyond the template's", "edges": "the length of edges over the template's",
    "residual": "the share of differing pixels", "shift": "the shift in pixels",
    "greys": "the share of pixels between dark and bright", "level": "the grey level of the copper's edge",
}  # fmt: skip
CHECK = {
    "copper": "etching and exposure", "edges": "focus, noise and etching", "residual": "template and fixture",
    "shift": "the fixture", "greys": "focus", "level": "light and exposure",
}  # fmt: skip
