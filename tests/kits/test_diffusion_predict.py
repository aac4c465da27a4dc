"""What `fitkit predict mobile_diffusion` leaves and refuses, and its plan of memory."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from core.cli import main
from core.export.diffusers_quantizer import save_packed
from core.hardware.memory_plan import choose
from core.kit import InputError
from core.quantization.folding import replace_module
from core.quantization.packed import pack_module, packed_layers
from kits.mobile_diffusion.generate import generate
from kits.mobile_diffusion.memory import plan_generation, skeleton
from kits.mobile_diffusion.model.architectures import build
from kits.mobile_diffusion.model.pipeline import Diffusion, load_diffusion, save_diffusion
from kits.mobile_diffusion.predict import add_arguments, check, contact_sheet, parse_size, predict, read_prompts

PROMPT = "a red circle left of a blue square"


def options(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(given)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "original"
    save_diffusion(build("toy"), folder)
    return folder


@pytest.fixture(scope="module")
def packed(original: Path) -> Path:
    """All its Linear layers and convolutions in 4 bits."""
    model = load_diffusion(original)
    for part in (model.text_encoder, model.unet, model.vae):
        for name, module in list(part.named_modules()):
            if type(module) in (nn.Linear, nn.Conv2d):
                replace_module(part, module, pack_module(module, 4, 64, name=name))
    folder = original.parent / "packed"
    save_packed(model.pipeline(), folder)
    return folder


def test_leaves_pictures_and_json(packed: Path, original: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a green triangle\n\n  three yellow circles \n", encoding="utf-8")
    out = tmp_path / "out"
    given = options("--seed", "7", "--steps", "2", "--guidance", "3", "--original", str(original))
    text = predict(packed, [PROMPT, str(prompts)], {}, out, given)
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert [p["prompt"] for p in results["pictures"]] == [PROMPT, "a green triangle", "three yellow circles"]
    assert (results["steps"], results["guidance"], results["size"]) == (2, 3.0, [64, 64])
    for record in results["pictures"]:
        assert record["sha256"] == hashlib.sha256((out / record["file"]).read_bytes()).hexdigest()
        assert record["seed"] == 7 and record["seconds"] > 0
        assert cv2.imread(str(out / record["file"])).shape == (64, 64, 3)
        assert 0 < record["ssim"] <= 1
    assert results["pictures"][0]["file"] == "000-a-red-circle-left-of-a-blue-square.png"
    sheet = cv2.imread(str(out / "contact_sheet.png"))
    assert sheet.shape[1] > 2 * 256
    assert results["memory"]["plan"]["peak"] > 0
    assert str(out) in text and "SSIM" in text


def test_the_picture_is_that_of_generate(packed: Path, tmp_path: Path) -> None:
    """Loaded or named by its folder, and whatever way the plan takes."""
    model = load_diffusion(packed)
    (expected,) = generate(model, [PROMPT], seeds=7, steps=2, guidance=3.0)
    given = options("--seed", "7", "--steps", "2", "--guidance", "3")
    for name, source in {"loaded": model, "folder": packed}.items():
        predict(source, [PROMPT], {}, tmp_path / name, given)
        (file,) = (tmp_path / name).glob("*.png")
        drawn = cv2.imread(str(file))[:, :, ::-1]
        assert np.abs(drawn.astype(int) - expected).max() <= 1


def test_meta_gives_steps_and_guidance(packed: Path, tmp_path: Path) -> None:
    predict(packed, [PROMPT], {"steps": 1, "guidance": 1.0}, tmp_path, options())
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert (results["steps"], results["guidance"]) == (1, 1.0)


def test_memory_limit(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"memory limit 10 MB: the leanest way needs ~\d+ MB, "):
        predict(packed, [PROMPT], {}, tmp_path / "none", options("--memory-limit", "10MB"))
    assert not (tmp_path / "none").exists()
    predict(packed, [PROMPT], {}, tmp_path / "some", options("--memory-limit", "20GB", "--steps", "1"))
    memory = json.loads((tmp_path / "some" / "results.json").read_text(encoding="utf-8"))["memory"]
    assert memory["limit"] == 20_000_000_000
    assert memory["plan"]["way"] == "expanded to float"


def test_ways_go_from_fast_to_lean(packed: Path) -> None:
    plans = list(plan_generation(packed, size=(256, 256), guidance=3.0, batch=2))
    assert plans[0].way.expanded and not plans[-1].way.expanded
    assert plans[-1].way.rows == 1 and plans[-1].way.tile == 16 and plans[-1].way.release
    lean = min(plans, key=lambda plan: plan.peak)
    assert lean.peak <= plans[0].peak  # alike where this process has held more before than any way needs
    assert choose(plans, plans[0].peak) == plans[0]
    single = list(plan_generation(packed, size=(64, 64), guidance=1.0))
    assert all(plan.way.rows is None and plan.way.tile is None for plan in single)


def test_skeleton_is_the_model_without_data(packed: Path) -> None:
    model = load_diffusion(packed)
    for shape in (skeleton(packed), skeleton(model)):
        for name in ("text_encoder", "unet", "vae"):
            ours, theirs = getattr(shape, name), getattr(model, name)
            assert {k: (v.shape, v.dtype) for k, v in ours.state_dict().items()} == {
                k: (v.shape, v.dtype) for k, v in theirs.state_dict().items()
            }
            assert list(packed_layers(ours)) == list(packed_layers(theirs))
            assert all(t.is_meta for t in (*ours.parameters(), *ours.buffers()))
    assert not any(t.is_meta for t in model.parameters())


def test_prompts(tmp_path: Path) -> None:
    assert read_prompts([" a red circle "]) == ["a red circle"]
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text("\n \n", encoding="utf-8")
    latin.write_bytes("ein gr\xfcner Kreis".encode("latin-1"))
    for bad, why in (
        ([""], "empty prompt"),
        ([str(tmp_path / "none.txt")], "no such file"),
        ([str(empty)], "no prompts in it"),
        ([str(latin)], "not UTF-8"),
    ):
        with pytest.raises(InputError, match=why):
            check(bad)


def test_sizes() -> None:
    assert parse_size(None) is None
    assert parse_size("512") == (512, 512)
    assert parse_size("768x512") == (512, 768)
    for bad in ("", "large", "512*512", "-64", "64x"):
        with pytest.raises(InputError, match="--size"):
            parse_size(bad)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["--size", "100"], "the nearest is 96"),
        (["--guidance", "-2"], "guidance -2"),
        (["--memory-limit", "lots"], "memory limit 'lots'"),
        (["--lora", "none.safetensors"], "no such file"),
    ],
)
def test_refused_in_one_line(model: Diffusion, tmp_path: Path, given: list[str], why: str) -> None:
    with pytest.raises(InputError, match=why) as caught:
        predict(model, [PROMPT], {}, tmp_path / "out", options(*given))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", ["--seed -1", "--seed 9223372036854775808", "--steps 0", "--steps x", "--batch 0"])
def test_numbers_are_refused_before_any_model_is_read(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FITKIT_CACHE", str(tmp_path / "cache"))
    assert main(["predict", "mobile_diffusion", PROMPT, *given.split(), "--out", str(tmp_path / "out")]) == 2
    option, value = given.split()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("fitkit: ") and option in line and value in line
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def model() -> Diffusion:
    return build("toy")


def test_a_lora_of_another_architecture_is_refused(model: Diffusion, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file(
        {f"{layer}.lora_A.weight": torch.zeros(4, 320), f"{layer}.lora_B.weight": torch.zeros(320, 4)},
        tmp_path / "other.safetensors",
    )
    with pytest.raises(InputError, match="another architecture"):
        predict(model, [PROMPT], {}, tmp_path / "out", options("--lora", str(tmp_path / "other.safetensors")))


def test_contact_sheet_holds_every_pair() -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (64, 64, 3)).astype(np.uint8) for _ in range(5)]
    sheet = contact_sheet(["a prompt in Ünicode"] * 5, pictures, pictures[::-1])
    rows, cell = 3, 2 * 256 + 3 * 8
    assert sheet.shape == (rows * (256 + 54), 2 * cell, 3)
    large = cv2.resize(pictures[0], (256, 256), interpolation=cv2.INTER_NEAREST)
    assert np.array_equal(sheet[18:274, 8:264], large)
