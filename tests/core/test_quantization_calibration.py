"""Ranges from observed values, against closed forms and brute force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from core.kit import InputError
from core.quantization import PerChannel, Plan, Scheme, calibrate_range, choose_qparams, fake_quantize
from core.quantization.calibration import Method, weight_qparams


def heavy_tailed() -> Tensor:
    """Laplace noise with one value in 10,000 twenty times as large."""
    x = torch.distributions.Laplace(0.0, 1.0).sample((200_000,))
    x[:20] *= 20
    return x


def error(x: Tensor, low: float, high: float, scheme: Scheme) -> float:
    scale, zero = choose_qparams(torch.tensor(low), torch.tensor(high), scheme)
    return float((fake_quantize(x, scale, zero, scheme) - x).square().mean())


@pytest.mark.parametrize("method", ["percentile", "mse", "entropy"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 6])
def test_clipping_beats_min_max_on_a_heavy_tail(method: Method, symmetric: bool, bits: int) -> None:
    scheme, x = Scheme(bits, symmetric), heavy_tailed()
    clipped = error(x, *calibrate_range([x], method, scheme), scheme)
    assert clipped < 0.7 * error(x, *calibrate_range([x], "minmax", scheme), scheme)


def test_minmax_is_the_range_of_all_batches() -> None:
    assert calibrate_range([torch.tensor([1.0, -2.0]), torch.tensor([[5.0]])], "minmax", Scheme()) == (-2.0, 5.0)


def test_percentile_is_numpys_within_a_bin() -> None:
    x = torch.randn(100_000)
    low, high = calibrate_range(x.split(9_999), "percentile", Scheme())
    width = float(x.max() - x.min()) / 8192
    assert low == pytest.approx(float(torch.quantile(x, 0.5e-4)), abs=2 * width)
    assert high == pytest.approx(float(torch.quantile(x, 1 - 0.5e-4)), abs=2 * width)


@pytest.mark.parametrize("bits, best", [(2, 1.991), (4, 2.681), (3, 2.344)])
def test_mse_finds_the_known_optimum_for_a_gaussian(bits: int, best: float) -> None:
    """No worse than the optimal step (J. Max 1960, table II: 0.9957, 0.5860, 0.3352) or a search by brute force.

    Max's quantizer is symmetric without a zero level and ours has one; so the loss is compared, not the step.
    """
    scheme, x = Scheme(bits, symmetric=False), torch.randn(200_000)
    found = error(x, *calibrate_range([x], "mse", scheme), scheme)
    at_known = error(x, -best, best, scheme)
    assert found <= at_known * 1.02
    brute = min(error(x, -t / 20, t / 20, scheme) for t in range(20, 100, 2))
    assert found <= brute * 1.02


def test_entropy_keeps_a_uniform_range_whole() -> None:
    x = torch.rand(200_000)
    low, high = calibrate_range([x], "entropy", Scheme(8, symmetric=False))
    assert low == 0 and high > 0.95


def test_weights_of_few_bits_are_clipped_where_that_is_better() -> None:
    w, scheme = torch.distributions.Laplace(0.0, 1.0).sample((8, 64, 3, 3)), Scheme(4, True, PerChannel())
    plain = choose_qparams(w.flatten(1).amin(1), w.flatten(1).amax(1), scheme)
    before = (fake_quantize(w, *plain, scheme) - w).square().flatten(1).sum(1)
    after = (fake_quantize(w, *weight_qparams(w, scheme, "minmax"), scheme) - w).square().flatten(1).sum(1)
    assert (after <= before).all() and after.sum() < 0.8 * before.sum()


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(InputError, match="calibration is 'magic'; known are minmax"):
        Plan(calibration="magic")  # type: ignore[arg-type]
