"""From the network's outputs to detections: decoding and class-agnostic suppression, in NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from core.evaluation.detection import suppress
from kits.pcb_inspection.model.network import STRIDE

FLOOR = 0.01
"""Detections below this score are not kept."""
OVERLAP = 0.4
"""IoU above which the weaker of two detections is dropped, whatever their classes."""
MOST = 300
CANDIDATES = 600
"""Cells that enter the suppression, the best first; an object claims about eight."""


def decode(logits: NDArray[np.float32], distances: NDArray[np.float32], floor: float = FLOOR) -> NDArray[np.float32]:
    """Detections (n, 6) x1 y1 x2 y2 score label, best first, of one image: logits (6, h, w), distances (4, h, w)."""
    return decode_all(logits, distances, floor)[0]


def decode_all(
    logits: NDArray[np.float32], distances: NDArray[np.float32], floor: float = FLOOR
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The same with the logits (n, 6) of every detection."""
    classes, height, width = logits.shape
    flat = logits.reshape(classes, -1)
    best = flat.max(0)
    cells = np.flatnonzero(best > np.log(floor / (1 - floor)))
    if len(cells) == 0:
        return np.zeros((0, 6), np.float32), np.zeros((0, classes), np.float32)
    if len(cells) > CANDIDATES:
        cells = cells[np.argpartition(-best[cells], CANDIDATES)[:CANDIDATES]]
    labels = flat[:, cells].argmax(0)
    scores = 1 / (1 + np.exp(-best[cells]))
    x, y = (cells % width + 0.5) * STRIDE, (cells // width + 0.5) * STRIDE
    left, top, right, bottom = np.exp(np.clip(distances.reshape(4, -1)[:, cells], -4, 4)) * STRIDE
    boxes = np.stack((x - left, y - top, x + right, y + bottom), 1)
    boxes = np.clip(boxes, 0, np.array([width, height, width, height]) * STRIDE)
    kept = suppress(boxes, scores, OVERLAP, MOST)
    found = np.concatenate((boxes[kept], scores[kept, None], labels[kept, None]), 1).astype(np.float32)
    return found, flat[:, cells[kept]].T
