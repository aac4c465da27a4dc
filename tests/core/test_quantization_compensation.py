"""Error-compensating rounding: moments of inputs, and what it wins on correlated ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.kit import InputError
from core.quantization import Moments, compensate, pack_module
from core.quantization import compensation as module
from core.quantization.compensation import blocks, mean_error, moment_bytes, output_error

CASES = ("plain", "strided", "grouped", "depthwise")


def conv(case: str) -> nn.Conv2d:
    if case == "plain":
        return nn.Conv2d(6, 8, 3, padding=1)
    if case == "strided":
        return nn.Conv2d(6, 8, (3, 2), (2, 1), (1, 0), dilation=(1, 2))
    if case == "grouped":
        return nn.Conv2d(6, 8, 3, padding="same", groups=2)
    return nn.Conv2d(6, 12, 3, groups=6, padding=2, padding_mode="reflect")


def smooth(*shape: int) -> Tensor:
    """Images whose neighbouring pixels are alike."""
    n, c, h, w = shape
    return F.avg_pool2d(torch.randn(n, c, h + 4, w + 4), 5, 1)


def correlated(rows: int, width: int) -> Tensor:
    return torch.randn(rows, width // 4) @ torch.randn(width // 4, width) / 4 + 0.1 * torch.randn(rows, width)


@pytest.mark.parametrize("case", CASES)
def test_moments_predict_the_error_of_a_convolution(case: str) -> None:
    """sum over outputs of (dW * x)^2 is dW H dW^T, and the mean error dW times the mean patch."""
    layer = conv(case)
    moments = Moments(layer, 8)
    images = [smooth(3, 6, 9, 8) + 1 for _ in range(2)]
    for x in images:
        moments(x)
    packed = pack_module(layer, 3, 8)
    with torch.no_grad():
        off = [packed(x) - layer(x) for x in images]
        out = [layer(x) - layer.bias[:, None, None] for x in images]
    expected = sum(e.square().sum() for e in off) / sum(o.square().sum() for o in out)
    assert output_error(layer.weight, packed.dequantized(), moments) == pytest.approx(float(expected), rel=1e-4)
    lost = (layer.weight - packed.dequantized()).detach()
    torch.testing.assert_close(mean_error(lost, moments), -torch.cat(off).mean((0, 2, 3)), rtol=1e-3, atol=1e-6)


def test_moments_of_a_linear_layer_stream() -> None:
    layer = nn.Linear(16, 4)
    x = torch.randn(3, 7, 16)
    moments = Moments(layer, 8)
    moments(x[:1].half())
    moments(x[1:])
    flat = torch.cat([x[:1].half().float(), x[1:]]).flatten(0, 1)
    torch.testing.assert_close(moments.second[0][0], flat.T @ flat)
    torch.testing.assert_close(moments.mean[0], flat.mean(0))
    assert moment_bytes(layer, 8) == moments.second[0].nbytes == 4 * 16 * 16


def test_large_images_are_read_in_evenly_spaced_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_POSITIONS", 64)
    layer = nn.Conv2d(2, 4, 3, padding=1)
    x = smooth(1, 2, 32, 16)
    sampled, whole = Moments(layer, 8), Moments(layer, 8)
    sampled(x.expand(8, -1, -1, -1))  # an eighth of the rows each time, and in eight times every row once
    monkeypatch.setattr(module, "_POSITIONS", 10**6)
    whole(x)
    assert sampled.count == whole.count == 512
    torch.testing.assert_close(sampled.second[0], whole.second[0])


ROUNDINGS: dict[str, dict[str, Any]] = {"in order": {}, "by falling input": {"act_order": True}}


@pytest.mark.parametrize("how", ROUNDINGS)
@pytest.mark.parametrize("case", ["linear", *CASES])
def test_correlated_inputs_lose_less_than_to_nearest(case: str, how: str) -> None:
    layer: nn.Linear | nn.Conv2d = nn.Linear(96, 24) if case == "linear" else conv(case)
    inputs = correlated(500, 96) if case == "linear" else smooth(8, 6, 16, 16)
    moments = Moments(layer, 32)
    moments(inputs)
    integers, scale = compensate(layer.weight, moments, 4, **ROUNDINGS[how])
    made = pack_module(layer, 4, 32, integers=integers, scale=scale).dequantized()
    nearest = pack_module(layer, 4, 32, "mse").dequantized()
    lost = output_error(layer.weight, made, moments)
    assert lost < (0.8 if case != "depthwise" else 0.9) * output_error(layer.weight, nearest, moments)


@pytest.mark.parametrize("how", ROUNDINGS)
def test_uncorrelated_inputs_round_to_nearest(how: str) -> None:
    """With H the identity there is nothing to compensate, and the scales are those of least squared error."""
    layer = nn.Linear(200, 16)
    moments = Moments(layer, 64)
    moments.second[0].copy_(torch.eye(200)[None])
    moments.count = 1
    integers, scale = compensate(layer.weight, moments, 4, **ROUNDINGS[how])
    made = pack_module(layer, 4, 64, integers=integers, scale=scale)
    nearest = pack_module(layer, 4, 64, "mse")
    assert torch.equal(made.weight_packed, nearest.weight_packed)
    assert torch.equal(made.weight_scale, nearest.weight_scale)


@pytest.mark.parametrize("group_size", [8, 48, 200, 1000])
def test_lazy_updates_are_those_of_one_column_at_a_time(group_size: int) -> None:
    """Against the method as its paper states it: after each column, update all that follow by the inverse of H."""
    layer = nn.Linear(300, 6)
    moments = Moments(layer, group_size)
    moments(correlated(900, 300))
    integers, scale = compensate(layer.weight, moments, 4, act_order=True)
    second = (moments.second[0][0] / moments.count).double()
    power = second.diagonal()
    order = power.argsort(descending=True)
    second = second + module.DAMPING * power.mean() * torch.eye(300)
    weight, right = layer.weight.detach().double().clone(), 0
    for position, column in enumerate(order.tolist()):
        left = order[position:]
        inverse = torch.linalg.inv(second[left][:, left])
        s = scale[:, column // group_size].double()
        q = (weight[:, column] / s).round().clamp(-8, 7)
        right += int((q == integers[:, column]).sum())
        weight[:, left] -= ((weight[:, column] - q * s) / inverse[0, 0])[:, None] * inverse[0]
        if position == 60:
            break  # float32 ties flip a few integers later on, and all after them
    assert right >= 0.99 * 61 * 6


def test_large_kernels_are_split_at_whole_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 50)
    assert blocks(120, 16) == [(0, 48), (48, 96), (96, 120)] and blocks(120, 64) == [(0, 64), (64, 120)]
    layer = nn.Linear(120, 8)
    moments = Moments(layer, 16)
    moments(correlated(400, 120))
    assert [m.shape for m in moments.second] == [(1, 48, 48), (1, 48, 48), (1, 24, 24)]
    assert moment_bytes(layer, 16) == sum(m.nbytes for m in moments.second)
    integers, scale = compensate(layer.weight, moments, 4)
    assert integers.shape == (8, 120) and scale.shape == (8, 8)
    made = pack_module(layer, 4, 16, integers=integers, scale=scale).dequantized()
    nearest = pack_module(layer, 4, 16, "mse").dequantized()
    assert output_error(layer.weight, made, moments) < output_error(layer.weight, nearest, moments)


def test_inputs_that_never_came_or_are_broken_are_named() -> None:
    layer = nn.Linear(8, 4)
    moments = Moments(layer, 8)
    with pytest.raises(InputError, match="layer 'a.b': no calibration input reached it"):
        compensate(layer.weight, moments, 4, layer="a.b")
    moments(torch.full((2, 8), float("nan")))
    with pytest.raises(InputError, match="layer 'a.b': a calibration input was not finite"):
        compensate(layer.weight, moments, 4, layer="a.b")


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    layer, x = nn.Linear(32, 8), correlated(100, 32)
    x[:, 5] = 0
    for inputs in (x, torch.zeros(3, 32)):
        moments = Moments(layer, 32)
        moments(inputs)
        integers, scale = compensate(layer.weight, moments, 4)
        made = pack_module(layer, 4, 32, integers=integers, scale=scale).dequantized()
        assert (made - layer.weight).abs().max() < 2 * scale.abs().max()
