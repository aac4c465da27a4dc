"""Exports that agree with torch, audits that tell the truth, artifacts that cannot be tampered with."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from core.export import Artifact, ParityError, export
from core.export import audit as audit_module
from core.export import onnx as onnx_module
from core.export import openvino as openvino_module
from core.export.artifact import companions, load_module, need_room, replacing
from core.export.audit import audit_file, without_vnni
from core.export.layers import Layers
from core.export.openvino import takes_bytes
from core.export.parity import Criterion, Reference, check, compare_layers, deviation
from core.kit import Graph, InputError
from core.quantization.prepare import Plan, calibrate, prepare

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
NARROW = Plan(reduce_range=True, quantize_outputs=True)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x))) + x


class Net(nn.Module):
    """A convolution, two residual blocks, one activation called twice, a linear head: two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.gate = nn.SiLU()
        self.first, self.second = Block(), Block()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.second(self.first(self.gate(self.stem(x))))
        maps = self.gate(x)
        return self.head(maps.mean((2, 3))), maps


WEIGHTED = ["stem", "first.conv", "second.conv", "head"]
GRAPH = Graph("main", {"x": X}, ("scores", "maps"), "", {"x": {0: "batch"}})


def make_net() -> Net:
    torch.manual_seed(0)
    net = Net().eval()
    for norm in (net.first.norm, net.second.norm):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return net


def make_quantized(net: nn.Module, plan: Plan) -> nn.Module:
    small = prepare(copy.deepcopy(net), plan, (X,))
    calibrate(small, [(X,)], "minmax")
    return small.eval()


@pytest.fixture(scope="module")
def net() -> Net:
    return make_net()


