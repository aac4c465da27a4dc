"""The training loop against loops written out by hand."""

from __future__ import annotations

import copy
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from core import train
from core.kit import InputError
from core.train import Schedule, bfloat16, faster_in_bfloat16, fit
from tests.core.training import (
    PLAIN,
    STEPS,
    Batch,
    linear,
    rows,
    same,
    squared,
)


def by_hand(schedule: Schedule) -> tuple[nn.Module, list[float], list[list[Tensor]]]:
    """The same training written out: the model, the mean loss of each epoch, and the parameters after each step."""
    model, total = linear(), schedule.epochs * STEPS
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == big] for big in (True, False))
    groups = [{"params": matrices, "weight_decay": schedule.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=schedule.lr)
    means, path, step = [], [], 0
    for epoch in range(schedule.epochs):
        losses = []
        for batch in rows(epoch):
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step, total)
            optimizer.zero_grad()
            loss = squared(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            if schedule.clip:
                norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
                for p in model.parameters():
                    assert p.grad is not None
                    p.grad *= min(1.0, schedule.clip / norm.item())
            optimizer.step()
            losses.append(loss.item())
            path.append([p.detach().clone() for p in model.parameters()])
            step += 1
        means.append(sum(losses) / len(losses))
    return model, means, path


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_equals_a_loop_written_by_hand(clip: float) -> None:
    schedule = replace(PLAIN, clip=clip)
    expected, means, _ = by_hand(schedule)
    model = linear()
    found = fit(model, rows, squared, schedule, steps_per_epoch=STEPS)
    assert found.model is model and not model.training, "trained in place, and left in eval mode"
    for (name, a), b in zip(expected.named_parameters(), found.model.parameters(), strict=True):
        torch.testing.assert_close(b, a, atol=1e-6, rtol=0, msg=name)
    assert [entry["loss"] for entry in found.history] == pytest.approx(means, abs=1e-6)
    assert [entry["epoch"] for entry in found.history] == [0, 1, 2]


def test_clipping_changes_the_result() -> None:
    """The test above would pass for a clip that nothing reads if the norm never reached it."""
    one, two = (fit(linear(), rows, squared, replace(PLAIN, clip=c), steps_per_epoch=STEPS).model for c in (0.0, 0.05))
    assert not same(one, two)


def test_sgd_is_nesterov_momentum() -> None:
    """One weight, one sample: v = 0.9 v + g, w -= lr (g + 0.9 v)."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    schedule = Schedule(epochs=1, batch_size=1, lr=0.1, warmup=0.0, floor=1.0, optimizer="sgd")
    one = torch.ones(1, 1)
    fit(model, lambda epoch: [(one, 0 * one)] * 5, squared, schedule, steps_per_epoch=5)
    w, v = 1.0, 0.0
    for _ in range(5):
        g = 2 * w
        v = 0.9 * v + g
        w -= 0.1 * (g + 0.9 * v)
    assert model.weight.item() == pytest.approx(w, abs=1e-6)


def test_an_optimizer_that_is_not_known() -> None:
    with pytest.raises(InputError, match="'lion' is not known; use 'adamw' or 'sgd'"):
        fit(linear(), rows, squared, replace(PLAIN, optimizer="lion"), steps_per_epoch=STEPS)


def test_rates_are_a_ramp_and_a_cosine() -> None:
    schedule = Schedule(epochs=1, batch_size=1, lr=2.0, warmup=0.1, floor=0.1)
    rates = [schedule.rate(step, 100) for step in range(101)]
    assert rates[:10] == pytest.approx([2.0 * (i + 1) / 10 for i in range(10)])
    assert rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(2.0 * (0.1 + 0.9 / 2)), "half way down at half of the time"
    assert rates[100] == pytest.approx(0.2)
    for step in range(10, 101):
        assert rates[step] == pytest.approx(1.1 + 0.9 * math.cos(math.pi * (step - 10) / 90))
    assert schedule.rate(500, 100) == pytest.approx(0.2), "an epoch that is longer than said stays at the floor"


def test_average_by_its_definition() -> None:
    """a_n = d_n a_(n-1) + (1 - d_n) w_n with d_n = min(ema, (1 + n) / (10 + n)), from the first weights."""
    schedule = replace(PLAIN, ema=0.3)
    _, _, path = by_hand(schedule)
    average = [p.detach().clone() for p in linear().parameters()]
    for n, weights in enumerate(path):
        decay = min(0.3, (1 + n) / (10 + n))
        average = [decay * a + (1 - decay) * w for a, w in zip(average, weights, strict=True)]
    found = fit(linear(), rows, squared, schedule, steps_per_epoch=STEPS).model
    for a, b in zip(average, found.parameters(), strict=True):
        torch.testing.assert_close(b.detach(), a, atol=1e-6, rtol=0)


def test_a_shared_parameter_is_averaged_once() -> None:
    """Two names for one tensor: averaging by name would blend it twice a step."""
    shared = nn.Linear(4, 4)
    twice = nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(4, 1))
    once = copy.deepcopy(twice)
    weights: list[Tensor] = []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        if model is twice:
            weights.append(shared.weight.detach().clone())
        return squared(model, batch)

    schedule = replace(PLAIN, epochs=1)
    averaged = fit(twice, rows, loss, replace(schedule, ema=0.5), steps_per_epoch=STEPS).model
    last = fit(once, rows, squared, schedule, steps_per_epoch=STEPS).model.get_parameter("0.weight")
    mean = weights[0]
    for n, now in enumerate([*weights[1:], last.detach()]):
        decay = min(0.5, (1 + n) / (10 + n))
        mean = decay * mean + (1 - decay) * now
    torch.testing.assert_close(averaged.get_parameter("0.weight").detach(), mean, atol=1e-6, rtol=0)


def test_keeps_the_best_epoch() -> None:
    scores = iter([0.1, 0.9, 0.3])
    seen: list[nn.Module] = []

    def evaluate(model: nn.Module) -> float:
        assert not model.training
        seen.append(copy.deepcopy(model))
        return next(scores)

    found = fit(linear(), rows, squared, PLAIN, steps_per_epoch=STEPS, evaluate=evaluate)
    assert [entry["score"] for entry in found.history] == [0.1, 0.9, 0.3]
    assert same(found.model, seen[1]) and not same(found.model, seen[2])


def test_evaluates_every_so_often_and_at_the_end() -> None:
    schedule = replace(PLAIN, epochs=5, evaluate_every=2)
    found = fit(linear(), rows, squared, schedule, steps_per_epoch=STEPS, evaluate=lambda model: 1.0)
    assert [entry["epoch"] for entry in found.history if "score" in entry] == [1, 3, 4]


def test_a_loss_that_is_not_finite_names_where() -> None:
    calls: list[int] = []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        calls.append(1)
        return squared(model, batch) * (math.nan if len(calls) == STEPS + 3 else 1)

    with pytest.raises(FloatingPointError, match="toy: loss is nan at epoch 1, step 2; lower lr 0.01"):
        fit(linear(), rows, loss, PLAIN, steps_per_epoch=STEPS, label="toy")
    assert not batch_threads()


def test_an_error_of_the_batches_comes_through() -> None:
    def broken(epoch: int) -> Iterator[Batch]:
        yield from rows(epoch, 2)
        raise InputError("board 7: no such file")

    with pytest.raises(InputError, match="board 7: no such file"):
        fit(linear(), broken, squared, PLAIN, steps_per_epoch=STEPS)
    assert not batch_threads()


def test_an_error_of_the_loss_ends_the_thread_that_makes_batches() -> None:
    def endless(epoch: int) -> Iterator[Batch]:
        while True:
            yield from rows(epoch)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(linear(), endless, loss, PLAIN, steps_per_epoch=STEPS)
    assert not batch_threads()


def batch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def test_an_epoch_without_batches_is_refused() -> None:
    with pytest.raises(InputError, match="epoch 0 brought no batch"):
        fit(linear(), lambda epoch: [], squared, PLAIN, steps_per_epoch=STEPS)


@pytest.mark.parametrize("slow", [True, False])
def test_bfloat16_is_for_steps_that_it_makes_faster(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "_multiplies_bfloat16", lambda device: True)
    seen: list[bool] = []

    def step(fast: bool) -> None:
        seen.append(fast)
        time.sleep(0.01 if fast is slow else 0.0)

    assert faster_in_bfloat16(step, torch.device("cpu"), rounds=2) is not slow
    assert seen == [True, False] * 3, "in turns, the first of each to warm up"


def test_bfloat16_is_not_tried_where_nothing_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "_multiplies_bfloat16", lambda device: False)

    def step(fast: bool) -> None:
        raise AssertionError("nothing to choose from")

    assert not faster_in_bfloat16(step, torch.device("cpu"))
    with bfloat16(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize("wanted", [True, False])
def test_bfloat16_only_if_wanted(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "_multiplies_bfloat16", lambda device: True)
    with bfloat16(torch.device("cpu"), wanted):
        made = torch.ones(2, 2) @ torch.ones(2, 2)
    assert made.dtype == (torch.bfloat16 if wanted else torch.float32)
