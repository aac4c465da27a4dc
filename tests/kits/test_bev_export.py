"""BEVFormer exported: one graph of six inputs, its CNN in INT8 and its transformer in FP16, told by the audit."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.compress import compress
from core.export import export
from core.kit import Graph, Recipe
from core.quantization import Half, Quantize
from kits.bev_perception.model.backbone import DeformConv2d
from kits.bev_perception.model.detector import INPUTS, OUTPUTS, BEVFormer, empty_memory, example_inputs
from tests.core.toy import ToyKit
from tests.kits.bev_models import MICRO

SMALL = replace(MICRO, encoder_layers=1)
CNN, TRANSFORMER = ("img_backbone.*", "img_neck.*"), ("pts_bbox_head.*",)


class Frames(ToyKit):
    """Frames whose memory is what the network said of the frame before."""

    def dataset(self, data: Path | None, split: str, preset: str = "full") -> Sequence[Any]:
        return list(range(8))

    def stream(self, samples: Sequence[Any], count: int, seed: int) -> Generator[tuple[Tensor, ...], Any, None]:
        memory, known = empty_memory(SMALL), 0.0
        for sample in samples[:count]:
            given = example_inputs(SMALL, seed=sample) | {"prev_bev": memory, "has_prev": torch.tensor([known])}
            output = yield tuple(given.values())
            memory, known = output[2], 1.0


def detector() -> BEVFormer:
    torch.manual_seed(0)
    model = BEVFormer(SMALL).eval()
    for module in model.modules():
        # a block begins as its shortcut: give its convolutions a say
        if isinstance(module, nn.BatchNorm2d) and not module.weight.any():
            nn.init.constant_(module.weight, 0.5)
    return model


def test_a_mixed_detector_exports_agrees_and_tells_what_ran(tmp_path: Path) -> None:
    model = detector()
    step = Quantize(layers=CNN, samples=2, reduce_range=True, bias_correction=False)
    small, _ = compress(model, Recipe("mixed", (step, Half(layers=TRANSFORMER)), "", ""), Frames())
    given = example_inputs(SMALL)
    assert tuple(given) == INPUTS
    graph = Graph("detector", given, OUTPUTS)
    artifact = export({"fp32": model, "mixed": small}, (graph,), "this-host", tmp_path / "a", kit="bev",
                      runtimes=["openvino"])  # fmt: skip
    audit = artifact.variant("mixed-openvino").audit
    convolutions = [r for r in audit["layers"] if r["layer"].startswith(("img_backbone", "img_neck"))]
    assert len(convolutions) == 24
    assert {(r["asked"], r["stored"], r["ran"]) for r in convolutions} == {("INT8", "INT8", "INT8")}
    rest = [r for r in audit["layers"] if r["layer"].startswith("pts_bbox_head.transformer")]
    # the learnt queries are constants, and so are the products that read nothing else
    once = {r["layer"] for r in rest if r["ran"] == "constant"}
    assert "pts_bbox_head.transformer.reference_points" in once and all(".encoder." not in name for name in once)
    assert {(r["asked"], r["stored"], r["ran"]) for r in rest if r["layer"] not in once} == {("FP16", "FP16", "FP32")}
    assert any(r["layer"].endswith("attentions.0.attn") for r in rest)
    named = {o["layer"] for o in audit["operators"] if o["operator"] == "GridSample"}
    assert "pts_bbox_head.transformer.encoder.layers.0.attentions.1.deformable_attention" in named
    assert artifact.variant("fp32-openvino").audit["warnings"] == []
    # the six inputs in their order; the memory is looked at, and only where there is one
    module = artifact.as_module("fp32-openvino", threads=1)
    with torch.no_grad():
        wanted = model(*given.values())
    for found, right in zip(module(*given.values()), wanted, strict=True):
        assert torch.allclose(found, right, atol=1e-3)
    begun = given | {"has_prev": torch.zeros(1)}
    other = begun | {"prev_bev": torch.randn_like(given["prev_bev"])}
    assert torch.equal(module(*begun.values())[2], module(*other.values())[2])
    assert not torch.allclose(module(*begun.values())[2], wanted[2], atol=1e-2)


@pytest.mark.parametrize("patterns", [CNN, ("img_neck.*",)])
def test_the_cnn_alone_is_quantized_on_frames_in_order(patterns: tuple[str, ...]) -> None:
    step = Quantize(layers=patterns, samples=3)
    small, trace = compress(detector(), Recipe("cnn", (step,), "", ""), Frames())
    done = {line["layer"] for line in trace[0].changed if "weight_bits" in line}
    assert done and all(name.startswith(tuple(p[:-1] for p in patterns)) for name in done)
    left = {s.layer: s.why for s in trace[0].skipped}
    head = "pts_bbox_head.transformer.encoder.layers.0.attentions.0.value_proj"
    assert left[head].startswith("stays as it is: not among the layers of the step")
    with torch.no_grad():
        _, _, bev = small(*example_inputs(SMALL).values())
    assert bev.isfinite().all()


@pytest.mark.parametrize("stride", [1, 2])
def test_deformable_convolution_of_plain_operators_is_torchvisions(stride: int) -> None:
    torch.manual_seed(0)
    layer = DeformConv2d(6, stride)
    x = torch.randn(2, 6, 9, 11)
    nn.init.normal_(layer.conv_offset.weight, std=0.5)
    offset, mask = layer.conv_offset(x).split((18, 9), 1)
    assert offset.abs().max() > 2, "samples leave the picture too"
    with torch.no_grad():
        assert torch.allclose(layer.sampled(x, offset, mask.sigmoid()), layer(x), atol=1e-5)


def test_a_deformable_backbone_runs_in_both_runtimes(tmp_path: Path) -> None:
    """As small and base have it: caffe style, DCN in layer3 and layer4."""
    torch.manual_seed(0)
    backbone = replace(SMALL.backbone, depth=50, style="caffe", deformable=True, out_indices=(3,), levels=1)
    model = BEVFormer(replace(SMALL, backbone=backbone)).eval()
    for module in model.modules():
        if isinstance(module, DeformConv2d):
            nn.init.normal_(module.conv_offset.weight, std=0.05)
    given = example_inputs(SMALL)
    artifact = export({"fp32": model}, (Graph("detector", given, OUTPUTS),), "this-host", tmp_path / "a", kit="bev")
    with torch.no_grad():
        wanted = model(*given.values())[2]
    for name in ("fp32-onnxruntime", "fp32-openvino"):
        found = artifact.as_module(name, threads=1)(*given.values())[2]
        assert torch.allclose(found, wanted, atol=2e-3), name


def test_what_nano_has_of_its_own_runs_in_both_runtimes(tmp_path: Path) -> None:
    """Distances of pixels, and convolutions over BEV and memory; compared by the memory, which nothing ranks."""
    torch.manual_seed(0)
    model = BEVFormer(replace(SMALL, depth_bins=8, fusion=True, proposals=True)).eval()
    nn.init.normal_(model.get_submodule("pts_bbox_head.fusion.conv2").weight, std=0.1)  # type: ignore[arg-type]
    given = example_inputs(SMALL)
    artifact = export({"fp32": model}, (Graph("detector", given, OUTPUTS),), "this-host", tmp_path / "a", kit="bev")
    blind = given | {"lidar2img": given["lidar2img"].clone(), "camera_mask": torch.ones(1, 6)}
    blind["lidar2img"][:, 2], blind["camera_mask"][:, 2] = 0.0, 0.0
    for inputs in (given, blind):
        with torch.no_grad():
            wanted = model(*inputs.values())[2]
        assert wanted.isfinite().all()
        for name in ("fp32-onnxruntime", "fp32-openvino"):
            found = artifact.as_module(name, threads=1)(*inputs.values())[2]
            assert torch.allclose(found, wanted, atol=2e-3), name
