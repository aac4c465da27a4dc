"""Distillation: a smaller UNet learns from the original, and four steps learn from its many.

`DistilStudent` follows Kim et al., "BK-SDM" (ECCV 2024): the task's loss, the teacher's output, and its features at
the ends of the stages. `DistilSteps` teaches one step the whole stretch of the teacher's guided path that it is to
cover, in the manner of Salimans and Ho, "Progressive Distillation" (ICLR 2022) but in one stage: the path of a
deterministic sampler is a function of its noise, so a few stretches can be learnt by plain regression, with guidance
folded in. The teacher's paths start from pure noise, as the sampler does, and are computed once and kept: on a
processor the teacher's 2 x steps forwards for a path are what costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from core.compress import Outcome, handles
from core.distillation.feature import captured
from core.files import replaced
from core.kit import Context, InputError, Step
from core.progress import progress
from core.train import Schedule, fit
from kits.mobile_diffusion.blocks import diffusion, predictions, relative_error
from kits.mobile_diffusion.model.pipeline import Diffusion, Sampling, unet_prediction
from kits.mobile_diffusion.training import low_precision


@dataclass(frozen=True)
class DistilStudent(Step):
    """Train the UNet on task * task loss + output * MSE to the teacher's prediction + feature * feature loss.

    The teacher is the uncompressed model. The feature loss is the mean over the stages of the squared error
    relative to the teacher's mean square, so that no stage outweighs the others. With `repeat` R the noise of epoch
    e is that of epoch e mod R, and the teacher's answers are kept in memory (FP16) instead of asked for again;
    0: new noise always.
    """

    epochs: int
    lr: float
    batch_size: int = 64
    task: float = 1.0
    output: float = 1.0
    feature: float = 1.0
    ema: float = 0.999
    repeat: int = 0

    def __post_init__(self) -> None:
        weights = (self.task, self.output, self.feature)
        _check(
            self,
            ("task", min(weights) >= 0 and sum(weights) > 0, "weights from 0, one of the three above it"),
            ("repeat", self.repeat >= 0, "0 or more"),
        )


@dataclass(frozen=True)
class DistilSteps(Step):
    """Train the UNet so that `steps` steps without guidance do what the uncompressed model does in many with it.

    The teacher takes `steps` * `substeps` DDIM steps with a guidance scale of `guidance` (0: its own), from
    `trajectories` noises with captions of the training split. The model comes out with a "trailing" DDIM scheduler and
    `Sampling(steps, 1.0)`: one forward a step. `steps` must divide the schedule's number of timesteps.
    """

    epochs: int
    lr: float
    steps: int = 4
    substeps: int = 6
    guidance: float = 0.0
    trajectories: int = 8192
    batch_size: int = 64
    ema: float = 0.999

    def __post_init__(self) -> None:
        _check(
            self,
            ("steps", self.steps >= 1, "1 or more"),
            ("substeps", self.substeps >= 1, "1 or more"),
            ("guidance", self.guidance == 0 or self.guidance >= 1, "1 or more, or 0 for the original's own"),
            ("trajectories", self.trajectories >= self.batch_size, "batch_size or more"),
        )


def _check(step: DistilStudent | DistilSteps, *own: tuple[str, bool, str]) -> None:
    rules = (
        ("epochs", step.epochs >= 1, "1 or more"),
        ("lr", step.lr > 0, "more than 0"),
        ("batch_size", step.batch_size >= 1, "1 or more"),
        ("ema", 0 <= step.ema < 1, "0 or more and less than 1"),
        *own,
    )
    for name, good, expected in rules:
        if not good:
            raise InputError(f"{type(step).__name__}.{name}: {getattr(step, name)!r}, expected {expected}")


def stage_pairs(student: Any, teacher: Any) -> list[tuple[str, str]]:
    """The stages of a student's UNet with those of its teacher's; up stages are counted from the outermost."""
    down, up = min(len(student.down_blocks), len(teacher.down_blocks)), len(student.up_blocks)
    ahead = len(teacher.up_blocks) - up
    pairs = [(f"down_blocks.{i}", f"down_blocks.{i}") for i in range(down)]
    if student.mid_block is not None and teacher.mid_block is not None:
        pairs.append(("mid_block", "mid_block"))
    return pairs + [(f"up_blocks.{i}", f"up_blocks.{i + ahead}") for i in range(max(0, -ahead), up)]


def feature_loss(student: Iterable[Tensor], teacher: Iterable[Tensor]) -> Tensor:
    """Mean over the stages of mean((s - t)^2) / mean(t^2), a scalar; features of unequal shapes are left out."""
    pairs = [(s.float(), t.float()) for s, t in zip(student, teacher, strict=True) if s.shape == t.shape]
    terms = [F.mse_loss(s, t) / t.square().mean().clamp_min(1e-12) for s, t in pairs]
    return torch.stack(terms).mean() if terms else torch.zeros(())


class StudentLoss:
    """The loss of a student's UNet on batches of "latents", "timesteps", "token_ids" and "target" (and "key").

    A batch with a "key" finds the teacher's answers where another with the same one has left them.
    """

    def __init__(self, teacher: Diffusion, student: Any, step: DistilStudent) -> None:
        self._teacher, self._student, self._step = teacher, student, step
        pairs = stage_pairs(student, teacher.unet) if step.feature else []
        self._ours, self._theirs = [s for s, _ in pairs], [t for _, t in pairs]
        self._kept: dict[Any, list[Tensor]] = {}

    def __call__(self, net: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """A scalar; `net` is the student's UNet."""
        step, latents, timesteps = self._step, batch["latents"], batch["timesteps"]
        guidance = self._teacher.sampling.guidance
        with torch.no_grad(), low_precision(latents):
            text = self._teacher.encode(batch["token_ids"])
        with low_precision(latents), captured(self._student, self._ours) as features:
            found = unet_prediction(net, latents, timesteps, text, guidance).float()
        loss = step.task * F.mse_loss(found, batch["target"]) if step.task else found.new_zeros(())
        if step.output or step.feature:
            told, *theirs = self._answers(batch, text)
            loss = loss + step.output * F.mse_loss(found, told)
            if step.feature:
                loss = loss + step.feature * feature_loss([features[name] for name in self._ours], theirs)
        return loss

    @torch.no_grad()
    def _answers(self, batch: Mapping[str, Any], text: Tensor) -> list[Tensor]:
        """The teacher's prediction, then its features."""
        kept = self._kept.get(batch.get("key"))
        if kept is None:
            latents, teacher = batch["latents"], self._teacher
            with low_precision(latents), captured(teacher.unet, self._theirs) as features:
                told = unet_prediction(teacher.unet, latents, batch["timesteps"], text, teacher.sampling.guidance)
            kept = [told.half(), *(features[name].half() for name in self._theirs)]
            if "key" in batch:
                self._kept[batch["key"]] = kept
        return [answer.float() for answer in kept]


