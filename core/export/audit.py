"""The audit: in which precision every operator of a variant really runs, read from what the runtime compiled.

A file that says INT8 may still run float where the runtime finds no integer kernel; nobody sees that
from the file or from the speed alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from core.export.layers import WEIGHTED, Layers
from core.hardware.host import processor

_ONNX_TYPES = {
    1: "FP32", 2: "INT8", 3: "INT8", 6: "INT32", 7: "INT64", 9: "BOOL", 10: "FP16", 11: "FP64", 16: "BF16",
    21: "INT4", 22: "INT4",
}  # fmt: skip
_OPENVINO_TYPES = {
    "f32": "FP32", "f16": "FP16", "bf16": "BF16", "f64": "FP64", "u8": "INT8", "i8": "INT8", "u4": "INT4", "i4": "INT4",
    "i32": "INT32", "i64": "INT64", "boolean": "BOOL",
}  # fmt: skip
_INTEGER_KERNELS = frozenset({"QGemm", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"})
_WEIGHTED_KERNELS = (
    WEIGHTED | _INTEGER_KERNELS | {"QLinearConv", "QLinearMatMul", "FusedConv", "FusedMatMul", "FusedGemm"}
)
_OPENVINO_WEIGHTED = {"Convolution", "Deconvolution", "FullyConnected", "MatMul"}


def audit_file(
    runtime: str,
    path: Path,
    layers: Layers,
    graph: str,
    precision: str,
    quantized: Collection[str] = (),
    half: Collection[str] = (),
) -> dict[str, Any]:
    """Read the real precision of every operator of one file.

    `layers` describes the ONNX model that the file came from, `quantized` names the layers that torch
    quantizes with their activations, `half` those that it puts into FP16. Returns {"operators":
    [{"graph", "operator", "layer", "precision"}], "layers": [{"graph", "layer", "asked", "stored",
    "ran"}] (those with weights: the recipe's precision, that of the weight in the file, and that of
    the kernel, "constant" for a product of constants, which is computed once), "summary" and
    "weighted": {precision: count} of all operators and of those with weights, "warnings": [{"layer",
    "why"}]}.
    """
    operators = _onnxruntime(path, layers) if runtime == "onnxruntime" else _openvino(path, layers)
    warnings = _fell_back(operators, layers, quantized) if precision.split("-")[0] != "fp32" else _lowered(operators)
    warnings += _nothing_quantized(precision, layers) + _saturates(layers)
    asked = _asked(operators, layers, graph, quantized, half)
    warnings += _half_in_float(asked)
    summary = Counter(o["precision"] for o in operators)
    weighted = Counter(o["precision"] for o in operators if o["weighted"])
    rows = [
        {"graph": graph, "operator": o["operator"], "layer": o["layer"], "precision": o["precision"]} for o in operators
    ]
    return {
        "operators": rows,
        "layers": asked,
        "summary": dict(summary),
        "weighted": dict(weighted),
        "warnings": warnings,
    }


def merge(audits: list[dict[str, Any]]) -> dict[str, Any]:
    """One audit of several graphs."""
    summary: Counter[str] = Counter()
    weighted: Counter[str] = Counter()
    for a in audits:
        summary.update(a["summary"])
        weighted.update(a["weighted"])
    return {
        "operators": [o for a in audits for o in a["operators"]],
        "layers": [row for a in audits for row in a["layers"]],
        "summary": dict(summary),
        "weighted": dict(weighted),
        "warnings": [w for a in audits for w in a["warnings"]],
    }


def _onnxruntime(path: Path, layers: Layers) -> list[dict[str, Any]]:
    import onnx

    from core.export.onnx import session

    optimized = path.with_name(path.stem + ".optimized.onnx")
    try:
        session(path, 1, optimized)
        model = onnx.load_model(optimized, load_external_data=False)
    finally:
        for left in (optimized, optimized.with_name(optimized.name + ".data")):
            left.unlink(missing_ok=True)
    typed = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    types = {v.name: v.type.tensor_type.elem_type for v in typed} | {
        t.name: t.data_type for t in model.graph.initializer
    }
    rows = []
    for node in model.graph.node:
        integer = node.op_type in _INTEGER_KERNELS or node.op_type.startswith("QLinear")
        first = types.get(node.input[0], 1) if node.input else 1
        if node.op_type == "QuantizeLinear":
            out = types.get(node.input[2], 2) if len(node.input) > 2 else 2
        elif node.op_type == "DequantizeLinear":
            out = 1
        else:
            # layout changes and pooling pass integers on; the optimized file gives no type for values it made itself
            out = 2 if integer else first
        for name in node.output:
            types.setdefault(name, out)
        if node.op_type in {"QuantizeLinear", "DequantizeLinear"}:
            precision = "conversion"
        else:
            precision = "INT8" if integer else _ONNX_TYPES.get(first, "other")
        origin = layers.by_weights(node.input[1:]) if node.op_type in _WEIGHTED_KERNELS else None
        origin = origin or layers.find(node.name)
        if node.op_type in _WEIGHTED_KERNELS and origin is not None and origin not in layers.weighted():
            # a convolution that took in the activation behind it may bear that one's name, its weight laid out anew
            before = layers.producer.get(origin.input[0]) if origin.input else None
            origin = before if before is not None and before in layers.weighted() else origin
        rows.append(
            {
                "operator": node.op_type,
                "layer": layers.layer(origin) if origin is not None else node.name,
                "precision": precision,
                "weighted": node.op_type in _WEIGHTED_KERNELS and origin in layers.weighted(),
                "origins": [origin.name] if origin is not None else [],
            }
        )
    return rows


def _openvino(path: Path, layers: Layers) -> list[dict[str, Any]]:
    from core.export.openvino import compile_cpu

    weighted = {n.name for n in layers.weighted()}
    rows = []
    for op in compile_cpu(path, 1).get_runtime_model().get_ordered_ops():
        info = {k: op.get_rt_info()[k].value for k in ("layerType", "runtimePrecision", "originalLayersNames")}
        kind = info["layerType"]
        if kind in {"Const", "Input", "Output"}:
            continue
        found = [layers.find(name) for name in info["originalLayersNames"].split(",") if name]
        origins = [n for n in found if n is not None]
        heavy = [n for n in origins if n.name in weighted] if kind in _OPENVINO_WEIGHTED else []
        if not heavy and kind in _OPENVINO_WEIGHTED:
            # a product that took in its bias bears the sum's name
            heavy = [n for n in (layers.behind(o) for o in origins) if n is not None][:1]
        told = heavy[0] if heavy else origins[-1] if origins else None
        precision = _OPENVINO_TYPES.get(info["runtimePrecision"], str(info["runtimePrecision"]).upper())
        if precision == "INT8" and not heavy:
            # truth values are held in bytes; a choice by them is told by its first input too
            if any(layers.boolean(n) for n in origins):
                precision = "BOOL"
            elif any(n.op_type == "Where" for n in origins):
                precision = "FP32"
        rows.append(
            {
                "operator": kind,
                "layer": layers.layer(told) if told is not None else info["originalLayersNames"].split(",")[0],
                "precision": "conversion" if kind in {"Reorder", "Convert"} else precision,
                "weighted": bool(heavy),
                "origins": [n.name for n in (heavy or origins)],
            }
        )
    # small products run inside of a subgraph of elementwise operations
    found_already = {name for row in rows if row["weighted"] for name in row["origins"]}
    for row in rows:
        inside = [name for name in row["origins"] if name in weighted - found_already]
        if row["operator"] == "Subgraph" and inside:
            row["weighted"], row["origins"] = True, inside
            found_already.update(inside)
    return rows


def _fell_back(operators: list[dict[str, Any]], layers: Layers, quantized: Collection[str]) -> list[dict[str, str]]:
    """A warning for every layer that is quantized, in torch or in the file, but did not run in integers."""
    in_file = {n.name for n in layers.quantized()}
    nodes = [(layers.layer(n), n) for n in layers.weighted()]
    lost = sorted(set(quantized) - {layer for layer, _ in nodes})
    warnings = [{"layer": layer, "why": "should be INT8; the exported file has no such layer"} for layer in lost]
    for layer, node in nodes:
        if layer not in quantized and node.name not in in_file:
            continue
        ran = [o for o in operators if o["weighted"] and node.name in o["origins"]]
        if not ran:
            warnings.append(
                {"layer": layer, "why": "should be INT8; not found among the operators of the compiled model"}
            )
        elif ran[0]["precision"] not in {"INT8", "INT4"}:
            why = f"should be INT8, ran {ran[0]['precision']} as {ran[0]['operator']}"
            warnings.append({"layer": layer, "why": why})
    return warnings


def _asked(
    operators: list[dict[str, Any]], layers: Layers, graph: str, quantized: Collection[str], half: Collection[str]
) -> list[dict[str, str]]:
    """Every layer with weights: what the recipe asks, what the file holds and what ran."""
    in_file = {n.name for n in layers.quantized()}
    ran: dict[str, str] = {}
    for operator in operators:
        for name in operator["origins"] if operator["weighted"] else ():
            ran.setdefault(name, operator["precision"])
    rows = []
    for node in layers.weighted():
        layer = layers.layer(node)
        asked = "INT8" if layer in quantized or node.name in in_file else "FP16" if layer in half else "FP32"
        found = ran.get(node.name) or ("constant" if layers.constant(node) else "not found")
        rows.append({"graph": graph, "layer": layer, "asked": asked, "stored": layers.stored(node), "ran": found})
    return rows


def _half_in_float(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """One warning for the layers that the recipe puts into FP16 and that ran in FP32."""
    layers = sorted({r["layer"] for r in rows if r["asked"] == "FP16" and r["ran"] == "FP32"})
    if not layers:
        return []
    why = f"{len(layers)} layers should be FP16, ran FP32 (this runtime has no FP16 kernels for this processor): "
    return [{"layer": "", "why": why + f"their weights are stored in FP16, from {layers[0]} to {layers[-1]}"}]


def _lowered(operators: list[dict[str, Any]]) -> list[dict[str, str]]:
    """A warning for every operator of a float variant that ran in fewer bits."""
    low = [o for o in operators if o["precision"] in {"BF16", "FP16", "INT8", "INT4"}]
    return [{"layer": o["layer"], "why": f"should be FP32, ran {o['precision']} as {o['operator']}"} for o in low]


def _nothing_quantized(precision: str, layers: Layers) -> list[dict[str, str]]:
    if not precision.startswith(("int", "w", "mixed")) or any(n.op_type == "DequantizeLinear" for n in layers.nodes):
        return []
    return [{"layer": "", "why": f"the {precision} model exports without any DequantizeLinear: all of it runs float"}]


def _saturates(layers: Layers) -> list[dict[str, str]]:
    """A warning for layers whose INT8 weights overflow the 16-bit sums of an x86 processor without VNNI.

    There two products of an 8-bit activation and an 8-bit weight are added in 16 bits with saturation
    (the instruction vpmaddubsw); weights within -64 to 64 are always safe.
    """
    from onnx import numpy_helper

    if not without_vnni():
        return []
    wide = []
    for node in layers.quantized():
        tensor = layers.initializers.get(layers.root(node.input[1]))
        if tensor is None or tensor.data_type != 3:
            continue
        values = numpy_helper.to_array(tensor)
        if values.size and max(-int(values.min()), int(values.max())) > 64:
            wide.append(layers.layer(node))
    why = "U8S8 with full-range weights on a processor without VNNI saturates; quantize its weights to 7 bits"
    return [{"layer": layer, "why": why} for layer in wide]


def without_vnni() -> bool:
    """Whether this is an x86 processor that has AVX2 but not the VNNI instructions."""
    flags = processor()[1]
    return "avx2" in flags and not {"avx512_vnni", "avx_vnni"} & set(flags)
