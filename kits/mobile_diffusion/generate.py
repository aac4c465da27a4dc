"""Pictures from prompts through diffusers' own StableDiffusionPipeline: batched, the same for the same seed."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.evaluation.guard import Guard, guard
from core.hardware.pages import give_back, is_weights, return_large_blocks
from core.kit import InputError
from core.quantization.packed import expand
from core.quantization.slices import in_slices
from kits.mobile_diffusion.model.pipeline import Diffusion

LONGEST_SIDE = 4096
LARGEST_SEED = 2**63 - 1
LARGEST_GUIDANCE = 100.0
# A vocabulary this small has whole words only for what its model was trained on; CLIP's own has 49,408 entries.
_CLOSED_VOCABULARY = 10_000
_GUARD_EVERY = 4

OnStep = Callable[[int, int], None]
"""Called after a step with its number, from 1, and how many pictures took it."""


@dataclass(frozen=True)
class Way:
    """How to run: what memory is spent on for speed. The default is the fastest with the weights as they are.

    `rows` is the most rows of a batch that go through the UNet at once (guidance doubles the rows; None: all).
    `tile` is the side of the VAE's tiles in latent cells, which overlap by a quarter (None: whole pictures).
    `slices` is the most bytes of float weight that a packed layer makes at once (None: its whole weight).
    `release` gives pages back to the system between the parts of a run: those of weights that lie in mapped files, of
    program code and of freed tensors. What is needed again comes from the file; no picture changes.
    `expanded` runs with float weights: see `prepare`.
    """

    rows: int | None = None
    tile: int | None = None
    slices: int | None = None
    release: bool = False
    expanded: bool = False


def prepare(model: Diffusion, way: Way) -> None:
    """Make a loaded model ready for a way of running, in place: expanded to float if the way says so.

    From then on the process returns large freed tensors to the system at once, as `plan_generation` counts them.
    """
    return_large_blocks()
    if way.expanded:
        expand(model)
    if way.release:
        give_back()
        give_back(is_weights)  # loading has touched some of them


@dataclass(frozen=True)
class Samples:
    """Pictures uint8 (H, W, 3), their denoised latents (N, C, h, w), and those of every step (S, N, ...)."""

    pictures: list[np.ndarray]
    denoised: Tensor
    latents: Tensor | None


def generate(
    model: Diffusion,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int] | int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    size: int | tuple[int, int] | None = None,
    on_step: OnStep | None = None,
    batch: int = 4,
    way: Way | None = None,
    watch: bool = True,
) -> list[np.ndarray]:
    """A uint8 picture (H, W, 3) for every prompt; see `sample`, which also gives the latents."""
    return sample(
        model, prompts, seeds=seeds, steps=steps, guidance=guidance, size=size, on_step=on_step, batch=batch, way=way,
        watch=watch,
    ).pictures  # fmt: skip


def sample(
    model: Diffusion,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int] | int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    size: int | tuple[int, int] | None = None,
    on_step: OnStep | None = None,
    batch: int = 4,
    way: Way | None = None,
    watch: bool = True,
    keep_latents: bool = False,
) -> Samples:
    """Generate with the model's scheduler, `batch` pictures at a time.

    `seeds` is one for each prompt, or one for all. `steps`, `guidance` and `size`, a side or (height, width) in pixels,
    are the model's own unless told. `guidance` of 1 or less is none. A prompt and a seed give one picture whatever else
    is in the batch, up to the rounding of float sums (a level of 255 in rare pixels; none with `rows` = 1 in `way`).
    With `watch` the first NaN, Inf or activation beyond FP16 raises ActivationError, which names layer and step. Raises
    InputError for prompts, seeds, steps, guidance and sizes that cannot be; a prompt that is cut gives a warning.
    """
    for note in check_prompts(model, prompts):
        warnings.warn(note, UserWarning, stacklevel=2)
    each = check_seeds(seeds, len(prompts))
    height, width = check_size(model, size)
    steps = model.sampling.steps if steps is None else steps
    guidance = model.sampling.guidance if guidance is None else guidance
    count = check_steps(model, steps)
    check_guidance(guidance)
    if batch < 1:
        raise InputError(f"batch {batch}: expected one picture or more at a time")
    way = way or Way()
    blocks = [range(start, min(start + batch, len(prompts))) for start in range(0, len(prompts), batch)]
    with torch.no_grad(), ExitStack() as stack:
        eye = stack.enter_context(guard(model, every=_GUARD_EVERY)) if watch else None
        if way.slices is not None:
            stack.enter_context(in_slices(model, way.slices))
        text, empty = _encode(model, prompts, batch)
        if way.release:
            give_back(is_weights)
        runs = []
        with _in_rows(model.unet, way.rows):
            for block in blocks:
                noise = [torch.Generator().manual_seed(each[i]) for i in block]
                runs.append(
                    _denoise(
                        model,
                        text[block.start : block.stop],
                        empty,
                        noise,
                        steps,
                        guidance,
                        (height, width),
                        on_step,
                        eye,
                        keep_latents,
                        count,
                    )  # fmt: skip
                )
        if way.release:
            give_back(is_weights)
        if eye is not None:
            eye.step = None
        denoised = torch.cat([run[-1] for run in runs])
        latents = torch.cat([torch.stack(run) for run in runs], 1) if keep_latents else None
        with _in_tiles(model.vae, way.tile):
            pictures = [_decode(model.vae, one) for one in denoised.split(1)]
    return Samples(pictures, denoised, latents)


def check_prompts(model: Diffusion, prompts: Sequence[str]) -> list[str]:
    """What a person should know of prompts that will do: what is cut, which words the model never saw.

    Raises InputError for no prompts and for an empty one.
    """
    if isinstance(prompts, str) or not prompts:
        raise InputError("no prompts; give a list with at least one")
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            which = f"prompt {number} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
            raise InputError(f"{which} is empty; say what to draw")
    return [note for prompt in dict.fromkeys(prompts) for note in _notes(model.tokenizer, prompt)]


def check_seeds(seeds: Sequence[int] | int, pictures: int) -> list[int]:
    """A seed for every picture; InputError where their number is another or one is negative or beyond 2^63 - 1."""
    each = [seeds] * pictures if isinstance(seeds, int) else list(seeds)
    if len(each) != pictures:
        raise InputError(f"{len(each)} seeds for {pictures} prompts; give one for each, or one for all")
    for seed in each:
        if not 0 <= seed <= LARGEST_SEED:
            raise InputError(f"seed {seed}: expected a whole number from 0 to 2^63 - 1")
    return each


def check_size(model: Diffusion, size: int | tuple[int, int] | None) -> tuple[int, int]:
    """(height, width) in pixels; InputError names the nearest where a side is no multiple of what the parts halve."""
    factor = 2 ** (len(model.vae.config.block_out_channels) - 1)
    multiple = factor * 2 ** (len(model.unet.config.down_block_types) - 1)
    if size is None:
        own = model.unet.config.sample_size
        height, width = (own, own) if isinstance(own, int) else own
        return height * factor, width * factor
    sides = (size, size) if isinstance(size, int) else (size[0], size[1])
    for side in sides:
        if side % multiple or not multiple <= side <= LONGEST_SIDE:
            nearest = min(max(multiple, round(side / multiple) * multiple), LONGEST_SIDE // multiple * multiple)
            raise InputError(
                f"size {side}: expected a multiple of {multiple} from {multiple} to {LONGEST_SIDE} pixels, since VAE "
                f"and UNet halve it {int(math.log2(multiple))} times; the nearest is {nearest}"
            )
    return sides


def check_steps(model: Diffusion, steps: int) -> int:
    """How often the UNet runs for `steps` (some schedulers add one); InputError where the scheduler cannot."""
    trained = int(model.scheduler.config.num_train_timesteps)
    if not 1 <= steps <= trained:
        raise InputError(f"steps {steps}: expected 1 to {trained}, the steps the model was trained with")
    model.sampling.check(steps)
    scheduler = _fresh(model)
    try:
        scheduler.set_timesteps(steps)
    except ValueError as error:
        why = str(error).splitlines()[0]
        raise InputError(f"steps {steps}: {type(scheduler).__name__} cannot ({why}); take fewer") from error
    return len(scheduler.timesteps)


def check_guidance(guidance: float) -> None:
    """InputError for a guidance that is negative, no number or absurd."""
    if not 0 <= guidance <= LARGEST_GUIDANCE:
        raise InputError(f"guidance {guidance}: expected 0 to {LARGEST_GUIDANCE:g}; 1 or less is none, 3 to 8 is usual")


def bar_steps(model: Diffusion, pictures: int, steps: int, batch: int = 4) -> int:
    """How often `on_step` is called for so many pictures."""
    return -(-pictures // batch) * check_steps(model, steps)


def _notes(tokenizer: Any, prompt: str) -> Iterator[str]:
    ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
    limit = int(tokenizer.model_max_length)
    if len(ids) > limit:
        cut = tokenizer.decode(ids[limit - 1 : -1]).strip()
        yield f"prompt {_short(prompt)} has {len(ids)} tokens of at most {limit}: not seen is {_short(cut)}; shorten it"
    if len(tokenizer) < _CLOSED_VOCABULARY:
        words = (word.strip(".,;:!?") for word in prompt.split())
        unknown = [w for w in words if w and len(tokenizer(w, add_special_tokens=False, verbose=False).input_ids) > 1]
        if unknown:
            few = ", ".join(repr(w) for w in dict.fromkeys(unknown[:5]))
            yield f"prompt {_short(prompt)}: the model has never seen {few}; expect it to be ignored"


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def _encode(model: Diffusion, prompts: Sequence[str], batch: int) -> tuple[Tensor, Tensor]:
    """Hidden states of the prompts (N, L, D), and of the empty one (1, L, D) that guidance steers away from."""
    texts = [""] + list(prompts)
    states = [model.encode(model.tokens(texts[at : at + batch])) for at in range(0, len(texts), batch)]
    found = torch.cat(states)
    return found[1:], found[:1]


def _denoise(
    model: Diffusion,
    text: Tensor,
    empty: Tensor,
    noise: list[torch.Generator],
    steps: int,
    guidance: float,
    size: tuple[int, int],
    on_step: OnStep | None,
    eye: Guard | None,
    keep: bool,
    count: int,
) -> list[Tensor]:
    """Latents (n, C, h, w) of the last step, or of all."""
    pipeline = model.pipeline()
    pipeline.scheduler = _fresh(model)  # its state is a run's own: two runs may interleave
    pipeline.set_progress_bar_config(disable=True)
    kept: list[Tensor] = []
    if eye is not None:
        eye.step = 1

    def after(_: Any, step: int, __: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        if keep:
            kept.append(values["latents"].clone())
        if eye is not None:
            eye.step = min(step + 2, count)
        if on_step is not None:
            on_step(step + 1, len(noise))
        return {}

    last = pipeline(
        prompt_embeds=text,
        negative_prompt_embeds=empty.expand(len(text), -1, -1),
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=size[0],
        width=size[1],
        generator=noise,
        output_type="latent",
        callback_on_step_end=after,
    ).images
    return kept if keep else [last]


def _fresh(model: Diffusion) -> Any:
    return copy.deepcopy(model.scheduler)


def _decode(vae: Any, latents: Tensor) -> np.ndarray:
    """The picture uint8 (H, W, 3) of latents (1, C, h, w)."""
    picture = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0][0]
    levels = picture.float().div_(2).add_(0.5).clamp_(0, 1).mul_(255).round_()
    return np.asarray(levels.to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


@contextmanager
def _in_rows(unet: nn.Module, rows: int | None) -> Iterator[None]:
    """Within it the UNet takes at most so many rows of a batch at once, one after the other."""
    if rows is None:
        yield
        return
    if rows < 1:
        raise InputError(f"rows {rows}: expected one row or more at a time")
    whole = unet.forward

    def in_rows(
        sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, *, return_dict: bool = True, **rest: Any
    ) -> Any:
        parts = []
        for at in range(0, len(sample), rows):
            here = slice(at, at + rows)
            mine = {
                k: v[here] if isinstance(v, Tensor) and v.ndim and len(v) == len(sample) else v for k, v in rest.items()
            }
            time = timestep[here] if isinstance(timestep, Tensor) and timestep.ndim else timestep
            parts.append(whole(sample[here], time, encoder_hidden_states[here], return_dict=False, **mine)[0])
        return (torch.cat(parts),)

    unet.forward = in_rows
    try:
        yield
    finally:
        del unet.forward


@contextmanager
def _in_tiles(vae: Any, tile: int | None) -> Iterator[None]:
    """Within it the VAE decodes larger latents in overlapping tiles, as diffusers does."""
    if tile is None:
        yield
        return
    names = ("use_tiling", "tile_latent_min_size", "tile_sample_min_size")
    before = {name: getattr(vae, name) for name in names}
    vae.use_tiling, vae.tile_latent_min_size = True, tile
    vae.tile_sample_min_size = tile * 2 ** (len(vae.config.block_out_channels) - 1)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)
