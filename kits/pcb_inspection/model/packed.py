"""A binary image at a bit a pixel, of which parts are unpacked: two scans of 16,384 px take 67 MB instead of 537."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from kits.pcb_inspection.model.pair import Grey, binarise, level_of

_ROWS = 1024
"""Rows that are made smaller at a time."""
_PACKED = 256
"""Rows that are packed at a time, so that beside the image itself there is little: of 16,384 px 4 MB a copy."""


class Packed:
    """A grey image (H, W) as `pair.binarise` makes it, at its own level; `packed[rows, columns]` is a part of it."""

    def __init__(self, shape: tuple[int, int], rows: Callable[[int, int], Grey]) -> None:
        """`rows(top, bottom)` gives the image's rows (bottom - top, W), as often as they are asked for."""
        self.shape = shape
        strips = [(top, min(top + _PACKED, shape[0])) for top in range(0, shape[0], _PACKED)]

        def every(step: int) -> Grey:
            # copies: views would keep all strips
            return np.concatenate([rows(*strip)[-strip[0] % step :: step, ::step].copy() for strip in strips])

        highest = level_of(every, shape[0] * shape[1])
        self._bits = np.empty((shape[0], -(-shape[1] // 8)), np.uint8)
        for top, bottom in strips:
            self._bits[top:bottom] = np.packbits(binarise(rows(top, bottom), highest) > 0, axis=1)

    def __getitem__(self, here: tuple[slice, slice]) -> Grey:
        """The pixels of two slices without steps, 0 for copper and 255 for bare board."""
        (top, bottom, _), (left, right, _) = (part.indices(side) for part, side in zip(here, self.shape))
        first = left // 8
        bits = np.unpackbits(self._bits[top:bottom, first : -(-right // 8)], axis=1)
        return np.ascontiguousarray(bits[:, left - 8 * first : max(left, right) - 8 * first]) * np.uint8(255)

    def reduced(self, size: tuple[int, int]) -> Grey:
        """The image at a smaller (width, height), grey where pixels mix."""
        width, height = size
        rows = max(1, round(_ROWS * height / self.shape[0]))
        strips = []
        for top in range(0, height, rows):
            bottom = min(height, top + rows)
            start, stop = (round(row * self.shape[0] / height) for row in (top, bottom))
            strip = self[start:stop, :]
            strips.append(np.asarray(cv2.resize(strip, (width, bottom - top), interpolation=cv2.INTER_AREA), np.uint8))
        return np.concatenate(strips)
