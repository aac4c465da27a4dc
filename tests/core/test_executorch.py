from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.export import executorch, plain
from core.export.executorch import ExecuTorchModule, layer_precisions, to_executorch
from core.export.parity import ParityError
from core.kit import InputError

needs_executorch = pytest.mark.skipif(
    importlib.util.find_spec("executorch") is None, reason="the extra `phone` is not installed"
)


class Block(nn.Module):
    """The operators of a diffusion model's block that XNNPACK does not know, and those that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 32, 3, padding=1)
        self.norm = nn.GroupNorm(4, 32)
        self.linear = nn.Linear(32, 64)
        self.layer_norm = nn.LayerNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        h = F.interpolate(F.silu(self.norm(self.conv(x))), scale_factor=2.0, mode="nearest")
        a, b = self.layer_norm(self.linear(h.flatten(2).transpose(1, 2))).chunk(2, -1)
        return F.scaled_dot_product_attention(a, b, a)


def test_plain_operators_are_torch_s() -> None:
    x, weight, bias = torch.randn(2, 12, 5, 4) + 3, torch.randn(12), torch.randn(12)
    torch.testing.assert_close(plain.group_norm(x, 3, weight, bias), F.group_norm(x, 3, weight, bias))
    torch.testing.assert_close(plain.group_norm(x, 4, eps=1e-6), F.group_norm(x, 4, eps=1e-6))
    y = torch.randn(2, 7, 12)
    torch.testing.assert_close(plain.layer_norm(y, (12,), weight, bias), F.layer_norm(y, (12,), weight, bias))
    torch.testing.assert_close(plain.upsample(x, None, (2.0, 2.0)), F.interpolate(x, scale_factor=2.0))
    torch.testing.assert_close(plain.upsample(x, (15, 4), None), F.interpolate(x, size=(15, 4)))
    assert plain.upsample(x, (7, 4), None) is NotImplemented  # not a whole factor: left to the operator itself
    for found, wanted in zip(plain.split(y, 5, 1), torch.split(y, 5, 1), strict=True):
        torch.testing.assert_close(found, wanted)


def test_plain_mean_keeps_float32_precision_over_a_large_picture() -> None:
    # a sum of a million float32 numbers one after the other loses four digits; sums of sums keep six
    values = torch.rand(1, 4, 512, 512) + 100
    found = plain.mean(values, values.shape[1:])
    assert abs(found.item() - values.double().mean().item()) < 1e-6 * 100


@pytest.mark.parametrize("causal", [False, True])
def test_plain_attention_is_torch_s(causal: bool) -> None:
    q, k, v = (torch.randn(2, 3, n, 8) for n in (5, 5, 5))
    found = plain.attention(q, k, v, causal=causal, scale=0.3)
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.3)
    torch.testing.assert_close(found, wanted)
    mask = torch.rand(1, 1, 5, 5) > 0.3
    mask[..., 0] = True
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(plain.attention(q, k, v, mask), wanted)


def test_precision_of_every_layer_is_told() -> None:
    model = nn.Sequential(
        nn.Embedding(5, 32), nn.Linear(32, 8), nn.Linear(8, 8), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=4)
    )
    found = layer_precisions(model, "int4", 32)
    assert found == {
        "0": "float32: XNNPACK has no embedding",
        "1": "int4, groups of 32",
        "2": "int8: 8 inputs are no multiple of 32",
        "3": "int8: XNNPACK has no INT4 convolution",
        "4": "float32: XNNPACK has no depthwise convolution with activations quantized as they come",
    }
    assert set(layer_precisions(model, "float", 32).values()) == {"float32"}


@needs_executorch
def test_float_block_runs_in_xnnpack_but_for_nothing(tmp_path: Path) -> None:
    model, x = Block().train(), torch.randn(1, 4, 4, 4)
    path = tmp_path / "block.pte"
    found = to_executorch(model, (x,), path)
    assert model.training  # as it was
    assert found.error[0].max_abs <= 1e-5 * found.error[0].peak
    assert found.delegated > 30 and found.subgraphs <= 2
    assert not any("norm" in name or "upsample" in name or "split" in name for name in found.left)
    assert found.bytes == path.stat().st_size and set(found.layers.values()) == {"float32"}
    module = ExecuTorchModule(path)
    torch.testing.assert_close(module(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"shapes \[\(2, 4, 4, 4\)\] given, the \.pte takes \[\(1, 4, 4, 4\)\]"):
        module(torch.randn(2, 4, 4, 4))


@needs_executorch
def test_int4_linear_is_torchao_s_to_the_last_bit_but_rounding(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(64, 128)).eval(), torch.randn(3, 64)
    found = to_executorch(model, (x,), tmp_path / "int4.pte", weights="int4")
    plain_file = to_executorch(model, (x,), tmp_path / "float.pte")
    assert found.parity[0].sqnr > 60
    assert 15 < found.error[0].sqnr < 30  # 4 bits in groups of 32
    assert found.layers == {"0": "int4, groups of 32"}
    assert found.stored == {"int4": {"layers": 1, "weights": 64 * 128}}  # read from the file
    assert plain_file.stored == {"float32": {"layers": 1, "weights": 64 * 128}}
    assert plain_file.bytes - found.bytes > 0.7 * 64 * 128 * 4  # 4 bytes fall to a half and scales
    assert found.to_json()["error"][0]["relative"] == pytest.approx(
        found.error[0].max_abs / found.error[0].peak, rel=0.01
    )


@needs_executorch
@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantized_convolution_behind_a_norm_runs(weights: str, tmp_path: Path) -> None:
    found = to_executorch(Block().eval(), (torch.randn(1, 4, 4, 4),), tmp_path / "q.pte", weights=weights)  # type: ignore[arg-type]
    assert found.parity[0].sqnr > 25
    assert found.layers["conv"].startswith("int8")
    assert found.stored[weights]["weights"] >= 32 * 64  # the Linear layer
    assert found.stored["int8"]["weights"] >= 32 * 4 * 9  # the convolution, which has no 4-bit kernel


@needs_executorch
def test_disagreement_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="output 0 of ExecuTorch disagrees with torch"):
        to_executorch(nn.Linear(32, 8).eval(), (torch.randn(1, 32),), tmp_path / "x.pte", tolerance=-1.0)


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    model, x = nn.Linear(32, 8), (torch.randn(1, 32),)
    with pytest.raises(InputError, match="weights 'int2'; expected one of float, int8, int4"):
        to_executorch(model, x, tmp_path / "a.pte", weights="int2")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="group_size 48; XNNPACK takes multiples of 32"):
        to_executorch(model, x, tmp_path / "a.pte", weights="int4", group_size=48)
    with pytest.raises(InputError, match=r"expected a name that ends with \.pte"):
        to_executorch(model, x, tmp_path / "a.bin")


def test_without_the_extra_one_line_tells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(_: str) -> str:
        raise ModuleNotFoundError

    monkeypatch.setattr(executorch, "installed", absent)
    with pytest.raises(InputError, match=r"ExecuTorch is not installed; pip install 'fitkit\[phone\]'"):
        to_executorch(nn.Linear(32, 8), (torch.randn(1, 32),), tmp_path / "a.pte")
