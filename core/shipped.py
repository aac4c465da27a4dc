"""The artifact of a kit's shipped weights, exported once for this machine and kept in the cache."""

from __future__ import annotations

import inspect
import os
import shutil
import tempfile
from itertools import islice
from pathlib import Path

from rich.console import Console

from core.cache import cache_folder
from core.evaluation.bench import available_cores, bench
from core.export import Artifact, export_kit, onnx, openvino
from core.kit import InputError, Kit

THREADS = min(2, len(available_cores()))
SECONDS = 4.0


def shipped_artifact(kit: Kit) -> Artifact:
    """Export a kit's shipped models on first use, choose the fastest variant here, and open the artifact."""
    weights = sorted((Path(inspect.getfile(type(kit))).parent / "weights").rglob("*"))
    versions = f"ort{onnx.version()}-ov{openvino.version()}"  # another runtime may run, and choose, differently
    place = cache_folder(
        f"{kit.name}-artifact-{versions}", [p for p in weights if p.suffix in (".safetensors", ".json")]
    )
    if place.exists():
        try:
            return Artifact.open(place)
        except InputError as error:
            Console(stderr=True).print(f"{error}; exporting anew", style="dim", highlight=False, markup=False)
    console = Console(stderr=True)
    console.print(
        "first use: exporting the shipped weights for this machine (a minute or two)", style="dim", highlight=False
    )
    models, meta = kit.shipped()
    # built apart and moved in with its choice made: a kill, or another fitkit at the same time, leaves no half of it
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=place.name) as work:
        artifact = export_kit(models, kit, kit.default_target, Path(work) / "artifact", meta)
        few = list(islice(kit.dataset(None, "test", "smoke"), 8))
        runs = {name: kit.pipeline(artifact.as_module(name, THREADS), few) for name in artifact.variants}
        timings = bench(runs, seconds=SECONDS, threads=THREADS, label="choosing the fastest variant").timings
        artifact.choose(min(timings, key=lambda name: timings[name].p50))
        shutil.rmtree(place, ignore_errors=True)
        try:
            os.replace(artifact.folder, place)
        except OSError:
            if not place.exists():  # not one that another process has just moved in
                raise
    return Artifact.open(place)
