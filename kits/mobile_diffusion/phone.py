"""The text encoder, the UNet's step and the VAE's decoder as files for phones, run and timed here in the same runtimes.

    python -m kits.mobile_diffusion.phone FOLDER OUT [--formats executorch mnn] [--weights float int4]

What is left to do on a phone is in PHONE.md; `phone_measure.py` does it there.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.evaluation.bench import available_cores, bench
from core.evaluation.measure import device
from core.export import executorch, mnn
from core.export.artifact import list_files, replacing, write_manifest
from core.export.parity import Reference, described
from core.figures import Figure, Figures, today
from core.kit import Graph, InputError
from core.quantization.packed import expand, packed_layers
from kits.mobile_diffusion import phone_measure
from kits.mobile_diffusion.model.pipeline import Diffusion, load_diffusion, unet_prediction

FORMATS = ("executorch", "mnn")
WEIGHTS = ("float", "int4")
# what -inf stands for in the causal mask: no score reaches it, and FP16 arithmetic on a phone can hold it
MASKED = -1e4
INT4_WHERE = (
    "ExecuTorch's int4: Linear layers at 4 bits in groups of 32, convolutions at 8 bits (XNNPACK has no INT4 "
    "convolution); MNN's int4: convolutions and Linear layers at 4 bits in blocks of 64. Both round the float weights "
    "anew; a packed layer is first expanded to floats, so its own integers are not in these files."
)


class TextEncoderPart(nn.Module):
    """token ids (N, L) -> hidden states (N, L, D); positions and the causal mask are constants."""

    positions: Tensor
    mask: Tensor

    def __init__(self, text_encoder: Any, length: int) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.register_buffer("positions", torch.arange(length).unsqueeze(0))
        self.register_buffer("mask", torch.full((1, 1, length, length), MASKED).triu(1))

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.text_encoder(
            token_ids, attention_mask=self.mask, position_ids=self.positions, return_dict=False
        )[0]  # fmt: skip


class UNetPart(nn.Module):
    """latents (N, C, h, w), timesteps (N,) as floats, hidden states (N, L, D) -> prediction (N, C, h, w)."""

    def __init__(self, unet: Any, guidance: float) -> None:
        super().__init__()
        self.unet = unet
        self.guidance = guidance

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        return unet_prediction(self.unet, latents, timesteps, text, self.guidance)


class DecoderPart(nn.Module):
    """latents (1, C, h, w) as the sampler leaves them -> picture (1, 3, H, W) in [-1, 1]."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]


@dataclass(frozen=True)
class Part:
    """One file's worth of a model: its module in float32, its graph with example inputs, and its calls a picture."""

    module: nn.Module
    graph: Graph
    calls: int
    weights_from: str

    def __post_init__(self) -> None:
        self.module.eval()


def parts(model: Diffusion, seed: int = 0) -> Iterator[Part]:
    """The three parts in the order in which they run, each a float32 copy, so that the model stays as it is.

    With classifier-free guidance N is 2 (without words and with them), else 1.
    """
    config, draws = model.unet.config, torch.Generator().manual_seed(seed)
    guided = model.sampling.guidance > 1 and config.time_cond_proj_dim is None
    rows, side = 2 if guided else 1, config.sample_size
    length, width = model.tokenizer.model_max_length, model.text_encoder.config.hidden_size
    ids = model.tokens(["", "a red circle left of a blue square"][-rows:])
    latents = torch.randn(rows, config.in_channels, side, side, generator=draws)
    timesteps = torch.full((rows,), 500.0)
    text = torch.randn(rows, length, width, generator=draws)

    encoder, source = _floats(model.text_encoder)
    yield Part(TextEncoderPart(encoder, length), Graph("text_encoder", {"token_ids": ids}, ("text",)), 1, source)
    del encoder
    unet, source = _floats(model.unet)
    inputs = {"latents": latents, "timesteps": timesteps, "text": text}
    steps = model.sampling.steps
    yield Part(UNetPart(unet, model.sampling.guidance), Graph("unet", inputs, ("prediction",)), steps, source)
    del unet
    decoder, source = _floats(model.vae)
    decoder.encoder = nn.Identity()  # a phone that makes pictures reads none
    yield Part(DecoderPart(decoder), Graph("vae_decoder", {"latents": latents[:1]}, ("picture",)), 1, source)


