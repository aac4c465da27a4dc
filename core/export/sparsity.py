"""N:M sparsity in an exported file: which matrix products have weights that hold the pattern, and their share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.kit import InputError

_COUNTED = (
    "Conv",
    "ConvTranspose",
    "Gemm",
    "MatMul",
    "MatMulInteger",
    "ConvInteger",
    "QLinearConv",
    "QLinearMatMul",
    "Einsum",
)
_UNKNOWN = ("Attention", "MultiHeadAttention", "DeformConv", "LSTM", "GRU", "RNN")


@dataclass(frozen=True)
class OnnxProduct:
    """A matrix product of a file. `weight` is the initializer behind it, "" where it multiplies activations."""

    node: str
    operator: str
    weight: str
    macs: int
    sparse: bool


@dataclass(frozen=True)
class OnnxSparsity:
    """The matrix products of an ONNX file against the pattern n:m.

    `left_out` counts nodes by operator that do arithmetic with weights or samples and are not counted (GridSample).
    """

    n: int
    m: int
    products: tuple[OnnxProduct, ...]
    left_out: dict[str, int]

    @property
    def initializers(self) -> dict[str, bool]:
        """Every initializer that a product multiplies with, and whether it holds the pattern wherever it is used."""
        found: dict[str, bool] = {}
        for p in self.products:
            if p.weight:
                found[p.weight] = found.get(p.weight, True) and p.sparse
        return found

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all matrix products."""
        return sum(p.macs for p in self.products)

    @property
    def share(self) -> float:
        """The share of them that runs under the pattern, 0 to 1."""
        return sum(p.macs for p in self.products if p.sparse) / self.macs if self.macs else 0.0


def sparse_in_onnx(path: Path | str, n: int = 2, m: int = 4) -> OnnxSparsity:
    """Read the matrix products of an ONNX file; weights are followed through what makes them of initializers alone.

    The pattern runs along the input channels: axis 1 of a Conv's weight, the summed axis of Gemm's and MatMul's. INT8
    weights are judged dequantized, as they multiply. Raises InputError for a file that is missing or no ONNX model,
    and where a product's shape is free.
    """
    import onnx

    path = Path(path)
    try:
        model = onnx.load(path)
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; export the model first") from error
    except Exception as error:  # protobuf raises its own type for other bytes
        raise InputError(f"{path}: not an ONNX model ({str(error).splitlines()[0]:.100})") from error
    graph = _Graph(model)
    products: list[OnnxProduct] = []
    left_out: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type in _COUNTED:
            products.append(_product(graph, node, n, m, path))
        elif node.op_type == "GridSample" or node.op_type in _UNKNOWN:
            left_out[node.op_type] = left_out.get(node.op_type, 0) + 1
    return OnnxSparsity(n, m, tuple(products), left_out)


