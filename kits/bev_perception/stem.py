"""The step that rewrites the stem: a 7 x 7 convolution over 3 channels as a 4 x 4 one over 12, which 2:4 can thin out.

What every second row and column hold becomes channels of their own (space to depth); the result is the same. Three
input channels are no multiple of four, so the stem would stay dense, and after pruning it is a fifth of all products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.compress import Outcome, handles
from core.kit import Context, InputError, Step


@dataclass(frozen=True)
class DepthStem(Step):
    """Rewrite the stem of the backbone; nothing that the network gives changes."""


class SpaceToDepth(nn.Module):
    """A 7 x 7 convolution of stride 2 and padding 3 as a 4 x 4 one over four times the channels at half the size.

    Images (N, C, H, W) with even H and W -> (N, outputs, H / 2, W / 2). It multiplies 64 / 49 times as much, an eighth
    row and column of zeros included.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4 * inputs, outputs, 4, bias=False)

    @staticmethod
    def of(stem: nn.Conv2d) -> SpaceToDepth:
        """The same convolution in this form."""
        made = SpaceToDepth(stem.in_channels, stem.out_channels)
        wide = F.pad(stem.weight.detach(), (1, 0, 1, 0))
        with torch.no_grad():
            made.conv.weight.copy_(F.pixel_unshuffle(wide, 2))
        return made.to(stem.weight.device)

    def forward(self, images: Tensor) -> Tensor:
        # output i looks at rows 2i - 3 to 2i + 3: the pairs i - 2 to i + 1
        return self.conv(F.pad(F.pixel_unshuffle(images, 2), (2, 1, 2, 1)))


def _stem(model: nn.Module) -> nn.Conv2d:
    backbone = getattr(model, "img_backbone", None)
    stem = getattr(backbone, "conv1", None)
    wanted = ((7, 7), (2, 2), (3, 3), 1)
    if not isinstance(stem, nn.Conv2d) or (stem.kernel_size, stem.stride, stem.padding, stem.groups) != wanted:
        raise InputError(
            f"DepthStem: {type(model).__name__} has no img_backbone.conv1 of 7 x 7, stride 2, padding 3; leave it out"
        )
    if stem.bias is not None:
        raise InputError("DepthStem: img_backbone.conv1 has a bias; put the step before those that fold batch norms")
    return stem


def restore(model: nn.Module, step: DepthStem, structure: dict[str, Any]) -> nn.Module:
    """The rewritten stem again, for weights to be loaded into."""
    model.get_submodule("img_backbone").conv1 = SpaceToDepth.of(_stem(model))
    return model


@handles(DepthStem, restore=restore)
def rewrite(model: nn.Module, step: DepthStem, context: Context) -> Outcome:
    """Rewrite the stem in place."""
    stem = _stem(model)
    restore(model, step, {})
    what = f"7 x 7 over {stem.in_channels} channels became 4 x 4 over {4 * stem.in_channels}, the same result"
    return Outcome(model, [{"layer": "img_backbone.conv1", "what": what}])
