"""Ultralytics YOLO trained on the same boards and scored with the same metrics as pcb_inspection.

    python benchmarks/pcb_yolo.py --data DeepPCB --architecture yolov8n --epochs 100 --out runs/yolov8n [--resume]

Setup: random initial weights (no download), 640 x 640, Ultralytics' own trainer and defaults but for batches of 8 with
a step of the optimizer after each, exported by its own exporter to OpenVINO FP32; detections suppressed class-blind, as
ours are, and the threshold frozen on the same validation boards. Leaves `metrics.json`, `predictions/` and
`weights.safetensors` in --out. An epoch of yolov8n takes three minutes on one core that multiplies bfloat16.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from core.figures import today
from core.files import write_text
from kits.pcb_inspection.acceptance import score
from kits.pcb_inspection.baseline import ARCHITECTURES, detect_yolo, exported, keep_yolo, train_yolo
from kits.pcb_inspection.data.deeppcb import split
from kits.pcb_inspection.frozen import freeze_threshold
from kits.pcb_inspection.predictions import write_predictions

THREADS = 2


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--architecture", choices=ARCHITECTURES, default="yolov8n")
    options.add_argument("--epochs", type=int, default=100)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--resume", action="store_true")
    given = options.parse_args()
    sets = {name: split(given.data, name) for name in ("train", "val", "holdout")}
    weights = train_yolo(given.architecture, sets["train"], sets["val"], given.out, given.epochs, given.resume)
    file = exported(given.architecture, weights)
    found = {name: detect_yolo(file, sets[name], THREADS) for name in ("val", "holdout")}
    truths = {name: {p.image_id: (p.boxes, p.labels) for p in pairs} for name, pairs in sets.items()}
    threshold = freeze_threshold(found["val"], truths["val"])
    metrics = score(found["holdout"], truths["holdout"], threshold, {p.image_id: p.group for p in sets["holdout"]})
    write_predictions(given.out / "predictions", found["holdout"])
    keep_yolo(given.architecture, weights, given.out / "weights.safetensors")
    about = {"architecture": given.architecture, "epochs": given.epochs, "trained": today()}
    write_text(given.out / "metrics.json", json.dumps({**about, **metrics.to_json()}, indent=1) + "\n")
    for name, (value, unit) in metrics.figures().items():
        print(f"{name:20} {value:.2f} {unit}")


if __name__ == "__main__":
    main()
