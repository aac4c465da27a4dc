"""Boards as a network of a smaller tile sees them: both images made smaller, and then compared."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from kits.pcb_inspection.data.augment import Ready
from kits.pcb_inspection.model.inspector import TILE, to_input
from kits.pcb_inspection.model.network import STRIDE
from kits.pcb_inspection.model.pair import stack
from kits.pcb_inspection.model.shrink import shrink


def resized(batch: dict[str, Any], size: int) -> dict[str, Any]:
    """A batch of crops or boards (`training.collate`) for a tile of `size` pixels, boxes and "taught" with it."""
    if size == TILE:
        return batch
    scale = size / TILE
    seen = [stack(shrink(test, scale), shrink(template, scale))
            for test, template in (batch["images"][:, :2] * 255).byte().numpy()]  # fmt: skip
    truths = [(boxes * scale, labels) for boxes, labels in batch["truths"]]
    images = torch.cat([to_input(planes) for planes in seen]).contiguous(memory_format=torch.channels_last)
    found = {**batch, "images": images, "truths": truths}
    if "taught" in batch:
        cells = tuple(math.ceil(side / STRIDE) for side in images.shape[-2:])
        found["taught"] = F.interpolate(batch["taught"], cells, mode="bilinear", align_corners=False)
    return found


def seen_at(pair: Ready, size: int) -> Ready:
    """A registered pair for a tile of `size` pixels."""
    if size == TILE:
        return pair
    scale = size / TILE
    return replace(
        pair, test=shrink(pair.test, scale), template=shrink(pair.template, scale),
        boxes=pair.boxes * np.float32(scale),
    )  # fmt: skip
