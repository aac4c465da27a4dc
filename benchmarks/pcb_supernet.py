"""The stored supernet of pcb_inspection trained on, for choices that its space did not hold when it was trained.

    python benchmarks/pcb_supernet.py [--data DIR] --weights benchmarks/weights/pcb_supernet.safetensors
        --out OUT [--epochs 8]

One phase with everything free, as `fitkit search pcb_inspection` ends its own training with. Leaves
`supernet.safetensors` in --out, from which `fitkit search pcb_inspection --out OUT --resume` goes on. Killed, it goes
on with the epoch when it is started again.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from core.nas import Phase
from core.weights import load_weights
from kits.pcb_inspection import KIT, training
from kits.pcb_inspection.search import CHOICES, Supernet, shrink


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path)
    options.add_argument("--weights", type=Path, required=True)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--epochs", type=int, default=8)
    options.add_argument("--preset", choices=("smoke", "full"), default="full")
    given = options.parse_args()
    torch.manual_seed(1)
    net = Supernet()
    load_weights(net, given.weights)
    basis = training.SCHEDULES[given.preset]
    phase = Phase("all", tuple(CHOICES), replace(basis, epochs=given.epochs, lr=basis.lr / 2, seed=1))
    pairs = KIT.dataset(given.data, "train", given.preset)
    shrink(net, pairs, [phase], given.out, (given.out / "supernet").is_dir())


if __name__ == "__main__":
    main()
