"""Codes along and across the ray: what is learnt at one place holds all around."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from core.kit import InputError
from kits.bev_perception.model import boxes, geometry
from kits.bev_perception.model.configs import NANO
from kits.bev_perception.model.decoder import place
from kits.bev_perception.model.detector import BEVFormer, example_inputs
from kits.bev_perception.model.local import bearing, local_yaw, to_frame


def test_the_local_yaw_comes_back() -> None:
    yaw, angle = torch.linspace(-3, 3, 13), torch.linspace(-2, 4, 13)
    sin, cos = local_yaw(yaw, angle.cos(), angle.sin())
    code = torch.zeros(13, 10)
    code[:, 6], code[:, 7] = sin, cos
    back = to_frame(code, angle.cos(), angle.sin())
    torch.testing.assert_close(back[:, 6], yaw.sin())
    torch.testing.assert_close(back[:, 7], yaw.cos())


@pytest.mark.parametrize("turn", [0.4, math.pi / 2, -2.5])
def test_one_code_is_the_same_box_turned_about_the_car(turn: float) -> None:
    code = torch.tensor([[[0.5, -0.3, 0.6, 1.4, 0.2, 0.5, 0.6, 0.8, 3.0, -1.0]]])
    low, size = torch.tensor(NANO.pc_range[:3]), torch.tensor(NANO.extent)

    def box(x: float, y: float) -> torch.Tensor:
        reference = (torch.tensor([[[x, y, 0.0]]]) - low) / size
        return boxes.decode(place(code, reference, NANO)[0])[0, 0]

    sin, cos = math.sin(turn), math.cos(turn)
    here, there = box(12.0, 5.0), box(cos * 12 - sin * 5, sin * 12 + cos * 5)
    for a, b in ((0, 1), (7, 8)):
        assert there[a].item() == pytest.approx((cos * here[a] - sin * here[b]).item(), abs=1e-4)
        assert there[b].item() == pytest.approx((sin * here[a] + cos * here[b]).item(), abs=1e-4)
    headings = boxes.flip_yaw(torch.stack((here[6], there[6])))
    assert math.remainder((headings[1] - headings[0]).item() - turn, 2 * math.pi) == pytest.approx(0, abs=1e-4)
    assert here[2] == there[2] and torch.equal(here[3:6], there[3:6])


def test_the_refined_reference_is_the_centre_of_the_code() -> None:
    code, reference = torch.randn(2, 5, 10), torch.rand(2, 5, 3)
    low, size = torch.tensor(NANO.pc_range[:3]), torch.tensor(NANO.extent)
    for config in (NANO, replace(NANO, local_codes=False)):
        found, new = place(code, reference, config)
        centre = (found[..., [0, 1, 4]] - low) / size
        torch.testing.assert_close(new, centre.clamp(0, 1), atol=1e-5, rtol=0)


def test_dense_codes_are_turned_by_the_ray_of_their_cell() -> None:
    torch.manual_seed(0)
    head = BEVFormer(NANO).pts_bbox_head
    assert head.proposals is not None
    bev = torch.randn(1, NANO.bev_h * NANO.bev_w, NANO.embed_dims)
    dense = head.proposals(bev)
    row, column, cells = 70, 20, 2 * NANO.bev_h
    cell = NANO.extent[0] / cells
    x, y = (column + 0.5) * cell + NANO.pc_range[0], (row + 0.5) * cell + NANO.pc_range[1]
    wanted = to_frame(dense.local[0, :, row, column], *bearing(torch.tensor(x), torch.tensor(y)))
    torch.testing.assert_close(dense.codes[0, :, row, column], wanted)


def test_a_place_at_the_lidar_itself_is_finite() -> None:
    found = place(torch.randn(1, 1, 10), torch.full((1, 1, 3), 0.5), NANO)[0]
    assert found.isfinite().all()
    x = example_inputs(NANO)
    assert all(t.isfinite().all() for t in BEVFormer(NANO).eval()(*x.values()))


def test_a_pillar_has_points_in_the_four_quarters_of_its_cell() -> None:
    low, size = torch.tensor(NANO.pc_range[:3]), torch.tensor(NANO.extent)
    points = geometry.pillars(NANO) * size + low
    middle = geometry.cells(NANO.bev_h, NANO.bev_w) * size[:2] + low[:2]
    assert points.shape == (8, NANO.bev_h * NANO.bev_w, 3)
    torch.testing.assert_close(points[:, 7, 2], torch.tensor([-1.4, -0.4]).repeat(4))
    torch.testing.assert_close(points[::2, :, :2].mean(0), middle, atol=1e-4, rtol=0)
    quarter = NANO.extent[0] / NANO.bev_w / 4
    torch.testing.assert_close(
        (points[..., :2] - middle).abs(), torch.full_like(points[..., :2], quarter), atol=1e-4, rtol=0
    )
    with pytest.raises(InputError, match="points_in_pillar 4 is not 4 for each"):
        BEVFormer(replace(NANO, points_in_pillar=4))


def test_a_head_begins_at_its_own_quarter() -> None:
    layer = BEVFormer(NANO).pts_bbox_head.transformer.encoder.layers[0]
    camera = layer.attentions[1].deformable_attention
    assert not camera.sampling_offsets.bias.any()
    shares = camera.attention_weights.bias.view(4, 8).softmax(-1)
    for head in range(4):
        assert shares[head, 2 * head : 2 * head + 2].sum() > 0.85
    first = layer.attentions[0].sampling_offsets.bias.view(4, 2, 4, 2)
    assert not first[:, :, 0].any() and first[:, :, 3].abs().amax() == 1.5, "history is looked at in its own place too"
