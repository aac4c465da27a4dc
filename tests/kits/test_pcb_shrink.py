"""Boards as a network of fewer pixels sees them: the fast way is the general one, and comes after registration."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kits.pcb_inspection.model import inspector
from kits.pcb_inspection.model.inspector import inspect
from kits.pcb_inspection.model.pair import binarise, register, stack
from kits.pcb_inspection.model.shrink import shrink


def edges(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A binary image with pieces of many sizes."""
    noise = np.random.default_rng(seed).normal(size=(height, width)).astype(np.float32)
    return np.where(cv2.GaussianBlur(noise, (0, 0), 1.5) > 0, 255, 0).astype(np.uint8)


@pytest.mark.parametrize("shape", [(640, 640), (320, 640), (100, 90), (101, 90), (33, 47)])
@pytest.mark.parametrize("scale", [0.5, 0.75, 0.8, 0.9, 0.7])
def test_it_is_the_mean_over_areas(shape: tuple[int, int], scale: float) -> None:
    image = edges(*shape)
    size = round(shape[1] * scale), round(shape[0] * scale)
    mean = cv2.resize(image.astype(np.float64) / 255, size, interpolation=cv2.INTER_AREA)
    found = shrink(image, scale)
    assert found.shape == size[::-1] and found.dtype == np.uint8 and set(np.unique(found)) == {0, 255}
    clear = np.abs(mean - 0.5) > 1e-6  # an even half is a matter of rounding
    assert (found == 255)[clear].tolist() == (mean > 0.5)[clear].tolist() and clear.mean() > 0.8


class Seen(nn.Module):
    """A detector of 576 px that keeps what it is shown and finds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.planes: list[Tensor] = []

    def forward(self, planes: Tensor) -> tuple[Tensor, Tensor]:
        self.planes.append(planes)
        cells = planes.shape[-1] // 8
        return torch.full((1, 6, cells, cells), -20.0), torch.zeros(1, 4, cells, cells)


def test_a_shifted_template_is_registered_before_both_are_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspector, "input_side", lambda module: 576)
    test = edges(640, 640)
    template = np.roll(test, (3, -5), (0, 1))
    module = Seen()
    found = inspect(module, test, template)
    moved, registration = register(binarise(test), binarise(template))
    assert (registration.dx, registration.dy) == (5, -3) and found.registrations == (registration,)
    wanted = stack(shrink(test, 0.9), shrink(moved, 0.9))
    assert (module.planes[0][0].numpy() * 255).round().astype(np.uint8).tolist() == wanted.tolist()
    assert not wanted[2:, 16:-16, 16:-16].any()  # nothing differs: no part of a pixel is left between the two
