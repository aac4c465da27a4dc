"""Time embeddings as a table: the same predictions at its timesteps, fewer parameters, plain diffusers folders."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from diffusers import UNet2DConditionModel

from core.compress import compress, history, replay
from core.kit import InputError, Kit, Recipe
from core.pruning.bypass import bypass
from core.weights import load_stored, stored
from kits.mobile_diffusion.generate import check_steps, generate
from kits.mobile_diffusion.model.architectures import build
from kits.mobile_diffusion.model.pipeline import Diffusion, Sampling, load_diffusion, save_diffusion
from kits.mobile_diffusion.times import FixTimes, table

KIT = cast(Kit, SimpleNamespace(name="toy"))
RECIPE = Recipe("times", (FixTimes(),), "seconds", "a table")


@pytest.fixture(scope="module")
def model() -> Diffusion:
    model = build("toy")
    model.sampling = Sampling(4, 1.0)
    return model


@pytest.fixture(scope="module")
def fixed(model: Diffusion) -> Diffusion:
    small, _ = compress(model, RECIPE, KIT)
    assert isinstance(small, Diffusion)
    return small


def inputs(model: Diffusion, timestep: int) -> tuple[Any, ...]:
    draws = torch.Generator().manual_seed(timestep)
    side = model.unet.config.sample_size
    latents = torch.randn(2, model.unet.config.in_channels, side, side, generator=draws)
    text = torch.randn(2, 7, model.unet.config.cross_attention_dim, generator=draws)
    return latents, torch.full((2,), timestep), text


@torch.no_grad()
def test_predictions_at_the_timesteps_of_the_table_are_the_same(model: Diffusion, fixed: Diffusion) -> None:
    model.scheduler.set_timesteps(model.sampling.steps)
    for timestep in model.scheduler.timesteps.tolist():
        before, after = (m.predict(*inputs(model, timestep)) for m in (model, fixed))
        assert (before - after).abs().max() < 1e-4 * before.abs().max()


@torch.no_grad()
def test_predictions_elsewhere_are_not(model: Diffusion, fixed: Diffusion) -> None:
    model.scheduler.set_timesteps(model.sampling.steps)
    first, second = model.scheduler.timesteps.tolist()[:2]
    between = (first + second) // 2
    before, after = (m.predict(*inputs(model, between)) for m in (model, fixed))
    assert (before - after).abs().max() > 1e-3 * before.abs().max()


def test_there_are_fewer_parameters_and_the_original_is_untouched(model: Diffusion, fixed: Diffusion) -> None:
    count = [sum(p.numel() for p in m.unet.parameters()) for m in (model, fixed)]
    assert count[1] < count[0]
    assert model.unet.config.time_embedding_dim is None and not model.sampling.fixed


def test_another_number_of_steps_is_refused(fixed: Diffusion) -> None:
    assert check_steps(fixed, fixed.sampling.steps) == fixed.sampling.steps
    with pytest.raises(InputError, match=f"use --steps {fixed.sampling.steps}"):
        check_steps(fixed, 3)


def test_a_saved_folder_loads_with_plain_diffusers_and_draws_the_same(fixed: Diffusion, tmp_path: Path) -> None:
    save_diffusion(fixed, tmp_path / "folder", torch.float32)
    again = load_diffusion(tmp_path / "folder")
    assert again.sampling == fixed.sampling
    first, second = (generate(m, ["a red circle"], seeds=1, watch=False)[0] for m in (fixed, again))
    assert (first == second).all()
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "folder" / "unet", local_files_only=True)
    assert unet.config.time_embedding_dim == fixed.sampling.steps


def test_fp16_weights_still_tell_the_timesteps_apart(model: Diffusion, fixed: Diffusion) -> None:
    rounded = copy.deepcopy(fixed)
    for parameter in rounded.unet.parameters():
        parameter.data = parameter.data.half().float()
    plain = copy.deepcopy(model)
    for parameter in plain.unet.parameters():
        parameter.data = parameter.data.half().float()
    model.scheduler.set_timesteps(model.sampling.steps)
    timestep = int(model.scheduler.timesteps[1])
    with torch.no_grad():
        before, after = (m.predict(*inputs(model, timestep)) for m in (plain, rounded))
    assert (before - after).abs().max() < 2e-2 * before.abs().max()


def test_a_checkpoint_is_replayed(model: Diffusion, fixed: Diffusion, tmp_path: Path) -> None:
    small, _ = compress(model, RECIPE, KIT, folder=tmp_path)
    again = replay(copy.deepcopy(model), history(tmp_path))
    load_stored(again, stored(small), "again")
    with torch.no_grad():
        first, second = (m.predict(*inputs(model, 999)) for m in (small, again))
    assert torch.equal(first, second)


def test_removed_blocks_stay_removed(model: Diffusion) -> None:
    less = copy.deepcopy(model)
    bypass(less.unet, ["down_blocks.0.attentions.0"])
    small, _ = compress(less, RECIPE, KIT)
    assert type(small.get_submodule("unet.down_blocks.0.attentions.0")).__name__ != "Transformer2DModel"


def test_what_cannot_be_a_table_is_refused(model: Diffusion) -> None:
    with pytest.raises(InputError, match="too near one another"):
        table(model.unet, torch.tensor([500, 500]))
    guided = build("toy")
    guided.unet.register_to_config(time_cond_proj_dim=32)
    with pytest.raises(InputError, match="time_cond_proj_dim"):
        table(guided.unet, torch.tensor([999, 499]))
