"""How much each channel of a coupled group matters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core.pruning.coupling import Group, slots_of
from core.pruning.surgery import channel_sums, find, slot_tensor

Criterion = Literal["l1", "l2", "bn", "taylor"]
_DROPOUT = nn.modules.dropout._DropoutNd
_BATCHNORM = nn.modules.batchnorm._BatchNorm


def magnitude(model: nn.Module, group: Group, power: Literal[1, 2]) -> Tensor:
    """L1 or L2 norm of all filter weights that leave with a channel, those that read it included: [channels].

    Li et al., "Pruning Filters for Efficient ConvNets" (2017), summed over the group as in DepGraph
    (Fang et al., 2023). Biases and norms do not count.
    """
    total = torch.zeros(group.channels, dtype=torch.float64)
    for member in group.members:
        layer = find(model, member.layer)
        for slot in slots_of(model, member):
            if slot.kind == "filter":
                sums = channel_sums(layer, slot, slot_tensor(layer, slot).detach().double().abs() ** power)
                total.index_add_(0, torch.tensor(member.position), sums.cpu()[list(member.index)])
    return total if power == 1 else total.sqrt()


def bn_gamma(model: nn.Module, group: Group) -> Tensor | None:
    """Sum of |gamma| of the group's batch norms: [channels]; None where there is none.

    Liu et al., "Learning Efficient Convolutional Networks through Network Slimming" (2017).
    """
    total, found = torch.zeros(group.channels, dtype=torch.float64), False
    for member in group.members:
        layer = find(model, member.layer)
        if isinstance(layer, _BATCHNORM) and layer.affine:
            gamma = layer.weight.detach().double().abs().cpu()
            total.index_add_(0, torch.tensor(member.position), gamma[list(member.index)])
            found = True
    return total if found else None


def taylor(
    model: nn.Module, groups: Sequence[Group], loss: Callable[[nn.Module, Any], Tensor], batches: Iterable[Any]
) -> list[Tensor]:
    """Mean over batches of (sum of weight * gradient over the weights that read the channel)^2: [channels] a group.

    That sum is the first-order change of the loss when a channel is taken away from all its readers
    (Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019, with one gate a channel).
    Leaves the model's gradients empty.
    """
    totals = [torch.zeros(group.channels, dtype=torch.float64) for group in groups]
    count = 0
    with loss_mode(model), torch.enable_grad():
        for batch in batches:
            model.zero_grad(set_to_none=True)
            loss(model, batch).backward()
            for group, total in zip(groups, totals, strict=True):
                total += _first_order(model, group) ** 2
            count += 1
    model.zero_grad(set_to_none=True)
    return [total / max(count, 1) for total in totals]


def _first_order(model: nn.Module, group: Group) -> Tensor:
    change = torch.zeros(group.channels, dtype=torch.float64)
    for member in group.members:
        layer = find(model, member.layer)
        for slot in slots_of(model, member):
            weight = slot_tensor(layer, slot)
            if slot.reads and weight.grad is not None:
                sums = channel_sums(layer, slot, weight.detach().double() * weight.grad.double())
                change.index_add_(0, torch.tensor(member.position), sums.cpu()[list(member.index)])
    return change


@contextmanager
def loss_mode(model: nn.Module) -> Iterator[None]:
    """Training mode, as losses expect it, with frozen batch statistics and no dropout; put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    for module in model.modules():
        if isinstance(module, (_BATCHNORM, _DROPOUT, nn.MultiheadAttention)):
            module.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
