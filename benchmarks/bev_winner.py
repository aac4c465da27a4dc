"""A searched detector of bev_perception trained on along the generated streets, or the shipped one by the same rule.

    python benchmarks/bev_winner.py --out OUT [--weights benchmarks/weights/bev_searched] [--epochs 4] [--lr 5e-4]
        [--seed 0]

Without --weights the shipped `nano` is trained on, as the control. No epoch is chosen: what the last one leaves is
judged, by NDS on the validation frames in torch. Leaves `fp32.safetensors`, `detector.json`, `heads.safetensors` and
`training.json` in --out, which `fitkit run bev_perception --weights OUT` quantizes and scores on held-out frames.
An epoch of 2,200 frames takes a quarter of an hour on one core. Killed, it goes on with the epoch when it is started
again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

from core.files import write_text
from core.weights import save_weights
from kits.bev_perception import KIT, training
from kits.bev_perception.model.configs import save_config
from kits.bev_perception.model.detector import BEVFormer
from kits.bev_perception.search import scored

WEIGHTS = "fp32.safetensors"
NANO_HEADS = Path(__file__).parent / "weights" / "bev_nano_heads.safetensors"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--weights", type=Path)
    options.add_argument("--epochs", type=int, default=4)
    options.add_argument("--lr", type=float, default=5e-4)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--preset", choices=("smoke", "full"), default="full")
    given = options.parse_args()
    detector = KIT.model(given.weights)
    assert isinstance(detector, BEVFormer)
    train, validation = (KIT.dataset(None, split, given.preset) for split in ("train", "val"))
    before, _ = scored(detector.eval(), validation)
    print(f"NDS on the {len(validation)} validation frames {before:.2f} %", flush=True)
    schedule = replace(training.SCHEDULES[given.preset], epochs=given.epochs, lr=given.lr, seed=given.seed)
    heads = NANO_HEADS if given.weights is None else given.weights / training.HEADS
    folder = given.out / "training"
    fitted = training.train_detector(train, schedule, folder, folder.is_dir(), start=detector, heads=heads)
    assert isinstance(fitted.model, BEVFormer)
    save_config(fitted.model.config, given.out)
    save_weights(fitted.model.half(), given.out / WEIGHTS)
    shutil.copy(folder / training.HEADS, given.out / training.HEADS)
    write_text(given.out / "training.json", json.dumps(fitted.history, indent=1) + "\n")
    after, mean_ap = scored(KIT.model(given.out).eval(), validation)
    print(f"NDS on the {len(validation)} validation frames {before:.2f} to {after:.2f} % (mAP {mean_ap:.2f} %)")


if __name__ == "__main__":
    main()
