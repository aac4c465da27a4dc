"""The command line: its surface frozen, exit statuses 0, 1 and 2, and one line for whatever a user can mend."""

from __future__ import annotations

import argparse
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import core.run
from core.cli import main, parser
from core.export import Artifact, ParityError, export
from core.hardware import targets
from core.kit import InputError
from tests.core.toy import KIT

ROOT = Path(__file__).resolve().parents[2]
TOY = "tests.core.toy"

SURFACE = {
    "list": ["--help", "--json"],
    "run": ["--data", "--help", "--out", "--preset", "--recipe", "--resume", "--target", "--weights", "kit"],
    "train": ["--data", "--help", "--out", "--preset", "--resume", "--teacher", "kit"],
    "search": [
        "--data",
        "--finalists",
        "--fix",
        "--help",
        "--out",
        "--preset",
        "--resume",
        "--searcher",
        "--seed",
        "--storage",
        "--trials",
        "--workers",
        "kit",
    ],
    "evaluate": ["--artifact", "--data", "--help", "--out", "--split", "--variant", "kit"],
    "bench": ["--artifact", "--help", "--json", "--seconds", "--threads", "--variant", "kit"],
    "predict": ["--artifact", "--help", "--out", "--variant", "inputs", "kit"],
}

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of its own, where the defaults of --out fall."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """One variant on one runtime: a command must not count on more."""
    out = tmp_path_factory.mktemp("cli") / "artifact"
    return export({"fp32": KIT.model()}, KIT.exports(), "this-host", out, kit="toy", runtimes=["onnxruntime"],
                  meta={"threshold": 3})  # fmt: skip


def commands(top: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    choices = next(a for a in top._actions if isinstance(a, argparse._SubParsersAction)).choices
    return dict(choices)


def one_line(capsys: Captured) -> str:
    """The only line on standard error."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("fitkit: "), lines
    return lines[0].removeprefix("fitkit: ")


def test_surface_is_frozen() -> None:
    found = {
        name: sorted(a.option_strings[-1] if a.option_strings else a.dest for a in command._actions)
        for name, command in commands(parser()).items()
    }
    assert found == SURFACE


