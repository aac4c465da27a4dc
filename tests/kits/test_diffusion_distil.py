"""Distillation of a smaller UNet and of fewer steps, on a toy: closed forms, falling losses, resume to the byte."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from core.kit import Context, InputError, Kit
from core.weights import stored
from kits.mobile_diffusion.blocks import student_of
from kits.mobile_diffusion.distil import (
    DistilSteps,
    DistilStudent,
    StudentLoss,
    alphas,
    coefficients,
    distil_steps,
    distil_student,
    feature_loss,
    few_steps,
    stage_pairs,
    trailing,
    trajectory,
)
from kits.mobile_diffusion.model.architectures import build
from kits.mobile_diffusion.model.pipeline import Diffusion, Sampling


def batches(samples: Any, batch_size: int, *, train: bool, seed: int = 0) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    levels = DDIMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    for _ in range(len(samples) // batch_size):
        clean = torch.ones(batch_size, 4, 8, 8) * torch.randn(batch_size, 4, 1, 1, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(0, 1000, (batch_size,), generator=generator)
        kept = levels[timesteps][:, None, None, None]
        yield {
            "latents": kept.sqrt() * clean + (1 - kept).sqrt() * noise,
            "target": kept.sqrt() * noise - (1 - kept).sqrt() * clean,
            "timesteps": timesteps,
            "token_ids": torch.randint(2, 600, (batch_size, 24), generator=generator),
            "clean": clean,
            "noise": noise,
        }


KIT = cast(Kit, SimpleNamespace(name="toy", dataset=lambda data, split, preset: range(16), batches=batches))


@pytest.fixture(scope="module")
def teacher() -> Diffusion:
    return build("toy")


def student(teacher: Diffusion, pattern: str = "base") -> Diffusion:
    model = copy.deepcopy(teacher)
    model.unet = student_of(model.unet, pattern)
    return model


class KilledError(Exception):
    """Stands for a kill at the end of an epoch."""


class TestClosedForms:
    @pytest.mark.parametrize("kind", ["v_prediction", "epsilon", "sample"])
    def test_a_step_is_that_of_diffusers(self, kind: str) -> None:
        scheduler = DDIMScheduler(
            beta_schedule="squaredcos_cap_v2", prediction_type=kind, clip_sample=False, timestep_spacing="trailing"
        )
        scheduler.set_timesteps(4)
        times = trailing(1000, 4)
        assert scheduler.timesteps.tolist() == times == [999, 749, 499, 249]
        levels = alphas(scheduler, times)
        for index, time in enumerate(times[1:], 1):
            z, p = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
            a, b = coefficients(kind, levels[index], levels[index + 1])
            assert torch.allclose(float(a) * z + float(b) * p, scheduler.step(p, time, z).prev_sample, atol=1e-4)

    def test_a_trajectory_is_the_pipelines(self, teacher: Diffusion) -> None:
        model = few_steps(copy.deepcopy(teacher), 4)
        noise = torch.randn(2, 4, 8, 8)
        prompts = ["a red circle", "two blue squares"]
        states = trajectory(model, noise, model.tokens(prompts), 2, 2, 3.0)
        pipeline = model.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        wanted = pipeline(
            prompts, num_inference_steps=4, guidance_scale=3.0, latents=noise, output_type="latent"
        ).images
        assert states.shape == (3, 2, 4, 8, 8)
        assert torch.equal(states[0], noise)
        assert torch.allclose(states[-1], wanted, atol=1e-4)

    def test_feature_loss_is_relative_and_leaves_out_other_shapes(self) -> None:
        ones = torch.ones(1, 2, 3, 3)
        assert feature_loss([ones, ones], [10 * ones, 2 * ones]).item() == pytest.approx((0.81 + 0.25) / 2)
        assert feature_loss([ones, ones], [2 * ones, ones[..., :2]]).item() == pytest.approx(0.25)

    def test_stages_are_paired_from_the_outside(self, teacher: Diffusion) -> None:
        tiny = student(teacher, "tiny").unet
        assert stage_pairs(tiny, teacher.unet) == [
            ("down_blocks.0", "down_blocks.0"), ("down_blocks.1", "down_blocks.1"),
            ("up_blocks.0", "up_blocks.1"), ("up_blocks.1", "up_blocks.2"),
        ]  # fmt: skip
        assert ("mid_block", "mid_block") in stage_pairs(student(teacher).unet, teacher.unet)

    def test_the_teacher_is_its_own_perfect_student(self, teacher: Diffusion) -> None:
        batch = next(batches(range(4), 4, train=True))
        loss = StudentLoss(teacher, teacher.unet, DistilStudent(1, 1e-3, task=0))(teacher.unet, batch)
        assert loss.item() < 1e-6  # the answers are kept in FP16

    def test_answers_are_asked_for_once_a_key(self, teacher: Diffusion) -> None:
        asked = 0

        def note(*_: Any) -> None:
            nonlocal asked
            asked += 1

        small = student(teacher).unet
        loss = StudentLoss(teacher, small, DistilStudent(1, 1e-3, repeat=1))
        batch = {**next(batches(range(4), 4, train=True)), "key": (0, 0)}
        hook = teacher.unet.register_forward_hook(note)
        first, second = loss(small, batch), loss(small, batch)
        hook.remove()
        assert asked == 1 and torch.equal(first, second)


class TestSteps:
    @pytest.mark.parametrize("repeat", [0, 2])
    def test_a_student_comes_nearer_to_its_teacher(self, repeat: int, teacher: Diffusion) -> None:
        step = DistilStudent(epochs=8, lr=3e-3, batch_size=8, task=0.0, ema=0.0, repeat=repeat)
        before = copy.deepcopy(stored(teacher))
        outcome = distil_student(student(teacher), step, Context(KIT, teacher))
        first, last = outcome.changed[0]["error"]
        assert last < 0.7 * first
        assert outcome.changed[0]["loss"][1] < 0.7 * outcome.changed[0]["loss"][0]
        assert all(torch.equal(v, before[k]) for k, v in stored(teacher).items())

    def test_few_steps_learn_from_many(self, teacher: Diffusion) -> None:
        step = DistilSteps(epochs=8, lr=2e-3, substeps=2, guidance=3.0, trajectories=8, batch_size=8, ema=0.0)
        outcome = distil_steps(copy.deepcopy(teacher), step, Context(KIT, teacher))
        model = cast(Diffusion, outcome.model)
        assert outcome.changed[0]["loss"][1] < 0.7 * outcome.changed[0]["loss"][0]
        assert model.sampling == Sampling(4, 1.0)
        model.scheduler.set_timesteps(4)
        assert model.scheduler.timesteps.tolist() == [999, 749, 499, 249]

    @pytest.mark.parametrize("kind", ["student", "steps"])
    def test_resume_gives_the_same_bytes(
        self, kind: str, teacher: Diffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from core import train
        from kits.mobile_diffusion import distil

        step: Any
        if kind == "student":
            step = DistilStudent(epochs=3, lr=1e-3, batch_size=8, ema=0.9, repeat=2)
        else:
            step = DistilSteps(epochs=3, lr=1e-3, substeps=1, trajectories=8, batch_size=8, ema=0.9)
        run: Any = distil_student if kind == "student" else distil_steps

        def state(folder: Path, resume: bool) -> dict[str, Tensor]:
            outcome = run(student(teacher), step, Context(KIT, teacher, folder=folder, resume=resume))
            return stored(outcome.model)

        whole = state(tmp_path / "whole", False)

        def killed(*args: Any, **options: Any) -> Any:
            def stop(epoch: int, model: nn.Module) -> None:
                if epoch == 1:
                    raise KilledError

            return train.fit(*args, **options, on_epoch=stop)

        with monkeypatch.context() as patch, pytest.raises(KilledError):
            patch.setattr(distil, "fit", killed)
            state(tmp_path / "cut", False)
        if kind == "steps":  # the paths that are there are not computed anew
            assert len(list((tmp_path / "cut" / "trajectories").glob("*.safetensors"))) == 2
            monkeypatch.setattr(distil, "trajectory", _only_few(distil.trajectory))
        again = state(tmp_path / "cut", True)
        assert all(torch.equal(v, whole[k]) for k, v in again.items())

    def test_steps_that_do_not_divide_the_schedule_are_refused(self, teacher: Diffusion) -> None:
        with pytest.raises(InputError, match=r"DistilSteps.steps: 3 does not divide the schedule's 1000 timesteps"):
            few_steps(copy.deepcopy(teacher), 3)

    @pytest.mark.parametrize(
        "wrong",
        [
            lambda: DistilStudent(0, 1e-3),
            lambda: DistilStudent(1, 1e-3, task=0, output=0, feature=0),
            lambda: DistilSteps(1, 1e-3, trajectories=8),
            lambda: DistilSteps(1, -1.0),
        ],
        ids=["epochs", "weights", "trajectories", "lr"],
    )
    def test_wrong_fields_are_refused(self, wrong: Any) -> None:
        with pytest.raises(InputError, match=r"^Distil\w+\.\w+: .*, expected "):
            wrong()


def _only_few(whole: Any) -> Any:
    """`trajectory` for the few steps of a check, and not for those of a teacher."""

    def few(model: Diffusion, noise: Tensor, ids: Tensor, steps: int, substeps: int, guidance: float) -> Tensor:
        assert guidance == 1.0, "a path that is stored was computed again"
        return whole(model, noise, ids, steps, substeps, guidance)

    return few
