"""What the BEV shows beside what it showed before: convolutions over both, from which movement can be told.

As BEVDet4D (Huang 2022) joins two BEVs. Temporal attention gives a cell the mean of what it samples, which does not say
from where; a convolution does. Letters: B batch, C channels, Q BEV cells in rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Fusion(nn.Module):
    """BEV (B, Q, C) and the memory as a map (B, C, h, w) -> the BEV with what the two say together added."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2 * dims, dims, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(dims)
        self.conv2 = nn.Conv2d(dims, dims, 3, padding=1)
        # to begin with nothing is added
        nn.init.zeros_(self.conv2.weight)
        assert self.conv2.bias is not None
        nn.init.zeros_(self.conv2.bias)

    def forward(self, bev: Tensor, before: Tensor) -> Tensor:
        now = bev.transpose(1, 2).reshape(before.shape)
        x = F.relu(self.bn1(self.conv1(torch.cat((now, before), 1))))
        return (now + self.conv2(x)).flatten(2).transpose(1, 2)
