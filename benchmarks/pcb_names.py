"""Names on board designs that a detector has never seen: one trained for each design of the training boards without it.

    python benchmarks/pcb_names.py [--data DIR] --out OUT [--weights benchmarks/weights/pcb_searched] [--epochs 8]

Each is of the design beside --weights, trained from random weights on the other designs and on new boards of the
generator, and judged on its own: with the network's names alone, and with what a defect does to pieces of copper
beside them (`kits.pcb_inspection.model.naming`), which is counted on the other designs. Threshold and shift are those
of the boards judged, and the constants of that rule were chosen on DeepPCB's training designs, so on those it
flatters both ways and the second a little more. Leaves `names.json` and `names.md`, and the trained weights by
design. Killed, it goes on where it was. In torch, four to nine minutes a design on one core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from core.evaluation.measure import device
from core.figures import today
from core.files import write_text
from core.weights import load_weights, save_weights
from kits.pcb_inspection import KIT, training
from kits.pcb_inspection.acceptance import score
from kits.pcb_inspection.data.augment import Ready, prepare
from kits.pcb_inspection.data.resolution import seen_at
from kits.pcb_inspection.frozen import freeze_names, freeze_shift, freeze_threshold, shifted
from kits.pcb_inspection.model.design import FILE, Design, load_design
from kits.pcb_inspection.model.naming import Names, told
from kits.pcb_inspection.model.network import PairDetector
from kits.pcb_inspection.model.pair import stack

SHOWN = {
    "map33": "mAP@0.33", "official_ap": "pooled AP", "official_f": "F", "recall_any": "found", "recall_right": "right",
}  # fmt: skip
FRESH = 160
SEED = 5


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--weights", type=Path, default=Path("benchmarks/weights/pcb_searched"))
    options.add_argument("--epochs", type=int, default=8)
    options.add_argument("--preset", choices=("smoke", "full"), default="full")
    given = options.parse_args()
    design = load_design(given.weights / FILE)
    train, val = (prepare(KIT.dataset(given.data, name, given.preset)) for name in ("train", "val"))
    rows = []
    for group in sorted({pair.group for pair in train}):
        others = [pair for pair in train if pair.group != group]
        without = trained(design, others, val, given.epochs, given.out / group)
        rows.append(judged(without, [pair for pair in train if pair.group == group], freeze_names(others, design.size)))
    every = sum(row["defects"] for row in rows)
    found = {"designs": rows, "epochs": given.epochs, "defects": every, "device": device(), "date": today()}
    write_text(given.out / "names.json", json.dumps(found, indent=1) + "\n")
    write_text(given.out / "names.md", markdown(found))
    print(markdown(found))


def trained(design: Design, train: Sequence[Ready], val: Sequence[Ready], epochs: int, folder: Path) -> PairDetector:
    """A detector that has seen `train` alone, from random weights; read back where it is there."""
    detector, file = PairDetector(design), folder / "fp32.safetensors"
    if not file.is_file():
        schedule = replace(training.SCHEDULES["full"], epochs=epochs, seed=SEED)
        place = folder / "training"
        fitted = training.train_detector(
            train, val[:12], schedule, place, place.is_dir(), start=detector, fresh=min(FRESH, len(train))
        )
        save_weights(fitted.model, file)
    load_weights(detector, file)
    return detector.eval()


def judged(detector: PairDetector, pairs: Sequence[Ready], names: Names) -> dict[str, Any]:
    """Metrics in % on boards of a design by the network's names, and with the pieces; threshold and shift are of these.

    "pieces" is the share of true boxes that the pieces alone name as the annotators did.
    """
    pairs = [seen_at(pair, detector.design.size) for pair in pairs]
    ways = {"alone": training.detections(detector, pairs), "with": training.detections(detector, pairs, names)}
    alone = 0
    for pair in pairs:
        planes = stack(pair.test, pair.template)
        alone += sum(told(planes, box, names).argmax() == label for box, label in zip(pair.boxes, pair.labels))
    truths = {pair.image_id: (pair.boxes, pair.labels) for pair in pairs}
    defects = sum(len(pair.labels) for pair in pairs)
    row: dict[str, Any] = {"design": pairs[0].group, "boards": len(pairs), "defects": defects}
    for way, predictions in ways.items():
        moved = shifted(predictions, freeze_shift(predictions, truths))
        metrics = score(moved, truths, freeze_threshold(moved, truths), {p.image_id: p.group for p in pairs}).figures()
        row[way] = {key: metrics[key][0] for key in SHOWN}
    return {**row, "pieces": 100 * int(alone) / defects}


def markdown(found: dict[str, Any]) -> str:
    """A row for each design: the network's names, and with the pieces."""
    columns = [f"{title} [%]" for title in SHOWN.values()]
    lines = [
        "| design never seen | defects | " + " | ".join(columns) + " | pieces alone [%] |",
        "|:--|--:|" + "--:|" * len(columns) + "--:|",
    ]
    for row in found["designs"]:
        cells = [f"{row['alone'][key]:.1f} to {row['with'][key]:.1f}" for key in SHOWN]
        lines.append(f"| {row['design']} | {row['defects']:,} | {' | '.join(cells)} | {row['pieces']:.1f} |")
    lines += [
        "",
        f"From the network's names to those with pieces beside them; a detector for each design, trained for "
        f"{found['epochs']} epochs without it, in torch, {found['device']}, {found['date']}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