@pytest.fixture(scope="module")
def artifact(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    models = {"fp32": net, "int8": make_quantized(net, NARROW)}
    out = tmp_path_factory.mktemp("export") / "artifact"
    return export(models, [GRAPH], "this-host", out, kit="demo", meta={"threshold": 0.25})


@pytest.fixture
def own(artifact: Artifact, tmp_path: Path) -> Path:
    """A copy of the artifact that a test may damage."""
    return Path(shutil.copytree(artifact.folder, tmp_path / "artifact"))


def edit(folder: Path, change: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("batch", [1, 3])
def test_fp32_equals_torch_at_any_batch(artifact: Artifact, net: Net, runtime: str, batch: int) -> None:
    x = torch.randn(batch, 3, 16, 16)
    found = artifact.as_module(f"fp32-{runtime}", threads=1)(x)
    with torch.no_grad():
        wanted = net(x)
    assert isinstance(found, tuple) and len(found) == 2
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(b, a, atol=1e-4, rtol=1e-4)


def test_openvino_takes_bytes_for_their_values_over_255(artifact: Artifact) -> None:
    module = artifact.as_module("fp32-openvino", threads=1)
    assert takes_bytes(module) and not takes_bytes(artifact.as_module("fp32-onnxruntime", threads=1))
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    for given, wanted in zip(module(pixels), module(pixels.float() / 255), strict=True):
        torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-5)
    assert float((module(pixels)[0] - module(pixels.float())[0]).abs().max()) > 1, "and floats for themselves"


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_outputs_stay_valid_after_the_next_run(artifact: Artifact, runtime: str) -> None:
    module = artifact.as_module(f"fp32-{runtime}", threads=1)
    first = module(X)[1]
    kept = first.clone()
    module(-X)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_audit_of_fp32_is_fp32(artifact: Artifact, runtime: str) -> None:
    found = artifact.variant(f"fp32-{runtime}").audit
    assert found["weighted"] == {"FP32": 4}
    assert {o["precision"] for o in found["operators"]} <= {"FP32", "conversion"}
    assert found["warnings"] == []
    assert set(WEIGHTED) <= {o["layer"] for o in found["operators"]}


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_audit_of_int8_is_int8(artifact: Artifact, runtime: str) -> None:
    found = artifact.variant(f"int8-{runtime}").audit
    names = {"QLinearConv", "QGemm", "Convolution", "FullyConnected"}
    layers = {o["layer"]: o["precision"] for o in found["operators"] if o["operator"] in names}
    assert layers == dict.fromkeys(WEIGHTED, "INT8"), found["operators"]
    assert found["weighted"] == {"INT8": 4}
    assert found["warnings"] == []


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_int8_agrees_with_torch_simulation(artifact: Artifact, runtime: str) -> None:
    parity = artifact.variant(f"int8-{runtime}").parity
    assert parity["criterion"] == "SQNR >= 25 dB"
    outputs = parity["graphs"]["main"]["outputs"]
    assert all(o["sqnr"] >= 25 for o in outputs.values()) and set(outputs) == {"scores", "maps"}
    assert len(parity["graphs"]["main"]["layers"]) >= 6


def test_int8_weights_are_stored_as_bytes(artifact: Artifact) -> None:
    model = onnx.load(artifact.folder / "int8/main.onnx")
    assert sum(t.data_type == TensorProto.INT8 and len(t.dims) == 4 for t in model.graph.initializer) == 3
    assert (artifact.folder / "int8/main.bin").stat().st_size < 0.6 * (artifact.folder / "fp32/main.bin").stat().st_size


def test_manifest(artifact: Artifact) -> None:
    assert artifact.chosen == "int8-openvino"
    assert artifact.meta == {"threshold": 0.25}
    on_disk = [p.stat().st_size for p in artifact.folder.glob("fp32/main.[xb]*")]
    assert artifact.size_bytes("fp32-openvino") == sum(on_disk) and len(on_disk) == 2
    assert artifact.graphs["main"]["inputs"][0]["shape"] == ["batch", 3, 16, 16]
    notes = artifact.trace_notes()
    assert {"variant": "int8-openvino", "layer": "", "note": "layers with weights ran as: 4 INT8"} in notes
    json.dumps(notes)


def test_choose_is_kept_and_leaves_the_hash(own: Path) -> None:
    before = Artifact.open(own)
    before.choose("fp32-onnxruntime")
    again = Artifact.open(own)
    assert again.chosen == "fp32-onnxruntime"
    assert again.sha256 == before.sha256
    with pytest.raises(InputError, match="no variant 'int4'"):
        again.choose("int4")


def test_quantized_layer_that_runs_float_is_named(net: Net, tmp_path: Path) -> None:
    # without output quantizers ONNX Runtime has no integer kernel for any of these layers
    small = make_quantized(net, Plan(reduce_range=True))
    found = export({"int8": small}, [GRAPH], "this-host", tmp_path / "a", kit="demo", runtimes=["onnxruntime"])
    warnings = {w["layer"]: w["why"] for w in found.variant().audit["warnings"]}
    assert set(warnings) == set(WEIGHTED)
    assert "should be INT8, ran FP32" in warnings["first.conv"]
    assert any(n["layer"] == "first.conv" for n in found.trace_notes())


def qdq_model(peak: int) -> Any:
    """A hand-made quantized convolution whose weights reach from -peak to peak."""
    weights = torch.linspace(-peak, peak, 8 * 4 * 9).round().to(torch.int8).reshape(8, 4, 3, 3).numpy()
    initializers = [numpy_helper.from_array(weights, "conv.weight")]
    for name, value in {"xs": 0.02, "ws": 0.01, "ys": 1.0}.items():
        initializers.append(numpy_helper.from_array(torch.tensor(value).numpy(), name))
    initializers.append(helper.make_tensor("xz", TensorProto.UINT8, [], [128]))
    initializers.append(helper.make_tensor("wz", TensorProto.INT8, [], [0]))
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        helper.make_node("DequantizeLinear", ["conv.weight", "ws", "wz"], ["wd"]),
        helper.make_node("Conv", ["xd", "wd"], ["c"], name="node_conv", pads=[1, 1, 1, 1]),
        helper.make_node("QuantizeLinear", ["c", "ys", "xz"], ["cq"]),
        helper.make_node("DequantizeLinear", ["cq", "ys", "xz"], ["y"]),
    ]
    values = [helper.make_tensor_value_info("x", 1, [1, 4, 8, 8]), helper.make_tensor_value_info("y", 1, [1, 8, 8, 8])]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(("peak", "vnni", "warned"), [(127, False, True), (63, False, False), (127, True, False)])
def test_full_range_weights_are_warned_of_without_vnni(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str, peak: int, vnni: bool, warned: bool
) -> None:
    flags = ("avx2", "avx512_vnni") if vnni else ("avx2",)
    monkeypatch.setattr(audit_module, "processor", lambda: ("a processor", flags))
    model = qdq_model(peak)
    onnx.save(model, tmp_path / "m.onnx")
    found = audit_file(runtime, tmp_path / "m.onnx", Layers(model, ["conv"]), "g", "int8", {"conv"})
    assert found["weighted"] == {"INT8": 1}
    assert [w["layer"] for w in found["warnings"]] == (["conv"] if warned else [])
    assert all("saturates" in w["why"] for w in found["warnings"])


