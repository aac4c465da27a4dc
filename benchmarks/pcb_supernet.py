"""The stored supernet of pcb_inspection trained on, for choices that its space did not hold when it was trained.

    python benchmarks/pcb_supernet.py --data DIR --weights benchmarks/weights/pcb_supernet.safetensors --out OUT
        [--epochs 8]

One phase with everything free, as `fitkit search pcb_inspection` ends its own training with. Leaves
`supernet.safetensors` in --out, from which `fitkit search pcb_inspection --out OUT --resume` goes on. Killed, it goes
on with the epoch when it is started again.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from core.nas import Phase, train_supernet
from core.weights import load_weights, save_weights
from kits.pcb_inspection import KIT, training
from kits.pcb_inspection.data.augment import drawn, prepare
from kits.pcb_inspection.search import CHOICES, PATHS, Supernet, path_loss


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
    net = net.to(memory_format=torch.channels_last)
    pairs = KIT.dataset(given.data, "train", given.preset)
    ready = [*prepare(pairs), *drawn(max(4, round(training.DRAWN * min(1.0, len(pairs) / 800))), 0)]
    basis = replace(training.SCHEDULES[given.preset], epochs=given.epochs, seed=1)
    steps = max(1, len(ready) * training.EACH // basis.batch_size)
    train_supernet(
        net,
        [Phase("all", tuple(CHOICES), replace(basis, lr=basis.lr / 2))],
        lambda epoch: training.training_batches(ready, basis.batch_size, steps, basis.seed, epoch),
        path_loss,
        steps_per_epoch=steps,
        folder=given.out / "supernet",
        resume=(given.out / "supernet").is_dir(),
        paths=PATHS,
    )
    save_weights(net, given.out / "supernet.safetensors")


if __name__ == "__main__":
    main()
