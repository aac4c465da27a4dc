"""Binary images made a little smaller by the mean over areas, in a seventh of the time that OpenCV's general way takes.

Where n of n + 1 pixels are left (576 of 640, 512 of 640) an area covers two neighbours in each direction, with whole
numbers as weights: of a binary image small integers do.
"""

from __future__ import annotations

import cv2
import numpy as np

from kits.pcb_inspection.model.pair import Grey

_MOST = 14
"""Largest n: the sum of the weights of a pixel, (n + 1) squared, fits into 8 bits."""


def shrink(image: Grey, scale: float) -> Grey:
    """A binary image (H, W) of 0 and 255 at a `scale` below 1, binary again: 255 where half of the area or more is."""
    shape = round(image.shape[0] * scale), round(image.shape[1] * scale)
    n = round(scale / (1 - scale))
    if n <= _MOST and all(small * (n + 1) == large * n for small, large in zip(shape, image.shape)):
        across = cv2.transpose(_shrink_rows(image & np.uint8(1), n))
        summed = cv2.transpose(_shrink_rows(np.asarray(across, np.uint8), n))
        return np.asarray(cv2.threshold(summed, ((n + 1) ** 2 - 1) // 2, 255, cv2.THRESH_BINARY)[1], np.uint8)
    mean = cv2.resize(image, shape[::-1], interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.threshold(mean, 127, 255, cv2.THRESH_BINARY)[1], np.uint8)


def _shrink_rows(image: Grey, n: int) -> Grey:
    """Of every n + 1 rows (H, W) n weighted sums of neighbours; the weights of each add up to n + 1."""
    blocks = image.reshape(-1, n + 1, image.shape[1])
    second = np.arange(1, n + 1, dtype=np.uint8)[None, :, None]
    summed = blocks[:, :-1] * (n + 1 - second)
    summed += blocks[:, 1:] * second
    return summed.reshape(-1, image.shape[1])