def test_defaults_are_frozen() -> None:
    def given(*words: str) -> dict[str, Any]:
        return {k: v for k, v in vars(parser().parse_args(words)).items() if k not in ("command", "kit")}

    nothing = {"data": None, "out": None, "preset": "full", "resume": False}
    assert given("run", "k") == {**nothing, "recipe": None, "target": None, "weights": None}
    assert given("train", "k") == {**nothing, "teacher": None}
    assert given("search", "k") == {
        **nothing, "searcher": "nsga2", "trials": 64, "storage": None, "workers": "1", "seed": 0, "fix": [],
        "finalists": 1,
    }  # fmt: skip
    assert given("evaluate", "k", "--data", "d") == {
        "artifact": None, "data": Path("d"), "out": None, "split": None, "variant": None,
    }  # fmt: skip
    assert given("bench", "k") == {"artifact": None, "json": False, "seconds": 10.0, "threads": None, "variant": None}
    assert given("predict", "k", "a", "b") == {"artifact": None, "inputs": ["a", "b"], "out": None, "variant": None}


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("run nowhere", "no kit 'nowhere'"),
        ("run core.files", "core.files has no KIT"),
        (f"run {TOY} --recipe int3", "--recipe 'int3': toy has int8, qat"),
        (f"run {TOY} --target abacus", "abacus"),
        (f"run {TOY} --data no/such", "--data no/such: no such folder"),
        (f"run {TOY} --data a_file", "--data a_file: no such folder"),
        (f"run {TOY} --preset huge", "invalid choice: 'huge'"),
        (f"run {TOY} --out a_file", "a_file"),
        (f"run {TOY} --out a_file/below", "a_file"),
        (f"run {TOY} --depth 3", "unrecognized arguments: --depth 3"),
        ("run", "required: kit"),
        ("run --resume", "required: kit"),
        ("fly", "invalid choice: 'fly'"),
        ("--fly", "required: COMMAND"),
        (f"evaluate {TOY}", "required: --data"),
        (f"evaluate {TOY} --data no/such", "--data no/such: no such folder"),
        (f"evaluate {TOY} --data empty --split night --artifact ARTIFACT", "split 'night'"),
        (f"evaluate {TOY} --data empty --artifact ARTIFACT", "empty/seed.txt: no such file"),
        (f"bench {TOY} --artifact no/such", "no/such: no artifact here"),
        (f"bench {TOY} --artifact a_file", "a_file: no artifact here"),
        (f"bench {TOY} --artifact empty", "empty: no artifact here"),
        (f"bench {TOY} --artifact ARTIFACT --variant int2", "no variant 'int2'; it holds fp32-onnxruntime"),
        (f"bench {TOY} --artifact ARTIFACT --threads 0", "--threads 0: expected 1 to"),
        (f"bench {TOY} --artifact ARTIFACT --threads 4096", "--threads 4096: expected 1 to"),
        (f"bench {TOY} --artifact ARTIFACT --threads two", "invalid int value: 'two'"),
        (f"bench {TOY} --artifact ARTIFACT --seconds 0", "seconds 0.0"),
        ("bench pcb_inspection --artifact ARTIFACT", "is of the kit 'toy', not of 'pcb_inspection'"),
        (f"predict {TOY}", "required: INPUT"),
        (f"train {TOY} --data no/such", "--data no/such: no such folder"),
        (f"train {TOY} --out a_file", "a_file"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(line: str, named: str, artifact: Artifact, capsys: Captured) -> None:
    Path("a_file").write_text("")
    Path("empty").mkdir()
    assert main([word if word != "ARTIFACT" else str(artifact.folder) for word in line.split()]) == 2
    assert named in one_line(capsys)


def test_status_and_message_of_the_process_itself() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "core.cli", "run", "nowhere"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 2 and ran.stdout == ""
    assert ran.stderr == "fitkit: no kit 'nowhere': kits.nowhere cannot be imported; `fitkit list` shows the kits\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (InputError("board 7:\n  no such file"), "board 7: no such file"),
        (ParityError("int8-openvino: graph net drifts first at layer encoder.3"), "drifts first at layer encoder.3"),
        (
            FloatingPointError("qat: loss is nan at epoch 1, step 2; lower lr 0.1"),
            "qat: loss is nan at epoch 1, step 2",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/report.html"),
            "out/report.html: no space left; free some",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk: no space left"),
        (PermissionError(errno.EACCES, "Permission denied", "out/x"), "out/x: Permission denied; mend the path"),
        (OSError(errno.EROFS, "Read-only file system", "out/x"), "out/x: Read-only file system; mend the path"),
        (KeyboardInterrupt(), "stopped; what was finished is kept, --resume goes on"),
    ],
)
def test_what_ends_a_run_is_told_in_one_line(
    error: BaseException, said: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(run: core.run.Run) -> None:
        raise error

    monkeypatch.setattr(core.run.Run, "__call__", fail)
    assert main(["run", TOY]) == 2
    assert said in one_line(capsys)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError(errno.EIO, "a bug"), KeyError("a bug")])
def test_a_bug_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(run: core.run.Run) -> None:
        raise error

    monkeypatch.setattr(core.run.Run, "__call__", fail)
    with pytest.raises(type(error), match="a bug"):
        main(["run", TOY])


