"""Watch one eager forward: what each layer was given and what became of its output.

Tensors are told apart by identity, so that the answers hold for any Python control flow; no symbolic trace is
needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass
class Seen:
    """A layer during the watched forward.

    `inputs` has one key a call: equal keys mean the same tensor with the same contents. `source` is the
    watched layer whose untouched output was its only input. `uses` are the torch functions that read
    its output; `returned` says whether the model gave that output back itself.
    """

    inputs: list[tuple[int, int]] = field(default_factory=list)
    source: str | None = None
    uses: list[str] = field(default_factory=list)
    ranks: set[int] = field(default_factory=set)
    returned: bool = False


def watch(model: nn.Module, inputs: tuple[Tensor, ...], kinds: tuple[type[nn.Module], ...]) -> dict[str, Seen]:
    """Run `model(*inputs)` in eval mode; what was seen of each module of these types that was called."""
    seen: dict[str, Seen] = {}
    outputs: dict[int, str] = {}
    numbers = WeakTensorKeyDictionary()  # an id is given again once its tensor is gone, a number never
    fresh = count()

    def number(x: Tensor) -> int:
        known = numbers.get(x)
        if known is None:
            known = numbers[x] = next(fresh)
        return int(known)

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            layer = seen.setdefault(name, Seen())
            if args and isinstance(args[0], Tensor):
                layer.inputs.append((number(args[0]), args[0]._version))
                layer.source = outputs.get(number(args[0])) if len(layer.inputs) == 1 else None

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs[number(output)] = name
                seen[name].ranks.add(output.ndim)

        return hook

    class Uses(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            leaves = pytree.tree_leaves(result)
            if any(isinstance(leaf, Tensor) for leaf in leaves):
                given = {number(a) for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
                for name in {outputs.get(n) for n in given}:
                    if name is not None:
                        seen[name].uses.append(getattr(func, "__name__", str(func)))
            return result

    training = {m: m.training for m in model.modules()}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            handles += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(after(name))]
    try:
        model.eval()
        with torch.no_grad(), Uses():
            result = model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    for leaf in pytree.tree_leaves(result):
        if isinstance(leaf, Tensor) and number(leaf) in outputs:
            seen[outputs[number(leaf)]].returned = True
    return seen
