"""Mixed precision: which layers go into INT8 and FP16, what each costs, and what really ran."""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, cast

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.compress import compress, history, replay
from core.export import ParityError, export
from core.export import artifact as artifacts
from core.export.choices import Choice
from core.export.parity import Criterion, Reference, choices_agree
from core.kit import Context, Graph, InputError, Recipe, Step
from core.quantization import (
    Half,
    MixedPrecision,
    Plan,
    Quantize,
    Quantizer,
    choose_precisions,
    half_errors,
    half_layers,
    precision_errors,
    quant_layers,
    sensitivity_rows,
)
from core.quantization.ptq import CalibrationInputs
from core.weights import load_weights
from tests.core.toy import ToyKit


class Net(nn.Module):
    """A residual CNN and a head of linear layers with attention, in one graph of two inputs and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleList(
            (nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 16, 3, 1, 1))
        )
        self.head = nn.ModuleDict(
            {
                "first": nn.Linear(16, 32),
                "norm": nn.LayerNorm(32),
                "attn": nn.MultiheadAttention(32, 4, batch_first=True),
                "last": nn.Linear(32, 5),
            }
        )

    def forward(self, images: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 3, 16, 16), memory (B, 64, 32) -> scores (B, 64, 5), the new memory."""
        x = F.relu(self.backbone[0](images))
        x = F.relu(self.backbone[2](F.relu(self.backbone[1](x))) + x)
        tokens = self.head["norm"](self.head["first"](x.flatten(2).transpose(1, 2)) + memory)
        placed = tokens + memory
        seen, _ = self.head["attn"](placed, placed, tokens, need_weights=False)
        return self.head["last"](tokens + seen), tokens


def inputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return torch.rand(1, 3, 16, 16, generator=draws), torch.randn(1, 64, 32, generator=draws)


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


