from __future__ import annotations

import importlib.util
import json
import os
import shutil
import stat
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from core.figures import Figure, Figures, Gate
from core.kit import InputError
from core.quantization.packed import pack_module
from kits.mobile_diffusion import phone, phone_measure
from kits.mobile_diffusion.data.tokenizer import make_tokenizer
from kits.mobile_diffusion.model.pipeline import Diffusion, Sampling

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's exporter, about itself

needs_mnn = pytest.mark.skipif(importlib.util.find_spec("MNN") is None, reason="the extra `phone` is not installed")
needs_executorch = pytest.mark.skipif(
    importlib.util.find_spec("executorch") is None, reason="the extra `phone` is not installed"
)


def tiny(folder: Path, steps: int = 4, guidance: float = 3.0) -> Diffusion:
    """A Stable Diffusion of 16x16 pictures and random weights."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = make_tokenizer(folder)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=8, sample_size=16,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1,
    )  # fmt: skip
    return Diffusion(CLIPTextModel(text), unet, vae, tokenizer, DDIMScheduler(), Sampling(steps, guidance)).eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Diffusion:
    return tiny(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def exported(model: Diffusion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in MNN's format."""
    if importlib.util.find_spec("MNN") is None:
        pytest.skip("the extra `phone` is not installed")
    out = tmp_path_factory.mktemp("phone") / "files"
    phone.export_phone(model, out, formats=("mnn",), threads=1, seconds=0.05)
    return out


def test_parts_compute_what_the_pipeline_does(model: Diffusion) -> None:
    encoder, unet, decoder = phone.parts(model)
    ids = encoder.graph.inputs["token_ids"]
    assert ids.shape[0] == 2 and unet.calls == 4 and encoder.calls == decoder.calls == 1  # guided: two rows
    with torch.no_grad():
        torch.testing.assert_close(encoder.module(ids), model.encode(ids), rtol=1e-5, atol=1e-5)
        latents, timesteps, text = unet.graph.inputs.values()
        assert timesteps.dtype == torch.float32
        wanted = model.predict(latents, timesteps.long(), text)
        torch.testing.assert_close(unet.module(latents, timesteps, text), wanted, rtol=1e-5, atol=1e-5)
        z = decoder.graph.inputs["latents"]
        picture = model.vae.decode(z / model.vae.config.scaling_factor).sample
        torch.testing.assert_close(decoder.module(z), picture, rtol=1e-5, atol=1e-5)
    assert not isinstance(model.vae.encoder, torch.nn.Identity)  # the model itself is as it was


def test_packed_layers_are_expanded_and_said_to_be(tmp_path: Path) -> None:
    packed = tiny(tmp_path, guidance=1.0)
    layer = packed.unet.conv_in
    packed.unet.conv_in = pack_module(layer, 4, 36)
    _, unet, _ = phone.parts(packed)
    assert unet.weights_from == "expanded from packed layers: 1 of 4 bits"
    found = unet.module.get_submodule("unet.conv_in").weight
    torch.testing.assert_close(found, packed.unet.conv_in.dequantized(torch.float32))
    assert unet.graph.inputs["latents"].shape[0] == 1  # no guidance: one row


@needs_mnn
def test_folder_has_hashes_table_and_timing(exported: Path) -> None:
    manifest = phone_measure.read_manifest(exported)
    assert [(r["part"], r["weights"]) for r in manifest["table"]] == [
        (p, w) for p in ("text_encoder", "unet", "vae_decoder") for w in ("float", "int4")
    ]
    for part in ("text_encoder", "unet", "vae_decoder"):
        plain, int4 = (r for r in manifest["table"] if r["part"] == part)
        assert plain["relative"] < 1e-3 and plain["sqnr"] > 60
        assert int4["bytes"] < plain["bytes"] and 3 < int4["sqnr"] < 40
        assert int4["bytes"] == (exported / int4["file"]).stat().st_size
        timings = [t["name"] for t in manifest["timing"][part]["timings"]]
        assert timings == ["torch", "mnn-float", "mnn-int4"]
    assert set(manifest["table"][3]["layers"]) == {"int4"}  # the UNet's convolutions are INT4 too, all of them
    assert len(phone.text_table(manifest).splitlines()) == 7


