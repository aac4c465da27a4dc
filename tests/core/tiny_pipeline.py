"""A Stable Diffusion of a few thousand weights with a tokenizer of letters, for tests of folders and loading."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import torch


def save_tiny(folder: Path, cross: int = 32, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Write the pipeline as diffusers does, and return its folder; `cross` is the width of the text."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=cross,
        attention_head_dim=8,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=64,
            hidden_size=cross,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            bos_token_id=62,
            eos_token_id=63,
            pad_token_id=63,
        )
    )
    words = folder / "words"
    words.mkdir(parents=True)
    letters = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase)]
    letters += [f"{n}</w>" for n in range(10)] + ["<|startoftext|>", "<|endoftext|>"]
    (words / "vocab.json").write_text(json.dumps({letter: number for number, letter in enumerate(letters)}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    pipe = StableDiffusionPipeline(
        vae=vae.to(dtype),
        text_encoder=text.to(dtype),
        tokenizer=CLIPTokenizer.from_pretrained(words, model_max_length=16),
        unet=unet.to(dtype),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def load_pipeline(folder: Path, **options: Any) -> Any:
    """The pipeline as a user loads it, without bars."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: Any, prompt: str = "a cat") -> np.ndarray:
    """A 16x16 picture after 2 steps from a fixed seed, float (16, 16, 3) in [0, 1]."""
    noise = torch.Generator().manual_seed(7)
    made = pipe(prompt, num_inference_steps=2, height=16, width=16, output_type="np", generator=noise)
    return made.images[0]
