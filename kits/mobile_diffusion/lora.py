"""A user's LoRA on a pipeline, packed or not: checked first, so that one of another model changes nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from core.kit import InputError

# "unet.mid_block...to_q.lora_A.weight", and "...to_q.lora.down.weight" of older files
_KEY = re.compile(
    r"(?P<part>unet|text_encoder)\.(?P<layer>.+?)\.(?:lora_(?P<ab>[AB])|lora(?:_linear_layer)?[._](?P<way>down|up))\.weight"
)
MEND = "choose a LoRA that was trained on this model, or on a fine-tune of it"


def load_lora(pipe: Any, path: Path | str, scale: float = 1.0) -> int:
    """Put the LoRA of a safetensors file on a pipeline's UNet and text encoder, and return how many layers it changes.

    The layers below stay as they are, packed or not; `pipe.unload_lora_weights()` takes the LoRA off again.
    Raises InputError in one line for a file that is missing, damaged, no LoRA or one of another architecture.
    """
    path = Path(path)
    tensors = _read(path)
    try:
        state, _ = pipe.lora_state_dict(dict(tensors), unet_config=pipe.unet.config)
    except (ValueError, KeyError, IndexError) as error:
        raise InputError(f"{path}: not a LoRA that diffusers reads ({_line(error)}); {MEND}") from error
    layers = _check(pipe, path, state)
    try:
        pipe.load_lora_weights(dict(tensors))
        names = pipe.get_active_adapters()
        pipe.set_adapters(names, [scale] * len(names))
    except (ValueError, RuntimeError, KeyError) as error:
        pipe.unload_lora_weights()
        raise InputError(f"{path}: does not load ({_line(error)}); {MEND}") from error
    return layers


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a LoRA's .safetensors file")
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: expected a .safetensors file; other kinds can hold code and are not read")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}); copy it again") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise InputError(f"{path}: tensor {name!r} holds NaN or Inf, which makes black pictures; copy it again")
    return tensors


def _check(pipe: Any, path: Path, state: dict[str, Tensor]) -> int:
    """Compare every pair of matrices with the layer it is for; returns the number of layers."""
    found: set[str] = set()
    for key, tensor in state.items():
        match = _KEY.fullmatch(key)
        if match is None:
            continue
        part, name = match["part"], match["layer"]
        layer = _layer(getattr(pipe, part, None), name)
        if layer is None:
            raise InputError(f"{path}: made for another architecture: this {part} has no layer {name!r}; {MEND}")
        down = match["ab"] == "A" or match["way"] == "down"
        channels = tensor.shape[1] if down else tensor.shape[0]
        expected = layer.weight.shape[1] if down else layer.weight.shape[0]
        if channels != expected:
            side = "inputs" if down else "outputs"
            raise InputError(
                f"{path}: made for another architecture: {channels} {side} for {part}.{name}, "
                f"which has {expected} here; {MEND}"
            )
        found.add(f"{part}.{name}")
    if not found:
        raise InputError(f"{path}: no LoRA of a UNet or text encoder in it; {MEND}")
    return len(found)


def _layer(model: nn.Module | None, name: str) -> Any:
    """The layer of that name, also where a file says "text_model." before it or a LoRA is on it already."""
    if model is None:
        return None
    for candidate in (name, name.removeprefix("text_model.")):
        try:
            layer = model.get_submodule(candidate)
        except AttributeError:
            continue
        layer = getattr(layer, "base_layer", layer)
        return layer if isinstance(layer, (nn.Linear, nn.Conv2d)) else None
    return None


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
