"""SD-1.5 and a student of its class in full size: bytes on disk, seconds and memory of packing, peak of a generation.

The weights are seeded random numbers, so the figures are those of the architecture alone; no picture means anything.
Whatever is about a process's memory is measured in a process of its own, which leaves its result in a JSON file: a run
that was killed goes on with the stages that are missing.

    python -m kits.mobile_diffusion.full_size --out DIR [--resume]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.evaluation.measure import device
from core.export.artifact import need_room
from core.export.pack_checkpoint import pack_checkpoint
from core.figures import Figure, Figures, Measured, today
from core.files import read_object, write_text
from core.hardware.memory_plan import resident_bytes
from core.kit import InputError
from kits.mobile_diffusion.model.architectures import ARCHITECTURE_ONLY, build_folder, parameters

NOTE = f"{ARCHITECTURE_ONLY}: seeded random weights"
RESULT = "full_size.json"
LIMIT = "1.5GB"
PROMPT = "a red circle left of a blue square"
_PARTS = ("unet", "text_encoder", "vae")
_PACKED_SHARE = 0.35
"""Bytes of a packed folder over those of its FP16 folder, to reserve room by; 0.28 is what SD-1.5 and BK-Small take."""


@dataclass(frozen=True)
class Draw:
    """One generation to measure: an architecture, the side in pixels, steps, guidance, and a memory limit or None."""

    architecture: str
    side: int
    steps: int
    guidance: float
    limit: str | None

    @property
    def key(self) -> str:
        """The name of its stage."""
        return f"draw-{self.architecture}-{self.side}-{self.limit or 'free'}"


@dataclass(frozen=True)
class Trial:
    """What is measured: the pruned student, the whole model, and generations, the first of which is the gate's.

    BK-SDM's Base is the largest student of SD-1.5 that keeps within 500 MB.
    """

    student: str = "bk-base"
    whole: str = "sd-1.5"
    draws: tuple[Draw, ...] = (
        Draw("bk-base", 512, 4, 1.0, LIMIT),
        Draw("bk-base", 256, 2, 1.0, LIMIT),
        Draw("bk-base", 512, 2, 1.0, None),
        Draw("sd-1.5", 512, 2, 7.5, LIMIT),
    )


FULL = Trial()


def full_size(out: Path, resume: bool = True, trial: Trial = FULL) -> tuple[Figures, list[dict[str, Any]]]:
    """Figures of the gates that are about SD-1.5's size, and tables of bytes, packing and memory.

    Works in `out`/work, which takes up to 3 GB and is gone at the end; after a kill it is still there, and with
    `resume` its finished stages are not repeated. A stage that was killed is repeated whole, since the rest of a
    time is no time. Raises InputError for a full disk, before the start where that can be told, and for a stage
    that fails.
    """
    work = Path(out) / "work"
    if not resume:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys((trial.student, trial.whole)))
    _need_room(work, names)
    packed: dict[str, dict[str, Any]] = {}
    drawn: dict[Draw, dict[str, Any]] = {}
    for name in names:
        draws = [draw for draw in trial.draws if draw.architecture == name]
        packed[name] = _packed(work, name, draws)
        for draw in draws:
            drawn[draw] = _stage(work, draw.key, asdict(draw))
        shutil.rmtree(work / f"{name}-int4", ignore_errors=True)
    shutil.rmtree(work)
    figures = _figures(trial, packed, drawn)
    return figures, [_bytes_table(packed), _packing_table(packed), _memory_table({d: drawn[d] for d in trial.draws})]


def _packed(work: Path, name: str, draws: Sequence[Draw]) -> dict[str, Any]:
    """The result of packing an architecture; its packed folder is there afterwards if a draw still needs it."""
    source, folder = work / name, work / f"{name}-int4"
    asked = {"architecture": name}
    waiting = any(_known(work, draw.key, asdict(draw)) is None for draw in draws)
    if (found := _known(work, f"pack-{name}", asked)) is None or (waiting and not folder.is_dir()):
        (work / f"pack-{name}.json").unlink(missing_ok=True)
        if not (source / "model_index.json").is_file():
            _say(f"building {name} with seeded random weights in FP16")
            build_folder(name, source)
        found = _stage(work, f"pack-{name}", asked)
    shutil.rmtree(source, ignore_errors=True)
    return found


def _need_room(work: Path, names: Sequence[str]) -> None:
    """Refuse a disk that has no room for the largest FP16 folder and a packed one, before hours of work."""
    halves = {name: 2 * sum(parameters(name).values()) for name in names}
    there = sum(f.stat().st_size for f in work.rglob("*.safetensors"))
    need_room(work, max(0, round(max(halves.values()) * (1 + _PACKED_SHARE)) - there))


def _known(work: Path, name: str, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result of a stage that was finished with the same settings."""
    path = work / f"{name}.json"
    if not path.is_file():
        return None
    found = read_object(path, "delete it to measure anew")
    return found if found.get("asked") == dict(asked) else None


