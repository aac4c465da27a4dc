"""The time of a network told from the times of its operators, each measured alone in the runtime that will run it.

As the tables of ProxylessNAS (Cai et al. 2019): measuring every candidate of a search whole takes a second each, adding
up what its layers took takes a millisecond. What an operator takes alone is not what it takes inside (layouts, caches,
what is fused), so a table is fitted to whole networks and says how far off it is on others.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from core.evaluation.bench import bench
from core.evaluation.measure import RUNTIME_TITLES, device
from core.export import RUNTIMES, onnx, openvino
from core.figures import today
from core.files import write_text
from core.kit import Graph, InputError
from core.progress import progress

EACH = 0.05
"""Seconds for which an operator is timed, at the least."""
WHOLE = 0.5
"""Seconds for each network that is timed as a whole."""
PRECISIONS = ("fp32", "int8")
OPSET = 18
Networks = Sequence[tuple[nn.Module, tuple[Tensor, ...]]]
"""Plain networks with inputs of one sample each."""


@dataclass(frozen=True)
class Operator:
    """A convolution, linear layer or nearest upsampling with the shapes it runs at: channels, height and width.

    A linear layer has height 1 and as many rows as width; `kernel` and `stride` are those of both axes.
    """

    kind: str
    inputs: tuple[int, int, int]
    outputs: tuple[int, int, int]
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    groups: int = 1

    def __str__(self) -> str:
        shape = "x".join(map(str, self.inputs)), "x".join(map(str, self.outputs))
        odd = "".join(
            f" {name}{a}" if a == b else f" {name}{a}x{b}"
            for name, (a, b) in (("k", self.kernel), ("s", self.stride), ("p", self.padding))
        )
        return f"{self.kind} {shape[0]} -> {shape[1]}{odd} g{self.groups}"


def operators(model: nn.Module, inputs: Sequence[Tensor]) -> list[Operator]:
    """The operators of a plain network that a table knows, in the order in which they run.

    A convolution over several pictures side by side counts as one of each. Norms fold away and activations fuse;
    element-wise work between layers is left to the table's fit.
    """
    found: list[Operator] = []
    hooks = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.Upsample):
            hooks.append(module.register_forward_hook(lambda m, given, out: found.extend(_operators(m, given[0], out))))
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    return found


def _operators(module: nn.Module, given: Tensor, out: Tensor) -> list[Operator]:
    return [_operator(module, given, out)] * (1 if isinstance(module, nn.Linear) else len(given))


def _operator(module: nn.Module, given: Tensor, out: Tensor) -> Operator:
    if isinstance(module, nn.Linear):
        rows = given.numel() // given.shape[-1]
        return Operator("linear", (given.shape[-1], 1, rows), (out.shape[-1], 1, rows))
    before, after = ((int(t.shape[1]), int(t.shape[2]), int(t.shape[3])) for t in (given, out))
    if isinstance(module, nn.Upsample):
        return Operator("upsample", before, after)
    assert isinstance(module, nn.Conv2d)
    if isinstance(module.padding, str) or module.dilation != (1, 1):
        raise InputError(f"latency: a convolution with padding {module.padding!r} and dilation {module.dilation}")
    kernel, stride, padding = (
        (int(v[0]), int(v[1])) for v in (module.kernel_size, module.stride, module.padding)
    )  # fmt: skip
    return Operator("conv", before, after, kernel, stride, padding, module.groups)


@dataclass(frozen=True)
class Checked:
    """How far a table is off on networks that it was not fitted to: shares of what they really took, and Kendall's tau.

    `mean` and `most` are of the absolute differences.
    """

    networks: int
    mean: float
    most: float
    tau: float


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of operators in a runtime on this machine; a network takes `offset` + `scale` times their sum."""

    runtime: str
    version: str
    precision: str
    threads: int
    device: str
    date: str
    seconds: dict[str, float] = field(default_factory=dict)
    scale: float = 1.0
    offset: float = 0.0
    checked: Checked | None = None

    def latency(self, found: Iterable[Operator]) -> float:
        """Milliseconds of a network with these operators; InputError for one that was not measured."""
        total = 0.0
        for operator in found:
            if str(operator) not in self.seconds:
                raise InputError(f"latency table: {operator} was not measured; add it with `measured`")
            total += self.seconds[str(operator)]
        return 1e3 * (self.offset + self.scale * total)

    def measured(self, wanted: Iterable[Operator]) -> LatencyTable:
        """The table with these operators as well, those that it lacks measured now."""
        missing = {str(o): o for o in wanted if str(o) not in self.seconds}
        known = dict(self.seconds)
        with progress("measuring operators", len(missing)) as bar, tempfile.TemporaryDirectory() as folder:
            nothing = self._alone(None, Path(folder)) if missing else 0.0
            for name, operator in missing.items():
                known[name] = max(self._alone(operator, Path(folder)) - nothing, 0.0)
                bar.advance(name)
        return replace(self, seconds=known)

    def fitted(self, networks: Networks) -> LatencyTable:
        """The table fitted to what every other network takes as a whole, and checked against those between.

        Plain FP32 networks of batch 1, at least 8; InputError for fewer. Fitted by least squares of the shares, with an
        offset of no less than 0.
        """
        if len(networks) < 8:
            raise InputError(f"latency table: {len(networks)} networks to fit it to; give at least 8")
        lists = [operators(model, inputs) for model, inputs in networks]
        table = replace(self, scale=1.0, offset=0.0).measured([o for ops in lists for o in ops])
        real = whole_times(networks, self.runtime, self.threads)
        sums = np.array([table.latency(ops) for ops in lists])
        scale, offset = _line(sums[::2], real[::2])
        table = replace(table, scale=scale, offset=offset / 1e3)
        told = np.array([table.latency(ops) for ops in lists])
        off = np.abs(told - real)[1::2] / real[1::2]
        from scipy.stats import kendalltau

        tau = float(kendalltau(told[1::2], real[1::2]).statistic)
        return replace(table, checked=Checked(len(off), float(off.mean()), float(off.max()), tau))

    def sentence(self, what: str) -> str:
        """How the latency of one `what` is told, and how far off that was on networks it was not fitted to."""
        off = self.checked
        if off is None:
            raise InputError("latency table: not checked against whole networks; fit it with `fitted`")
        return (
            f"latency is told for one {what} in {self.version} {self.precision.upper()} on {self.threads} threads from "
            f"a table of {len(self.seconds)} operators measured on {self.device}; on {off.networks} whole networks "
            f"that it was not fitted to it is off by {100 * off.mean:.0f} % in the mean and by {100 * off.most:.0f} % "
            f"at most, and ranks them with Kendall's tau {off.tau:.2f}"
        )

    def _alone(self, operator: Operator | None, folder: Path) -> float:
        path = folder / "operator.onnx"
        onnx.save_onnx(graph_of(operator, self.precision), path, check=False)
        run = _runner(path, self.runtime, self.threads)
        return bench(run, seconds=EACH, warmup=3, label="operator").timings["it"].p50 / 1e3

    def save(self, path: Path) -> None:
        """As JSON."""
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> LatencyTable:
        """Read back; InputError for a file that is no table, or one of another machine."""
        try:
            data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            checked = data.pop("checked")
            table = LatencyTable(**data, checked=Checked(**checked) if checked else None)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path}: no latency table ({error}); remove it, it is measured anew") from error
        if table.device != device():
            raise InputError(f"{path}: measured on {table.device}, this is {device()}; remove it, or name another")
        return table


