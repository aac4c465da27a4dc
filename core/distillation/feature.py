"""Feature losses: named layers of the student against layers of the teacher, through small adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.kit import InputError

_CONVS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def parse_pairs(features: Sequence[str]) -> list[tuple[str, str]]:
    """("a=b", "c") as [("a", "b"), ("c", "c")]: layers of the student with layers of the teacher."""
    pairs = []
    for item in features:
        student, _, teacher = item.partition("=")
        pairs.append((student.strip(), (teacher or student).strip()))
    return pairs


@contextmanager
def captured(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of named layers, filled in by every forward pass inside the `with`; the hooks go with it.

    Raises InputError for a layer that the model does not have, or whose output is no tensor.
    """
    outputs: dict[str, Tensor] = {}
    hooks = []

    def keep(name: str) -> None:
        def hook(module: nn.Module, args: object, output: object) -> None:
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            if not isinstance(first, Tensor):
                raise InputError(f"Distill.features: layer {name!r} gives {type(output).__name__}, expected a tensor")
            outputs[name] = first

        try:
            layer = model.get_submodule(name)
        except AttributeError as error:
            known = ", ".join(n for n, m in model.named_modules() if n and not list(m.children()))
            raise InputError(f"Distill.features: no layer {name!r}; layers are {known[:300]}") from error
        hooks.append(layer.register_forward_hook(hook))

    try:
        for name in dict.fromkeys(layers):
            keep(name)
        yield outputs
    finally:
        for handle in hooks:
            handle.remove()


def adapter(student: Tensor, teacher: Tensor, where: str) -> nn.Module:
    """The regressor from a student's feature to a teacher's: identity, 1x1 convolution or linear layer.

    A 1x1 convolution when only axis 1 differs ([B, C, ...]), a linear layer when only the last one does
    ([B, C] or [B, N, C]). Raises InputError when other axes differ.
    """
    ours, theirs = tuple(student.shape), tuple(teacher.shape)
    different = [axis for axis, (a, b) in enumerate(zip(ours, theirs)) if a != b]
    if len(ours) == len(theirs):
        if not different:
            return nn.Identity()
        if different == [len(ours) - 1]:
            return nn.Linear(ours[-1], theirs[-1])
        if different == [1] and len(ours) in _CONVS:
            return _CONVS[len(ours)](ours[1], theirs[1], 1)
    raise InputError(f"Distill.features: {where} has shapes {ours} and {theirs}; only the channels may differ")


def build_adapters(
    pairs: Sequence[tuple[str, str]], student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], seed: int
) -> nn.ModuleList:
    """One adapter a pair, from the features of a dry run; the same weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.ModuleList(adapter(student[s], teacher[t], f"{s}={t}") for s, t in pairs)


def features_loss(
    pairs: Sequence[tuple[str, str]],
    adapters: Sequence[nn.Module] | nn.ModuleList,
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
) -> Tensor:
    """Mean over the pairs of 1/2 * mean((adapter(student) - teacher)^2), a scalar.

    Romero et al., "FitNets: Hints for Thin Deep Nets" (2015).
    """
    terms = [F.mse_loss(fit(student[s]), teacher[t].detach()) for (s, t), fit in zip(pairs, adapters, strict=True)]
    return 0.5 * torch.stack(terms).mean()
