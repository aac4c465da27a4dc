"""What a network costs as a function of the channels that each layer keeps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from core.pruning.coupling import Group
from core.pruning.surgery import Key, Side, find, slots

Fractions = Mapping[Key, float]


@dataclass(frozen=True)
class Term:
    """A part of a cost that shrinks with the kept fraction of each of its sides."""

    base: float
    keys: tuple[Key, ...]

    def at(self, kept: Fractions) -> float:
        """The part when each side keeps that fraction of its channels (1 where not given)."""
        return self.base * math.prod(kept.get(key, 1.0) for key in self.keys)


@dataclass(frozen=True)
class Cost:
    """A constant and terms; exact for convolutions, linear layers and attention."""

    unit: str
    constant: float
    terms: tuple[Term, ...]

    @property
    def total(self) -> float:
        """The cost of the network as it is."""
        return self.constant + sum(term.base for term in self.terms)

    def touching(self, keys: Iterable[Key]) -> tuple[Term, ...]:
        """The terms that change with any of these sides."""
        wanted = set(keys)
        return tuple(term for term in self.terms if wanted & set(term.keys))


def count_macs(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Multiply-accumulates of one forward pass, by torch's own counter (which counts two FLOPs for each)."""
    was_training = model.training
    model.eval()
    # the fused paths of attention are not counted: gradients switch one off, the plain kernel the other
    from torch.utils.flop_counter import FlopCounterMode  # see `core.hardware.profile.operator_macs`

    with FlopCounterMode(display=False) as counter, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        model(*inputs)
    model.train(was_training)
    return counter.get_total_flops() // 2


def parameter_cost(model: nn.Module) -> Cost:
    """Parameters as a function of the kept channels."""
    return Cost("parameters", 0.0, tuple(Term(p.numel(), _keys(model, name)) for name, p in model.named_parameters()))


def channel_cost(groups: Iterable[Group]) -> Cost:
    """Channels of the groups that may be pruned."""
    return Cost("channels", 0.0, tuple(Term(group.channels, (group.key,)) for group in groups))


def output_cost(model: nn.Module, groups: Iterable[Group]) -> Cost:
    """Output channels of the convolutions and linear layers that make the groups: coupled ones count once a layer."""
    return Cost("outputs", 0.0, tuple(Term(made_channels(model, group), (group.key,)) for group in groups))


def made_channels(model: nn.Module, group: Group) -> int:
    """Output channels of convolutions and linear layers that go when all of a group goes: every maker counts."""
    makers = [(find(model, m.layer), m) for m in group.members if m.side == "out"]
    matrix = (nn.modules.conv._ConvNd, nn.Linear)
    return sum(len(m.index) for layer, m in makers if isinstance(layer, matrix))


def mac_cost(model: nn.Module, inputs: tuple[Tensor, ...]) -> Cost:
    """Multiply-accumulates as a function of the kept channels.

    Every weight of a convolution or linear layer is used once for each position, so its share scales
    with the weight; what is not in such a layer stays as a constant.
    """
    uses: dict[str, int] = {}
    attention: dict[str, tuple[int, int]] = {}

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def record(_: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            if isinstance(module, nn.MultiheadAttention):
                query, key = args[0], args[1]
                queries, keys = query.numel() // query.shape[-1], key.numel() // key.shape[-1]
                batch = 1 if query.ndim == 2 else query.shape[0 if module.batch_first else 1]
                embed = module.embed_dim
                linear = (2 * queries + 2 * keys) * embed * embed
                mixing = 2 * queries * (keys // batch) * embed
                old = attention.get(name, (0, 0))
                attention[name] = (old[0] + linear, old[1] + mixing)
                return
            shaped = args[0] if getattr(module, "transposed", False) else output
            assert isinstance(shaped, Tensor)
            axis = -(len(module.kernel_size) + 1) if isinstance(module, nn.modules.conv._ConvNd) else -1
            uses[name] = uses.get(name, 0) + shaped.numel() // shaped.shape[axis]

        return module.register_forward_hook(record)

    counted = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)
    hooks = [watch(name, module) for name, module in model.named_modules() if isinstance(module, counted)]
    try:
        total = count_macs(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    terms = []
    for name, count in uses.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        terms.append(Term(count * weight.numel(), _keys(model, f"{name}.weight" if name else "weight")))
    for name, (linear, mixing) in attention.items():
        key: Key = (name, "out")
        terms += [Term(linear, (key, key)), Term(mixing, (key,))]
    return Cost("MACs", total - sum(t.base for t in terms), tuple(terms))


def _keys(model: nn.Module, tensor: str) -> tuple[Key, ...]:
    """The sides of the layers that a parameter has a slot for; one entry for every axis that shrinks."""
    owner, _, leaf = tensor.rpartition(".")
    layer = owner
    if owner.endswith("out_proj") and isinstance(model.get_submodule(owner.rpartition(".")[0]), nn.MultiheadAttention):
        layer, leaf = owner.rpartition(".")[0], f"out_proj.{leaf}"
    by_side = slots(model.get_submodule(layer))
    found: list[Key] = []
    sides: tuple[Side, ...] = ("out", "in")
    for side in sides:
        found += [(layer, side) for slot in by_side.get(side, []) if slot.tensor == leaf]
    return tuple(found) or ((tensor, "out"),)