def _floats(part: nn.Module) -> tuple[Any, str]:
    packed = Counter(layer.bits for layer in packed_layers(part).values())
    dtype = next(part.parameters()).dtype
    source = str(dtype).removeprefix("torch.")
    if packed:
        source = "expanded from packed layers: " + ", ".join(f"{n} of {b} bits" for b, n in sorted(packed.items()))
    return expand(copy.deepcopy(part), torch.float32).float().eval().requires_grad_(False), source


def export_phone(
    model: Diffusion,
    out: Path | str,
    *,
    formats: Sequence[str] = FORMATS,
    weights: Sequence[str] = WEIGHTS,
    threads: int = 2,
    seconds: float = 3.0,
) -> dict[str, Any]:
    """Write every part in every format into `out` with `manifest.json`, and return the manifest.

    `weights` of "float", "int8", "int4". The manifest holds the hashes, a row for each file ("table": bytes, largest
    difference from torch relative to the peak, SQNR, operators left out of XNNPACK) and interleaved timings against
    torch in about `seconds` for each part ("timing"; none with 0). An older folder stays as it was after a failure.
    Raises InputError for wrong arguments or without the extra `phone`, ParityError where a runtime disagrees.
    """
    _check(formats, weights)
    threads = min(threads, len(available_cores()))
    table: list[dict[str, Any]] = []
    about: dict[str, Any] = {}
    timing: dict[str, Any] = {}
    with replacing(Path(out)) as stage:
        for part in parts(model):
            name, inputs = part.graph.name, tuple(part.graph.inputs.values())
            reference = Reference.of(part.module, inputs)
            about[name] = {**described(part.graph, reference), "calls": part.calls, "weights_from": part.weights_from}
            _write_example(stage / "examples" / name, part.graph, reference.outputs[0])
            rows, runs = _export_part(part, stage, formats, weights, threads)
            table += rows
            if seconds > 0:
                timing[name] = _timed(part.module, inputs, runs, threads, seconds)
        manifest = {
            "format": phone_measure.FORMAT,
            "kind": phone_measure.KIND,
            "created": today(),
            "device": device(),
            "versions": {f: {"executorch": executorch.version, "mnn": mnn.version}[f]() for f in formats},
            "picture": {"steps": model.sampling.steps, "guidance": model.sampling.guidance, "pixels": model.pixels},
            "parts": about,
            "int4": INT4_WHERE,
            "table": table,
            "timing": timing,
            "files": list_files(stage),
        }
        write_manifest(stage, manifest)
    return manifest


def _check(formats: Sequence[str], weights: Sequence[str]) -> None:
    for what, found, known in (("formats", formats, FORMATS), ("weights", weights, executorch.WEIGHTS)):
        if not found:
            raise InputError(f"export_phone: no {what} given; expected some of {', '.join(known)}")
        if unknown := [f for f in found if f not in known]:
            raise InputError(f"export_phone: {what} {unknown[0]!r}; expected some of {', '.join(known)}")


def _export_part(
    part: Part, stage: Path, formats: Sequence[str], weights: Sequence[str], threads: int
) -> tuple[list[dict[str, Any]], dict[str, nn.Module]]:
    """The rows of the table of one part, and the modules that run its files."""
    rows: list[dict[str, Any]] = []
    runs: dict[str, nn.Module] = {}
    name, inputs = part.graph.name, tuple(part.graph.inputs.values())

    def row(runtime: str, kind: str, path: Path, error: Mapping[str, float], rest: Mapping[str, Any]) -> None:
        file, size = path.relative_to(stage).as_posix(), path.stat().st_size
        numbers = {"relative": error["relative"], "sqnr": error["sqnr"], **rest}
        rows.append({"part": name, "runtime": runtime, "weights": kind, "file": file, "bytes": size, **numbers})

    if "executorch" in formats:
        for kind in weights:
            path = stage / "executorch" / f"{name}-{kind}.pte"
            found = executorch.to_executorch(part.module, inputs, path, weights=kind)  # type: ignore[arg-type]
            record = found.to_json()
            rest = {k: record[k] for k in ("criterion", "delegated", "subgraphs", "left", "seconds")}
            precisions = Counter(record["layers"].values())
            parity = {"parity": record["parity"][0], "layers": dict(precisions.most_common())}
            row("executorch", kind, path, record["error"][0], rest | parity)
            runs[f"executorch-{kind}"] = executorch.ExecuTorchModule(path)
    if "mnn" in formats:
        converted = mnn.to_mnn(part.module, part.graph, stage / "mnn", weights=weights)
        for kind, made in converted.items():
            path, record = stage / "mnn" / made.file, made.to_json()
            rest = {k: record[k] for k in ("criterion", "layers", "seconds")}
            row("mnn", kind, path, record["error"][part.graph.outputs[0]], rest)
            runs[f"mnn-{kind}"] = mnn.MnnModule(path, tuple(part.graph.inputs), part.graph.outputs, threads)
    return rows, runs