def table(runtime: str = "openvino", precision: str = "fp32", threads: int = 2) -> LatencyTable:
    """An empty table for this machine; InputError for a runtime or a precision that is not known."""
    for what, given, known in (("runtime", runtime, RUNTIMES), ("precision", precision, PRECISIONS)):
        if given not in known:
            raise InputError(f"latency table: {what} {given!r} is not known; known are {', '.join(known)}")
    version = {"onnxruntime": onnx.version, "openvino": openvino.version}[runtime]()
    return LatencyTable(runtime, f"{RUNTIME_TITLES[runtime]} {version}", precision, threads, device(), today())


def fitted_table(place: Path, networks: Callable[[], Networks], resume: bool) -> LatencyTable:
    """The times of networks' operators in OpenVINO here, fitted to them as wholes and kept in `place`, from where
    `resume` takes them.
    """
    if resume and place.is_file():
        return LatencyTable.load(place)
    found = table("openvino").fitted(networks())
    found.save(place)
    return found


def whole_times(networks: Networks, runtime: str, threads: int) -> NDArray[np.float64]:
    """Milliseconds that FP32 networks take as a whole, exported and run in turns."""
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        with progress("exporting networks", len(networks)) as bar:
            for number, (model, inputs) in enumerate(networks):
                path = Path(folder) / f"{number}.onnx"
                names = {f"input{i}": tensor for i, tensor in enumerate(inputs)}
                with torch.no_grad():
                    made = tree_leaves(model.eval()(*inputs))
                graph = Graph("whole", names, tuple(f"output{i}" for i in range(len(made))))
                onnx.save_onnx(onnx.to_onnx(model, graph), path, check=False)
                runs[str(number)] = _runner(path, runtime, threads)
                bar.advance()
        timed = bench(runs, seconds=WHOLE * len(runs), warmup=3, label="whole networks").timings
        return np.array([timed[name].p50 for name in runs])


