"""ExecuTorch: lower a module through XNNPACK to a `.pte` file, and run it in its own runtime (extra `phone`)."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version as installed
from importlib.resources import files as resources
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from core.compress import file_hash
from core.export.parity import Criterion, Deviation, ParityError, deviation
from core.export.plain import decompositions
from core.export.silence import silenced
from core.files import replaced
from core.kit import InputError

Weights = Literal["float", "int8", "int4"]
WEIGHTS: tuple[Weights, ...] = ("float", "int8", "int4")
# XNNPACK's 4-bit kernel takes groups of a multiple of 32
GROUP_STEP = 32
MISSING = "ExecuTorch is not installed; pip install 'fitkit[phone]'"


def version() -> str:
    """The version of ExecuTorch; raises InputError where it is not installed."""
    _needed()
    return installed("executorch")


@dataclass(frozen=True)
class Lowered:
    """What `to_executorch` made of a module.

    `delegated` operators run in XNNPACK in `subgraphs` pieces, those of `left` ({operator: count}) in ExecuTorch's
    portable kernels. `layers` tells the precision of every layer with weights ("int4, groups of 32", "int8",
    "float32: why") as it was asked for, `stored` what `stored_weights` reads from the file. `parity` compares the
    runtime with torch's simulation of the same integers (with the float module where nothing is quantized), `error`
    with the float module; output by output.
    """

    file: str
    bytes: int
    sha256: str
    version: str
    weights: str
    delegated: int
    subgraphs: int
    left: dict[str, int]
    layers: dict[str, str]
    stored: dict[str, dict[str, int]]
    criterion: str
    parity: tuple[Deviation, ...]
    error: tuple[Deviation, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; deviations also as `relative`, the largest difference over the peak."""
        record = asdict(self)
        for name in ("parity", "error"):
            record[name] = [_deviation_json(d) for d in getattr(self, name)]
        return record


def to_executorch(
    module: nn.Module,
    example_inputs: Sequence[Tensor],
    path: Path | str,
    *,
    weights: Weights = "float",
    group_size: int = 32,
    tolerance: float | None = None,
) -> Lowered:
    """Lower a module for the shapes of its example inputs, write `path` (.pte), run it here and compare with torch.

    `weights`: "float"; "int8": every Linear and plain 2-D convolution with INT8 weights per channel; "int4": Linear
    with INT4 weights in groups of `group_size` and convolutions as for "int8", since XNNPACK has no INT4 convolution.
    Activations of such layers are quantized to INT8 as they come. All else stays float32. `tolerance` is the largest
    difference relative to max(1, peak) for float (default 1e-4), the least SQNR in dB for the others (default 25).
    Raises ParityError when the runtime disagrees, and InputError for wrong arguments or without the extra `phone`.
    """
    path, inputs = Path(path), tuple(example_inputs)
    _check(weights, group_size, path)
    _needed()
    criterion = Criterion.of("fp32" if weights == "float" else weights, {} if tolerance is None else
                             {"fp32" if weights == "float" else weights: tolerance})  # fmt: skip
    began = time.perf_counter()
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad(), silenced(), _quiet():
            wanted = _tensors(module(*inputs))
            program, simulated, layers = _quantized(module, inputs, weights, group_size)
            buffer, delegated, subgraphs, left = _lower(program)
    finally:
        module.train(was_training)
    with replaced(path) as fresh:
        fresh.write_bytes(buffer)
    found = _tensors(ExecuTorchModule(path)(*inputs))
    parity = tuple(deviation(a, b) for a, b in zip(simulated, found, strict=True))
    error = tuple(deviation(a, b) for a, b in zip(wanted, found, strict=True))
    for number, d in enumerate(parity):
        if not criterion.holds(d):
            raise ParityError(
                f"{path}: output {number} of ExecuTorch disagrees with torch: {d}; wanted {criterion}; "
                "see which operators were left to the portable kernels, or ask for float weights"
            )
    return Lowered(
        path.name, path.stat().st_size, file_hash(path), version(), weights, delegated, subgraphs, left, layers,
        stored_weights(path), str(criterion), parity, error, time.perf_counter() - began,
    )  # fmt: skip


