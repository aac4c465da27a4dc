"""The detector against numbers of the official code: FITKIT_BEVFORMER_REFERENCE names their folder.

Without it `../shared/data/bevformer_reference` beside the repository is taken, and where that is not there either,
these tests are skipped. The bound is that of the issue: |a - b| / (1 + |a|) <= 1e-4.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kits.bev_perception.model import geometry
from kits.bev_perception.model.backbone import FPN, ResNet
from kits.bev_perception.model.boxes import detections
from kits.bev_perception.model.checkpoint import load_checkpoint
from kits.bev_perception.model.configs import CONFIGS, TINY, Backbone, Config, Images
from kits.bev_perception.model.decoder import place
from kits.bev_perception.model.detector import BEVFormer, Head, empty_memory
from kits.bev_perception.model.state import BevState, Frame

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder() -> Path:
    """The folder of the reference data."""
    named = os.environ.get("FITKIT_BEVFORMER_REFERENCE")
    found = Path(named) if named else Path(__file__).parents[3] / "shared/data/bevformer_reference"
    if not named and not found.is_dir():
        pytest.skip("FITKIT_BEVFORMER_REFERENCE does not name the folder of the official code's numbers")
    assert (found / "head_a.npz").is_file(), f"{found}: no head_a.npz in it"
    return found


def meta_of(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


def arrays_of(folder: Path, name: str) -> dict[str, np.ndarray]:
    with np.load(folder / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def config_of(meta: Mapping[str, Any]) -> Config:
    """The sizes of a reference model."""
    height, width = meta["image_shape"]
    assert meta["temporal_heads"] == meta["spatial_heads"] == meta["decoder_heads"] == meta["decoder_self_heads"]
    return replace(
        TINY,
        images=Images(height, width, meta["image_scale"]),
        backbone=backbone_of(meta.get("backbone", {}), len(meta["feature_shapes"])),
        heads=meta["spatial_heads"],
        decoder_points=meta["decoder_points"],
        points_in_pillar=meta["num_points_in_pillar"],
        pc_range=tuple(meta["pc_range"]),
        post_center_range=tuple(meta["post_center_range"]),
        rotate_center=tuple(meta["rotate_center"]),
        **{
            name: meta[name]
            for name in (
                "embed_dims", "ffn_dims", "num_cams", "bev_h", "bev_w", "num_query", "encoder_layers",
                "decoder_layers", "temporal_points", "spatial_points", "num_feature_levels", "max_num",
            )
        },
    )  # fmt: skip


def backbone_of(meta: Mapping[str, Any], levels: int) -> Backbone:
    names = {"depth", "base_channels", "style"} & set(meta)
    return Backbone(
        **{name: meta[name] for name in names},
        deformable=meta.get("dcn", False),
        out_indices=tuple(meta.get("out_indices", (3,))),
        levels=levels,
    )


def part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix + "."): v for k, v in weights.items() if k.startswith(prefix + ".")}


def close(found: Tensor, wanted: np.ndarray, what: str) -> float:
    assert tuple(found.shape) == wanted.shape, f"{what}: {tuple(found.shape)} and not {wanted.shape}"
    a, b = wanted.astype(np.float64), found.detach().double().numpy()
    worst = float((np.abs(a - b) / (1 + np.abs(a))).max()) if a.size else 0.0
    assert worst <= TOLERANCE, f"{what}: off by {worst:.3g}"
    return worst


@contextmanager
def watched(module: nn.Module) -> Iterator[tuple[dict[str, Any], dict[str, tuple[Any, ...]]]]:
    """What every submodule puts out and takes in while the body runs, by its name."""
    outputs: dict[str, Any] = {}
    inputs: dict[str, tuple[Any, ...]] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            inputs[name], outputs[name] = args, output

        return keep

    handles = [child.register_forward_hook(hook(name)) for name, child in module.named_modules()]
    try:
        yield outputs, inputs
    finally:
        for handle in handles:
            handle.remove()


class Case:
    """One case of a reference head: its model, its inputs, and what the model does with them."""

    def __init__(self, folder: Path, name: str, case: str, arrays: dict[str, np.ndarray], config: Config) -> None:
        meta = meta_of(folder, name)["cases"][case]
        self.arrays, self.name = arrays, case
        self.config = replace(config, rotate_center=tuple(meta["rotate_center"]))
        self.head = Head(self.config).eval()
        weights = part(load_file(folder / f"{name}.safetensors"), "pts_bbox_head")
        self.head.load_state_dict(weights, strict=True)
        self.history: bool = meta["history"]
        self.samples: list[int] = meta["samples"]
        B = len(self.samples)
        levels = range(self.config.backbone.levels)
        self.features = tuple(self._stack(f"feats.{level}") for level in levels)
        self.lidar2img = torch.from_numpy(arrays["lidar2img"]).float().expand(B, -1, 4, 4)
        self.can_bus = torch.from_numpy(arrays[f"{case}.can_bus"]).float()
        self.prev = self._stack("prev_bev") if self.history else torch.full_like(empty_memory(self.config, B), 7.0)
        self.cameras = torch.ones(B, self.config.num_cams)

    def _stack(self, name: str) -> Tensor:
        return torch.from_numpy(np.stack([self.arrays[f"sample{i}.{name}"] for i in self.samples]))

    @torch.no_grad()
    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """bev, logits and codes of all layers."""
        B = len(self.samples)
        known = torch.full((B,), float(self.history))
        shape = (self.config.images.height, self.config.images.width)
        bev = self.head.encode(self.features, self.lidar2img, self.can_bus, self.prev, known, self.cameras, shape)
        found = self.head.decode(bev, self.head.queries(bev))
        return bev, found.cls_scores, found.bbox_preds

    def wanted(self, name: str, case: str = "") -> np.ndarray:
        return self.arrays[f"{case or self.name}.{name}"]

    def check(self, name: str, found: Tensor, case: str = "") -> None:
        close(found, self.wanted(name, case), f"{case or self.name}.{name}")

    def check_boxes(self, scores: Tensor, codes: Tensor, index: int, case: str) -> None:
        """Boxes in the official order, from logits (L, B, O, K) and codes (L, B, O, 10)."""
        number = 0 if case != self.name else index
        found = detections(scores[-1, index], codes[-1, index], self.config)
        assert found.labels.tolist() == self.wanted(f"decoded.{number}.labels", case).tolist()
        for name, value in (("boxes", found.boxes), ("scores", found.scores), ("boxes_bottom", found.bottom)):
            self.check(f"decoded.{number}.{name}", value, case)


@pytest.fixture(scope="module")
def cases(folder: Path) -> Callable[[str, str], Case]:
    arrays = {name: arrays_of(folder, name) for name in ("head_a", "head_b")}
    return lambda name, case: Case(folder, name, case, arrays[name], config_of(meta_of(folder, name)))


@pytest.mark.parametrize("name", ["tiny", "small", "base"])
def test_names_shapes_and_types_are_those_of_the_published_models(folder: Path, name: str) -> None:
    wanted = json.loads((folder / f"bevformer_{name}_state_dict.json").read_text())
    with torch.device("meta"):
        model = BEVFormer(CONFIGS[name])
    buffers = {key for key, _ in model.named_buffers()}
    found = [
        [k, list(v.shape), str(v.dtype).removeprefix("torch."), k in buffers] for k, v in model.state_dict().items()
    ]
    assert found == wanted["entries"]
    sizes = {key: sum(p.numel() for p in module.parameters()) for key, module in model.named_children()}
    assert sizes == wanted["parameters_by_module"]
    assert sum(sizes.values()) == wanted["parameters"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == wanted["parameters_with_gradient"]


@pytest.mark.parametrize("name", ["head_a", "head_b"])
def test_every_intermediate_result(cases: Callable[[str, str], Case], name: str) -> None:
    case = cases(name, "sample0")
    head, config = case.head, case.config
    with watched(head) as (out, taken):
        bev, scores, codes = case.run()
    checked: set[str] = set()

    def check(key: str, found: Tensor) -> None:
        checked.add(key)
        case.check(key, found)

    query, position, reference, history, images, shapes, *_ = taken["transformer.encoder"]
    check("can_bus_embed", out["transformer.can_bus_mlp"])
    check("bev_query", query.transpose(0, 1))
    check("bev_pos", position.transpose(0, 1))
    check("shift", history.shift)
    if case.history:
        check("prev_bev_rotated", history.bev.transpose(0, 1))
    check("feat_flatten", images.permute(1, 2, 0, 3))
    check("spatial_shapes", torch.tensor(shapes))
    starts = np.cumsum([0, *(h * w for h, w in shapes)])[:-1]
    check("level_start_index", torch.from_numpy(starts))
    check("ref_2d", reference[None, :, None])
    low, size = torch.tensor(config.pc_range[:3]), torch.tensor(config.extent)
    check("ref_3d", ((head.pillars - low) / size)[None])
    layer = "transformer.encoder.layers.0.attentions.0"
    check("tsa_ref_2d", taken[layer][3].transpose(0, 1).reshape(2, -1, 1, 2))
    if case.history:
        check("tsa_value", taken[layer + ".value_proj"][0].flatten(0, 1))
    points, inside, _ = geometry.project(head.pillars, case.lidar2img, (config.images.height, config.images.width))
    check("reference_points_cam", points.transpose(0, 1))
    check("bev_mask", inside.transpose(0, 1))
    assert np.array_equal(inside.transpose(0, 1).numpy(), case.wanted("bev_mask"))
    for i in range(config.encoder_layers):
        layer = f"transformer.encoder.layers.{i}"
        tsa, sca = layer + ".attentions.0", layer + ".attentions.1"
        check(f"encoder.{i}.tsa_query", taken[tsa + ".sampling_offsets"][0])
        check(f"encoder.{i}.tsa_sampling_offsets", out[tsa + ".sampling_offsets"])
        check(f"encoder.{i}.tsa_attention_logits", out[tsa + ".attention_weights"])
        check(f"encoder.{i}.tsa_mean", taken[tsa + ".output_proj"][0])
        check(f"encoder.{i}.sca_slots", taken[sca + ".output_proj"][0])
        for key, module in (("tsa", tsa), ("sca", sca), ("ffn", layer + ".ffns.0")):
            check(f"encoder.{i}.{key}", out[module])
        for number in range(3):
            check(f"encoder.{i}.norm{number}", out[f"{layer}.norms.{number}"])
    check("bev_embed", bev.transpose(0, 1))
    queries = head.queries(bev)
    check("query_pos", queries.position.transpose(0, 1))
    check("init_reference", queries.reference)
    states, references = out["transformer.decoder"]
    check("decoder_states", torch.stack(states).transpose(1, 2))
    last = place(head.reg_branches[-1](states[-1]), references[-1], config)[1]
    check("inter_references", torch.stack([*references[1:], last]))
    for i in range(config.decoder_layers):
        layer = f"transformer.decoder.layers.{i}"
        for key, module in (("self_attn", ".attentions.0"), ("cross_attn", ".attentions.1"), ("ffn", ".ffns.0")):
            check(f"decoder.{i}.{key}", out[layer + module].transpose(0, 1))
        for number in range(3):
            check(f"decoder.{i}.norm{number}", out[f"{layer}.norms.{number}"].transpose(0, 1))
    check("all_cls_scores", scores)
    check("all_bbox_preds", codes)
    case.check_boxes(scores, codes, 0, case.name)
    given = {"can_bus", "prev_bev", *(f"feats.{level}" for level in range(4))}
    stored = {key.removeprefix("sample0.") for key in case.arrays if key.startswith("sample0.")}
    assert {key for key in stored - given if not key.startswith("decoded.")} == checked


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("head_a", "sample1"),
        ("head_a", "batch2"),
        ("head_b", "sample1"),
        ("head_b", "batch2"),
        ("head_b", "centred"),
        ("head_b", "no_history"),
    ],
)
def test_the_main_results_of_every_case(cases: Callable[[str, str], Case], name: str, case: str) -> None:
    """`batch2` must give both samples as if alone, where the official code mixes them up."""
    it = cases(name, case)
    with watched(it.head) as (out, taken):
        bev, scores, codes = it.run()
    history = taken["transformer.encoder"][3]
    states, references = out["transformer.decoder"]
    last = place(it.head.reg_branches[-1](states[-1]), references[-1], it.head.config)[1]
    batched: dict[str, tuple[Tensor, int]] = {  # name: (value, axis of the batch)
        "can_bus_embed": (out["transformer.can_bus_mlp"], 0),
        "shift": (history.shift, 0),
        "bev_embed": (bev.transpose(0, 1), 1),
        "init_reference": (references[0], 0),
        "inter_references": (torch.stack([*references[1:], last]), 1),
        "all_cls_scores": (scores, 1),
        "all_bbox_preds": (codes, 1),
    }
    if it.history:
        batched["prev_bev_rotated"] = (history.bev.transpose(0, 1), 1)
    for i in range(it.config.encoder_layers):
        batched[f"encoder.{i}.norm2"] = (out[f"transformer.encoder.layers.{i}.norms.2"], 0)
    for i in range(it.config.decoder_layers):
        batched[f"decoder.{i}.norm2"] = (out[f"transformer.decoder.layers.{i}.norms.2"].transpose(0, 1), 1)
    for index, sample in enumerate(it.samples):
        alone = f"sample{sample}" if case == "batch2" else case
        for key, (value, axis) in batched.items():
            it.check(key, value.narrow(axis, index, 1), alone)
        it.check_boxes(scores, codes, index, alone)


def test_a_batch_may_mix_samples_with_and_without_a_history(cases: Callable[[str, str], Case]) -> None:
    it = cases("head_b", "sample0")
    shape = (it.config.images.height, it.config.images.width)
    two = [t.repeat(2, *[1] * (t.ndim - 1)) for t in (it.lidar2img, it.can_bus, it.prev, it.cameras)]
    two[1][1] = torch.from_numpy(it.wanted("can_bus", "no_history")[0]).float()
    two[2][1] = torch.nan  # what stands in the memory of a sample without one must not matter
    features = tuple(f.repeat(2, 1, 1, 1, 1) for f in it.features)
    with torch.no_grad():
        bev = it.head.encode(features, two[0], two[1], two[2], torch.tensor([1.0, 0.0]), two[3], shape)
    it.check("bev_embed", bev[:1].transpose(0, 1))
    it.check("bev_embed", bev[1:].transpose(0, 1), "no_history")


@pytest.mark.parametrize("name", ["head_a", "head_b"])
def test_two_cameras_a_cell_are_all_that_see_one(cases: Callable[[str, str], Case], name: str) -> None:
    """The shorter way that `nano` takes is exact on nuScenes' ring of cameras."""
    it = cases(name, "sample0")
    it.head.config = replace(it.config, cameras_per_query=2)
    it.check("bev_embed", it.run()[0].transpose(0, 1))


