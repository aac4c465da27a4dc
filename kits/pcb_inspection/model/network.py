"""The detector: four input planes, strides 4 to 32, one anchor-free head at stride 8.

Shapes: N batch, H and W image size (multiples of 32), h = H / 8, w = W / 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from kits.pcb_inspection.model.design import BY_HAND, COARSEST, Design

STRIDE = 8
"""Of the head's cells."""
CLASS_COUNT = 6
DUAL = np.array([1, 0, 3, 2, 5, 4])
"""The class that a defect turns into when copper and board change places: open and short, mousebite and spur, ..."""
PRIOR = 0.01
"""Score of every cell before training, so that the first steps are not spent on the background."""


class Layers(Protocol):
    """What a network is made of: plain layers, or those of a supernet."""

    def conv(
        self, inputs: int, outputs: int, kernels: Sequence[int], stride: int = 1, *, padding: int | None = None,
        bias: bool = False, groups: int = 1,
    ) -> nn.Module:  # fmt: skip
        """A convolution with the largest of `kernels`; padding keeps the size at stride 1 unless it is given."""

    def norm(self, channels: int) -> nn.Module:
        """A batch norm."""

    def stage(self, blocks: Sequence[nn.Module]) -> nn.Module:
        """Blocks one after the other."""


class Plain:
    """torch's own layers."""

    def conv(
        self, inputs: int, outputs: int, kernels: Sequence[int], stride: int = 1, *, padding: int | None = None,
        bias: bool = False, groups: int = 1,
    ) -> nn.Module:  # fmt: skip
        kernel = max(kernels)
        padded = kernel // 2 if padding is None else padding
        return nn.Conv2d(inputs, outputs, kernel, stride, padded, groups=groups, bias=bias)

    def norm(self, channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels)

    def stage(self, blocks: Sequence[nn.Module]) -> nn.Module:
        return nn.Sequential(*blocks)


PLAIN = Plain()


class ConvBlock(nn.Module):
    """Convolution, batch norm, ReLU; the norm folds away before quantization."""

    def __init__(
        self, layers: Layers, inputs: int, outputs: int, kernels: Sequence[int] = (3,), stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        padding = 0 if max(kernels) == stride else None
        self.conv = layers.conv(inputs, outputs, kernels, stride, padding=padding, groups=groups)
        self.bn = layers.norm(outputs)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.bn(self.conv(x)))
        return out


class Residual(nn.Module):
    """Two convolutions with the input added before the last ReLU."""

    def __init__(self, layers: Layers, channels: int, kernels: Sequence[int] = (3,), expand: float = 1.0) -> None:
        super().__init__()
        hidden = round(channels * expand)
        self.first = ConvBlock(layers, channels, hidden, kernels)
        self.conv = layers.conv(hidden, channels, kernels)
        self.bn = layers.norm(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.bn(self.conv(self.first(x))) + x)
        return out


class PairDetector(nn.Module):
    """Defects in a pair: (N, 4, H, W) in 0..1 to class logits (N, 6, h, w) and distances (N, 4, h, w).

    The planes are test, registered template, copper gained, copper lost (`pair.stack` / 255). The
    distances are log(left, top, right, bottom / 8 px) from the centre of the cell to the box's sides.
    """

    stage8: nn.Module
    stage16: nn.Module
    stage32: nn.Module

    def __init__(self, design: Design = BY_HAND, layers: Layers = PLAIN, smaller: Sequence[int] = ()) -> None:
        """`smaller` are kernels that a supernet's stages can have beside those of the design."""
        super().__init__()
        self.design = design
        c4, c8, c16, c32 = design.widths
        self.stem = ConvBlock(layers, 4, c4, (4,), 4, design.fusion)
        self.down8 = ConvBlock(layers, c4, c8, stride=2)
        self.down16 = ConvBlock(layers, c8, c16, stride=2)
        if design.deepest == COARSEST:
            self.down32 = ConvBlock(layers, c16, c32, stride=2)
            self.lateral32 = layers.conv(c32, c16, (1,), bias=True)
        for stride, channels, count, kernel in zip(
            (8, 16, 32), (c8, c16, c32), design.blocks, design.kernels, strict=True
        ):
            if stride <= design.deepest:
                blocks = [Residual(layers, channels, (*smaller, kernel), design.expand) for _ in range(count)]
                self.add_module(f"stage{stride}", layers.stage(blocks))
        self.lateral16 = layers.conv(c16, c8, (1,), bias=True)
        self.up = nn.Upsample(scale_factor=2.0, mode="nearest")
        self.act = nn.ReLU()
        self.fuse = ConvBlock(layers, c8, design.head)
        self.classes = layers.conv(design.head, CLASS_COUNT, (1,), bias=True)
        self.distances = layers.conv(design.head, 4, (1,), bias=True)
        nn.init.constant_(self.classes.bias, float(torch.logit(torch.tensor(PRIOR))))  # type: ignore[arg-type]
        nn.init.zeros_(self.distances.weight)  # type: ignore[arg-type]
        nn.init.constant_(self.distances.bias, 0.8)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        at8 = self.stage8(self.down8(self.stem(x)))
        at16 = self.stage16(self.down16(at8))
        if self.design.deepest == COARSEST:
            at32 = self.stage32(self.down32(at16))
            at16 = self.act(at16 + self.up(self.lateral32(at32)))
        at8 = self.fuse(self.act(at8 + self.up(self.lateral16(at16))))
        return self.classes(at8), self.distances(at8)
