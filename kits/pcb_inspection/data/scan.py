"""A large scan made of boards, to time what takes a whole panel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kits.pcb_inspection.data.deeppcb import Pair
from kits.pcb_inspection.model.pair import Grey


def laid_out(pairs: Sequence[Pair], side: int) -> tuple[Grey, Grey, int]:
    """(test, template, defects) of boards side by side, cut off at `side` pixels."""
    test, template = np.full((side, side), 255, np.uint8), np.full((side, side), 255, np.uint8)
    step = max(max(image.shape) for pair in pairs for image in pair.load())
    number = defects = 0
    for top in range(0, side, step):
        for left in range(0, side, step):
            pair = pairs[number % len(pairs)]
            here = np.s_[top : top + step, left : left + step]
            for whole, image in zip((test, template), pair.load()):
                room = whole[here]
                height, width = (min(a, b) for a, b in zip(room.shape, image.shape))
                room[:height, :width] = image[:height, :width]
            defects += int(sum(left + box[2] <= side and top + box[3] <= side for box in pair.boxes))
            number += 1
    return test, template, defects
