"""Distances of pixels and the memory beside the BEV: against what can be worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kits.bev_perception.model import geometry
from kits.bev_perception.model.detector import BEVFormer, example_inputs
from kits.bev_perception.model.fusion import Fusion
from kits.bev_perception.model.lift import FAR, GROUND, LENS, NEAR, atlas, bin_of, focal, street, told, weigh
from tests.kits.bev_models import MICRO

LIFTED = replace(MICRO, depth_bins=8)
FUSED = replace(MICRO, fusion=True)


def camera(fx: float, fy: float, yaw: float) -> Tensor:
    """A camera (4, 4) that looks along `yaw` in the plane, its picture's middle at 40, 30."""
    ahead, right = (math.cos(yaw), math.sin(yaw), 0.0), (math.sin(yaw), -math.cos(yaw), 0.0)
    axes = torch.tensor([(*right, 0.3), (0.0, 0.0, -1.0, 1.5), (*ahead, 0.2), (0.0, 0.0, 0.0, 1.0)])
    lens = torch.eye(4)
    lens[0, 0], lens[1, 1], lens[0, 2], lens[1, 2] = fx, fy, 40.0, 30.0
    return lens @ axes


@pytest.mark.parametrize("yaw", [0.0, 0.7, -2.4])
def test_the_focal_length_is_read_from_the_matrix(yaw: float) -> None:
    found = focal(torch.stack((camera(120.0, 110.0, yaw), camera(75.0, 80.0, yaw))))
    assert torch.allclose(found, torch.tensor([[120.0, 110.0], [75.0, 80.0]]), atol=1e-3)


def test_a_wide_lens_makes_things_look_farther_away() -> None:
    matrices = torch.stack((camera(LENS * 96, 70.0, 0.3), camera(LENS * 48, 70.0, 0.3)))
    depth = torch.tensor([[[10.0, 20.0]], [[10.0, 20.0]]])
    assert torch.allclose(told(depth, matrices, 96), torch.tensor([[[10.0, 20.0]], [[20.0, 40.0]]]), atol=1e-3)


def test_bins_grow_by_a_factor() -> None:
    factor = (FAR / NEAR) ** (1 / 8)
    middles = NEAR * factor ** (torch.arange(8) + 0.5)
    assert torch.allclose(bin_of(middles, 8), torch.arange(8.0), atol=1e-4)
    assert bin_of(torch.tensor([0.1, 1e6]), 8).tolist() == [0.0, 7.0]


@pytest.mark.parametrize("yaw", [0.0, 1.1])
def test_pixels_know_where_the_street_is(yaw: float) -> None:
    """Points on a flat street, projected: the code of the pixel they fall into is their distance."""
    matrix = camera(LENS * 80, 60.0, yaw)[None, None]
    for ahead, aside in ((8.0, 0.5), (12.0, -2.0), (20.0, 3.0)):
        point = torch.tensor(
            [ahead * math.cos(yaw) + aside * math.sin(yaw), ahead * math.sin(yaw) - aside * math.cos(yaw), GROUND, 1.0]
        )
        u, v, depth = (matrix[0, 0] @ point)[:3].tolist()
        column, row = int(u / depth / 0.5), int(v / depth / 0.5)  # a map of half pixels
        codes = street(matrix, (120, 160), (60, 80))[0, 0, :, row, column]
        assert codes[0] == pytest.approx(4 / depth, rel=0.05)
        assert codes[1] == pytest.approx(math.log(depth / NEAR) / math.log(FAR / NEAR), abs=0.02)
        assert codes[2] == pytest.approx(math.sin(2 * math.pi * codes[1].item()), abs=1e-5)
    above = street(matrix, (120, 160), (60, 80))[0, 0, :, 10, 80]
    assert above[0] < 0 and above[1] == pytest.approx(1.0)


def test_a_wide_lens_sees_the_street_as_far_as_things_on_it() -> None:
    """Half the focal length: the same share for the same `told` distance."""
    for fx in (LENS * 80, LENS * 40):
        matrix = camera(fx, 60.0, 0.0)[None, None]
        u, v, depth = (matrix[0, 0] @ torch.tensor([10.0, 0.0, GROUND, 1.0]))[:3].tolist()
        codes = street(matrix, (120, 160), (60, 80))[0, 0, :, int(v / depth / 0.5), int(u / depth / 0.5)]
        said = float(told(torch.tensor([[depth]]), matrix[0], 80))
        assert codes[1] == pytest.approx(math.log(said / NEAR) / math.log(FAR / NEAR), abs=0.02)


def test_a_camera_without_calibration_says_nothing_that_is_not_finite() -> None:
    assert street(torch.zeros(1, 2, 4, 4), (3, 4), (24, 32)).isfinite().all()


def test_weights_are_linear_between_pixels_and_bins() -> None:
    torch.manual_seed(0)
    E, N, h, w = 5, 2, 3, 4
    logits = torch.randn(1, N, E, h, w)
    known = logits.softmax(2) * E
    depth = NEAR * (FAR / NEAR) ** ((2.0 + 0.5 + 0.25) / E)  # a quarter of the way from bin 2 to bin 3
    camera, row, column = 1, 2, 1
    y = (row + 0.5 + camera * (h + 1)) * 2 / (N * (h + 1)) - 1
    places = torch.tensor([[[column + 0.5, y], [column + 1.0, y], [-0.5, y], [w + 0.5, y]]])
    found = weigh(atlas(logits), places, torch.full((1, 4), depth), E, (N, h, w))[0]
    here = 0.75 * known[0, camera, 2, row] + 0.25 * known[0, camera, 3, row]
    wanted = torch.stack((here[column], (here[column] + here[column + 1]) / 2, here.new_zeros(()), here.new_zeros(())))
    assert torch.allclose(found, wanted, atol=1e-5)


