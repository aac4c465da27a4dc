"""What an ensemble of larger detectors as teacher is worth to the detector that a search has found.

    python benchmarks/pcb_distil.py --search DIR --out DIR [--data DIR] [--epochs 24] [--preset full]

Setup: the winner of `fitkit search` in --search, cut from its supernet, is trained on for --epochs twice with the same
batches: by the annotations alone, and towards the supernet's largest candidate as well. Each keeps its best epoch by
mAP50-95 on validation boards; both are scored in torch on the report split, which neither looked at. Leaves
`distil.json` in --out with the gain and its 95 % interval over boards drawn again; a training that is done is kept.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from core.evaluation.detection import mean_average_precision
from core.evaluation.measure import device
from core.figures import today
from core.files import write_text
from core.weights import load_weights, save_weights
from kits.pcb_inspection import KIT, search, training
from kits.pcb_inspection.data.augment import prepare
from kits.pcb_inspection.data.resolution import seen_at
from kits.pcb_inspection.model.design import FILE, load_design
from kits.pcb_inspection.model.network import CLASS_COUNT, PairDetector

AGAIN = 400
"""Times that the boards are drawn again."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--search", type=Path, required=True)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--data", type=Path)
    options.add_argument("--epochs", type=int, default=24)
    options.add_argument("--preset", choices=("smoke", "full"), default="full")
    options.add_argument("--only", choices=("alone", "taught"), help="train this one and leave the rest")
    given = options.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    train, validation = (KIT.dataset(given.data, split, given.preset) for split in ("train", "val"))
    judge = search.Judge(
        search.Setup(str(given.search), str(given.data or "") or None, given.preset), train, validation
    )
    design = load_design(given.search / "winner" / FILE)
    basis = training.SCHEDULES[given.preset]
    schedule = replace(basis, epochs=given.epochs, lr=basis.lr / 2)
    trained = {}
    for way in ("alone", "taught"):
        if given.only not in (None, way):
            continue
        detector, place = PairDetector(design), given.out / f"{way}.safetensors"
        if place.exists():
            load_weights(detector, place)
        else:
            detector.load_state_dict(judge.network(search.candidate_of(design)).state_dict())
            folder = given.out / way
            training.train_detector(
                prepare(train), judge.validation, schedule, folder, folder.is_dir(), start=detector,
                larger=[judge.largest()] if way == "taught" else (),
            )  # fmt: skip
            save_weights(detector, place)
        trained[way] = detector.eval()
    if given.only:
        return
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
        "boards": len(names), "epochs": given.epochs, "device": device(), "date": today(),
    }  # fmt: skip
    write_text(given.out / "distil.json", json.dumps(done, indent=1) + "\n")
    print(json.dumps(done, indent=1))


if __name__ == "__main__":
    main()
