"""ONNX: export with torch's dynamo exporter, and run in ONNX Runtime with a pinned number of threads."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.export.artifact import need_room
from core.kit import Graph, InputError

OPSET = 18
# protobuf cannot write a message of 2 GiB or more: larger weights go into a file of their own
SINGLE_FILE_BYTES = 1_800_000_000


def version() -> str:
    """The version of ONNX Runtime."""
    import onnxruntime

    return str(onnxruntime.__version__)


def to_onnx(module: nn.Module, graph: Graph) -> Any:
    """Export a module in eval mode to an `onnx.ModelProto` with the names of `graph`.

    Free axes of `graph.dynamic` must stay free. Raises InputError when the names do not fit the module
    or an axis came out fixed.
    """
    # it tells of every constant that it does not fold, which no user can do anything about
    logging.getLogger("onnxscript.optimizer").setLevel(logging.ERROR)
    dynamic = tuple(dict(graph.dynamic.get(name, {})) for name in graph.inputs) if graph.dynamic else None
    with torch.no_grad():
        program = torch.onnx.export(
            module,
            tuple(graph.inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=dynamic,
            verbose=False,
        )
    if program is None:
        raise RuntimeError(f"graph {graph.name!r}: torch.onnx.export returned no program")
    _register_constants(program.model.graph)
    model = program.model_proto
    for found, wanted, what in (
        ([i.name for i in model.graph.input], list(graph.inputs), "inputs"),
        ([o.name for o in model.graph.output], list(graph.outputs), "outputs"),
    ):
        if found != wanted:
            raise InputError(
                f"graph {graph.name!r}: names {what} {wanted}, but the module has {found}; mend Graph.{what}"
            )
    for value in model.graph.input:
        for axis in graph.dynamic.get(value.name, {}):
            if value.type.tensor_type.shape.dim[axis].HasField("dim_value"):
                fixed = value.type.tensor_type.shape.dim[axis].dim_value
                raise InputError(
                    f"graph {graph.name!r}: axis {axis} of {value.name!r} should be free but the module fixes it at "
                    f"{fixed}; leave it out of Graph.dynamic or mend the module"
                )
    return model


def _register_constants(graph: Any) -> None:
    """Make initializers of constants that the exporter's optimizer used and did not register, in place.

    onnxscript 0.7 names the limits of a fused Clip after the value that is clipped; where two such Clips read one
    value, the limits of the first are lost from the list of initializers.
    """
    inputs = {id(value) for value in graph.inputs}
    for node in graph:
        for value in node.inputs:
            if value is None or value.producer() is not None or id(value) in inputs or value.const_value is None:
                continue
            if graph.initializers.get(value.name) is not value:
                value.name = f"{value.name}_of_{node.name}"
                graph.register_initializer(value)


def save_onnx(model: Any, path: Path, check: bool = True) -> None:
    """Write a ModelProto and check it; weights over 1.8 GB go to "<name>.onnx.data" beside it."""
    import onnx

    weights = sum(len(t.raw_data) for t in model.graph.initializer)
    need_room(path, weights)
    if weights > SINGLE_FILE_BYTES:
        onnx.save_model(model, path, save_as_external_data=True, location=path.name + ".data", size_threshold=1024)
        # saving rewrites the tensors of `model` to point outside; take the weights back in for later passes
        onnx.load_external_data_for_model(model, str(path.parent))
    else:
        path.write_bytes(model.SerializeToString())
    if check:
        onnx.checker.check_model(str(path))


def session(path: Path, threads: int | None = None, optimized: Path | None = None) -> Any:
    """An ONNX Runtime session on the CPU; `optimized` is where it leaves the model that it really runs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.inter_op_num_threads = 1
    options.intra_op_num_threads = threads or 0
    # threads that go on spinning after a run would slow whatever runs next on the same cores
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class OnnxModule(nn.Module):
    """Runs an ONNX file in ONNX Runtime; inputs and outputs share memory with the arrays of the runtime."""

    def __init__(self, path: Path, threads: int | None = None, *, as_tuple: bool = True) -> None:
        super().__init__()
        self._session = session(path, threads)
        self._names = [i.name for i in self._session.get_inputs()]
        self._tuple = as_tuple

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Tensors in the order of the graph's inputs -> its outputs, on the CPU."""
        if len(inputs) != len(self._names):
            raise InputError(
                f"{len(inputs)} inputs given, the graph takes {len(self._names)}: {', '.join(self._names)}"
            )
        feeds = {n: t.detach().cpu().contiguous().numpy() for n, t in zip(self._names, inputs, strict=True)}
        results = tuple(torch.from_numpy(a) for a in self._session.run(None, feeds))
        return results if self._tuple else results[0]
