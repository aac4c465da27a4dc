"""`fitkit predict mobile_diffusion`: prompts in; a PNG for each, results.json and a contact sheet out."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np

from core.files import writing
from core.hardware.memory_plan import PeakPlan, choose, parse_bytes, resident_bytes
from core.kit import InputError
from core.progress import progress
from kits.mobile_diffusion.data import captions
from kits.mobile_diffusion.fidelity import psnr, ssim
from kits.mobile_diffusion.generate import (
    LARGEST_SEED,
    Way,
    bar_steps,
    check_guidance,
    check_prompts,
    check_seeds,
    check_size,
    check_steps,
    generate,
    prepare,
)
from kits.mobile_diffusion.lora import load_lora
from kits.mobile_diffusion.memory import plan_generation, skeleton
from kits.mobile_diffusion.model.pipeline import Diffusion, _sampling, load_diffusion

_SIZE = re.compile(r"(\d+)(?:x(\d+))?", re.IGNORECASE)
_PATH = re.compile(r"\S*/\S*|\S+\.(png|jpe?g|webp|bmp|gif|json|jsonl|csv|md|safetensors)", re.IGNORECASE)
_CELL, _MARGIN, _LINE = 256, 8, 18
_INK, _FAINT = (40, 40, 40), (120, 120, 120)
_MOST_PROMPTS = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `predict` that are about pictures."""
    parser.add_argument(
        "--seed", type=_seed, default=0, help="of every picture (default 0); the same seed, the same one"
    )
    parser.add_argument("--steps", type=_at_least_one, help="steps of denoising (default: the model's own)")
    parser.add_argument("--guidance", type=float, help="how strongly to follow the prompt (default: the model's own)")
    parser.add_argument("--size", help="side in pixels, or WIDTHxHEIGHT (default: the model's own)")
    parser.add_argument("--batch", type=_at_least_one, default=4, help="pictures at a time (default 4)")
    parser.add_argument(
        "--memory-limit", help="most memory of the whole process, such as 1.5GB: picks a way that fits, or refuses"
    )
    parser.add_argument(
        "--lora", type=Path, action="append", default=[], help="a LoRA's safetensors file; give it again for more"
    )
    parser.add_argument(
        "--original", type=Path, help="a diffusers folder: a contact sheet shows its pictures beside the model's"
    )


def _seed(text: str) -> int:
    """A seed, refused where it is read: before the model is."""
    if not text.isdecimal() or int(text) > LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 0 to 2^63 - 1")
    return int(text)


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1 on")
    return int(text)


def check(inputs: Sequence[str]) -> None:
    """Refuse inputs that are no prompts: empty ones, missing or empty text files."""
    read_prompts(inputs)


def read_prompts(inputs: Sequence[str]) -> list[str]:
    """The prompts: each input is one itself, or a text file (.txt) with one a line; empty lines are left out."""
    prompts: list[str] = []
    for text in inputs:
        path = Path(text)
        if text.strip() and path.is_dir():
            raise InputError(f"{path}: a folder; give prompts, or a .txt file with a prompt a line")
        if path.suffix.lower() != ".txt":
            if _PATH.fullmatch(text):
                raise InputError(
                    f"{path}: looks like a file, and prompts are read from .txt files alone; say what to draw"
                )
            prompts.append(text.strip())
            continue
        prompts += captions.read_prompts(path)
    if not prompts or not all(prompts):
        raise InputError("an empty prompt; say what to draw, for example: a red circle left of a blue square")
    if len(prompts) > _MOST_PROMPTS:
        raise InputError(f"{len(prompts)} prompts; expected at most {_MOST_PROMPTS}, so split the file")
    return prompts


def parse_size(text: str | None) -> tuple[int, int] | None:
    """(height, width) of "512" or "768x512" (width x height), None for None; InputError for anything else."""
    if text is None:
        return None
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise InputError(f"--size {text!r}: expected a side such as 512, or WIDTHxHEIGHT such as 768x512")
    width = int(found[1])
    return int(found[2] or width), width


@dataclass
class _Job:
    """Prompts and how to draw them; `size` is (height, width) in pixels."""

    prompts: list[str]
    seeds: list[int]
    steps: int
    guidance: float
    size: tuple[int, int]
    batch: int
    notes: list[str] = field(default_factory=list)


