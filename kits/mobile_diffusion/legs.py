"""A long training in legs: at a constant rate for as long as there is time, then down to nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from core.files import replaced
from core.train import Schedule, fit

Look = Callable[[int, nn.Module], None]
"""Called after an epoch with the number of epochs done and the averaged model."""

STOP = "next"
"""Name of the file that ends a leg."""


@dataclass(frozen=True)
class Ramps(Schedule):
    """Linear over `up` steps to `lr`, constant, linear over the last `down` steps to nothing."""

    up: int = 100
    down: int = 0

    def rate(self, step: int, total: int) -> float:
        """The learning rate at a step."""
        rising = min(1.0, (step + 1) / max(1, self.up))
        return self.lr * min(rising, (total - step) / self.down if self.down else 1.0)


def train_legs(
    model: nn.Module,
    legs: Sequence[Ramps],
    steps: int,
    name: Path,
    batches: Callable[[int, Ramps], Iterable[Any]],
    loss: Callable[[nn.Module, Any], Tensor],
    look: Look,
    resume: bool,
) -> None:
    """Train a model in place, leg by leg, each from the averaged weights at the end of the one before.

    Epochs of `steps` steps are counted through: `batches(epoch, leg)` are those of an epoch, `look(epochs done,
    average)` is called after each. A leg that is done leaves `<name>-<number>-<constant or falling>.safetensors`, so
    that other legs may follow it in a later session: a constant rate goes on although a falling one was run already.
    """
    from accelerate import PartialState

    before = 0
    for number, leg in enumerate(legs):
        folder = name.with_name(f"{name.name}-{number}-{'falling' if leg.down else 'constant'}")
        done = folder.with_suffix(".safetensors")
        if resume and done.exists():
            model.load_state_dict(load_file(done))
        else:
            _leg(model, leg, steps, folder, batches, loss, look, before, resume)
            if PartialState().is_main_process:
                with replaced(done) as fresh:
                    save_file({k: v.cpu().contiguous() for k, v in model.state_dict().items()}, str(fresh))
        before += leg.epochs
    model.eval()


def _leg(
    model: nn.Module,
    leg: Ramps,
    steps: int,
    folder: Path,
    batches: Callable[[int, Ramps], Iterable[Any]],
    loss: Callable[[nn.Module, Any], Tensor],
    look: Look,
    before: int,
    resume: bool,
) -> None:
    stop = folder.with_name(STOP)

    def after(epoch: int, average: nn.Module) -> bool:
        look(before + epoch + 1, average)
        stopped = stop.exists()
        stop.unlink(missing_ok=True)
        return stopped

    fit(
        model,
        lambda epoch: batches(before + epoch, leg),
        loss,
        leg,
        steps_per_epoch=steps,
        folder=folder,
        resume=resume,
        on_epoch=after,
        label=folder.name,
    )
