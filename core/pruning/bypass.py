"""Blocks taken out of a residual network: what went through them passes by, or through their shortcut alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from core.kit import InputError


class Bypass(nn.Module):
    """Stands where a residual or transformer block was, and gives its first argument back.

    `shortcut` is the projection of a residual block whose channels change (x -> shortcut(x)), None where the
    block is passed by. Called with `return_dict` it answers with a tuple of one, as diffusers' transformers do.
    """

    def __init__(self, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.conv_shortcut = shortcut

    def forward(self, x: Tensor, *others: Any, return_dict: bool | None = None, **named: Any) -> Tensor | tuple[Tensor]:
        y = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return y if return_dict is None else (y,)


def bypass(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Put a `Bypass` where each named block is, in place, and return the model.

    A block's `conv_shortcut` (diffusers' ResnetBlock2D) stays as the bypass's, under the same name, so that
    its weights keep their keys. Raises InputError for a name that the model does not have.
    """
    for name in names:
        try:
            block = model.get_submodule(name)
        except AttributeError as error:
            raise InputError(f"removed block {name!r}: no such module in this {type(model).__name__}") from error
        if isinstance(block, Bypass):
            continue
        shortcut = getattr(block, "conv_shortcut", None)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, Bypass(shortcut))
    return model


def bypassed(model: nn.Module) -> list[str]:
    """The names of the blocks that were taken out of a model, in its own order."""
    return [name for name, module in model.named_modules() if isinstance(module, Bypass)]
