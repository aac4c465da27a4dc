"""The arithmetic of uniform affine quantization, with a straight-through gradient and that of the step size.

Rounding is half to even and the zero point is added after rounding, as in ONNX QuantizeLinear, so that
the simulation and a runtime agree on ties.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from core.quantization.schemes import PerTensor, Scheme

# Runtimes store a bias as int32 in units of (input scale * weight scale); far smaller scales would overflow it.
SMALLEST_SCALE = 1e-6


def block_range(x: Tensor, scheme: Scheme, layer: str = "") -> tuple[Tensor, Tensor]:
    """The least and the largest value of each block that shares a scale, both of the scale's shape."""
    shape = scheme.granularity.scale_shape(x.shape, layer)
    low, high = x.detach().reshape(math.prod(shape), -1).aminmax(dim=1)
    return low.reshape(shape), high.reshape(shape)


def choose_qparams(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale (float32) and zero point (the scheme's integer type) for ranges of values, of the ranges' shape.

    A range is widened to include 0, so that padding and ReLU zeros stay exact. The asymmetric zero point is
    quant_min + round(-low / scale).
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    if scheme.symmetric:
        scale = torch.maximum(low / scheme.quant_min, high / scheme.quant_max).clamp(min=SMALLEST_SCALE)
        return scale, torch.zeros_like(scale, dtype=scheme.dtype)
    scale = ((high - low) / (scheme.quant_max - scheme.quant_min)).clamp(min=SMALLEST_SCALE)
    zero_point = (scheme.quant_min + torch.round(-low / scale)).clamp(scheme.quant_min, scheme.quant_max)
    return scale, zero_point.to(scheme.dtype)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """The integers of x, in x's shape and the scheme's integer type; out-of-range values are clipped."""
    blocks, scale, zero_point = _aligned(x, scale, zero_point, scheme)
    integers = torch.round(blocks / scale) + zero_point
    return integers.clamp(scheme.quant_min, scheme.quant_max).to(scheme.dtype).reshape(x.shape)


def dequantize(integers: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """The float32 values of integers, in their shape."""
    blocks, scale, zero_point = _aligned(integers, scale, zero_point, scheme)
    return ((blocks.float() - zero_point) * scale).reshape(integers.shape)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """dequantize(quantize(x)) in one differentiable step, in x's shape.

    The gradient of x is passed straight through where x is in range (Bengio et al. 2013). The gradient of
    the scale is that of LSQ (Esser et al. 2020, eq. 3), without the factor of `lsq_gradient_scale`.
    """
    blocks, scale, zero_point = _aligned(x, scale, zero_point, scheme)
    low, high = scheme.quant_min - zero_point, scheme.quant_max - zero_point
    result: Tensor = _FakeQuantize.apply(blocks, scale, low, high)
    return result.reshape(x.shape)


def lsq_gradient_scale(elements: int, scheme: Scheme) -> float:
    """1 / sqrt(elements * Q_P): what LSQ multiplies a step size's gradient with (Esser et al. 2020, section 2.2).

    `elements` is how many weights share the step, or how many features of one sample pass through it.
    """
    return 1 / math.sqrt(elements * scheme.quant_max)


def _aligned(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """x as [blocks, elements] with scale and float zero point as [blocks, 1]; untouched if one scale serves all."""
    zero_point = zero_point.to(scale.dtype)
    if isinstance(scheme.granularity, PerTensor):
        return x, scale, zero_point
    return x.reshape(scale.numel(), -1), scale.reshape(-1, 1), zero_point.reshape(-1, 1)


class _FakeQuantize(torch.autograd.Function):
    """`low` and `high` are the integer limits less the zero point: -Q_N and Q_P of the LSQ paper."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, low, high)
        return torch.div(x, scale).round_().clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, scale, low, high = ctx.saved_tensors
        v = x / scale
        grad_x = grad_scale = None
        if ctx.needs_input_grad[0]:
            # Limits included (the paper leaves them out): under min-max ranges the extreme weight of each
            # channel sits exactly on a limit and would otherwise never move.
            grad_x = grad * ((v >= low) & (v <= high))
        if ctx.needs_input_grad[1]:
            step = torch.where(v <= low, low, torch.where(v >= high, high, v.round() - v)).mul_(grad)
            grad_scale = step.sum() if scale.ndim == 0 else step.sum(dim=1, keepdim=True)
        return grad_x, grad_scale, None, None
