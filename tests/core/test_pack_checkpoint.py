"""pack_checkpoint: the same numbers as packing in memory, whatever the files are called; resume; what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.export import checkpoint_plan
from core.export.checkpoint_plan import parse_rules, plan_pipeline
from core.export.pack_checkpoint import JOURNAL, pack_checkpoint
from core.export.packed import unfinished, verify
from core.kit import InputError
from core.quantization.packing import dequantize_rows, quantize_rows
from tests.core.tiny_pipeline import load_pipeline, save_tiny

ROOT = Path(__file__).resolve().parents[2]
RULES = ("unet.conv_in=16", "unet.*=4", "text_encoder.*.mlp.*=6", "vae.*=8")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copy"))


def pack(source: Path, out: Path, rules: tuple[str, ...] = RULES, **options):
    return pack_checkpoint(source, out, rules, quiet=True, **options)


def weights(folder: Path, part: str) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted((folder / part).glob("*.safetensors")) for n, t in load_file(file).items()}


@pytest.mark.parametrize("rounding", ["nearest", "mse"])
def test_weights_are_those_of_packing_in_memory(source: Path, tmp_path: Path, rounding) -> None:
    done = pack(source, tmp_path / "out", rounding=rounding, group_size=32)
    before, after = weights(source, "unet"), weights(tmp_path / "out", "unet")
    for name, value in before.items():
        module, _, leaf = name.rpartition(".")
        if f"{module}.weight_packed" in after and leaf == "weight":
            packed, scale = quantize_rows(value.flatten(1), 4, 32, rounding)
            assert torch.equal(after[f"{module}.weight_packed"], packed)
            assert torch.equal(after[f"{module}.weight_scale"], scale)
        else:
            assert torch.equal(after[name], value.half())
    assert "conv_in.weight" in after and "conv_out.weight_packed" in after
    linear = 2 * 2
    assert done.layers[6] == linear
    assert done.packed_bytes["unet"] == sum(f.stat().st_size for f in (tmp_path / "out/unet").iterdir())
    about = verify(tmp_path / "out")["about"]
    assert about["rules"] == list(RULES) and about["group_size"] == 32
    assert "unet.conv_out" not in about["shorter_last_group"]  # 32 x 9 weights are 9 groups of 32
    assert "vae.encoder.conv_in" in about["shorter_last_group"]  # 3 x 9 weights are less than one


def test_mse_has_less_error_than_nearest(source: Path, tmp_path: Path) -> None:
    weight, errors = weights(source, "unet")["conv_out.weight"].flatten(1), {}
    for rounding in ("nearest", "mse"):
        pack(source, tmp_path / rounding, rounding=rounding)
        found = weights(tmp_path / rounding, "unet")
        made = dequantize_rows(found["conv_out.weight_packed"], found["conv_out.weight_scale"], 4, 64, weight.shape[1])
        errors[rounding] = float((made - weight).square().sum())
    assert errors["mse"] < errors["nearest"]


def in_shards(folder: Path, stem: str, variant: str) -> None:
    """The component's one file as two, in FP16, named as the libraries name a variant's shards."""
    tensors = load_file(folder / f"{stem}.safetensors")
    (folder / f"{stem}.safetensors").unlink()
    mark = f".{variant}" if variant else ""
    names = sorted(tensors)
    where = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}{mark}-{number:05d}-of-00002.safetensors"
        save_file({n: tensors[n].half() for n in part}, folder / file)
        where.update(dict.fromkeys(part, file))
    (folder / f"{stem}.safetensors.index{mark}.json").write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize("variant", ["", "fp16"])
def test_shards_and_variants_give_the_same_weights(source: Path, copy: Path, tmp_path: Path, variant: str) -> None:
    in_shards(copy / "unet", "diffusion_pytorch_model", variant)
    if variant:
        file = copy / "vae/diffusion_pytorch_model.safetensors"
        file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    pack(copy, tmp_path / "out", ("vae.*=8",))
    found = weights(tmp_path / "out", "unet")
    assert all(torch.equal(found[n], t.half()) for n, t in weights(source, "unet").items())
    load_pipeline(tmp_path / "out")


def test_names_of_older_files_are_understood(source: Path, copy: Path, tmp_path: Path) -> None:
    """SD-1.5's own: "query" in the VAE's attention, "text_model." and a constant in the text encoder."""
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    file = copy / "vae/diffusion_pytorch_model.safetensors"
    renamed = {}
    for name, tensor in load_file(file).items():
        for new, older in old.items():
            name = name.replace(new, older)
        renamed[name] = tensor
    assert any(".query." in name for name in renamed)
    save_file(renamed, file)
    file = copy / "text_encoder/model.safetensors"
    named = {f"text_model.{n.removeprefix('text_model.')}": t for n, t in load_file(file).items()}
    save_file({**named, "text_model.embeddings.position_ids": torch.arange(16)[None]}, file)
    done = pack(copy, tmp_path / "old")
    pack(source, tmp_path / "new")
    assert done.left_out == ()
    for part in ("vae", "text_encoder"):
        first, second = weights(tmp_path / "old", part), weights(tmp_path / "new", part)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[n], second[n]) for n in first)


def test_many_files_load_as_one(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(source, tmp_path / "one")
    monkeypatch.setattr(checkpoint_plan, "SHARD_BYTES", 60_000)
    pack(source, tmp_path / "many")
    assert len(list((tmp_path / "many/unet").glob("*-of-*.safetensors"))) > 2
    first, second = load_pipeline(tmp_path / "one"), load_pipeline(tmp_path / "many")
    for part in ("unet", "vae", "text_encoder"):
        states = [getattr(p, part).state_dict() for p in (first, second)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])


KILLED = """
import os, signal, sys
from pathlib import Path
from core.export import checkpoint_plan, pack_checkpoint as module
checkpoint_plan.SHARD_BYTES = 60_000
add, count = module._Journal.add, [0]
def killed(self, file):
    add(self, file)
    count[0] += 1
    if count[0] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
