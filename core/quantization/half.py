"""Half precision: the step Half, whose layers hold weights that FP16 can hold and, in torch, give FP16 outputs.

In torch this is simulated in FP32, so that the accuracy of a device that computes in FP16 can be scored on any
processor. What stays in FP32 by construction: everything between the layers (geometry, sampling grids, inverse
sigmoid, softmax, residual sums) and the sums inside of a layer, as tensor cores keep them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from core.compress import Outcome, Skipped, handles
from core.kit import Context, InputError, Step
from core.quantization.modules import QuantConv2d, Quantizer, QuantLinear
from core.quantization.packed import PackedLayer

_OTHER = (QuantConv2d, QuantLinear, Quantizer, PackedLayer)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
LARGEST = 65504.0


@dataclass(frozen=True, kw_only=True)
class Half(Step):
    """Put layers into FP16: weights are rounded, and in torch the outputs are too (simulated).

    `layers` and `keep` are patterns (fnmatch: "head.*"); a layer that matches one of `keep` stays in FP32. Layers
    that are quantized or packed stay as they are. An exported file holds the weights in FP16, two bytes each;
    a runtime that has no FP16 kernels computes with them in FP32, which its audit says.
    """

    layers: tuple[str, ...] = ("*",)
    keep: tuple[str, ...] = ()


def restore(model: nn.Module, step: Half, structure: dict[str, Any]) -> nn.Module:
    """Mark the layers of a finished step again; their weights are loaded already rounded."""
    for name in structure["layers"]:
        _mark(model.get_submodule(name))
    return model


@handles(Half, restore=restore)
def halve_model(model: nn.Module, step: Half, context: Context) -> Outcome:
    """Round and mark every layer that matches."""
    return halve(model, step.layers, step.keep)


def halve(model: nn.Module, layers: Sequence[str], keep: Sequence[str] = ()) -> Outcome:
    """Put layers that match `layers` and not `keep` into FP16, in place. InputError for a pattern without a match."""
    owners = _owners(model)
    for field, patterns in (("layers", layers), ("keep", keep)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in owners):
                raise InputError(f"{field}: pattern {pattern!r} matches no layer with weights; correct or remove it")
    changed: list[dict[str, Any]] = []
    skipped: list[Skipped] = []
    chosen: list[str] = []
    for name, module in owners.items():
        if not any(fnmatchcase(name, pattern) for pattern in layers):
            continue
        kept = next((pattern for pattern in keep if fnmatchcase(name, pattern)), None)
        why = f"kept by pattern {kept!r}" if kept is not None else obstacle(module)
        if why is not None:
            skipped.append(Skipped(name, f"stays as it is: {why}"))
            continue
        error = max(float((p.data - p.data.half().float()).abs().max()) for p in module.parameters(recurse=False))
        _round(module)
        _mark(module)
        chosen.append(name)
        what = "weights in FP16; outputs in FP16, simulated in torch"
        changed.append({"layer": name, "what": what, "weight_bits": 16, "activation_bits": 16, "weight_error": error})
    return Outcome(model, changed, skipped, {"layers": chosen})


def half_layers(model: nn.Module) -> list[str]:
    """The names of the layers that `Half` put into FP16."""
    return [name for name, module in model.named_modules() if is_half(module)]


def is_half(module: nn.Module) -> bool:
    """Whether `Half` put this layer into FP16."""
    return _rounded in module._forward_hooks.values()


def halvable(model: nn.Module) -> list[str]:
    """The names of the layers that `Half` could put into FP16."""
    return [name for name, module in _owners(model).items() if obstacle(module) is None]


def obstacle(module: nn.Module) -> str | None:
    """Why a layer cannot go into FP16, or None."""
    if isinstance(module, _OTHER):
        return "it is quantized already"
    if isinstance(module, _NORMS):
        return "a batch norm stays in FP32 until it is folded into the layer before it"
    if is_half(module):
        return "it is in FP16 already"
    parameters = list(module.parameters(recurse=False))
    if any(p.dtype != torch.float32 for p in parameters):
        return "its weights are not FP32"
    largest = max(float(p.detach().abs().max()) for p in parameters if p.numel())
    if not largest <= LARGEST:
        return f"a weight of {largest:.3g} does not fit into FP16"
    return None


@contextmanager
def weights_alone(model: nn.Module) -> Iterator[nn.Module]:
    """Within it outputs are not rounded: the model as an exported file holds it, FP16 weights and FP32 sums."""
    marked = [module for module in model.modules() if is_half(module)]
    for module in marked:
        for key in [k for k, hook in module._forward_hooks.items() if hook is _rounded]:
            del module._forward_hooks[key]
    try:
        yield model
    finally:
        for module in marked:
            _mark(module)


@contextmanager
def halved(module: nn.Module) -> Iterator[None]:
    """Within it one layer is in FP16."""
    before = [p.data for p in module.parameters(recurse=False)]
    _round(module)
    handle = module.register_forward_hook(_rounded)
    try:
        yield
    finally:
        handle.remove()
        for parameter, data in zip(module.parameters(recurse=False), before, strict=True):
            parameter.data = data


def _owners(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that own parameters, by name."""
    return {n: m for n, m in model.named_modules() if n and any(p.numel() for p in m.parameters(recurse=False))}


def _round(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.half().float()


def _mark(module: nn.Module) -> None:
    module.register_forward_hook(_rounded)


def _rounded(module: nn.Module, args: Any, output: Any) -> Any:
    """The output in FP16's numbers; an exported graph is left alone, for its runtime computes as it can."""
    if torch.onnx.is_in_onnx_export():
        return output
    return pytree.tree_map(_to_half_and_back, output)


def _to_half_and_back(x: Any) -> Any:
    return x.half().float() if isinstance(x, Tensor) and x.dtype == torch.float32 else x
