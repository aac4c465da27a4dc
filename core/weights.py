"""Weights of a model in a safetensors file: the same model gives the same bytes, and loading is strict."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from core.files import replaced
from core.kit import InputError


def stored(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model with what several names share once, under the first of them in alphabetical order.

    The tensors are those of the model, not copies.
    """
    state = model.state_dict()
    return {names[0]: state[names[0]] for names in _shared(state)}


def load_stored(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy tensors into a model: of every group of names that share one, one must be there, and no other name.

    Raises InputError, beginning with `where`, for names that are missing or unknown, for other shapes, and
    for two names of one group with different values.
    """
    state = model.state_dict()
    groups = _shared(state)
    missing = [names[0] for names in groups if not set(names) & set(tensors)]
    unknown = sorted(set(tensors) - set(state))
    apart = [
        (first, other)
        for names in groups
        for first, other in pairwise(n for n in names if n in tensors)
        if not torch.equal(tensors[first], tensors[other])
    ]
    shapes = [
        f"{name!r} is {tuple(tensors[name].shape)} and not {tuple(state[name].shape)}"
        for name in state
        if name in tensors and tensors[name].shape != state[name].shape
    ]
    wrong = [
        *(f"{name!r} is missing" for name in missing),
        *(f"{name!r} is none of its tensors" for name in unknown),
        *(f"{first!r} and {other!r} differ and are one tensor here" for first, other in apart),
        *shapes,
    ]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise InputError(f"{where}: not weights of this {type(model).__name__}: {wrong[0]}{more}")
    model.load_state_dict(dict(tensors), strict=False)


def state_hash(model: nn.Module) -> str:
    """The sha256, in hexadecimal, of names, types, shapes and values of a model's state."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_weights(model: nn.Module, path: Path) -> None:
    """Write `stored(model)`, whole or not at all; raises InputError naming `path` where the disk is full.

    safetensors' own `save_model` notes the names it leaves out in an order that differs from call to call.
    """
    with replaced(path) as fresh:
        save_file(_apart(stored(model)), str(fresh))


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a file of `save_weights` (or of safetensors' `save_model`) into a model of the same structure, strictly.

    Raises InputError naming the file where it is missing, torn, or of another network.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a file of weights (.safetensors)")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}); write it again") from error
    load_stored(model, tensors, str(path))


def _shared(state: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of a state in groups that share one tensor, each group and the list in alphabetical order."""
    groups: dict[object, list[str]] = {}
    for name in sorted(state):
        value = state[name]
        same = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        alone = value.is_meta or not value.numel()  # nothing to share, and no address of its own
        groups.setdefault(name if alone else same, []).append(name)
    return list(groups.values())


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in plain order, copied where two are parts of one memory, which safetensors refuses."""
    users: dict[tuple[torch.device, int], int] = {}
    for value in tensors.values():
        place = value.device, value.untyped_storage().data_ptr()
        users[place] = users.get(place, 0) + 1

    def own(value: Tensor) -> Tensor:
        part = users[value.device, value.untyped_storage().data_ptr()] > 1
        return value.detach().clone(memory_format=torch.contiguous_format) if part else value.detach().contiguous()

    return {name: own(value) for name, value in tensors.items()}


def load_mean(model: nn.Module, paths: Sequence[Path]) -> None:
    """Load the mean of several files of weights, such as those of one training's last legs; counters are the last's.

    What they fluctuate about is better than each (Wortsman et al. 2022, "Model soups"). InputError as `load_weights`,
    and without a file.
    """
    if not paths:
        raise InputError("the mean of no weights; name at least one file")
    sums: dict[str, Tensor] = {}
    for path in paths:
        load_weights(model, path)
        for name, value in stored(model).items():
            known = value.detach().to(torch.float64) if value.is_floating_point() else value.detach().clone()
            sums[name] = sums[name] + known if name in sums and value.is_floating_point() else known
    state = stored(model)
    means = {n: (s / len(paths)).to(state[n].dtype) if s.is_floating_point() else s for n, s in sums.items()}
    load_stored(model, means, "the mean")
