"""One table from one run: YOLOv8n, YOLO11n and YOLO26n, FP32 and INT8, beside the detector of pcb_inspection.

    python benchmarks/pcb_table.py --out DIR [--data DIR] [--yolo DIR] [--seconds 60] [--side 16384]

Setup: --yolo holds what `benchmarks/pcb_yolo.py --architecture NAME --out DIR/NAME` left (`weights.safetensors`, and
`metrics.json` with its epochs); a YOLO that is not there has random weights, its row says so and has no accuracy. All
run in OpenVINO on two threads, in turns; decoding files is timed nowhere; ours registers the template as well. INT8 of
the YOLOs is Ultralytics' own, after training, on boards of the training split. Thresholds and the shift of boxes are
frozen on validation boards, scores are of the report split. The scan is boards side by side, --side pixels square, once
a row; a YOLO's tiles are run one after the other, as large and as many as ours, and its seams are not joined. Peak
memory is that of a process that inspects one board. Leaves `table.json` and `table.md` in --out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.evaluation.apart import told_by
from core.evaluation.bench import bench
from core.evaluation.measure import device, runtime_title
from core.evaluation.memory import resident
from core.export import Artifact, export
from core.figures import today
from core.files import write_text
from core.hardware import profile
from core.report import read_json
from kits.pcb_inspection import KIT
from kits.pcb_inspection.acceptance import score
from kits.pcb_inspection.baseline import ARCHITECTURES, detector, exported, yolo_macs
from kits.pcb_inspection.data.deeppcb import Pair
from kits.pcb_inspection.data.scan import laid_out
from kits.pcb_inspection.frozen import freeze_shift, freeze_threshold, shifted
from kits.pcb_inspection.model.inspector import inspect, spans
from kits.pcb_inspection.model.pair import Grey

THREADS = 2
PRECISIONS = ("FP32", "INT8")
CALIBRATION = 128
"""Boards that a YOLO's INT8 is calibrated on."""
SHOWN = {"map33": "mAP@0.33", "official_ap": "pooled AP", "map50": "mAP50", "map5095": "mAP50-95",
         "recall_right": "recall, right class"}  # fmt: skip
HEAD = ("detector", "weights [MB]", "GMAC", *(f"{title} [%]" for title in SHOWN.values()), "p50 [ms]", "p99 [ms]",
        "FPS", "peak [MB]", "scan [s]")  # fmt: skip


Look = Callable[[Grey, Grey], np.ndarray]
"""(test, template) to detections (n, 6)."""


@dataclass
class Row:
    """What is known of a detector; what was not measured is None or not there."""

    name: str
    size_mb: float
    macs: float
    trained: bool
    scores: dict[str, float] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    peak_mb: float | None = None
    scan_s: float | None = None

    def cells(self) -> list[str]:
        """As HEAD names them; empty where it was not measured."""
        accuracy = [f"{self.scores[key]:.2f}" if key in self.scores else "" for key in SHOWN]
        speed = [f"{self.times[key]:.4g}" if key in self.times else "" for key in ("p50", "p99", "fps")]
        rest = ["" if value is None else f"{value:.4g}" for value in (self.peak_mb, self.scan_s)]
        return [self.name, f"{self.size_mb:.2f}", f"{self.macs / 1e9:.2f}", *accuracy, *speed, *rest]


@dataclass(frozen=True)
class Yolo:
    """One of Ultralytics' detectors, exported once."""

    architecture: str
    precision: str
    weights: Path | None
    boards: Sequence[Pair]

    def file(self) -> Path:
        """In OpenVINO's format."""
        return exported(self.architecture, self.weights, self.boards if self.precision == "INT8" else ())

    def row(self) -> Row:
        """Sizes; no time yet."""
        untold = " (random weights: architecture only)"
        if self.weights:
            untold = f" ({read_json(self.weights.with_name('metrics.json'))['epochs']} epochs)"
        size = self.file().with_suffix(".bin").stat().st_size / 1e6
        return Row(
            f"{self.architecture} {self.precision}{untold}", size, yolo_macs(self.architecture), bool(self.weights)
        )

    def look(self) -> Look:
        """One tile."""
        detect = detector(self.file(), THREADS)
        return lambda test, template: detect(test)

    def scan(self, look: Look, test: Grey, template: Grey) -> None:
        """A large image, tile after tile."""
        for top, bottom, _ in spans(test.shape[0]):
            for left, right, _ in spans(test.shape[1]):
                look(np.ascontiguousarray(test[top:bottom, left:right]), template)


