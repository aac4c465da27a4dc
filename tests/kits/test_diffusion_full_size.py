"""The full-size figures, on the toy architecture: every stage in a process of its own, kept through a kill."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from core.export.pack_checkpoint import pack_checkpoint
from core.figures import Measured
from core.kit import InputError
from kits.mobile_diffusion import full_size as module
from kits.mobile_diffusion.acceptance import GATES
from kits.mobile_diffusion.full_size import FULL, NOTE, Draw, Trial, full_size, main
from kits.mobile_diffusion.model.architectures import build_folder, parameters

DRAW = Draw("toy", 64, 2, 1.0, "4GB")
TOY = Trial("toy", "toy", (DRAW,))
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")


@linux
def test_a_killed_stage_is_repeated_and_finished_ones_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    run = subprocess.run

    def killed_once(command: list[str], **options: Any) -> Any:
        stage = command[command.index("--stage") + 1]
        begun.append(stage)
        if begun == ["pack-toy", "draw-toy-64-4GB"]:
            options.pop("check")
            child = subprocess.Popen(command, **options)
            child.send_signal(signal.SIGKILL)
            return subprocess.CompletedProcess(command, child.wait())
        return run(command, **options)

    monkeypatch.setattr(module.subprocess, "run", killed_once)
    with pytest.raises(InputError, match="draw-toy-64-4GB: its process was killed by signal 9"):
        full_size(tmp_path, trial=TOY)
    assert (tmp_path / "work" / "toy-int4").is_dir() and not (tmp_path / "work" / "toy").exists()
    figures, tables = full_size(tmp_path, trial=TOY)
    assert begun == ["pack-toy", "draw-toy-64-4GB", "draw-toy-64-4GB"]
    assert list(tmp_path.iterdir()) == []

    asked = {g.figure: g for g in GATES if g.figure.startswith("sd15_")}
    found = {f.name: f for f in figures}
    assert set(found) == set(asked)
    for name, figure in found.items():
        assert isinstance(figure.basis, Measured) and NOTE in figure.basis.note
        assert figure.unit == asked[name].unit and asked[name].judge(figures).verdict in ("PASS", "FAIL")

    source = tmp_path / "source"
    build_folder("toy", source)
    pack_checkpoint(source, tmp_path / "packed", quiet=True)
    whole = sum(f.stat().st_size for f in (tmp_path / "packed").rglob("*") if f.is_file())
    assert found["sd15_size"].value == pytest.approx(whole / 1e6, rel=1e-3)
    unet = sum(f.stat().st_size for f in (source / "unet").glob("*.safetensors"))
    ((*_, peak, ratio, _),) = tables[1]["rows"]
    assert ratio == pytest.approx(peak * 1e6 / unet, rel=1e-2)
    assert found["sd15_pack_memory"].value == pytest.approx(ratio, rel=1e-2)

    assert all(len(row) == len(t["columns"]) for t in tables for row in t["rows"])
    assert [row[1] for row in tables[0]["rows"][:3]] == [f"{n:,}" for n in _counts()]
    ((_, size, limit, _, planned, measured, off, step, seconds),) = tables[2]["rows"]
    assert (size, limit) == ("64 x 64", "4GB")
    assert found["sd15_student_peak"].value == pytest.approx(measured / 1e3, rel=1e-3)
    assert abs(planned / measured - 1) <= 0.15 and off == pytest.approx(100 * (planned / measured - 1), abs=0.1)
    assert 0 < step < seconds


def _counts() -> list[int]:
    counts = parameters("toy")
    return [counts[part] for part in ("unet", "text_encoder", "vae")]


def test_a_disk_without_room_is_refused_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 10**9))
    monkeypatch.setattr(module, "build_folder", lambda *_: pytest.fail("it was begun"))
    with pytest.raises(InputError, match=r"no room on its disk: 2878\.\d MB needed, 1000\.0 MB free"):
        full_size(tmp_path)


def test_a_result_of_other_settings_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "pack-toy.json").write_text(json.dumps({"asked": {"architecture": "sd-1.5"}}), encoding="utf-8")
    assert module._known(tmp_path, "pack-toy", {"architecture": "toy"}) is None
    assert module._known(tmp_path, "pack-toy", {"architecture": "sd-1.5"}) is not None


def test_a_stage_that_cannot_be_says_so_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = '{"architecture": "toy", "side": 64, "steps": 2, "guidance": 1.0, "limit": "10MB"}'
    build_folder("toy", tmp_path / "toy-int4")
    assert main(["--out", str(tmp_path), "--stage", "draw-toy-64-10MB", "--asked", asked]) == 2
    assert "full_size: memory limit 10 MB: the leanest way needs ~" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.json"))


def test_the_gates_are_of_a_student_and_of_the_whole_model() -> None:
    assert FULL.draws[0].architecture == FULL.student and FULL.draws[0].side == 512
    assert parameters(FULL.student)["unet"] < parameters(FULL.whole)["unet"]
