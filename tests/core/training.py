"""Small trainings for the tests of core.train, and a script that runs them in processes of their own.

`python training.py kill FOLDER EPOCH` trains and kills itself after an epoch, and `torchrun training.py share FOLDER`
trains in several processes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from core.train import Schedule, fit

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6
PLAIN = Schedule(epochs=3, batch_size=8, lr=0.01, weight_decay=0.1, warmup=0.2)
BUSY = Schedule(epochs=4, batch_size=8, lr=0.01, weight_decay=0.1, ema=0.9, clip=0.5)

Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """What a resumed run could lose: a batch norm's averages, dropout's draws, the layout of a channels-last kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(F.relu(self.norm(self.conv(x)))).mean((2, 3)))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def rows(epoch: int, count: int = STEPS) -> Iterator[Batch]:
    """Batches of a small regression, the same for the same epoch."""
    draws = torch.Generator().manual_seed(100 + epoch)
    for _ in range(count):
        x = torch.randn(8, 4, generator=draws)
        yield x, x.sum(1, keepdim=True)


def images(epoch: int) -> Iterator[Batch]:
    draws = torch.Generator().manual_seed(100 + epoch)
    for _ in range(STEPS):
        x = torch.randn(4, 3, 8, 8, generator=draws)
        yield x.contiguous(memory_format=torch.channels_last), x.mean((1, 2, 3), keepdim=False)[:, None]


def squared(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def negative_error(model: nn.Module) -> float:
    with torch.no_grad():
        return -squared(model, next(images(99))).item()


def train_net(
    folder: Path | None, *, resume: bool = False, on_epoch: Callable[[int, nn.Module], bool | None] | None = None
) -> Any:
    return fit(net(), images, squared, BUSY, steps_per_epoch=STEPS, folder=folder, resume=resume,
               evaluate=negative_error, on_epoch=on_epoch)  # fmt: skip


def same(one: nn.Module, two: nn.Module) -> bool:
    states = one.state_dict(), two.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def without_seconds(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in history]


def run_here(*arguments: str, launch: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [*(launch or [sys.executable]), str(Path(__file__)), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def kill(folder: Path, epoch: int) -> None:
    def on_epoch(done: int, model: nn.Module) -> None:
        if done == epoch:
            os.kill(os.getpid(), signal.SIGKILL)

    train_net(folder, on_epoch=on_epoch)


def share(folder: Path) -> None:
    """What one of several processes does: train, and leave what it saw and what came out."""
    seen: list[int] = []
    evaluated: list[int] = []

    def batches(epoch: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        yield from ((index, *batch) for index, batch in enumerate(images(epoch)))

    def loss(model: nn.Module, batch: tuple[int, Tensor, Tensor]) -> Tensor:
        seen.append(batch[0])
        return squared(model, batch[1:])

    def evaluate(model: nn.Module) -> float:
        evaluated.append(1)
        return negative_error(model)

    found = fit(net(), batches, loss, BUSY, steps_per_epoch=STEPS, folder=folder, evaluate=evaluate)
    leave(folder, found, {"seen": seen, "evaluated": len(evaluated)})


def double(folder: Path) -> None:
    leave(folder, fit(linear(), rows, squared, PLAIN, steps_per_epoch=STEPS), {})


def end_early(folder: Path) -> None:
    """A training that its first process ends after the second epoch."""
    found = fit(linear(), rows, squared, PLAIN, steps_per_epoch=STEPS, on_epoch=lambda done, model: done == 1)
    leave(folder, found, {})


def leave(folder: Path, found: Any, about: dict[str, Any]) -> None:
    rank = os.environ["RANK"]
    save_file({k: v.contiguous() for k, v in found.model.state_dict().items()}, str(folder / f"{rank}.safetensors"))
    (folder / f"{rank}.json").write_text(json.dumps({**about, "history": found.history}))


if __name__ == "__main__":
    if sys.argv[1] == "kill":
        kill(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        {"share": share, "double": double, "end": end_early}[sys.argv[1]](Path(sys.argv[2]))
