"""The detector's own promises: sizes, batches, missing cameras, geometry, and one graph for ONNX Runtime."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from core.export.onnx import OnnxModule, save_onnx, to_onnx
from core.kit import Graph, InputError
from kits.bev_perception.model import geometry
from kits.bev_perception.model.boxes import decode, detections, encode, flip_yaw
from kits.bev_perception.model.configs import CONFIGS, NANO, TINY, Config
from kits.bev_perception.model.detector import INPUTS, OUTPUTS, BEVFormer, example_inputs, parameters_of
from tests.kits.bev_models import MICRO


def micro(config: Config = MICRO) -> BEVFormer:
    model = BEVFormer(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            # offsets and attention begin as zero matrices, which would hide mistakes of layout
            if "sampling_offsets.weight" in name or "attention_weights.weight" in name:
                p.normal_(std=0.1)
    return model


def test_sizes() -> None:
    with torch.device("meta"):
        found = {name: parameters_of(BEVFormer(config)) for name, config in CONFIGS.items()}
    assert found == {"tiny": 33_521_157, "small": 59_463_619, "base": 69_034_947, "nano": 3_714_474}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"heads": 5}, r"config 'nano': embed_dims 64 .* heads 5"),
        ({"spatial_points": 6}, "spatial_points 6 is no multiple of points_in_pillar 8"),
        ({"backbone": replace(NANO.backbone, levels=2)}, "num_feature_levels 1 is below backbone.levels 2"),
        ({"images": replace(NANO.images, height=150)}, "multiples of 32 pixels"),
    ],
)
def test_sizes_that_cannot_be_are_refused(change: dict[str, object], why: str) -> None:
    with pytest.raises(InputError, match=why):
        BEVFormer(replace(NANO, **change))  # type: ignore[arg-type]


def test_a_batch_gives_what_its_samples_give_alone() -> None:
    model = micro()
    inputs = example_inputs(MICRO, 3)
    generator = torch.Generator().manual_seed(1)
    inputs["can_bus"] += torch.randn(3, 18, generator=generator)
    inputs["lidar2img"] *= 1 + 0.02 * torch.randn(3, 6, 4, 1, generator=generator)
    inputs["has_prev"] = torch.tensor([1.0, 0.0, 1.0])
    inputs["camera_mask"][2, 1] = 0
    with torch.no_grad():
        together = model(**inputs)
        for i in range(3):
            alone = model(**{name: value[i : i + 1] for name, value in inputs.items()})
            for a, b in zip(together, alone):
                torch.testing.assert_close(a[i : i + 1], b, rtol=1e-4, atol=1e-4)


def test_what_is_not_there_is_not_looked_at() -> None:
    model = micro()
    inputs = example_inputs(MICRO)
    inputs["has_prev"][:], inputs["camera_mask"][0, 2] = 0, 0
    other = {name: value.clone() for name, value in inputs.items()}
    other["prev_bev"].fill_(torch.nan)
    other["images"][0, 2] = 40.0
    there = {**other, "camera_mask": torch.ones(1, 6)}
    with torch.no_grad():
        first, second, third = model(**inputs)[2], model(**other)[2], model(**there)[2]
    torch.testing.assert_close(first, second)
    assert (first - third).abs().max() > 0.1


@pytest.mark.parametrize("gone", [1, 6])
def test_without_cameras_the_answer_is_finite(gone: int) -> None:
    inputs = example_inputs(MICRO)
    inputs["camera_mask"][:, :gone] = 0
    with torch.no_grad():
        assert all(bool(t.isfinite().all()) for t in micro()(**inputs))


def test_two_cameras_a_cell_are_as_good_as_all_where_no_third_sees_it() -> None:
    every, two = (replace(MICRO, cameras_per_query=count) for count in (None, 2))
    model, inputs = micro(two), example_inputs(MICRO)
    shape = (MICRO.images.height, MICRO.images.width)
    _, inside, _ = geometry.project(model.pts_bbox_head.pillars, inputs["lidar2img"], shape)
    assert inside.any(-1).sum(1).max() == 2
    full = BEVFormer(every).eval()
    full.load_state_dict(model.state_dict())
    with torch.no_grad():
        for a, b in zip(model(**inputs), full(**inputs)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_straight_on_the_history_lies_one_way_behind() -> None:
    can_bus = torch.zeros(1, 18)
    heading = 0.7
    can_bus[0, 0], can_bus[0, 1], can_bus[0, 16] = 5 * math.cos(heading), 5 * math.sin(heading), heading
    found = geometry.shift(can_bus, (100.0, 50.0, 8.0))
    np.testing.assert_allclose(found.numpy(), [[0.0, 0.1]], atol=1e-6)


def test_a_quarter_turn_about_the_middle_moves_every_cell() -> None:
    grid = torch.arange(16.0).view(1, 16, 1)
    turned = geometry.rotate(grid, torch.tensor([90.0]), 4, 4, (2.0, 2.0)).view(4, 4)
    # result (row r, column c) takes the old cell (row c, column 3 - r): R (p - k) + k with R of 90 degrees
    wanted = torch.tensor([[float(4 * c + (3 - r)) for c in range(4)] for r in range(4)])
    assert torch.equal(turned, wanted)
    assert torch.equal(geometry.rotate(grid, torch.tensor([0.0]), 4, 4, (2.0, 2.0)), grid)


def test_boxes_and_their_code() -> None:
    box = torch.tensor([[1.0, -2.0, 0.5, 1.8, 4.5, 1.6, 2.9, 3.0, -1.0]])
    torch.testing.assert_close(decode(encode(box)), box)
    yaw = torch.linspace(-3.1, 3.1, 9)
    torch.testing.assert_close(flip_yaw(flip_yaw(yaw)), yaw)
    torch.testing.assert_close(flip_yaw(torch.tensor([0.0])), torch.tensor([-math.pi / 2]))


def test_detections_are_the_best_pairs_of_query_and_class_within_the_range() -> None:
    scores = torch.full((3, 10), -9.0)
    scores[0, 4], scores[0, 2], scores[2, 1] = 3.0, 1.0, 2.0
    codes = encode(
        torch.tensor([[1.0, 2, 0, 1, 1, 1, 0, 0, 0], [0.0, 0, 0, 1, 1, 1, 0, 0, 0], [70.0, 0, 0, 1, 1, 1, 0, 0, 0]])
    )
    found = detections(scores, codes, replace(NANO, max_num=3))
    assert found.labels.tolist() == [4, 2]
    np.testing.assert_allclose(found.scores, 1 / (1 + np.exp([-3.0, -1.0])), rtol=1e-6)
    assert found.bottom[0, 2] == -0.5


def agree(found: Tensor, wanted: Tensor) -> float:
    return float(((found - wanted).abs() / (1 + wanted.abs())).max())


def test_nano_is_one_onnx_graph_with_its_memory_outside(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = micro(NANO)
    head = model.pts_bbox_head.proposals
    assert head is not None
    with torch.no_grad():
        head.classify.weight.mul_(30)  # scores apart, as those of a trained head: rounding must not choose other cells
    inputs = example_inputs(NANO)
    graph = Graph("nano", inputs, OUTPUTS)
    assert tuple(inputs) == INPUTS
    proto = to_onnx(model, graph)
    assert {"GridSample", "TopK"} <= {node.op_type for node in proto.graph.node}
    assert not {"NonZero", "If", "Loop"} & {node.op_type for node in proto.graph.node}
    save_onnx(proto, tmp_path / "nano.onnx")
    runtime = OnnxModule(tmp_path / "nano.onnx", 1)
    start = {**inputs, "has_prev": torch.zeros(1), "prev_bev": torch.zeros_like(inputs["prev_bev"])}
    missing = {**inputs, "camera_mask": torch.tensor([[1.0, 1, 0, 1, 1, 1]])}
    memory = inputs["prev_bev"]
    with torch.no_grad():
        for case in (start, inputs, missing):
            wanted = model(*case.values())
            for name, a, b in zip(OUTPUTS, runtime(*case.values()), wanted):
                if name != "bev":  # rows come in the order of scores that rounding may turn over
                    a, b = a.sort(1).values, b.sort(1).values
                assert agree(a, b) <= 1e-3, name
        # the memory goes round in the runtime alone, as it is deployed
        ours, theirs = memory, memory
        for _ in range(3):
            ours = model(*{**inputs, "prev_bev": ours}.values())[2]
            theirs = runtime(*{**inputs, "prev_bev": theirs}.values())[2]
        assert agree(theirs, ours) <= 1e-4


def test_the_published_sizes_have_sane_inputs() -> None:
    assert TINY.extent == pytest.approx((102.4, 102.4, 8.0))
    assert all(len(config.classes) == 10 for config in CONFIGS.values())
