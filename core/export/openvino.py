"""OpenVINO: convert from ONNX, and run on the CPU in exactly the precision of the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    save_plain(openvino.convert_model(source), path)


def save_plain(model: Any, path: Path) -> None:
    """Write an OpenVINO model, keeping every weight's own data type."""
    import openvino

    openvino.save_model(model, path, compress_to_fp16=False)


def compile_cpu(path: Path, threads: int | None = None) -> Any:
    """Compile an IR or ONNX file for this processor, for the latency of single requests."""
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
    return core.compile_model(core.read_model(path), "CPU", config)


class OpenVINOModule(nn.Module):
    """Runs an IR file in OpenVINO; inputs are shared with the runtime, outputs are copies that stay valid."""

    def __init__(self, path: Path, threads: int | None = None, *, as_tuple: bool = True) -> None:
        super().__init__()
        compiled = compile_cpu(path, threads)
        self._names = [i.any_name for i in compiled.inputs]
        self._outputs = len(compiled.outputs)
        self._request = compiled.create_infer_request()
        self._tuple = as_tuple

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Tensors in the order of the graph's inputs -> its outputs, on the CPU."""
        if len(inputs) != len(self._names):
            raise InputError(
                f"{len(inputs)} inputs given, the graph takes {len(self._names)}: {', '.join(self._names)}"
            )
        arrays = [t.detach().cpu().contiguous().numpy() for t in inputs]
        found = self._request.infer(arrays, share_inputs=True, share_outputs=False)
        results = tuple(torch.from_numpy(found[i]) for i in range(self._outputs))
        return results if self._tuple else results[0]
