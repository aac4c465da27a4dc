"""The compressed model against its original: fidelity with the same seeds, speed, bytes, and a phone's estimate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from core.evaluation.measure import device, runtime_title
from core.export.artifact import origin_of
from core.figures import Estimated, Figure, Figures, Measured
from core.files import write_text
from core.hardware import estimate, target
from core.kit import Kit
from core.progress import progress
from core.quantization import packed_layers
from kits.mobile_diffusion.acceptance import BATCH, PHONE, align, pictures, steps_of
from kits.mobile_diffusion.data.default import Prompt
from kits.mobile_diffusion.data.scenes import SIZE
from kits.mobile_diffusion.fidelity import fidelity, vae_features
from kits.mobile_diffusion.generate import Samples, bar_steps, sample
from kits.mobile_diffusion.model.pipeline import Diffusion
from kits.mobile_diffusion.predict import contact_sheet

COMPARED = {"smoke": 16, "full": 200}
"""Pictures that are compared one by one; FID needs more than twice the 96 channels of the autoencoder."""


def judged(model: Diffusion, samples: Sequence[Any]) -> bool:
    """Whether alignment can be told: pictures of the scenes' size, and prompts in their language."""
    return model.pixels == SIZE and all(isinstance(p, Prompt) and p.kind for p in samples)


def _variant(model: Diffusion) -> str | None:
    """The artifact's variant that a model is; None, its chosen one, of a model that comes from none."""
    origin = origin_of(model)
    return origin.variant if origin is not None else None


def evaluate(model: Diffusion, samples: Sequence[Prompt], out: Path) -> dict[str, Any]:
    """Alignment with intervals and counts; leaves a PNG a prompt in `predictions/`, and `metrics.json`."""
    drawn = pictures(model, samples)
    place = out / "predictions"
    place.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(drawn):
        cv2.imwrite(str(place / f"{number:04d}.png"), np.ascontiguousarray(picture[:, :, ::-1]))
    prompts = [{"file": f"{i:04d}.png", "prompt": p.text, "seed": p.seed} for i, p in enumerate(samples)]
    write_text(place / "prompts.json", json.dumps(prompts, indent=1) + "\n")
    steps = steps_of(model, samples)
    found: dict[str, Any] = {"pictures": len(drawn), "steps": steps, "guidance": model.sampling.guidance}
    if judged(model, samples):
        aligned = align(samples, drawn)
        found |= {name: value for name, (value, _) in aligned["values"].items()}
        found |= {"intervals": aligned["intervals"], "counts": aligned["counts"]}
    write_text(out / "metrics.json", json.dumps(found, indent=1) + "\n")
    return found