def _line(x: Any, y: Any) -> tuple[float, float]:
    """(slope, intercept) of y = slope x + intercept by least squares of (told - real) / real, the intercept >= 0."""
    from scipy.optimize import nnls

    (slope, intercept), _ = nnls(np.stack((x / y, 1 / y), 1), np.ones(len(y)))
    return float(slope), float(intercept)


def _runner(path: Path, runtime: str, threads: int) -> Callable[[], Any]:
    """A call of the model in a file on zeros."""
    if runtime == "openvino":
        compiled = openvino.compile_cpu(path, threads)
        request = compiled.create_infer_request()
        arrays = [np.zeros(tuple(i.shape), i.element_type.to_dtype()) for i in compiled.inputs]
        return lambda: request.infer(arrays, share_inputs=True, share_outputs=True)
    session = onnx.session(path, threads)
    kinds = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}
    feeds = {i.name: np.zeros(i.shape, kinds[i.type]) for i in session.get_inputs()}
    return lambda: session.run(None, feeds)


def graph_of(operator: Operator | None, precision: str) -> Any:
    """An ONNX model of an operator followed by a ReLU, with seeded weights; None is the least that a model can be.

    In INT8 the input and the output are bytes, as they are between layers.
    """
    from onnx import TensorProto, helper

    nodes: list[Any] = []
    weights: list[Any] = []
    given, made = (operator.inputs, operator.outputs) if operator else ((1, 1, 1), (1, 1, 1))
    whole = precision == "int8" and operator is not None
    kind = TensorProto.UINT8 if whole else TensorProto.FLOAT
    x = "x"
    if whole:
        weights += [_array("step", np.float32(0.02)), _array("zero", np.uint8(0))]
        nodes.append(helper.make_node("DequantizeLinear", ["x", "step", "zero"], ["real"]))
        x = "real"
    if operator is None:
        nodes.append(helper.make_node("Relu", [x], ["y"]))
    else:
        nodes += _body(operator, x, whole, weights)
        nodes.append(helper.make_node("Relu", ["made"], ["positive" if whole else "y"]))
        if whole:
            nodes.append(helper.make_node("QuantizeLinear", ["positive", "step", "zero"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "operator",
        [helper.make_tensor_value_info("x", kind, [1, *given])],
        [helper.make_tensor_value_info("y", kind, [1, *made])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def _body(operator: Operator, x: str, whole: bool, weights: list[Any]) -> list[Any]:
    from onnx import helper

    if operator.kind == "upsample":
        scales = [1.0, 1.0, *(b / a for a, b in zip(operator.inputs[1:], operator.outputs[1:]))]
        weights.append(_array("scales", np.array(scales, np.float32)))
        return [
            helper.make_node(
                "Resize", [x, "", "scales"], ["made"], mode="nearest",
                coordinate_transformation_mode="asymmetric", nearest_mode="floor",
            )
        ]  # fmt: skip
    # a linear layer over rows is a convolution of one by one over them, which is what runtimes make of it
    shape = (operator.outputs[0], operator.inputs[0] // operator.groups, *operator.kernel)
    draws = np.random.default_rng(0)
    nodes = []
    if whole:
        weights += [
            _array("w8", draws.integers(-63, 64, shape, np.int8)),
            _array("w_step", np.full(shape[0], 0.01, np.float32)),
            _array("w_zero", np.zeros(shape[0], np.int8)),
        ]
        nodes.append(helper.make_node("DequantizeLinear", ["w8", "w_step", "w_zero"], ["w"], axis=0))
    else:
        weights.append(_array("w", draws.normal(0, 0.05, shape).astype(np.float32)))
    weights.append(_array("b", np.zeros(shape[0], np.float32)))
    nodes.append(
        helper.make_node(
            "Conv", [x, "w", "b"], ["made"], kernel_shape=list(operator.kernel), strides=list(operator.stride),
            pads=[*operator.padding, *operator.padding], group=operator.groups,
        )
    )  # fmt: skip
    return nodes


def _array(name: str, value: Any) -> Any:
    from onnx import numpy_helper

    return numpy_helper.from_array(np.asarray(value), name)
