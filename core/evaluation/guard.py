"""A guard over a running model: the first NaN, Inf or saturated activation stops it, with layer and step named."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

FP16_LIMIT = 65504.0
"""The largest magnitude that FP16 holds; a device that computes in FP16 turns what is larger into Inf."""

# What can make a number too large or none at all. The rest (activations, dropout, reshapes) only passes it on, to a
# layer that is watched.
_SOURCES = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.Bilinear,
    nn.Embedding,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.modules.batchnorm._NormBase,
    nn.MultiheadAttention,
    nn.RNNBase,
)


class ActivationError(FloatingPointError):
    """An activation that is NaN, Inf or beyond the limit; `layer` and `step` say where it came first."""

    def __init__(self, layer: str, step: int | None, what: str, mend: str) -> None:
        where = layer if step is None else f"{layer}, step {step}"
        super().__init__(f"{where}: {what}; {mend}")
        self.layer, self.step = layer, step


class Guard:
    """What `guard` gives: set `step` where the caller knows it; `looked` counts outputs that were looked at."""

    def __init__(self, limit: float, every: int) -> None:
        self.limit, self.every = limit, every
        self.step: int | None = None
        self.looked = 0

    def look(self, name: str, layer: nn.Module, output: Any) -> None:
        """Raise ActivationError where a tensor of a layer's output is NaN, Inf or beyond the limit."""
        for value in [output] if isinstance(output, Tensor) else tree_leaves(output):
            if not isinstance(value, Tensor) or not value.is_floating_point() or value.device.type == "meta":
                continue
            self.looked += 1
            # one pass over memory; the norm of a NaN is NaN, for which no comparison holds
            largest = float(torch.linalg.vector_norm(value.detach(), math.inf)) if value.numel() else 0.0
            if not largest <= self.limit or math.isinf(largest):
                self._refuse(name, layer, value.detach())

    def _refuse(self, name: str, layer: nn.Module, value: Tensor) -> None:
        title = f"{name or 'the model'} ({type(layer).__name__})"
        total = value.numel()
        for bad, word in ((value.isnan(), "NaN"), (value.isinf(), "Inf")):
            if found := int(bad.sum()):
                mend = "run or pack this layer in more bits, lower the guidance, or check its weights and the LoRA"
                raise ActivationError(title, self.step, f"{word} in {found} of {total} activations", mend)
        beyond = value.abs() > self.limit
        largest = float(value.abs().max())
        what = f"{int(beyond.sum())} of {total} activations beyond {self.limit:g}, the largest {largest:g}"
        raise ActivationError(title, self.step, what, "FP16 would saturate: keep this layer in FP32 or BF16")


@contextmanager
def guard(model: nn.Module, *, limit: float = FP16_LIMIT, every: int = 1) -> Iterator[Guard]:
    """Watch the outputs of a model's layers inside the `with` block and raise ActivationError at the first bad one.

    Bad is NaN, Inf or a magnitude beyond `limit` (FP16's range; math.inf for NaN and Inf alone). With `every` = k a
    layer is looked at in one of k passes, the layers in turns, which costs a k-th. The results of the model, of its
    children and of their parts are looked at in every pass; where one of those is bad, that pass is repeated with
    every layer watched, so that the layer named is the first even when it was not due. Layers without weights or norms
    only pass values on and are not watched.
    """
    watch = Guard(limit, max(1, every))
    handles = [m.register_forward_hook(_in_turn(watch, name, turn)) for turn, (name, m) in enumerate(_sources(model))]
    for name, module in model.named_modules():
        # two levels down, since a part such as a VAE's decoder is also called on its own
        if name.count(".") < 2 and next(module.children(), None) is not None:
            handles.append(module.register_forward_hook(_of_part(watch, name), with_kwargs=True))
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _sources(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, _SOURCES)]


def _in_turn(watch: Guard, name: str, turn: int) -> Callable[..., None]:
    passes = count(turn)

    def hook(layer: nn.Module, _: Any, output: Any) -> None:
        if next(passes) % watch.every == 0:
            watch.look(name, layer, output)

    return hook


def _of_part(watch: Guard, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        try:
            watch.look(name, module, output)
        except ActivationError:
            _name_the_first(watch, name, module, arguments, named)
            raise  # no layer of this module is bad on its own: its arithmetic outside layers is

    return hook


def _name_the_first(
    watch: Guard, prefix: str, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
) -> None:
    """Run the same pass again with every layer watched; raises ActivationError for the first bad one."""
    dot = f"{prefix}." if prefix else ""

    def look(name: str) -> Callable[..., None]:
        return lambda layer, _, output: watch.look(dot + name if name else prefix, layer, output)

    handles = [m.register_forward_hook(look(n)) for n, m in _sources(module) if m is not module]
    try:
        with torch.no_grad():
            module.forward(*arguments, **named)
    finally:
        for handle in handles:
            handle.remove()
