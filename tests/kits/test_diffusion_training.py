"""The default model's training: its schedule, its losses, its resume."""

from __future__ import annotations

import filecmp
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from core.kit import InputError
from kits.mobile_diffusion.data import scenes
from kits.mobile_diffusion.data.backgrounds import BACKGROUNDS
from kits.mobile_diffusion.data.scenes import RELATIONS
from kits.mobile_diffusion.data.sprites import COLOURS, SHAPES
from kits.mobile_diffusion.legs import STOP, Ramps
from kits.mobile_diffusion.model.default import LATENT_CHANNELS, TRAIN_STEPS, make_default, make_vae
from kits.mobile_diffusion.training import (
    CHROMA,
    PLANS,
    TILT,
    Latents,
    NoiseLoss,
    Plan,
    Reading,
    coloured,
    normalise,
    reconstruction_loss,
    taught,
    to_images,
    to_pixels,
    train,
    train_default,
)

TINY = Plan(
    vae=(Ramps(epochs=1, batch_size=2, lr=1e-3, up=1, down=1),),
    decoder=(Ramps(epochs=1, batch_size=2, lr=1e-3, up=1, down=1),),
    vae_steps=2,
    unet=(
        Ramps(epochs=2, batch_size=2, lr=1e-3, ema=0.5, up=1),
        Ramps(epochs=2, batch_size=2, lr=1e-3, ema=0.5, up=1, down=2),
    ),
    steps=2,
    chunk=4,
    normal=4,
    first=1,
    window=2,
    renew=1,
    show=0,
)


def test_the_rate_rises_stays_and_falls() -> None:
    schedule = Ramps(epochs=1, batch_size=1, lr=2.0, up=4, down=5)
    rates = [schedule.rate(step, 20) for step in range(20)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4:16] == [2.0] * 12
    assert rates[16:] == pytest.approx([1.6, 1.2, 0.8, 0.4])


def test_pixels_and_pictures_are_one() -> None:
    images = scenes.batch(0, 3)[0]
    assert (to_images(to_pixels(images)) == images).all()


def test_colour_counts_more_than_brightness() -> None:
    grey, red = torch.ones(1, 3, 1, 1), torch.tensor([2.0, -1.0, -1.0]).reshape(1, 3, 1, 1)
    assert coloured(grey).flatten().tolist() == [1.0, 0.0, 0.0, 0.0]
    assert coloured(red).flatten().tolist() == [0.0, 2 * CHROMA, -CHROMA, -CHROMA]


def test_normalised_latents_decode_as_before() -> None:
    torch.manual_seed(0)
    vae, pixels = make_vae().eval(), to_pixels(scenes.batch(0, 8)[0])
    with torch.no_grad():
        before = vae.encode(pixels).latent_dist
        drawn = vae.decode(before.mean).sample
        normalise(vae, pixels)
        after = vae.encode(pixels).latent_dist
        assert torch.allclose(after.mean.mean((0, 2, 3)), torch.zeros(LATENT_CHANNELS), atol=1e-4)
        assert torch.allclose(after.mean.std((0, 2, 3)), torch.ones(LATENT_CHANNELS), atol=1e-4)
        assert torch.allclose(after.std * before.mean.std((0, 2, 3))[:, None, None], before.std, rtol=1e-3)
        assert torch.allclose(vae.decode(after.mean).sample, drawn, atol=1e-3)


