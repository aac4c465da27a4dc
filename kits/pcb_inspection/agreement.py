"""Whether two runtimes decide alike: the same defects at the frozen threshold, board by board."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from core.evaluation.detection import box_iou
from core.progress import progress
from kits.pcb_inspection.data.deeppcb import Pair
from kits.pcb_inspection.matching import OFFICIAL_IOU
from kits.pcb_inspection.model.inspector import inspect


@dataclass(frozen=True)
class Agreed:
    """How many detections of two runtimes at a threshold are the same ones, of how many."""

    same: int
    of: int

    @property
    def share(self) -> float:
        """The share in %; NaN where neither detected anything."""
        return 100 * self.same / self.of if self.of else float("nan")


def same_calls(one: NDArray[np.float32], other: NDArray[np.float32]) -> int:
    """How many detections (n, 6: x1, y1, x2, y2, score, class) have a partner of their class and place, one each."""
    if not len(one) or not len(other):
        return 0
    alike = (box_iou(one[:, :4], other[:, :4]) > OFFICIAL_IOU) & (one[:, 5:6] == other[:, 5])
    from scipy.optimize import linear_sum_assignment  # 40 MB that inspecting has no use for

    rows, columns = linear_sum_assignment(~alike)
    return int(alike[rows, columns].sum())


def agreement(first: nn.Module, second: nn.Module, pairs: Sequence[Pair], threshold: float) -> Agreed:
    """Show every board to both; a detection that only one of them has counts as one that is not the same."""
    same = of = 0
    with progress("the same calls in both runtimes", len(pairs)) as bar:
        for pair in pairs:
            test, template = pair.load()
            one, other = (inspect(module, test, template).detections for module in (first, second))
            one, other = one[one[:, 4] >= threshold], other[other[:, 4] >= threshold]
            met = same_calls(one, other)
            same, of = same + met, of + len(one) + len(other) - met
            bar.advance(pair.image_id)
    return Agreed(same, of)