def test_four_frames_with_their_memory(folder: Path) -> None:
    meta, arrays = meta_of(folder, "sequence"), arrays_of(folder, "sequence")
    model = BEVFormer(config_of(meta))
    load_checkpoint(model, folder / "sequence.safetensors")
    lidar2img = torch.from_numpy(arrays["lidar2img"]).float()[None]
    state = BevState(model.config)
    for t, (*_, scene) in enumerate(meta["frames"]):
        pixels = (arrays[f"frame{t}.images"] - arrays["mean"][:, None, None]) / arrays["std"][:, None, None]
        images = torch.from_numpy(pixels.astype(np.float32))[None]
        step = state.step(Frame.from_can_bus(scene, 0.5 * t, arrays[f"frame{t}.can_bus"]))
        assert (step.has_prev.item() == 1) == (f"frame{t}.prev_bev_rotated" in arrays)
        close(step.can_bus, arrays[f"frame{t}.can_bus_used"][None], f"frame{t}.can_bus_used")
        with torch.no_grad(), watched(model) as (out, taken):
            scores, codes, bev = model(images, lidar2img, *step.inputs)
        state.keep(bev)
        for key in ("backbone.0", "neck.0"):
            module = {"backbone.0": "img_backbone", "neck.0": "img_neck"}[key]
            close(out[module][0], arrays[f"frame{t}.{key}"], f"frame{t}.{key}")
        history = taken["pts_bbox_head.transformer.encoder"][3]
        close(
            out["pts_bbox_head.transformer.can_bus_mlp"], arrays[f"frame{t}.can_bus_embed"], f"frame{t}.can_bus_embed"
        )
        close(history.shift, arrays[f"frame{t}.shift"], f"frame{t}.shift")
        if step.has_prev.item():
            close(history.bev.transpose(0, 1), arrays[f"frame{t}.prev_bev_rotated"], f"frame{t}.prev_bev_rotated")
        close(bev.transpose(0, 1), arrays[f"frame{t}.bev_embed"], f"frame{t}.bev_embed")
        found = detections(scores[0], codes[0], model.config)
        assert found.labels.tolist() == arrays[f"frame{t}.labels"].tolist()
        close(found.scores, arrays[f"frame{t}.scores"], f"frame{t}.scores")
        close(found.bottom, arrays[f"frame{t}.boxes_bottom"], f"frame{t}.boxes_bottom")


def test_the_backbone_with_deformable_convolutions(folder: Path) -> None:
    meta, arrays = meta_of(folder, "backbone_caffe_dcn"), arrays_of(folder, "backbone_caffe_dcn")
    config = backbone_of(meta["backbone"], len(meta["feature_shapes"]))
    net, weights = ResNet(config).eval(), load_file(folder / "backbone_caffe_dcn.safetensors")
    neck = FPN([net.channels[i] for i in config.out_indices], meta["embed_dims"], config.levels).eval()
    net.load_state_dict(part(weights, "img_backbone"), strict=True)
    neck.load_state_dict(part(weights, "img_neck"), strict=True)
    with torch.no_grad(), watched(net) as (out, taken):
        levels = neck(net(torch.from_numpy(arrays["images"])))
    close(taken["layer1"][0], arrays["stem"], "stem")
    for i in range(1, 5):
        close(out[f"layer{i}"], arrays[f"layer{i}"], f"layer{i}")
    for i, level in enumerate(levels):
        close(level, arrays[f"neck.{i}"], f"neck.{i}")