module._Journal.add = killed
module.pack_checkpoint(sys.argv[1], sys.argv[2], ("unet.*=4", "vae.*=8"), quiet=True)
"""


def test_a_kill_keeps_finished_files_and_resume_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules, out = ("unet.*=4", "vae.*=8"), tmp_path / "out"
    run = subprocess.run([sys.executable, "-c", KILLED, str(source), str(out)], cwd=ROOT, timeout=600)
    assert run.returncode == -signal.SIGKILL and not out.exists()
    monkeypatch.setattr(checkpoint_plan, "SHARD_BYTES", 60_000)
    kept = sorted((unfinished(out) / "unet").glob("*.safetensors"))
    assert len(kept) == 3
    kept[0].write_bytes(b"torn by a power cut")
    times = {file.name: os.stat(file).st_mtime_ns for file in kept}
    pack(source, out, rules, resume=True)
    pack(source, tmp_path / "whole", rules)
    assert verify(out)["files"] == verify(tmp_path / "whole")["files"]
    assert not (out / JOURNAL).exists() and not unfinished(out).exists()
    same = [os.stat(out / "unet" / name).st_mtime_ns == time for name, time in times.items()]
    assert same == [False, True, True]


def test_resume_with_other_settings_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[pack_checkpoint.__module__], "_copy", full)
        with pytest.raises(InputError, match="the disk is full"):
            pack(source, out)
    with pytest.raises(InputError, match="other group_size"):
        pack(source, out, group_size=32, resume=True)
    pack(source, out, resume=True)
    verify(out)


def test_too_little_room_is_told_before_anything_is_read(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(InputError, match="no room"):
        pack(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("rule", "why"),
    [("unet.*", "expected PATTERN=BITS"), ("unet.*=9", "bits of 2 to 8"), ("unet.*=x", "bits"), ("=4", "PATTERN")],
)
def test_malformed_rules(rule: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        parse_rules([rule])


def test_a_rule_that_fits_nothing(source: Path) -> None:
    with pytest.raises(InputError, match=r"rule 'unnet.\*=4' fits no layer"):
        plan_pipeline(source, ["unnet.*=4"], 64)


def test_the_first_rule_that_fits_decides(source: Path) -> None:
    _, components = plan_pipeline(source, ["unet.mid_block.*=8", "unet.*=4"], 64)
    bits = {c.name: {name: layer["bits"] for name, layer in c.layers().items()} for c in components}
    assert bits["unet"]["mid_block.resnets.0.conv1"] == 8 and bits["unet"]["conv_in"] == 4
    assert bits["vae"] == bits["text_encoder"] == {}


def without(name: str):
    def harm(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return harm


def config(**changes: object):
    def harm(folder: Path) -> None:
        path = folder / "unet/config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return harm


def tensors(change):
    def harm(folder: Path) -> None:
        file = folder / "unet/diffusion_pytorch_model.safetensors"
        found = load_file(file)
        change(found)
        save_file(found, file)

    return harm


def index(**changes: object):
    def harm(folder: Path) -> None:
        path = folder / "model_index.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return harm


def pickled(folder: Path) -> None:
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))


def cut(folder: Path) -> None:
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def climbing(folder: Path) -> None:
    in_shards(folder / "unet", "diffusion_pytorch_model", "")
    path = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (without("model_index.json"), "model_index.json: missing"),
        (without("unet"), "unet: missing"),
        (without("unet/config.json"), "config.json: missing"),
        (without("unet/diffusion_pytorch_model.safetensors"), "no diffusion_pytorch_model.safetensors"),
        (without("tokenizer"), "tokenizer: none of"),
        (pickled, "only diffusion_pytorch_model.bin; save the pipeline with safe_serialization"),
        (cut, "not a whole safetensors file"),
        (climbing, "secret.safetensors' of weight_map is refused"),
        (index(_class_name="FluxPipeline"), "_class_name 'FluxPipeline'"),
        (index(unet=["diffusers", "UNet3DConditionModel"]), "component 'unet'"),
        (config(cross_attention_dim=64), "has shape .*, expected .* by"),
        (config(down_block_types=["NoBlock"]), "no UNet2DConditionModel can be made of it"),
        (config(quantization_config={"quant_method": "bitsandbytes"}), "quantized already"),
        (tensors(lambda t: t.pop("conv_in.bias")), "'conv_in.bias' is in none"),
        (tensors(lambda t: t["conv_in.bias"].fill_(1e6)), "beyond FP16"),
        (tensors(lambda t: t["conv_out.weight"][0].fill_(float("nan"))), "'conv_out.weight' holds NaN"),
    ],
    ids=[
        "index", "unet", "config", "weights", "tokenizer", "pickle", "cut", "climbing", "pipeline", "class", "shape",
        "architecture", "quantized", "tensor", "range", "nan",
    ],
)  # fmt: skip
def test_a_folder_that_does_not_fit_is_one_clear_line(copy: Path, tmp_path: Path, harm, why: str) -> None:
    harm(copy)
    with pytest.raises(InputError, match=why) as caught:
        pack(copy, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
