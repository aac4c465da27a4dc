"""How much noise quantization adds, as a signal to noise ratio: 10 log10(sum of x^2 / sum of (x - x_q)^2) dB."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from core.kit import InputError
from core.quantization.folding import find_folds, fold
from core.quantization.modules import quant_layers


def sqnr(signal: Tensor, noisy: Tensor) -> float:
    """The ratio in dB of two tensors of one shape; inf if they are equal."""
    return _decibel(float(signal.double().square().sum()), float((signal.double() - noisy.double()).square().sum()))


def weight_sqnr(model: nn.Module) -> dict[str, float]:
    """dB of each quantized layer's weights against the float weights that it holds."""
    with torch.no_grad():
        return {name: sqnr(m.weight, m.weight_quantizer(m.weight)) for name, m in quant_layers(model).items()}


def layer_sqnr(
    float_model: nn.Module, quantized_model: nn.Module, batches: Iterable[tuple[Tensor, ...]]
) -> dict[str, float]:
    """dB of each quantized layer's output against the float model's layer of the same name, in order of the layers.

    `batches` are tuples of positional arguments. Errors of earlier layers count; batch norms that were folded
    are folded in a copy of the float model too. InputError names a layer that the models do not share.
    """
    names = list(quant_layers(quantized_model))
    batches = list(batches)
    if not batches:
        raise InputError("layer_sqnr: found no batches; give at least one tuple of inputs")
    was_training = quantized_model.training
    reference = copy.deepcopy(float_model).eval()
    fold(reference, find_folds(reference, batches[0])[0])
    signal, noise = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    outputs: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            outputs.setdefault(name, []).append(output.detach().clone())

        return hook

    def compare(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            expected = outputs[name].pop(0) if outputs.get(name) else None
            if expected is None or expected.shape != output.shape:
                found = "no output" if expected is None else f"an output of shape {tuple(expected.shape)}"
                raise InputError(
                    f"layer {name!r}: the float model gave {found}, the quantized {tuple(output.shape)}; "
                    "compare with the model as it was before quantization"
                )
            signal[name] += float(expected.double().square().sum())
            noise[name] += float((expected.double() - output.double()).square().sum())

        return hook

    handles = []
    modules = dict(reference.named_modules())
    for name, layer in quant_layers(quantized_model).items():
        if name not in modules:
            raise InputError(f"layer {name!r}: the float model has no such layer; compare models of one architecture")
        handles.append(modules[name].register_forward_hook(keep(name)))
        handles.append(layer.register_forward_hook(compare(name)))
    try:
        quantized_model.eval()
        with torch.no_grad():
            for batch in batches:
                outputs.clear()
                reference(*batch)
                quantized_model(*batch)
    finally:
        for handle in handles:
            handle.remove()
        quantized_model.train(was_training)
    return {name: _decibel(signal[name], noise[name]) for name in names}


def _decibel(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
