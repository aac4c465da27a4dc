"""Fewer blocks: what each attention and residual block of the UNet is worth, and the steps that remove the least.

Kim et al., "BK-SDM: A Lightweight, Fast, and Cheap Version of Stable Diffusion" (ECCV 2024) is where the fixed
patterns come from; the measured choice removes whatever the prediction misses least.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from core.compress import Outcome, Skipped, handles
from core.kit import Context, InputError, Step
from core.progress import progress
from core.pruning.bypass import bypass, bypassed
from kits.mobile_diffusion.model.pipeline import Diffusion

Batches = Sequence[Mapping[str, Tensor]]
PATTERNS = ("base", "small", "tiny")
LARGE = 50_000_000
"""Parameters of a UNet from which a forward of one sample takes seconds on a processor."""
LARGE_SAMPLES = 8
"""Samples that blocks of a large UNet are measured on at most; the trace says so where a step asked for more."""
_PLAIN = {"CrossAttnDownBlock2D": "DownBlock2D", "CrossAttnUpBlock2D": "UpBlock2D"}


@dataclass(frozen=True)
class RemoveAttention(Step):
    """Remove the transformer blocks (self-attention, cross-attention, feed-forward) that the prediction misses least.

    `share` is the share of the original UNet's that are gone afterwards, rounded up. One goes at a time, and what is
    left is measured again, on `batches` batches of `batch_size` of the kit's training split, as the relative
    squared error of the prediction with a guidance scale of `guidance` (1: without), which is what a sampler uses:
    unguided, the text would hardly count.
    """

    share: float = 0.7
    guidance: float = 4.0
    batches: int = 4
    batch_size: int = 32

    def __post_init__(self) -> None:
        _check(self, ("share", 0 < self.share < 1, "more than 0 and less than 1"))


@dataclass(frozen=True)
class RemoveBlocks(Step):
    """Remove residual and transformer blocks, so that a student is left that starts from the teacher's weights.

    `pattern` is BK-SDM's: "base" (one residual-transformer pair of every stage goes), "small" (the middle too),
    "tiny" (the innermost stage too), for a UNet with two layers a block; or "measured": as `RemoveAttention`
    measures, the block of least rise of the error for its parameters, until at most `share` of the original
    UNet's parameters are left.
    """

    pattern: str = "measured"
    share: float = 7 / 13
    guidance: float = 4.0
    batches: int = 4
    batch_size: int = 32

    def __post_init__(self) -> None:
        known = (*PATTERNS, "measured")
        _check(
            self,
            ("pattern", self.pattern in known, f"one of {', '.join(known)}"),
            ("share", 0 < self.share < 1, "more than 0 and less than 1"),
        )


def _check(step: RemoveAttention | RemoveBlocks, *own: tuple[str, bool, str]) -> None:
    rules = (
        *own,
        ("guidance", step.guidance >= 1, "1 or more"),
        ("batches", step.batches >= 1, "1 or more"),
        ("batch_size", step.batch_size >= 1, "1 or more"),
    )
    for name, good, expected in rules:
        if not good:
            raise InputError(f"{type(step).__name__}.{name}: {getattr(step, name)!r}, expected {expected}")


def attention_blocks(unet: nn.Module) -> list[str]:
    """The names of the transformer blocks ("down_blocks.0.attentions.0") that are there."""
    return [name for name, module in unet.named_modules() if type(module).__name__ == "Transformer2DModel"]


def residual_blocks(unet: nn.Module) -> list[str]:
    """The names of the residual blocks ("down_blocks.0.resnets.0") that are there."""
    return [name for name, module in unet.named_modules() if type(module).__name__ == "ResnetBlock2D"]


@torch.no_grad()
def predictions(model: Diffusion, batches: Batches, guidance: float = 1.0) -> list[Tensor]:
    """The UNet's predictions (N, C, h, w) for batches of "latents", "timesteps" and "token_ids".

    With `guidance` w other than 1 they are p0 + w (p1 - p0), p0 for the empty caption and p1 for the given one.
    """
    found = []
    empty = model.tokens([""])
    for batch in batches:
        latents, timesteps, ids = batch["latents"], batch["timesteps"], batch["token_ids"]
        told = model(latents, timesteps, ids)
        if guidance != 1:
            untold = model(latents, timesteps, empty.to(ids.device).expand(len(ids), -1))
            told = untold + guidance * (told - untold)
        found.append(told)
    return found


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Sum of squared differences over the sum of squares of what was expected, over all tensors."""
    wrong = sum((f.double() - e.double()).square().sum().item() for f, e in zip(found, expected, strict=True))
    value = wrong / max(sum(e.double().square().sum().item() for e in expected), 1e-30)
    return value if math.isfinite(value) else math.inf


