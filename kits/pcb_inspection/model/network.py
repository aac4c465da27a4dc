"""The detector: four input planes, strides 4 to 32, one anchor-free head at stride 8.

Shapes: N batch, H and W image size (multiples of 32), h = H / 8, w = W / 8.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

STRIDE = 8
"""Of the head's cells."""
COARSEST = 32
"""Stride of the last stage; the sides of an input are multiples of it."""
CLASS_COUNT = 6
PRIOR = 0.01
"""Score of every cell before training, so that the first steps are not spent on the background."""


class ConvBlock(nn.Module):
    """Convolution, batch norm, ReLU; the norm folds away before quantization."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        padding = 0 if kernel == stride else kernel // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.bn(self.conv(x)))
        return out


class Residual(nn.Module):
    """Two 3 x 3 convolutions with the input added before the last ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = ConvBlock(channels, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.bn(self.conv(self.first(x))) + x)
        return out


class PairDetector(nn.Module):
    """Defects in a pair: (N, 4, H, W) in 0..1 to class logits (N, 6, h, w) and distances (N, 4, h, w).

    The planes are test, registered template, copper gained, copper lost (`pair.stack` / 255). The
    distances are log(left, top, right, bottom / 8 px) from the centre of the cell to the box's sides.
    """

    def __init__(
        self, widths: tuple[int, int, int, int] = (24, 48, 96, 128), blocks: tuple[int, int, int] = (1, 1, 1)
    ) -> None:
        super().__init__()
        c4, c8, c16, c32 = widths
        self.stem = ConvBlock(4, c4, 4, 4)
        self.down8 = ConvBlock(c4, c8, 3, 2)
        self.stage8 = nn.Sequential(*(Residual(c8) for _ in range(blocks[0])))
        self.down16 = ConvBlock(c8, c16, 3, 2)
        self.stage16 = nn.Sequential(*(Residual(c16) for _ in range(blocks[1])))
        self.down32 = ConvBlock(c16, c32, 3, 2)
        self.stage32 = nn.Sequential(*(Residual(c32) for _ in range(blocks[2])))
        self.lateral32 = nn.Conv2d(c32, c16, 1)
        self.lateral16 = nn.Conv2d(c16, c8, 1)
        self.up = nn.Upsample(scale_factor=2.0, mode="nearest")
        self.act = nn.ReLU()
        self.fuse = ConvBlock(c8, c8)
        self.classes = nn.Conv2d(c8, CLASS_COUNT, 1)
        self.distances = nn.Conv2d(c8, 4, 1)
        nn.init.constant_(self.classes.bias, float(torch.logit(torch.tensor(PRIOR))))  # type: ignore[arg-type]
        nn.init.zeros_(self.distances.weight)
        nn.init.constant_(self.distances.bias, 0.8)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        at8 = self.stage8(self.down8(self.stem(x)))
        at16 = self.stage16(self.down16(at8))
        at32 = self.stage32(self.down32(at16))
        at16 = self.act(at16 + self.up(self.lateral32(at32)))
        at8 = self.fuse(self.act(at8 + self.up(self.lateral16(at16))))
        return self.classes(at8), self.distances(at8)