class _Graph:
    """Shapes of values, and the values that initializers alone make."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._initializers = {i.name: i for i in model.graph.initializer}
        self._makers = {name: node for node in model.graph.node for name in node.output}
        self._shapes: dict[str, list[int | None]] = {i.name: list(i.dims) for i in model.graph.initializer}
        for info in (*model.graph.input, *model.graph.value_info, *model.graph.output):
            tensor = info.type.tensor_type
            if tensor.HasField("shape"):
                dims = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
                self._shapes.setdefault(info.name, dims)

    def shape(self, name: str, node: Any, path: Path) -> list[int]:
        """The shape of a value; InputError where one of its axes is free."""
        dims = self._shapes.get(name)
        fixed = [d for d in dims or [] if d is not None]
        if dims is None or len(fixed) < len(dims):
            raise InputError(f"{path}: node {node.name!r}: {name!r} has the shape {dims}; export with fixed shapes")
        return fixed

    def constant(self, name: str) -> tuple[str, Any] | None:
        """(initializer, array) of a value that is made of initializers alone; None where an input takes part."""
        import onnx
        from onnx import helper, numpy_helper
        from onnx.reference import ReferenceEvaluator

        if name in self._initializers:
            return name, numpy_helper.to_array(self._initializers[name])
        nodes = self._behind(name)
        if nodes is None:
            return None
        used = dict.fromkeys(i for node in nodes for i in node.input if i in self._initializers)
        weights = [self._initializers[i] for i in used]
        output = helper.make_empty_tensor_value_info(name)
        part = helper.make_graph(nodes, "weight", [], [output], weights)
        # onnx can work out DequantizeLinear only as opset 19 and later write it, which means the same
        opsets = [helper.make_opsetid(o.domain, max(o.version, 21)) for o in self._model.opset_import if not o.domain]
        model = helper.make_model(part, opset_imports=opsets, ir_version=max(self._model.ir_version, 10))
        result: Any = ReferenceEvaluator(model).run(None, {})
        largest = max(weights, key=lambda i: math.prod(i.dims), default=onnx.TensorProto())
        return largest.name or name, result[0]

    def _behind(self, name: str) -> list[Any] | None:
        """The nodes that make a value from initializers alone, in order; None where an input takes part."""
        if name in self._initializers or name == "":
            return []
        node = self._makers.get(name)
        # what a product of constants gives is an activation that does not change, and no weight
        if node is None or node.op_type in _COUNTED:
            return None
        found: list[Any] = []
        for source in node.input:
            before = self._behind(source)
            if before is None:
                return None
            found += [n for n in before if n not in found]
        return [*found, node]


def _product(graph: _Graph, node: Any, n: int, m: int, path: Path) -> OnnxProduct:
    first, second = (node.input[0], node.input[3]) if node.op_type.startswith("QLinear") else node.input[:2]
    results = graph.shape(node.output[0], node, path)
    given = graph.shape(first, node, path)
    transposed = {a.name: a.i for a in node.attribute if a.name in ("transA", "transB")}
    if "Conv" in node.op_type:
        kernel = graph.shape(second, node, path)
        reads = math.prod(given) if node.op_type == "ConvTranspose" else math.prod(results)
        found = graph.constant(second)
        sparse = found is not None and node.op_type != "ConvTranspose" and _holds(found[1], 1, n, m)
        macs = reads * math.prod(kernel[1:])
        return OnnxProduct(node.name, node.op_type, found[0] if found else "", macs, sparse)
    if node.op_type == "Einsum":
        return _einsum(graph, node, given, graph.shape(second, node, path), path)
    summed = given[0] if transposed.get("transA") else given[-1]
    sparse, weight = False, ""
    if (found := graph.constant(second)) is not None:
        axis = 1 if transposed.get("transB") else found[1].ndim - 2
        weight, sparse = found[0], _holds(found[1], axis, n, m)
    elif (found := graph.constant(first)) is not None:
        weight, sparse = found[0], _holds(found[1], 0 if transposed.get("transA") else found[1].ndim - 1, n, m)
    return OnnxProduct(node.name, node.op_type, weight, math.prod(results) * summed, sparse)


def _einsum(graph: _Graph, node: Any, first: list[int], second: list[int], path: Path) -> OnnxProduct:
    """An Einsum of two operands: one multiply-accumulate for each choice of its letters; never run sparse."""
    equation = next(a.s.decode() for a in node.attribute if a.name == "equation").replace(" ", "")
    terms = equation.partition("->")[0].split(",")
    if len(terms) != 2 or "." in equation:
        raise InputError(f"{path}: node {node.name!r}: Einsum {equation!r} cannot be counted; write it with matmul")
    sizes = dict(zip("".join(terms), (*first, *second), strict=True))
    found = graph.constant(node.input[1]) or graph.constant(node.input[0])
    return OnnxProduct(node.name, node.op_type, found[0] if found else "", math.prod(sizes.values()), False)


def _holds(weight: Any, axis: int, n: int, m: int) -> bool:
    """Whether every m neighbours along an axis of an array hold n numbers other than zero at the most."""
    if weight.ndim < 2 or weight.shape[axis] % m:
        return False
    blocks = np.moveaxis(weight != 0, axis, -1).reshape(-1, m)
    return bool((blocks.sum(1) <= n).all())


def describe(found: OnnxSparsity) -> Sequence[str]:
    """One line for the file and one for every initializer that does not hold the pattern."""
    held = found.initializers
    dense = [f"{name}: no {found.n}:{found.m}" for name, holds in held.items() if not holds]
    share = f"{found.share:.1%} of {found.macs:,} multiply-accumulates under {found.n}:{found.m}"
    return [f"{share}; {len(held) - len(dense)} of {len(held)} weights", *dense]
