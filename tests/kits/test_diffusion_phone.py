from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import stat
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from core.figures import Estimated, Figure, Figures, Gate, Measured
from core.kit import InputError
from core.quantization.folding import replace_module
from core.quantization.packed import pack_module
from core.report import Report, judge
from kits.mobile_diffusion import phone, phone_measure, phone_report
from kits.mobile_diffusion.data.tokenizer import make_tokenizer
from kits.mobile_diffusion.fidelity import psnr
from kits.mobile_diffusion.generate import generate
from kits.mobile_diffusion.model.pipeline import Diffusion, Sampling, load_diffusion
from kits.mobile_diffusion.recipes import RECIPES

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
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)  # of others diffusers warns
    return Diffusion(CLIPTextModel(text), unet, vae, tokenizer, scheduler, Sampling(steps, guidance)).eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Diffusion:
    return tiny(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def exported(model: Diffusion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in MNN's format."""
    if importlib.util.find_spec("MNN") is None:
        pytest.skip("the extra `phone` is not installed")
    out = tmp_path_factory.mktemp("phone") / "files"
    phone.export_phone(model, out, formats=("mnn",))
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


def test_packed_folder_is_expanded_as_well(tmp_path: Path) -> None:
    packed = tiny(tmp_path / "tokenizer", guidance=1.0)
    for part in (packed.text_encoder, packed.unet):
        layer = next(m for m in part.modules() if type(m) is torch.nn.Linear)
        replace_module(part, layer, pack_module(layer, 4, 32))
    packed.save(tmp_path / "packed")
    loaded = load_diffusion(tmp_path / "packed")
    encoder, unet, _ = phone.parts(loaded)
    assert encoder.weights_from == unet.weights_from == "expanded from packed layers: 1 of 4 bits"
    with torch.no_grad():
        ids = encoder.graph.inputs["token_ids"]
        torch.testing.assert_close(encoder.module(ids), loaded.encode(ids), rtol=1e-5, atol=1e-5)


@needs_mnn
def test_folder_has_hashes_table_and_timing(exported: Path) -> None:
    manifest = phone_measure.read_manifest(exported)
    kinds = [("text_encoder", "int4"), ("unet", "int4"), ("vae_decoder", "int8")]  # as the recipes keep the decoder
    assert [(r["part"], r["weights"]) for r in manifest["table"]] == [(p, w) for p, k in kinds for w in ("float", k)]
    assert manifest["sets"]["int4"] == dict(kinds)
    for part, _ in kinds:
        plain, int4 = (r for r in manifest["table"] if r["part"] == part)
        assert plain["relative"] < 1e-3 and plain["sqnr"] > 60
        assert int4["bytes"] < plain["bytes"] and 3 < int4["sqnr"] < 60
        assert int4["bytes"] == (exported / int4["file"]).stat().st_size
    assert set(manifest["table"][3]["stored"]) == {"int4"}  # the UNet's convolutions are INT4 too, all of them
    assert len(phone.text_table(manifest).splitlines()) == 9
    run = phone.load_parts(exported, manifest["parts"], manifest["sets"]["int4"], "mnn")["text_encoder"]
    ids = torch.frombuffer(bytearray((exported / "examples/text_encoder/token_ids.bin").read_bytes()), dtype=torch.long)
    again = (exported / "examples" / "text_encoder" / "mnn-int4.bin").read_bytes()
    assert phone_measure.deviation(again, run(ids.reshape(2, -1)).flatten().tolist())["sqnr"] > 100
    assert (exported / "tokenizer" / "tokenizer_config.json").is_file()
    assert (exported / "scheduler" / "scheduler_config.json").is_file()


@needs_mnn
def test_exported_files_draw_torch_s_picture(exported: Path, model: Diffusion) -> None:
    manifest = phone_measure.read_manifest(exported)
    plain, int4 = manifest["pictures"]["drawn"]
    assert plain["psnr"] >= phone.LEAST_PSNR > 30 and int4["psnr"] < plain["psnr"]
    runs = phone.load_parts(exported, manifest["parts"], manifest["sets"]["float"], "mnn")
    drawn = phone.draw(model, runs, "a green square", 3)
    wanted = generate(model, ["a green square"], seeds=3)[0]
    assert psnr(drawn, wanted) >= phone.LEAST_PSNR
    assert psnr(drawn, generate(model, ["a green square"], seeds=4)[0]) < 30  # another picture is told apart


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


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_drawing_by_parts_is_diffusers_s_pipeline(guidance: float, tmp_path: Path) -> None:
    from diffusers import LCMScheduler

    model = tiny(tmp_path, 2, guidance)
    for scheduler in (model.scheduler, LCMScheduler(steps_offset=1)):  # LCM's steps draw noise of their own
        model.scheduler = scheduler
        runs = {part.graph.name: part.module for part in phone.parts(model)}
        drawn = phone.draw(model, runs, "a green square", 3)
        assert psnr(drawn, generate(model, ["a green square"], seeds=3)[0]) > 50


def test_source_of_a_diffusers_folder_and_of_a_training(tmp_path: Path) -> None:
    assert phone.source(tmp_path) == (tmp_path, {})
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").touch()
    assert phone.source(tmp_path) == (tmp_path / "model", {})
    with pytest.raises(InputError, match="holds no artifact"):
        phone.source(tmp_path, "int4-torch")


def test_wrong_names_are_refused(model: Diffusion, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="formats 'coreml'; expected some of executorch, mnn"):
        phone.export_phone(model, tmp_path / "out", formats=("coreml",))
    with pytest.raises(InputError, match="weights 'int2'"):
        phone.export_phone(model, tmp_path / "out", weights=("int2",))


@needs_executorch
@pytest.mark.slow
def test_executorch_runs_all_three_parts(model: Diffusion, tmp_path: Path) -> None:
    manifest = phone.export_phone(model, tmp_path / "out", formats=("executorch",))
    rows = {(r["part"], r["weights"]): r for r in manifest["table"]}
    for part, kind in manifest["sets"]["int4"].items():
        assert rows[part, "float"]["relative"] < 1e-4
        assert rows[part, kind]["parity"]["sqnr"] > 25  # against torch with the same integers
        assert rows[part, kind]["bytes"] < rows[part, "float"]["bytes"]
    drawn = {p["weights"]: p["psnr"] for p in manifest["pictures"]["drawn"]}
    assert drawn["float"] >= phone.LEAST_PSNR
    stored = rows["unet", "int4"]["stored"]
    assert stored["int4"]["layers"] > 5 and stored["int8"]["layers"] > 5  # Linear layers and convolutions
    unet = rows["unet", "float"]
    assert unet["delegated"] > 20 * sum(unet["left"].values())


# A phone made of a shell script: adb as far as the measurement uses it, over a folder in the place of the phone's.
ADB = """#!/bin/sh
[ "$1" = -s ] && shift 2
case $1 in
devices) printf 'List of devices attached\\n%b\\n' "$FAKE_DEVICES" ;;
push) mkdir -p "$(dirname "$FAKE_PHONE$3")" && cp "$2" "$FAKE_PHONE$3" ;;
pull) cp "$FAKE_PHONE$2" "$3" ;;
shell)
    line=$(printf %s "$2" | sed "s#/data/local/tmp#$FAKE_PHONE/data/local/tmp#g; s#/sys/class#$FAKE_PHONE/sys/class#g")
    case $line in
    "getprop ro.product.model") echo SM-S911B ;;
    "getprop ro.soc.model") echo "$FAKE_SOC" ;;
    "getprop "*) echo 14 ;;
    *) exec sh -c "$line" ;;
    esac ;;
esac
"""
# Runners that copy the expected output and tell times as executor_runner and ModuleBasic.out do.
EXECUTOR_RUNNER = """#!/bin/sh
for word in "$@"; do
    case $word in
    --model_path=*) part=${word#*=}; part=${part%.pte} ;;
    --inputs=*) inputs=$(echo "${word#*=}" | tr , ' ') ;;
    --num_executions=*) n=${word#*=} ;;
    --output_file=*) out=${word#*=}-0.bin ;;
    esac
done
for file in $inputs; do [ -s "$file" ] || exit 3; done
[ "$FAKE_FAIL" = "$part" ] && { echo 'Execution of method forward failed with status 0x12'; exit 134; }
ms=5; [ $part = unet ] && ms=$FAKE_MS && sleep ${FAKE_SECONDS:-0}; [ $part = vae_decoder ] && ms=95
echo "I 00:00:00.1 executorch:executor_runner.cpp:1] Iteration 1 of $n: $ms.000000 ms"
said="executed successfully ${FAKE_RUNS:-$n} time(s) in $((n * ms)).000000 ms."
[ -n "$FAKE_SILENT" ] || echo "I 00:00:00.2 executorch:executor_runner.cpp:2] Model $said"
expected=$FAKE_EXPECTED/$part/executorch-int4.bin
case $FAKE_OUTPUT in
wrong) tr '\\\\000-\\\\377' '\\\\000' < $expected > $out ;;
odd) head -c 5 $expected > $out ;;
short) head -c 4 $expected > $out ;;
none) ;;
*) cp $expected $out ;;
esac
"""
MODULE_BASIC = """#!{python}
import array, json, os, sys
part = sys.argv[2]
names = [i["name"] for i in json.load(open(part + "/input.json"))["inputs"]]
assert all(open(f"{{part}}/{{n}}.txt").read().split() for n in names)
values = array.array("f")
values.frombytes(open(os.path.join(os.environ["FAKE_EXPECTED"], part, "mnn-int4.bin"), "rb").read())
open("output/0.txt", "w").write("\\n".join(map(repr, values)) if not os.environ.get("FAKE_OUTPUT") else "nan?")
print("Avg= 40.000000 ms, min= 39.0 ms, max= 41.0 ms")
"""


class FakePhone:
    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.runners = {
            "executorch": self._program("executor_runner", EXECUTOR_RUNNER),
            "mnn": self._program("ModuleBasic.out", MODULE_BASIC.format(python=sys.executable)),
        }
        self._program("bin/adb", ADB)
        patch.setenv("PATH", f"{root / 'bin'}:{os.environ['PATH']}")
        patch.setenv("FAKE_PHONE", str(root / "phone"))
        for name, value in (("SOC", "SM8550"), ("DEVICES", r"X1\tdevice"), ("MS", "250")):
            patch.setenv(f"FAKE_{name}", value)

    def battery(self, status: str, microamperes: int, microvolts: int) -> None:
        folder = self.root / "phone" / phone_measure.BATTERY.lstrip("/")
        folder.mkdir(parents=True)
        for name, value in (("status", status), ("current_now", microamperes), ("voltage_now", microvolts)):
            (folder / name).write_text(f"{value}\n")

    def _program(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakePhone]:
    yield FakePhone(tmp_path / "fake", monkeypatch)


ARTIFACT = "a" * 64


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
        phone._write_example(out / "examples" / part, graph)
        for runtime in phone.FORMATS:
            (out / "examples" / part / f"{runtime}-int4.bin").write_bytes(phone._raw(torch.rand(2, 3)))
        parts[part] = {"calls": calls, "inputs": [{"name": n} for n in inputs]}
    manifest = {
        "sets": {"int4": {}},
        "format": phone_measure.FORMAT, "kind": phone_measure.KIND, "parts": parts, "files": phone.list_files(out),
        "origin": {"artifact": ARTIFACT, "variant": "int4-torch", "stage": "compressed"},
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
    monkeypatch.setenv("FAKE_SECONDS", "0.5")
    fake.battery("Discharging", -700_000, 4_000_000)
    out = tmp_path / "phone.json"
    runner = str(fake.runners["executorch"])
    arguments = [str(folder), "--runner", runner, "--out", str(out), "--serial", "X1", "--repeats", "2"]
    monkeypatch.setattr(
        phone_measure.measure, "__kwdefaults__", {**phone_measure.measure.__kwdefaults__, "every": 0.05}
    )
    assert phone_measure.main(arguments) == 0
    figures = phone_report.measured(out, folder)
    seconds, power = figures.find("picture_seconds"), figures.find("picture_power")
    assert seconds is not None and power is not None
    assert seconds.value == pytest.approx((5.0 + 50 * 250.0 + 95.0) / 1000)  # 12.6 s
    assert power.value == pytest.approx(0.7 * 4.0)
    assert seconds.basis.device == "snapdragon-8-gen-2: SM-S911B (SM8550), Android 14"  # type: ignore[union-attr]
    assert SECONDS.judge(figures).verdict == "PASS"
    assert POWER.judge(figures).verdict == "PASS"
    assert "picture_seconds: 12.600 +- 0.000 s" in capsys.readouterr().out
    assert all(Figure.from_json(f).to_json() == f for f in json.loads(out.read_text())["figures"])


def test_another_phone_and_a_charging_battery_leave_the_gates_unproven(
    fake: FakePhone, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SOC", "Tensor G3")
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


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("DEVICES", "", "adb sees no phone; plug it in"),
        ("DEVICES", r"X1\tdevice\nY2\tdevice", "adb sees several phones: X1, Y2; name one with --serial"),
        ("DEVICES", r"X1\tunauthorized", "phone X1 is unauthorized; unlock it"),
        ("DEVICES", r"X1\toffline", "phone X1 is offline"),
        ("FAIL", "unet", "failed with 134: Execution of method forward failed with status 0x12"),
        ("SILENT", "1", "executor_runner told no times; its last words: .*Iteration 1 of 1"),
        ("RUNS", "3", "executor_runner ran 3 times, 1 were asked for"),
        ("MS", "0", "executor_runner told no times"),
        ("OUTPUT", "wrong", "text_encoder: the phone's output is 0.0 dB from that of the same file on the computer"),
        ("OUTPUT", "odd", "text_encoder: text_encoder/out-0.bin of the phone is malformed"),
        ("OUTPUT", "short", "the phone gave 1 values, not all finite or not 6"),
        ("OUTPUT", "none", "pulling text_encoder/out-0.bin: failed with 1"),
    ],
)
def test_what_goes_wrong_on_the_way_is_one_line_and_leaves_no_file(
    variable: str, value: str, message: str, fake: FakePhone, folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv(f"FAKE_{variable}", value)
    out = tmp_path / "phone.json"
    arguments = [str(folder), "--runner", str(fake.runners["executorch"]), "--out", str(out)]
    assert phone_measure.main([*arguments, "--runs", "1", "--repeats", "2"]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert len(said.splitlines()) == 1 and not out.exists()


def test_phone_is_named_among_several(fake: FakePhone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_DEVICES", r"X1\toffline\nY2\tdevice")
    phone_measure.Phone("Y2").check()
    with pytest.raises(phone_measure.MeasureError, match="phone X1 is offline"):
        phone_measure.Phone("X1").check()
    with pytest.raises(phone_measure.MeasureError, match="--serial Z3: adb sees X1, Y2"):
        phone_measure.Phone("Z3").check()


def test_a_phone_that_does_not_answer_is_given_up(fake: FakePhone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phone_measure, "TIMEOUT", 0.2)
    with pytest.raises(phone_measure.MeasureError, match="no answer in 0.2 s"):
        phone_measure.Phone().run("sleep 5")
    gauge = phone_measure.Gauge(phone_measure.Phone())
    with pytest.raises(phone_measure.MeasureError, match="not done in 0.2 s; take fewer --runs"):
        phone_measure.run_watched(phone_measure.Phone(local=True), "exec sleep 5", gauge, 0.05)


def test_malformed_text_of_mnn_is_refused(fake: FakePhone, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_OUTPUT", "odd")
    with pytest.raises(phone_measure.MeasureError, match=r"text_encoder: output/0\.txt of the phone is malformed"):
        phone_measure.measure(phone_measure.Phone(), folder, "mnn", fake.runners["mnn"], repeats=2)


def run_with(folder: Path, artifact: str) -> Path:
    """A run's folder with a report whose gates on the phone are open, and a picture on its page."""
    here = Measured("this-host", "PyTorch", 3, None, artifact)
    guess = Estimated("roofline", ("device snapdragon-8-gen-2",), 0.5)
    figures = Figures([Figure("alignment", 90.0, "%", here), Figure("picture_seconds", 9.0, "s", guess)])
    report = judge(
        figures, (SECONDS, POWER), (), kit="mobile_diffusion", recipe=RECIPES["int4"], target="snapdragon-8-gen-2",
        pictures=[{"title": "a & b", "png": b"\x89PNG\r\n\x1a\n" + bytes(range(256))}],
    )  # fmt: skip
    assert [j.verdict for j in report.judgements] == ["UNPROVEN", "UNPROVEN"]
    report.save(folder)
    return folder


@pytest.mark.parametrize(("ms", "verdict"), [("250", "PASS"), ("350", "FAIL")])
def test_report_takes_the_measurement_and_judges_anew(
    ms: str, verdict: str, fake: FakePhone, folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("FAKE_MS", ms)
    run, out = run_with(tmp_path / "run", ARTIFACT), tmp_path / "phone.json"
    page = (run / "report.html").read_text()
    arguments = [str(folder), "--runner", str(fake.runners["executorch"]), "--out", str(out), "--repeats", "2"]
    assert phone_measure.main([*arguments, "--report", str(run)]) == 0
    assert f"{verdict:8} seconds for a picture on the phone: measured" in capsys.readouterr().out
    report = Report.load(run)
    assert [j.verdict for j in report.judgements] == [verdict, "UNPROVEN"]  # no gauge here: no power
    measured = report.figures.find("picture_seconds", kind="measured")
    assert measured is not None and measured.value == pytest.approx((100 + 50 * int(ms)) / 1000)
    assert report.figures.find("picture_seconds", kind="estimated") is not None  # stays beside it
    assert any(n.startswith("no power: ") for n in report.notes)
    picture = re.search(r'<img src="[^"]+" alt="[^"]+"', page)
    assert picture is not None and picture[0] in (run / "report.html").read_text()  # the page keeps its pictures
    before = (run / "report.json").read_text()
    assert phone_measure.main([str(folder), "--measured", str(out), "--report", str(run)]) == 0
    assert (run / "report.json").read_text() == before  # twice is as good as once


def test_report_of_another_model_is_left_alone(
    fake: FakePhone, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with(tmp_path / "run", "b" * 64)
    before = (run / "report.json").read_text()
    arguments = [str(folder), "--runner", str(fake.runners["mnn"]), "--runtime", "mnn", "--repeats", "2"]
    arguments += ["--out", str(tmp_path / "phone.json"), "--report", str(run)]
    assert phone_measure.main(arguments) == 2
    assert "exported from another model than that of" in capsys.readouterr().err
    assert (run / "report.json").read_text() == before
    assert (tmp_path / "phone.json").is_file()  # the measurement itself is kept


def test_measurement_of_other_files_is_not_taken_up(fake: FakePhone, folder: Path, tmp_path: Path) -> None:
    record = phone_measure.measure(phone_measure.Phone(), folder, "mnn", fake.runners["mnn"], repeats=2)
    record["artifact"] = "0" * 64
    path = tmp_path / "phone.json"
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match="measured other files"):
        phone_report.measured(path, folder)
    path.write_text("{}")
    with pytest.raises(InputError, match="no measurement"):
        phone_report.measured(path, folder)


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
    tree.body = [n for n in tree.body if getattr(n, "name", "") != "_fill_in"]  # of --report, where fitkit is
    found = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    found |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {name.split(".")[0] for name in found} <= set(sys.stdlib_module_names)
