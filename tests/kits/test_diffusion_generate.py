"""Pictures through diffusers' own pipeline: the same for a seed, refused in one line where they cannot be."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from core.evaluation.guard import ActivationError
from core.kit import InputError
from kits.mobile_diffusion.generate import (
    Way,
    bar_steps,
    check_prompts,
    check_seeds,
    check_size,
    check_steps,
    generate,
    prepare,
    sample,
)
from kits.mobile_diffusion.model.architectures import build
from kits.mobile_diffusion.model.pipeline import Diffusion

PROMPTS = ["a red circle left of a blue square", "a green triangle", "three yellow circles"]
SEEDS = [3, 7, 7]


@pytest.fixture(scope="module")
def model() -> Diffusion:
    return build("toy")


@pytest.fixture(scope="module")
def drawn(model: Diffusion) -> list[np.ndarray]:
    return generate(model, PROMPTS, seeds=SEEDS, steps=4, guidance=4.0)


def apart(a: list[np.ndarray], b: list[np.ndarray]) -> int:
    return max(int(np.abs(x.astype(int) - y).max()) for x, y in zip(a, b, strict=True))


def test_pictures_are_those_of_diffusers(model: Diffusion, drawn: list[np.ndarray]) -> None:
    pipeline = model.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    noise = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    theirs = pipeline(PROMPTS, num_inference_steps=4, guidance_scale=4.0, generator=noise, output_type="pil").images
    assert [p.shape for p in drawn] == [(64, 64, 3)] * 3
    assert all(p.dtype == np.uint8 for p in drawn)
    assert apart(drawn, [np.asarray(picture) for picture in theirs]) <= 1


def test_a_seed_gives_one_picture_whatever_the_batch(model: Diffusion, drawn: list[np.ndarray]) -> None:
    alone = [generate(model, [p], seeds=s, steps=4, guidance=4.0)[0] for p, s in zip(PROMPTS, SEEDS)]
    assert apart(drawn, alone) <= 1
    again = generate(model, PROMPTS, seeds=SEEDS, steps=4, guidance=4.0)
    assert apart(drawn, again) == 0
    other = generate(model, PROMPTS[:1], seeds=4, steps=4, guidance=4.0)
    assert apart(drawn[:1], other) > 10


def test_row_by_row_is_exact_whatever_the_batch(model: Diffusion, drawn: list[np.ndarray]) -> None:
    one = Way(rows=1)
    together = generate(model, PROMPTS, seeds=SEEDS, steps=4, guidance=4.0, way=one)
    in_twos = generate(model, PROMPTS, seeds=SEEDS, steps=4, guidance=4.0, way=one, batch=2)
    assert apart(together, in_twos) == 0
    assert apart(together, drawn) <= 1
    assert "forward" not in vars(model.unet)


def test_lean_ways_give_the_same_picture(model: Diffusion, drawn: list[np.ndarray]) -> None:
    lean = Way(rows=2, slices=2000, release=True)
    prepare(model, lean)
    assert apart(generate(model, PROMPTS, seeds=SEEDS, steps=4, guidance=4.0, way=lean), drawn) <= 1


def test_tiles_are_another_picture_of_the_same_size(model: Diffusion) -> None:
    """With random weights the parts differ, since norms see a tile only; outside the context nothing is left."""
    latents = sample(model, PROMPTS[:1], seeds=1, steps=2, guidance=1.0).denoised
    tiled = sample(model, PROMPTS[:1], seeds=1, steps=2, guidance=1.0, way=Way(tile=4))
    assert torch.equal(latents, tiled.denoised)
    assert tiled.pictures[0].shape == (64, 64, 3)
    assert not model.vae.use_tiling


def test_latents_of_every_step(model: Diffusion) -> None:
    kept = sample(model, PROMPTS, seeds=SEEDS, steps=3, guidance=4.0, batch=2, keep_latents=True)
    assert kept.latents is not None and kept.latents.shape == (3, 3, 4, 8, 8)
    assert torch.equal(kept.latents[-1], kept.denoised)
    assert sample(model, PROMPTS[:1], steps=1, guidance=1.0).latents is None


def test_progress_by_step(model: Diffusion) -> None:
    seen: list[tuple[int, int]] = []
    generate(model, PROMPTS, steps=2, guidance=1.0, batch=2, on_step=lambda step, n: seen.append((step, n)))
    assert seen == [(1, 2), (2, 2), (1, 1), (2, 1)]
    assert len(seen) == bar_steps(model, 3, 2, 2)


def test_sizes(model: Diffusion) -> None:
    assert generate(model, PROMPTS[:1], steps=1, guidance=1.0, size=(64, 96))[0].shape == (64, 96, 3)
    assert check_size(model, None) == (64, 64)
    assert check_size(model, 128) == (128, 128)


@pytest.mark.parametrize(("size", "nearest"), [(100, 96), (0, 32), (-64, 32), (5000, 4096), ((64, 70), 64)])
def test_odd_sizes_name_the_nearest(model: Diffusion, size: int | tuple[int, int], nearest: int) -> None:
    with pytest.raises(InputError, match=rf"multiple of 32 from 32 to 4096.*the nearest is {nearest}$"):
        check_size(model, size)


@pytest.fixture
def broken(model: Diffusion) -> Iterator[Diffusion]:
    weight = model.unet.conv_out.weight.data
    before = weight[0].clone()
    weight[0] = float("nan")
    yield model
    weight[0] = before


def test_the_guard_names_layer_and_step(broken: Diffusion) -> None:
    with pytest.raises(ActivationError, match=r"unet\.conv_out \(Conv2d\), step 1: NaN in 64 of 256"):
        generate(broken, PROMPTS[:1], steps=3, guidance=1.0)
    generate(broken, PROMPTS[:1], steps=1, guidance=1.0, watch=False)


def test_bad_input(model: Diffusion) -> None:
    for bad in ([], ["a circle", "  "], ["\n"]):
        with pytest.raises(InputError, match="prompt"):
            check_prompts(model, bad)
    for steps in (0, -3, 1001):
        with pytest.raises(InputError, match="expected 1 to 1000"):
            check_steps(model, steps)
    for seed in (-1, 2**63):
        with pytest.raises(InputError, match="from 0 to"):
            check_seeds(seed, 2)
    with pytest.raises(InputError, match="1 seeds for 2"):
        check_seeds([1], 2)
    for guidance in (-1.0, float("nan"), 1000.0):
        with pytest.raises(InputError, match="guidance"):
            generate(model, PROMPTS[:1], steps=1, guidance=guidance)
    with pytest.raises(InputError, match="batch 0"):
        generate(model, PROMPTS[:1], steps=1, guidance=1.0, batch=0)


def test_what_is_cut_and_what_is_unknown_is_said(model: Diffusion) -> None:
    assert check_prompts(model, PROMPTS) == []
    long = "a red circle and " * 8 + "a blue square"
    (cut,) = check_prompts(model, [long])
    assert "has 37 tokens of at most 24" in cut and "a blue square" in cut
    (unknown,) = check_prompts(model, ["a red elephant, a red zebra"])
    assert "'elephant', 'zebra'" in unknown
    with pytest.warns(UserWarning, match="not seen is"):
        generate(model, [long], steps=1, guidance=1.0)