@pytest.mark.skipif(not without_vnni(), reason="needs an AVX2 processor without VNNI")
def test_the_saturation_warned_of_is_real() -> None:
    """All-equal weights and activations: 127 weights overflow the 16-bit sums, 63 ones do not."""
    gaps = {}
    for peak in (63, 127):
        model = qdq_model(peak)
        full = numpy_helper.to_array(model.graph.initializer[0]).copy()
        full[:] = peak
        model.graph.initializer[0].CopyFrom(numpy_helper.from_array(full, "conv.weight"))
        x = torch.full((1, 4, 8, 8), 2.54)  # 127 steps above the zero point: the largest uint8
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        found = session.run(None, {"x": x.numpy()})[0][0, 0, 4, 4]
        gaps[peak] = abs(2.54 * peak * 0.01 * 36 - found)
    assert gaps[63] <= 0.5  # half a step of the output
    assert gaps[127] > 10


def test_large_weights_go_beside_the_file(
    artifact: Artifact, net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_module, "SINGLE_FILE_BYTES", 0)
    model = onnx.load(artifact.folder / "fp32/main.onnx")
    onnx_module.save_onnx(model, tmp_path / "main.onnx")
    assert (tmp_path / "main.onnx.data").stat().st_size == 4 * 2 * 8 * 8 * 9  # two convolutions' float weights
    openvino_module.save_ir(tmp_path / "main.onnx", tmp_path / "main.xml")
    with torch.no_grad():
        wanted = net(X)[1]
    for runtime, name in (("onnxruntime", "main.onnx"), ("openvino", "main.xml")):
        found = load_module(runtime, tmp_path / name, 1, as_tuple=True)(X)[1]
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    found = audit_file("onnxruntime", tmp_path / "main.onnx", Layers(model, dict(net.named_modules())), "main", "fp32")
    assert found["weighted"] == {"FP32": 4}
    listed = dict.fromkeys(["main.onnx", "main.onnx.data", "main.xml", "main.bin", "other"])
    assert companions(listed, ["main.onnx", "main.xml"]) == ["main.onnx", "main.onnx.data", "main.xml", "main.bin"]


def test_a_layer_made_to_drift_is_named(artifact: Artifact, net: Net, tmp_path: Path) -> None:
    model = onnx.load(artifact.folder / "fp32/main.onnx")
    weight = next(t for t in model.graph.initializer if t.name == "second.conv.weight")
    weight.CopyFrom(numpy_helper.from_array(1.3 * numpy_helper.to_array(weight), weight.name))
    layers = Layers(model, dict(net.named_modules()))
    reference, criterion = Reference.of(net, (X,)), Criterion.of("fp32", None)
    for runtime in ("onnxruntime", "openvino"):
        drifts, first = compare_layers(reference, model, layers, (X,), runtime, tmp_path, criterion)
        names = [d.layer for d in drifts]
        # the batch norm is folded into the convolution, so its output is the first that exists
        assert first is not None and first.layer == "second.norm"
        assert names.index("gate") < names.index("first") < names.index("second.norm") < names.index("gate#2")
        found = [d.detach() * 1.3 for d in reference.outputs]
        with pytest.raises(ParityError, match=r"fp32-x, graph 'main': output 'scores'.*drifts is second\.norm"):
            check("fp32-x", "main", GRAPH.outputs, reference, found, (drifts, first), criterion)
    assert list(tmp_path.iterdir()) == []


