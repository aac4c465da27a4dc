"""ResNet (He 2016) in its two styles, modulated deformable convolution (Zhu 2019) and FPN (Lin 2017).

Names and order of parameters are those of mmdet's layers, so that published checkpoints load as they are.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.kit import InputError
from kits.bev_perception.model.configs import Backbone

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
"""Blocks of the four layers by depth."""


class DeformConv2d(nn.Conv2d):
    """A 3x3 DCNv2: `conv_offset` gives 18 offsets (y, x alternating) and 9 mask logits a place. No bias."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__(channels, channels, 3, stride, 1, bias=False)
        self.conv_offset = nn.Conv2d(channels, 27, 3, stride, 1)
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(cast(Tensor, self.conv_offset.bias))

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h / stride, w / stride)."""
        offset, mask = self.conv_offset(input).split((18, 9), 1)
        if torch.compiler.is_exporting():
            # not every runtime has the operator; all have these
            return self.sampled(input, offset, mask.sigmoid())
        try:
            from torchvision.ops import deform_conv2d
        except ImportError as error:
            raise InputError(
                "a deformable backbone (small, base) needs torchvision; pip install torchvision"
            ) from error
        found = deform_conv2d(input, offset, self.weight, None, self.stride, self.padding, 1, mask.sigmoid())
        return cast(Tensor, found)

    def sampled(self, input: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """The same of plain operators: nine samples a place, weighed by `mask` (B, 9, h, w), and a 1x1 convolution."""
        H, W = input.shape[-2:]
        B, _, h, w = offset.shape
        (step, _), (pad, _) = self.stride, cast(tuple[int, int], self.padding)
        tap, row, column = (torch.arange(n, device=input.device) for n in (9, h, w))
        y = (row * step - pad)[None, :, None] + (tap // 3)[:, None, None] + offset[:, 0::2]
        x = (column * step - pad)[None, None, :] + (tap % 3)[:, None, None] + offset[:, 1::2]
        grid = torch.stack(((2 * x + 1) / W - 1, (2 * y + 1) / H - 1), -1).view(B, 9 * h, w, 2)
        taken = F.grid_sample(input, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        weighed = taken.view(B, -1, 9, h, w) * mask[:, None]
        return F.conv2d(weighed.reshape(B, -1, h, w), self.weight.flatten(1)[:, :, None, None])


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the shortcut."""

    expansion = 1

    def __init__(self, inputs: int, channels: int, stride: int, style: str, deformable: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _shortcut(inputs, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3 (plain or deformable) and 1x1 convolution, and the shortcut."""

    expansion = 4

    def __init__(self, inputs: int, channels: int, stride: int, style: str, deformable: bool) -> None:
        super().__init__()
        first, second = (1, stride) if style == "pytorch" else (stride, 1)
        self.conv1 = nn.Conv2d(inputs, channels, 1, first, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = (
            DeformConv2d(channels, second) if deformable else nn.Conv2d(channels, channels, 3, second, 1, bias=False)
        )
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels * 4)
        self.downsample = _shortcut(inputs, channels * 4, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """Images (B, 3, H, W) -> the layers of `out_indices`, layer i being (B, channels, H / 2^(i + 2), W / 2^(i + 2)).

    Layers behind the last of these are left out.
    """

    def __init__(self, config: Backbone) -> None:
        super().__init__()
        self.config = config
        block = BasicBlock if config.depth < 50 else Bottleneck
        width = config.base_channels
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        inputs, self.channels = width, []
        for index, count in enumerate((config.blocks or BLOCKS[config.depth])[: max(config.out_indices) + 1]):
            outputs, deformable = width * 2**index, config.deformable and index >= 2
            blocks = []
            for number in range(count):
                stride = 2 if index and number == 0 else 1
                blocks.append(block(inputs, outputs, stride, config.style, deformable))
                inputs = outputs * block.expansion
            self.channels.append(inputs)
            setattr(self, f"layer{index + 1}", nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            # a block that starts as its shortcut trains faster without pretrained weights
            if isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)
        self._freeze()

    def _freeze(self) -> None:
        for module in self._frozen():
            module.requires_grad_(False)
        if self.config.norm_frozen:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.requires_grad_(False)

    def _frozen(self) -> list[nn.Module]:
        stages = self.config.frozen_stages
        stem = [self.conv1, self.bn1] if stages >= 0 else []
        return [*stem, *(self.get_submodule(f"layer{i}") for i in range(1, stages + 1))]

    def train(self, mode: bool = True) -> ResNet:
        """Training mode; what the config freezes stays in eval mode."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        if self.config.norm_frozen:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, 2, 1)
        outputs = []
        for index in range(len(self.channels)):
            x = self.get_submodule(f"layer{index + 1}")(x)
            if index in self.config.out_indices:
                outputs.append(x)
        return tuple(outputs)


class ConvModule(nn.Module):
    """A convolution under the name `conv`, as mmcv's layer of that name without norm and activation has it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)
        nn.init.xavier_uniform_(self.conv.weight)
        nn.init.zeros_(cast(Tensor, self.conv.bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class FPN(nn.Module):
    """Maps of a backbone -> `levels` maps of `channels`, the finest first.

    More levels than maps are made by stride-2 convolutions of the coarsest output, from the second on after a ReLU;
    with fewer, the coarser ones only feed the finer.
    """

    def __init__(self, inputs: list[int], channels: int, levels: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(ConvModule(i, channels, 1) for i in inputs)
        self.fpn_convs = nn.ModuleList(
            ConvModule(channels, channels, 3, 1 if level < len(inputs) else 2) for level in range(levels)
        )

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        merged = [lateral(x) for lateral, x in zip(self.lateral_convs, maps, strict=True)]
        for level in range(len(merged) - 1, 0, -1):
            size = merged[level - 1].shape[-2:]
            merged[level - 1] = merged[level - 1] + F.interpolate(merged[level], size=size, mode="nearest")
        outputs: list[Tensor] = []
        for level, conv in enumerate(self.fpn_convs):
            if level < len(merged):
                outputs.append(conv(merged[level]))
            else:
                outputs.append(conv(F.relu(outputs[-1]) if level > len(merged) else outputs[-1]))
        return tuple(outputs)
