"""from_pretrained of diffusers and transformers loads packed folders after `import core`, and refuses harmed ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import core
from core.export.diffusers_quantizer import save_packed
from core.export.pack_checkpoint import pack_checkpoint
from core.export.packed import write_manifest
from core.export.when_imported import when_imported
from core.kit import InputError
from core.quantization.packed import PackedConv2d, PackedEmbedding, PackedLinear, packed_layers
from tests.core.tiny_pipeline import load_pipeline, picture, save_tiny

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    pack_checkpoint(source, tmp_path / "packed", ["unet.conv_in=16", "*=8"], quiet=True)
    return tmp_path / "packed"


QUIET = """
import sys, core
print([name for name in ("diffusers", "transformers", "peft") if name in sys.modules])
import diffusers.quantizers.auto as auto
print("fitkit" in auto.AUTO_QUANTIZER_MAPPING)
"""


def test_importing_core_imports_neither_library_and_torchao_is_not_mentioned_when_they_are() -> None:
    run = subprocess.run([sys.executable, "-c", QUIET], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.stdout.split("\n")[:2] == ["[]", "True"], run.stderr
    assert "torchao" not in run.stderr


def test_what_waits_for_an_import_acts_after_it_or_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "waited_for.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[int] = []
    when_imported("waited_for", lambda module: seen.append(module.value))
    assert seen == []
    import waited_for

    assert seen == [1]
    assert type(waited_for.__loader__).__name__ == type(waited_for.__spec__.loader).__name__ == "SourceFileLoader"
    when_imported("waited_for", lambda module: seen.append(module.value + 1))
    assert seen == [1, 2]
    monkeypatch.delitem(sys.modules, "waited_for")


def test_pipeline_loads_packed_and_draws_what_the_original_draws(source: Path, folder: Path) -> None:
    pipe, original = load_pipeline(folder), load_pipeline(source)
    assert isinstance(pipe.unet.conv_in, nn.Conv2d) and not isinstance(pipe.unet.conv_in, PackedConv2d)
    assert isinstance(pipe.unet.conv_out, PackedConv2d)
    assert isinstance(pipe.vae.decoder.conv_in, PackedConv2d)
    assert isinstance(pipe.text_encoder.encoder.layers[0].mlp.fc1, PackedLinear)
    assert isinstance(pipe.text_encoder.embeddings.token_embedding, PackedEmbedding)
    for part in PARTS:
        for name, layer in packed_layers(getattr(pipe, part)).items():
            assert (layer.weight_packed.dtype, layer.weight_scale.dtype) == (torch.uint8, torch.float16)
            kept = getattr(original, part).get_submodule(name).weight
            step = layer.weight_scale.float().abs().max()
            # half a step by rounding, a whole one at the end of the range that is a step nearer to zero, and
            # up to 128 steps of a scale that FP16 has rounded by a part in 2048
            assert (layer.dequantized(torch.float32) - kept).abs().max() <= 1.07 * step
    assert pipe.text_encoder.dtype == pipe.unet.dtype == torch.float32
    assert np.abs(picture(pipe) - picture(original)).max() < 0.02


def test_the_folder_does_not_tell_where_its_parts_were_loaded_from(folder: Path, tmp_path: Path) -> None:
    save_packed(load_pipeline(folder), tmp_path / "again")
    configs = sorted((tmp_path / "again").glob("*/config.json"))
    assert len(configs) >= 3 and not [file for file in configs if "_name_or_path" in file.read_text()]
    load_pipeline(tmp_path / "again")


def test_half_precision_is_of_the_computation_and_not_of_the_scales(folder: Path) -> None:
    pipe = load_pipeline(folder, dtype=torch.bfloat16)
    assert pipe.unet.conv_in.weight.dtype == pipe.text_encoder.dtype == torch.bfloat16
    kinds = {buffer.dtype for layer in packed_layers(pipe.unet).values() for buffer in layer.buffers()}
    assert kinds == {torch.uint8, torch.float16}
    assert np.isfinite(picture(pipe)).all()


def test_saved_again_it_is_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(folder)
    before = pipe.unet.config, pipe.text_encoder.config.quantization_config
    save_packed(pipe, tmp_path / "again", {"made_by": "a test"})
    assert (pipe.unet.config, pipe.text_encoder.config.quantization_config) == before
    first, second = load_pipeline(folder), load_pipeline(tmp_path / "again")
    for part in PARTS:
        states = [getattr(p, part).state_dict() for p in (first, second)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    written = json.loads((tmp_path / "again/unet/config.json").read_text())["quantization_config"]
    assert written == json.loads((folder / "unet/config.json").read_text())["quantization_config"]


def carry(pipe: Any) -> dict[str, int]:
    """A low-rank term for some layers of both libraries' models; {component and layer: rank}."""
    draws = torch.Generator().manual_seed(3)
    ranks = {"unet.conv_out": 2, "unet.mid_block.resnets.0.conv1": 4, "text_encoder.encoder.layers.0.mlp.fc1": 3}
    for name, rank in ranks.items():
        part, _, path = name.partition(".")
        layer = getattr(pipe, part).get_submodule(path)
        rows, length = layer.weight_shape[0], layer.weight_shape[1:].numel()
        a = 0.1 * torch.randn(rank, length, generator=draws)
        layer.add_low_rank(a, 0.1 * torch.randn(rows, rank, generator=draws))
    return ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_low_rank_terms_are_in_the_folder_and_come_back(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    pipe = load_pipeline(folder)
    plain = picture(pipe)
    ranks = carry(pipe)
    expected = picture(pipe)
    assert np.abs(expected - plain).max() > 1e-3
    save_packed(pipe, tmp_path / "out")
    again = load_pipeline(tmp_path / "out", dtype=dtype)
    for part in PARTS:
        layers = json.loads((tmp_path / "out" / part / "config.json").read_text())["quantization_config"]["layers"]
        told = {f"{part}.{name}": record["rank"] for name, record in layers.items() if "rank" in record}
        assert told == {name: rank for name, rank in ranks.items() if name.startswith(part)}
        buffers = [
            {f"{n}.{k}": v for n, m in packed_layers(getattr(p, part)).items() for k, v in m.named_buffers()}
            for p in (pipe, again)
        ]
        assert buffers[0].keys() == buffers[1].keys()
        assert all(v.dtype == buffers[1][k].dtype and torch.equal(v, buffers[1][k]) for k, v in buffers[0].items())
    if dtype == torch.float32:
        assert np.array_equal(picture(again), expected)
        save_packed(again, tmp_path / "more")
        for part in PARTS:
            files = [next((tmp_path / out / part).glob("*.safetensors")).read_bytes() for out in ("out", "more")]
            assert files[0] == files[1]


@pytest.mark.parametrize("part", PARTS)
def test_changed_bytes_are_refused_and_the_file_named(folder: Path, part: str) -> None:
    file = next((folder / part).glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(InputError, match=f"{part}/{file.name}.*sha256"):
        load_pipeline(folder)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("harm", ["missing", "cut"])
def test_missing_bytes_are_refused_and_the_file_named(folder: Path, part: str, harm: str) -> None:
    file = next((folder / part).glob("*.safetensors"))
    data = file.read_bytes()
    file.unlink()
    if harm == "cut":
        file.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=f"{part}/{file.name}: (missing|.* bytes, expected)"):
        load_pipeline(folder)


def test_other_files_of_the_folder_are_checked_too(folder: Path) -> None:
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(path.read_text().replace("0.02", "0.03"))
    with pytest.raises(InputError, match="scheduler_config.json"):
        load_pipeline(folder)


def test_without_a_manifest_it_is_refused(folder: Path) -> None:
    (folder / "fitkit.json").unlink()
    with pytest.raises(InputError, match="fitkit.json is missing"):
        load_pipeline(folder)


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        ({"conv_out": {"bits": 9, "group_size": 64}}, "'conv_out': expected bits of 2 to 8"),
        ({"conv_out": {"bits": 4}}, "positive group_size"),
        ({"conv_out": {"bits": 8, "group_size": 64, "rank": 0}}, "'conv_out': rank is 0, expected 1 or more"),
        ({"no.such": {"bits": 4, "group_size": 64}}, "'no.such' is not in UNet2DConditionModel"),
        ({"conv_norm_out": {"bits": 4, "group_size": 64}}, "expected nn.Linear"),
        ([], "'layers': expected an object"),
    ],
    ids=["bits", "group", "rank", "name", "norm", "kind"],
)
def test_a_config_that_does_not_fit_is_refused(folder: Path, layers: object, why: str) -> None:
    path = folder / "unet/config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["layers"] = layers
    path.write_text(json.dumps(config))
    write_manifest(folder, {})
    with pytest.raises(InputError, match=why):
        load_pipeline(folder)


def test_removed_blocks_stay_removed(source: Path, tmp_path: Path) -> None:
    from core.pruning.bypass import bypass, bypassed

    pipe = load_pipeline(source)
    names = ["down_blocks.0.attentions.0"]
    bypass(pipe.unet, names)
    expected = picture(pipe)
    save_packed(pipe, tmp_path / "out")
    again = load_pipeline(tmp_path / "out")
    assert bypassed(again.unet) == names
    assert np.abs(picture(again) - expected).max() < 2e-3  # the weights are FP16 on disk


def test_importing_core_last_is_as_good() -> None:
    import diffusers.quantizers.auto as of_diffusers
    import transformers.quantizers.auto as of_transformers

    assert core.__name__ == "core"
    assert "fitkit" in of_diffusers.AUTO_QUANTIZER_MAPPING and "fitkit" in of_transformers.AUTO_QUANTIZER_MAPPING
