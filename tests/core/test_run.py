"""`run` on a toy kit: what it leaves, that its figures say what was timed, and that no kill changes them.

Run as a script, `python test_run.py FOLDER` runs once undisturbed, and once killed in every stage and resumed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import core
import core.run
from core.export import Artifact
from core.figures import Estimated, Figure, Measured
from core.kit import InputError, Kit
from core.report import Report
from core.run import Run
from tests.core.toy import KIT, TWO_GRAPHS, ToyKit

ROOT = Path(__file__).resolve().parents[2]
MEMORY = {"peak": 120.0, "before": 100.0}
TIMED = {"fps", "end_to_end_p50", "end_to_end_p99", "latency_p50", "latency_p99", "speedup", "speedup_slow"}
STAGES = ("steps", "export", "scores", "timing", "compare", "ledger", "report")


class WithBaseline(ToyKit):
    """Beside a tool that does the same job thirty times over, and with something to say of its verdicts."""

    def remarks(self, data: Path | None, weights: Path | None) -> list[str]:
        return [f"trained elsewhere ({data}, {weights})"]

    def baselines(self, samples: Any, threads: int) -> dict[str, Callable[[], Any]]:
        net = self.model()
        return {"slow-fp32-torch": lambda: [self.tell(net, samples[0]) for _ in range(30)]}


def a_run(out: Path, kit: Kit = KIT, **changed: Any) -> Run:
    return replace(Run(kit, kit.recipes["qat"], kit.default_target, None, "smoke", out), **changed)


def hurry(patch: pytest.MonkeyPatch) -> None:
    """Time for moments, and leave out the processes that weigh memory: tests/core/test_bench.py is about those."""
    real = core.run.measure
    patch.setattr(core.run, "SECONDS", {"smoke": 0.2})
    patch.setattr(core.run, "measure", lambda artifact, **named: real(artifact, **{**named, "seconds": 0.05}))
    patch.setattr(sys.modules["core.evaluation.measure"], "_memory", lambda *given: MEMORY)


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        yield


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    place = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        a_run(place, WithBaseline())()
    return place


@pytest.fixture
def report(out: Path) -> Report:
    return Report.load(out)


def stored(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def test_leaves_report_page_and_artifact(out: Path) -> None:
    assert {"report.json", "report.html", "artifact"} <= {path.name for path in out.iterdir()}
    assert "The bright corner" in (out / "report.html").read_text(encoding="utf-8")
    artifact = Artifact.open(out / "artifact")
    assert set(artifact.variants) == {f"{p}-{r}" for p in ("fp32", "int8") for r in ("onnxruntime", "openvino")}
    assert not list(out.glob("*.new"))


def test_a_kits_remarks_stand_among_the_notes(report: Report) -> None:
    assert "trained elsewhere (None, None)" in report.notes


def test_report_has_the_agreed_shape(out: Path) -> None:
    data = stored(out)
    assert set(data) == {"fitkit", "created", "kit", "title", "recipe", "target", "figures", "gates", "trace", "layers",
                         "tables", "notes"}  # fmt: skip
    assert data["kit"] == "toy" and data["target"] == "x86-edge-box"
    assert data["recipe"]["name"] == "qat" and [s["step"] for s in data["recipe"]["steps"]] == ["Quantize", "QAT"]
    for figure in data["figures"]:
        assert set(figure) == {"name", "stage", "value", "unit", "basis"}
        assert figure["stage"] in ("original", "compressed")
        assert figure["basis"]["kind"] in ("measured", "estimated", "quoted")
    for gate in data["gates"]:
        assert set(gate) == {"name", "figure", "bound", "verdict", "why", "unit", "device", "stage"}
        assert gate["verdict"] in ("PASS", "FAIL", "UNPROVEN") and gate["why"]
    for entry in data["trace"]:
        assert set(entry) == {"step", "changed", "skipped", "seconds"}
        assert all(set(skipped) == {"layer", "why"} for skipped in entry["skipped"])
    exported = [e["step"]["variant"] for e in data["trace"] if e["step"]["step"] == "Export"]
    assert [e["step"]["step"] for e in data["trace"][:2]] == ["Quantize", "QAT"] and len(exported) == 4


def test_gates_are_judged(report: Report) -> None:
    verdicts = {j.gate.name: j.verdict for j in report.judgements}
    assert verdicts == {"accuracy": "PASS", "parameters": "PASS", "speed": "PASS", "power": "UNPROVEN"}
    assert not report.failed


def test_accuracy_is_that_of_the_exported_files(out: Path, report: Report) -> None:
    artifact = Artifact.open(out / "artifact")
    samples = KIT.dataset(None, "test")
    values = {}
    for stage, precision in (("original", "fp32"), ("compressed", "int8")):
        figure = report.figures.find("accuracy", stage, "measured")  # type: ignore[arg-type]
        basis = measured(figure)
        name = variant_of(artifact, basis)
        assert artifact.variant(name).precision == precision
        values[stage] = KIT.score(artifact.as_module(name, 1), samples, artifact.meta)["accuracy"][0]
        assert figure is not None and figure.value == values[stage]
        assert basis.artifact == artifact.sha256 and basis.runs == len(samples) and "test" in basis.note
    loss = report.figures.find("accuracy_loss")
    assert loss is not None and loss.value == pytest.approx(values["original"] - values["compressed"])
    assert "FP32" in measured(loss).runtime and "INT8" in measured(loss).runtime


def measured(figure: Figure | None) -> Measured:
    assert figure is not None and isinstance(figure.basis, Measured)
    return figure.basis


def variant_of(artifact: Artifact, basis: Measured) -> str:
    """The variant that a basis names: its runtime and its precision."""
    runtime = "onnxruntime" if basis.runtime.startswith("ONNX Runtime") else "openvino"
    return next(
        n for n, v in artifact.variants.items() if v.runtime == runtime and f" {v.precision.upper()}" in basis.runtime
    )


def test_every_time_is_of_the_variant_that_its_basis_names(out: Path, report: Report) -> None:
    artifact = Artifact.open(out / "artifact")
    timing = json.loads((out / "stage-timing.json").read_text())
    times = {t["name"]: t for t in timing["timings"]}
    best = min(artifact.variants, key=lambda name: times[name]["p50"])
    assert artifact.chosen == timing["recommended"] == best
    for stage in ("original", "compressed"):
        figures = {f.name: f for f in report.figures if f.stage == stage and f.basis.kind == "measured"}
        name = variant_of(artifact, measured(figures["end_to_end_p50"]))
        among = [n for n, v in artifact.variants.items() if stage == "compressed" or v.precision == "fp32"]
        assert name == min(among, key=lambda n: times[n]["p50"]), "the recommended one, or the faster FP32"
        assert figures["end_to_end_p50"].value == times[name]["p50"]
        assert figures["end_to_end_p99"].value == times[name]["p99"]
        assert figures["fps"].value == pytest.approx(1e3 / times[name]["p50"])
        assert measured(figures["end_to_end_p50"]).spread == times[name]["spread"]
        for figure in ("latency_p50", "latency_p99", "size", "peak_memory"):
            own = variant_of(artifact, measured(figures[figure]))
            assert artifact.variant(own).precision == ("fp32" if stage == "original" else "int8"), figure
            assert figures[figure].value == next(f["value"] for f in timing["own"][own] if f["name"] == figure)


def test_baseline_is_compared_in_the_same_rounds(out: Path, report: Report) -> None:
    timing = json.loads((out / "stage-timing.json").read_text())
    figure = report.figures.find("speedup_slow")
    assert figure is not None and figure.value > 3
    ratio = next(r for r in timing["ratios"] if r["of"] == "slow-fp32-torch" and r["over"] == timing["recommended"])
    assert figure.value == ratio["value"] and "in turns with slow-fp32-torch" in measured(figure).runtime


def test_speed_against_the_original_is_of_the_compressed_variant(out: Path, report: Report) -> None:
    artifact = Artifact.open(out / "artifact")
    timing = json.loads((out / "stage-timing.json").read_text())
    figure = report.figures.find("speedup")
    assert figure is not None
    after = variant_of(artifact, measured(figure))
    before = measured(figure).runtime.rpartition(" ")[2]
    assert artifact.variant(after).precision == "int8" and artifact.variant(before).precision == "fp32"
    ratio = next(r for r in timing["ratios"] if r["of"] == before and r["over"] == after)
    assert figure.value == ratio["value"] and measured(figure).spread == (ratio["high"] - ratio["low"]) / 2


def test_estimates_stay_beside_measurements(report: Report) -> None:
    for stage in ("original", "compressed"):
        kinds = {f.basis.kind for f in report.figures if f.name == "latency_p50" and f.stage == stage}
        assert kinds == {"measured", "estimated"}
        power = report.figures.find("power", stage)  # type: ignore[arg-type]
        assert power is not None and isinstance(power.basis, Estimated), "never measured here"
        assert power.basis.assumptions[0].startswith("device edge-1w"), "both sides of the table are of one device"
    sizes = {s: report.figures.find("size", s, "estimated") for s in ("original", "compressed")}  # type: ignore[arg-type]
    # 72 + 576 + 512 weights of one byte and a scale for each of 20 channels, 20 biases of 4: the norm is folded
    assert sizes["compressed"] is not None and sizes["compressed"].value == pytest.approx((1160 + 80 + 80) / 1e6)
    assert sizes["original"] is not None and sizes["original"].value == pytest.approx(4 * (1160 + 20 + 16) / 1e6)


def test_layers_are_listed_with_their_bytes_and_errors(report: Report) -> None:
    rows = {row["layer"]: row for row in report.layers}
    assert set(rows) >= {"encoder.0", "encoder.3", "head.1"}
    assert rows["head.1"]["parameters"] == 4 * 128 + 4 and rows["head.1"]["bytes"] == 4 * 128 + 4
    assert rows["encoder.3"]["macs"] == 8 * 8 * 9 * 16
    assert all(rows[name]["sqnr_db"] > 5 for name in ("encoder.0", "encoder.3", "head.1"))


def test_resuming_a_finished_run_changes_nothing(out: Path) -> None:
    before = stored(out)
    a_run(out, WithBaseline(), resume=True)()
    assert stored(out)["figures"] == before["figures"]


def test_what_a_resumed_run_takes_over_keeps_its_machine_and_date(out: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(out, tmp_path / "run")
    made = json.loads((folder / "made.json").read_text())
    assert made["scores"].keys() == {"device", "date"} and made.keys() >= {"scores", "timing", "compare"}
    there = {"device": "this-host: another, 9 cores", "date": "2020-02-02"}
    (folder / "made.json").write_text(json.dumps({**made, "scores": there, "timing": there}))
    a_run(folder, WithBaseline(), resume=True)()
    basis = {f["name"]: f["basis"] for f in stored(folder)["figures"] if f["basis"]["kind"] == "measured"}
    for name in ("accuracy_loss", "speedup", "fps", "end_to_end_p50"):
        assert {k: basis[name][k] for k in there} == there, name
    (folder / "stage-scores.json").unlink()
    a_run(folder, WithBaseline(), resume=True)()
    basis = {f["name"]: f["basis"] for f in stored(folder)["figures"] if f["basis"]["kind"] == "measured"}
    assert {k: basis["accuracy_loss"][k] for k in there} == made["scores"], "what ran anew is of here"
    assert {k: basis["speedup"][k] for k in there} == there


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"recipe": KIT.recipes["int8"]}, "recipe"),
        ({"target": "jetson-orin"}, "target"),
        ({"data": ROOT}, "data"),
        ({"preset": "full"}, "preset"),
        ({"weights": ROOT}, "weights"),
    ],
)
def test_another_run_is_not_mixed_in(changed: dict[str, Any], what: str, out: Path) -> None:
    with pytest.raises(InputError, match=rf"run\.json: was begun with another {what}; give the same {what}"):
        a_run(out, WithBaseline(), resume=True, **changed)()


@pytest.mark.parametrize("what", ["bytes", "threshold", "missing"])
def test_a_changed_artifact_is_refused(what: str, out: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(out, tmp_path / "own"))
    artifact = Artifact.open(own / "artifact")
    file = own / "artifact" / artifact.variant("int8-onnxruntime").files["net"]
    if what == "bytes":
        file.write_bytes(file.read_bytes() + b" ")
    elif what == "missing":
        file.unlink()
    else:
        artifact.describe({"threshold": 1})
    named = {
        "bytes": "net.onnx: its bytes differ",
        "missing": "net.onnx: missing",
        "threshold": "not the artifact of this run",
    }
    with pytest.raises(InputError, match=named[what]):
        a_run(own, WithBaseline(), resume=True)()


@pytest.mark.parametrize("name", ["run.json", "stage-scores.json"])
def test_a_torn_record_is_refused_by_name(name: str, out: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(out, tmp_path / "own"))
    (own / name).write_text('{"kit": "to')
    with pytest.raises(InputError, match=f"{name}: not JSON"):
        a_run(own, WithBaseline(), resume=True)()


def test_a_new_run_in_an_old_folder_starts_anew_and_leaves_foreign_files(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (out / "steps" / "mine").mkdir()

    class Begun(Exception):  # noqa: N818  no error, the end of the test
        pass

    def stop(*given: Any, **named: Any) -> None:
        raise Begun

    monkeypatch.setattr(core.run, "export_kit", stop)
    stages = {path: path.read_bytes() for path in out.glob("stage-*.json")}
    with pytest.raises(Begun):
        a_run(out, WithBaseline())()
    assert stages and not list(out.glob("stage-*.json"))
    assert (out / "steps" / "mine").is_dir()
    for path, content in stages.items():
        path.write_bytes(content)


def test_precision_of_the_estimates_is_that_of_the_model() -> None:
    small, _ = core.compress(KIT.model(), core.Recipe("part", (replace_keep("head.*"),), "", ""), KIT)
    layers, bits = core.run._precision(small)
    assert layers["encoder.0"] == "int8" and layers["head.1"] == "fp32" and set(bits) == {"encoder.0", "encoder.3"}
    assert core.run._precision(KIT.model())[0]["*"] == "fp32"


def replace_keep(pattern: str) -> Any:
    return replace(KIT.recipes["int8"].steps[0], keep=(pattern,))  # type: ignore[call-arg]


def test_the_example_of_the_readme_runs(tmp_path: Path) -> None:
    from core import compress, estimate, evaluate, export, judge, load, measure, target

    kit, box = load("tests.core.toy"), target("x86-edge-box")
    fp32 = kit.model()
    small, trace = compress(fp32, kit.recipes["int8"], kit)
    art = export({"fp32": fp32, "int8": small}, kit.exports(), "x86-edge-box", str(tmp_path / "art"), kit=kit.name)
    art.describe(kit.freeze(art.as_module("int8-openvino"), None, "full"))
    figures = evaluate(kit, art.as_module("int8-openvino"), meta=art.meta)
    figures |= estimate(small, kit.exports(), box, precision="int8")
    figures |= measure(art, variant="int8-openvino", threads=1, seconds=0.1)
    report = judge(figures, kit.gates, trace, kit=kit.name, recipe=kit.recipes["int8"], target="x86-edge-box")
    report.save(str(tmp_path / "toy"))
    assert {j.gate.name: j.verdict for j in report.judgements}["accuracy"] == "PASS"
    assert (tmp_path / "toy" / "report.html").exists()
    assert Report.load(tmp_path / "toy").figures.find("latency_p50", kind="measured") is not None


@pytest.mark.slow
def test_a_kit_of_several_graphs(tmp_path: Path) -> None:
    report = a_run(tmp_path, TWO_GRAPHS, recipe=KIT.recipes["int8"])()
    one, two = Artifact.open(tmp_path / "artifact").as_module("fp32-onnxruntime", 1), KIT.model()
    assert isinstance(one, nn.ModuleDict) and set(one) == {"encoder", "head"}
    x = torch.rand(1, 1, 16, 16)
    torch.testing.assert_close(one.head(one.encoder(x)), two(x), atol=1e-4, rtol=1e-4)
    accuracy = report.figures.find("accuracy", "original", "measured")
    assert (
        accuracy is not None
        and accuracy.value == KIT.score(two, KIT.dataset(None, "test"), {"threshold": 0})["accuracy"][0]
    )
    assert {row["layer"] for row in report.layers} >= {"encoder.0", "encoder.3", "head.1"}


@pytest.mark.slow
def test_a_run_killed_in_every_stage_ends_with_the_same_figures(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__)), str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stderr
    whole, pieces = (stored(tmp_path / name) for name in ("whole", "killed"))

    def steady(data: dict[str, Any]) -> list[dict[str, Any]]:
        """All figures but times, which no two runs share, and what says which variant was the faster one."""
        return [f for f in data["figures"] if f["name"] not in TIMED and f["basis"]["kind"] != "measured"] + [
            {"name": f["name"], "stage": f["stage"], "value": f["value"]}
            for f in data["figures"]
            if f["name"] in ("accuracy", "confident", "accuracy_loss", "parameters", "macs")
        ]

    assert steady(pieces) == steady(whole) and len(steady(whole)) > 10
    scores = [json.loads((tmp_path / name / "stage-scores.json").read_text()) for name in ("whole", "killed")]
    assert scores[0] == scores[1], "every variant, not only those that the report took"
    files = [Artifact.open(tmp_path / name / "artifact").manifest["files"] for name in ("whole", "killed")]
    assert files[0] == files[1]
    # the last kill came after the timing: its figures are the stored ones, to the last digit
    kept = json.loads((tmp_path / "timing-at-the-kill.json").read_text())
    assert json.loads((tmp_path / "killed" / "stage-timing.json").read_text()) == kept


def die(*given: Any, **named: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def run_and_die(stage: str, out: Path) -> None:
    """Resume a run and end by kill -9 in a stage."""
    patch = pytest.MonkeyPatch()
    if stage == "steps":
        module = sys.modules["core.compress"]  # the package shows the function of that name
        real = module._write

        def write(*given: Any) -> None:
            real(*given)
            die()

        patch.setattr(module, "_write", write)
    elif stage == "export":
        patch.setattr(Artifact, "describe", die)
    elif stage == "scores":
        real_score, calls = ToyKit.score, []

        def score(*given: Any) -> Any:
            calls.append(1)
            return real_score(*given) if len(calls) < 3 else die()

        patch.setattr(ToyKit, "score", score)
    elif stage == "compare":
        patch.setattr(ToyKit, "compare", die)
    else:
        patch.setattr(core.run, {"timing": "measure", "ledger": "ledger", "report": "judge"}[stage], die)
    a_run(out, resume=True)()


def in_a_child(work: Callable[[], Any]) -> int:
    """The wait status of a forked process that does the work: libraries are loaded once for all of them."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def main(folder: Path) -> None:
    hurry(pytest.MonkeyPatch())
    assert in_a_child(lambda: a_run(folder / "whole")()) == 0
    killed = folder / "killed"
    for stage in STAGES:
        assert in_a_child(lambda stage=stage: run_and_die(stage, killed)) == signal.SIGKILL, stage  # type: ignore[misc]
        done = {path.stem for path in killed.glob("stage-*.json")}
        assert done == {f"stage-{s}" for s in STAGES[1 : STAGES.index(stage)]}, (stage, done)
    (folder / "timing-at-the-kill.json").write_bytes((killed / "stage-timing.json").read_bytes())
    assert in_a_child(lambda: a_run(killed, resume=True)()) == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
