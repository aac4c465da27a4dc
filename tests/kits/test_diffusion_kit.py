"""The kit's batches, splits and alignment, and a whole run on a toy of the same classes with random weights."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import core.kit
import core.run
from core.figures import Figures
from core.kit import InputError
from core.report import Report
from core.run import Run
from kits.mobile_diffusion.acceptance import align, steps_of
from kits.mobile_diffusion.batches import Batches, target
from kits.mobile_diffusion.comparison import compare
from kits.mobile_diffusion.data import scenes
from kits.mobile_diffusion.data.default import Prompt, samples
from kits.mobile_diffusion.kit import MobileDiffusion
from kits.mobile_diffusion.model.architectures import build_folder
from kits.mobile_diffusion.model.pipeline import Diffusion, load_diffusion
from kits.mobile_diffusion.recipes import RECIPES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD-1.5 in little, random weights, sampled in two steps."""
    place = tmp_path_factory.mktemp("toy") / "model"
    build_folder("toy", place, seed=0)
    (place / "sampling.json").write_text(json.dumps({"steps": 2, "guidance": 1.0}))
    return place


@pytest.fixture(scope="module")
def model(folder: Path) -> Diffusion:
    return load_diffusion(folder)


def test_a_batch_is_what_the_schedule_makes_of_latents_and_noise(model: Diffusion) -> None:
    found = list(Batches(model)(samples(None, "val", "smoke", 64)[:10], 8, train=False))
    assert [len(b["latents"]) for b in found] == [8, 2]
    batch = found[0]
    signal = model.scheduler.alphas_cumprod[batch["timesteps"]][:, None, None, None]
    noisy = signal.sqrt() * batch["clean"] + (1 - signal).sqrt() * batch["noise"]
    assert torch.allclose(batch["latents"], noisy, atol=1e-6)
    # v of Salimans and Ho: from it both noise and picture come back
    clean = signal.sqrt() * batch["latents"] - (1 - signal).sqrt() * batch["target"]
    assert torch.allclose(clean, batch["clean"], atol=1e-4)
    spread = (batch["timesteps"].float() * 8 / len(model.scheduler.alphas_cumprod)).floor()
    assert spread.tolist() == list(range(8)), "a noise level in every eighth of the schedule"


def test_calibration_runs_the_decoder_too(model: Diffusion, folder: Path) -> None:
    kit = MobileDiffusion(model)
    batch = next(iter(kit.batches(samples(None, "val", "smoke", 64)[:6], 6, train=False)))
    batch["clean"] = torch.cat([batch["clean"]] * 5, dim=3)  # wider than what is decoded
    *inputs, clean = kit.calibration(batch)
    assert len(inputs) == 3 and clean.shape[:3] == (2, *batch["clean"].shape[1:3]) and clean.shape[3] == 16
    with torch.no_grad():
        prediction, picture = model(*inputs, clean)
        assert torch.equal(prediction, model(*inputs))
        wanted = model.vae.decode(clean / model.vae.config.scaling_factor).sample
    assert torch.equal(picture, wanted)


def test_batches_repeat_for_a_seed_and_training_ones_are_whole(model: Diffusion) -> None:
    made, pairs = Batches(model), samples(None, "val", "smoke", 64)[:10]
    first, again, other = (
        torch.cat([b["latents"] for b in made(pairs, 4, train=True, seed=seed)]) for seed in (1, 1, 2)
    )
    assert first.shape[0] == 8 and torch.equal(first, again) and not torch.equal(first, other)


def test_prompts_alone_make_no_batch(model: Diffusion) -> None:
    with pytest.raises(InputError, match="batches need captioned pictures"):
        next(iter(Batches(model)(samples(None, "test", "smoke", 64), 4, train=False)))


@pytest.mark.parametrize(("kind", "expected"), [("epsilon", 2.0), ("sample", 3.0), ("v_prediction", 0.6 * 2 - 0.8 * 3)])
def test_the_target_is_what_the_scheduler_predicts(kind: str, expected: float) -> None:
    from diffusers import DDIMScheduler

    clean, noise = torch.full((1, 1, 1, 1), 3.0), torch.full((1, 1, 1, 1), 2.0)
    found = target(DDIMScheduler(prediction_type=kind), clean, noise, torch.full((1, 1, 1, 1), 0.36))
    assert found.item() == pytest.approx(expected)