def _stage(work: Path, name: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The stored result of a stage, or that of a process of its own."""
    if (found := _known(work, name, asked)) is not None:
        return found
    _say(name)
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
    command = [sys.executable, "-m", "kits.mobile_diffusion.full_size", "--out", str(work)]
    ran = subprocess.run(
        [*command, "--stage", name, "--asked", json.dumps(asked)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        check=False,
    )
    found = _known(work, name, asked)
    if ran.returncode or found is None:
        why = f"was killed by signal {-ran.returncode}" if ran.returncode < 0 else f"ended with {ran.returncode}"
        raise InputError(f"{work / name}: its process {why}; free memory or disk and run again, what is done is kept")
    return found


def _run_stage(work: Path, name: str, asked: dict[str, Any]) -> None:
    """What the process of a stage does: work, then leave a JSON."""
    stages: dict[str, Callable[[Path, dict[str, Any]], dict[str, Any]]] = {"pack": _pack, "draw": _draw}
    found = stages[name.partition("-")[0]](work, asked)
    peak = resident_bytes("VmHWM")
    if peak is None:
        raise InputError("peak memory is read from /proc/self/status, which this system lacks; measure it on Linux")
    found |= {
        "asked": asked,
        "peak": peak,
        "date": today(),
        "runtime": _runtime(),
        "load": round(os.getloadavg()[0], 1),
    }
    write_text(work / f"{name}.json", json.dumps(found, indent=1))


def _pack(work: Path, asked: dict[str, Any]) -> dict[str, Any]:
    from core.compress import file_hash
    from core.export.packed import MANIFEST

    folder = work / f"{asked['architecture']}-int4"
    source = work / asked["architecture"]
    done = pack_checkpoint(source, folder)
    files = {f: f.stat().st_size for f in folder.rglob("*") if f.is_file()}
    return {
        "seconds": done.seconds,
        "cpu_seconds": round(time.process_time(), 1),
        "fp16": done.source_bytes,
        "packed": {part: done.packed_bytes[part] for part in _PARTS},
        "whole": sum(files.values()),
        "layers": done.layers,
        "sha256": file_hash(folder / MANIFEST),
    }


def _draw(work: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """A picture, made as `fitkit predict` makes it, with the whole of the command line's modules loaded."""
    import core.cli  # noqa: F401
    from kits.mobile_diffusion.kit import MobileDiffusion

    kit, draw = MobileDiffusion(), Draw(**asked)
    folder, pictures = work / f"{draw.architecture}-int4", work / draw.key
    parser = argparse.ArgumentParser()
    kit.arguments("predict", parser)
    given = ["--size", str(draw.side), "--steps", str(draw.steps), "--guidance", str(draw.guidance)]
    given += ["--memory-limit", draw.limit] if draw.limit else []
    try:
        kit.predict(folder, [PROMPT], {}, pictures, parser.parse_args(given))
        results = read_object(pictures / "results.json", "run it again")
    finally:
        shutil.rmtree(pictures, ignore_errors=True)
    return {
        "plan": results["memory"]["plan"],
        "seconds": results["pictures"][0]["seconds"],
        "step_seconds": results["step_seconds"],
    }


def _runtime() -> str:
    import torch

    threads = torch.get_num_threads()
    return f"PyTorch {torch.__version__.split('+')[0]}, {threads} thread{'' if threads == 1 else 's'}"


def _figures(trial: Trial, packed: Mapping[str, Mapping[str, Any]], drawn: Mapping[Draw, Mapping[str, Any]]) -> Figures:
    student, whole = packed[trial.student], packed[trial.whole]
    found = []

    def add(name: str, value: float, unit: str, result: Mapping[str, Any], sha256: str, what: str) -> None:
        note = f"{NOTE}; {what}"
        basis = Measured(device(), result["runtime"], 1, None, sha256, result["date"], note)
        found.append(Figure(name, value, unit, basis))

    def size(name: str, result: Mapping[str, Any], what: str) -> None:
        add(name, result["whole"] / 1e6, "MB", result, result["sha256"], what)

    size("sd15_student_size", student, f"{trial.student}, all files of the packed folder")
    size("sd15_size", whole, f"{trial.whole}, all files of the packed folder")
    if trial.draws:
        draw = trial.draws[0]
        result = drawn[draw]
        what = f"{draw.architecture} at {draw.side} x {draw.side}, {draw.steps} steps; {result['plan']['way']}"
        add("sd15_student_peak", result["peak"] / 1e9, "GB", result, packed[draw.architecture]["sha256"], what)
    what = f"{trial.whole}, text encoder and VAE included"
    add("sd15_pack_seconds", whole["seconds"], "s", whole, whole["sha256"], what)
    what = f"peak of the process while it packs {trial.whole}, over the FP16 file of the UNet alone"
    add("sd15_pack_memory", whole["peak"] / whole["fp16"]["unet"], "x", whole, whole["sha256"], what)
    return Figures(found)


def _bytes_table(packed: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    rows: list[list[Any]] = []
    for name, result in packed.items():
        counts = parameters(name)
        for part in _PARTS:
            before, after = result["fp16"][part], result["packed"][part]
            rows.append([f"{name} {part}", f"{counts[part]:,}", _mb(before), _mb(after), _bits(after, counts[part])])
        total, halves = sum(counts.values()), sum(result["fp16"].values())
        rows.append(
            [f"{name} all files", f"{total:,}", _mb(halves), _mb(result["whole"]), _bits(result["whole"], total)]
        )
    return {
        "title": "Full size: bytes by component",
        "columns": ["component", "parameters", "FP16 [MB]", "packed [MB]", "bits a parameter"],
        "rows": rows,
        "note": NOTE,
    }


def _packing_table(packed: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    rows = [
        [
            name,
            r["seconds"],
            r["cpu_seconds"],
            r["load"],
            _mb(r["peak"]),
            round(r["peak"] / r["fp16"]["unet"], 2),
            ", ".join(f"{count} in {bits}" for bits, count in r["layers"].items()),
        ]
        for name, r in packed.items()
    ]
    return {
        "title": "Full size: packing without calibration",
        "columns": ["model", "seconds", "CPU seconds", "load", "peak [MB]", "of the UNet's FP16", "layers in bits"],
        "rows": rows,
        "note": f"{NOTE}; text encoder and VAE included; the load is that of the machine",
    }  # fmt: skip


def _memory_table(drawn: Mapping[Draw, Mapping[str, Any]]) -> dict[str, Any]:
    rows = [
        [
            draw.architecture,
            f"{draw.side} x {draw.side}",
            draw.limit or "none",
            r["plan"]["way"],
            _mb(r["plan"]["peak"]),
            _mb(r["peak"]),
            round(100 * (r["plan"]["peak"] / r["peak"] - 1), 1),
            "" if r["step_seconds"] is None else r["step_seconds"],
            r["seconds"],
        ]
        for draw, r in drawn.items()
    ]
    return {
        "title": "Full size: planned and measured peak of a generation",
        "columns": ["model", "size", "limit", "way", "plan [MB]", "peak [MB]", "plan off by [%]", "s a step", "s"],
        "rows": rows,
        "note": f"{NOTE}; the whole process, libraries included, as the kernel counts its resident set (VmHWM)",
    }  # fmt: skip


def _say(text: str) -> None:
    print(f"full size: {text}", file=sys.stderr, flush=True)


def _mb(count: float) -> float:
    return round(count / 1e6, 1)


def _bits(count: int, weights: int) -> float:
    return round(8 * count / weights, 2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables and leave `full_size.json`; 0 done, 2 the input or the machine is not fit."""
    parser = argparse.ArgumentParser(
        prog="python -m kits.mobile_diffusion.full_size", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the work and the result")
    parser.add_argument("--resume", action="store_true", help="go on where a killed run stopped")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--asked", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        if options.stage:
            with redirect_stdout(sys.stderr):
                _run_stage(options.out, options.stage, options.asked)
            return 0
        figures, tables = full_size(options.out, options.resume)
        stored = {"figures": [f.to_json() for f in figures], "tables": tables}
        write_text(options.out / RESULT, json.dumps(stored, indent=1) + "\n")
        _show(figures, tables)
    except InputError as error:
        print(f"full_size: {error}", file=sys.stderr)
        return 2
    return 0


def _show(figures: Figures, tables: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for table in tables:
        shown = Table(*table["columns"], title=table["title"], caption=table["note"])
        for row in table["rows"]:
            shown.add_row(*map(str, row))
        console.print(shown)
    for figure in figures:
        console.print(f"{figure.name}: {figure}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
