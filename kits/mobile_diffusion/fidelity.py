"""How near the compressed model stays to the original: PSNR, SSIM, error against step, and KID and FID.

KID and FID use the features of an encoder that is given, by default the kit's own VAE encoder. Such figures compare
two sets of pictures seen by that encoder; they are NOT comparable with published ones, which use Inception's features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.kit import InputError

Picture = np.ndarray
"""uint8 (H, W, 3)."""
Encoder = Callable[[Tensor], Tensor]
"""From pictures (N, 3, H, W) in [-1, 1] to features (N, D)."""

_RADIUS, _SIGMA, _K1, _K2, _RANGE = 5, 1.5, 0.01, 0.03, 255.0
NOT_INCEPTION = "features of the kit's own encoder: not comparable with KID or FID of Inception's features"


def psnr(picture: Picture, original: Picture) -> float:
    """Peak signal-to-noise ratio in dB of a uint8 picture against the original's, infinite where they are equal."""
    _alike(picture, original)
    error = float(np.mean((picture.astype(np.float64) - original.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(_RANGE**2 / error)


def ssim(picture: Picture, original: Picture) -> float:
    """Structural similarity in [-1, 1] of two uint8 pictures, the mean over channels and whole windows.

    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004: an 11 x 11
    Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, as scikit-image with gaussian_weights and no sample covariance.
    Raises InputError for pictures smaller than the window.
    """
    _alike(picture, original)
    side = 2 * _RADIUS + 1
    if min(picture.shape[:2]) < side:
        raise InputError(f"ssim: a picture of {_size(picture)}; expected at least {side} x {side}, its window")
    x, y = (torch.from_numpy(p.astype(np.float64)).permute(2, 0, 1).unsqueeze(1) for p in (picture, original))
    at = torch.arange(-_RADIUS, _RADIUS + 1, dtype=torch.float64)
    bell = torch.exp(-(at**2) / (2 * _SIGMA**2))
    bell /= bell.sum()

    def blurred(plane: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(plane, bell.view(1, 1, -1, 1)), bell.view(1, 1, 1, -1))

    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    c1, c2 = (_K1 * _RANGE) ** 2, (_K2 * _RANGE) ** 2
    light = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return float((light * structure).mean())


def latent_psnr(latents: Tensor, original: Tensor) -> float:
    """PSNR in dB of denoised latents of any shape against the original's, whose largest magnitude is the peak.

    Source: the definition of Apple's ml-stable-diffusion, so that its published figures can stand beside ours.
    """
    if latents.shape != original.shape:
        raise InputError(f"latents {tuple(latents.shape)} against {tuple(original.shape)}; generate both at one size")
    error = float((latents.double() - original.double()).square().mean().sqrt())
    return math.inf if error == 0 else 20 * math.log10(float(original.abs().max()) / error)


@dataclass(frozen=True)
class ErrorCurve:
    """Error of the latents after every step: `relative` is RMS error over RMS of the original, mean over pictures.

    `low` and `high` are the smallest and largest over the pictures; `psnr` in dB is of all pictures together.
    """

    relative: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    psnr: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """{"step": [1, 2, ...], "relative": [...], "low": ..., "high": ..., "psnr": ...}."""
        steps = list(range(1, len(self.relative) + 1))
        return {
            "step": steps, "relative": list(self.relative), "low": list(self.low), "high": list(self.high),
            "psnr": list(self.psnr),
        }  # fmt: skip


def error_curve(latents: Tensor, original: Tensor) -> ErrorCurve:
    """The error against step of latents (S, N, C, h, w), after each of S steps, against the original's.

    Raises InputError where the shapes differ: two schedules of different length have no step in common.
    """
    if latents.shape != original.shape or latents.ndim != 5:
        raise InputError(
            f"error against step: latents {tuple(latents.shape)} against {tuple(original.shape)}; expected both "
            "(steps, pictures, channels, height, width), so generate with the same steps and size"
        )
    ours, theirs = latents.double().flatten(2), original.double().flatten(2)
    error = (ours - theirs).square().mean(2).sqrt() / theirs.square().mean(2).sqrt()
    decibels = tuple(latent_psnr(a, b) for a, b in zip(latents, original))
    rows = (error.mean(1), error.amin(1), error.amax(1))
    mean, low, high = (tuple(float(v) for v in row) for row in rows)
    return ErrorCurve(mean, low, high, decibels)


def kid(features: Tensor, original: Tensor, *, paired: bool = False) -> float:
    """Unbiased squared maximum mean discrepancy of features (N, D) and (M, D); may be slightly negative.

    Kernel (x.y / D + 1)^3. `paired` rows belong together (N = M, the same prompt and seed) and are not independent, so
    no row is compared with its own partner. Sources: Binkowski et al., "Demystifying MMD GANs", 2018; for pairs Gretton
    et al., "A Kernel Two-Sample Test", 2012, lemma 6.
    """
    x, y = _features(features, original)
    n, m = len(x), len(y)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    xx, yy = kernel(x, x), kernel(y, y)
    within = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
    across = kernel(x, y)
    if not paired:
        return float(within - 2 * across.mean())
    if n != m:
        raise InputError(f"kid: {n} rows against {m}; expected pairs")
    return float(within - 2 * (across.sum() - across.trace()) / (n * (n - 1)))


def fid(features: Tensor, original: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to features (N, D) and (M, D).

    Biased upward for few pictures: compare sets of one size only. Source: Heusel et al., "GANs trained by a two
    time-scale update rule", 2017.
    """
    x, y = _features(features, original)
    cov_x, cov_y = (torch.atleast_2d(torch.cov(f.T)) for f in (x, y))
    # tr sqrt(Cx Cy) = tr sqrt(A Cy A) with A = sqrt(Cx): symmetric, so no complex roots of rounding errors
    values, vectors = torch.linalg.eigh(cov_x)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    crossed = torch.linalg.eigvalsh(root @ cov_y @ root).clamp_min(0).sqrt().sum()
    apart = (x.mean(0) - y.mean(0)).square().sum()
    return float((apart + cov_x.trace() + cov_y.trace() - 2 * crossed).clamp_min(0))


def pictures_to_features(pictures: Sequence[Picture], encoder: Encoder, batch: int = 32) -> Tensor:
    """Features (N, D) of uint8 pictures, all of one size, by an encoder; see `vae_features` for the kit's own."""
    if not pictures:
        raise InputError("features: no pictures; generate some first")
    for picture in pictures:
        _alike(picture, pictures[0])
    found = []
    with torch.no_grad():
        for start in range(0, len(pictures), batch):
            block = torch.from_numpy(np.stack(pictures[start : start + batch])).permute(0, 3, 1, 2)
            found.append(encoder(block.float() / 127.5 - 1).float().flatten(1))
    return torch.cat(found)


def vae_features(vae: nn.Module) -> Encoder:
    """The encoder's last features before its latents, (N, D): mean and deviation of every channel over the picture.

    Use one VAE, the original's, for both sets. What is compared with it is what the VAE keeps: layout, colour, edges.
    """
    encoder = getattr(vae, "encoder", None)
    if encoder is None or not hasattr(encoder, "mid_block"):
        raise InputError("KID/FID: this VAE has no encoder; give the original's, or another encoder of pictures")

    def features(pictures: Tensor) -> Tensor:
        caught: list[Tensor] = []
        handle = encoder.mid_block.register_forward_hook(lambda _, __, output: caught.append(output))
        try:
            encoder(pictures.to(next(encoder.parameters()).dtype))
        finally:
            handle.remove()
        planes = caught[0].flatten(2)
        return torch.cat([planes.mean(2), planes.std(2, correction=0)], 1)

    return features


@dataclass(frozen=True)
class Fidelity:
    """Means over pictures made from the same prompts and seeds by the original and the compressed model.

    `psnr` in dB leaves equal pictures out (theirs is infinite); `identical` is their share. `kid` and `fid` are None
    for fewer pictures than they need.
    """

    pictures: int
    psnr: float
    ssim: float
    identical: float
    latent_psnr: float | None
    curve: ErrorCurve | None
    kid: float | None
    fid: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, with the warning that belongs to KID and FID; an infinite PSNR is None."""
        finite = {k: v if v is not None and math.isfinite(v) else None for k, v in self._numbers().items()}
        return {
            "pictures": self.pictures, **finite, "curve": self.curve.to_json() if self.curve else None,
            "features": NOT_INCEPTION,
        }  # fmt: skip

    def _numbers(self) -> dict[str, float | None]:
        return {
            "psnr": self.psnr, "ssim": self.ssim, "identical": self.identical, "latent_psnr": self.latent_psnr,
            "kid": self.kid, "fid": self.fid,
        }  # fmt: skip


def fidelity(
    pictures: Sequence[Picture],
    original: Sequence[Picture],
    *,
    latents: tuple[Tensor, Tensor] | None = None,
    encoder: Encoder | None = None,
) -> Fidelity:
    """Compare pictures with the original's, pair by pair, and as sets where an encoder is given.

    `latents` are (ours, the original's), each (S, N, C, h, w) after every step, or (N, C, h, w) denoised where the
    two took different steps. Features are brought to mean 0 and deviation 1 of the original's. FID is None below two
    pictures more than there are features.
    """
    if len(pictures) != len(original) or not pictures:
        raise InputError(f"fidelity: {len(pictures)} pictures against {len(original)}; expected as many, at least one")
    decibels = [psnr(a, b) for a, b in zip(pictures, original)]
    finite = [d for d in decibels if math.isfinite(d)]
    curve, denoised = None, None
    if latents is not None:
        ours, theirs = latents
        curve = error_curve(ours, theirs) if ours.ndim == 5 else None
        denoised = curve.psnr[-1] if curve else latent_psnr(ours, theirs)
    distance, frechet = None, None
    if encoder is not None and len(pictures) >= 2:
        x, y = (pictures_to_features(p, encoder).double() for p in (pictures, original))
        # the kernel's cube is made for features about 1: an autoencoder's may lie in the thousands
        middle, spread = y.mean(0), y.std(0, correction=0)
        spread = torch.where(spread > 0, spread, torch.ones_like(spread))
        x, y = (x - middle) / spread, (y - middle) / spread
        distance = kid(x, y, paired=True)
        frechet = fid(x, y) if len(x) >= x.shape[1] + 2 else None
    return Fidelity(
        len(pictures),
        sum(finite) / len(finite) if finite else math.inf,
        sum(ssim(a, b) for a, b in zip(pictures, original)) / len(pictures),
        1 - len(finite) / len(pictures),
        denoised,
        curve,
        distance,
        frechet,
    )


def _features(features: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
    if features.ndim != 2 or original.ndim != 2 or features.shape[1] != original.shape[1]:
        raise InputError(
            f"features {tuple(features.shape)} against {tuple(original.shape)}; expected (N, D), (M, D) of one encoder"
        )
    if min(len(features), len(original)) < 2:
        raise InputError(f"KID/FID of {len(features)} and {len(original)} pictures; expected two or more of each")
    return features.double(), original.double()


def _alike(picture: Picture, original: Picture) -> None:
    for one in (picture, original):
        if one.dtype != np.uint8 or one.ndim != 3 or one.shape[2] != 3:
            raise InputError(f"picture of {one.dtype} {one.shape}; expected uint8 (height, width, 3)")
    if picture.shape != original.shape:
        raise InputError(f"pictures of {_size(picture)} and {_size(original)}; generate both at one size")


def _size(picture: Picture) -> str:
    return f"{picture.shape[1]} x {picture.shape[0]}"