def predict(
    source: Diffusion | Path, inputs: Sequence[str], meta: Mapping[str, Any], out: Path, options: argparse.Namespace
) -> str:
    """Draw the prompts; leaves NNN-<prompt>.png, results.json and, with an original, contact_sheet.png in `out`.

    `source` is a model, or the folder of one: of a folder the memory plan is made before its weights are loaded, and a
    limit that nothing fits is refused then. `meta` may name "steps" and "guidance", which go before the model's own.
    """
    prompts = read_prompts(inputs)
    size = parse_size(options.size)
    limit = parse_bytes(options.memory_limit) if options.memory_limit else None
    seeds = check_seeds(options.seed, len(prompts))
    batch = min(options.batch, len(prompts))
    shape = skeleton(source)
    own = source.sampling if isinstance(source, Diffusion) else _sampling(source)
    steps = options.steps if options.steps is not None else int(meta.get("steps", own.steps))
    guidance = options.guidance if options.guidance is not None else float(meta.get("guidance", own.guidance))
    pixels = check_size(shape, size)
    check_guidance(guidance)
    plan = choose(plan_generation(source, size=pixels, guidance=guidance, batch=batch, shape=shape), limit)
    print(f"memory plan: {plan}")
    del shape
    model = source if isinstance(source, Diffusion) else load_diffusion(source)
    check_steps(model, steps)
    job = _Job(prompts, seeds, steps, guidance, pixels, batch, check_prompts(model, prompts))
    prepare(model, plan.way)
    with _loras(model, options.lora) as layers:
        out.mkdir(parents=True, exist_ok=True)
        pictures, seconds, step_seconds = _draw(model, job, plan.way, "drawing")
    records = _write_pictures(out, job, pictures, seconds)
    summary: dict[str, Any] = {
        "steps": job.steps, "guidance": job.guidance, "size": [pixels[1], pixels[0]], "batch": batch,
        "loras": [{"file": str(p), "layers": n} for p, n in zip(options.lora, layers)],
        "step_seconds": step_seconds, "memory": _memory(plan, limit), "warnings": job.notes, "pictures": records,
    }  # fmt: skip
    if options.original is not None:
        del model
        original = _of_original(options.original, job, limit)
        for record, mine, theirs in zip(records, pictures, original):
            decibels = psnr(mine, theirs)
            record["psnr"] = round(decibels, 3) if np.isfinite(decibels) else None
            record["ssim"] = round(ssim(mine, theirs), 5)
        _save(out / "contact_sheet.png", contact_sheet(prompts, original, pictures))
        summary["original"] = str(options.original)
    with writing(out / "results.json"):
        fresh = out / "results.json.new"
        fresh.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        fresh.replace(out / "results.json")
    return _told(job, records, plan, summary["memory"]["measured_peak"], out)


@contextmanager
def _loras(model: Diffusion, paths: Sequence[Path]) -> Iterator[list[int]]:
    """Within it the model has the LoRAs; gives how many layers each of them changes."""
    if not paths:
        yield []
        return
    pipeline = model.pipeline()
    try:
        yield [load_lora(pipeline, path) for path in paths]
    finally:
        pipeline.unload_lora_weights()


def _draw(model: Diffusion, job: _Job, way: Way, label: str) -> tuple[list[np.ndarray], float, float | None]:
    """Pictures, the seconds that all of them took, and those from a step of a batch to the next (None: one step)."""
    started = time.perf_counter()
    ended: list[tuple[int, float]] = []
    with progress(label, bar_steps(model, len(job.prompts), job.steps, job.batch)) as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the notes are in the results

        def on_step(step: int, _: int) -> None:
            ended.append((step, time.perf_counter()))
            bar.advance(f"step {step}")

        pictures = generate(
            model,
            job.prompts,
            seeds=job.seeds,
            steps=job.steps,
            guidance=job.guidance,
            size=job.size,
            batch=job.batch,
            way=way,
            on_step=on_step,
        )
    between = [then - before for (_, before), (step, then) in pairwise(ended) if step > 1]
    return pictures, time.perf_counter() - started, round(median(between), 4) if between else None


def _of_original(folder: Path, job: _Job, limit: int | None) -> list[np.ndarray]:
    """The original's pictures, within the same limit."""
    plan = choose(plan_generation(folder, size=job.size, guidance=job.guidance, batch=job.batch), limit)
    print(f"memory plan of the original: {plan}")
    model = load_diffusion(folder)
    prepare(model, plan.way)
    return _draw(model, job, plan.way, "drawing the original's")[0]


