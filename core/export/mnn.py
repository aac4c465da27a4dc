"""MNN: convert from ONNX with float or INT4/INT8 weights, and run in MNN's Python runtime (extra `phone`)."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.compress import file_hash
from core.export.onnx import save_onnx, to_onnx
from core.export.parity import Criterion, Deviation, ParityError, Reference, deviation
from core.export.silence import silenced
from core.files import replaced
from core.kit import Graph, InputError

BITS = {"float": None, "int8": 8, "int4": 4}
# MNN's Winograd convolutions are float32 too, but sum transformed values: 1e-4 of the peak is within their rounding
FLOAT_TOLERANCE = 1e-3
# the converter writes a model out as text, every weight in it: beyond this size it is not read to count its layers
COUNTED_BYTES = 64 << 20
# The command `mnnconvert` of the package reports each use to a server of its makers, and installs a client for it with
# the first `pip` it finds. The converter itself lies in the extension module beneath, and does neither.
CONVERTER = "import sys, _tools; _tools.mnnconvert(['mnnconvert', *sys.argv[1:]])"
MISSING = "MNN is not installed; pip install 'fitkit[phone]'"


def version() -> str:
    """The version of MNN; raises InputError where it is not installed."""
    try:
        return installed("MNN")
    except ModuleNotFoundError as error:
        raise InputError(MISSING) from error


@dataclass(frozen=True)
class Converted:
    """What `to_mnn` made of a module with one kind of weights.

    `weights` is "float", "int8" or "int4"; `stored` is what `stored_weights` reads from the file (None where it is
    too large to be read). `error` compares MNN's outputs with the float module's; for
    "float" that is the parity, held to `criterion`.
    """

    file: str
    bytes: int
    sha256: str
    version: str
    weights: str
    block: int | None
    stored: dict[str, dict[str, int]] | None
    criterion: str | None
    error: dict[str, Deviation]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; deviations also as `relative`, the largest difference over the peak."""
        record = asdict(self)
        record["error"] = {
            n: {**d.to_json(), "relative": float(f"{d.max_abs / d.peak:.4g}") if d.peak else 0.0}
            for n, d in self.error.items()
        }
        return record


def to_mnn(
    module: nn.Module,
    graph: Graph,
    folder: Path | str,
    *,
    weights: Sequence[str] = ("float", "int4"),
    block: int = 64,
    tolerance: float = FLOAT_TOLERANCE,
) -> dict[str, Converted]:
    """Convert a module in eval mode to `<folder>/<graph>-<weights>.mnn` for each of `weights`, and compare with torch.

    `weights` of "float", "int8" and "int4"; integers are MNN's own, with a least value and a scale for each `block` of
    the flattened weights of a convolution or Linear; embeddings and norms stay float32. `tolerance` is the largest
    difference of the float file relative to max(1, peak). Raises ParityError beyond it, or where an output is not
    finite; InputError for wrong arguments, where the converter refuses, or without the extra `phone`.
    """
    folder = Path(folder)
    if unknown := [w for w in weights if w not in BITS]:
        raise InputError(f"to_mnn: weights {unknown[0]!r}; expected some of {', '.join(BITS)}")
    if block < 1:
        raise InputError(f"to_mnn: block {block}; expected a number of weights above 0, such as 64")
    found, inputs = {}, tuple(graph.inputs.values())
    now = version()
    wanted = Reference.of(module, inputs).outputs
    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / f"{graph.name}.onnx"
        save_onnx(to_onnx(module, graph), source)
        for kind in weights:
            began = time.perf_counter()
            path = folder / f"{graph.name}-{kind}.mnn"
            convert(source, path, BITS[kind], block)
            results = MnnModule(path, tuple(graph.inputs), graph.outputs)(*inputs)
            results = (results,) if isinstance(results, Tensor) else results
            error = {n: deviation(a, b) for n, a, b in zip(graph.outputs, wanted, results, strict=True)}
            criterion = _hold(path, kind, error, tolerance)
            size = path.stat().st_size
            stored = stored_weights(path) if size <= COUNTED_BYTES else None
            seconds = time.perf_counter() - began
            found[kind] = Converted(
                path.name, size, file_hash(path), now, kind, None if kind == "float" else block, stored,
                str(criterion) if criterion else None, error, seconds,
            )  # fmt: skip
    return found


def _hold(path: Path, kind: str, error: Mapping[str, Deviation], tolerance: float) -> Criterion | None:
    """The criterion of float weights; how much rounded ones may differ is not for a converter to judge."""
    criterion = Criterion.of("fp32", {"fp32": tolerance}) if kind == "float" else None
    for name, d in error.items():
        if criterion is not None and not criterion.holds(d):
            raise ParityError(f"{path}: output {name!r} of MNN disagrees with torch: {d}; wanted {criterion}")
        if d.sqnr <= -200:
            raise ParityError(f"{path}: output {name!r} of MNN is not finite or of another shape; leave weights float")
    return criterion