@handles(DistilStudent)
def distil_student(model: nn.Module, step: DistilStudent, context: Context) -> Outcome:
    """Train the model's UNet against the original's; its modules stay what they are."""
    model, teacher = diffusion(model, step), diffusion(context.original, step).eval()
    samples = context.kit.dataset(context.data, "train", context.preset)
    seen = _batches(context, "val", step.batch_size)
    expected = predictions(teacher, seen)
    before = relative_error(predictions(model, seen), expected)

    def batches(epoch: int) -> Iterator[dict[str, Any]]:
        drawn = epoch % step.repeat if step.repeat else epoch
        found = context.kit.batches(samples, step.batch_size, train=True, seed=context.seed + drawn)
        for index, batch in enumerate(found):
            yield {**batch, "key": (drawn, index)} if step.repeat else dict(batch)

    loss = StudentLoss(teacher, model.unet, step)
    history = _fit(model, batches, loss, step, context, math.ceil(len(samples) / step.batch_size), "student")
    after = relative_error(predictions(model, seen), expected)
    what = f"distilled for {step.epochs} epochs: error against the teacher {before:.4f} -> {after:.4f}"
    numbers = {"error": [before, after], "loss": [history[0]["loss"], history[-1]["loss"]]}
    return Outcome(model, [{"layer": "unet", "what": what, **numbers}])


