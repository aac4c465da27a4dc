"""Whether two runtimes decide alike: what counts as the same detection, on boards of the generator."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from kits.pcb_inspection import KIT
from kits.pcb_inspection.agreement import Agreed, agreement, same_calls


def calls(*rows: tuple[float, ...]) -> np.ndarray:
    """Rows of x, y, side, score and class."""
    return np.array([[x, y, x + side, y + side, score, kind] for x, y, side, score, kind in rows], np.float32)


def test_a_call_is_the_same_where_class_and_place_are() -> None:
    one = calls((10, 10, 20, 0.9, 1), (100, 100, 20, 0.8, 2), (200, 200, 20, 0.7, 3))
    assert same_calls(one, one[::-1]) == 3
    moved = calls((12, 10, 20, 0.5, 1), (118, 100, 20, 0.8, 2), (200, 200, 20, 0.7, 4))
    assert same_calls(one, moved) == 1, "one is where it was, one is elsewhere, one of another class"
    assert same_calls(one, calls((10, 10, 20, 0.9, 1), (11, 10, 20, 0.9, 1))) == 1, "a partner each"
    assert same_calls(one, one[:0]) == same_calls(one[:0], one) == 0
    assert Agreed(3, 4).share == 75.0 and np.isnan(Agreed(0, 0).share)


class Less(nn.Module):
    """The detector with the logits of one class taken down."""

    def __init__(self, detector: nn.Module, kind: int) -> None:
        super().__init__()
        self.detector, self.kind = detector, kind

    def forward(self, planes: Tensor) -> tuple[Tensor, Tensor]:
        logits, distances = self.detector(planes)
        lower = torch.zeros_like(logits)
        lower[:, self.kind] = 20.0
        return logits - lower, distances


def test_a_detector_agrees_with_itself_and_not_with_one_that_misses_a_class() -> None:
    models, meta = KIT.shipped()
    pairs = list(KIT.dataset(None, "test", "smoke"))[:4]
    detector = models["fp32"]
    full = agreement(detector, detector, pairs, meta["threshold"])
    assert full.share == 100.0 and full.of == full.same >= 4
    kinds = [int(k) for pair in pairs for k in pair.labels]
    missing = max(set(kinds), key=kinds.count)
    less = agreement(detector, Less(detector, missing), pairs, meta["threshold"])
    # where one class is gone, another may be called in its place
    assert 0 <= less.of - full.of <= 1 and abs(less.same - (full.of - kinds.count(missing))) <= 1