@dataclass(frozen=True)
class Ours:
    """The shipped detector in one precision."""

    artifact: Artifact
    precision: str

    @property
    def variant(self) -> str:
        """Its name in the artifact."""
        return f"{self.precision.lower()}-openvino"

    def row(self) -> Row:
        """Sizes; no time yet."""
        (graph,) = KIT.exports()
        macs = sum(layer.macs for layer in profile(KIT.model(), tuple(graph.inputs.values())))
        return Row(f"ours {self.precision}", self.artifact.size_bytes(self.variant) / 1e6, macs, True)

    def look(self) -> Look:
        """One pair."""
        module = self.artifact.as_module(self.variant, THREADS)
        return lambda test, template: inspect(module, test, template).detections

    def scan(self, look: Look, test: Grey, template: Grey) -> None:
        """A large pair."""
        look(test, template)


Detector = Yolo | Ours


def judge(row: Row, look: Look, validation: Sequence[Pair], report: Sequence[Pair]) -> None:
    """Scores of the report split at a threshold and shift frozen on validation boards."""
    sets = {"val": validation, "report": report}
    found = {name: {p.image_id: look(*p.load()) for p in pairs} for name, pairs in sets.items()}
    truths = {name: {p.image_id: (p.boxes, p.labels) for p in pairs} for name, pairs in sets.items()}
    move = freeze_shift(found["val"], truths["val"])
    threshold = freeze_threshold(shifted(found["val"], move), truths["val"])
    groups = {p.image_id: p.group for p in report}
    values = score(shifted(found["report"], move), truths["report"], threshold, groups).figures()
    row.scores = {key: values[key][0] for key in SHOWN}


def peak(given: argparse.Namespace, number: int) -> float:
    """MB of a process of its own that inspects a board with one of the detectors."""
    words = [sys.executable, __file__, *sys.argv[1:], "--only", str(number)]
    return float(told_by(words, f"peak memory of detector {number}")["peak"])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--data", type=Path)
    options.add_argument("--yolo", type=Path)
    options.add_argument("--seconds", type=float, default=60.0)
    options.add_argument("--side", type=int, default=16384)
    options.add_argument("--only", type=int, help=argparse.SUPPRESS)
    given = options.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    report = KIT.dataset(given.data, KIT.report_split(given.data), "full")
    calibration = KIT.dataset(given.data, "train", "full")[:CALIBRATION]
    folder = given.out / "artifact"
    if given.only is None:
        models, meta = KIT.shipped()
        export(models, KIT.exports(), KIT.default_target, folder, kit=KIT.name, meta=meta)
    artifact = Artifact.open(folder)
    best = {name: given.yolo / name / "weights.safetensors" for name in ARCHITECTURES if given.yolo}
    detectors: list[Detector] = [
        Yolo(name, precision, best[name] if name in best and best[name].is_file() else None, calibration)
        for name in ARCHITECTURES for precision in PRECISIONS
    ]  # fmt: skip
    detectors += [Ours(artifact, precision) for precision in PRECISIONS]
    if given.only is not None:
        detectors[given.only].look()(*report[0].load())
        print(json.dumps({"peak": resident("VmHWM")}))
        return
    rows = [one.row() for one in detectors]
    looks = [one.look() for one in detectors]
    validation = KIT.dataset(given.data, "val", "full")
    for row, look in zip(rows, looks):
        if row.trained:
            judge(row, look, validation, report)
            print(row.name, row.scores, flush=True)
    torch.set_num_threads(THREADS)
    calls = {row.name: _next(look, report) for row, look in zip(rows, looks)}
    timed = bench(calls, seconds=given.seconds * len(rows), threads=THREADS, label="all in turns")
    test, template, _ = laid_out(report, given.side)
    for number, (row, look, one) in enumerate(zip(rows, looks, detectors)):
        timing = timed.timings[row.name]
        row.times = {"p50": timing.p50, "p99": timing.p99, "fps": 1000 / timing.mean}
        began = time.perf_counter()
        one.scan(look, test, template)
        row.scan_s, row.peak_mb = time.perf_counter() - began, peak(given, number)
        print(row.name, row.times, round(row.scan_s, 2), row.peak_mb, flush=True)
    write(given, rows, len(report), artifact)


def _next(look: Look, pairs: Sequence[Pair]) -> Callable[[], Any]:
    waiting = cycle([pair.load() for pair in pairs[:16]])
    return lambda: look(*next(waiting))


def write(given: argparse.Namespace, rows: Sequence[Row], boards: int, artifact: Artifact) -> None:
    """The table, for programs and for people."""
    lines = [f"| {' | '.join(HEAD)} |", f"|{':--|' + '--:|' * (len(HEAD) - 1)}"]
    lines += [f"| {' | '.join(row.cells())} |" for row in rows]
    side = given.side
    note = f"{boards} boards of the report split; a scan of {side} x {side} px; {device()}, {THREADS} threads"
    write_text(given.out / "table.md", "\n".join([*lines, "", note]) + "\n")
    about = {
        "date": today(), "device": device(), "software": runtime_title(artifact, "int8-openvino", THREADS),
        "boards": boards, "data": "the folder given" if given.data else "the kit's own boards", "side": side,
    }  # fmt: skip
    told = {**about, "rows": [vars(row) for row in rows]}
    write_text(given.out / "table.json", json.dumps(told, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
