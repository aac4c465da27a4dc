"""How long a large scan takes: registration, network, suppression and seams, tile by tile; always dense and gated.

    python benchmarks/pcb_scan.py --out DIR [--data DIR] [--side 16384] [--rounds 3]

Setup: boards of the report split laid side by side up to a scan of --side pixels, test and template alike, and a second
scan without defects, whose test is its template; the detector INT8 in OpenVINO on two threads, always dense and with
the frozen gate, in turns. Every look is a process of its own, which reads the scan from PNG files as `fitkit predict`
does; decoding is not counted, the peak is that of the whole process. Leaves `scan.json` in --out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from core.evaluation.measure import device, runtime_title
from core.export import export
from core.figures import today
from core.files import write_text
from kits.pcb_inspection import KIT
from kits.pcb_inspection.conditional import gate_on
from kits.pcb_inspection.data.scan import laid_out
from kits.pcb_inspection.model.inspector import input_side, tile_count
from kits.pcb_inspection.scan import SIDE, scanned

THREADS = 2
VARIANT = "int8-openvino"
WAYS = ("dense", "gated")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--data", type=Path)
    options.add_argument("--side", type=int, default=SIDE)
    options.add_argument("--rounds", type=int, default=3)
    given = options.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    pairs = KIT.dataset(given.data, KIT.report_split(given.data), "full")
    models, meta = KIT.shipped()
    if "gate" not in meta:
        meta = {**meta, "gate": gate_on(KIT.dataset(given.data, "val", "full"), input_side(models["int8"]))}
    artifact = export(models, KIT.exports(), KIT.default_target, given.out / "artifact", kit=KIT.name, meta=meta)
    test, template, defects = laid_out(pairs, given.side)
    rows: list[dict[str, Any]] = []
    for name, board in {"as dense as the boards": test, "without defects": template}.items():
        ways: dict[str, dict[str, Any]] = {way: {"seconds": [], "peak_mb": []} for way in WAYS}
        for _ in range(given.rounds):
            for way, row in ways.items():
                found = scanned(artifact, VARIANT, THREADS, board, template, gated=way == "gated")
                row["seconds"].append(found.seconds)
                row["peak_mb"].append(round(found.peak))
                row["detections"] = found.detections
        rows.append({"scan": name, "defects": defects if board is test else 0, "ways": ways})
        print(name, ways, flush=True)
    report = {
        "what": f"{given.side} x {given.side} px, {tile_count(given.side, given.side)} tiles, {len(pairs)} boards",
        "data": "the folder given" if given.data else "the kit's own boards",
        "scans": rows,
        "device": device(),
        "software": runtime_title(artifact, VARIANT, THREADS),
        "date": today(),
    }
    write_text(given.out / "scan.json", json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
