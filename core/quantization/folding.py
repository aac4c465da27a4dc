"""Fold batch normalization into the layer before it: the same function in eval mode, one operation fewer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from core.compress import Skipped
from core.quantization.watching import Seen, watch

_BEFORE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
Pair = tuple[str, str]


def find_folds(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[list[Pair], list[Skipped]]:
    """The (layer, batch norm) pairs that can be folded, and every other batch norm with the reason.

    Runs `model(*inputs)` once and watches it: a pair folds if the norm's input is the very output of a
    convolution or linear layer and nothing else reads that output.
    """
    seen = watch(model, inputs, (*_BEFORE, *_NORMS))
    modules = dict(model.named_modules())
    owners: dict[int, int] = {}
    for module in modules.values():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    pairs: list[Pair] = []
    skipped: list[Skipped] = []
    for name, module in modules.items():
        if isinstance(module, _NORMS):
            why = _obstacle(name, module, seen, modules, owners)
            if why is None:
                pairs.append((str(seen[name].source), name))
            else:
                skipped.append(Skipped(name, f"batch norm not folded: {why}"))
    return pairs, skipped


def fold(model: nn.Module, pairs: list[Pair]) -> nn.Module:
    """Fold each (layer, batch norm) pair in place, put nn.Identity where the norm was, return the model."""
    for name, norm_name in pairs:
        layer, norm = model.get_submodule(name), model.get_submodule(norm_name)
        weight, mean, var = layer.weight, norm.running_mean, norm.running_var
        assert isinstance(weight, Tensor) and isinstance(mean, Tensor) and isinstance(var, Tensor)
        assert isinstance(norm, _NORMS)
        with torch.no_grad():
            # In double precision: a running variance near 0 makes a large factor.
            gain = (var.double() + norm.eps).rsqrt()
            if norm.affine:
                gain = gain * norm.weight.double()
            bias = torch.zeros_like(mean) if layer.bias is None else layer.bias
            assert isinstance(bias, Tensor)
            shift = (bias.double() - mean.double()) * gain
            if norm.affine:
                shift = shift + norm.bias.double()
            weight.copy_(weight.double() * gain.reshape(-1, *[1] * (weight.ndim - 1)))
            layer.bias = nn.Parameter(shift.to(weight.dtype))
        replace_module(model, norm, nn.Identity())
    return model


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` stands in the tree, in place."""
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module is old:
                setattr(parent, child, new)


def _obstacle(
    name: str, norm: nn.Module, seen: dict[str, Seen], modules: dict[str, nn.Module], owners: dict[int, int]
) -> str | None:
    """Why a norm cannot be folded, or None."""
    if name not in seen:
        return "it was not called in the forward that was watched"
    if norm.running_mean is None:
        return "it keeps no running statistics"
    if len(seen[name].inputs) != 1:
        return f"it is called {len(seen[name].inputs)} times in one forward"
    source = seen[name].source
    if source is None or not isinstance(modules[source], _BEFORE):
        return "its input is not the output of a convolution or linear layer"
    layer, before = modules[source], seen[source]
    if len(before.inputs) != 1:
        return f"{source}, whose output it takes, is called {len(before.inputs)} times in one forward"
    if len(before.uses) != 1 or before.returned:
        return f"the output of {source} is used elsewhere too"
    if isinstance(layer, nn.Linear) and before.ranks != {2}:
        return f"the output of {source} has more than 2 axes, and the norm works on another one than the layer"
    if any(owners[id(p)] > 1 for p in layer.parameters(recurse=False)):
        return f"{source} shares its parameters with another layer"
    return None