def test_a_perfect_prediction_of_v_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kits.mobile_diffusion.training.READ", 0.0)
    model = make_default(tmp_path)
    latents, ids = torch.zeros(8, LATENT_CHANNELS, 8, 8), model.tokens(["a red circle"] * 8)

    class Oracle(nn.Module):
        """Of latents that are 0, noise is all there is: v = sqrt(kept) noise = sqrt(kept / (1 - kept)) noisy."""

        def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
            seen.append(timesteps)
            model.encode(token_ids)
            kept = model.scheduler.alphas_cumprod[timesteps][:, None, None, None]
            return (kept / (1 - kept)).sqrt() * noisy

    seen: list[torch.Tensor] = []
    assert NoiseLoss(model)(Oracle(), (latents, ids)).item() < 1e-9
    # one noise level in each eighth of what the tilt makes of the schedule
    even = 1 - (1 - (seen[0] + 0.5) / TRAIN_STEPS) ** (1 / TILT)
    assert (even * 8).floor().tolist() == list(range(8))
    assert (seen[0] > 3 * TRAIN_STEPS // 4).sum() == 4, "half of them in the last quarter"


class TestReading:
    def test_a_caption_is_asked_for_what_it_says(self, tmp_path: Path) -> None:
        model = make_default(tmp_path)
        reading = Reading(model)
        ids = model.tokens(["two small red squares on black", "a blue cross below a green circle", ""])
        first, second, none = (reading.answers(row).tolist() for row in ids)
        red, blue, green = (COLOURS.index(c) for c in ("red", "blue", "green"))
        square, cross, circle = (SHAPES.index(s) for s in ("square", "cross", "circle"))
        assert first == [2, 1, red, square, 0, -1, -1, -1, 0, 1 + BACKGROUNDS.index("black")]
        assert second == [1, 0, blue, cross, 1, 0, green, circle, 1 + RELATIONS.index("below"), 0]
        assert none == [-1] * 10

    def test_the_encoder_learns_to_be_read(self, tmp_path: Path) -> None:
        model = make_default(tmp_path)
        reading, ids = Reading(model), model.tokens(scenes.batch(3, 16)[1])
        optimizer = torch.optim.AdamW(model.text_encoder.parameters(), lr=2e-3)
        values = []
        for _ in range(12):
            with reading:
                model.encode(ids)
            value = reading.loss(ids)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            values.append(value.item())
        assert values[-1] < 0.7 * values[0]

    def test_captions_of_another_language_are_asked_nothing(self, tmp_path: Path) -> None:
        model = make_default(tmp_path)
        reading, ids = Reading(model), model.tokens(["a cat on a mat"])
        with reading:
            model.encode(ids)
        assert reading.loss(ids).item() == 0.0


def test_losses_fall(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make_default(tmp_path)
    pixels = to_pixels(scenes.batch(0, 4)[0])
    ids = model.tokens(scenes.batch(0, 4)[1])
    noise = NoiseLoss(model)
    latents = torch.randn(4, LATENT_CHANNELS, 8, 8)

    def falls(part: nn.Module, loss: object, steps: int) -> float:
        optimizer = torch.optim.AdamW(part.parameters(), lr=2e-3)
        values = []
        for _ in range(steps):
            value = loss()  # type: ignore[operator]
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            values.append(value.item())
        return sum(values[-3:]) / sum(values[:3])

    assert falls(model.vae, lambda: reconstruction_loss(model.vae, pixels), 12) < 0.7
    model.vae = nn.Identity()
    assert falls(model, lambda: noise(model, (latents, ids)), 20) < 0.92


def test_latents_are_made_once_and_windows_move(tmp_path: Path) -> None:
    model, asked = make_default(tmp_path / "tokenizer"), []

    def source(seed: int, n: int) -> tuple:
        asked.append(seed)
        return scenes.batch(seed, n)

    for _ in range(2):
        latents = Latents(source, model.vae, model, TINY, tmp_path / "latents", resume=True)
        for epoch in range(3):
            batch, ids = next(latents.batches(epoch, TINY.unet[0]))
            assert batch.shape == (2, LATENT_CHANNELS, 8, 8) and ids.shape == (2, 24)
    assert len(asked) == len(set(asked)) == 3
    assert len(latents._chunks) == TINY.window


def test_a_killed_training_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    class Killed(Exception):  # noqa: N818
        pass

    def dies_at(call: int) -> object:
        count = iter(range(1_000))

        def source(seed: int, n: int) -> tuple:
            if next(count) == call:
                raise Killed
            return scenes.batch(seed, n)

        return source

    train(TINY, scenes.batch, tmp_path / "whole", resume=False)
    for call in (1, 5):  # within the autoencoder, and where the UNet wants its second chunk of latents
        with pytest.raises(Killed):
            train(TINY, dies_at(call), tmp_path / "broken", resume=call > 1)  # type: ignore[arg-type]
    train(TINY, scenes.batch, tmp_path / "broken", resume=True)
    for part in ("unet", "text_encoder", "vae"):
        names = [p.name for p in (tmp_path / "whole" / "model" / part).glob("*.safetensors")]
        assert names
        pair = (tmp_path / run / "model" / part / names[0] for run in ("whole", "broken"))
        assert filecmp.cmp(*pair, shallow=False), part


def test_a_leg_may_be_cut_short_and_others_follow_it(tmp_path: Path) -> None:
    long = replace(TINY, unet=(replace(TINY.unet[0], epochs=50), TINY.unet[1]))
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / STOP).touch()
    train(long, scenes.batch, tmp_path, resume=False)
    assert not (tmp_path / "training" / STOP).exists()
    constant = (tmp_path / "training" / "unet-0-constant.safetensors").read_bytes()
    train(replace(long, unet=(long.unet[0], TINY.unet[0], TINY.unet[1])), scenes.batch, tmp_path, resume=True)
    assert (tmp_path / "training" / "unet-0-constant.safetensors").read_bytes() == constant
    assert (tmp_path / "training" / "unet-2-falling.safetensors").exists()


def test_an_unknown_preset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="preset 'fast' is not known; known are full, smoke"):
        train_default(tmp_path, "fast", resume=False)


def test_training_draws_what_is_learnt_last_more_often() -> None:
    words = [set(text.split()) for text in taught(3, 300)[1]]
    sized = sum(bool(w & {"small", "little", "large", "big"}) for w in words) / 300
    evenly = [set(text.split()) for text in scenes.batch(3, 300)[1]]
    assert sized > 1.2 * sum(bool(w & {"small", "little", "large", "big"}) for w in evenly) / 300
    first, second = taught(5, 4), taught(5, 4)
    assert np.array_equal(first[0], second[0]) and first[1] == second[1]


def test_the_full_plan_falls_to_nothing_at_its_end() -> None:
    last = PLANS["full"].unet[-1]
    total = last.epochs * PLANS["full"].steps
    assert last.down == total and last.rate(total, total) == 0.0