@contextmanager
def without(unet: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """The same UNet with the named blocks passed by, until the end of the `with`."""
    kept = {name: unet.get_submodule(name) for name in names}
    try:
        bypass(unet, names)
        yield
    finally:
        for name, block in kept.items():
            owner, _, leaf = name.rpartition(".")
            setattr(unet.get_submodule(owner), leaf, block)


def removal_errors(
    model: Diffusion,
    names: Sequence[str],
    batches: Batches,
    expected: Sequence[Tensor],
    guidance: float = 1.0,
    tick: Callable[[str], None] = lambda name: None,
) -> dict[str, float]:
    """The sensitivity of each named block of the UNet: the relative error against `expected` with it alone removed.

    `expected` are `predictions` of the whole model for the same batches and guidance.
    """
    errors = {}
    for name in names:
        with without(model.unet, [name]):
            errors[name] = relative_error(predictions(model, batches, guidance), expected)
        tick(name)
    return errors


def student_config(unet: Any, pattern: str) -> dict[str, Any]:
    """The config of a student after BK-SDM's pattern for the UNet of a teacher with two layers a block.

    Raises InputError for a teacher that the pattern does not fit.
    """
    config = config_of(unet)
    layers = config["layers_per_block"]
    if set([layers] if isinstance(layers, int) else layers) != {2}:
        raise InputError(
            f"RemoveBlocks.pattern: {pattern!r} needs layers_per_block 2, the UNet has {layers}; 'measured'"
        )
    config["layers_per_block"] = 1
    if pattern in ("small", "tiny"):
        config["mid_block_type"] = None
    if pattern == "tiny":
        widths = config["block_out_channels"]
        if len(widths) < 3 or widths[-1] != widths[-2]:
            raise InputError(
                f"RemoveBlocks.pattern: 'tiny' needs 3 stages or more, the two innermost of one width, the UNet has "
                f"{list(widths)}; use 'small' or 'measured'"
            )
        for key, value in config.items():
            if isinstance(value, (list, tuple)) and len(value) == len(widths):
                config[key] = tuple(value[1:] if key == "up_block_types" else value[:-1])
    return config


def config_of(unet: Any) -> dict[str, Any]:
    """The arguments that a UNet2DConditionModel was built with."""
    known = inspect.signature(type(unet).__init__).parameters
    return {key: value for key, value in unet.config.items() if key in known}


def rebuilt(
    unet: Any,
    config: Mapping[str, Any],
    source: Callable[[str], str] = lambda name: name,
    fresh_weights: Mapping[str, Tensor] = MappingProxyType({}),
) -> Any:
    """A UNet of another config with the weights of a given one; `source` names the old tensor for a new one.

    Blocks that were passed by in the old one are so in the new one. The weights are copies, but for `fresh_weights`.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        fresh = type(unet)(**config)
    gone = set(bypassed(unet))
    bypass(fresh, [name for name, _ in fresh.named_modules() if source(name) in gone])
    old = unet.state_dict()
    weights = {k: fresh_weights[k] if k in fresh_weights else old[source(k)].clone() for k in fresh.state_dict()}
    fresh.load_state_dict(weights, assign=True)
    for name, parameter in fresh.named_parameters():
        parameter.requires_grad_(unet.get_parameter(source(name)).requires_grad)
    return fresh.train(unet.training)


def student_of(unet: Any, pattern: str) -> Any:
    """A student after BK-SDM's pattern with the teacher's weights: of a down stage the first pair, of an up stage
    the first and the last, whose skip connections are the ends of stages."""
    config = student_config(unet, pattern)
    ahead = 1 if pattern == "tiny" else 0  # the innermost up stage is gone

    def source(name: str) -> str:
        parts = name.split(".")
        if parts[0] == "up_blocks" and len(parts) > 1:
            parts[1] = str(int(parts[1]) + ahead)
            if len(parts) > 3 and parts[2] in ("resnets", "attentions"):
                parts[3] = {"0": "0", "1": "2"}[parts[3]]
        return ".".join(parts)

    return rebuilt(unet, config, source)


def plain_stages(unet: Any) -> Any:
    """The same UNet where every stage without transformer blocks is of diffusers' class without them.

    What remains of `bypassed` is what a config of diffusers cannot say.
    """
    gone = set(bypassed(unet))
    config = config_of(unet)
    for side in ("down", "up"):
        kinds = list(config[f"{side}_block_types"])
        for index, stage in enumerate(getattr(unet, f"{side}_blocks")):
            names = [f"{side}_blocks.{index}.attentions.{j}" for j in range(len(getattr(stage, "attentions", ())))]
            if names and gone.issuperset(names):
                kinds[index] = _PLAIN.get(kinds[index], kinds[index])
        config[f"{side}_block_types"] = tuple(kinds)
    return unet if config == config_of(unet) else rebuilt(unet, config)


def _restore_removed(model: nn.Module, step: Any, structure: dict[str, Any]) -> nn.Module:
    model.unet = plain_stages(bypass(model.get_submodule("unet"), structure["removed"]))
    return model


def _restore_blocks(model: nn.Module, step: RemoveBlocks, structure: dict[str, Any]) -> nn.Module:
    if step.pattern == "measured":
        return _restore_removed(model, step, structure)
    model.unet = student_of(model.unet, step.pattern)
    return model


@handles(RemoveAttention, _restore_removed)
def remove_attention(model: nn.Module, step: RemoveAttention, context: Context) -> Outcome:
    """Remove the least sensitive transformer blocks, one after another."""
    model = diffusion(model, step)
    names = attention_blocks(model.unet)
    total = max(len(attention_blocks(_original_unet(context))), len(names))
    keep = total - math.ceil(step.share * total - 1e-9)
    if len(names) <= keep:
        return _nothing(
            model, f"{len(names)} of the original's {total} transformer blocks are left and {keep} may stay"
        )
    before = _count(model.unet)
    found = _remove(model, step, context, dict.fromkeys(names, 1), len(names) - keep)
    what = f"{total - keep} of the original's {total} transformer blocks are gone"
    return _told(model, found, what, before, context)


@handles(RemoveBlocks, _restore_blocks)
def remove_blocks(model: nn.Module, step: RemoveBlocks, context: Context) -> Outcome:
    """Make the student: by BK-SDM's pattern, or block by block as measured."""
    model = diffusion(model, step)
    before, whole = _count(model.unet), _count(_original_unet(context))
    if step.pattern != "measured":
        model.unet = student_of(model.unet, step.pattern)
        what = f"BK-SDM's {step.pattern} student with the teacher's weights"
        return _told(model, _Found([], [], []), what, before, context)
    names = [*attention_blocks(model.unet), *residual_blocks(model.unet)]
    sizes = {name: size for name in names if (size := _parameters_saved(model.unet, name))}
    excess = before - math.floor(step.share * whole)
    if excess <= 0:
        return _nothing(model, f"{before / whole:.1%} of the original's parameters are left, {step.share:.1%} may stay")
    if excess > sum(sizes.values()):
        least = (before - sum(sizes.values())) / whole
        raise InputError(f"RemoveBlocks.share: {step.share:.3f} is out of reach, expected {least:.3f} or more")
    found = _remove(model, step, context, sizes, excess)
    return _told(model, found, f"{len(found.removed)} of {len(sizes)} blocks removed", before, context)


@dataclass(frozen=True)
class _Found:
    """The blocks to remove in the order found, and what the trace says of them and of those that stay."""

    removed: list[str]
    changed: list[dict[str, Any]]
    skipped: list[Skipped]
    note: str = ""


def _remove(
    model: Diffusion, step: RemoveAttention | RemoveBlocks, context: Context, sizes: Mapping[str, int], need: int
) -> _Found:
    """Remove blocks until `need` of their sizes is saved, the least rise of the error for its size first, in place.

    A rise measured earlier is taken as a lower bound of the present one (removing more makes the rest dearer), so
    that only the candidates at the head of the list are measured again.
    """
    samples = context.kit.dataset(context.data, "train", context.preset)
    size, count, note = _measured_on(model, step)
    batches = list(islice(context.kit.batches(samples, size, train=False, seed=context.seed), count))
    expected = predictions(model, batches, step.guidance)
    removed: list[str] = []
    changed: list[dict[str, Any]] = []
    error, saved = 0.0, 0
    with progress("measuring blocks", len(sizes)) as bar:
        alone = removal_errors(model, list(sizes), batches, expected, step.guidance, bar.advance)
    rises, errors = dict(alone), dict(alone)
    with progress("removing blocks", need) as bar:

        def price(name: str) -> tuple[float, int]:
            return rises[name] / min(sizes[name], need - saved), -sizes[name]

        while saved < need:
            fresh: set[str] = set(rises) if not removed else set()
            while (name := min(rises, key=price)) not in fresh:
                errors |= removal_errors(model, [name], batches, expected, step.guidance)
                rises[name] = max(errors[name] - error, 0.0)
                fresh.add(name)
                bar.advance(name, 0)
            bypass(model.unet, [name])
            error = errors[name]
            del rises[name]
            saved += sizes[name]
            removed.append(name)
            bar.advance(name, sizes[name])
            changed.append({
                "layer": f"unet.{name}",
                "what": f"removed as number {len(removed)}: the error rises to {error:.4f} (alone {alone[name]:.4f})",
                "alone": alone[name], "error": error, "rank": len(removed),
            })  # fmt: skip
    kept = [Skipped(f"unet.{name}", f"kept: without it alone the error is {alone[name]:.4f}") for name in
            sorted(rises, key=lambda n: alone[n])]  # fmt: skip
    return _Found(removed, changed, kept, note)


def _measured_on(model: Diffusion, step: RemoveAttention | RemoveBlocks) -> tuple[int, int, str]:
    """Samples a batch, batches, and what the trace is to say where a large UNet gets fewer than the step names."""
    asked = step.batch_size * step.batches
    if _count(model.unet) < LARGE or asked <= LARGE_SAMPLES:
        return step.batch_size, step.batches, ""
    size = min(step.batch_size, LARGE_SAMPLES)
    count = LARGE_SAMPLES // size
    return size, count, f"; measured on {size * count} samples and not the step's {asked}, since the UNet is large"


def _told(model: Diffusion, found: _Found, what: str, before: int, context: Context) -> Outcome:
    """The outcome, after whole stages without attention have become diffusers' plain ones."""
    model.unet = plain_stages(model.unet)
    after, whole = _count(model.unet), _count(_original_unet(context))
    first = {
        "layer": "unet",
        "what": f"{what}: parameters {before:,} -> {after:,}, {after / whole:.1%} of the original's{found.note}",
        "parameters": [before, after], "share": after / whole,
    }  # fmt: skip
    return Outcome(model, [first, *found.changed], found.skipped, {"removed": found.removed})


def _nothing(model: Diffusion, why: str) -> Outcome:
    return Outcome(model, [], [Skipped("unet", why)], {"removed": []})


def diffusion(model: nn.Module, step: Step) -> Diffusion:
    """The model itself; InputError where it is no Diffusion."""
    if not isinstance(model, Diffusion):
        raise InputError(f"{type(step).__name__}: is for a Diffusion, not for a {type(model).__name__}")
    return model


def _original_unet(context: Context) -> nn.Module:
    return context.original.get_submodule("unet")


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _parameters_saved(unet: nn.Module, name: str) -> int:
    block = unet.get_submodule(name)
    shortcut = getattr(block, "conv_shortcut", None)
    return _count(block) - (_count(shortcut) if shortcut is not None else 0)
