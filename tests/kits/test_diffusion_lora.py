"""A user's LoRA goes onto the packed pipeline, changes the picture, and comes off to the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from core.export.diffusers_quantizer import save_packed
from core.export.pack_checkpoint import pack_checkpoint
from core.kit import InputError
from core.quantization.packed import packed_layers
from kits.mobile_diffusion.lora import load_lora
from tests.core.tiny_pipeline import load_pipeline, picture, save_tiny


def make_lora(source: Path, out: Path) -> Path:
    """A LoRA in diffusers' format on the float pipeline's attention and feed-forward layers, by peft, B not zero."""
    from peft import LoraConfig, get_peft_model_state_dict

    pipe = load_pipeline(source)
    torch.manual_seed(1)
    layers = {}
    for part, targets in (("unet", ["to_q", "to_k", "to_v", "to_out.0", "conv1"]), ("text_encoder", ["q_proj", "fc1"])):
        model = getattr(pipe, part)
        model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False), "mine")
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(model, adapter_name="mine")
    type(pipe).save_lora_weights(out, **layers, safe_serialization=True)
    return out / "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = save_tiny(tmp_path_factory.mktemp("tiny"))
    return make_lora(source, tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = save_tiny(tmp_path_factory.mktemp("tiny")), tmp_path_factory.mktemp("out") / "packed"
    pack_checkpoint(source, out, ("unet.*=4", "text_encoder.*=4", "vae.*=8"), quiet=True)
    return out


def buffers(pipe: Any) -> dict[str, torch.Tensor]:
    """The packed bytes of all layers, copied."""
    found = {}
    for part in ("unet", "text_encoder", "vae"):
        for name, layer in packed_layers(getattr(pipe, part)).items():
            for kind, value in layer.named_buffers(recurse=False):
                found[f"{part}.{name}.{kind}"] = value.clone()
    return found


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[n].dtype == second[n].dtype and torch.equal(first[n], second[n]) for n in first
    )


@pytest.mark.parametrize("checked", [False, True], ids=["diffusers", "load_lora"])
def test_lora_changes_the_picture_and_unloads_to_the_same_bytes(packed: Path, lora: Path, checked: bool) -> None:
    pipe = load_pipeline(packed)
    bytes_before, before = buffers(pipe), picture(pipe)
    if checked:
        layers = {key.rpartition(".lora_")[0] for key in load_file(lora)}
        assert load_lora(pipe, lora) == len(layers)
    else:
        pipe.load_lora_weights(lora)
    with_lora = picture(pipe)
    assert np.abs(with_lora - before).max() > 1e-3
    pipe.unload_lora_weights()
    assert same(buffers(pipe), bytes_before)
    assert np.array_equal(picture(pipe), before)
    load_lora(pipe, lora)
    assert np.array_equal(picture(pipe), with_lora)


def test_lora_does_on_packed_layers_what_it_does_on_float_ones(packed: Path, lora: Path) -> None:
    """The same packed weights, once packed and once expanded: the adapter's part of the output is the same."""
    from core.quantization.packed import expand

    one, other = load_pipeline(packed), load_pipeline(packed)
    for part in ("unet", "text_encoder", "vae"):
        expand(getattr(other, part))
    load_lora(one, lora)
    load_lora(other, lora)
    assert np.abs(picture(one) - picture(other)).max() < 1e-4


def test_a_lora_goes_on_top_of_what_was_recovered_and_off_again(packed: Path, lora: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(packed)
    for name in ("mid_block.resnets.0.conv1", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"):
        layer = pipe.unet.get_submodule(name)
        draws = torch.Generator().manual_seed(5)
        a = 0.1 * torch.randn(4, layer.weight_shape[1:].numel(), generator=draws)
        layer.add_low_rank(a, 0.1 * torch.randn(layer.weight_shape[0], 4, generator=draws))
    save_packed(pipe, tmp_path / "out")
    pipe, plain = load_pipeline(tmp_path / "out"), load_pipeline(packed)
    before, bytes_before = picture(pipe), buffers(pipe)
    assert sum("low_rank" in name for name in bytes_before) == 4
    load_lora(pipe, lora)
    load_lora(plain, lora)
    with_lora = picture(pipe)
    assert np.abs(with_lora - before).max() > 1e-3 and np.abs(with_lora - picture(plain)).max() > 1e-3
    pipe.unload_lora_weights()
    assert same(buffers(pipe), bytes_before) and np.array_equal(picture(pipe), before)


def test_scale_weighs_the_lora(packed: Path, lora: Path) -> None:
    pipe = load_pipeline(packed)
    before = picture(pipe)
    load_lora(pipe, lora, scale=0.0)
    assert np.allclose(picture(pipe), before, atol=1e-6)


def test_a_pipeline_with_a_lora_is_not_saved_as_packed(packed: Path, lora: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(packed)
    load_lora(pipe, lora)
    with pytest.raises(InputError, match="unload_lora_weights"):
        save_packed(pipe, tmp_path / "out")


def test_a_lora_of_another_architecture_is_one_clear_line_and_changes_nothing(packed: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(packed)
    other = make_lora(save_tiny(tmp_path / "wide", cross=64), tmp_path / "lora")
    before, bytes_before = picture(pipe), buffers(pipe)
    with pytest.raises(InputError, match="another architecture: 64 inputs for .* which has 32 here") as caught:
        load_lora(pipe, other)
    assert "\n" not in str(caught.value)
    assert np.array_equal(picture(pipe), before) and same(buffers(pipe), bytes_before)


def edited(lora: Path, out: Path, change) -> Path:
    tensors = change(load_file(lora))
    save_file(tensors, out / "edited.safetensors")
    return out / "edited.safetensors"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: {n.replace("down_blocks.0", "down_blocks.9"): v for n, v in t.items()}, "no layer 'down_blocks.9"),
        (lambda t: {n: v * float("nan") for n, v in t.items()}, "holds NaN"),
        (lambda t: {"weights": torch.zeros(1)}, "no LoRA|not a LoRA"),
        (lambda t: {n.replace("unet.", "transformer."): v for n, v in t.items() if "unet" in n}, "no LoRA of a UNet"),
    ],
    ids=["layer", "nan", "other file", "other model"],
)
def test_files_that_do_not_fit(packed: Path, lora: Path, tmp_path: Path, change, why: str) -> None:
    pipe = load_pipeline(packed)
    with pytest.raises(InputError, match=why):
        load_lora(pipe, edited(lora, tmp_path, change))


def test_missing_damaged_and_pickled_files(packed: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(packed)
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 20)
    (tmp_path / "old.bin").write_bytes(b"")
    for name, why in (("none.safetensors", "no such file"), ("cut.safetensors", "whole"), ("old.bin", "expected a")):
        with pytest.raises(InputError, match=why):
            load_lora(pipe, tmp_path / name)
