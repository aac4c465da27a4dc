"""The step `Distill`: train the small model on its own loss and on what the teacher says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.compress import Outcome, handles
from core.distillation.feature import build_adapters, captured, features_loss, parse_pairs
from core.distillation.response import KINDS, responses_loss
from core.kit import Context, InputError, Step
from core.train import Schedule, fit

_ADAPTERS = "distillation_adapters"


@dataclass(frozen=True)
class Distill(Step):
    """Train on (1 - alpha) * task loss + alpha * response loss + beta * feature loss.

    `outputs` is the kind of every output of the network (see `response_loss`), or one kind for each in
    order. `features` are "student_layer=teacher_layer", or "layer" for the same name in both. `teacher`
    is a safetensors file for `kit.model`; empty: the uncompressed model that `compress` was given.
    """

    epochs: int
    lr: float
    batch_size: int = 8
    alpha: float = 0.5
    beta: float = 0.0
    temperature: float = 4.0
    outputs: str | tuple[str, ...] = "logits"
    features: tuple[str, ...] = ()
    teacher: str = ""

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("epochs", self.epochs >= 1, "1 or more"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
            ("lr", self.lr > 0, "more than 0"),
            ("alpha", 0 <= self.alpha <= 1, "0 to 1"),
            ("beta", self.beta >= 0, "0 or more"),
            ("temperature", self.temperature > 0, "more than 0"),
        ):
            if not good:
                raise InputError(f"Distill.{name}: {getattr(self, name)}, expected {expected}")
        for kind in (self.outputs,) if isinstance(self.outputs, str) else self.outputs:
            if kind not in KINDS:
                raise InputError(f"Distill.outputs: {kind!r}, expected one of {', '.join(KINDS)}")
        if bool(self.features) != (self.beta > 0):
            raise InputError("Distill.features: name layers and give beta > 0, or neither; one does nothing alone")


@handles(Distill)
def distill(model: nn.Module, step: Distill, context: Context) -> Outcome:
    """Train the given model against the teacher; its modules stay what they are."""
    kit, teacher = context.kit, _teacher(step, context)
    samples = kit.dataset(context.data, "train", context.preset)
    losses = _Losses(model, teacher, step, context)
    current: list[tuple[float, float, float]] = []
    epochs: dict[int, list[tuple[float, float, float]]] = {}

    def batches(epoch: int) -> Iterable[Any]:
        nonlocal current
        current = epochs.setdefault(epoch, [])
        return kit.batches(samples, step.batch_size, train=True, seed=context.seed + epoch)

    def loss(net: nn.Module, batch: Any) -> Tensor:
        task, response, feature = losses(net, batch)
        current.append((task.item(), response.item(), feature.item()))
        return (1 - step.alpha) * task + step.alpha * response + step.beta * feature

    folder: Path | None = context.folder / "distill" if context.folder is not None else None
    with _teaching(teacher, model):
        if step.beta:
            dry = next(iter(kit.batches(samples, step.batch_size, train=False, seed=context.seed)))
            model.add_module(_ADAPTERS, losses.adapters_for(dry, context.seed))
        try:
            trained = fit(
                model, batches, loss, Schedule(step.epochs, step.batch_size, step.lr, seed=context.seed),
                steps_per_epoch=math.ceil(len(samples) / step.batch_size), folder=folder, resume=context.resume,
                label="distil",
            ).model  # fmt: skip
        finally:
            if step.beta:
                delattr(model, _ADAPTERS)
    return Outcome(trained, [_changed(step, epochs)])


class _Losses:
    """Task, response and feature loss of a batch, from one forward pass of each network."""

    def __init__(self, student: nn.Module, teacher: nn.Module, step: Distill, context: Context) -> None:
        self._student, self._teacher, self._step, self._kit = student, teacher, step, context.kit
        self._pairs = parse_pairs(step.features) if step.beta else []

    def __call__(self, net: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        ours = [s for s, _ in self._pairs]
        with _calls(self._student) as calls, captured(self._student, ours) as student:
            task = self._kit.loss(net, batch)
            if not calls:  # a loss that does not call the network as a whole
                self._student(*self._kit.inputs(batch))
            args, kwargs, result = calls[-1]  # the last one, should a loss look at a batch several times
        zero = task.new_zeros(())
        if not self._step.alpha and not self._step.beta:
            return task, zero, zero
        hint, told = self._ask(args, kwargs)
        step = self._step
        response = responses_loss(step.outputs, result, told, step.temperature) if step.alpha else zero
        if not step.beta:
            return task, response, zero
        adapters = self._student.get_submodule(_ADAPTERS)
        assert isinstance(adapters, nn.ModuleList)
        return task, response, features_loss(self._pairs, adapters, student, hint)

    def adapters_for(self, batch: Any, seed: int) -> nn.ModuleList:
        """Adapters made to the shapes that a dry run of both networks shows."""
        training = self._student.training
        self._student.eval()
        inputs = self._kit.inputs(batch)
        with torch.no_grad(), captured(self._student, [s for s, _ in self._pairs]) as student:
            self._student(*inputs)
        self._student.train(training)
        hint, _ = self._ask(inputs, {})
        return build_adapters(self._pairs, student, hint, seed)

    def _ask(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[dict[str, Tensor], Any]:
        """The teacher's features and outputs for the very inputs that the student saw."""
        with torch.no_grad(), captured(self._teacher, [t for _, t in self._pairs]) as hint:
            return hint, self._teacher(*args, **kwargs)


@contextmanager
def _calls(model: nn.Module) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any], Any]]]:
    """(positional arguments, keyword arguments, result) of every call of a model inside the `with`."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        calls.append((args, kwargs, result))

    handle = model.register_forward_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@contextmanager
def _teaching(teacher: nn.Module, student: nn.Module) -> Iterator[None]:
    """The teacher in eval mode where the student will be trained; modes and device are put back afterwards."""
    from accelerate import PartialState

    home = next(teacher.parameters()).device
    modes = {module: module.training for module in teacher.modules()}
    teacher.eval().to(PartialState().device)
    student.to(PartialState().device)
    try:
        yield
    finally:
        teacher.to(home)
        for module, training in modes.items():
            module.training = training


def _teacher(step: Distill, context: Context) -> nn.Module:
    if not step.teacher:
        return context.original
    path = Path(step.teacher)
    if path.suffix != ".safetensors" or not path.is_file():
        raise InputError(f"Distill.teacher: {step.teacher!r} is not a safetensors file; name one that exists")
    return context.kit.model(path)


def _changed(step: Distill, epochs: dict[int, list[tuple[float, float, float]]]) -> dict[str, Any]:
    """The trace entry: mean losses of the first and the last epoch that ran here."""
    what = f"distilled for {step.epochs} epochs from {step.teacher or 'the original'}"
    entry: dict[str, Any] = {"layer": "(model)", "what": what}
    ran = [rows for _, rows in sorted(epochs.items()) if rows]
    for column, name in enumerate(("task", "response", "feature")):
        weight = (1 - step.alpha, step.alpha, step.beta)[column]
        if weight and ran:
            means = [round(sum(row[column] for row in rows) / len(rows), 6) for rows in (ran[0], ran[-1])]
            entry["what"] += f"; {name} loss {means[0]:.4g} -> {means[1]:.4g}"
            entry[name] = means
    return entry
