"""The example that prunes a YOLO: from a trained file to one that is smaller and runs, and its refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kits.pcb_inspection import KIT
from kits.pcb_inspection.baseline import _yolo, available, write_yolo_dataset

HERE = Path(__file__).parents[1]


def ran(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "examples/prune_yolo.py", *map(str, words)], cwd=HERE, env=None, capture_output=True, text=True
    )


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    found = ran("--weights", tmp_path / "best.pt", "--data", tmp_path / "data.yaml", "--out", tmp_path / "out")
    assert found.returncode == 1 and "data.yaml: no such file; give the data.yaml" in found.stderr
    (tmp_path / "data.yaml").write_text("")
    found = ran("--weights", tmp_path / "best.pt", "--data", tmp_path / "data.yaml", "--out", tmp_path / "out")
    assert found.returncode == 1 and "best.pt: no such file; give the best.pt" in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.slow
@pytest.mark.skipif(not available(), reason="ultralytics is not installed (extra baseline)")
def test_a_yolo_loses_channels_is_trained_on_and_runs(tmp_path: Path) -> None:
    train, val = (list(KIT.dataset(None, name, "smoke"))[:count] for name, count in (("train", 16), ("val", 8)))
    table = write_yolo_dataset(train, val, tmp_path / "set")
    _yolo("yolov8n", None).train(
        data=str(table), epochs=1, imgsz=96, batch=8, project=str(tmp_path / "runs"), name="train", exist_ok=True,
        pretrained=False, device="cpu", workers=0, plots=False,
    )  # fmt: skip
    weights = tmp_path / "runs" / "train" / "weights" / "best.pt"
    words = ["--weights", weights, "--data", table, "--out", tmp_path / "out", "--rounds", "1", "--epochs", "1",
             "--imgsz", "96", "--batch", "8", "--images", "8", "--control", "--ratio", "0.45"]  # fmt: skip
    found = ran(*words)
    assert found.returncode == 0, found.stderr
    report: dict[str, Any] = json.loads((tmp_path / "out" / "yolo.json").read_text())
    assert report["macs_gone"] == pytest.approx(45, abs=2)
    before, control, after = report["before"], report["control"], report["after"]
    assert control["macs"] == before["macs"] and control["parameters"] == before["parameters"]
    assert (tmp_path / "out" / "control1" / "weights" / "last.pt").is_file(), "trained on, not taken as it was"
    assert after["parameters"] < 0.7 * before["parameters"] and after["megabytes"] < 0.8 * before["megabytes"]
    assert 0 < after["energy_mj_estimated"] < before["energy_mj_estimated"] and report["speedup"] > 0
    trained = (tmp_path / "out" / "round1" / "weights" / "last.pt").stat().st_mtime_ns
    assert ran(*words, "--resume").returncode == 0, "what is done is not done again"
    assert (tmp_path / "out" / "round1" / "weights" / "last.pt").stat().st_mtime_ns == trained