def _timed(
    module: nn.Module, inputs: tuple[Tensor, ...], runs: Mapping[str, nn.Module], threads: int, seconds: float
) -> dict[str, Any]:
    def call(module: nn.Module) -> Callable[[], Any]:
        return lambda: module(*inputs)

    with torch.no_grad():
        callables = {"torch": call(module)} | {name: call(run) for name, run in runs.items()}
        return bench(callables, seconds=seconds, threads=threads).to_json()


def _write_example(folder: Path, graph: Graph, output: Tensor) -> None:
    """What the runners on the phone read, and what torch makes of it: raw bytes for ExecuTorch's, text for MNN's."""
    folder.mkdir(parents=True)
    inputs = []
    for name, tensor in graph.inputs.items():
        (folder / f"{name}.bin").write_bytes(tensor.contiguous().numpy().tobytes())
        (folder / f"{name}.txt").write_text("\n".join(repr(v) for v in tensor.flatten().tolist()) + "\n")
        inputs.append({"name": name, "shape": list(tensor.shape)})
    (folder / "input.json").write_text(json.dumps({"inputs": inputs, "outputs": list(graph.outputs)}))
    (folder / "expected.bin").write_bytes(output.detach().float().contiguous().numpy().tobytes())


def measured(path: Path | str, folder: Path | str) -> Figures:
    """The figures that `phone_measure.py` wrote to `path`, if they are of the very files in `folder`.

    Raises InputError where the file is not such, or measured other files.
    """
    path = Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        figures = [Figure.from_json(f) for f in record["figures"]]
        runtime, weights, artifact = record["runtime"], record["weights"], record["artifact"]
        manifest = phone_measure.read_manifest(Path(folder))
        now = phone_measure.artifact_hash(phone_measure.chosen_files(manifest, runtime, weights))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); measure with phone_measure.py") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no measurement for {folder} ({error}); measure with phone_measure.py") from error
    if now != artifact:
        raise InputError(f"{path}: measured other files than those in {folder}; measure again with phone_measure.py")
    return Figures(figures)


def text_table(manifest: Mapping[str, Any]) -> str:
    """The manifest's table in lines for a terminal; times are medians."""
    numbers = f"{'MB':>8} {'rel. error':>10} {'SQNR dB':>8} {'ms':>9} {'torch ms':>9}"
    lines = [f"{'part':13} {'runtime':11} {'weights':7} {numbers}"]
    for r in manifest["table"]:
        times = {t["name"]: t["p50"] for t in manifest["timing"].get(r["part"], {}).get("timings", ())}
        ms, base = (
            f"{times[n]:9.2f}" if n in times else "-".rjust(9) for n in (f"{r['runtime']}-{r['weights']}", "torch")
        )
        lines.append(
            f"{r['part']:13} {r['runtime']:11} {r['weights']:7} {r['bytes'] / 1e6:8.3f} {r['relative']:10.2e} "
            f"{r['sqnr']:8.1f} {ms} {base}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Export a folder and print the table; 2 where the input is wrong."""
    parser = argparse.ArgumentParser(prog="python -m kits.mobile_diffusion.phone", description=__doc__)
    parser.add_argument("folder", help="a diffusers folder, packed or not")
    parser.add_argument("out", type=Path)
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--weights", nargs="+", default=WEIGHTS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing for each part; 0 for none")
    o = parser.parse_args(arguments)
    try:
        model = load_diffusion(o.folder)
        how: dict[str, Any] = {"formats": o.formats, "weights": o.weights, "threads": o.threads, "seconds": o.seconds}
        print(text_table(export_phone(model, o.out, **how)))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