def compare(
    kit: Kit, original: Diffusion, compressed: Diffusion, samples: Sequence[Prompt], artifact: Any, preset: str
) -> tuple[Figures, list[dict[str, Any]]]:
    """Figures that need both models, and tables of the error by step and of the bytes by component."""
    few = list(samples[:: -(-len(samples) // COMPARED[preset])])  # of every kind, which stand one after the other
    variant = _variant(compressed)
    title = runtime_title(artifact, variant, 2)
    basis = Measured(device(), title, len(few), None, artifact.sha256, note="the original's pictures, same seeds")
    figures, tables = _fidelity(original, compressed, few, basis)
    figures |= _size_ratio(original, compressed, artifact)
    figures |= _on_phone(kit, original, "original") | _on_phone(kit, compressed, "compressed")
    tables.append(_bytes_table(original, compressed))
    if any(steps_of(m, few) < m.sampling.steps for m in (original, compressed)):
        tables.append(_trial_table(original, compressed, few))
    return figures, tables


def _fidelity(
    original: Diffusion, compressed: Diffusion, prompts: Sequence[Prompt], basis: Measured
) -> tuple[Figures, list[dict[str, Any]]]:
    texts, seeds = [p.text for p in prompts], [p.seed for p in prompts]
    taken = [steps_of(m, prompts) for m in (compressed, original)]
    runs = [
        _drawn(m, texts, seeds, steps, name)
        for m, steps, name in zip((compressed, original), taken, ("compressed", "original"))
    ]
    same = taken[0] == taken[1]
    kept = [r.latents if same and r.latents is not None else r.denoised for r in runs]
    found = fidelity(
        runs[0].pictures,
        runs[1].pictures,
        latents=(kept[0], kept[1]),
        encoder=vae_features(original.vae),
    )
    values = {"psnr": (found.psnr, "dB"), "ssim": (found.ssim, ""), "latent_psnr": (found.latent_psnr, "dB"),
              "kid": (found.kid, ""), "fid": (found.fid, "")}  # fmt: skip
    figures = Figures(
        Figure(name, value, unit, basis)
        for name, (value, unit) in values.items()
        if value is not None and np.isfinite(value)
    )
    tables = []
    if found.curve is not None:
        rows = [[step, round(decibels, 2)] for step, decibels in enumerate(found.curve.psnr, 1)]
        tables.append(
            {
                "title": "Error against step",
                "columns": ["step", "PSNR of the latents [dB]"],
                "rows": rows,
                "note": "against the original's latents after the same step, same seeds; features of KID and FID are "
                "those of this kit's own autoencoder and not comparable with Inception's",
            }
        )
    return figures, tables


def _drawn(model: Diffusion, texts: Sequence[str], seeds: Sequence[int], steps: int, name: str) -> Samples:
    guidance = model.sampling.guidance
    with progress(f"comparing: {name}", bar_steps(model, len(texts), steps, BATCH)) as bar:
        return sample(
            model, texts, seeds=seeds, steps=steps, guidance=guidance, batch=BATCH, keep_latents=True,
            on_step=lambda step, count: bar.advance(),
        )  # fmt: skip


def _size_ratio(original: Diffusion, compressed: Diffusion, artifact: Any) -> Figures:
    """Bytes on disk against FP32."""
    full = sum(p.numel() for p in original.parameters()) * 4
    stored = Measured(device(), "files", 1, 0.0, artifact.sha256, note="against 4 bytes a parameter of the original")
    return Figures([Figure("size_ratio", artifact.size_bytes(_variant(compressed)) / full, "", stored)])


def _on_phone(kit: Kit, model: Diffusion, stage: Any) -> Figures:
    """Seconds, energy and power of a picture on the phone of the gates, estimated from the roofline."""
    graphs = {g.name: g for g in kit.of(model).exports()}
    packed = {n: layer.bits for n, layer in packed_layers(model).items()}
    forwards = model.sampling.steps * (2 if model.sampling.guidance > 1 else 1)
    times = {"text_encoder": 2 if model.sampling.guidance > 1 else 1, "unet": forwards, "decoder": 1}
    seconds = joules = 0.0
    bands = []
    for name, count in times.items():
        found = {
            f.name: f for f in estimate(model, (graphs[name],), target(PHONE), precision="fp16", weight_bits=packed)
        }
        seconds += count * found["latency_p50"].value / 1e3
        joules += count * found["energy"].value / 1e3
        bands += [f.basis.error_band for f in (found["latency_p50"], found["energy"]) if isinstance(f.basis, Estimated)]
    assumed: tuple[str, ...] = (
        f"{forwards} UNet forwards of one row, FP16 arithmetic, weights of the bits that they have",
        f"device {PHONE}",
    )
    rated = target(PHONE).power["rated"].value
    # no phone draws more for long than it can shed: the time is what that energy takes at its rated power, at least
    if joules > rated * seconds:
        assumed += (f"slowed from {seconds * 1e3:.3g} ms to what {joules * 1e3:.3g} mJ take at the rated {rated:g} W",)
        seconds = joules / rated
    band = max((b for b in bands if b is not None), default=None)
    basis = Estimated("roofline and energy table, summed over the picture", assumed, band)
    return Figures(
        Figure(name, value, unit, basis, stage)
        for name, value, unit in (
            ("picture_seconds", seconds, "s"),
            ("picture_energy", joules, "J"),
            ("picture_power", joules / seconds, "W"),
        )
    )


def _trial_table(original: Diffusion, compressed: Diffusion, prompts: Sequence[Prompt]) -> dict[str, Any]:
    models = {"original": original, "compressed": compressed}
    return {
        "title": "A short trial: pictures in fewer steps",
        "columns": ["model", "steps here", "its own steps"],
        "rows": [[name, steps_of(m, prompts), m.sampling.steps] for name, m in models.items()],
        "note": "times, speed and fidelity of this report are those of such pictures; --preset full takes all steps",
    }


def _bytes_table(original: Diffusion, compressed: Diffusion) -> dict[str, Any]:
    rows = []
    for name in ("text_encoder", "unet", "vae"):
        before, after = getattr(original, name), getattr(compressed, name)
        layers = packed_layers(after)
        held = sum(t.numel() * t.element_size() for m in layers.values() for t in m.buffers())
        rest = sum(p.numel() for p in after.parameters())
        rows.append(
            [
                name,
                round(sum(p.numel() for p in before.parameters()) * 4 / 1e6, 2),
                round((held + 2 * rest) / 1e6, 2),
                len(layers),
            ]
        )
    return {
        "title": "Bytes by component",
        "columns": ["component", "FP32 [MB]", "packed [MB]", "packed layers"],
        "rows": rows,
        "note": "weights only; what is not packed is stored in FP16",
    }


def side_by_side(original: Diffusion, compressed: Diffusion, samples: Sequence[Prompt]) -> list[dict[str, Any]]:
    """One sheet: the original's picture left, the compressed model's right, a prompt or two of every kind."""
    by_kind: dict[str, list[Prompt]] = {}
    for prompt in samples:
        by_kind.setdefault(prompt.kind, []).append(prompt)
    chosen = [p for prompts in by_kind.values() for p in prompts[:2]][:12]
    drawn: list[list[NDArray[np.uint8]]] = [pictures(m, chosen) for m in (original, compressed)]
    sheet = contact_sheet([p.text for p in chosen], *drawn)
    png = bytes(cv2.imencode(".png", np.ascontiguousarray(sheet[:, :, ::-1]))[1])
    return [{"title": "The original's picture left, the compressed model's right, same seed", "png": png}]
