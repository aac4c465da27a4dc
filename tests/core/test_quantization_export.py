"""The ONNX graph of a quantized model: integer weights, and the runtimes agree with the simulation."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from core.quantization import Plan, calibrate, pack_weights, prepare, quantize

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(4, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.b, self.c = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.a(x)))
        x = F.silu(self.b(x)) + self.c(x)
        return self.head(x.mean((2, 3)))


Exported = tuple[nn.Module, Tensor, Any, Path]
INT8 = Plan(reduce_range=True)
OUTPUTS = Plan(reduce_range=True, quantize_outputs=True)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Plan], Exported]:
    """Model, input, packed graph and file of a plan; each plan is exported once."""

    @cache
    def make(plan: Plan) -> Exported:
        torch.manual_seed(0)
        path = tmp_path_factory.mktemp("onnx") / "m.onnx"
        model, x = Net().eval(), torch.randn(2, 4, 16, 16)
        prepare(model, plan, (x,))
        calibrate(model, [(x,)], plan.calibration)
        torch.onnx.export(model, (x,), str(path), dynamo=True, input_names=["x"], external_data=False, verbose=False)
        graph = onnx.load(str(path))
        assert pack_weights(graph) == 4
        onnx.save(graph, str(path))
        return model, x, graph, path

    return make


def run_ort(path: Path, x: Tensor, optimized: Path | None = None) -> np.ndarray:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})[0]


@pytest.mark.parametrize(
    "plan",
    [
        INT8,
        OUTPUTS,
        Plan(weight_bits=4, activation_bits=6, weight_granularity="group", group_size=4, weight_symmetric=False),
    ],
    ids=["int8", "outputs", "w4-group-a6"],
)
def test_onnx_runtime_equals_the_simulation(plan: Plan, exported: Callable[[Plan], Exported]) -> None:
    model, x, graph, path = exported(plan)
    with torch.no_grad():
        expected = model(x)
    step = expected.abs().max().item() / 127
    assert np.abs(run_ort(path, x) - expected.numpy()).max() < step
    # The integers in the file are those of the simulation.
    layer = model.b
    q = quantize(layer.weight, layer.weight_quantizer.scale, layer.weight_quantizer.zero_point, plan.weight)
    stored = [numpy_helper.to_array(i) for i in graph.graph.initializer]
    assert any(w.dtype == q.numpy().dtype and np.array_equal(w.ravel(), q.numpy().ravel()) for w in stored)
    assert not any(w.dtype == np.float32 and w.size >= 128 and w.ndim > 1 for w in stored)
    assert graph.opset_import[0].version >= 17


def test_a_tensor_read_twice_is_quantized_once(exported: Callable[[Plan], Exported]) -> None:
    _, _, graph, _ = exported(INT8)
    assert sum(n.op_type == "QuantizeLinear" for n in graph.graph.node) == 3


def test_onnx_runtime_fuses_every_convolution_when_outputs_are_quantized(
    exported: Callable[[Plan], Exported], tmp_path: Path
) -> None:
    _, x, _, path = exported(OUTPUTS)
    run_ort(path, x, tmp_path / "o.onnx")
    kinds = [n.op_type for n in onnx.load(str(tmp_path / "o.onnx")).graph.node]
    assert kinds.count("QLinearConv") == 3 and not {"Conv", "FusedConv"}.intersection(kinds)


def test_openvino_runs_convolutions_in_int8_and_agrees(exported: Callable[[Plan], Exported]) -> None:
    import openvino as ov

    model, x, _, path = exported(INT8)
    compiled = ov.Core().compile_model(str(path), "CPU", {"INFERENCE_NUM_THREADS": 1})
    kinds = []
    for op in compiled.get_runtime_model().get_ordered_ops():
        info = op.get_rt_info()
        if "layerType" in info and info["layerType"].astype(str) == "Convolution":
            kinds.append(info["primitiveType"].astype(str))
    assert len(kinds) == 3 and all(re.search("I8$", kind) for kind in kinds)
    with torch.no_grad():
        expected = model(x)
    assert np.abs(compiled({"x": x.numpy()})[0] - expected.numpy()).max() < expected.abs().max().item() / 127