def coefficients(kind: str, now: Tensor, then: Tensor) -> tuple[Tensor, Tensor]:
    """(A, B) of a DDIM step z' = A z + B p for the UNet's prediction p of a kind.

    `now` and `then` are the cumulative alphas before and after (1: a clean latent). Kinds are "v_prediction",
    "epsilon" and "sample" (Song et al., "Denoising Diffusion Implicit Models", 2021, eq. 12 with eta 0).
    """
    keep, noise, keep_then, noise_then = now.sqrt(), (1 - now).sqrt(), then.sqrt(), (1 - then).sqrt()
    if kind == "v_prediction":
        return keep * keep_then + noise * noise_then, keep * noise_then - noise * keep_then
    if kind == "epsilon":
        return keep_then / keep, noise_then - noise * keep_then / keep
    if kind == "sample":
        return noise_then / noise, keep_then - keep * noise_then / noise
    raise InputError(f"DistilSteps: prediction_type {kind!r}, expected v_prediction, epsilon or sample")


def trailing(total: int, steps: int) -> list[int]:
    """The timesteps of a sampler that ends at a clean latent and starts at the last timestep ("trailing")."""
    return [round(total - k * total / steps) - 1 for k in range(steps)]


def alphas(scheduler: Any, timesteps: list[int]) -> Tensor:
    """The cumulative alphas at timesteps, in float64, and 1 after the last of them."""
    return torch.cat([scheduler.alphas_cumprod.double()[timesteps], torch.ones(1, dtype=torch.float64)])


@torch.no_grad()
def trajectory(model: Diffusion, noise: Tensor, ids: Tensor, steps: int, substeps: int, guidance: float) -> Tensor:
    """The states (steps + 1, N, C, h, w) of guided DDIM in steps * substeps steps, from noise (N, C, h, w) to clean."""
    config = model.scheduler.config
    times = trailing(config.num_train_timesteps, steps * substeps)
    levels = alphas(model.scheduler, times)
    told = model.encode(ids)
    untold = model.encode(model.tokens([""]).to(ids.device)).expand_as(told)
    text = torch.cat([untold, told]) if guidance != 1 else told
    state, states = noise, [noise]
    for index, time in enumerate(times):
        both = torch.cat([state, state]) if guidance != 1 else state
        found = model.predict(both, torch.full((len(both),), time, device=noise.device), text).float()
        if guidance != 1:
            without, given = found.chunk(2)
            found = without + guidance * (given - without)
        scale, shift = coefficients(config.prediction_type, levels[index], levels[index + 1])
        state = float(scale) * state + float(shift) * found
        if (index + 1) % substeps == 0:
            states.append(state)
    return torch.stack(states)