class ExecuTorchModule(nn.Module):
    """Runs a `.pte` file in ExecuTorch's runtime on the CPU, on as many threads as the process has cores.

    The Python bindings have no say over the number of threads; pin the process to cores instead. A wrong number of
    inputs, shape or data type raises InputError.
    """

    def __init__(self, path: Path | str) -> None:
        super().__init__()
        _needed()
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file; lower a module with to_executorch first")
        with silenced(), _quiet():
            from executorch.runtime import Runtime

            self._program = Runtime.get().load_program(Path(path))
            self._method = self._program.load_method("forward")
        about = self._method.metadata
        self._shapes = [tuple(about.input_tensor_meta(i).sizes()) for i in range(about.num_inputs())]

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Tensors in the order of the module's arguments -> its outputs, on the CPU."""
        shapes = [tuple(t.shape) for t in inputs]
        if shapes != self._shapes:
            raise InputError(f"inputs of shapes {shapes} given, the .pte takes {self._shapes}; lower it for these")
        outputs = tuple(self._method.execute([t.detach().cpu().contiguous() for t in inputs]))
        return outputs if len(outputs) > 1 else outputs[0]


# what the graph of a delegate calls the types of its constants
_STORED = {"qbint4": "int4", "qcint4": "int4", "qcint8": "int8", "qint8": "int8", "fp16": "float16", "fp32": "float32"}
_MAGIC, _HEADER = b"XH00", 30


def stored_weights(path: Path | str) -> dict[str, dict[str, int]]:
    """{"int4": {"layers", "weights"}, ...}: in which type XNNPACK's products and convolutions hold their weights.

    Read from the graphs in the file. Means of norms are products with a constant as well, of few weights; what stays in
    ExecuTorch's own kernels, such as an embedding, is not counted.
    """
    _needed()
    data = Path(path).read_bytes()
    found: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as work:
        graphs: list[Path] = []
        for blob in _graphs(data):
            graphs.append(Path(work, f"{len(graphs)}.bin"))
            graphs[-1].write_bytes(blob)
        schema = resources("executorch.backends.xnnpack.serialization") / "schema.fbs"
        command = [str(resources("executorch.data.bin") / "flatc"), "--json", "--strict-json", "--defaults-json"]
        command += ["--raw-binary", "-o", work, str(schema), "--", *map(str, graphs)]
        if graphs:
            subprocess.run(command, capture_output=True, check=True)
        for graph in graphs:
            record = json.loads(graph.with_suffix(".json").read_text(encoding="utf-8"))
            values = [v["xvalue_union"] for v in record["xvalues"]]
            tensors = {t["id_out"]: t for t in (v.get("tensor_value", v) for v in values)}
            for node in record["xnodes"]:
                weight = tensors.get(node["xnode_union"].get("filter_id"), {"constant_buffer_idx": 0})
                if weight["constant_buffer_idx"]:
                    name = weight["datatype"].removeprefix("xnn_datatype_")
                    count = found.setdefault(_STORED.get(name, name), {"layers": 0, "weights": 0})
                    count["layers"] += 1
                    count["weights"] += math.prod(weight["dims"])
    return found


def _graphs(data: bytes) -> Iterator[bytes]:
    """The flatbuffers of XNNPACK's delegates: a header of 30 bytes says where each lies."""
    at = data.find(_MAGIC)
    while at >= 0:
        length, offset, size = (int.from_bytes(data[at + a : at + b], "little") for a, b in ((4, 6), (6, 10), (10, 14)))
        blob = data[at - 4 + offset : at - 4 + offset + size]
        if length == _HEADER and 0 < size == len(blob):
            yield blob
        at = data.find(_MAGIC, at + 1)


def _needed() -> None:
    try:
        installed("executorch")
    except ModuleNotFoundError as error:
        raise InputError(MISSING) from error


def _check(weights: str, group_size: int, path: Path) -> None:
    if weights not in WEIGHTS:
        raise InputError(f"to_executorch: weights {weights!r}; expected one of {', '.join(WEIGHTS)}")
    if group_size < 1 or group_size % GROUP_STEP:
        raise InputError(f"to_executorch: group_size {group_size}; XNNPACK takes multiples of {GROUP_STEP}")
    if path.suffix != ".pte":
        raise InputError(f"to_executorch: path {path}; expected a name that ends with .pte")


def _quantized(
    module: nn.Module, inputs: tuple[Tensor, ...], weights: str, group_size: int
) -> tuple[Any, tuple[Tensor, ...], dict[str, str]]:
    """The exported program, what torch computes with its integers, and the precision of every layer with weights."""
    layers = layer_precisions(module, weights, group_size)
    if weights == "int4":
        module = _with_int4_linears(copy.deepcopy(module), layers, group_size)
    program = torch.export.export(module, inputs, strict=False)
    if weights != "float":
        program = torch.export.export(_with_int8(program.module(), inputs), inputs, strict=False)
    return program, _tensors(program.module()(*inputs)), layers