@pytest.mark.parametrize("failed", [False, True])
def test_status_of_a_run_is_that_of_its_gates(failed: bool, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[core.run.Run] = []

    def call(run: core.run.Run) -> Any:
        runs.append(run)
        return SimpleNamespace(failed=failed)

    monkeypatch.setattr(core.run.Run, "__call__", call)
    monkeypatch.setattr("core.report.terminal.show", lambda report: None)
    Path("data").mkdir()
    line = f"run {TOY} --recipe int8 --target jetson-orin --data data --preset smoke --out here --resume --weights w"
    assert main(line.split()) == int(failed)
    found = {k: v for k, v in vars(runs[0]).items() if k not in ("kit", "recipe")}
    assert found == {"target": "jetson-orin", "data": Path("data"), "preset": "smoke", "out": Path("here"),
                     "resume": True, "weights": Path("w")}  # fmt: skip
    assert runs[0].kit.name == "toy" and runs[0].recipe == KIT.recipes["int8"]
    assert "here/report.html" in capsys.readouterr().out
    # options may stand before the kit, and all have defaults
    assert main(["run", "--preset", "smoke", TOY]) == int(failed)
    assert runs[1].kit.name == "toy" and runs[1].preset == "smoke"
    assert (runs[1].target, runs[1].out, runs[1].data) == ("x86-edge-box", Path("runs/toy"), None)


def test_help_without_arguments(capsys: Captured) -> None:
    assert main([]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in SURFACE)


@pytest.mark.parametrize("line", ["--help", "run --help", "run --preset smoke --help", f"predict {TOY} -h"])
def test_help_of_a_command(line: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as left:
        main(line.split())
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert "usage: fitkit" in said
    assert ("--add" in said) == (TOY in line), "a kit's own options"


def test_list(capsys: Captured) -> None:
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    assert "pcb_inspection" in said and "(default)" in said
    assert all(name in said for name in targets())


def test_list_as_json(capsys: Captured) -> None:
    assert main(["list", "--json"]) == 0
    said = capsys.readouterr()
    listing = json.loads(said.out)
    assert said.err == "" and set(listing) == {"kits", "targets"} and set(listing["targets"]) == set(targets())
    kit = listing["kits"]["pcb_inspection"]
    assert set(kit) == {"title", "default_recipe", "recipes"}
    assert kit["default_recipe"] in [recipe["name"] for recipe in kit["recipes"]]
    assert all(set(recipe) == {"name", "steps", "cost", "expects"} for recipe in kit["recipes"])


@pytest.fixture
def weighed(monkeypatch: pytest.MonkeyPatch) -> None:
    # by sys.modules: the package's attribute of that name is the function
    monkeypatch.setattr(sys.modules["core.evaluation.measure"], "peak_memory", lambda folder, variant, threads: 123.0)


def test_bench_as_json(artifact: Artifact, weighed: None, capsys: Captured) -> None:
    line = f"bench {TOY} --artifact {artifact.folder} --threads 1 --seconds 0.1 --json"
    assert main(line.split()) == 0
    said = json.loads(capsys.readouterr().out)
    assert set(said) == {"device", "kit", "end_to_end", "variants"} and said["device"].startswith("this-host: ")
    (row,) = said["variants"]
    assert set(row) == {"variant", "chosen", "p50_ms", "p99_ms", "fps", "runs", "peak_memory_mb", "size_mb", "runtime"}
    assert row["variant"] == "fp32-onnxruntime" and row["chosen"] is True and row["peak_memory_mb"] == 123.0
    assert 0 < row["p50_ms"] <= row["p99_ms"] and row["fps"] == pytest.approx(1e3 / row["p50_ms"]) and row["runs"] >= 5
    assert row["size_mb"] == artifact.size_bytes() / 1e6
    assert row["runtime"].startswith("ONNX Runtime ") and row["runtime"].endswith("FP32, 1 thread")


def test_bench_as_a_table(artifact: Artifact, weighed: None, capsys: Captured) -> None:
    line = f"bench {TOY} --artifact {artifact.folder} --seconds 0.1 --variant fp32-onnxruntime"
    assert main(line.split()) == 0
    said = capsys.readouterr().out
    assert "fp32-onnxruntime" in said and "123.00" in said and "this-host" in said


def test_evaluate_leaves_metrics_and_predictions(artifact: Artifact, capsys: Captured) -> None:
    Path("data").mkdir()
    Path("data/seed.txt").write_text("5")
    assert main(f"evaluate {TOY} --data data --split val --artifact {artifact.folder} --out here".split()) == 0
    metrics = json.loads(Path("here/metrics.json").read_text())
    samples = KIT.dataset(Path("data"), "val")
    assert metrics == {"threshold": 3, "accuracy": KIT.score(KIT.model(), samples, {"threshold": 3})["accuracy"][0]}
    assert len(list(Path("here/predictions").iterdir())) == len(samples)
    assert "fp32-onnxruntime on 24 samples of 'val'" in capsys.readouterr().out


def test_predict_takes_the_kit_options_and_a_run_folder(artifact: Artifact, capsys: Captured) -> None:
    Path("a_run").mkdir()
    Path("a_run/artifact").symlink_to(artifact.folder)
    samples = KIT.dataset(None, "test")
    expected = [KIT.tell(KIT.model(), samples[i]) + 10 for i in (3, 1)]
    for line in (
        f"predict {TOY} 3 1 --add 10 --artifact a_run --out here",
        f"predict --artifact a_run {TOY} 3 1 --add 10",
    ):
        assert main(line.split()) == 0
        assert f"corners {expected}" in capsys.readouterr().out
    assert json.loads(Path("here/results.json").read_text()) == expected
    assert json.loads(Path("runs/toy-predict/results.json").read_text()) == expected


def test_train_hands_everything_to_the_kit(capsys: Captured) -> None:
    Path("data").mkdir()
    assert main(f"train {TOY} --data data --preset smoke --out here --resume".split()) == 0
    assert json.loads(Path("here/trained.json").read_text()) == {"data": "data", "preset": "smoke", "resume": True}
    said = capsys.readouterr().out
    assert "accuracy" in said and "100 %" in said and "weights: here" in said
