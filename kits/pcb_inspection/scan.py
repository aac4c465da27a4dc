"""`python -m kits.pcb_inspection.scan ARTIFACT TEST TEMPLATE`: inspect it, print {"seconds", "peak", "detections"}.

A process of its own, because the peak of a process never falls again. It reads both files as `fitkit predict` does, at
a bit a pixel; the seconds begin after that, and hold registration, network, suppression and seams.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2

from core.evaluation.apart import told_by
from core.evaluation.memory import resident
from core.export import Artifact
from core.kit import InputError
from kits.pcb_inspection.conditional import conditional
from kits.pcb_inspection.data.deeppcb import Pair, find_pairs
from kits.pcb_inspection.data.scan import laid_out
from kits.pcb_inspection.model.inspector import inspect, tile_count
from kits.pcb_inspection.model.pair import Grey

SIDE = 16384
"""Of a panel by a line scan camera, pixels."""


@dataclass(frozen=True)
class Scanned:
    """What a scan took: seconds, MB (1e6 bytes) of the process at its peak, detections at the threshold, tiles."""

    seconds: float
    peak: float
    detections: int
    tiles: int


def scanned(artifact: Artifact, variant: str, threads: int, test: Grey, template: Grey, gated: bool = False) -> Scanned:
    """Inspect a scan (H, W) in a process of its own; raises InputError with that one's last words if it fails."""
    with tempfile.TemporaryDirectory(prefix="fitkit-scan-") as folder:
        files = [Path(folder) / f"{name}.png" for name in ("test", "template")]
        for file, image in zip(files, (test, template), strict=True):
            if not cv2.imwrite(str(file), image, [cv2.IMWRITE_PNG_COMPRESSION, 1]):
                raise InputError(f"{file}: a scan could not be written there; free some space or set TMPDIR")
        command = [sys.executable, "-m", "kits.pcb_inspection.scan", artifact.folder, *files, "--variant", variant,
                   "--threads", threads, *(["--gated"] if gated else [])]  # fmt: skip
        found = told_by([str(word) for word in command], f"a scan of {test.shape[1]} x {test.shape[0]} px")
    return Scanned(found["seconds"], found["peak"], found["detections"], tile_count(*test.shape))


def panel(artifact: Artifact, variant: str, threads: int, pairs: Sequence[Pair], side: int = SIDE) -> Scanned:
    """The boards of `pairs` side by side as one scan of `side` pixels, always dense: every tile through the network."""
    test, template, _ = laid_out(pairs, side)
    return scanned(artifact, variant, threads, test, template)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("artifact", type=Path)
    options.add_argument("test")
    options.add_argument("template")
    options.add_argument("--variant")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--gated", action="store_true")
    given = options.parse_args()
    artifact = Artifact.open(given.artifact)
    variant = artifact.variant(given.variant).name
    (pair,) = find_pairs(given.test, given.template)
    test, template = pair.load_packed()
    module = (
        conditional(artifact, variant, given.threads) if given.gated else artifact.as_module(variant, given.threads)
    )
    began = time.perf_counter()
    detections = inspect(module, test, template).detections
    seconds = time.perf_counter() - began
    sure = int((detections[:, 4] >= float(artifact.meta["threshold"])).sum())
    print(json.dumps({"seconds": round(seconds, 2), "peak": resident("VmHWM"), "detections": sure}))


if __name__ == "__main__":
    main()