@needs_mnn
def test_changed_and_missing_files_are_named(exported: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    file = copy / "mnn" / "unet-int4.mnn"
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    file.write_bytes(changed)
    with pytest.raises(phone_measure.MeasureError, match=r"unet-int4\.mnn: its bytes differ"):
        phone_measure.read_manifest(copy)
    file.unlink()
    with pytest.raises(phone_measure.MeasureError, match=r"unet-int4\.mnn: missing"):
        phone_measure.read_manifest(copy)


def test_wrong_names_are_refused(model: Diffusion, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="formats 'coreml'; expected some of executorch, mnn"):
        phone.export_phone(model, tmp_path / "out", formats=("coreml",))
    with pytest.raises(InputError, match="weights 'int2'"):
        phone.export_phone(model, tmp_path / "out", weights=("int2",))


@needs_executorch
@pytest.mark.slow
def test_executorch_runs_all_three_parts(model: Diffusion, tmp_path: Path) -> None:
    manifest = phone.export_phone(model, tmp_path / "out", formats=("executorch",), threads=1, seconds=0.05)
    rows = {(r["part"], r["weights"]): r for r in manifest["table"]}
    for part in ("text_encoder", "unet", "vae_decoder"):
        assert rows[part, "float"]["relative"] < 1e-4
        assert rows[part, "int4"]["parity"]["sqnr"] > 25  # against torch with the same integers
        assert rows[part, "int4"]["bytes"] < rows[part, "float"]["bytes"]
    unet = rows["unet", "float"]
    assert unet["delegated"] > 20 * sum(unet["left"].values())


# A phone made of a shell script: adb as far as the measurement uses it, over a folder in the place of the phone's.
ADB = """#!{python}
import json, os, shutil, subprocess, sys
root, words = os.environ["FAKE_PHONE"], sys.argv[1:]
here = lambda path: os.path.join(root, path.lstrip("/"))
if words[0] == "-s":
    words = words[2:]
if words[0] == "push":
    os.makedirs(os.path.dirname(here(words[2])), exist_ok=True)
    shutil.copyfile(words[1], here(words[2]))
elif words[0] == "pull":
    shutil.copyfile(here(words[1]), words[2])
elif words[0] == "shell":
    line = words[1].replace("/data/local/tmp", here("/data/local/tmp")).replace("/sys/class", here("/sys/class"))
    if line.startswith("getprop "):
        print(json.loads(os.environ["FAKE_PROPERTIES"]).get(line.split()[1], ""))
        sys.exit(0)
    sys.exit(subprocess.run(["sh", "-c", line]).returncode)
"""
# A runner that copies the expected output and tells times as executor_runner and ModuleBasic.out do.
EXECUTOR_RUNNER = """#!{python}
import os, sys, time
flags = dict(w[2:].split("=", 1) for w in sys.argv[1:])
n, part = int(flags["num_executions"]), flags["model_path"].removesuffix(".pte")
for name in flags["inputs"].split(","):
    assert os.path.getsize(name) > 0, name
time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
ms = {{"text_encoder": 5.0, "unet": 250.0, "vae_decoder": 95.0}}[part]
for i in range(n):
    print(f"I 00:00:00.1 executorch:executor_runner.cpp:1] Iteration {{i + 1}} of {{n}}: {{ms:.6f}} ms")
print(f"I 00:00:00.2 executorch:executor_runner.cpp:2] Model executed successfully {{n}} time(s) in {{ms * n:.6f}} ms.")
data = open(os.path.join(os.environ["FAKE_EXPECTED"], part, "expected.bin"), "rb").read()
open(flags["output_file"] + "-0.bin", "wb").write(bytes(len(data)) if os.environ.get("FAKE_WRONG") else data)
"""
MODULE_BASIC = """#!{python}
import array, json, os, sys
part = sys.argv[2]
names = [i["name"] for i in json.load(open(part + "/input.json"))["inputs"]]
assert all(open(f"{{part}}/{{n}}.txt").read().split() for n in names)
values = array.array("f")
values.frombytes(open(os.path.join(os.environ["FAKE_EXPECTED"], part, "expected.bin"), "rb").read())
open("output/0.txt", "w").write("\\n".join(map(repr, values)))
print("Avg= 40.000000 ms, min= 39.0 ms, max= 41.0 ms")
"""


class FakePhone:
    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root, self.patch = root, patch
        self.runners = {
            "executorch": self._program("executor_runner", EXECUTOR_RUNNER),
            "mnn": self._program("ModuleBasic.out", MODULE_BASIC),
        }
        self._program("bin/adb", ADB)
        patch.setenv("PATH", f"{root / 'bin'}:{os.environ['PATH']}")
        patch.setenv("FAKE_PHONE", str(root / "phone"))
        self.is_a("SM8550")

    def is_a(self, soc: str) -> None:
        properties = {"ro.product.model": "SM-S911B", "ro.soc.model": soc, "ro.build.version.release": "14"}
        self.patch.setenv("FAKE_PROPERTIES", json.dumps(properties))

    def battery(self, status: str, microamperes: int, microvolts: int) -> None:
        folder = self.root / "phone" / phone_measure.BATTERY.lstrip("/")
        folder.mkdir(parents=True)
        for name, value in (("status", status), ("current_now", microamperes), ("voltage_now", microvolts)):
            (folder / name).write_text(f"{value}\n")

    def _program(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.format(python=sys.executable))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakePhone]:
    yield FakePhone(tmp_path / "fake", monkeypatch)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as `export_phone` leaves it, with files of a few bytes."""
    out = tmp_path / "files"
    parts: dict[str, Any] = {}
    for part, inputs, calls in (
        ("text_encoder", ["token_ids"], 1),
        ("unet", ["latents", "timesteps", "text"], 50),
        ("vae_decoder", ["latents"], 1),
    ):
        for kind in ("executorch/{}-int4.pte", "mnn/{}-int4.mnn"):
            path = out / kind.format(part)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(part.encode())
        graph = phone.Graph(part, {n: torch.rand(2, 3) for n in inputs}, ("out",))
        phone._write_example(out / "examples" / part, graph, torch.rand(2, 3))
        parts[part] = {"calls": calls, "inputs": [{"name": n} for n in inputs]}
    manifest = {
        "format": phone_measure.FORMAT, "kind": phone_measure.KIND, "parts": parts, "files": phone.list_files(out),
        "picture": {"steps": 50}, "versions": {"executorch": "1.5.1", "mnn": "3.6.1"},
    }  # fmt: skip
    phone.write_manifest(out, manifest)
    monkeypatch.setenv("FAKE_EXPECTED", str(out / "examples"))
    return out


SECONDS = Gate("seconds for a picture on the phone", "picture_seconds", "<= 15.2", "s", device="snapdragon-8-gen-2")
POWER = Gate("power on the phone", "picture_power", "<= 3.1", "W", device="snapdragon-8-gen-2")


def test_measurement_through_adb_passes_the_gates(
    fake: FakePhone, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "0.8")
    fake.battery("Discharging", -700_000, 4_000_000)
    out = tmp_path / "phone.json"
    runner = str(fake.runners["executorch"])
    arguments = [str(folder), "--runner", runner, "--out", str(out), "--serial", "X1", "--repeats", "2"]
    monkeypatch.setattr(
        phone_measure.measure, "__kwdefaults__", {**phone_measure.measure.__kwdefaults__, "every": 0.05}
    )
    assert phone_measure.main(arguments) == 0
    figures = phone.measured(out, folder)
    seconds, power = figures.find("picture_seconds"), figures.find("picture_power")
    assert seconds is not None and power is not None
    assert seconds.value == pytest.approx((5.0 + 50 * 250.0 + 95.0) / 1000)  # 12.6 s
    assert power.value == pytest.approx(0.7 * 4.0)
    assert seconds.basis.device == "snapdragon-8-gen-2: SM-S911B (SM8550), Android 14"  # type: ignore[union-attr]
    assert SECONDS.judge(figures).verdict == "PASS"
    assert POWER.judge(figures).verdict == "PASS"
    assert "picture_seconds: 12.600 +- 0.000 s" in capsys.readouterr().out
    assert all(Figure.from_json(f).to_json() == f for f in json.loads(out.read_text())["figures"])


def test_another_phone_and_a_charging_battery_leave_the_gates_unproven(fake: FakePhone, folder: Path) -> None:
    fake.is_a("Tensor G3")
    fake.battery("Charging", 500_000, 4_000_000)
    record = phone_measure.measure(phone_measure.Phone(), folder, "executorch", fake.runners["executorch"], repeats=2)
    figures = Figures(Figure.from_json(f) for f in record["figures"])
    assert SECONDS.judge(figures).verdict == "UNPROVEN"
    assert POWER.judge(figures).why == "no figure 'picture_power' was produced"
    assert "the battery is charging, not discharging" in record["notes"][0]
    assert "gates on those stay UNPROVEN" in record["notes"][1]


def test_mnn_runner_and_its_output_are_read(fake: FakePhone, folder: Path) -> None:
    record = phone_measure.measure(phone_measure.Phone(), folder, "mnn", fake.runners["mnn"], repeats=2)
    assert record["parts"]["unet"]["ms"] == 40.0
    assert record["parts"]["unet"]["error"]["sqnr"] > 100
    assert record["figures"][0]["value"] == pytest.approx(52 * 0.040)
    assert record["notes"] == [f"no power: {phone_measure.BATTERY} cannot be read on this phone"]


def test_wrong_output_on_the_phone_is_refused(fake: FakePhone, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_WRONG", "1")
    with pytest.raises(phone_measure.MeasureError, match="text_encoder: the phone's output is 0.0 dB from torch's"):
        phone_measure.measure(phone_measure.Phone(), folder, "executorch", fake.runners["executorch"], repeats=2)


def test_measurement_of_other_files_is_not_taken_up(fake: FakePhone, folder: Path, tmp_path: Path) -> None:
    record = phone_measure.measure(phone_measure.Phone(), folder, "mnn", fake.runners["mnn"], repeats=2)
    record["artifact"] = "0" * 64
    path = tmp_path / "phone.json"
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match="measured other files"):
        phone.measured(path, folder)
    path.write_text("{}")
    with pytest.raises(InputError, match="no measurement"):
        phone.measured(path, folder)


def test_no_adb_and_no_runner_are_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert phone_measure.main([str(folder), "--runner", str(tmp_path / "none")]) == 2
    assert "build executor_runner for the phone" in capsys.readouterr().err
    (tmp_path / "executor_runner").touch()
    assert phone_measure.main([str(folder), "--runner", str(tmp_path / "executor_runner")]) == 2
    assert "adb: no such program" in capsys.readouterr().err


def test_deviation_is_the_closed_form() -> None:
    expected = array("f", [3.0, 4.0]).tobytes()
    found = phone_measure.deviation(expected, [3.0, 4.5])
    assert found["relative"] == pytest.approx(0.125)
    assert found["sqnr"] == pytest.approx(20.0)  # 10 log10(25 / 0.25)
    with pytest.raises(phone_measure.MeasureError, match="gave 2 values, not all finite"):
        phone_measure.deviation(expected, [float("nan"), 1.0])


def test_script_needs_nothing_but_python() -> None:
    import ast

    tree = ast.parse(Path(phone_measure.__file__).read_text(encoding="utf-8"))
    found = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    found |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {name.split(".")[0] for name in found} <= set(sys.stdlib_module_names)
