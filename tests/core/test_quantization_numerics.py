"""Scales, zero points and gradients against torchao and closed forms."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from core.kit import InputError
from core.quantization import (
    PerChannel,
    PerGroup,
    PerTensor,
    Scheme,
    choose_qparams,
    dequantize,
    fake_quantize,
    quantize,
)
from core.quantization.numerics import SMALLEST_SCALE, block_range, lsq_gradient_scale

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchao.quantization import quant_primitives as ao

SHAPES = [(6, 8), (4, 8, 3, 3), (5, 16, 1, 1)]
SCHEMES = [
    Scheme(bits, symmetric, granularity, reduced)
    for bits, reduced in [(8, False), (8, True), (4, False), (2, False)]
    for symmetric in (True, False)
    for granularity in (PerTensor(), PerChannel(), PerGroup(4))
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_equals_torchao(shape: tuple[int, ...], scheme: Scheme) -> None:
    x = torch.randn(shape) + 0.3
    flat = x.flatten(1)
    block = {PerTensor: flat.shape, PerChannel: (1, flat.shape[1]), PerGroup: (1, 4)}[type(scheme.granularity)]
    kind = ao.MappingType.SYMMETRIC_NO_CLIPPING_ERR if scheme.symmetric else ao.MappingType.ASYMMETRIC
    limits = scheme.quant_min, scheme.quant_max
    s, z = ao.choose_qparams_affine(flat, kind, block, scheme.dtype, *limits, eps=SMALLEST_SCALE)
    q = ao.quantize_affine(flat, block, s, z, scheme.dtype, *limits)
    back = ao.dequantize_affine(q, block, s, z, scheme.dtype, *limits)

    scale, zero = choose_qparams(*block_range(x, scheme), scheme)
    integers = quantize(x, scale, zero, scheme)
    assert integers.dtype == q.dtype and scale.shape == scheme.granularity.scale_shape(x.shape)
    torch.testing.assert_close(scale.flatten(), s.flatten(), rtol=1e-6, atol=0)
    assert torch.equal(zero.flatten().int(), z.flatten().int())
    # torchao multiplies with 1 / scale where ONNX divides: a value on a tie may fall to the other side.
    assert (integers.flatten(1).int() - q.int()).abs().max() <= 1
    assert (integers.flatten(1) != q).float().mean() < 0.01
    off = (dequantize(integers, scale, zero, scheme).flatten(1) - back).abs()
    assert (off > 1e-6).float().mean() < 0.01
    assert torch.equal(fake_quantize(x, scale, zero, scheme), dequantize(integers, scale, zero, scheme))


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (-0.5, 1.5), (-3.0, 0.5), (2.0, 6.0)])
def test_zero_point_has_the_sign_that_keeps_the_range(low: float, high: float) -> None:
    """zero_point = round(-min / scale); the copied round(min / scale) clips whatever lies beyond half of it."""
    scheme = Scheme(8, symmetric=False)
    x = torch.linspace(low, high, 1001)
    scale, zero = choose_qparams(x.min(), x.max(), scheme)
    assert (fake_quantize(x, scale, zero, scheme) - x).abs().max() <= scale / 2 * 1.001
    if low < 0:
        wrong = torch.round(x.min() / scale).clamp(0, 255).to(torch.uint8)
        error = (fake_quantize(x, scale, wrong, scheme) - x).abs()
        assert error.max() >= -low * 0.99 and (error > scale).float().mean() > 0.2


def test_range_that_the_wrong_sign_halves() -> None:
    """On [-1, 1] the wrong zero point loses one half of the values, ours none."""
    scheme = Scheme(8, symmetric=False)
    x = torch.linspace(-1, 1, 1000)
    scale, zero = choose_qparams(x.min(), x.max(), scheme)
    assert scale.item() == pytest.approx(2 / 255) and zero.item() in (127, 128)
    wrong = torch.round(x.min() / scale).clamp(0, 255).to(torch.uint8)
    lost = (fake_quantize(x, scale, wrong, scheme) - x).abs() > scale
    assert lost.float().mean() == pytest.approx(0.5, abs=0.02)


def test_zero_is_exact_even_for_ranges_away_from_it() -> None:
    scheme = Scheme(8, symmetric=False)
    scale, zero = choose_qparams(torch.tensor(2.0), torch.tensor(6.0), scheme)
    assert scale.item() == pytest.approx(6 / 255) and zero.item() == 0
    assert fake_quantize(torch.zeros(1), scale, zero, scheme).item() == 0


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_sqnr_of_a_uniform_signal_is_6_db_a_bit(bits: int) -> None:
    """Signal power A^2/3, noise power step^2/12 with step = 2A/(levels - 1): 20 log10(levels - 1) dB."""
    scheme = Scheme(bits, symmetric=False)
    x = torch.rand(200_000, dtype=torch.double) * 2 - 1
    scale, zero = choose_qparams(torch.tensor(-1.0), torch.tensor(1.0), scheme)
    noise = fake_quantize(x, scale.double(), zero, scheme) - x
    found = 10 * torch.log10(x.square().sum() / noise.square().sum()).item()
    # An even number of levels with an exact zero is half a step off at one end; that matters at 2 bits only.
    tolerance = 0.1 if bits >= 6 else 1.6
    assert found == pytest.approx(20 * math.log10(2**bits - 1), abs=tolerance)


@pytest.mark.parametrize("scheme", [Scheme(3), Scheme(3, symmetric=False), Scheme(3, True, PerChannel())], ids=str)
def test_lsq_gradient_is_the_papers(scheme: Scheme) -> None:
    """Esser et al. 2020, eq. 3 and 5, written out value by value."""
    x = torch.randn(4, 10).requires_grad_()
    shape = scheme.granularity.scale_shape(x.shape)
    scale = torch.full(shape, 0.31, requires_grad=True)
    zero = torch.full(shape, 0 if scheme.symmetric else 3).to(scheme.dtype)
    upstream = torch.randn(4, 10)
    fake_quantize(x, scale, zero, scheme).backward(upstream)
    low, high = scheme.quant_min - int(zero.flatten()[0]), scheme.quant_max - int(zero.flatten()[0])
    expected_s, expected_x = torch.zeros(4), torch.zeros(4, 10)
    for i in range(4):
        for j in range(10):
            v, g = x[i, j].item() / 0.31, upstream[i, j].item()
            inside = low < v < high
            expected_x[i, j] = g if inside else 0
            expected_s[i] += g * (round(v) - v if inside else low if v <= low else high)
    assert scale.grad is not None and x.grad is not None
    torch.testing.assert_close(x.grad, expected_x)
    torch.testing.assert_close(scale.grad, expected_s if shape else expected_s.sum(), rtol=1e-4, atol=1e-5)


def test_lsq_gradient_scale_is_the_papers() -> None:
    assert lsq_gradient_scale(400, Scheme(8)) == pytest.approx(1 / math.sqrt(400 * 127))
    assert lsq_gradient_scale(9, Scheme(4, symmetric=False)) == pytest.approx(1 / math.sqrt(9 * 15))


def test_limits_of_the_integers() -> None:
    def limits(*fields: object) -> tuple[int, int]:
        scheme = Scheme(*fields)  # type: ignore[arg-type]
        return scheme.quant_min, scheme.quant_max

    assert limits(8) == (-128, 127) and limits(8, False) == (0, 255)
    assert limits(8, True, PerTensor(), True) == (-64, 63) and limits(4) == (-8, 7) and limits(2, False) == (0, 3)


def test_a_group_that_does_not_divide_is_refused_by_name() -> None:
    scheme = Scheme(4, True, PerGroup(64))
    with pytest.raises(InputError, match=r"layer 'stem.conv': group_size 64 does not divide its kernel of 27"):
        block_range(torch.randn(8, 3, 3, 3), scheme, "stem.conv")


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(InputError, match=f"bits is {bits}"):
        Scheme(bits)
