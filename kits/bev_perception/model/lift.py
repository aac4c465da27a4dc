"""How far away what a pixel shows is: a distribution over distances that spatial attention weighs its samples with.

As the depth of LSS (Philion 2020) and BEVDepth (Li 2022) in the deformable attention of DFA3D (Li 2023): a BEV cell
takes of a pixel what is at the cell's distance. Without it a cell gets whatever lies on the ray before it or behind.
Distances are those at which a thing would look as large through a lens of the same focal length for every camera, so
that what is learnt of one holds for the others and for pictures that were zoomed. Letters: B batch, N cameras, P
places, E bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NEAR, FAR = 2.0, 90.0
"""Metres that the first bin begins at and the last ends at; the bins' borders grow by a factor."""
LENS = 0.8
"""The focal length that distances are told for, as a share of the image's width."""


@dataclass(frozen=True)
class Far:
    """How far away the finest level's pixels say they are: the picture of `atlas` and its number of bins."""

    picture: Tensor
    bins: int


def focal(matrix: Tensor) -> Tensor:
    """Focal lengths in pixels (..., 2), x first, of matrices (..., 3 or 4, 4) from metres to pixels."""
    rows, axis = matrix[..., :2, :3], matrix[..., 2:3, :3]
    # both rows are a focal length times an axis of the image and a share of the optical axis
    return (rows.square().sum(-1) - (rows * axis).sum(-1).square()).clamp(min=1e-6).sqrt()


def told(depth: Tensor, matrix: Tensor, width: int) -> Tensor:
    """Metres along the axes of cameras with matrices (..., 4, 4) as they are told: for LENS of an image of `width`.

    depth (..., P...) has any axes behind those of the matrices.
    """
    ratio = LENS * width / focal(matrix)[..., 0]
    return depth * ratio.view(*ratio.shape, *(1,) * (depth.dim() - ratio.dim()))


GROUND = -1.84
"""Metres: the height of the street in the LiDAR's frame, as it is mounted on nuScenes' cars."""
WAVES = (1, 2, 4)
CODES = 2 + 2 * len(WAVES)
"""What a pixel is told of the street there, see `street`."""


class Distances(nn.Module):
    """Features (B, N, C, h, w) -> logits (B, N, E, h, w) of the distance, from them and from where the street lies."""

    def __init__(self, channels: int, bins: int) -> None:
        super().__init__()
        self.bins = bins
        self.layers = nn.Sequential(
            nn.Conv2d(channels + CODES, channels, 3, padding=1), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(),
            nn.Conv2d(channels, bins, 1),
        )  # fmt: skip

    def forward(self, features: Tensor, lidar2img: Tensor, image_shape: tuple[int, int]) -> Tensor:
        """lidar2img (B, N, 4, 4) is for images of `image_shape` (height, width)."""
        codes = street(lidar2img, (int(features.shape[-2]), int(features.shape[-1])), image_shape)
        both = torch.cat((features, codes.to(features.dtype)), 2)
        return self.layers(both.flatten(0, 1)).unflatten(0, features.shape[:2])


def street(lidar2img: Tensor, shape: tuple[int, int], image_shape: tuple[int, int]) -> Tensor:
    """How far away a flat street is in every pixel of a map of `shape` (h, w): codes (B, N, CODES, h, w).

    What stands on the street is as far away as the street where it touches it, which no convolution knows that does
    not know how high in the picture it looks. The codes are one over the distance, its share of NEAR..FAR (the last
    above the horizon), and sine and cosine of the share's multiples.
    """
    (h, w), (H, W) = shape, image_shape
    first, second, third = (lidar2img[..., :3, i] for i in range(3))
    across = _cross(first, second)
    volume = (across * third).sum(-1, keepdim=True)
    # the last row of the inverse of the matrix's left part: how fast a ray falls, by its pixel; a camera without
    # calibration has none
    fall = across / torch.where(volume.abs() < 1e-9, 1.0, volume)
    height = GROUND + (fall * lidar2img[..., :3, 3]).sum(-1)
    height = torch.where(height.abs() < 0.1, -0.1, height)[..., None, None]
    y, x = torch.meshgrid(
        (torch.arange(h, device=fall.device) + 0.5) * (H / h), (torch.arange(w, device=fall.device) + 0.5) * (W / w),
        indexing="ij",
    )  # fmt: skip
    a, b, c = (fall[..., i, None, None] for i in range(3))
    nearness = (a * x + b * y + c) / height * (focal(lidar2img)[..., 0] / (LENS * W))[..., None, None]
    share = (nearness.clamp(1 / FAR, 1 / NEAR) * NEAR).log() / -math.log(FAR / NEAR)
    waves = [wave(2 * math.pi * k * share) for k in WAVES for wave in (torch.sin, torch.cos)]
    return torch.stack(((4 * nearness).clamp(-1, 2), share, *waves), 2)


def _cross(a: Tensor, b: Tensor) -> Tensor:
    (ax, ay, az), (bx, by, bz) = a.unbind(-1), b.unbind(-1)
    return torch.stack((ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx), -1)


def bin_of(depth: Tensor, bins: int) -> Tensor:
    """Where metres (...) lie among the bins: 0 is the middle of the first one, bins - 1 that of the last; clamped."""
    share = depth.clamp(NEAR, FAR).div(NEAR).log() / math.log(FAR / NEAR)
    return (share * bins - 0.5).clamp(0, bins - 1)


def atlas(logits: Tensor) -> Tensor:
    """Logits (B, N, E, h, w) -> one picture (B, 1, N * (h + 1), E * (w + 1)) of E times the probabilities.

    Cameras lie one above the other, bins side by side, each with a row and a column of zeros behind it. Times E, so
    that a pixel that does not know weighs 1 at every distance.
    """
    B, N, E, h, w = logits.shape
    known = F.pad(logits.softmax(2) * E, (0, 1, 0, 1))
    return known.permute(0, 1, 3, 2, 4).reshape(B, 1, N * (h + 1), E * (w + 1))


def weigh(picture: Tensor, places: Tensor, depth: Tensor, bins: int, shape: tuple[int, int, int]) -> Tensor:
    """How likely it is that what lies at `places` is `depth` metres away, from the `atlas` of (N, h, w) = `shape`.

    places (B, P, 2) are x in pixels of one camera's map (-0.5 to w + 0.5) and y in -1..1 of the whole atlas, as the
    samples of the values are; depth (B, P) -> (B, P), linear between the two nearest bins.
    """
    _, _, w = shape
    wide = bins * (w + 1)
    place = bin_of(depth, bins)
    low = place.floor().clamp(max=bins - 2)
    share = place - low
    right = places.new_tensor((w + 1.0, 0.0))  # from a bin to the next, where x alone moves
    scale, start = places.new_tensor((2 / wide, 1.0)), places.new_tensor((-1.0, 0.0))
    nearer = places + low[..., None] * right
    grid = torch.stack((nearer, nearer + right), 1) * scale + start
    found = F.grid_sample(picture, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[:, 0]
    return found[:, 0] * (1 - share) + found[:, 1] * share
