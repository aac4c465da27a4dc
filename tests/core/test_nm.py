"""N:M sparsity: exact masks, the step, what later steps and the exported file keep of it, and its share counted."""

from __future__ import annotations

import dataclasses
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.compress import compress, history, replay
from core.export.onnx import save_onnx, to_onnx
from core.export.sparsity import describe, sparse_in_onnx
from core.hardware import target
from core.kit import Graph, InputError, Recipe, Step
from core.pruning import Sparsify, check_pattern, nm_mask, sparse_speedup, sparse_utilization
from core.pruning.cost import count_macs
from core.pruning.nm import Product, Utilization
from core.quantization import quant_layers
from core.quantization.onnx_weights import pack_weights
from core.weights import load_weights
from tests.core import prunable
from tests.core.toy import PTQ, Toy, ToyKit

KIT = ToyKit()


def recipe(*steps: Step) -> Recipe:
    return Recipe("r", steps, "", "")


def by_hand(weight: Tensor, n: int, m: int) -> Tensor:
    """The best n of every m input channels by trying all choices, one place at a time."""
    mask = torch.zeros_like(weight, dtype=torch.bool)
    flat = weight.reshape(*weight.shape[:2], -1)
    for o in range(flat.shape[0]):
        for place in range(flat.shape[2]):
            for start in range(0, flat.shape[1], m):
                sums = {c: sum(abs(flat[o, start + i, place].item()) for i in c) for c in combinations(range(m), n)}
                for i in max(sums, key=sums.__getitem__):
                    mask.reshape(flat.shape)[o, start + i, place] = True
    return mask


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (3, 8)])
@pytest.mark.parametrize("shape", [(3, 16), (2, 8, 3, 3)])
def test_mask_keeps_the_largest_along_the_input_channels(shape: tuple[int, ...], n: int, m: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    mask = nm_mask(weight, n, m)
    assert torch.equal(mask, by_hand(weight, n, m))
    assert mask.float().mean().item() == pytest.approx(n / m)
    assert check_pattern(weight * mask, n, m)
    assert not check_pattern(weight, n, m)


def test_ties_still_keep_exactly_n() -> None:
    assert nm_mask(torch.ones(2, 8), 2, 4).tolist() == [[True, True, False, False] * 2] * 2
    assert nm_mask(torch.zeros(1, 4), 2, 4).sum() == 2


def test_pattern_is_of_input_channels_and_of_nothing_else() -> None:
    weight = torch.zeros(4, 4, 2, 2)
    weight[:2] = 1  # every block of outputs is half empty, the inputs of the first outputs are full
    assert not check_pattern(weight, 2, 4)
    assert check_pattern(weight.transpose(0, 1), 2, 4)
    weight = torch.ones(1, 4, 1, 1)
    weight[0, 3] = weight[0, 1] = 0
    assert check_pattern(weight, 2, 4)
    weight[0, 1] = 1e-30  # not a zero
    assert not check_pattern(weight, 2, 4)
    assert not check_pattern(torch.zeros(4, 6), 2, 4)
    assert not check_pattern(torch.zeros(4), 2, 4)
    with pytest.raises(InputError, match="no multiple of 4"):
        nm_mask(torch.zeros(4, 6), 2, 4)


def test_step_takes_every_layer_it_can_and_says_why_not_the_others() -> None:
    kit = prunable.Toy("concat")
    original = kit.model()
    small, (entry,) = compress(original, recipe(Sparsify(skip=("squeeze",))), kit)
    why = {s.layer: s.why for s in entry.skipped}
    assert why == {
        "left.0": "3 input channels: not a multiple of 4",
        "right.0": "3 input channels: not a multiple of 4",
        "depthwise.0": "depthwise: each sum runs over one input channel",
        "squeeze": "excluded by the pattern 'squeeze'",
    }
    assert [c["layer"] for c in entry.changed] == ["point.0", "excite", "fc"]
    for line in entry.changed:
        before, after = original.get_submodule(line["layer"]).weight, small.get_submodule(line["layer"]).weight
        assert check_pattern(after, 2, 4) and not check_pattern(before, 2, 4)  # type: ignore[arg-type]
        assert torch.equal(after, before * (after != 0))  # type: ignore[operator]
        share = after.abs().sum() / before.abs().sum()  # type: ignore[operator, union-attr]
        assert line["kept_magnitude"] == pytest.approx(share.item(), abs=1e-5)
        assert 0.5 < line["kept_magnitude"] < 1
    assert type(small.get_submodule("fc")) is nn.Linear
    _, (entry,) = compress(original, recipe(Sparsify(layers=("fc", "excite"))), kit)
    assert [c["layer"] for c in entry.changed] == ["excite", "fc"]
    assert {s.why for s in entry.skipped} == {"not among the patterns of layers"}


def test_attention_s_projections_are_taken_too() -> None:
    kit = prunable.Toy("transformer")
    small, (entry,) = compress(kit.model(), recipe(Sparsify()), kit)
    taken = {c["layer"] for c in entry.changed}
    assert {"attention.in_proj_weight", "attention.out_proj", "up", "down", "head", "embed"} == taken
    assert not entry.skipped
    x = torch.randn(2, 6, 12)
    found = sparse_utilization(small, (x,))
    # tokens x (embed 12*64, projections 4*64*64, MLP 2*64*128, head 64*3) and two products of 6 x 6 tokens over 64
    weights = 12 * (12 * 64 + 4 * 64 * 64 + 2 * 64 * 128 + 64 * 3)
    assert found.macs == weights + 2 * 2 * 6 * 6 * 64 == count_macs(small, (x,))
    assert found.share == weights / found.macs
    assert {p.weight for p in found.products if p.sparse} == {
        f"{name}.weight" for name in ("embed", "up", "down", "head", "attention.out_proj")
    } | {"attention.in_proj_weight"}
    assert sparse_utilization(kit.model(), (x,)).share == 0


class Sampling(nn.Module):
    """Two convolutions with sampling between, and a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.first(x))
        grid = x[:, :2].permute(0, 2, 3, 1).tanh()
        return self.second(F.grid_sample(x, grid, align_corners=False))


def test_share_is_exact_and_sampling_is_said_to_be_left_out() -> None:
    torch.manual_seed(0)
    model, x = Sampling().eval(), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        model.second.weight *= nm_mask(model.second.weight, 2, 4)
    found = sparse_utilization(model, (Graph("net", {"x": x}, ("y",)),))
    first, second, depthwise = 64 * 3 * 8 * 9, 64 * 8 * 8, 64 * 8 * 9
    assert found.macs == first + second + depthwise
    assert found.share == second / found.macs
    assert found.left_out == 1
    assert sparse_utilization(model, (x,), 1, 4).share == 0
    with pytest.raises(InputError, match="neither inputs nor graphs"):
        sparse_utilization(model, ())


def test_products_of_constants_count_as_activations() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = nn.Embedding(4, 8), nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.key(self.query.weight) @ x  # [4, 8] by [8, 5]

    found = sparse_utilization(Constant(), (torch.randn(8, 5),))
    assert {(p.weight, p.macs) for p in found.products} == {("key.weight", 4 * 8 * 8), ("", 4 * 8 * 5)}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"n": 4}, "Sparsify.n: 4 of m 4"),
        ({"n": 0}, "Sparsify.n: 0"),
        ({"importance": "luck"}, "Sparsify.importance: 'luck'"),
        ({"epochs": -1}, "Sparsify.epochs: -1"),
        ({"lr": 0.0}, "Sparsify.lr: 0.0"),
        ({"batch_size": 0}, "Sparsify.batch_size: 0"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        Sparsify(**fields)


def test_bad_patterns_are_named() -> None:
    with pytest.raises(InputError, match=r"Sparsify.skip: 'neck' matches no layer; named like 'head.1'"):
        compress(KIT.model(), recipe(Sparsify(skip=("neck",))), KIT)
    with pytest.raises(InputError, match=r"no layer of toy can take 2:4; first reason: encoder.0: .*not a multiple"):
        compress(KIT.model(), recipe(Sparsify(layers=("encoder.0",))), KIT)


def test_step_is_plain_json() -> None:
    step = Sparsify(1, 4, layers=("a", "b"), epochs=2)
    assert Step.from_json(step.to_json()) == step
    assert dataclasses.replace(step, layers=("*",)) != step


def test_training_recovers_under_the_mask_and_resumes_to_the_same(tmp_path: Path) -> None:
    original = KIT.model()
    bare, _ = compress(original, recipe(Sparsify(1, 4)), KIT)
    steps = recipe(Sparsify(1, 4, epochs=6, lr=0.01, batch_size=16))
    trained, (entry,) = compress(original, steps, KIT, folder=tmp_path / "c")
    (batch,) = KIT.batches(KIT.dataset(None, "train"), 64, train=False)
    with torch.no_grad():
        losses = [KIT.loss(m, batch).item() for m in (bare, trained)]
    assert losses[1] < 0.8 * losses[0]
    assert "under the fixed masks" in entry.changed[-1]["what"] and len(entry.changed[-1]["losses"]) == 6
    for name in ("encoder.3", "head.1"):
        weight, masked = trained.get_submodule(name).weight, bare.get_submodule(name).weight
        assert check_pattern(weight, 1, 4)  # type: ignore[arg-type]
        assert torch.equal(weight != 0, masked != 0)  # the very mask that was chosen at first
        assert not torch.equal(weight, masked)  # type: ignore[arg-type]
    assert type(trained.get_submodule("head.1")) is nn.Linear
    assert set(trained.state_dict()) == set(original.state_dict())
    again = replay(KIT.model(), history(tmp_path / "c"))
    load_weights(again, tmp_path / "c" / "00-sparsify" / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), trained.state_dict().values()))


def test_quantization_and_the_exported_int8_file_keep_the_pattern(tmp_path: Path) -> None:
    small, _ = compress(KIT.model(), recipe(Sparsify(), PTQ), KIT)
    layers = quant_layers(small)
    for name in ("encoder.3", "head.1"):
        seen = layers[name].weight_quantizer(layers[name].weight)
        assert check_pattern(layers[name].weight, 2, 4) and check_pattern(seen, 2, 4)
    (graph,) = KIT.exports()
    found = sparse_utilization(small, (graph,))
    assert {p.weight for p in found.products if p.sparse} == {"encoder.3.weight", "head.1.weight"}
    model = to_onnx(small, graph)
    pack_weights(model)
    save_onnx(model, tmp_path / "int8.onnx")
    in_file = sparse_in_onnx(tmp_path / "int8.onnx")
    assert in_file.macs == found.macs == count_macs(Toy(), tuple(graph.inputs.values()))
    assert in_file.share == found.share > 0
    assert sorted(in_file.initializers.values()) == [False, True, True]


def test_exported_file_is_read_node_by_node(tmp_path: Path) -> None:
    kit = prunable.Toy("transformer")
    graph = Graph("net", {"x": torch.randn(2, 6, 12)}, ("y",))
    small, _ = compress(kit.model(), recipe(Sparsify(skip=("up",))), kit)
    for model, name in ((kit.model(), "dense"), (small, "sparse")):
        save_onnx(to_onnx(model, graph), tmp_path / f"{name}.onnx")
    dense, sparse = (sparse_in_onnx(tmp_path / f"{name}.onnx") for name in ("dense", "sparse"))
    assert dense.share == 0 and not any(dense.initializers.values())
    assert sparse.macs == dense.macs == count_macs(small, tuple(graph.inputs.values()))
    assert sparse.share == sparse_utilization(small, (graph,)).share > 0.7
    assert sum(not holds for holds in sparse.initializers.values()) == 1
    assert f"{sparse.share:.1%} of {sparse.macs:,}" in describe(sparse)[0]
    # one weight set to a number in a full block: the file is no longer what it was
    import onnx
    from onnx import numpy_helper

    model = onnx.load(tmp_path / "sparse.onnx")
    held = next(name for name, holds in sparse.initializers.items() if holds)
    tensor = next(t for t in model.graph.initializer if t.name == held)
    array = numpy_helper.to_array(tensor).copy()
    array[array == 0] = 1e-3
    tensor.CopyFrom(numpy_helper.from_array(array, held))
    onnx.save(model, tmp_path / "broken.onnx")
    assert sparse_in_onnx(tmp_path / "broken.onnx").initializers[held] is False


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.onnx: no such file"):
        sparse_in_onnx(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(InputError, match=r"text.onnx: not an ONNX model"):
        sparse_in_onnx(tmp_path / "text.onnx")
    graph = Graph("net", {"x": torch.rand(2, 1, 16, 16)}, ("y",), dynamic={"x": {0: "batch"}})
    save_onnx(to_onnx(Toy().eval(), graph), tmp_path / "free.onnx")
    with pytest.raises(InputError, match="fixed shapes"):
        sparse_in_onnx(tmp_path / "free.onnx")


def test_speedup_is_an_estimate_and_one_where_the_target_skips_no_zeros() -> None:
    found = Utilization(2, 4, (Product("a", "mm", 80, True), Product("", "bmm", 20, False)), 0)
    orin = sparse_speedup(found, target("jetson-orin"))
    assert orin.value == pytest.approx(1 / (0.2 + 0.8 / 2)) and orin.basis.kind == "estimated"
    assert sparse_speedup(found, target("mdc-810")).value == 1
    assert str(orin).startswith("~")
    other = dataclasses.replace(found, n=1)
    assert sparse_speedup(other, target("jetson-orin")).value == 1
