"""Published Stable Diffusion architectures with seeded random weights: size, memory and speed without a hub."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.kit import InputError
from kits.mobile_diffusion.data.tokenizer import make_tokenizer
from kits.mobile_diffusion.model.pipeline import Diffusion, Sampling, building, save_part, save_rest

# Said wherever a figure of such a model is shown: its weights are random, so its pictures mean nothing.
ARCHITECTURE_ONLY = "architecture only"

_CROSS_DOWN, _DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
_CROSS_UP, _UP = "CrossAttnUpBlock2D", "UpBlock2D"


@dataclass(frozen=True)
class Architecture:
    """The configs of a pipeline's components, and the published number of the UNet's parameters in millions."""

    text: Mapping[str, Any]
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: tuple[str, Mapping[str, Any]]
    tokens: int
    published: float | None = None


_CLIP_L: dict[str, Any] = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 77, "projection_dim": 768, "hidden_act": "quick_gelu",
}  # fmt: skip
# OpenCLIP ViT-H's text encoder without its last layer, as SD-2 takes it.
_CLIP_H = _CLIP_L | {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
    "projection_dim": 512, "hidden_act": "gelu",
}  # fmt: skip
_VAE: dict[str, Any] = {
    "sample_size": 512, "latent_channels": 4, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 32, "scaling_factor": 0.18215,
}  # fmt: skip
_UNET_1: dict[str, Any] = {
    "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2,
    "cross_attention_dim": 768, "attention_head_dim": 8,
    "down_block_types": (_CROSS_DOWN, _CROSS_DOWN, _CROSS_DOWN, _DOWN),
    "up_block_types": (_UP, _CROSS_UP, _CROSS_UP, _CROSS_UP),
}  # fmt: skip
_UNET_2 = _UNET_1 | {
    "sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True, "upcast_attention": True,
}  # fmt: skip
# Kim et al., "BK-SDM: A Lightweight, Fast, and Cheap Version of Stable Diffusion" (ECCV 2024).
_BASE = _UNET_1 | {"layers_per_block": 1}
_SMALL = _BASE | {"mid_block_type": None}
_TINY = _SMALL | {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": (_CROSS_DOWN,) * 3, "up_block_types": (_CROSS_UP,) * 3,
}  # fmt: skip
_NOISE: dict[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "steps_offset": 1, "set_alpha_to_one": False,
}  # fmt: skip
_PNDM = ("PNDMScheduler", _NOISE | {"skip_prk_steps": True})
_V_DDIM = ("DDIMScheduler", _NOISE | {"prediction_type": "v_prediction", "clip_sample": False})

ARCHITECTURES: dict[str, Architecture] = {
    "sd-1.5": Architecture(_CLIP_L, _UNET_1, _VAE, _PNDM, 77, 859.5),
    "sd-2.1": Architecture(_CLIP_H, _UNET_2, _VAE, _V_DDIM, 77, 865.9),
    "bk-base": Architecture(_CLIP_L, _BASE, _VAE, _PNDM, 77, 579.4),
    "bk-small": Architecture(_CLIP_L, _SMALL, _VAE, _PNDM, 77, 482.3),
    "bk-tiny": Architecture(_CLIP_L, _TINY, _VAE, _PNDM, 77, 323.4),
    # SD-1.5 in little, with a block of every kind it has: for trials and tests.
    "toy": Architecture(
        {
            "vocab_size": 1024, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 24, "projection_dim": 32,
            "bos_token_id": 0, "eos_token_id": 1,
        },
        {
            "sample_size": 8, "block_out_channels": (16, 32, 32), "layers_per_block": 2, "cross_attention_dim": 32,
            "attention_head_dim": 2, "norm_num_groups": 8,
            "down_block_types": (_CROSS_DOWN, _CROSS_DOWN, _DOWN), "up_block_types": (_UP, _CROSS_UP, _CROSS_UP),
        },
        _VAE | {"sample_size": 64, "block_out_channels": (8, 8, 8, 16), "layers_per_block": 1, "norm_num_groups": 4},
        ("DDIMScheduler", {
            "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample": False,
            "steps_offset": 1,
        }),
        24,
    ),
}  # fmt: skip


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Diffusion:
    """An architecture with seeded random weights, in eval mode; the same numbers for the same seed in every dtype."""
    config = _architecture(name)
    parts = {part: _component(config, part, seed, dtype) for part in ("text_encoder", "unet", "vae")}
    return Diffusion(**parts, tokenizer=_tokenizer(config), scheduler=_scheduler(config)).eval()


def build_folder(name: str, out: Path, seed: int = 0) -> None:
    """Write `build(name, seed, float16)` as a diffusers folder with one component in memory at a time.

    Raises InputError for an unknown name, a folder that holds something else, or a full disk.
    """
    config = _architecture(name)
    with building(out) as stage:
        for part in ("text_encoder", "unet", "vae"):
            save_part(_component(config, part, seed, torch.float16), stage / part, torch.float16)
        save_rest(_tokenizer(config), _scheduler(config), Sampling(), stage)


def parameters(name: str) -> dict[str, int]:
    """The number of parameters of each component, counted without memory for them."""
    config = _architecture(name)
    return {part: sum(p.numel() for p in _empty(config, part).parameters()) for part in ("text_encoder", "unet", "vae")}


def _architecture(name: str) -> Architecture:
    if name not in ARCHITECTURES:
        raise InputError(f"architecture {name!r} is not known; known are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def _empty(config: Architecture, part: str) -> Any:
    """A component whose parameters take no memory; its buffers are real."""
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with init_empty_weights(include_buffers=False):
        if part == "text_encoder":
            return CLIPTextModel(CLIPTextConfig(**config.text))
        if part == "unet":
            return UNet2DConditionModel(**config.unet)
        return AutoencoderKL(**config.vae)


def _component(config: Architecture, part: str, seed: int, dtype: torch.dtype) -> Any:
    module = _empty(config, part)
    for path, layer in module.named_modules():
        for leaf, empty in layer.named_parameters(recurse=False):
            key = hashlib.sha256(f"{seed}/{part}/{path}.{leaf}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
            value = _drawn(layer, leaf, empty.shape, generator).to(dtype)
            setattr(layer, leaf, nn.Parameter(value))
    return module.eval()


def _drawn(layer: nn.Module, leaf: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Norms as one and zero, biases as zero, other weights normal, with the variance of torch's own initialisation."""
    if leaf == "bias":
        return torch.zeros(shape)
    if isinstance(layer, (nn.LayerNorm, nn.GroupNorm)):
        return torch.ones(shape)
    std = 0.02 if isinstance(layer, nn.Embedding) else 1 / math.sqrt(3 * math.prod(shape[1:]))
    return torch.randn(shape, generator=generator).mul_(std)


def _tokenizer(config: Architecture) -> Any:
    """The kit's own tokenizer, at the architecture's length: OpenAI's vocabulary is not at hand without a hub."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer(Path(folder))
    tokenizer.model_max_length = config.tokens
    return tokenizer


def _scheduler(config: Architecture) -> Any:
    import diffusers

    kind, options = config.scheduler
    return getattr(diffusers, kind)(**options)
