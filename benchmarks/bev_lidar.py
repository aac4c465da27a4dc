"""What a LiDAR teacher gives the camera detector, by day and by night: training with and without it, by seeds.

    python benchmarks/bev_lidar.py --out DIR [--weights FILE] [--seeds 3] [--epochs 1] [--share 1] [--teacher-epochs 8]
        [--heads FILE] [--split test]

Setup: a teacher that sees pillars of LiDAR points is trained on the generated streets; then each seed trains the
shipped detector on, once towards the teacher's BEV and once without, on the same frames in the same order, and both
are scored in torch on the held-out streets (or those of --split val). The gain is that of each pair; its interval is
Student's over the seeds. Every training leaves its weights in --out and is not done again. Leaves `lidar.json` in
--out.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core.compress import compress
from core.evaluation.intervals import paired_gain
from core.evaluation.measure import device
from core.figures import today
from core.files import write_text
from core.kit import Recipe
from core.weights import load_weights, save_weights
from kits.bev_perception.acceptance import observed, verdict
from kits.bev_perception.kit import BevPerception
from kits.bev_perception.lidar import SCHEDULES, LearnFromLidar, observed_by_lidar, train_teacher
from kits.bev_perception.model.configs import NANO
from kits.bev_perception.model.teacher import LidarTeacher

GROUPS = ("all", "day", "night")


def scores(found: Any, samples: Any) -> dict[str, float]:
    """NDS and mAP in %, of all frames, by day and by night."""
    figures = verdict(samples, found, 0.3).figures()
    keys = {g: "" if g == "all" else f"_{g}" for g in GROUPS}
    return {f"{metric}_{g}": figures[f"{metric}{key}"][0] for metric in ("nds", "map") for g, key in keys.items()}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--weights", type=Path)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--epochs", type=int, default=1)
    options.add_argument("--share", type=float, default=1.0)
    options.add_argument("--teacher-epochs", type=int, default=8)
    options.add_argument("--heads", type=Path, help="what only training has, of the detector's last training")
    options.add_argument("--split", choices=("val", "test"), default="test")
    given = options.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    kit = BevPerception()
    original = kit.model(given.weights)
    train, test = kit.dataset(None, "train"), kit.dataset(None, given.split)
    path = given.out / "teacher.safetensors"
    if not path.exists():
        schedule = replace(SCHEDULES["full"], epochs=given.teacher_epochs)
        save_weights(train_teacher(train, schedule, given.out / "teacher", True).model, path)
    teacher = LidarTeacher(NANO).eval()
    load_weights(teacher, path)
    result: dict[str, Any] = {
        "date": today(), "device": device(), "runtime": f"torch {torch.__version__}", "split": given.split,
        "frames": len(test), "teacher_epochs": given.teacher_epochs,
        "epochs": given.epochs, "share": given.share, "teacher": scores(observed_by_lidar(teacher, test), test),
        "before": scores(observed(original, test, NANO, "before"), test), "runs": [],
    }  # fmt: skip
    for seed in range(given.seeds):
        run: dict[str, Any] = {"seed": seed}
        for name, weight in (("alone", 0.0), ("taught", 1.0)):
            place = given.out / f"{name}-{seed}.safetensors"
            step = LearnFromLidar(
                str(path), given.epochs, weight=weight, share=given.share, seed=seed, heads=str(given.heads or "")
            )
            learnt: nn.Module = original
            if place.exists():
                learnt = kit.model(place)
            else:
                learnt, _ = compress(original, Recipe(name, (step,), "", ""), kit)
                save_weights(learnt, place)
            run[name] = scores(observed(learnt.eval(), test, NANO, f"{name}, seed {seed}"), test)
        result["runs"].append(run)
        print(json.dumps(run))
    for key in result["before"]:
        gain = paired_gain([run["taught"][key] - run["alone"][key] for run in result["runs"]])
        mean = sum(run["alone"][key] for run in result["runs"]) / given.seeds
        result[f"gain_{key}"] = {"points": gain, "relative": [g / mean for g in gain] if mean else None}
        print(f"{key:10} {gain[0]:+.2f} points ({gain[1]:+.2f} to {gain[2]:+.2f})")
    write_text(given.out / "lidar.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