class StreamKit(ToyKit):
    """Samples are seeds of images; the memory of one is an input of the next."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def dataset(self, data: Path | None, split: str, preset: str = "full") -> Sequence[Any]:
        return list(range(6))

    def stream(self, samples: Sequence[Any], count: int, seed: int) -> Generator[tuple[Tensor, ...], Any, None]:
        memory = torch.zeros(1, 64, 32)
        for sample in samples[:count]:
            output = yield inputs(sample)[0], memory
            self.sent.append(output)
            memory = output[1]

    def exports(self) -> tuple[Graph, ...]:
        return (Graph("net", dict(zip(("images", "memory"), inputs(), strict=True)), ("scores", "tokens")),)


CNN = Quantize(layers=("backbone.*",), samples=3, reduce_range=True)
MIX = Recipe("mix", (CNN, Half(layers=("head.*",), keep=("head.last",))), "", "")


def test_a_step_quantizes_only_the_layers_it_names() -> None:
    small, trace = compress(net(), Recipe("r", (CNN,), "", ""), StreamKit())
    assert sorted(quant_layers(small)) == ["backbone.0", "backbone.1", "backbone.2"]
    reasons = {s.layer: s.why for s in trace[0].skipped}
    assert reasons["head.last"] == "stays as it is: not among the layers of the step ('backbone.*')"
    assert Step.from_json(CNN.to_json()) == CNN
    with pytest.raises(InputError, match="layers: pattern 'neck"):
        compress(net(), Recipe("r", (Quantize(layers=("neck.*",)),), "", ""), StreamKit())


def test_calibration_follows_the_stream_of_a_kit_with_memory() -> None:
    """The ranges are those of a run in which every memory comes from the frame before."""
    kit, model = StreamKit(), net()
    small, _ = compress(model, Recipe("r", (Quantize(layers=("head.*",), samples=4),), "", ""), kit)
    read: list[Tensor] = []
    handle = model.get_submodule("head.last").register_forward_pre_hook(lambda m, args: read.append(args[0]))
    memory = torch.zeros(1, 64, 32)
    with torch.no_grad():
        for sample in range(4):
            _, memory = model(inputs(sample)[0], memory)
    handle.remove()
    seen = small.get_submodule("head.last").input_quantizer
    assert isinstance(seen, Quantizer) and len(kit.sent) >= 4
    everything = torch.cat(read)
    assert float(seen.scale) == pytest.approx(float(everything.max() - everything.min()) / 255, rel=1e-4)


def test_a_stream_whose_inputs_are_not_run_is_an_error() -> None:
    batches = CalibrationInputs(Context(StreamKit(), net()), 3, net())
    with pytest.raises(RuntimeError, match="was not run"):
        list(batches)


def test_half_rounds_weights_and_outputs_and_is_restored(tmp_path: Path) -> None:
    model = net()
    small, trace = compress(model, MIX, StreamKit(), folder=tmp_path)
    assert half_layers(small) == ["head.first", "head.norm", "head.attn", "head.attn.out_proj"]
    first = small.get_submodule("head.first")
    assert isinstance(first, nn.Linear)
    original = model.get_submodule("head.first")
    assert isinstance(original, nn.Linear) and torch.equal(first.weight, original.weight.half().float())
    x = torch.randn(7, 16)
    wanted = F.linear(x, first.weight, first.bias)
    assert torch.equal(first(x), wanted.half().float()) and not torch.equal(first(x), wanted)
    assert not torch.equal(original(x), first(x))
    assert [s.layer for s in trace[1].skipped] == ["head.last"]
    again = replay(net(), history(tmp_path))
    load_weights(again, sorted(tmp_path.glob("01-*"))[0] / "model.safetensors")
    assert half_layers(again) == half_layers(small)
    for a, b in zip(again.eval()(*inputs()), small(*inputs()), strict=True):
        assert torch.equal(a, b)


def test_half_refuses_what_does_not_fit() -> None:
    model = net()
    last = model.get_submodule("head.last")
    assert isinstance(last, nn.Linear)
    nn.init.constant_(last.bias, 7e4)
    _, trace = compress(model, Recipe("r", (Half(layers=("head.last",)),), "", ""), StreamKit())
    assert trace[0].skipped[0].why == "stays as it is: a weight of 7e+04 does not fit into FP16"
    with pytest.raises(InputError, match="layers: pattern 'tail"):
        compress(model, Recipe("r", (Half(layers=("tail.*",)),), "", ""), StreamKit())


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_audit_tells_what_was_asked_stored_and_run(tmp_path: Path, runtime: str) -> None:
    model = net()
    recipe = Recipe("r", (Quantize(layers=("backbone.*",), samples=3, reduce_range=True, quantize_outputs=True),
                          *MIX.steps[1:]), "", "")  # fmt: skip
    small, _ = compress(model, recipe, StreamKit())
    graphs = StreamKit().exports()
    artifact = export({"fp32": model, "mixed": small}, graphs, "this-host", tmp_path / "a", kit="toy",
                      runtimes=[runtime])  # fmt: skip
    audit = artifact.variant(f"mixed-{runtime}").audit
    rows = {row["layer"]: row for row in audit["layers"]}
    # ONNX Runtime does not fuse a convolution whose activation a float sum reads too
    floats = ["backbone.0"] if runtime == "onnxruntime" else []
    assert [n for n in rows if rows[n]["asked"] == "INT8" and rows[n]["ran"] == "FP32"] == floats
    for layer in {"backbone.0", "backbone.1", "backbone.2"} - set(floats):
        assert (rows[layer]["asked"], rows[layer]["stored"], rows[layer]["ran"]) == ("INT8", "INT8", "INT8"), layer
    for layer in ("head.first", "head.attn", "head.attn.out_proj"):
        assert (rows[layer]["asked"], rows[layer]["stored"], rows[layer]["ran"]) == ("FP16", "FP16", "FP32"), layer
    assert (rows["head.last"]["asked"], rows["head.last"]["stored"]) == ("FP32", "FP32")
    assert len([r for r in audit["layers"] if r["layer"] == "head.attn"]) == 3
    assert audit["weighted"] == {"INT8": 3 - len(floats), "FP32": 6 + len(floats)}
    warned = [(w["layer"], w["why"].split(",")[0]) for w in audit["warnings"]]
    assert warned == [*((name, "should be INT8") for name in floats), ("", "3 layers should be FP16")]
    fp32 = artifact.variant(f"fp32-{runtime}").audit
    assert {r["asked"] for r in fp32["layers"]} == {"FP32"} and fp32["warnings"] == []
    found = artifact.as_module(f"mixed-{runtime}", threads=1)(*inputs(5))
    for a, b in zip(found, small(*inputs(5)), strict=True):
        assert float((a - b.detach()).abs().max()) < 0.05 * float(b.detach().abs().max())
    assert artifact.size_bytes(f"mixed-{runtime}") < artifact.size_bytes(f"fp32-{runtime}")


def test_halved_weights_take_two_bytes(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    small, _ = compress(model, Recipe("r", (Half(layers=("0",)),), "", ""), ToyKit())
    artifact = export({"mixed": small}, [Graph("net", {"x": torch.rand(2, 64)}, ("y",))], "this-host", tmp_path / "a",
                      kit="toy", runtimes=["onnxruntime"])  # fmt: skip
    file = onnx.load(artifact.folder / artifact.variant().files["net"])
    bytes_of = {t.name: len(t.raw_data) for t in file.graph.initializer}
    assert bytes_of["0.weight_fp16"] == 64 * 64 * 2 and bytes_of["2.weight"] == 64 * 64 * 4


class Best(nn.Module):
    """The boxes of the ten best cells."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.score, self.box = nn.Conv2d(3, 8, 3, 1, 1), nn.Linear(8, 1), nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        """images (1, 3, 8, 8) -> boxes (1, 10, 4)."""
        found = self.conv(images).flatten(2).transpose(1, 2)
        best = self.score(found).squeeze(-1).topk(10, -1).indices
        return cast(Tensor, self.box(found.gather(1, best[..., None].expand(-1, -1, 8))))


def test_parity_gives_torch_the_choice_of_the_runtime(tmp_path: Path) -> None:
    """Places among equal scores may differ; the scores themselves and all else may not."""
    torch.manual_seed(0)
    model = Best().eval()
    graph = Graph("best", {"images": torch.rand(1, 3, 8, 8)}, ("boxes",))
    reference = Reference.of(model, tuple(graph.inputs.values()))
    values, places = reference.chosen[0]
    other = places.flip(-1)
    assert torch.equal(Reference.of(model, tuple(graph.inputs.values()), [other]).outputs[0],
                       reference.outputs[0].flip(1))  # fmt: skip
    loose = Criterion.of("int8", None)
    record = choices_agree("v", "g", reference, [Choice("score", values + 1e-4, other)], loose)
    assert record[0]["moved"] == 10 and record[0]["of"] == 10
    with pytest.raises(ParityError, match="the best scores in score disagree"):
        choices_agree("v", "g", reference, [Choice("score", values + 1, places)], loose)
    small, _ = compress(model, Recipe("r", (Half(layers=("box",)),), "", ""), ToyKit())
    artifact = export({"fp32": model, "mixed": small}, (graph,), "this-host", tmp_path / "a", kit="toy",
                      runtimes=["onnxruntime"])  # fmt: skip
    told = {n: v.parity["graphs"]["best"]["choices"] for n, v in artifact.variants.items()}
    assert told["fp32-onnxruntime"] == [] and told["mixed-onnxruntime"][0]["moved"] == 0


@pytest.mark.parametrize(("runtime", "suffix"), [("onnxruntime", ".onnx"), ("openvino", ".xml")])
def test_choices_are_told_by_a_file_of_the_kind_that_ships(
    runtime: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO rounds otherwise in an ONNX file than in its IR, and so may choose otherwise."""
    torch.manual_seed(0)
    graph = Graph("best", {"images": torch.rand(1, 3, 8, 8)}, ("boxes",))
    small, _ = compress(Best().eval(), Recipe("r", (Half(layers=("box",)),), "", ""), ToyKit())
    told: list[Path] = []
    real = artifacts.load_module

    def noted(runtime: str, path: Path, *rest: Any, **more: Any) -> Any:
        told.append(path)
        return real(runtime, path, *rest, **more)

    monkeypatch.setattr(artifacts, "load_module", noted)
    made = export({"mixed": small}, (graph,), "this-host", tmp_path / "a", kit="toy", runtimes=[runtime])
    assert [path.suffix for path in told if path.stem == "choices"] == [suffix]
    assert made.variants[f"mixed-{runtime}"].parity["graphs"]["best"]["choices"][0]["of"] == 10
    assert not list((tmp_path / "a").rglob("choices*"))


