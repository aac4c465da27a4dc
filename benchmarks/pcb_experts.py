"""What experts by the sign of a difference are worth to pcb_inspection, beside crops through the detector and no crops.

    python benchmarks/pcb_experts.py --out DIR [--data DIR] [--epochs 64] [--preset full] [--threads 2]

Setup: an expert that knows copper lost alone is trained from random weights towards the shipped detector as well,
quantized in training as the detector is, and exported. All run INT8 in OpenVINO. Each way's threshold, the shift of its
boxes, and the sign that an expert is asked about are frozen on validation boards; scores are of the report split; times
are of the network's part alone, in turns, on good boards with defects drawn into them. Leaves `weights` and `artifact`
of the expert, `experts.json` and `experts.md` in --out. Killed, it goes on with the epoch when it is started again.
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
from core.evaluation.measure import device, runtime_title
from core.export import Artifact, export, reshaped
from core.figures import today
from core.files import write_text
from core.kit import Graph
from core.weights import load_weights, save_weights
from kits.pcb_inspection import KIT, training
from kits.pcb_inspection.acceptance import score
from kits.pcb_inspection.conditional import CROP, Conditional, conditional, crops_of, crossover
from kits.pcb_inspection.data.augment import prepare
from kits.pcb_inspection.experts import DESIGN, BothWays, ExpertKit, Experts, freeze_sign, train_expert
from kits.pcb_inspection.frozen import freeze_shift, freeze_threshold, shifted
from kits.pcb_inspection.gates import DENSITIES, NEVER, crowded, times
from kits.pcb_inspection.inspection import detect
from kits.pcb_inspection.model.design import FILE, save_design
from kits.pcb_inspection.model.inspector import input_side
from kits.pcb_inspection.model.network import PairDetector
from kits.pcb_inspection.recipes import DEFAULT, RECIPES

VARIANT = "int8-openvino"
WEIGHTS = "fp32.safetensors"
SHOWN = ("official_ap", "map33", "map5095", "recall_any", "recall_right", "precision")


def expert(given: argparse.Namespace) -> Artifact:
    """Train, quantize and export the expert, unless that is done."""
    place = given.out / "weights"
    place.mkdir(parents=True, exist_ok=True)
    detector = PairDetector(DESIGN)
    if not (place / WEIGHTS).is_file():
        train, validation = (prepare(KIT.dataset(given.data, split, given.preset)) for split in ("train", "val"))
        schedule = replace(training.SCHEDULES[given.preset], epochs=given.epochs)
        folder, teacher = given.out / "training", KIT.model()
        assert isinstance(teacher, PairDetector)
        fitted = train_expert(train, validation, schedule, folder, folder.is_dir(), [teacher])
        save_weights(fitted.model, place / WEIGHTS)
    load_weights(detector, place / WEIGHTS)
    save_design(DESIGN, place / FILE)
    if (given.out / "artifact" / "manifest.json").is_file():
        return Artifact.open(given.out / "artifact")
    small, _ = compress(
        detector.eval(), RECIPES[DEFAULT], ExpertKit(), data=given.data, preset=given.preset,
        folder=given.out / "steps", resume=True,
    )  # fmt: skip
    example = torch.rand(1, 4, CROP, CROP, generator=torch.Generator().manual_seed(0)).round()
    graph = Graph("expert", {"planes": example}, ("classes", "distances"))
    return export({"int8": small}, (graph,), KIT.default_target, given.out / "artifact", kit=KIT.name)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--data", type=Path)
    options.add_argument("--epochs", type=int, default=64)
    options.add_argument("--preset", choices=("smoke", "full"), default="full")
    options.add_argument("--threads", type=int, default=2)
    given = options.parse_args()
    lost = expert(given)
    models, meta = KIT.shipped()
    whole = export(
        {"int8": models["int8"]}, KIT.exports(), KIT.default_target, given.out / "detector", kit=KIT.name, meta=meta
    )
    validation = KIT.dataset(given.data, "val", given.preset)
    report = KIT.dataset(given.data, KIT.report_split(given.data), given.preset)
    crops = conditional(whole, VARIANT, given.threads)
    side = input_side(crops.dense)
    sign = freeze_sign(validation, side)
    experts = Experts(crops_of(lost, VARIANT, given.threads), sign["area"])
    ways: dict[str, nn.Module] = {
        "always dense": crops.dense,
        "crops": crops,
        "experts": Conditional(crops.dense, experts, crops.area, crossover(crops.dense, experts, side)),
        "crops however many": Conditional(crops.dense, crops.crops, crops.area, NEVER),
        "experts however many": Conditional(crops.dense, experts, crops.area, NEVER),
        "the expert alone, whole tiles both ways": BothWays(
            reshaped(lost, [(2, 4, side, side)], VARIANT, given.threads)
        ),
    }
    rows = {name: scored(module, validation, report) for name, module in ways.items()}
    done = {
        "ways": rows, "sign": sign, "crossover": {n: ways[n].crossover for n in ("crops", "experts")},
        "density": density(ways, report, side, given.threads),
        "boards": {"val": len(validation), "report": len(report)},
        "parameters": sum(p.numel() for p in PairDetector(DESIGN).parameters()),
        "runtime": runtime_title(whole, VARIANT, given.threads), "device": device(), "date": today(),
    }  # fmt: skip
    write_text(given.out / "experts.json", json.dumps(done, indent=1) + "\n")
    text = table(done)
    write_text(given.out / "experts.md", text)
    print(text)


def scored(module: nn.Module, validation: Any, report: Any) -> dict[str, Any]:
    """Metrics of a way on the report split, at a threshold and a shift frozen on validation boards."""
    truths = [{p.image_id: (p.boxes, p.labels) for p in pairs} for pairs in (validation, report)]
    found = detect(module, validation, "validating")
    more = freeze_shift(found, truths[0])
    threshold = freeze_threshold(shifted(found, more), truths[0])
    if isinstance(module, Conditional):
        module.ways.clear()
    said = shifted(detect(module, report, "inspecting"), more)
    metrics = score(said, truths[1], threshold, {p.image_id: p.group for p in report}).figures()
    tiles = dict(module.ways) if isinstance(module, Conditional) else {"dense": len(report)}
    return {"threshold": threshold, "tiles": tiles, **{name: metrics[name][0] for name in SHOWN}}


def density(ways: dict[str, nn.Module], pairs: Any, side: int, threads: int) -> list[dict[str, float]]:
    """Milliseconds of each way by the defects drawn into good boards, in turns."""
    return [{"defects": float(n), **times(ways, crowded(pairs, n, side), threads)} for n in DENSITIES]


def table(done: dict[str, Any]) -> str:
    """Both tables as Markdown."""
    head = ["way", *(f"{name} [%]" for name in SHOWN), "tiles"]
    lines = [head, ["---"] * len(head)]
    for name, row in done["ways"].items():
        tiles = ", ".join(f"{n} {way}" for way, n in sorted(row["tiles"].items()))
        lines.append([name, *(f"{row[k]:.2f}" for k in SHOWN), tiles])
    names = [n for n in done["density"][0] if n != "defects"]
    times = [["defects", *(f"{n} [ms]" for n in names)], ["---"] * (len(names) + 1)]
    times += [[f"{row['defects']:.0f}", *(f"{row[n]:.2f}" for n in names)] for row in done["density"]]
    both = ["\n".join("| " + " | ".join(row) + " |" for row in part) for part in (lines, times)]
    return "\n\n".join(both) + "\n"


if __name__ == "__main__":
    main()
