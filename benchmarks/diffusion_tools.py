"""Other tools' 4- and 8-bit weights beside fitkit's own, on the UNet of one Stable Diffusion.

    python benchmarks/diffusion_tools.py [--model DIFFUSERS_FOLDER] [--resume] [--out DIR] [--tools NAME ...]
    python benchmarks/diffusion_tools.py --architecture sd-1.5   # random weights: bytes and seconds to compress only

Setup: every tool starts from the same FP32 weights in a process of its own and is used as its makers describe, with 64
weights to a group where it has such an option. Bytes are those of all tensors of the compressed UNet, scales and zero
points included; what a tool leaves in float counts two bytes a number for all. The error is that of the UNet's
prediction against FP32, sum of squares over sum of squares, on the same noisy latents of all noise levels with real
captions. A forward is timed in turns with FP32 in the same process and the same runtime. Leaves `tools.json` and the
table `tools.md`, made from it, in --out. A tool that is absent or fails has a row that says why.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.evaluation.bench import bench
from core.evaluation.measure import device
from core.files import read_object, write_text
from core.kit import Context, InputError
from core.progress import progress
from core.quantization.pack import Pack, float16_bytes, pack_model
from core.report.tables import markdown_tables
from kits.mobile_diffusion import shipped
from kits.mobile_diffusion.kit import MobileDiffusion
from kits.mobile_diffusion.model.architectures import ARCHITECTURE_ONLY, ARCHITECTURES, build_folder
from kits.mobile_diffusion.model.pipeline import Diffusion, load_diffusion, unet_prediction
from kits.mobile_diffusion.recipes import INT4, KEPT

GROUP = 64
INPUTS = 64
"""Predictions that are compared, at as many noise levels."""
TIMED = 2
"""Rows of the batch that is timed: one step with guidance."""
LIMIT = 3600.0
"""Seconds after which a tool is given up."""

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Noisy latents (N, C, h, w), timesteps (N,) and hidden states of text (N, L, D) to the prediction (N, C, h, w)."""


@dataclass
class Tally:
    """Bytes of a compressed UNet, and how many of its parameters are held with how many bits (0: in float)."""

    stored: int = 0
    convolutions: Counter[int] = field(default_factory=Counter)
    linear: Counter[int] = field(default_factory=Counter)
    others: int = 0  # of norms and biases, always in float

    def to_json(self) -> dict[str, Any]:
        kinds = {"convolutions": self.convolutions, "linear": self.linear}
        counts = {kind: {str(bits): n for bits, n in sorted(found.items())} for kind, found in kinds.items()}
        return {"bytes": self.stored, "parameters": {**counts, "others": self.others}}


@dataclass(frozen=True)
class Compressed:
    """What a tool made: its prediction, its bytes, and FP32 in the same runtime to time it against."""

    predict: Predict
    tally: Tally
    float_predict: Predict | None = None  # None: the FP32 UNet in torch


@dataclass(frozen=True)
class Tool:
    """A tool and a setting of it; `modules` are imported before the clock starts."""

    title: str
    package: str
    settings: Mapping[str, Any]
    compress: Callable[[Path, nn.Module, int], Compressed]
    """(diffusers folder, UNet without values that tells the layers, threads)."""
    modules: tuple[str, ...] = ()
    needs_training: bool = False
    note: str = ""


def count(plan: nn.Module, state: Mapping[str, Any]) -> Tally:
    """The tally of a state dict, for the float model that it was made of (its values are not looked at).

    A layer's bits are those of the largest integer tensor in its state; tensor subclasses are taken apart.
    """
    floats = {name for name, _ in plan.named_parameters()}
    kernels = _kernels(plan)
    largest = dict.fromkeys(kernels, 0)
    tally = Tally(others=sum(p.numel() for p in plan.parameters()) - sum(n for _, n in kernels.values()))
    for key, value in state.items():
        owner = next((name for name in _parents(key) if name in kernels), None)
        for tensor in _plain(value):
            if not tensor.is_floating_point():
                tally.stored += tensor.nbytes
                if owner is not None:
                    largest[owner] = max(largest[owner], tensor.nbytes)
            else:
                # a parameter that the tool left alone counts as FP16, in whatever it is computed here
                left = key in floats and tensor is value
                tally.stored += 2 * tensor.numel() if left else tensor.nbytes
    for name, (kind, numel) in kernels.items():
        getattr(tally, kind)[round(8 * largest[name] / numel)] += numel
    return tally


