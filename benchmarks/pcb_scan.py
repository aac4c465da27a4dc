"""How long a large scan takes: registration, network, suppression and seams, tile by tile; always dense and gated.

    python benchmarks/pcb_scan.py --out DIR [--data DIR] [--side 16384] [--rounds 3]

Setup: boards of the report split laid side by side up to a scan of --side pixels, test and template alike, and a second
scan without defects, whose test is its template; the detector INT8 in OpenVINO on two threads, once always dense and
once with the frozen gate, in turns. Decoding the files is not counted. The peak is that of the whole process, both
images and the runtime included, in a process of its own for each way, which reads the scan from PNG files as `fitkit
predict` does. Leaves `scan.json` in --out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import cv2

from core.evaluation.apart import told_by
from core.evaluation.measure import device, runtime_title
from core.evaluation.memory import resident
from core.export import Artifact, export
from core.figures import today
from core.files import write_text
from kits.pcb_inspection import KIT
from kits.pcb_inspection.conditional import conditional, gate_on
from kits.pcb_inspection.data.deeppcb import find_pairs
from kits.pcb_inspection.data.scan import laid_out
from kits.pcb_inspection.model.inspector import input_side, inspect, tile_count
from kits.pcb_inspection.model.packed import Packed
from kits.pcb_inspection.model.pair import Grey

THREADS = 2
VARIANT = "int8-openvino"
Scan = tuple[Grey, Grey] | tuple[Packed, Packed]
WAYS = ("dense", "gated")


def timed(artifact: Artifact, way: str, scan: Scan, rounds: int) -> dict[str, Any]:
    """Seconds of every round, and what was found."""
    module = conditional(artifact, VARIANT, THREADS) if way == "gated" else artifact.as_module(VARIANT, THREADS)
    threshold, seconds, found = float(artifact.meta["threshold"]), [], 0
    for _ in range(rounds):
        began = time.perf_counter()
        detections = inspect(module, *scan).detections
        seconds.append(round(time.perf_counter() - began, 2))
        found = int((detections[:, 4] >= threshold).sum())
    return {"seconds": seconds, "detections": found}


def peak(given: argparse.Namespace, way: str) -> float:
    """MB of a process of its own that inspects the scan once."""
    words = [sys.executable, __file__, "--out", str(given.out), "--only", way]
    return float(told_by(words, f"peak memory of a scan, {way}")["peak"])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--data", type=Path)
    options.add_argument("--side", type=int, default=16384)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    given = options.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    folder, files = given.out / "artifact", [given.out / f"{name}.png" for name in ("test", "template")]
    if given.only:
        (pair,) = find_pairs(*map(str, files))
        timed(Artifact.open(folder), given.only, pair.load_packed(), 1)
        print(json.dumps({"peak": resident("VmHWM")}))
        return
    pairs = KIT.dataset(given.data, KIT.report_split(given.data), "full")
    models, meta = KIT.shipped()
    if "gate" not in meta:
        meta = {**meta, "gate": gate_on(KIT.dataset(given.data, "val", "full"), input_side(models["int8"]))}
    artifact = export(models, KIT.exports(), KIT.default_target, folder, kit=KIT.name, meta=meta)
    test, template, defects = laid_out(pairs, given.side)
    for file, image in zip(files, (test, template)):
        cv2.imwrite(str(file), image)
    scans = {"as dense as the boards": (test, template), "without defects": (template, template)}
    rows = []
    for name, scan in scans.items():
        found = {way: timed(artifact, way, scan, given.rounds) for way in WAYS}
        rows.append({"scan": name, "defects": defects if scan[0] is test else 0, "ways": found})
        print(name, found, flush=True)
    report = {
        "what": f"{given.side} x {given.side} px, {tile_count(given.side, given.side)} tiles, {len(pairs)} boards",
        "data": "the folder given" if given.data else "the kit's own boards",
        "scans": rows,
        "peak_mb": {way: round(peak(given, way)) for way in WAYS},
        "device": device(),
        "software": runtime_title(artifact, VARIANT, THREADS),
        "date": today(),
    }
    write_text(given.out / "scan.json", json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
