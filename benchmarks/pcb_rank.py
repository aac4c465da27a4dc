"""Whether the supernet's shared weights rank detectors as training each of them alone does.

    python benchmarks/pcb_rank.py --search DIR --out DIR [--data DIR] [--candidates 10] [--epochs 12] [--preset full]

Setup: candidates drawn from the search space of `pcb_inspection` are scored by mAP50-95 on validation boards with the
weights of the supernet that `fitkit search` left in --search (supernet.safetensors), and after training each from
random weights for --epochs. Leaves `rank.json` in --out with Kendall's tau and its 95 % bootstrap interval; a candidate
that is trained already is not trained again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from core.evaluation.measure import device
from core.figures import today
from core.files import write_text
from core.nas import Space, kendall
from core.weights import load_weights, save_weights
from kits.pcb_inspection import KIT, search, training
from kits.pcb_inspection.data.augment import prepare
from kits.pcb_inspection.model.network import PairDetector


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--search", type=Path, required=True)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--data", type=Path)
    options.add_argument("--candidates", type=int, default=10)
    options.add_argument("--epochs", type=int, default=12)
    options.add_argument("--preset", choices=("smoke", "full"), default="full")
    given = options.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    train, validation = (KIT.dataset(given.data, split, given.preset) for split in ("train", "val"))
    judge = search.Judge(
        search.Setup(str(given.search), str(given.data or "") or None, given.preset), train, validation
    )
    ready, rng, space = prepare(train), np.random.default_rng(0), Space(search.CHOICES)
    schedule = replace(training.SCHEDULES[given.preset], epochs=given.epochs, evaluate_every=given.epochs)
    rows = []
    for number in range(given.candidates):
        candidate = space.draw(rng)
        design = search.design_of(candidate)
        place = given.out / f"{number:02d}.safetensors"
        alone = PairDetector(design)
        if place.exists():
            load_weights(alone, place)
        else:
            folder = given.out / f"{number:02d}"
            training.train_detector(ready, judge.validation, schedule, folder, folder.is_dir(), start=alone)
            save_weights(alone, place)
        shared = search.average_precision(judge.network(candidate), judge.validation, design.size)
        trained = search.average_precision(alone.eval(), judge.validation, design.size)
        rows.append({"candidate": candidate, "shared": shared, "alone": trained})
        print(json.dumps(rows[-1]))
    found = kendall([r["shared"] for r in rows], [r["alone"] for r in rows])
    about = {"date": today(), "device": device(), "boards": len(validation), "epochs": given.epochs}
    write_text(given.out / "rank.json", json.dumps({**about, **vars(found), "rows": rows}, indent=1) + "\n")
    print(f"Kendall's tau {found.tau:.2f} ({found.low:.2f} to {found.high:.2f}) over {found.count} candidates")


if __name__ == "__main__":
    main()