def _kernels(plan: nn.Module) -> dict[str, tuple[str, int]]:
    """Layers with a kernel: the kind of their tally and the number of weights."""
    kinds = {nn.Conv2d: "convolutions", nn.Linear: "linear"}
    return {n: (kinds[type(m)], m.weight.numel()) for n, m in plan.named_modules() if type(m) in kinds}


def _parents(key: str) -> Iterator[str]:
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


def _plain(value: Any) -> Iterator[Tensor]:
    """The plain tensors that a value holds."""
    if not isinstance(value, Tensor):
        return
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from _plain(getattr(value, name))
    else:
        yield value.data if isinstance(value, nn.Parameter) and type(value.data) is not Tensor else value


def _unet(folder: Path) -> Any:
    return load_diffusion(folder).unet


def _in_torch(unet: Any, plan: nn.Module) -> Compressed:
    return Compressed(_predict(unet), count(plan, unet.state_dict()))


def _predict(unet: Any, guidance: float = 7.5) -> Predict:
    return lambda latents, timesteps, text: unet_prediction(unet, latents, timesteps, text, guidance)


def _fitkit(step: Pack) -> Callable[[Path, nn.Module, int], Compressed]:
    def compress(folder: Path, plan: nn.Module, threads: int) -> Compressed:
        model = load_diffusion(folder)
        pack_model(model, step, Context(MobileDiffusion(model), model))
        return _in_torch(model.unet, plan)

    return compress


def _bitsandbytes(bits: int) -> Callable[[Path, nn.Module, int], Compressed]:
    def compress(folder: Path, plan: nn.Module, threads: int) -> Compressed:
        nn4 = importlib.import_module("bitsandbytes").nn
        unet = _unet(folder)
        for name, layer in [(n, m) for n, m in unet.named_modules() if type(m) is nn.Linear]:
            sizes = layer.in_features, layer.out_features, layer.bias is not None
            if bits == 4:
                new = nn4.Linear4bit(*sizes, quant_type="nf4", compute_dtype=torch.float32)
            else:
                new = nn4.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
            new.load_state_dict(layer.state_dict())
            unet.set_submodule(name, new.to("cpu"))  # `to` is where bitsandbytes quantizes
        return _in_torch(unet.eval(), plan)

    return compress