def test_parity_error_keeps_the_old_artifact(
    artifact: Artifact, own: Path, net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = onnx.load(artifact.folder / "fp32/main.onnx")
    weight = next(t for t in model.graph.initializer if t.name == "stem.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) + 0.1, weight.name))
    monkeypatch.setattr(onnx_module, "to_onnx", lambda _module, _graph: model)
    with pytest.raises(ParityError, match=r"disagrees with torch.*the first layer that drifts is stem "):
        export({"fp32": net}, [GRAPH], "this-host", own, kit="demo", runtimes=["onnxruntime"])
    assert Artifact.open(own).sha256 == artifact.sha256
    assert [p.name for p in own.parent.iterdir()] == ["artifact"]


def test_sqnr_of_a_known_error() -> None:
    reference = torch.full((100,), 2.0)
    d = deviation(reference, reference + 0.02)
    assert d.sqnr == pytest.approx(40.0, abs=1e-4)  # 20 log10(2 / 0.02)
    assert d.max_abs == pytest.approx(0.02, rel=1e-4) and d.peak == 2.0
    assert deviation(reference, torch.full((100,), float("nan"))).sqnr == -200.0
    odd = torch.tensor([float("inf"), 1.0])
    assert deviation(odd, odd).sqnr == 200.0


def test_tampered_file_is_refused_by_name(own: Path) -> None:
    file = own / "fp32/main.bin"
    data = bytearray(file.read_bytes())
    data[10] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"fp32/main\.bin: its bytes differ"):
        Artifact.open(own)


def test_missing_file_is_refused_by_name(own: Path) -> None:
    (own / "int8/main.onnx").unlink()
    with pytest.raises(InputError, match=r"int8/main\.onnx: missing"):
        Artifact.open(own)


@pytest.mark.parametrize("path", ["../outside.bin", "/etc/hostname", "fp32/../../outside.bin", "fp32\\..\\x", ""])
def test_path_out_of_the_artifact_is_refused(own: Path, path: str) -> None:
    (own.parent / "outside.bin").write_bytes(b"x")
    edit(own, lambda m: m["files"].update({path: {"bytes": 1, "sha256": "0" * 64}}))
    with pytest.raises(InputError, match="is refused; expected a relative path"):
        Artifact.open(own)


def test_link_out_of_the_artifact_is_refused(own: Path) -> None:
    file = own / "fp32/main.bin"
    file.rename(own.parent / "elsewhere.bin")
    file.symlink_to(own.parent / "elsewhere.bin")
    with pytest.raises(InputError, match=r"fp32/main\.bin: links out of its folder"):
        Artifact.open(own)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda m: m.update(format=99), "'format'"),
        (lambda m: m.update(chosen="int2-tpu"), "'chosen'"),
        (lambda m: m.pop("files"), "'files'"),
        (lambda m: m["variants"]["fp32-openvino"]["files"].update(main="../main.xml"), r"variants\['fp32-openvino'\]"),
    ],
)
def test_malformed_manifest_is_refused_with_the_field(own: Path, change: Any, field: str) -> None:
    edit(own, change)
    with pytest.raises(InputError, match=rf"manifest\.json: field {field}"):
        Artifact.open(own)


def test_no_artifact_and_no_json(own: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no artifact here"):
        Artifact.open(tmp_path / "nowhere")
    (own / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json: not JSON"):
        Artifact.open(own)


def test_crash_in_the_middle_leaves_the_old_artifact(own: Path) -> None:
    with pytest.raises(KeyboardInterrupt), replacing(own) as stage:
        (stage / "half.onnx").write_bytes(b"half")
        raise KeyboardInterrupt
    Artifact.open(own)
    assert [p.name for p in own.parent.iterdir()] == ["artifact"]


def test_kill_between_the_two_moves_is_mended_on_open(own: Path) -> None:
    os.replace(own, own.with_name(".artifact.old"))
    (own.with_name(".artifact.new")).mkdir()
    assert Artifact.open(own).chosen == "int8-openvino"


def test_a_folder_that_is_no_artifact_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is not an artifact"), replacing(tmp_path):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_full_disk_is_one_line_with_the_file(own: Path) -> None:
    with (
        pytest.raises(InputError, match=r"fp32/main\.bin: the disk is full \([0-9.]+ MB free\)"),
        replacing(own) as stage,
    ):
        (stage / "fp32").mkdir()
        (stage / "fp32/main.bin").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    Artifact.open(own)
    with pytest.raises(InputError, match=r"big\.onnx: no room on its disk: 1000000000000\.0 MB needed"):
        need_room(own / "big.onnx", 10**18)


@pytest.mark.parametrize(
    ("graph", "text"),
    [
        (Graph("../up", {"x": X}, ("y",)), "becomes a file name"),
        (Graph("main", {"x": X}, ("only",), "stem"), "nothing"),
    ],
)
def test_graph_names(net: Net, tmp_path: Path, graph: Graph, text: str) -> None:
    if text == "nothing":
        made = export({"fp32": net}, [graph], "this-host", tmp_path / "a", kit="demo", runtimes=["openvino"])
        # a graph of one layer: the layer has its name in the whole model, and the file for torch's answer is a tensor
        assert isinstance(made.as_module(threads=1)(X), Tensor)
        assert [o["layer"] for o in made.variant().audit["operators"] if o["operator"] == "Convolution"] == ["stem"]
        assert sorted(made.manifest["files"]) == ["fp32/main.bin", "fp32/main.xml"]
        with pytest.raises(InputError, match="2 inputs given, the graph takes 1: x"):
            made.as_module()(X, X)
        return
    with pytest.raises(InputError, match=text):
        export({"fp32": net}, [graph], "this-host", tmp_path / "a", kit="demo")