def layer_precisions(module: nn.Module, weights: str, group_size: int) -> dict[str, str]:
    """The precision in which every layer with weights runs; of what stays float32 while others do not, also why."""
    found = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            fits = layer.in_features % group_size == 0
            if weights == "int4" and fits:
                found[name] = f"int4, groups of {group_size}"
            elif weights == "int4":
                found[name] = f"int8: {layer.in_features} inputs are no multiple of {group_size}"
            else:
                found[name] = "int8" if weights == "int8" else "float32"
        elif isinstance(layer, nn.Conv2d):
            if weights == "float":
                found[name] = "float32"
            elif layer.groups == layer.in_channels > 1:
                found[name] = "float32: XNNPACK has no depthwise convolution with activations quantized as they come"
            else:
                found[name] = "int8" if weights == "int8" else "int8: XNNPACK has no INT4 convolution"
        elif isinstance(layer, nn.Embedding):
            found[name] = "float32" if weights == "float" else "float32: XNNPACK has no embedding"
    return found


def _with_int4_linears(module: nn.Module, layers: dict[str, str], group_size: int) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    config = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=getattr(torch, "int4"),  # noqa: B009  torch's stubs lack it
        weight_granularity=PerGroup(group_size),
        weight_scale_dtype=torch.bfloat16,
    )
    quantize_(module, config, lambda _, name: layers.get(name, "").startswith("int4"))
    return module


def _with_int8(module: Any, inputs: tuple[Tensor, ...]) -> Any:
    """INT8 weights per channel for what is still float; activations are quantized as they come, uncalibrated."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    quantizer = XNNPACKQuantizer().set_global(config)
    quantizer.set_filter_function(_has_float_weight)  # INT4 weights come out of an operator
    prepared = prepare_pt2e(module, quantizer)
    prepared(*inputs)
    return convert_pt2e(prepared)


def _has_float_weight(node: Any) -> bool:
    return len(node.args) < 2 or getattr(node.args[1], "op", "") == "get_attr"


def _lower(program: Any) -> tuple[bytes, int, int, dict[str, int]]:
    """The bytes of the `.pte`, how many operators XNNPACK took in how many pieces, and the operators it did not."""
    from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.devtools.backend_debug import get_delegation_info
    from executorch.exir import to_edge_transform_and_lower
    from executorch.exir.passes.constant_prop_pass import constant_prop_pass

    program = program.run_decompositions(decompositions())
    # constants of norms and timestep frequencies are worked out here; integers must not become floats again
    integers = {n.target for n in program.graph.nodes if _namespace(n.target) in ("torchao", "quantized_decomposed")}
    program = constant_prop_pass(program, custom_skip_targets=integers)
    # A layer whose activations are quantized as they come gets a piece of its own: behind another operator in the same
    # piece, XNNPACK 1.5 refuses a convolution (xnn_status_invalid_parameter when it propagates the shapes).
    alone = XnnpackPartitioner(config_precisions=ConfigPrecisionType.DYNAMIC_QUANT, per_op_mode=True)
    edge = to_edge_transform_and_lower(
        program, partitioner=[alone, XnnpackPartitioner()] if integers else [XnnpackPartitioner()]
    )
    info = get_delegation_info(edge.exported_program().graph_module)
    left = Counter({k: v.non_delegated for k, v in info.delegation_by_operator.items() if v.non_delegated})
    left.pop("getitem", None)  # takes a result out of a tuple; computes nothing
    delegated = sum(v.delegated for v in info.delegation_by_operator.values())
    return edge.to_executorch().buffer, delegated, info.num_delegated_subgraphs, dict(left.most_common())


def _namespace(target: Any) -> str:
    return str(getattr(target, "namespace", ""))


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return tuple(t.detach() for t in tree_leaves(result) if isinstance(t, Tensor))


def _deviation_json(d: Deviation) -> dict[str, float]:
    return {**d.to_json(), "relative": float(f"{d.max_abs / d.peak:.4g}") if d.peak else 0.0}


@contextmanager
def _quiet() -> Iterator[None]:
    """ExecuTorch and torchao warn of their own old calls; none is of concern to the user of a model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
