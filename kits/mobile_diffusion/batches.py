"""Training and calibration batches: pictures in the latents of a model's own autoencoder, with noise of every level."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.kit import InputError
from core.progress import progress
from kits.mobile_diffusion.data.default import Captioned
from kits.mobile_diffusion.model.pipeline import Diffusion

DROPPED = 0.1
"""Share of captions that are left out of training batches, so that the prediction without a prompt is trained too."""
_CHUNK = 64


class Batches:
    """Batches for one model: {"latents" (noisy), "clean", "noise", "target": (N, C, h, w), "timesteps": (N,),
    "token_ids": (N, L)}.

    "target" is what the model's scheduler makes its prediction mean: noise, v or the clean latents. Latents of a set
    are encoded once and kept in memory in FP16.
    """

    def __init__(self, model: Diffusion) -> None:
        self._model = model
        self._empty = model.tokens([""])
        self._encoded: dict[int, tuple[Sequence[Any], Tensor, Tensor]] = {}

    def __call__(
        self, samples: Sequence[Captioned], batch_size: int, *, train: bool, seed: int = 0
    ) -> Iterator[dict[str, Any]]:
        """All samples once, in random order and without a last short batch with `train`; the same for the same seed."""
        latents, ids = self._latents(samples)
        draws = torch.Generator().manual_seed(1_000_003 * seed + int(train))
        order = torch.randperm(len(latents), generator=draws) if train else torch.arange(len(latents))
        for picked in order.split(batch_size):
            if train and len(picked) < batch_size and len(latents) >= batch_size:
                return
            yield self._noisy(latents[picked].float(), ids[picked], draws, DROPPED if train else 0.0)

    def _noisy(self, clean: Tensor, ids: Tensor, draws: torch.Generator, dropped: float) -> dict[str, Any]:
        """A batch with noise levels spread evenly over the schedule, without a share of its captions."""
        n, kept = len(clean), self._model.scheduler.alphas_cumprod
        timesteps = ((torch.arange(n) + torch.rand(n, generator=draws)) * len(kept) / n).long()
        signal = kept[timesteps][:, None, None, None]
        noise = torch.randn(clean.shape, generator=draws)
        latents = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        unsaid = torch.rand(n, 1, generator=draws) < dropped
        return {
            "latents": latents,
            "clean": clean,
            "noise": noise,
            "target": target(self._model.scheduler, clean, noise, signal),
            "timesteps": timesteps,
            "token_ids": torch.where(unsaid, self._empty, ids),
        }

    @torch.no_grad()
    def _latents(self, samples: Sequence[Captioned]) -> tuple[Tensor, Tensor]:
        if id(samples) in self._encoded:
            return self._encoded[id(samples)][1:]
        if not len(samples) or not hasattr(samples[0], "picture"):
            raise InputError("batches need captioned pictures; take the split 'train' or 'val', not prompts alone")
        vae, parts, captions = self._model.vae, [], []
        with progress("encoding pictures", len(samples)) as bar:
            for start in range(0, len(samples), _CHUNK):
                some = samples[start : start + _CHUNK]
                pixels = np.stack([s.picture() for s in some])
                shown = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(vae.dtype) / 127.5 - 1.0
                parts.append((vae.encode(shown).latent_dist.mean * vae.config.scaling_factor).half())
                captions += [s.text for s in some]
                bar.advance("", len(some))
        found = samples, torch.cat(parts), self._model.tokens(captions)
        self._encoded[id(samples)] = found  # with the samples, so that the id stays theirs
        return found[1:]


def target(scheduler: Any, clean: Tensor, noise: Tensor, signal: Tensor) -> Tensor:
    """What a prediction means under a scheduler, for the share of the signal's power that is left (N, 1, 1, 1)."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return signal.sqrt() * noise - (1 - signal).sqrt() * clean
    if kind == "sample":
        return clean
    raise InputError(f"scheduler with prediction_type {kind!r}; expected epsilon, v_prediction or sample")