def _torchao(folder: Path, plan: nn.Module, threads: int) -> Compressed:
    from diffusers import TorchAoConfig, UNet2DConditionModel
    from torchao.quantization import Int4WeightOnlyConfig

    config = TorchAoConfig(Int4WeightOnlyConfig(group_size=GROUP))
    unet = UNet2DConditionModel.from_pretrained(
        folder / "unet", quantization_config=config, torch_dtype=torch.bfloat16, local_files_only=True
    ).eval()

    def predict(latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        return unet_prediction(unet, latents.bfloat16(), timesteps, text.bfloat16(), 7.5).float()

    return Compressed(predict, count(plan, unet.state_dict()))


def _torchao_unpacked(folder: Path, plan: nn.Module, threads: int) -> Compressed:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    unet = _unet(folder)

    def fits(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and module.in_features % GROUP == 0

    four: torch.dtype = torch.int4  # type: ignore[attr-defined]  # torch's own stubs leave it out
    quantize_(unet, IntxWeightOnlyConfig(weight_dtype=four, granularity=PerGroup(GROUP)), filter_fn=fits)
    return _in_torch(unet, plan)


def _quanto(folder: Path, plan: nn.Module, threads: int) -> Compressed:
    quanto = importlib.import_module("optimum.quanto")
    unet = _unet(folder)
    quanto.quantize(unet, weights=quanto.qint4)
    quanto.freeze(unet)
    return _in_torch(unet, plan)


def _nncf(folder: Path, plan: nn.Module, threads: int) -> Compressed:
    import nncf
    import openvino

    class Plain(nn.Module):
        """The UNet with tensors in and out, as the converter wants it."""

        def __init__(self) -> None:
            super().__init__()
            self.unet = _unet(folder)

        def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
            return unet_prediction(self.unet, latents, timesteps, text, 7.5)

    with torch.no_grad():
        model = openvino.convert_model(Plain().eval(), example_input=_examples(plan))
    whole = model.clone()  # NNCF changes the model in place
    small = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=GROUP)
    return Compressed(_openvino(small, threads), count_openvino(small, plan), _openvino(whole, threads))


def _examples(plan: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of the right shapes for tracing."""
    config: Any = plan.config
    side, width = config.sample_size, config.cross_attention_dim
    return torch.zeros(TIMED, config.in_channels, side, side), torch.zeros(TIMED).long(), torch.zeros(TIMED, 77, width)


def _openvino(model: Any, threads: int) -> Predict:
    """An OpenVINO model as a prediction, compiled when first asked for one."""
    import openvino

    compiled: list[Any] = []

    def predict(latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        if not compiled:
            options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
            compiled.append(openvino.Core().compile_model(model, "CPU", options))
        return torch.from_numpy(compiled[0]([latents.numpy(), timesteps.numpy(), text.numpy()])[0].copy())

    return predict


def count_openvino(model: Any, plan: nn.Module) -> Tally:
    """The tally of an OpenVINO model: its constants, each counted once, float32 as FP16; kernels by who takes them."""
    kernels = {"Convolution": "convolutions", "GroupConvolution": "convolutions", "MatMul": "linear"}
    tally = Tally()
    seen: set[str] = set()
    for op in model.get_ops():
        if op.get_type_name() == "Constant":
            kind = op.get_element_type()
            # shapes and axes are part of the graph, not of the weights
            if kind.get_type_name() in ("i64", "i32", "boolean"):
                continue
            numel = math.prod(op.get_shape())
            tally.stored += math.ceil(numel * (16 if kind.is_real() else kind.bitwidth) / 8)
        if op.get_type_name() not in kernels:
            continue
        for source in op.inputs()[-1:] if op.get_type_name() != "MatMul" else op.inputs():
            constant = _constant(source.get_source_output().get_node())
            if constant is None or constant.get_friendly_name() in seen:
                continue
            seen.add(constant.get_friendly_name())
            kind = constant.get_element_type()
            bits = 0 if kind.is_real() else kind.bitwidth
            getattr(tally, kernels[op.get_type_name()])[bits] += math.prod(constant.get_shape())
    held = tally.convolutions.total() + tally.linear.total()
    expected = sum(n for _, n in _kernels(plan).values())
    if held != expected:
        raise InputError(f"OpenVINO model: found {held:,} weights in convolutions and products, expected {expected:,}")
    tally.others = sum(p.numel() for p in plan.parameters()) - held
    return tally


def _constant(node: Any) -> Any:
    """The constant that a weight is computed from, or None."""
    while node.get_type_name() in ("Convert", "Multiply", "Subtract", "Reshape", "Transpose", "Unsqueeze", "Squeeze"):
        node = node.input(0).get_source_output().get_node()
    return node if node.get_type_name() == "Constant" else None


_REST = ("text_encoder.*=16", "vae.*=16", *(text for text in KEPT if text.startswith("unet.")))
"""Only the UNet is compared; in it the kit's recipes keep first and last layer in FP16, the time embedding in INT8."""
_GROUPS = {"group_size": GROUP}
_FOUND: dict[str, Any] = {**_GROUPS, "overrides": list(_REST)}


def _packed(title: str, bits: int, rounding: str, **more: Any) -> Tool:
    step = Pack(bits=bits, group_size=GROUP, overrides=_REST, rounding=rounding, **more)  # type: ignore[arg-type]
    settings = {"step": "Pack", "bits": bits, "rounding": rounding, **_FOUND, **more}
    return Tool(title, "fitkit", settings, _fitkit(step), needs_training=step.needs_inputs)


def _mixed(folder: Path, plan: nn.Module, threads: int) -> Compressed:
    """4, 8 and 16 bits by measured sensitivity within the bytes that "fitkit INT4" takes."""
    context = Context(MobileDiffusion(load_diffusion(folder)), load_diffusion(folder))
    uniform = load_diffusion(folder)
    pack_model(uniform, Pack(group_size=GROUP, overrides=_REST, rounding="nearest"), context)
    step = replace(
        INT4, overrides=("text_encoder.*=16", "vae.*=16"), budget_share=None, budget_mb=float16_bytes(uniform) / 1e6
    )
    return _fitkit(step)(folder, plan, threads)


_LAYERS = "its own layers: diffusers' BitsAndBytesConfig asks for a GPU"
TOOLS: dict[str, Tool] = {
    "fitkit-int4": _packed("fitkit INT4, nearest", 4, "nearest"),
    "fitkit-int4-compensated": _packed(
        "fitkit INT4, compensated", 4, "compensated",
        bias_correction=True, samples=INT4.samples, batch_size=INT4.batch_size,
    ),
    "fitkit-int4-mixed": Tool(
        "fitkit INT4, INT8, FP16 by sensitivity", "fitkit",
        {"step": "Pack", "candidates": list(INT4.candidates), "bytes": "those of fitkit INT4", **_GROUPS}, _mixed,
        needs_training=True,
    ),
    "fitkit-int8": _packed("fitkit INT8, nearest", 8, "nearest"),
    "bitsandbytes-nf4": Tool(
        "bitsandbytes NF4", "bitsandbytes",
        {"layer": "Linear4bit", "quant_type": "nf4", "blocksize": 64, "compress_statistics": True},
        _bitsandbytes(4), ("bitsandbytes",), note=_LAYERS,
    ),
    "bitsandbytes-int8": Tool(
        "bitsandbytes INT8", "bitsandbytes", {"layer": "Linear8bitLt", "threshold": 6.0}, _bitsandbytes(8),
        ("bitsandbytes",), note=_LAYERS,
    ),
    "torchao-int4": Tool(
        "torchao INT4", "torchao", {"config": "Int4WeightOnlyConfig", "group_size": GROUP, "dtype": "bfloat16"},
        _torchao, ("torchao.quantization",),
    ),
    "torchao-intx": Tool(
        "torchao INT4 values", "torchao",
        {"config": "IntxWeightOnlyConfig", "weight_dtype": "int4", "group_size": GROUP},
        _torchao_unpacked, ("torchao.quantization",), note="a byte holds each 4-bit value",
    ),
    "nncf-int4": Tool(
        "NNCF INT4", "nncf", {"mode": "INT4_SYM", "group_size": GROUP, "runtime": "OpenVINO"}, _nncf,
        ("nncf", "openvino"), note="in OpenVINO, against FP32 in OpenVINO",
    ),
    "quanto-int4": Tool(
        "quanto INT4", "optimum-quanto", {"weights": "qint4", "group_size": "the tool's own choice"}, _quanto,
        ("optimum.quanto",),
    ),
}  # fmt: skip


def measure(
    tool: Tool, folder: Path, *, sizes_only: bool = False, inputs: int = INPUTS, seconds: float = 10.0, threads: int = 1
) -> dict[str, Any]:
    """One row: version, settings, and the figures, or "why" there are none."""
    row: dict[str, Any] = {"title": tool.title, "package": tool.package, "settings": dict(tool.settings)}
    try:
        row["version"] = importlib.metadata.version(tool.package)
    except importlib.metadata.PackageNotFoundError:
        return row | {"why": f"not installed; pip install {tool.package}"}
    if sizes_only and tool.needs_training:
        return row | {"why": f"not run: calibration says nothing of random weights ({ARCHITECTURE_ONLY})"}
    torch.set_num_threads(threads)
    try:
        return row | _figures(tool, folder, sizes_only, inputs, seconds, threads)
    except Exception as error:  # noqa: BLE001  a tool may raise whatever it likes: the row says it
        return row | {"why": f"{type(error).__name__}: {_first_line(str(error))}"}


def _figures(tool: Tool, folder: Path, sizes_only: bool, inputs: int, seconds: float, threads: int) -> dict[str, Any]:
    plan = _plan(folder)
    for name in tool.modules:
        importlib.import_module(name)
    began, worked = time.perf_counter(), time.process_time()
    with torch.no_grad() if not tool.needs_training else torch.enable_grad():
        made = tool.compress(folder, plan, threads)
    found: dict[str, Any] = {
        "compress_seconds": round(time.perf_counter() - began, 3),
        "compress_cpu_seconds": round(time.process_time() - worked, 3),
        **made.tally.to_json(),
    }
    if tool.note:
        found["note"] = tool.note
    if sizes_only:
        return found
    original = load_diffusion(folder)
    batch = _inputs(original, inputs)
    reference = _predict(original.unet)
    with torch.no_grad():  # not inference_mode: quanto makes its weights anew in a forward
        found |= error(_in_parts(reference, batch), _in_parts(made.predict, batch))
        few = tuple(t[:TIMED] for t in batch)
        against = made.float_predict or reference
        timed = bench(
            {"float": lambda: against(*few), "compressed": lambda: made.predict(*few)}, seconds=seconds,
            threads=threads, label=tool.title,
        )  # fmt: skip
    return found | {"forward": {**vars(timed.ratios["compressed", "float"]), **timed.to_json()}}


def _plan(folder: Path) -> nn.Module:
    """The UNet without memory for its values."""
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel

    config = UNet2DConditionModel.load_config(folder / "unet", local_files_only=True)
    with init_empty_weights():
        plan: nn.Module = UNet2DConditionModel.from_config(config)
    return plan


def _inputs(model: Diffusion, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, timesteps and text states of validation scenes, which calibration does not see; seeded."""
    kit = MobileDiffusion(model)
    scenes = kit.dataset(None, "val", "full")[:number]
    batch = next(iter(kit.batches(scenes, number, train=False)))
    latents, timesteps, ids = kit.inputs(batch)
    with torch.no_grad():
        return latents.clone(), timesteps.clone(), model.encode(ids).clone()


def _in_parts(predict: Predict, batch: tuple[Tensor, ...]) -> Tensor:
    parts = [predict(*part) for part in zip(*(t.split(8) for t in batch))]
    return torch.cat([part.float() for part in parts])


def error(expected: Tensor, found: Tensor) -> dict[str, float | None]:
    """The relative squared error of a prediction and the same in dB; None where there is no error at all."""
    if not bool(torch.isfinite(found).all()):
        raise ArithmeticError("the prediction holds NaN or Inf")
    relative = float((found.double() - expected.double()).square().sum() / expected.double().square().sum())
    return {"relative_error": relative, "sqnr_db": -10 * math.log10(relative) if relative else None}


def run_apart(command: Sequence[str], answer: Path, limit: float = LIMIT) -> dict[str, Any]:
    """Run a process that writes a row to `answer`; a row with "why" where it dies before."""
    with tempfile.TemporaryFile(mode="w+") as said:
        try:
            done = subprocess.run(command, stdout=said, stderr=subprocess.STDOUT, timeout=limit, check=False)
        except subprocess.TimeoutExpired:
            return {"why": f"not done after {limit:.0f} s"}
        if done.returncode == 0 and answer.is_file():
            return read_object(answer, "run again")
        said.seek(0)
        lines = [line for line in said.read().splitlines() if line.strip()]
    if done.returncode < 0:
        return {"why": f"its process was ended by {signal.Signals(-done.returncode).name}"}
    return {"why": _first_line(lines[-1]) if lines else f"its process ended with status {done.returncode}"}


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0][:200]


def table(results: Mapping[str, Any]) -> str:
    """The results as a Markdown table."""
    whole = results["parameters"]
    rows = [_row(row, whole) for row in results["tools"].values()]
    named = results["architecture"]
    architecture = f" ({named}, random weights: {ARCHITECTURE_ONLY})" if named else ""
    shown = {
        "title": f"UNet of {whole:,} parameters, FP32 {4 * whole / 1e6:.2f} MB{architecture}",
        "columns": [
            "tool", "MB", "bits a weight", "at 4 bit", "at 8 bit", "in float", "convolutions", "relative error",
            "SQNR [dB]", "compress [s] (of CPU)", "forward, FP32 = 1", "remark",
        ],
        "rows": rows,
        "note": "MB: all tensors of the compressed UNet, scales included; what stays in float at FP16. Shares are of "
        "all parameters. Error: of the prediction against FP32, all tools on the same "
        f"{results['inputs']} noisy latents with captions. Seconds to compress include reading the weights "
        f"and, for OpenVINO, converting. {results['device']}, threads: {results['threads']}.",
    }  # fmt: skip
    return markdown_tables({"tables": [shown]})


def _row(row: Mapping[str, Any], whole: int) -> list[str]:
    name = " ".join([row["title"], *([f"({row['version']})"] if "version" in row else [])])
    if "why" in row:
        return [name, *[""] * 10, row["why"]]
    counts = row["parameters"]
    at = Counter({0: counts["others"]})
    for kind in ("convolutions", "linear"):
        at.update({int(bits): n for bits, n in counts[kind].items()})
    shares = [f"{100 * at[bits] / whole:.1f} %" for bits in (4, 8, 0)]
    measured = ["", "", ""]
    if "relative_error" in row:
        decibels = row["sqnr_db"]
        measured = [f"{row['relative_error']:.2e}", "" if decibels is None else f"{decibels:.1f}", ""]
        ratio = row["forward"]
        measured[2] = f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
    seconds = f"{row['compress_seconds']:.1f} ({row['compress_cpu_seconds']:.1f})"
    return [
        name, f"{row['bytes'] / 1e6:.2f}", f"{8 * row['bytes'] / whole:.2f}", *shares, _held(counts["convolutions"]),
        *measured[:2], seconds, measured[2], row.get("note", ""),
    ]  # fmt: skip


def _held(counts: Mapping[str, int]) -> str:
    """ "4 bit 98 %, float 2 %"."""
    total = sum(counts.values())
    parts = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{f'{bits} bit' if bits != '0' else 'float'} {100 * n / total:.1f} %" for bits, n in parts)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", type=Path, help="a diffusers folder; the kit's shipped model unless told")
    options.add_argument("--architecture", choices=ARCHITECTURES, help="random weights: bytes and seconds only")
    options.add_argument("--out", type=Path, default=Path("runs/diffusion_tools"))
    options.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS), metavar="NAME")
    options.add_argument("--seconds", type=float, default=10.0, help="of timing each tool's forward")
    options.add_argument("--inputs", type=int, default=INPUTS, help="predictions that are compared")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--resume", action="store_true", help="keep the rows that a run with the same options left")
    options.add_argument("--alone", type=Path, help=argparse.SUPPRESS)  # one tool, in this process, to this file
    given = options.parse_args()
    try:
        if given.alone:
            row = measure(
                TOOLS[given.tools[0]], given.model, sizes_only=given.architecture is not None, inputs=given.inputs,
                seconds=given.seconds, threads=given.threads,
            )  # fmt: skip
            write_text(given.alone, json.dumps(row) + "\n")
        else:
            print(compare_tools(given))
    except InputError as failed:
        sys.exit(str(failed))


def compare_tools(given: argparse.Namespace) -> str:
    """Run every tool in a process of its own and write both files; returns the table."""
    folder = _folder(given)
    plan = _plan(folder)
    results: dict[str, Any] = {
        "parameters": sum(p.numel() for p in plan.parameters()),
        "architecture": given.architecture,
        "device": device(),
        "torch": torch.__version__,
        "threads": given.threads,
        "inputs": given.inputs,
        "tools": {},
    }
    asked = {"model": str(folder), **{k: getattr(given, k) for k in ("architecture", "inputs", "seconds", "threads")}}
    note = given.out / "rows" / "asked.json"
    kept = given.resume and note.is_file() and read_object(note, "leave out --resume") == asked
    write_text(note, json.dumps(asked) + "\n")
    with progress("tools", len(given.tools)) as bar:
        for name in given.tools:
            answer = given.out / "rows" / f"{name}.json"
            if not kept:
                answer.unlink(missing_ok=True)
            command = [
                sys.executable, __file__, "--alone", str(answer), "--model", str(folder), "--tools", name,
                "--seconds", str(given.seconds), "--threads", str(given.threads), "--inputs", str(given.inputs),
            ]  # fmt: skip
            if given.architecture:
                command += ["--architecture", given.architecture]
            load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
            row = read_object(answer, "leave out --resume") if answer.is_file() else run_apart(command, answer)
            results["tools"][name] = {"title": TOOLS[name].title, "load_average": load, **row}
            write_text(given.out / "tools.json", json.dumps(results, indent=1) + "\n")
            bar.advance(TOOLS[name].title)
    text = table(results)
    write_text(given.out / "tools.md", text + "\n")
    return text


def _folder(given: argparse.Namespace) -> Path:
    if given.architecture:
        folder: Path = given.model or given.out / given.architecture
        if not (folder / "model_index.json").is_file():
            build_folder(given.architecture, folder)
        return folder.resolve()
    folder = given.model or shipped.DEFAULT
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{folder}: no diffusers folder (model_index.json is missing); name one with --model")
    return folder.resolve()


if __name__ == "__main__":
    main()