@handles(DistilSteps, lambda model, step, structure: few_steps(diffusion(model, step), step.steps))
def distil_steps(model: nn.Module, step: DistilSteps, context: Context) -> Outcome:
    """Train the model's UNet on the original's guided paths, and give it the scheduler that takes few steps."""
    model, teacher = diffusion(model, step), diffusion(context.original, step).eval()
    few_steps(model, step.steps)
    guidance = step.guidance or teacher.sampling.guidance
    states, ids = _paths(teacher, step, guidance, context)
    times = torch.tensor(trailing(model.scheduler.config.num_train_timesteps, step.steps))
    levels = alphas(model.scheduler, times.tolist())
    scale, shift = (c.float() for c in coefficients(model.scheduler.config.prediction_type, levels[:-1], levels[1:]))
    held = slice(0, step.batch_size)  # paths of the trace's figures, and of no training
    pairs = torch.cartesian_prod(torch.arange(step.batch_size, states.shape[1]), torch.arange(step.steps))
    text_encoder = model.text_encoder

    def batches(epoch: int) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(context.seed * 100_003 + epoch)
        for picked in torch.randperm(len(pairs), generator=generator).split(step.batch_size):
            which, part = pairs[picked].unbind(1)
            yield {
                "now": states[part, which].float(), "then": states[part + 1, which].float(),
                "ids": ids[which], "part": part,
            }  # fmt: skip

    def loss(net: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        now, part = batch["now"], batch["part"]
        a, b = (c.to(now.device)[part][:, None, None, None] for c in (scale, shift))
        with torch.no_grad():
            text = text_encoder(batch["ids"])[0]
        with low_precision(now):
            found = unet_prediction(net, now, times.to(now.device)[part], text, 1.0)
        # the error of the state that the step leads to, in the size of the prediction's
        return F.mse_loss(a * now + b * found.float(), batch["then"]) / shift.square().mean().to(now.device)

    before = _path_error(model, states[:, held], ids[held], step)
    history = _fit(model, batches, loss, step, context, len(pairs) // step.batch_size, "few steps")
    after = _path_error(model, states[:, held], ids[held], step)
    what = (
        f"{step.steps} steps without guidance after {step.steps * step.substeps} with {guidance:g}: "
        f"error of the denoised latents of new noises {before:.4f} -> {after:.4f}"
    )
    numbers = {"error": [before, after], "loss": [history[0]["loss"], history[-1]["loss"]]}
    return Outcome(model, [{"layer": "unet", "what": what, **numbers}])


def few_steps(model: Diffusion, steps: int) -> Diffusion:
    """Give a model the scheduler and the sampling of `DistilSteps`, in place; InputError for steps it cannot take."""
    from diffusers import DDIMScheduler

    total = model.scheduler.config.num_train_timesteps
    if total % steps:
        raise InputError(
            f"DistilSteps.steps: {steps} does not divide the schedule's {total} timesteps; use 1, 2, 4 or 8"
        )
    options = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False, "steps_offset": 1}
    model.scheduler = DDIMScheduler.from_config(model.scheduler.config, **options)
    model.sampling = Sampling(steps, 1.0)
    return model


def _path_error(model: Diffusion, states: Tensor, ids: Tensor, step: DistilSteps) -> float:
    """The relative error of the denoised latents from the same noise."""
    model.unet.eval()
    found = trajectory(model, states[0].float(), ids, step.steps, 1, 1.0)
    return relative_error([found[-1]], [states[-1].float()])


def _paths(teacher: Diffusion, step: DistilSteps, guidance: float, context: Context) -> tuple[Tensor, Tensor]:
    """The states (steps + 1, N, C, h, w) in FP16 and token ids (N, L) of the teacher's paths, a file for each batch."""
    folder = context.folder / "trajectories" if context.folder is not None else None
    number = _number(step, context)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    config = teacher.unet.config
    size = config.sample_size
    shape = (config.in_channels, *((size, size) if isinstance(size, int) else size))
    parts: list[tuple[Tensor, Tensor]] = []
    with progress("the teacher's paths", number) as bar:
        for index, ids in enumerate(_captions(step, context, number)):
            file = folder / f"{index:05d}.safetensors" if folder is not None else None
            if context.resume and file is not None and file.exists():
                stored = load_file(file)
                parts.append((stored["states"], stored["ids"]))
            else:
                generator = torch.Generator().manual_seed(context.seed * 1_000_003 + index)
                noise = torch.randn((len(ids), *shape), generator=generator)
                with low_precision(noise):
                    states = trajectory(teacher, noise, ids, step.steps, step.substeps, guidance).half()
                parts.append((states, ids))
                if file is not None:
                    with replaced(file) as fresh:
                        save_file({"states": states.contiguous(), "ids": ids.contiguous()}, str(fresh))
            bar.advance("", len(ids))
    return torch.cat([states for states, _ in parts], dim=1), torch.cat([ids for _, ids in parts])


def _number(step: DistilSteps, context: Context) -> int:
    """Paths to compute: a batch for the trace's figures, and those to train on, of which a short trial takes few."""
    few = min(step.trajectories, 4 * step.batch_size)
    return step.batch_size + (few if context.preset == "smoke" else step.trajectories)


def _captions(step: DistilSteps, context: Context, left: int) -> Iterator[Tensor]:
    """Token ids (N, L) of `left` captions of the training split, again from the start where it is shorter."""
    samples = context.kit.dataset(context.data, "train", context.preset)
    while left:
        for batch in context.kit.batches(samples, step.batch_size, train=False, seed=context.seed):
            ids = batch["token_ids"][:left]
            left -= len(ids)
            yield ids
            if not left:
                return


def _batches(context: Context, split: str, batch_size: int, number: int = 4) -> list[Any]:
    samples = context.kit.dataset(context.data, split, context.preset)
    return list(islice(context.kit.batches(samples, batch_size, train=False, seed=context.seed), number))


def _fit(
    model: Diffusion,
    batches: Any,
    loss: Any,
    step: DistilStudent | DistilSteps,
    context: Context,
    steps: int,
    label: str,
) -> list[dict[str, float]]:
    folder: Path | None = context.folder / "distil" if context.folder is not None else None
    schedule = Schedule(step.epochs, step.batch_size, step.lr, ema=step.ema, clip=1.0, seed=context.seed)
    model.unet.requires_grad_(True)
    done = fit(
        model.unet, batches, loss, schedule,
        steps_per_epoch=steps, folder=folder, resume=context.resume, label=label,
    )  # fmt: skip
    model.unet = done.model
    return done.history