def test_pixels_that_know_nothing_change_nothing_but_at_the_border() -> None:
    torch.manual_seed(0)
    plain = BEVFormer(MICRO).eval()
    lifted = BEVFormer(LIFTED).eval()
    missing = lifted.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert {key.split(".")[1] for key in missing} == {"distances"}
    last = lifted.get_submodule("pts_bbox_head.distances.layers.4")
    for parameter in last.parameters():
        torch.nn.init.zeros_(parameter)
    inputs = tuple(example_inputs(MICRO).values())
    with torch.no_grad():
        apart = (plain(*inputs)[2] - lifted(*inputs)[2]).abs().amax(-1)[0]
    assert (apart < 1e-4).float().mean() > 0.3
    torch.nn.init.normal_(last.bias, std=3.0)
    with torch.no_grad():
        assert (plain(*inputs)[2] - lifted(*inputs)[2]).abs().max() > 0.05


def test_a_cell_takes_of_a_pixel_what_is_at_its_own_distance() -> None:
    """Where all pixels say 10 m, cells far from that get nothing of the pictures."""
    torch.manual_seed(0)
    model = BEVFormer(LIFTED).eval()
    head = model.pts_bbox_head
    assert head.distances is not None
    last = head.distances.layers[4]
    torch.nn.init.zeros_(last.weight)
    with torch.no_grad():
        last.bias.copy_(torch.where(torch.arange(8) == bin_of(torch.tensor(10.0), 8).round(), 30.0, 0.0))
    inputs = example_inputs(LIFTED)
    other = {**inputs, "images": inputs["images"].flip(3) + 1}
    with torch.no_grad():
        changed = (model(*inputs.values())[2] - model(*other.values())[2]).abs().amax(-1)[0]
    points, _, depth = geometry.project(head.pillars, inputs["lidar2img"], (64, 96))
    depth = told(depth, inputs["lidar2img"], 96)
    ahead = torch.where(depth > 0, (bin_of(depth, 8) - bin_of(torch.tensor(10.0), 8).round()).abs(), 9.0)
    nearest = ahead.amin((1, 3))[0]
    assert (changed[nearest > 1.5] < 1e-4).all() and (nearest > 1.5).sum() > 10
    assert changed[nearest < 0.3].max() > 0.05


def test_the_memory_is_brought_to_where_the_car_stands_now() -> None:
    """Straight on by one cell in y, what was a cell ahead is now here; what lies beyond the grid is 0."""
    Q = MICRO.bev_h * MICRO.bev_w
    memory = torch.arange(float(Q))[None, :, None] + 1
    can_bus = torch.zeros(1, 18)
    cell = MICRO.extent[1] / MICRO.bev_h
    can_bus[:, 0] = cell  # along the heading 0
    moved = geometry.aligned(memory, can_bus, MICRO)[0, 0]
    before = memory.view(MICRO.bev_h, MICRO.bev_w)
    assert torch.allclose(moved[:-1], before[1:], atol=1e-3)
    assert torch.allclose(moved[-1], torch.zeros(MICRO.bev_w), atol=1e-3)


def test_a_turn_is_the_one_of_temporal_attention() -> None:
    memory = torch.randn(1, MICRO.bev_h * MICRO.bev_w, 3, generator=torch.Generator().manual_seed(0))
    can_bus = torch.zeros(1, 18)
    can_bus[:, 17] = 180.0
    turned = geometry.rotate(memory, can_bus[:, 17], MICRO.bev_h, MICRO.bev_w, MICRO.rotate_center)
    assert torch.allclose(geometry.aligned(memory, can_bus, MICRO).flatten(2).transpose(1, 2), turned, atol=1e-4)


def test_fusion_adds_nothing_to_begin_with_and_then_looks_at_both() -> None:
    torch.manual_seed(0)
    fusion = Fusion(4).eval()
    bev, before = torch.randn(2, 6, 4), torch.randn(2, 4, 2, 3)
    assert torch.equal(fusion(bev, before), bev)
    torch.nn.init.normal_(fusion.conv2.weight)
    assert not torch.allclose(fusion(bev, before), fusion(bev, before + 1))
    assert not torch.allclose(fusion(bev, before), fusion(bev + 1, before) - 1)


def test_a_scene_that_begins_does_not_look_at_the_memory() -> None:
    torch.manual_seed(0)
    model = BEVFormer(FUSED).eval()
    torch.nn.init.normal_(model.get_submodule("pts_bbox_head.fusion.conv2").weight, std=0.1)
    inputs = example_inputs(FUSED)
    inputs["has_prev"] = torch.zeros(1)
    again = {**inputs, "prev_bev": torch.full_like(inputs["prev_bev"], 7.0)}
    with torch.no_grad():
        assert torch.equal(model(*inputs.values())[2], model(*again.values())[2])
        inputs["has_prev"] = again["has_prev"] = torch.ones(1)
        assert not torch.allclose(model(*inputs.values())[2], model(*again.values())[2])
