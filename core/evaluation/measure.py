"""`measure`: latency, throughput, memory and size of an artifact on the machine that is really here."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from core.evaluation.apart import told_by
from core.evaluation.bench import available_cores, bench
from core.export import Artifact, folder, onnx, openvino
from core.figures import Figure, Figures, Measured
from core.hardware.host import processor
from core.kit import InputError

HOST = "this-host"
RUNTIME_TITLES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "torch": "PyTorch"}


def device() -> str:
    """This machine by name, as in a `Measured` basis: "this-host: <processor>, <n> cores"."""
    return f"{HOST}: {processor()[0]}, {len(available_cores())} cores"


def runtime_title(artifact: Artifact, variant: str | None = None, threads: int | None = None) -> str:
    """The software of a variant, as in a `Measured` basis: "OpenVINO 2026.4.1 INT8, 2 threads"."""
    v = artifact.variant(variant)
    # the version that runs here, which need not be the one that exported
    version = {"onnxruntime": onnx.version, "openvino": openvino.version, "torch": folder.version}[v.runtime]()
    title = f"{RUNTIME_TITLES[v.runtime]} {version} {v.precision.upper()}"
    return title if threads is None else f"{title}, {threads} thread{'' if threads == 1 else 's'}"


def example_inputs(artifact: Artifact, graph: str) -> tuple[Tensor, ...]:
    """Inputs of a graph in the shapes it was exported with: seeded values in [0, 1), zeros for integers."""
    draws = torch.Generator().manual_seed(0)
    made = []
    for record in artifact.graphs[graph]["inputs"]:
        dtype: torch.dtype = getattr(torch, record["dtype"])
        if dtype.is_floating_point:
            made.append(torch.rand(record["example"], generator=draws).to(dtype))
        else:
            made.append(torch.zeros(record["example"], dtype=dtype))
    return tuple(made)


def measure(
    artifact: Artifact,
    target: str = HOST,
    *,
    threads: int = 2,
    seconds: float = 5.0,
    variant: str | None = None,
) -> Figures:
    """Measure one variant here: latency_p50, latency_p99 [ms], fps [1/s], peak_memory and size [MB].

    A pass runs every graph of the artifact once, on made-up inputs in the exported shapes. Nothing is
    ever estimated: a `target` other than "this-host" raises InputError.
    """
    if target != HOST:
        raise InputError(
            f"measure: target {target!r} is not this machine; measure on {HOST!r}, or run this on the device itself "
            "(core.hardware.estimate gives estimates)"
        )
    v = artifact.variant(variant)
    steps = [(artifact.as_module(v.name, threads, graph), example_inputs(artifact, graph)) for graph in sorted(v.files)]

    def one_pass() -> None:
        for module, inputs in steps:
            module(*inputs)

    timing = bench(one_pass, seconds=seconds, threads=threads, label=v.name).timings["it"]
    memory = _memory(artifact.folder, v.name, threads)
    graphs = f"each of {len(steps)} graphs once" if len(steps) > 1 else "the graph"
    where, software = device(), runtime_title(artifact, v.name, threads)

    def figure(name: str, value: float, unit: str, runs: int, spread: float | None, note: str) -> Figure:
        return Figure(name, value, unit, Measured(where, software, runs, spread, artifact.sha256, note=note))

    rate = 1e3 / timing.mean
    base = f"of it {memory['before']:.0f} MB for Python, torch and the runtime before the model was loaded"
    return Figures(
        [
            figure("latency_p50", timing.p50, "ms", timing.runs, timing.spread, graphs),
            figure("latency_p99", timing.p99, "ms", timing.runs, timing.spread_p99, graphs),
            figure("fps", rate, "1/s", timing.runs, rate * timing.spread / timing.p50, f"one over the mean, {graphs}"),
            figure("peak_memory", memory["peak"], "MB", 1, None, f"resident set of a process that runs it; {base}"),
            figure("size", artifact.size_bytes(v.name) / 1e6, "MB", 1, 0.0, "its files"),
        ]
    )


def peak_memory(folder: Path, variant: str | None = None, threads: int = 2) -> float:
    """The peak resident set in MB (1e6 bytes) of a fresh process that loads a variant and runs it (Linux only)."""
    return float(_memory(folder, variant, threads)["peak"])


def _memory(folder: Path, variant: str | None, threads: int) -> dict[str, float]:
    """{"peak", "before"}: MB at most, and MB before the model was loaded."""
    Artifact.open(folder)  # a damaged one is refused here, in its own words
    command = [sys.executable, "-m", "core.evaluation.memory", str(folder.resolve()), "--threads", str(threads)]
    if variant is not None:
        command += ["--variant", variant]
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
    return told_by(command, f"peak memory of {folder}", {**os.environ, "PYTHONPATH": path})
