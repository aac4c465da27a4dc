"""The text encoder, the UNet's step and the VAE's decoder as files for phones, run here in the phone's runtimes.

    python -m kits.mobile_diffusion.phone RUN --out DIR [--formats executorch mnn] [--weights float int4]

RUN is what `fitkit run` or `fitkit train` left, or a diffusers folder. What is left to do on a phone is in PHONE.md;
`phone_measure.py` does it there.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from core.evaluation.measure import device
from core.export import Artifact, executorch, mnn
from core.export.artifact import list_files, replacing, write_manifest
from core.export.parity import ParityError, Reference, described
from core.figures import today
from core.kit import Graph, InputError
from core.progress import progress
from core.quantization.packed import expand, packed_layers
from kits.mobile_diffusion import phone_measure
from kits.mobile_diffusion.fidelity import psnr
from kits.mobile_diffusion.generate import generate
from kits.mobile_diffusion.model.pipeline import Diffusion, load_diffusion, unet_prediction

PARTS = ("text_encoder", "unet", "vae_decoder")
FORMATS = ("executorch", "mnn")
WEIGHTS = ("float", "int4")
# what -inf stands for in the causal mask: no score reaches it, and FP16 arithmetic on a phone can hold it
MASKED = -1e4
INT4_WHERE = (
    "ExecuTorch's int4: Linear layers at 4 bits in groups of 32, convolutions at 8 bits (XNNPACK has no INT4 "
    "convolution); MNN's int4: convolutions and Linear layers at 4 bits in blocks of 64. Both round the float weights "
    "anew; a packed layer is first expanded to floats, so its own integers are not in these files. The set int4 has "
    "the VAE's decoder at 8 bits."
)
IN_SET = {"int4": {"vae_decoder": "int8"}}
"""Where a set of files has other weights than its name says: a decoder of 4 bits spoils every picture."""
PROMPT, SEED = "a red circle left of a blue square", 7
LEAST_PSNR = 40.0
"""In dB, of the picture that float files draw against torch's: one level of 255 everywhere is 48 dB."""


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
    length = model.tokenizer.model_max_length
    ids = model.tokens(["", PROMPT][-rows:])
    latents = torch.randn(rows, config.in_channels, side, side, generator=draws)
    timesteps = _timesteps(model)[:1].float().repeat(rows)
    with torch.no_grad():
        text = model.encode(ids).float()

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


def _timesteps(model: Diffusion) -> Tensor:
    scheduler = copy.deepcopy(model.scheduler)
    scheduler.set_timesteps(model.sampling.steps)
    found: Tensor = scheduler.timesteps
    return found


def _floats(part: nn.Module) -> tuple[Any, str]:
    packed = Counter(layer.bits for layer in packed_layers(part).values())
    dtype = next(part.parameters()).dtype
    source = str(dtype).removeprefix("torch.")
    if packed:
        source = "expanded from packed layers: " + ", ".join(f"{n} of {b} bits" for b, n in sorted(packed.items()))
    floats = expand(copy.deepcopy(part), torch.float32)
    nn.Module.float(floats)  # the method of transformers refuses a model whose config says that it was packed
    return floats.eval().requires_grad_(False), source


