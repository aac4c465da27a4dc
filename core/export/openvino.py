"""OpenVINO: convert from ONNX, and run on the CPU in exactly the precision of the file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.export.artifact import need_room
from core.kit import InputError


def version() -> str:
    """The version of OpenVINO, without its build number."""
    import openvino

    return str(openvino.get_version()).split("-", maxsplit=1)[0]


def save_ir(source: Path, path: Path) -> None:
    """Convert an ONNX file to OpenVINO's "<name>.xml" and "<name>.bin", keeping every weight's own data type."""
    import openvino

    weights = source.with_suffix(".onnx.data")
    need_room(path, source.stat().st_size + (weights.stat().st_size if weights.exists() else 0))
    openvino.save_model(openvino.convert_model(source), path, compress_to_fp16=False)


def compile_cpu(source: Any, threads: int | None = None) -> Any:
    """Compile an IR or ONNX file, or a model that was read, for this processor and the latency of single requests."""
    import openvino

    config: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        # without these two the plugin may run float layers in bf16, f16 or INT8 where the processor has them
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }
    if threads is not None:
        config["INFERENCE_NUM_THREADS"] = threads
    core = openvino.Core()
    return core.compile_model(core.read_model(source) if isinstance(source, Path) else source, "CPU", config)


def takes_bytes(module: nn.Module) -> bool:
    """Whether a module divides images of bytes by 255 itself, see `OpenVINOModule`."""
    return bool(getattr(module, "takes_bytes", False))


class OpenVINOModule(nn.Module):
    """Runs an IR file, or a model that was read, in OpenVINO, compiled when it is first called.

    Inputs are shared with the runtime, outputs are copies that stay valid. A tensor of uint8 for an input of floats
    stands for its values over 255: the graph divides, so that no image of floats is written beside that of bytes.
    """

    takes_bytes = True

    def __init__(self, source: Any, threads: int | None = None, *, as_tuple: bool = True) -> None:
        super().__init__()
        import openvino

        self._model = openvino.Core().read_model(source) if isinstance(source, Path) else source
        self._names = [i.any_name for i in self._model.inputs]
        self._floats = [i.element_type.is_real() for i in self._model.inputs]
        self._threads, self._tuple = threads, as_tuple
        self._requests: dict[tuple[bool, ...], Any] = {}

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Tensors in the order of the graph's inputs -> its outputs, on the CPU."""
        if len(inputs) != len(self._names):
            raise InputError(
                f"{len(inputs)} inputs given, the graph takes {len(self._names)}: {', '.join(self._names)}"
            )
        arrays = [t.detach().cpu().contiguous().numpy() for t in inputs]
        as_bytes = tuple(a.dtype == np.uint8 and floats for a, floats in zip(arrays, self._floats, strict=True))
        if as_bytes not in self._requests:
            self._requests[as_bytes] = compile_cpu(self._taking(as_bytes), self._threads).create_infer_request()
        found = self._requests[as_bytes].infer(arrays, share_inputs=True, share_outputs=False)
        results = tuple(torch.from_numpy(found[i]) for i in range(len(self._model.outputs)))
        return results if self._tuple else results[0]

    def _taking(self, as_bytes: Sequence[bool]) -> Any:
        """The model with bytes for some of its inputs."""
        if not any(as_bytes):
            return self._model
        import openvino
        from openvino.preprocess import PrePostProcessor

        steps = PrePostProcessor(self._model.clone())
        for place, wanted in enumerate(as_bytes):
            if wanted:
                steps.input(place).tensor().set_element_type(openvino.Type.u8)
                kind = self._model.inputs[place].element_type
                steps.input(place).preprocess().convert_element_type(kind).scale(255.0)
        return steps.build()