def convert(source: Path, path: Path, bits: int | None = None, block: int = 64) -> None:
    """Convert an ONNX file to an MNN file, with weights of `bits` (2 to 8) in blocks of `block`, or float32.

    Raises InputError with the converter's last words where it leaves no file.
    """
    version()
    options = ["--weightQuantBits", str(bits), "--weightQuantBlock", str(block)] if bits is not None else []
    source = Path(source).absolute()
    with replaced(Path(path).absolute()) as fresh:
        # like the command, in a process of its own: the converter may end the process that it runs in
        arguments = ["-f", "ONNX", "--modelFile", str(source), "--MNNModel", str(fresh), "--bizCode", "fitkit"]
        said = _converter([*arguments, *options])
        if not fresh.is_file() or "Converted Success" not in said:
            fresh.unlink(missing_ok=True)
            raise InputError(f"{source}: MNN's converter refused it: {_last_line(said)}")


def stored_weights(path: Path) -> dict[str, dict[str, int]]:
    """{"int4": {"layers", "weights"}, ...}: how many convolutions of an MNN file hold how many weights of which type.

    Products with a constant are convolutions there as well. Raises InputError where the converter cannot read the file.
    """
    with tempfile.TemporaryDirectory() as work:
        text = Path(work) / "model.json"
        said = _converter(
            ["-f", "MNN", "--modelFile", str(path.absolute()), "--JsonFile", str(text), "--bizCode", "fitkit"]
        )
        if not text.is_file():
            raise InputError(f"{path}: MNN's converter cannot read it: {_last_line(said)}")
        operators = json.loads(text.read_text(encoding="utf-8", errors="replace"))["oplists"]
    found: dict[str, dict[str, int]] = {}
    for record in operators:
        if record["type"] in ("Convolution", "ConvolutionDepthwise", "Deconvolution"):
            about, integers = record["main"]["common"], record["main"].get("quanParameter")
            kind = f"int{integers['aMaxOrBits']}" if integers and integers.get("aMaxOrBits") else "float32"
            count = found.setdefault(kind, {"layers": 0, "weights": 0})
            kernel = about["kernelX"] * about["kernelY"]
            count["layers"] += 1
            count["weights"] += about["outputCount"] * max(about["inputCount"] // about["group"], 1) * kernel
    return found


def _converter(arguments: Sequence[str]) -> str:
    """Everything that the converter says; it ends with 0 even where it fails. Paths among the arguments are absolute.

    It keeps weights in a file of one fixed name in the current folder meanwhile: two conversions in one folder would
    take each other's, so that each gets a folder of its own.
    """
    with tempfile.TemporaryDirectory() as own:
        command = [sys.executable, "-c", CONVERTER, *arguments]
        ran = subprocess.run(command, cwd=own, capture_output=True, text=True, errors="replace", check=False)
    return ran.stdout + ran.stderr


def _last_line(said: str) -> str:
    return (said.strip().splitlines() or ["no message"])[-1].strip()


class MnnModule(nn.Module):
    """Runs an MNN file on the CPU in float32 arithmetic, with integer weights expanded when it is loaded.

    `inputs` and `outputs` are the names in the ONNX file, in the order of `forward`. Integer tensors are passed as
    INT32, the only kind of MNN. Another number of inputs raises InputError.
    """

    def __init__(self, path: Path | str, inputs: Sequence[str], outputs: Sequence[str], threads: int = 1) -> None:
        super().__init__()
        version()
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file; convert a module with to_mnn first")
        with silenced():
            import MNN

            self._expr = MNN.expr
            self._net = MNN.nn.load_module_from_file(
                str(path),
                list(inputs),
                list(outputs),
                # anything lower lets MNN choose FP16 or BF16 arithmetic where the processor has it
                precision_mode=MNN.expr.PrecisionMode.High,
                thread_num=threads,
            )
        self._names = tuple(inputs)

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Tensors in the order of the given names -> the outputs, on the CPU."""
        if len(inputs) != len(self._names):
            raise InputError(f"{len(inputs)} inputs given, the file takes {len(self._names)}: {', '.join(self._names)}")
        results = self._net.forward([self._variable(t) for t in inputs])
        results = results if isinstance(results, list | tuple) else [results]
        outputs = tuple(torch.from_numpy(np.array(self._expr.convert(r, self._expr.NCHW).read())) for r in results)
        return outputs if len(outputs) > 1 else outputs[0]

    def _variable(self, tensor: Tensor) -> Any:
        array = tensor.detach().cpu().contiguous().numpy()
        integer = not tensor.dtype.is_floating_point
        array = array.astype(np.int32 if integer else np.float32, copy=False)
        kind = self._expr.int if integer else self._expr.float
        return self._expr.const(array, list(array.shape), self._expr.NCHW, kind)
