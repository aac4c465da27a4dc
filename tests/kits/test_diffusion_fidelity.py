"""Fidelity against the numbers of scikit-image 0.26, torchmetrics 1.9 and closed forms."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from scipy.linalg import sqrtm

from core.kit import InputError
from kits.mobile_diffusion.fidelity import (
    error_curve,
    fid,
    fidelity,
    kid,
    latent_psnr,
    pictures_to_features,
    psnr,
    ssim,
    vae_features,
)


def pictures() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    noise = rng.integers(0, 256, (48, 40, 3)).astype(np.uint8)
    near = np.clip(noise.astype(int) + rng.integers(-40, 41, noise.shape), 0, 255).astype(np.uint8)
    ramp = (np.indices((48, 40)).sum(0)[..., None] * np.array([1, 2, 2.5])).clip(0, 255).astype(np.uint8)
    return noise, near, ramp


def test_psnr_and_ssim_are_those_of_scikit_image() -> None:
    """structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255)."""
    noise, near, ramp = pictures()
    assert psnr(noise, near) == pytest.approx(21.056404512541146, rel=1e-12)
    assert ssim(noise, near) == pytest.approx(0.9515833492717153, rel=1e-10)
    assert ssim(ramp, noise) == pytest.approx(0.00926463392754255, rel=1e-8)
    assert ssim(ramp, 255 - ramp) == pytest.approx(0.16229568318509208, rel=1e-8)


def test_equal_pictures() -> None:
    noise, _, _ = pictures()
    assert psnr(noise, noise) == math.inf
    assert ssim(noise, noise) == 1.0


def test_latent_psnr_closed_form() -> None:
    original = torch.tensor([[4.0, -8.0], [2.0, 0.0]])
    assert latent_psnr(original + 0.5, original) == pytest.approx(20 * math.log10(8 / 0.5))
    assert latent_psnr(original, original) == math.inf


def test_error_curve_closed_form() -> None:
    """A constant error of 0.1 and 0.3 of two pictures that have RMS 1 and 2."""
    original = torch.stack([torch.ones(2, 1, 2, 2), torch.full((2, 1, 2, 2), 2.0)], 1).double()
    ours = original.clone()
    ours[0] += 0.1
    ours[1] += 0.3
    curve = error_curve(ours, original)
    assert curve.relative == pytest.approx((0.075, 0.225))
    assert curve.low == pytest.approx((0.05, 0.15))
    assert curve.high == pytest.approx((0.1, 0.3))
    assert curve.psnr == pytest.approx((20 * math.log10(20), 20 * math.log10(2 / 0.3)))
    with pytest.raises(InputError, match="same steps and size"):
        error_curve(ours[:1], original)


def test_fid_is_that_of_scipy_and_of_the_closed_form() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(40, 6)), rng.normal(size=(30, 6)) * 1.5 + 0.3
    c, d = np.cov(x.T), np.cov(y.T)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c + d - 2 * sqrtm(c @ d).real)
    assert fid(torch.tensor(x), torch.tensor(y)) == pytest.approx(expected, rel=1e-9)
    # one dimension: (m1 - m2)^2 + (s1 - s2)^2
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[5.0], [9.0]])
    assert fid(a, b) == pytest.approx(36 + (math.sqrt(2) - math.sqrt(8)) ** 2)
    assert fid(torch.tensor(x), torch.tensor(x)) == pytest.approx(0, abs=1e-9)


def test_kid_is_that_of_torchmetrics_and_of_its_definition() -> None:
    rng = np.random.default_rng(7)
    for shape in ((48, 40, 3), (48, 40, 3)):
        rng.integers(0, 256, shape)
    x, y = torch.tensor(rng.normal(size=(9, 4))), torch.tensor(rng.normal(size=(7, 4)) + 1)

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a @ b / 4 + 1) ** 3)

    xx = sum(kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (9 * 8)
    yy = sum(kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / (7 * 6)
    xy = sum(kernel(a, b) for a in x for b in y) / (9 * 7)
    assert kid(x, y) == pytest.approx(xx + yy - 2 * xy, rel=1e-12)
    # torchmetrics.image.kid.poly_mmd on the first three rows of each
    assert kid(x[:3], y[:3]) == pytest.approx(TORCHMETRICS, rel=1e-9)


def test_kid_of_pairs_leaves_partners_out() -> None:
    x = torch.tensor(np.random.default_rng(3).normal(size=(40, 4)))
    assert kid(x, x) < -0.05, "each row meets itself across the sets but not within one"
    assert kid(x, x, paired=True) == pytest.approx(0, abs=1e-9)
    assert kid(x, x + 1, paired=True) > 1
    with pytest.raises(InputError, match="40 rows against 39; expected pairs"):
        kid(x, x[1:], paired=True)


TORCHMETRICS = 5.649272499245839


def vae() -> AutoencoderKL:
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return AutoencoderKL(**blocks, block_out_channels=[8, 16], norm_num_groups=4, latent_channels=4).eval()


def test_features_of_the_vae_see_a_change() -> None:
    noise, near, ramp = pictures()
    encoder = vae_features(vae())
    features = pictures_to_features([noise, near, ramp], encoder, batch=2)
    assert features.shape == (3, 32)
    apart = torch.cdist(features, features)
    assert apart[0, 1] < apart[0, 2]
    with pytest.raises(InputError, match="no encoder"):
        vae_features(torch.nn.Linear(1, 1))


def test_fidelity_of_a_set() -> None:
    noise, near, ramp = pictures()
    latents = torch.rand(3, 2, 4, 5, 5)
    result = fidelity([near, ramp], [noise, ramp], latents=(latents * 1.1, latents), encoder=lambda p: p.mean((2, 3)))
    assert (result.pictures, result.identical) == (2, 0.5)
    assert result.psnr == pytest.approx(21.056404512541146)
    assert result.ssim == pytest.approx((0.9515833492717153 + 1) / 2)
    assert result.curve is not None and result.curve.relative == pytest.approx((0.1,) * 3)
    assert result.latent_psnr == result.curve.psnr[-1]
    assert result.kid is not None and result.fid is None  # two pictures, three features
    stored = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert "not comparable" in stored["features"] and stored["curve"]["step"] == [1, 2, 3]
    same = fidelity([noise], [noise])
    assert same.psnr == math.inf and same.to_json()["psnr"] is None and same.to_json()["identical"] == 1.0


def test_bad_input_is_named() -> None:
    noise, near, _ = pictures()
    with pytest.raises(InputError, match="40 x 48 and 40 x 47"):
        psnr(noise, near[1:])
    with pytest.raises(InputError, match="expected uint8"):
        ssim(noise.astype(float), near)
    with pytest.raises(InputError, match="11 x 11"):
        ssim(noise[:8], near[:8])
    with pytest.raises(InputError, match="2 pictures against 1"):
        fidelity([noise, noise], [noise])
    with pytest.raises(InputError, match="one encoder"):
        kid(torch.zeros(4, 3), torch.zeros(4, 2))
    with pytest.raises(InputError, match="two or more"):
        fid(torch.zeros(1, 3), torch.zeros(4, 3))