def export_phone(
    model: Diffusion,
    out: Path | str,
    *,
    formats: Sequence[str] = FORMATS,
    weights: Sequence[str] = WEIGHTS,
    threads: int = 1,
    origin: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write every part in every format into `out` with `manifest.json`, and return the manifest.

    `weights` are sets of files: "float", "int8", or "int4" with the decoder at 8 bits; `threads` of MNN here. The
    manifest holds the hashes, a row for each file ("table": bytes, largest difference from torch relative to the peak,
    SQNR, weights by type as read from the file, operators left out of XNNPACK) and, for each runtime and set, the PSNR
    of a whole picture drawn by the three files against torch's ("pictures", which lie beside it). `origin` is where the
    model comes from, see `source`. An older folder stays as it was after a failure. Raises InputError for wrong
    arguments or without the extra `phone`, ParityError where a runtime disagrees.
    """
    _check(formats, weights)
    table: list[dict[str, Any]] = []
    about: dict[str, Any] = {}
    sets = {w: {part: IN_SET.get(w, {}).get(part, w) for part in PARTS} for w in weights}
    kinds = [(f, w) for f in formats for w in weights]
    with replacing(Path(out)) as stage, progress("files for phones", len(PARTS) * len(formats) + len(kinds)) as bar:
        for part in parts(model):
            name, inputs = part.graph.name, tuple(part.graph.inputs.values())
            reference = Reference.of(part.module, inputs)
            about[name] = {**described(part.graph, reference), "calls": part.calls, "weights_from": part.weights_from}
            del reference
            _write_example(stage / "examples" / name, part.graph)
            for runtime in formats:
                bar.advance(f"{runtime} {name}", steps=0)
                made = _export_part(part, stage, runtime, list(dict.fromkeys(s[name] for s in sets.values())))
                for row in made:
                    run = _load(stage / row["file"], about[name], runtime, threads)
                    example = stage / "examples" / name / f"{runtime}-{row['weights']}.bin"
                    example.write_bytes(_raw(run(*inputs)))
                table += made
                bar.advance()
        pictures: list[dict[str, Any]] = []
        wanted = generate(model, [PROMPT], seeds=SEED, watch=False)[0]
        _write_picture(stage, "torch", wanted)
        for runtime, kind in kinds:
            bar.advance(f"a picture by {runtime}-{kind}", steps=0)
            drawn = draw(model, load_parts(stage, about, sets[kind], runtime, threads), PROMPT, SEED)
            pictures.append({"runtime": runtime, "weights": kind, "psnr": min(round(psnr(drawn, wanted), 2), 200.0),
                             "file": _write_picture(stage, f"{runtime}-{kind}", drawn)})  # fmt: skip
            if kind == "float" and pictures[-1]["psnr"] < LEAST_PSNR:
                raise ParityError(f"{runtime}: its picture is {pictures[-1]['psnr']} dB from torch's; see {out}")
            bar.advance()
        model.tokenizer.save_pretrained(stage / "tokenizer")
        model.scheduler.save_pretrained(stage / "scheduler")
        manifest = {
            "format": phone_measure.FORMAT,
            "kind": phone_measure.KIND,
            "created": today(),
            "device": device(),
            "versions": {f: {"executorch": executorch.version, "mnn": mnn.version}[f]() for f in formats},
            "picture": {"steps": model.sampling.steps, "guidance": model.sampling.guidance, "pixels": model.pixels},
            "origin": dict(origin or {}),
            "parts": about,
            "sets": sets,
            "int4": INT4_WHERE,
            "table": table,
            "pictures": {"prompt": PROMPT, "seed": SEED, "least_psnr_of_float": LEAST_PSNR, "drawn": pictures},
            "files": list_files(stage),
        }
        write_manifest(stage, manifest)
    return manifest


def load_parts(
    folder: Path, about: Mapping[str, Any], weights: Mapping[str, str], runtime: str, threads: int = 1
) -> dict[str, nn.Module]:
    """The files of a set as modules that run in their runtime; `about` and `weights` are of "parts" and "sets"."""
    return {
        name: _load(
            folder / runtime / f"{name}-{weights[name]}{phone_measure.SUFFIXES[runtime]}", part, runtime, threads
        )
        for name, part in about.items()
    }


def _load(path: Path, part: Mapping[str, Any], runtime: str, threads: int) -> nn.Module:
    if runtime == "executorch":
        return executorch.ExecuTorchModule(path)
    return mnn.MnnModule(path, [i["name"] for i in part["inputs"]], [o["name"] for o in part["outputs"]], threads)


@torch.no_grad()
def draw(model: Diffusion, runs: Mapping[str, nn.Module], prompt: str, seed: int) -> np.ndarray:
    """The picture uint8 (H, W, 3) of a prompt by three parts, as an app on a phone goes about it.

    Of the model only the tokenizer, the scheduler's arithmetic and the configs are used.
    """
    config, guidance = model.unet.config, model.sampling.guidance
    rows = 2 if guidance > 1 and config.time_cond_proj_dim is None else 1
    text = runs["text_encoder"](model.tokens(["", prompt][-rows:]))
    scheduler = copy.deepcopy(model.scheduler)
    scheduler.set_timesteps(model.sampling.steps)
    draws = torch.Generator().manual_seed(seed)
    takes = {"generator": draws} if "generator" in inspect.signature(scheduler.step).parameters else {}
    shape = (1, config.in_channels, config.sample_size, config.sample_size)
    latents = torch.randn(shape, generator=draws) * scheduler.init_noise_sigma
    for time in scheduler.timesteps:
        noisy = scheduler.scale_model_input(latents, time).repeat(rows, 1, 1, 1)
        found = runs["unet"](noisy, time.float().repeat(rows), text)
        if rows == 2:
            empty, told = found.chunk(2)
            found = empty + guidance * (told - empty)
        latents = scheduler.step(found, time, latents, return_dict=False, **takes)[0]
    levels = runs["vae_decoder"](latents)[0].div(2).add(0.5).clamp(0, 1).mul(255).round()
    return np.ascontiguousarray(levels.to(torch.uint8).permute(1, 2, 0).numpy())


def _write_picture(stage: Path, name: str, picture: np.ndarray) -> str:
    (stage / "pictures").mkdir(exist_ok=True)
    cv2.imwrite(str(stage / "pictures" / f"{name}.png"), np.ascontiguousarray(picture[:, :, ::-1]))
    return f"pictures/{name}.png"


def _check(formats: Sequence[str], weights: Sequence[str]) -> None:
    for what, found, known in (("formats", formats, FORMATS), ("weights", weights, executorch.WEIGHTS)):
        if not found:
            raise InputError(f"export_phone: no {what} given; expected some of {', '.join(known)}")
        if unknown := [f for f in found if f not in known]:
            raise InputError(f"export_phone: {what} {unknown[0]!r}; expected some of {', '.join(known)}")


def _export_part(part: Part, stage: Path, runtime: str, weights: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of the table of one part in one format."""
    rows: list[dict[str, Any]] = []
    name, inputs = part.graph.name, tuple(part.graph.inputs.values())

    def row(path: Path, record: Mapping[str, Any], error: Mapping[str, float], kept: Sequence[str]) -> None:
        rows.append({
            "part": name, "runtime": runtime, "weights": record["weights"],
            "file": path.relative_to(stage).as_posix(), "bytes": record["bytes"],
            "relative": error["relative"], "sqnr": error["sqnr"], **{key: record[key] for key in kept},
        })  # fmt: skip

    if runtime == "executorch":
        for kind in weights:
            path = stage / runtime / f"{name}-{kind}.pte"
            record = executorch.to_executorch(part.module, inputs, path, weights=kind).to_json()  # type: ignore[arg-type]
            record["layers"] = dict(Counter(record["layers"].values()).most_common())
            record["parity"] = record["parity"][0]
            kept = ("criterion", "parity", "stored", "layers", "delegated", "subgraphs", "left", "seconds")
            row(path, record, record["error"][0], kept)
    else:
        for made in mnn.to_mnn(part.module, part.graph, stage / runtime, weights=weights).values():
            record = made.to_json()
            row(stage / runtime / made.file, record, record["error"][part.graph.outputs[0]],
                ("criterion", "stored", "seconds"))  # fmt: skip
    return rows


def _write_example(folder: Path, graph: Graph) -> None:
    """What the runners on the phone read: raw bytes for ExecuTorch's, text for MNN's."""
    folder.mkdir(parents=True)
    inputs = []
    for name, tensor in graph.inputs.items():
        (folder / f"{name}.bin").write_bytes(_raw(tensor))
        (folder / f"{name}.txt").write_text("\n".join(repr(v) for v in tensor.flatten().tolist()) + "\n")
        inputs.append({"name": name, "shape": list(tensor.shape)})
    (folder / "input.json").write_text(json.dumps({"inputs": inputs, "outputs": list(graph.outputs)}))


def _raw(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().numpy().tobytes()


def source(given: Path, variant: str | None = None) -> tuple[Path, dict[str, str]]:
    """The diffusers folder of what a command names, and its origin {"artifact", "variant", "stage"} if from a run.

    Of a run the compressed model is taken, unless `variant` names another. Raises InputError for a variant where there
    is no artifact.
    """
    for place in (given / "artifact", given):
        if (place / "manifest.json").is_file():
            artifact = Artifact.open(place)
            first = next(iter(artifact.variants.values())).precision
            others = [v.name for v in artifact.variants.values() if v.precision != first]
            chosen = artifact.variant(variant or next(iter(others), None))
            found = artifact.folder_of(chosen.name)
            if found is None:
                raise InputError(f"{given}: variant {chosen.name!r} is no folder that runs in torch")
            stage = "original" if chosen.precision == first and others else "compressed"
            return found, {"artifact": artifact.sha256, "variant": chosen.name, "stage": stage}
    if variant is not None:
        raise InputError(f"--variant {variant}: {given} holds no artifact; leave it out")
    return (given / "model" if (given / "model" / "model_index.json").is_file() else given), {}


def text_table(manifest: Mapping[str, Any]) -> str:
    """The manifest's table in lines for a terminal, and the pictures' PSNR."""
    lines = [
        f"{'part':13} {'runtime':11} {'weights':7} {'MB':>8} {'rel. error':>10} {'SQNR dB':>8}  weights in the file"
    ]
    for r in manifest["table"]:
        total = sum(n["weights"] for n in (r["stored"] or {}).values())
        kinds = ", ".join(f"{n['weights'] / total:.1%} {k}" for k, n in (r["stored"] or {}).items()) or "not read"
        lines.append(
            f"{r['part']:13} {r['runtime']:11} {r['weights']:7} {r['bytes'] / 1e6:8.3f} {r['relative']:10.2e} "
            f"{r['sqnr']:8.1f}  {kinds}"
        )
    lines += [
        f"picture by {p['runtime']}-{p['weights']}: {p['psnr']:.1f} dB from torch's"
        for p in manifest["pictures"]["drawn"]
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Export and print the table; 2 where the input is wrong."""
    parser = argparse.ArgumentParser(prog="python -m kits.mobile_diffusion.phone", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of `fitkit run` or `fitkit train`, or a diffusers folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--formats", nargs="+", default=FORMATS, help=f"of {', '.join(FORMATS)} (default: all)")
    parser.add_argument("--weights", nargs="+", default=WEIGHTS, help="of float, int8, int4 (default: float int4)")
    parser.add_argument("--variant", help="of the run's artifact (default: the compressed model)")
    parser.add_argument("--threads", type=int, default=1, help="of MNN here (default 1)")
    o = parser.parse_args(arguments)
    _quiet()
    try:
        folder, origin = source(o.folder, o.variant)
        manifest = export_phone(
            load_diffusion(folder), o.out, formats=o.formats, weights=o.weights, threads=o.threads, origin=origin
        )
    except (InputError, ParityError) as error:
        print(error, file=sys.stderr)
        return 2
    print(text_table(manifest))
    return 0


def _quiet() -> None:
    """Keep the chatter of libraries out of the user's sight, as `fitkit` does."""
    for library in ("bitsandbytes", "peft"):
        logging.getLogger(library).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