def test_a_file_with_other_rows_than_its_choices_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That a runtime chooses for itself is no leave to put out something else."""
    torch.manual_seed(0)
    graph = Graph("best", {"images": torch.rand(1, 3, 8, 8)}, ("boxes",))
    small, _ = compress(Best().eval(), Recipe("r", (Half(layers=("box",)),), "", ""), ToyKit())
    exporting = sys.modules["core.export"]
    real = exporting.load_module

    def wrong(*given: Any, **more: Any) -> Any:
        run = real(*given, **more)
        return lambda *inputs: tuple(t.flip(1) for t in run(*inputs))

    monkeypatch.setattr(exporting, "load_module", wrong)
    with pytest.raises(ParityError, match="'boxes' disagrees"):
        export({"mixed": small}, (graph,), "this-host", tmp_path / "a", kit="toy", runtimes=["onnxruntime"])


def test_errors_are_those_of_each_layer_alone() -> None:
    """The FP16 error equals one computed by hand; INT8 with 2 bits costs more than with 8."""
    model = net()
    batches = [inputs(1), inputs(2)]
    errors = precision_errors(model, batches, Plan(layers=("backbone.*",)), ["head.first"])
    assert set(errors) == {"backbone.0", "backbone.1", "backbone.2", "head.first"}
    assert set(errors["head.first"]) == {"fp16"} and set(errors["backbone.1"]) == {"int8", "fp16"}
    with torch.no_grad():
        wanted = [model(*b) for b in batches]
        layer = model.head["first"]
        weight, bias = layer.weight.data, layer.bias.data
        layer.weight.data, layer.bias.data = weight.half().float(), bias.half().float()
        handle = layer.register_forward_hook(lambda m, args, y: y.half().float())
        found = [model(*b) for b in batches]
        handle.remove()
        layer.weight.data, layer.bias.data = weight, bias
    for output in range(2):
        noise = sum(float((f[output] - w[output]).double().square().sum()) for f, w in zip(found, wanted, strict=True))
        signal = sum(float(w[output].double().square().sum()) for w in wanted)
        assert errors["head.first"]["fp16"][output] == pytest.approx(noise / signal, rel=1e-6)
    assert errors["backbone.1"]["int8"][0] > 10 * errors["backbone.1"]["fp16"][0] > 0
    coarse = precision_errors(model, batches, Plan(layers=("backbone.*",), weight_bits=2), [])
    assert all(coarse[n]["int8"][0] > errors[n]["int8"][0] for n in coarse)
    assert half_layers(model) == [] and not quant_layers(model)


def test_the_budget_raises_the_costliest_layer_first() -> None:
    errors = {"a": {"int8": [0.3, 0.1], "fp16": [0.01, 0.01]}, "b": {"int8": [0.02, 0.02], "fp16": [0.0, 0.0]},
              "c": {"fp16": [0.05, 0.05]}}  # fmt: skip
    assert choose_precisions(errors, 1.0) == {"a": "int8", "b": "int8", "c": "fp16"}
    assert choose_precisions(errors, 0.09) == {"a": "fp16", "b": "int8", "c": "fp16"}
    assert choose_precisions(errors, 0.03) == {"a": "fp16", "b": "int8", "c": "fp32"}
    assert choose_precisions(errors, 0.0) == {"a": "fp32", "b": "fp16", "c": "fp32"}
    # a layer with most of the multiplications is raised last
    assert choose_precisions(errors, 0.25, {"a": 1e6, "b": 1.0, "c": 1.0})["a"] == "int8"
    rows = sensitivity_rows(errors, choose_precisions(errors, 0.09), ("scores", "boxes"))
    assert rows[0] == {"layer": "a", "what": "sensitivity: FP16 chosen", "int8_error": 0.2, "fp16_error": 0.01,
                       "int8_by_output": {"scores": 0.3, "boxes": 0.1},
                       "fp16_by_output": {"scores": 0.01, "boxes": 0.01}}  # fmt: skip


def test_mixed_precision_chooses_and_is_restored(tmp_path: Path) -> None:
    step = MixedPrecision(layers=("backbone.*",), half=("head.*",), budget=1.0, probes=2, samples=3, reduce_range=True)
    small, trace = compress(net(), Recipe("m", (step,), "", ""), StreamKit(), folder=tmp_path)
    assert sorted(quant_layers(small)) == ["backbone.0", "backbone.1", "backbone.2"]
    assert half_layers(small) == ["head.first", "head.norm", "head.attn", "head.attn.out_proj", "head.last"]
    assert trace[0].changed[0]["what"] == "sensitivity: 3 layers in INT8, 5 layers in FP16, 0 layers in FP32"
    again = replay(net(), history(tmp_path))
    load_weights(again, tmp_path / "00-mixedprecision" / "model.safetensors")
    for a, b in zip(again.eval()(*inputs()), small(*inputs()), strict=True):
        assert torch.equal(a, b)
    none, trace = compress(net(), Recipe("m", (MixedPrecision(layers=("backbone.*",), half=("head.*",), budget=0.0,
                           probes=2, samples=3),), "", ""), StreamKit())  # fmt: skip
    assert not quant_layers(none) and {s.why for s in trace[0].skipped} == {"stays in FP32: chosen under the budget"}


def test_a_short_trial_puts_the_head_into_fp16_at_once_where_that_costs_little() -> None:
    shared = {"layers": ("backbone.*",), "half": ("head.*",), "probes": 2, "samples": 3}
    recipe = Recipe("m", (MixedPrecision(**shared, budget=1.0),), "", "")
    small, trace = compress(net(), recipe, StreamKit(), preset="smoke")
    assert half_layers(small) == ["head.first", "head.norm", "head.attn", "head.attn.out_proj", "head.last"]
    assert sorted(quant_layers(small)) == ["backbone.0", "backbone.1", "backbone.2"]
    total, at_once = trace[0].changed[:2]
    assert at_once["what"].startswith("sensitivity: 5 layers tried in FP16 all at once")
    ones = [row for row in trace[0].changed if "int8_by_output" in row]
    assert total["summed_error"] == pytest.approx(at_once["fp16_error"] + sum(row["int8_error"] for row in ones))
    names = ["head.first", "head.last"]
    both = half_errors(net(), [inputs(1)], names)
    alone = precision_errors(net(), [inputs(1)], Plan(layers=("backbone.*",)), names)
    assert both[0] > 0 and all(both[0] != alone[name]["fp16"][0] for name in names), (both, alone)
    # a budget that this would break is shared out layer by layer
    tight = Recipe("m", (MixedPrecision(**shared, budget=5 * at_once["fp16_error"]),), "", "")
    _, trace = compress(net(), tight, StreamKit(), preset="smoke")
    assert not any("at once" in str(row["what"]) for row in trace[0].changed)
    assert trace[0].changed[0]["summed_error"] <= 5 * at_once["fp16_error"]


def test_outputs_that_say_nothing_are_listed_and_not_counted() -> None:
    shared = {"layers": ("backbone.*",), "half": ("head.*",), "probes": 2, "samples": 3}
    name, other = StreamKit().exports()[0].outputs[:2]
    _, trace = compress(
        net(), Recipe("m", (MixedPrecision(**shared, budget=1.0, judged=(name,)),), "", ""), StreamKit()
    )
    whole = trace[0].changed[0]["summed_error"]
    rows = [row for row in trace[0].changed if "int8_by_output" in row]
    assert rows and all(set(row["int8_by_output"]) >= {name, other} for row in rows)
    rest = [row for row in trace[0].changed if "fp16_by_output" in row and "int8_by_output" not in row]
    wanted = sum(row["int8_by_output"][name] for row in rows) + sum(row["fp16_by_output"][name] for row in rest)
    assert whole == pytest.approx(wanted)
    with pytest.raises(InputError, match="no output 'depth'"):
        compress(net(), Recipe("m", (MixedPrecision(**shared, judged=("depth",)),), "", ""), StreamKit())
