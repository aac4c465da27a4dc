"""A searched detector of pcb_inspection trained on with boards of the generator that are drawn anew every epoch.

    python benchmarks/pcb_winner.py [--data DIR] --weights benchmarks/weights/pcb_searched --out OUT
        [--epochs 48] [--lr 1e-3] [--fresh 320] [--seed 0] [--expert benchmarks/weights/pcb_expert]

It goes on towards the annotations and towards the detector that ships, or the mean of that and of --expert, looked at
both ways (`benchmarks/pcb_experts.py`); the epoch is chosen by mAP50-95 on validation boards. Leaves
`fp32.safetensors`, `design.json` and `training.json` in --out, which `fitkit run pcb_inspection --weights OUT`
quantizes and scores. Killed, it goes on with the epoch when it is started again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from core.files import write_text
from core.weights import load_weights, save_weights
from kits.pcb_inspection import KIT, training
from kits.pcb_inspection.data.augment import prepare
from kits.pcb_inspection.experts import BothWays
from kits.pcb_inspection.model.design import FILE, load_design, save_design
from kits.pcb_inspection.model.network import PairDetector

WEIGHTS = "fp32.safetensors"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path)
    options.add_argument("--weights", type=Path, required=True)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--epochs", type=int, default=48)
    options.add_argument("--lr", type=float, default=1e-3)
    options.add_argument("--fresh", type=int, default=320)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--expert", type=Path)
    options.add_argument("--preset", choices=("smoke", "full"), default="full")
    given = options.parse_args()
    design = load_design(given.weights / FILE)
    detector, teachers = PairDetector(design), [KIT.model()]
    if given.expert is not None:
        teachers.append(BothWays(KIT.model(given.expert)))
    load_weights(detector, given.weights / WEIGHTS)
    train, validation = (prepare(KIT.dataset(given.data, split, given.preset)) for split in ("train", "val"))
    before = training.mean_average_precision_5095(detector.eval(), validation)
    basis = training.SCHEDULES[given.preset]
    schedule = replace(basis, epochs=given.epochs, lr=given.lr, seed=given.seed)
    folder = given.out / "training"
    fitted = training.train_detector(
        train, validation, schedule, folder, folder.is_dir(), start=detector, larger=teachers, fresh=given.fresh
    )
    save_weights(fitted.model, given.out / WEIGHTS)
    save_design(design, given.out / FILE)
    after = training.mean_average_precision_5095(fitted.model.eval(), validation)
    write_text(given.out / "training.json", json.dumps(fitted.history, indent=1) + "\n")
    print(f"mAP50-95 on the validation boards {before:.2f} to {after:.2f} %")


if __name__ == "__main__":
    main()