def _write_pictures(out: Path, job: _Job, pictures: Sequence[np.ndarray], seconds: float) -> list[dict[str, Any]]:
    records = []
    for number, (prompt, seed, picture) in enumerate(zip(job.prompts, job.seeds, pictures)):
        name = f"{number:03d}-{_slug(prompt)}.png"
        _save(out / name, picture)
        records.append(
            {
                "file": name,
                "prompt": prompt,
                "seed": seed,
                "steps": job.steps,
                "guidance": job.guidance,
                "seconds": round(seconds / len(pictures), 4),
                "sha256": hashlib.sha256((out / name).read_bytes()).hexdigest(),
            }  # fmt: skip
        )
    return records


def contact_sheet(prompts: Sequence[str], original: Sequence[np.ndarray], pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pairs of pictures (H, W, 3) on one sheet: the original's left, the compressed model's right, the prompt below."""
    cells = []
    for prompt, theirs, mine in zip(prompts, original, pictures):
        pair = [_fitted(picture) for picture in (theirs, mine)]
        cell = np.full((pair[0].shape[0] + 3 * _LINE, 2 * _CELL + 3 * _MARGIN, 3), 255, np.uint8)
        for side, view in enumerate(pair):
            left = _MARGIN + side * (_CELL + _MARGIN)
            cell[_LINE : _LINE + view.shape[0], left : left + view.shape[1]] = view
            _text(cell, ("original", "compressed")[side], (left, _LINE - 5), _FAINT)
        note = f"PSNR {psnr(mine, theirs):.1f} dB, SSIM {ssim(mine, theirs):.3f}"
        _text(cell, prompt[:76], (_MARGIN, _LINE + pair[0].shape[0] + 14), _INK)
        _text(cell, note, (_MARGIN, 2 * _LINE + pair[0].shape[0] + 12), _FAINT)
        cells.append(cell)
    columns = 1 if len(cells) < 3 else 2 if len(cells) < 9 else 3
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % columns)
    return np.vstack([np.hstack(cells[at : at + columns]) for at in range(0, len(cells), columns)])


def _fitted(picture: np.ndarray) -> np.ndarray:
    """A picture as wide as a cell; a small one grows by whole pixels, so that it stays as it is."""
    height, width = picture.shape[:2]
    grow = width < _CELL
    size = (_CELL, max(1, round(height * _CELL / width)))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_NEAREST if grow else cv2.INTER_AREA))


def _text(picture: np.ndarray, text: str, place: tuple[int, int], colour: tuple[int, int, int]) -> None:
    plain = text.encode("ascii", "replace").decode()  # all that OpenCV's font has
    cv2.putText(picture, plain, place, cv2.FONT_HERSHEY_SIMPLEX, 0.38, colour, 1, cv2.LINE_AA)


def _save(path: Path, picture: np.ndarray) -> None:
    with writing(path):
        path.write_bytes(bytes(cv2.imencode(".png", picture[:, :, ::-1])[1]))


def _slug(prompt: str) -> str:
    """The beginning of a prompt as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].strip("-") or "picture"


def _memory(plan: PeakPlan[Way], limit: int | None) -> dict[str, Any]:
    """The plan, the limit, and the peak of the process as it was measured, in bytes."""
    return {"plan": plan.to_json(), "limit": limit, "measured_peak": resident_bytes("VmHWM")}


def _told(job: _Job, records: Sequence[Mapping[str, Any]], plan: PeakPlan[Way], peak: int | None, out: Path) -> str:
    each = records[0]["seconds"]
    size = f"{job.size[1]} x {job.size[0]}"
    lines = [f"{len(records)} picture(s) of {size}, {job.steps} steps, {each:.2f} s each; {plan.name}"]
    for record in records[:20]:
        fidelity = ""
        if "ssim" in record:
            decibels = "equal" if record["psnr"] is None else f"PSNR {record['psnr']:.1f} dB"
            fidelity = f"  against the original {decibels}, SSIM {record['ssim']:.3f}"
        lines.append(f"  {record['file']}  seed {record['seed']}{fidelity}")
    lines += [f"  warning: {note}" for note in job.notes]
    if peak is not None:
        lines.append(f"peak memory {peak / 1e6:.0f} MB, planned ~{plan.peak / 1e6:.0f} MB")
    return "\n".join([*lines, f"results in {out}"])
