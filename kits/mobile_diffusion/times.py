"""Time embeddings precomputed for a fixed schedule: a few rows of a table in the place of an MLP and its projections.

A UNet turns a timestep into sinusoids, those by an MLP into an embedding, and that by one matrix a residual block into
an offset for each channel. Sampled in K fixed timesteps it needs K offsets a channel and no more. The table fits into
diffusers' own classes: with `time_embedding_dim` K the MLP says which of the K timesteps it is (one of K is 1), and a
block's matrix (channels, K) holds its offsets, so the folder loads wherever the UNet did.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from core.compress import Outcome, handles
from core.kit import Context, InputError, Step
from kits.mobile_diffusion.blocks import config_of, diffusion, rebuilt

MOST = 100
"""Timesteps beyond which a table is no longer small beside what it replaces."""
_UNIT = 1.2784645427610738
"""x with SiLU(x) = 1."""
_TOLERANCE = 1e-2


@dataclass(frozen=True)
class FixTimes(Step):
    """Precompute the time embeddings for the timesteps of the model's own scheduler and number of steps.

    Comes after whatever changes these, such as `DistilSteps`. The model then knows no other number of steps.
    """


@torch.no_grad()
def table(unet: Any, timesteps: Tensor) -> dict[str, Tensor]:
    """The tensors of a UNet with `time_embedding_dim` K, for timesteps (K,): those of the MLP and of the projections.

    Raises InputError for a UNet whose embedding depends on more than the timestep, and for timesteps that FP16 weights
    cannot tell apart.
    """
    config = unet.config
    for field in ("time_cond_proj_dim", "class_embed_type", "num_class_embeds", "addition_embed_type"):
        if config.get(field) is not None:
            raise InputError(
                f"FixTimes: the UNet has {field} {config[field]!r}, so its embedding is not of the time alone"
            )
    if config.get("resnet_skip_time_act") or config.get("time_embedding_act_fn") or config.act_fn != "silu":
        raise InputError("FixTimes: needs a UNet with SiLU before and within its time projections, as SD-1.x has")
    dtype = unet.time_embedding.linear_1.weight.dtype
    waves = unet.time_proj(timesteps).double()  # (K, F)
    tell = _UNIT * torch.linalg.pinv(waves).T.contiguous()  # (K, F): of the k-th row of waves it makes _UNIT at k
    told = waves @ tell.half().double().T / _UNIT
    apart = (told - torch.eye(len(timesteps), dtype=torch.float64)).abs().max().item()
    if not apart <= _TOLERANCE:  # not a number where FP16 overflows
        raise InputError(
            f"FixTimes: {len(timesteps)} timesteps are too near one another to be told apart in FP16 (off by "
            f"{apart:.3f}); use fewer steps"
        )
    embedding = unet.time_embedding(waves.to(dtype))
    zeros = torch.zeros(len(timesteps), dtype=dtype)
    found = {
        "time_embedding.linear_1.weight": tell.to(dtype),
        "time_embedding.linear_1.bias": zeros.clone(),
        "time_embedding.linear_2.weight": (_UNIT * torch.eye(len(timesteps))).to(dtype),
        "time_embedding.linear_2.bias": zeros.clone(),
    }
    for name, block in unet.named_modules():
        projection = getattr(block, "time_emb_proj", None)
        if isinstance(projection, nn.Linear):
            offsets = projection(block.nonlinearity(embedding))  # (K, channels), the bias within
            found[f"{name}.time_emb_proj.weight"] = offsets.T.contiguous()
            found[f"{name}.time_emb_proj.bias"] = torch.zeros_like(offsets[0])
    return found


def _restore(model: nn.Module, step: FixTimes, structure: dict[str, Any]) -> nn.Module:
    model = diffusion(model, step)
    _fix(model, torch.tensor(structure["timesteps"]))
    return model


def _fix(model: Any, timesteps: Tensor) -> None:
    model.unet = rebuilt(
        model.unet,
        {**config_of(model.unet), "time_embedding_dim": len(timesteps)},
        fresh_weights=table(model.unet, timesteps),
    )
    model.sampling = replace(model.sampling, fixed=True)


@handles(FixTimes, _restore)
def fix_times(model: nn.Module, step: FixTimes, context: Context) -> Outcome:
    """Put the table in; outputs at its timesteps stay what they were."""
    model = diffusion(model, step)
    model.scheduler.set_timesteps(model.sampling.steps)
    timesteps = model.scheduler.timesteps.cpu()
    if len(timesteps) > MOST:
        raise InputError(f"FixTimes: {len(timesteps)} steps, expected at most {MOST}; put DistilSteps before it")
    before = sum(p.numel() for p in model.unet.parameters())
    _fix(model, timesteps)
    after = sum(p.numel() for p in model.unet.parameters())
    what = f"time embeddings precomputed for {len(timesteps)} timesteps: parameters {before:,} -> {after:,}"
    changed = [{"layer": "unet.time_embedding", "what": what, "parameters": [before, after]}]
    return Outcome(model, changed, [], {"timesteps": timesteps.tolist()})
