"""What a better detector as teacher is worth to one that a search has found.

    python benchmarks/pcb_distil.py --weights DIR --out DIR [--data DIR] [--epochs 16] [--teacher DIR] [--scratch]

Setup: the detector in --weights (what `fitkit search` left in `winner`) is trained on for --epochs twice with the same
batches, with --scratch from random weights (the same for both): by the annotations alone, and towards a teacher as
well, the shipped detector or that of --teacher. Each keeps
its best epoch by mAP50-95 on validation boards; both are scored in torch on the report split, which neither looked at.
Leaves `alone` and `taught`, which `fitkit run --weights` takes, and `distil.json` in --out, with the gain and its 95 %
interval over boards drawn again; a training that is done is kept, one that was killed goes on.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from core.evaluation.detection import mean_average_precision
from core.evaluation.measure import device
from core.figures import today
from core.files import write_text
from core.weights import load_weights, save_weights
from kits.pcb_inspection import KIT, search, training
from kits.pcb_inspection.data.augment import prepare
from kits.pcb_inspection.data.resolution import seen_at
from kits.pcb_inspection.model.design import FILE, load_design, save_design
from kits.pcb_inspection.model.network import CLASS_COUNT, PairDetector

WEIGHTS = "fp32.safetensors"
AGAIN = 400
"""Times that the boards are drawn again."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--weights", type=Path, required=True)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--data", type=Path)
    options.add_argument("--epochs", type=int, default=16)
    options.add_argument("--lr", type=float, default=6e-4)
    options.add_argument("--teacher", type=Path)
    options.add_argument("--scratch", action="store_true")
    options.add_argument("--preset", choices=("smoke", "full"), default="full")
    given = options.parse_args()
    train, validation = (prepare(KIT.dataset(given.data, split, given.preset)) for split in ("train", "val"))
    design, teacher = load_design(given.weights / FILE), KIT.model(given.teacher)
    assert isinstance(teacher, PairDetector)
    schedule = replace(training.SCHEDULES[given.preset], epochs=given.epochs, lr=given.lr, evaluate_every=2, seed=1)
    trained: dict[str, PairDetector] = {}
    for way in ("taught", "alone"):
        torch.manual_seed(0)
        place, detector = given.out / way, PairDetector(design)
        if not (place / WEIGHTS).exists():
            if not given.scratch:
                load_weights(detector, given.weights / WEIGHTS)
            place.mkdir(parents=True, exist_ok=True)
            save_design(design, place / FILE)
            folder, larger = place / "training", [teacher] if way == "taught" else []
            fitted = training.train_detector(
                train, validation, schedule, folder, folder.is_dir(), start=detector, larger=larger
            )
            save_weights(fitted.model, place / WEIGHTS)
        load_weights(detector, place / WEIGHTS)
        trained[way] = detector.eval()
        print(way, search.average_precision(detector, validation, design.size), "% on validation boards", flush=True)
    report = prepare(KIT.dataset(given.data, KIT.report_split(given.data), "full"))
    boards = [seen_at(pair, design.size) for pair in report]
    truths = {b.image_id: (b.boxes, b.labels) for b in boards}
    found = {way: training.detections(detector, boards) for way, detector in trained.items()}

    def score(way: str, chosen: list[str]) -> float:
        """mAP50-95 in % of boards, one that is drawn twice counted twice."""
        again = {f"{i} {name}": name for i, name in enumerate(chosen)}
        said, true = ({key: each[name] for key, name in again.items()} for each in (found[way], truths))
        return 100 * mean_average_precision(said, true, CLASS_COUNT)

    names, rng = sorted(truths), np.random.default_rng(0)
    gains = []
    for _ in range(AGAIN):
        drawn = [names[i] for i in rng.integers(len(names), size=len(names))]
        gains.append(score("taught", drawn) - score("alone", drawn))
    done = {
        "map5095": {way: round(score(way, names), 3) for way in trained},
        "gain": round(score("taught", names) - score("alone", names), 3),
        "interval": [round(float(v), 3) for v in np.percentile(gains, (2.5, 97.5))],
        "boards": len(names), "epochs": given.epochs, "scratch": given.scratch, "device": device(), "date": today(),
    }  # fmt: skip
    write_text(given.out / "distil.json", json.dumps(done, indent=1) + "\n")
    print(json.dumps(done, indent=1))


if __name__ == "__main__":
    main()
