"""Weights as published: safetensors, or a torch file of which only tensors are read; loading is strict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from core.kit import InputError

SHOWN = 4
"""Names of a kind that an error lists."""


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load a file into a model in place, every name and shape being the same; the model ends in eval mode.

    A torch file may wrap the weights as {"state_dict": ...}; all names may begin with "module.", as DataParallel
    leaves them. Raises InputError naming the file, and the tensors that are missing, unknown, of another shape or
    not finite; the model is then as it was.
    """
    tensors = read_checkpoint(path)
    state = model.state_dict()
    faults = [
        *_fault("missing", [n for n in state if n not in tensors]),
        *_fault("unknown", [n for n in tensors if n not in state]),
        *_fault(
            "of another shape",
            [
                f"{n} {tuple(t.shape)} instead of {tuple(state[n].shape)}"
                for n, t in tensors.items()
                if n in state and t.shape != state[n].shape
            ],
        ),
        *_fault(
            "not finite", [n for n, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]
        ),
    ]
    if faults:
        config = getattr(model, "config", None)
        what = f"{type(model).__name__} {config.name!r}" if config is not None else type(model).__name__
        raise InputError(f"{path}: not weights of {what}: {'; '.join(faults)}; give the config it was trained with")
    model.load_state_dict(tensors, strict=True)
    model.eval()


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, the wrapper and a common "module." taken off."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a checkpoint (.safetensors or .pth)")
    with path.open("rb") as file:
        head = file.read(9)
    # safetensors begins with the length of its JSON, which follows
    found = _safetensors(path) if head[8:9] == b"{" else _torch_file(path)
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not found:
        raise InputError(f"{path}: holds no weights by name; give a state_dict, alone or as {{'state_dict': ...}}")
    others = [str(name) for name, value in found.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if others:
        raise InputError(f"{path}: {others[0]!r} is no tensor; give a state_dict, alone or as {{'state_dict': ...}}")
    if all(name.startswith("module.") for name in found):
        return {name.removeprefix("module."): value for name, value in found.items()}
    return dict(found)


def _safetensors(path: Path) -> object:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}); fetch it again") from error


def _torch_file(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn file, or one with more than tensors, raises any of half a dozen types
        said = (str(error) or type(error).__name__).splitlines()[0][:160]
        raise InputError(
            f"{path}: torch cannot read weights alone from it ({said}); fetch it again or, if you trust where it comes "
            "from, load it there and save its state_dict as safetensors"
        ) from error


def _fault(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"{len(names)} {what} ({', '.join(names[:SHOWN])}{more})"]
