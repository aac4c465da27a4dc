"""The guard names the first bad layer and the step, whatever it is that goes wrong and however it is sampled."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from core.evaluation.guard import FP16_LIMIT, ActivationError, guard


class Net(nn.Module):
    """Two blocks of a convolution, a norm and a Linear layer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.GroupNorm(2, width), nn.SiLU())
        self.two = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.Flatten(), nn.Linear(width * 16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x)).clamp(-1e9, 1e9)


def weight(net: Net, name: str) -> Tensor:
    found = net.get_submodule(name).weight
    assert isinstance(found, Tensor)
    return found.data


def no_number(net: Net) -> None:
    weight(net, "two.0")[0] = math.nan


def too_large(net: Net) -> None:
    weight(net, "one.1").fill_(1e6)


def infinite(net: Net) -> None:
    weight(net, "two.2")[1] = math.inf


@pytest.mark.parametrize("every", [1, 7])
@pytest.mark.parametrize(
    ("breaks", "layer", "what"),
    [
        (no_number, r"two\.0 \(Conv2d\), step 3", "NaN in 32 of 256 activations"),
        (too_large, r"one\.1 \(GroupNorm\), step 3", "beyond 65504"),
        (infinite, r"two\.2 \(Linear\), step 3", "(NaN|Inf) in 2 of 8 activations"),
    ],
)
def test_first_bad_layer_and_step(breaks: Callable[[Net], None], layer: str, what: str, every: int) -> None:
    """With `every` = 7 the bad layer is not due; the bad result of the whole still finds it."""
    net = Net().eval()
    x = torch.rand(2, 3, 4, 4)
    with torch.no_grad(), guard(net, every=every) as watch:
        for step in range(3):
            watch.step = step
            net(x)
        breaks(net)
        watch.step = 3
        with pytest.raises(ActivationError, match=f"{layer}: .*{what}") as caught:
            net(x)
    assert caught.value.step == 3
    assert isinstance(caught.value, FloatingPointError)  # the command line says it in one line
    assert "\n" not in str(caught.value)


def test_sound_model_passes_and_hooks_go() -> None:
    net, x = Net().eval(), torch.rand(1, 3, 4, 4)
    expected = net(x)
    with guard(net) as watch:
        assert torch.equal(net(x), expected)
        assert watch.looked == 7  # four layers, two blocks, the whole
    too_large(net)
    with guard(net), pytest.raises(ActivationError):
        net(x)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())
    net(x)  # unguarded: nothing is raised


def test_limit() -> None:
    net, x = Net().eval(), torch.rand(1, 3, 4, 4)
    weight(net, "one.1").fill_(1e6)
    with guard(net, limit=math.inf):
        net(x)
    with guard(net, limit=0.1), pytest.raises(ActivationError, match=r"one\.0 \(Conv2d\): .* activations beyond 0.1"):
        net(x)
    assert float(torch.tensor(FP16_LIMIT).half()) == FP16_LIMIT
    assert math.isinf(float(torch.tensor(FP16_LIMIT + 16).half()))


def test_each_layer_takes_its_turn() -> None:
    """A layer whose bad values the next one hides is found within `every` passes."""
    net = Net().eval()
    weight(net, "one.0").mul_(1e6)  # the norm after it brings this back
    x = torch.rand(1, 3, 4, 4)
    with guard(net, every=4), pytest.raises(ActivationError, match=r"one\.0"):
        for _ in range(4):
            net(x)


def test_bad_arithmetic_outside_layers_is_the_models() -> None:
    class Divides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) / 0 * 0

    net = Divides()
    with guard(net), pytest.raises(ActivationError, match=r"the model \(Divides\): NaN"):
        net(torch.ones(1, 2))


@pytest.mark.slow
def test_cost_is_a_few_percent() -> None:
    """Sampled every eighth pass; fastest of many, in turns, since the machine has other work."""
    net = nn.Sequential(*(m for _ in range(16) for m in (nn.Conv2d(64, 64, 3, padding=1), nn.SiLU()))).eval()
    x = torch.rand(2, 64, 24, 24)
    best = {True: math.inf, False: math.inf}
    with torch.no_grad():
        for turn in range(60):
            guarded = bool(turn % 2)
            if guarded:
                with guard(net, every=8):
                    best[True] = min(best[True], _seconds(net, x))
            else:
                best[False] = min(best[False], _seconds(net, x))
    assert best[True] < 1.05 * best[False]


def _seconds(net: nn.Module, x: Tensor) -> float:
    start = time.perf_counter()
    net(x)
    return time.perf_counter() - start
