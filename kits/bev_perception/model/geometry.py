"""Geometry of the BEV grid: its cells in the images, and the history brought to where the car stands now.

Letters: B batch, N cameras, Q = bev_h * bev_w cells in rows, D heights of a pillar, K cameras a cell looks into.
All of it is to be computed in FP32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kits.bev_perception.model.attention import Views
from kits.bev_perception.model.configs import Config

NEAREST_DEPTH = 1e-5
"""Metres: what is nearer to the camera's plane, or behind it, is not seen."""


def cells(bev_h: int, bev_w: int) -> Tensor:
    """Centres of the cells as fractions of the grid (Q, 2), x first."""
    y, x = torch.meshgrid((torch.arange(bev_h) + 0.5) / bev_h, (torch.arange(bev_w) + 0.5) / bev_w, indexing="ij")
    return torch.stack((x, y), -1).reshape(-1, 2)


def pillars(config: Config) -> Tensor:
    """Points of the cells' pillars as fractions of `pc_range` (D, Q, 3).

    The heights go from half a metre above the floor to half a metre below the ceiling; with `pillar_heights` the points
    are those of each quarter of the cell, one quarter after the other.
    """
    height, D = config.extent[2], config.points_in_pillar
    if config.pillar_heights is not None:
        step = torch.tensor((0.25 / config.bev_w, 0.25 / config.bev_h))
        quarters = torch.tensor([(x, y) for y in (-1.0, 1.0) for x in (-1.0, 1.0)]) * step
        heights = [(z - config.pc_range[2]) / height for z in config.pillar_heights]
        middle = cells(config.bev_h, config.bev_w)
        return torch.stack([F.pad(middle + q, (0, 1), value=z) for q in quarters for z in heights])
    z = (torch.linspace(0.5, height - 0.5, D) / height)[:, None, None].expand(D, config.bev_h * config.bev_w, 1)
    return torch.cat((cells(config.bev_h, config.bev_w).expand(D, -1, -1), z), -1)


def project(points: Tensor, lidar2img: Tensor, image_shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Points in metres (D, Q, 3) by matrices (B, N, 4, 4) -> x, y in 0..1 of the image (B, N, Q, D, 2), mask and depth.

    `image_shape` is (height, width) of the padded image that the matrices are for. The mask (B, N, Q, D) is True where
    a point is before the camera and inside of the image, the depth (B, N, Q, D) in metres along the camera's axis.
    """
    homogeneous = F.pad(points.transpose(0, 1), (0, 1), value=1.0)
    seen = torch.einsum("bnij,qdj->bnqdi", lidar2img[:, :, :3], homogeneous)
    depth = seen[..., 2:]
    xy = seen[..., :2] / depth.clamp(min=NEAREST_DEPTH) / seen.new_tensor(image_shape[::-1])
    inside = (depth[..., 0] > NEAREST_DEPTH) & ((xy > 0) & (xy < 1)).all(-1)
    return xy, inside, depth[..., 0]


def views(points: Tensor, inside: Tensor, depth: Tensor, camera_mask: Tensor, per_query: int | None) -> Views:
    """What every cell looks into, from `project`; `camera_mask` (B, N) is 0 for a camera that is not there.

    With `per_query` a cell takes that many cameras, those with most points of its pillar first.
    """
    B, N, Q = inside.shape[:3]
    visible = (inside & (camera_mask > 0.5)[:, :, None, None]).sum(-1).transpose(1, 2).to(points.dtype)
    points, depth = points.transpose(1, 2), depth.transpose(1, 2)
    number = torch.arange(N, device=points.device)
    if per_query is None or per_query >= N:
        cameras = number.expand(B, Q, N)
    else:
        # equal counts in the order of the cameras, in every runtime
        cameras = (visible - number.to(points.dtype) / (2 * N)).topk(per_query, -1).indices
        visible = visible.gather(2, cameras)
        D = points.shape[3]
        points = points.gather(2, cameras[..., None, None].expand(-1, -1, -1, D, 2))
        depth = depth.gather(2, cameras[..., None].expand(-1, -1, -1, D))
    seen = (visible > 0).to(points.dtype)
    return Views(points, cameras, seen / seen.sum(-1, keepdim=True).clamp(min=1), depth)


def shift(can_bus: Tensor, extent: tuple[float, float, float]) -> Tensor:
    """How far the history lies behind, as fractions of the grid (B, 2), x first, from `can_bus` (B, 18).

    With the motion (dx, dy) = can_bus[0:2] in the global frame, its length d and the heading h = can_bus[16] (radians):
    d sin(h - atan2(dy, dx)) / X and d cos(h - atan2(dy, dx)) / Y, written without the atan2 that ONNX lacks.
    """
    dx, dy, heading = can_bus[:, 0], can_bus[:, 1], can_bus[:, 16]
    sin, cos = heading.sin(), heading.cos()
    return torch.stack(((sin * dx - cos * dy) / extent[0], (cos * dx + sin * dy) / extent[1]), -1)


def rotate(bev: Tensor, degrees: Tensor, bev_h: int, bev_w: int, center: tuple[float, float]) -> Tensor:
    """The history (B, Q, C) turned by `degrees` (B,): every cell takes the old one that it falls into, or zeros.

    Cell (row r, column c) takes the old cell that contains R (p - k) + k with p = (c + 0.5, r + 0.5),
    R = [[cos, -sin], [sin, cos]] and k = `center` (x, y).
    """
    B, Q, C = bev.shape
    size, middle = bev.new_tensor((bev_w, bev_h)), bev.new_tensor(center)
    angle = degrees * (math.pi / 180)
    sin, cos = angle.sin()[:, None], angle.cos()[:, None]
    x, y = (cells(bev_h, bev_w).to(bev) * size - middle).unbind(-1)
    place = torch.stack((cos * x - sin * y, sin * x + cos * y), -1) + middle
    grid = (place * (2 / size) - 1).view(B, bev_h, bev_w, 2)
    old = bev.transpose(1, 2).reshape(B, C, bev_h, bev_w)
    turned = F.grid_sample(old, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return turned.reshape(B, C, Q).transpose(1, 2)


def aligned(bev: Tensor, can_bus: Tensor, config: Config) -> Tensor:
    """The memory (B, Q, C) as a map (B, C, bev_h, bev_w) about where the car stands now, linear between its cells.

    Turned as in `rotate` and moved as by `shift`; zeros where the memory holds nothing.
    """
    B, _, C = bev.shape
    h, w = config.bev_h, config.bev_w
    size, middle = bev.new_tensor((w, h)), bev.new_tensor(config.rotate_center)
    angle = can_bus[:, 17] * (math.pi / 180)
    sin, cos = angle.sin()[:, None], angle.cos()[:, None]
    moved = (cells(h, w).to(bev) + shift(can_bus, config.extent)[:, None]) * size - middle
    x, y = moved.unbind(-1)
    place = torch.stack((cos * x - sin * y, sin * x + cos * y), -1) + middle
    old = bev.transpose(1, 2).reshape(B, C, h, w)
    grid = (place * (2 / size) - 1).view(B, h, w, 2)
    return F.grid_sample(old, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
