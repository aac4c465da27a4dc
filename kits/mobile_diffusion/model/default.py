"""The embedded default: Stable Diffusion's architecture, small enough to train on two processor cores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from kits.mobile_diffusion.data.scenes import SIZE
from kits.mobile_diffusion.data.tokenizer import MAX_LENGTH, make_tokenizer
from kits.mobile_diffusion.model.pipeline import Diffusion, Sampling

LATENT_CHANNELS = 8
LATENT_SIZE = SIZE // 8
TEXT_WIDTH = 192
TRAIN_STEPS = 1000
"""Noise levels of the schedule."""
SAMPLING = Sampling(25, 3.0)

# No attention in the middle: the autoencoder stays local, so that pictures of any size go through in tiles.
# Thin at full resolution, where nearly all of the time goes.
VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 32, 64, 96),
    "layers_per_block": 1,
    "latent_channels": LATENT_CHANNELS,
    "norm_num_groups": 2,
    "sample_size": SIZE,
    "mid_block_add_attention": False,
    "force_upcast": False,
}

# Eleven transformer layers with cross-attention in two levels, laid out as in SD-1.5: two a block going down, one in
# the middle, three a block going up.
UNET: dict[str, Any] = {
    "sample_size": LATENT_SIZE,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    "block_out_channels": (64, 128),
    "layers_per_block": 2,
    "attention_head_dim": 4,
    "cross_attention_dim": TEXT_WIDTH,
    "norm_num_groups": 16,
}

TEXT: dict[str, Any] = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_LENGTH,
    "projection_dim": TEXT_WIDTH,
}

SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": TRAIN_STEPS,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",  # the first step starts from pure noise, as the schedule's last one is
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,  # what Stable Diffusion pipelines expect; "trailing" does not use it
}


def make_vae() -> Any:
    """The autoencoder of 64x64 pictures and 8x8 latents, with random weights and a `scaling_factor` of 1.

    Without residual branches at the start, with orthogonal kernels, and with little noise on the latents: after
    diffusers' own start all channels carry brightness and colour comes through only after thousands of steps.
    """
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL(**VAE, scaling_factor=1.0)
    with torch.no_grad():
        for name, module in vae.named_modules():
            if isinstance(module, nn.Conv2d):
                nn.init.orthogonal_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
                # spread over the kernel's places; neighbouring pixels are alike, so their responses add up
                module.weight /= module.kernel_size[0]
                if name.endswith(".conv2"):
                    nn.init.zeros_(module.weight)
        vae.quant_conv.bias[LATENT_CHANNELS:] = -6.0
    return vae


def make_scheduler() -> Any:
    """DDIM on the cosine schedule that the UNet is trained with, predicting v."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(**SCHEDULER)


def make_default(folder: Path, seed: int = 0) -> Diffusion:
    """The whole model with seeded random weights; the tokenizer's files are written into `folder`."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    tokenizer = make_tokenizer(folder)
    text = CLIPTextConfig(
        **TEXT,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    parts = CLIPTextModel(text), UNet2DConditionModel(**UNET), make_vae()
    return Diffusion(*parts, tokenizer, make_scheduler(), SAMPLING)
