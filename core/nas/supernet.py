"""One network that holds all candidates: trained by paths and by phases, and candidates cut from it.

Sources: single-path sampling (Guo et al. 2020), progressive shrinking (Cai et al. 2020), and the sandwich of the
largest, the smallest and some between them (Yu et al. 2020).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from core.kit import InputError
from core.nas.elastic import extract
from core.nas.space import Candidate, OneOf, Space, Value
from core.train import Fit, Schedule, fit


@runtime_checkable
class Supernet(Protocol):
    """A module of elastic layers that can be set to any candidate of its space.

    With an attribute `optional`, patterns of names, it tells which layers a candidate may leave out.
    """

    space: Space

    def configure(self, candidate: Candidate) -> None:
        """Set every layer to a candidate: what the next forward runs."""
        ...


@dataclass(frozen=True)
class Phase:
    """A part of the training: which choices are free, by name, the others at their largest, and for how long."""

    name: str
    free: tuple[str, ...]
    schedule: Schedule


Loss = Callable[[nn.Module, Any], Tensor]
"""The loss of the network as it is set, on a batch."""


def largest(space: Space) -> dict[str, Value]:
    """The last value of every choice: the candidate whose weights hold all others'. A `Span` gives its high end."""
    return {n: c.values[-1] if isinstance(c, OneOf) else c.high for n, c in space.choices.items()}


def smallest(space: Space) -> dict[str, Value]:
    """The first value of every choice."""
    return {n: c.values[0] if isinstance(c, OneOf) else c.low for n, c in space.choices.items()}


def within(space: Space, free: Sequence[str]) -> Space:
    """The space in which only the choices `free` are left, the others at their largest; the bounds are left out.

    A supernet learns candidates that no bound allows as well: they cost nothing to train with and make the weights of
    the others better. InputError for a name that is no choice.
    """
    unknown = [name for name in free if name not in space.choices]
    if unknown:
        raise InputError(f"phase: {', '.join(unknown)} is no choice of the space; known are {', '.join(space.choices)}")
    top = largest(space)
    return Space({n: c if n in free else OneOf((top[n],)) for n, c in space.choices.items()})


class _Paths(nn.Module):
    """A supernet with the loss of the paths that a step trains, so that the loop sees one module and one loss."""

    step: Tensor

    def __init__(self, supernet: nn.Module, loss: Loss, space: Space, paths: int, seed: int) -> None:
        super().__init__()
        self.supernet, self._loss, self._space, self._paths, self._seed = supernet, loss, space, paths, seed
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(self, batch: Any) -> Tensor:
        rng = np.random.default_rng((self._seed, int(self.step)))
        if self.training:
            self.step += 1
        chosen: list[Mapping[str, Value]] = [largest(self._space)]
        if self._space.size > 1:
            chosen = [self._space.draw(rng) for _ in range(self._paths)]
            if self._paths > 1:  # the sandwich: what lies between is better where both ends are
                chosen[:2] = [largest(self._space), smallest(self._space)]
        total: Tensor | None = None
        for candidate in chosen:
            assert isinstance(self.supernet, Supernet)
            self.supernet.configure(candidate)
            lost = self._loss(self.supernet, batch)
            total = lost if total is None else total + lost
        assert total is not None
        return total / len(chosen)


def train_supernet(
    supernet: nn.Module,
    phases: Sequence[Phase],
    batches: Callable[[int], Iterable[Any]],
    loss: Loss,
    *,
    steps_per_epoch: int,
    folder: Path | None = None,
    resume: bool = False,
    paths: int = 1,
    seed: int = 0,
) -> list[Fit]:
    """Train a supernet in place, phase after phase, each a training with a schedule of its own.

    A step trains `paths` candidates drawn from what the phase leaves free; from 2 on the largest and the smallest are
    among them. With `folder` each phase leaves its checkpoint there, and `resume` goes on after the last whole epoch.
    InputError for a network without elastic layers' protocol, and for a phase that frees what is no choice.
    """
    if not isinstance(supernet, Supernet):
        raise InputError(f"{type(supernet).__name__}: no supernet; give it a space and a method configure")
    spaces = [within(supernet.space, phase.free) for phase in phases]
    done = []
    for number, (phase, space) in enumerate(zip(phases, spaces)):
        net = _Paths(supernet, loss, space, paths, seed + number)
        place = folder / f"{number:02d}-{phase.name}" if folder is not None else None
        schedule = replace(phase.schedule, seed=phase.schedule.seed + number)
        found = fit(
            net, batches, lambda module, batch: module(batch), schedule,
            steps_per_epoch=steps_per_epoch, folder=place, resume=resume, label=f"supernet, {phase.name}",
        )  # fmt: skip
        done.append(found)
    supernet.eval()
    return done


def cut(
    supernet: nn.Module,
    candidate: Candidate,
    inputs: tuple[Tensor, ...],
    batches: Iterable[tuple[Tensor, ...]] | None = None,
) -> nn.Module:
    """A candidate as a plain network; with `batches` its batch norms' statistics are its own (`recalibrate`)."""
    if not isinstance(supernet, Supernet):
        raise InputError(f"{type(supernet).__name__}: no supernet; give it a space and a method configure")
    supernet.configure(candidate)
    plain = extract(supernet, *inputs, optional=getattr(supernet, "optional", ()))
    if batches is not None:
        recalibrate(plain, batches)
    return plain


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[tuple[Tensor, ...]]) -> int:
    """Give batch norms the mean and variance of what they see in `batches`, each batch as much as another.

    The statistics in a supernet are a mixture of all candidates, which fits none. Returns the number of batches;
    InputError without any.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
        norm.train()
    count = 0
    for arguments in batches:
        model(*arguments)
        count += 1
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    model.eval()
    if not count:
        raise InputError("recalibrate: no batch; give at least one")
    return count


def from_scratch(plain: nn.Module, seed: int) -> nn.Module:
    """The network of a candidate with fresh weights, for what it reaches when trained alone."""
    fresh = copy.deepcopy(plain)
    torch.manual_seed(seed)
    for module in fresh.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    return fresh