def test_what_is_reported_is_never_trained_on() -> None:
    reported = samples(None, "test", "full", 64)
    assert len(reported) == 600 and len({p.text for p in reported}) == 600
    assert len(samples(None, "test", "smoke", 64)) == 30
    assert {p.kind for p in reported} == set(scenes.KINDS)
    captions = {s.text for split in ("train", "val") for s in samples(None, split, "smoke", 64)}
    assert not captions & {p.text for p in reported}


def test_a_short_trial_of_a_large_model_takes_few_steps(
    model: Diffusion, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kit = MobileDiffusion(model)
    monkeypatch.setattr(sys.modules[MobileDiffusion.__module__], "LARGE", 1)
    monkeypatch.setattr(sys.modules[MobileDiffusion.__module__], "TRIAL_STEPS", 1)
    (prompt,) = kit.dataset(None, "test", "smoke")
    assert prompt.steps == 1 and len(kit.dataset(None, "test", "full")) == 4
    drawn = kit.evaluate(model, [prompt], {}, tmp_path)
    assert drawn["steps"] == 1, "also in what is written"
    assert steps_of(model, kit.dataset(None, "test", "full")) == model.sampling.steps == 2
    fixed = copy.copy(model)
    fixed.sampling = replace(model.sampling, fixed=True)
    assert steps_of(fixed, [prompt]) == 2, "its times are a table, so it cannot take fewer"
    _, tables = _fidelity_tables(kit, model, [prompt])
    trial = next(t for t in tables if t["title"].startswith("A short trial"))
    assert trial["rows"] == [["original", 1, 2], ["compressed", 1, 2]]


def _fidelity_tables(kit: MobileDiffusion, model: Diffusion, prompts: list[Prompt]) -> tuple[Figures, list[Any]]:
    class Stored:
        sha256 = "0" * 64
        chosen = "fp32-torch"

        def variant(self, name: str | None) -> Any:
            return SimpleNamespace(runtime="torch", precision="fp32")

        def size_bytes(self, name: str | None) -> int:
            return 1

    return compare(kit, model, model, prompts, Stored(), "smoke")


def test_alignment_counts_pictures_that_meet_every_demand() -> None:
    rng = np.random.default_rng(3)
    drawn = [scenes.sample_scene(rng, kind) for kind in scenes.KINDS for _ in range(4)]
    prompts = [Prompt(s.caption, i, s.kind) for i, s in enumerate(drawn)]
    shown = [scenes.draw(s) for s in drawn]
    right = align(prompts, shown)
    assert right["values"]["alignment"] == (100.0, "%") and right["counts"]["alignment"] == [24, 24]
    assert right["intervals"]["alignment"] == pytest.approx([100 * 0.025 ** (1 / 24), 100.0])
    grey = np.full((64, 64, 3), 127, np.uint8)
    half = align(prompts, [*shown[:12], *[grey] * 12])
    assert half["counts"]["alignment"] == [12, 24] and half["counts"]["alignment_prompts_single"] == [4, 4]
    assert half["values"]["alignment_prompts_relation"] == (0.0, "%")


def test_a_run_of_random_weights_ends_in_a_report(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = MobileDiffusion()
    monkeypatch.setattr(core.kit, "load", lambda name: kit)
    monkeypatch.setattr(core.run, "SECONDS", {"smoke": 0.2})
    monkeypatch.setattr(sys.modules["core.evaluation.measure"], "_memory", lambda *given: {"peak": 2.0, "before": 1.0})
    real = core.run.measure
    monkeypatch.setattr(core.run, "measure", lambda artifact, **named: real(artifact, **{**named, "seconds": 0.1}))
    out = tmp_path / "out"
    Run(kit, RECIPES["int4-nearest"], kit.default_target, None, "smoke", out, weights=folder)()
    figures = Report.load(out).figures
    assert {"alignment", "psnr", "ssim", "latent_psnr", "speedup", "size_ratio"} <= {f.name for f in figures}
    ratio, ssim = figures.find("size_ratio", kind="measured"), figures.find("ssim", kind="measured")
    assert ratio is not None and 0.1 < ratio.value < 0.6, "of the packed folder, and not of the original's"
    assert ssim is not None and 0 < ssim.value < 1
    phone = figures.find("picture_seconds")
    assert phone is not None and phone.basis.kind == "estimated"
    stored = json.loads((out / "report.json").read_text())
    verdicts = {g["name"]: g["verdict"] for g in stored["gates"]}
    assert (
        verdicts["alignment of the original"] == "FAIL" and verdicts["seconds for a picture on the phone"] == "UNPROVEN"
    )
    curve = next(t for t in stored["tables"] if t["title"] == "Error against step")
    assert [row[0] for row in curve["rows"]] == [1, 2]
