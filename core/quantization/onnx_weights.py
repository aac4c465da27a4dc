"""Store an exported model's quantized weights as integers, and halved ones in FP16."""

from __future__ import annotations

from typing import Any


def pack_weights(model: Any) -> int:
    """Replace every QuantizeLinear of a constant by its int8 or uint8 result, in place; returns how many.

    `model` is an onnx.ModelProto that came from `torch.onnx.export(quantized_model, ..., dynamo=True)`, where
    float weights go through QuantizeLinear and DequantizeLinear: afterwards only the DequantizeLinear is left,
    and the file holds the weights as bytes. Call it on every graph before it is saved or handed to a runtime.
    External data must have been loaded.
    """
    import onnx
    from onnx import helper, numpy_helper
    from onnx.reference import ReferenceEvaluator

    graph = model.graph
    constants = {i.name: i for i in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}

    def constant_nodes(name: str) -> list[Any] | None:
        """The nodes that make a value from initializers alone, in order; None if an input takes part."""
        if name in constants or name == "":
            return []
        if name not in producers:
            return None
        node = producers[name]
        found: list[Any] = []
        for source in node.input:
            before = constant_nodes(source)
            if before is None:
                return None
            found += [n for n in before if n not in found]
        return [*found, node]

    packed = 0
    for node in [n for n in graph.node if n.op_type == "QuantizeLinear"]:
        nodes = constant_nodes(node.output[0])
        if nodes is None:
            continue
        used = {name for n in nodes for name in n.input}
        output = helper.make_empty_tensor_value_info(node.output[0])
        part = helper.make_graph(nodes, "weight", [], [output], [constants[n] for n in used if n in constants])
        part_model = helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version)
        results: Any = ReferenceEvaluator(part_model).run(None, {})
        tensor = numpy_helper.from_array(results[0], node.output[0])
        graph.node.remove(node)
        graph.initializer.append(tensor)
        packed += 1
    _drop_unused(graph)
    onnx.checker.check_model(model)
    return packed


def halve_weights(model: Any) -> int:
    """Store every FP32 initializer whose numbers FP16 holds exactly in FP16, with a Cast behind it; returns how many.

    Nothing changes in what the graph computes, so layers of `core.quantization.half` take two bytes a weight and no
    others change. Constants of fewer than 64 elements and those of quantized products stay as they are. The Cast's
    output has the initializer's old name.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    from_integers = {o for node in graph.node if node.op_type == "DequantizeLinear" for o in node.output}
    bound = {name for node in graph.node if from_integers.intersection(node.input) for name in node.input}
    integers = {"QuantizeLinear", "DequantizeLinear"}
    bound |= {name for node in graph.node if node.op_type in integers for name in node.input}
    bound |= {output.name for output in graph.output}
    casts = []
    for tensor in list(graph.initializer):
        if tensor.data_type != TensorProto.FLOAT or tensor.name in bound:
            continue
        values = numpy_helper.to_array(tensor)
        if values.size < 64:
            continue
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), values):
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(half, f"{name}_fp16"))
        casts.append(helper.make_node("Cast", [tensor.name], [name], f"{name}_to_fp32", to=TensorProto.FLOAT))
    # constants are used from the first node on: their casts go before all of them
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*casts, *nodes])
    return len(casts)


def _drop_unused(graph: Any) -> None:
    """Remove nodes and initializers that no output needs."""
    needed = {output.name for output in graph.output}
    for node in reversed(list(graph.node)):
        if needed.intersection(node.output):
            needed.update(node.input)
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    needed.update(name for inner in attribute.g.node for name in inner.input)
        else:
            graph.node.remove(node)
    for initializer in list(graph.initializer):
        if initializer.name not in needed:
            graph.initializer.remove(initializer)
    for info in [v for v in graph.value_info if v.name not in needed]:
        graph.value_info.remove(info)
