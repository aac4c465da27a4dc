"""An exported graph at other input shapes than those it was exported with: several crops instead of one whole image."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from core.export.artifact import Artifact
from core.kit import InputError


def reshaped(
    artifact: Artifact, shapes: Sequence[Sequence[int]], variant: str | None = None, threads: int | None = None,
    graph: str | None = None,
) -> nn.Module:  # fmt: skip
    """A module that runs one graph of an artifact for inputs of these shapes, from the very file that ships.

    For graphs whose operators depend on shapes in nothing but their own, such as convolutions; InputError where the
    runtime cannot follow the new shapes through the graph.
    """
    chosen = artifact.variant(variant)
    name = next(iter(chosen.files)) if graph is None else graph
    if name not in chosen.files:
        raise InputError(f"{artifact.folder}: no graph {name!r}; it holds {', '.join(chosen.files)}")
    path, as_tuple = artifact.folder / chosen.files[name], bool(artifact.graphs[name]["tuple"])
    known = artifact.graphs[name]["inputs"]
    if len(shapes) != len(known) or any(len(s) != len(k["shape"]) for s, k in zip(shapes, known)):
        raise InputError(f"graph {name!r}: shapes {[list(s) for s in shapes]}, expected one of each input's rank")
    try:
        if chosen.runtime == "openvino":
            return _openvino(path, shapes, threads, as_tuple)
        return _onnxruntime(path, shapes, threads, as_tuple)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001  runtimes raise types of their own
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"graph {name!r} cannot be run at {[list(s) for s in shapes]}: {why}") from error


def _openvino(path: Path, shapes: Sequence[Sequence[int]], threads: int | None, as_tuple: bool) -> nn.Module:
    import openvino

    from core.export.openvino import OpenVINOModule

    model = openvino.Core().read_model(path)
    model.reshape({given.any_name: list(shape) for given, shape in zip(model.inputs, shapes)})
    return OpenVINOModule(model, threads, as_tuple=as_tuple)


def _onnxruntime(path: Path, shapes: Sequence[Sequence[int]], threads: int | None, as_tuple: bool) -> nn.Module:
    import onnx

    from core.export.onnx import OnnxModule

    model = onnx.load(path)
    for given, shape in zip(model.graph.input, shapes):
        _set(given, shape)
    for made in model.graph.output:
        made.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]  # the shapes between, which no longer hold
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "reshaped.onnx"
        onnx.save_model(model, place)
        return OnnxModule(place, threads, as_tuple=as_tuple)


def _set(value: Any, shape: Sequence[int]) -> None:
    dims = value.type.tensor_type.shape.dim
    for dim, size in zip(dims, shape):
        dim.Clear()
        dim.dim_value = int(size)
