"""Layers that hold float weights and simulate quantization; in an ONNX export they emit QuantizeLinear pairs.

A layer quantizes its *input* (per tensor) and its weight; that is what OpenVINO needs to run it in INT8, with
the bias left in float. ONNX Runtime fuses a convolution to QLinearConv only if the *output* is quantized
directly behind it too (or behind a ReLU, where the next layer's input quantizer has a zero point of 0): that
is the optional output quantizer. Sums of residual branches stay float.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.quantization.numerics import fake_quantize, lsq_gradient_scale
from core.quantization.schemes import PerGroup, PerTensor, Scheme


class Quantizer(nn.Module):
    """Fake quantization of one tensor, with `scale` and `zero_point` as buffers.

    `active` false lets the tensor through unchanged; `observer`, if set, is shown every tensor that comes.
    """

    scale: Tensor
    zero_point: Tensor
    log_step: nn.Parameter | None

    def __init__(self, scheme: Scheme, scale_shape: tuple[int, ...] = (), *, per_sample: bool = False) -> None:
        super().__init__()
        self.scheme = scheme
        self.per_sample = per_sample
        self.active = True
        self.observer: Callable[[Tensor], None] | None = None
        self.register_buffer("scale", torch.ones(scale_shape))
        self.register_buffer("zero_point", torch.zeros(scale_shape, dtype=scheme.dtype))
        self.register_parameter("log_step", None)

    def assign(self, scale: Tensor, zero_point: Tensor) -> None:
        """Set scale and zero point and switch on."""
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self.active = True

    def learn(self) -> None:
        """Make the step size trainable (LSQ, Esser et al. 2020) as the logarithm of its growth since now.

        In logarithms a step of any optimizer is relative to the step size: Adam, whose moves are as large as
        the learning rate whatever the gradient, would else wipe out scales of 0.001. `settle` ends it.
        """
        self.log_step = nn.Parameter(torch.zeros_like(self.scale))

    def settle(self) -> None:
        """Take the learned step size over into `scale`; no parameter remains."""
        if self.log_step is not None:
            self.scale.mul_(self.log_step.detach().exp())
            self.log_step = None

    def step_size(self, x: Tensor) -> Tensor:
        """The scale, differentiable while learning.

        The gradient that reaches `log_step` is LSQ's for the scale, times its gradient scale, over the scale:
        to first order gradient descent then moves the scale just as LSQ's does.
        """
        if self.log_step is None:
            return self.scale
        step = (self.scale * self.log_step.exp()).detach()
        elements = x.numel() // (x.shape[0] if self.per_sample else step.numel())
        factor = lsq_gradient_scale(elements, self.scheme)
        return step + (self.log_step - self.log_step.detach()) * (factor / step)

    def forward(self, x: Tensor) -> Tensor:
        """x with quantization error, in x's shape."""
        if self.observer is not None:
            self.observer(x)
        if not self.active:
            return x
        if torch.onnx.is_in_onnx_export():
            return self._exported(x)
        return fake_quantize(x, self.step_size(x), self.zero_point, self.scheme)

    def _exported(self, x: Tensor) -> Tensor:
        """QuantizeLinear and DequantizeLinear in the ONNX graph; groups become rows of a matrix."""
        shape = x.shape
        scheme, scale, zero_point = self.scheme, self.scale.reshape(-1), self.zero_point.reshape(-1)
        attrs: dict[str, Any] = {"axis": 0}
        if isinstance(scheme.granularity, PerTensor):
            scale, zero_point, attrs = self.scale, self.zero_point, {}
        elif isinstance(scheme.granularity, PerGroup):
            x = x.reshape(scale.numel(), -1)
        if (scheme.quant_min, scheme.quant_max) not in ((-128, 127), (0, 255)):
            # QuantizeLinear saturates at the limits of its type only.
            column = scale.reshape(-1, *[1] * (x.ndim - 1)) if attrs else scale
            zero = zero_point.to(scale.dtype).reshape(column.shape)
            low, high = (scheme.quant_min - zero) * column, (scheme.quant_max - zero) * column
            if attrs:
                x = torch.minimum(torch.maximum(x, low), high)
            else:
                # The exporter would make this Clip itself, but not validly when two layers read x (torch 2.14).
                x = torch.onnx.ops.symbolic("Clip", [x, low, high], dtype=x.dtype, shape=x.shape, version=13)
        emit = partial(torch.onnx.ops.symbolic, attrs=attrs, shape=x.shape, version=13)
        q = emit("QuantizeLinear", [x, scale, zero_point], dtype=scheme.dtype)
        x = emit("DequantizeLinear", [q, scale, zero_point], dtype=torch.float32)
        return x.reshape(shape) if isinstance(scheme.granularity, PerGroup) else x

    def extra_repr(self) -> str:
        """The scheme in words."""
        return str(self.scheme)


class QuantConv2d(nn.Conv2d):
    """nn.Conv2d with quantizers for input (or None), weight and output (or None)."""

    input_quantizer: Quantizer | None
    weight_quantizer: Quantizer
    output_quantizer: Quantizer | None

    @classmethod
    def from_float(cls, layer: nn.Conv2d, weight: Scheme, activation: Scheme | None, name: str = "") -> Self:
        """A layer on the same parameters; InputError names it if its kernel does not fit the weight scheme."""
        new = cls(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,  # type: ignore[arg-type]
            layer.dilation, layer.groups, layer.bias is not None, layer.padding_mode, device="meta",  # type: ignore[arg-type]
        )  # fmt: skip
        _adopt(new, layer, weight, activation, name)
        return new

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, H', W']."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        x = self._conv_forward(x, self.weight_quantizer(self.weight), self.bias)
        return x if self.output_quantizer is None else self.output_quantizer(x)


class QuantLinear(nn.Linear):
    """nn.Linear with quantizers for input (or None), weight and output (or None)."""

    input_quantizer: Quantizer | None
    weight_quantizer: Quantizer
    output_quantizer: Quantizer | None

    @classmethod
    def from_float(cls, layer: nn.Linear, weight: Scheme, activation: Scheme | None, name: str = "") -> Self:
        """A layer on the same parameters; InputError names it if its kernel does not fit the weight scheme."""
        new = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        _adopt(new, layer, weight, activation, name)
        return new

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        x = F.linear(x, self.weight_quantizer(self.weight), self.bias)
        return x if self.output_quantizer is None else self.output_quantizer(x)


QuantLayer = QuantConv2d | QuantLinear


def quant_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """The quantized layers of a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantConv2d | QuantLinear)}


def quantizers(model: nn.Module) -> Iterator[Quantizer]:
    """Every quantizer of a model, a shared one once."""
    return (m for m in model.modules() if isinstance(m, Quantizer))


def unquantized(model: nn.Module) -> nn.Module:
    """A copy whose quantizers do nothing: the float model that a quantized one stands for, training included."""
    copied = copy.deepcopy(model)
    for quantizer in quantizers(copied):
        quantizer.active = False
    return copied


def _adopt(new: QuantLayer, layer: nn.Conv2d | nn.Linear, weight: Scheme, activation: Scheme | None, name: str) -> None:
    new.weight, new.bias = layer.weight, layer.bias
    device = layer.weight.device
    new.weight_quantizer = Quantizer(weight, weight.granularity.scale_shape(layer.weight.shape, name)).to(device)
    new.input_quantizer = None if activation is None else Quantizer(activation, per_sample=True).to(device)
    new.output_quantizer = None
    new.train(layer.training)
