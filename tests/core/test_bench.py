"""Timing that finds known ratios, and figures that say where they were measured."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from torch import nn

from core.evaluation.bench import available_cores, bench, pinned
from core.evaluation.measure import device, example_inputs, measure, peak_memory
from core.export import Artifact, export
from core.figures import Figures, Gate, Measured
from core.kit import Graph, InputError


def busy(milliseconds: float) -> None:
    """Compute for that long on this thread's own clock, whatever else the machine does."""
    end = time.thread_time() + milliseconds / 1e3
    while time.thread_time() < end:
        pass


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 3, padding=1)).eval()
    graph = Graph("main", {"x": torch.rand(1, 3, 64, 64), "steps": torch.ones(1, dtype=torch.int64)}, ("y",))
    out = tmp_path_factory.mktemp("bench") / "artifact"
    return export({"fp32": _WithSteps(net)}, [graph], "this-host", out, kit="demo")


@pytest.mark.parametrize(("patience", "rounds"), [(600.0, 5), (0.05, 2)])
def test_what_takes_long_is_timed_less_often(monkeypatch: pytest.MonkeyPatch, patience: float, rounds: int) -> None:
    monkeypatch.setattr(sys.modules["core.evaluation.bench"], "PATIENCE", patience)
    calls = []
    found = bench({"slow": lambda: (calls.append(1), time.sleep(0.03))}, seconds=0.01, threads=1)
    assert found.rounds == rounds == found.timings["slow"].runs
    assert len(calls) >= rounds


def test_what_takes_long_is_warm_after_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["core.evaluation.bench"], "WARM", 0.02)
    slow: list[int] = []
    quick: list[int] = []
    bench({"slow": lambda: (slow.append(1), time.sleep(0.03)), "quick": lambda: quick.append(1)}, warmup=3, runs=1)
    assert (len(slow), len(quick)) == (2, 4)


class _WithSteps(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        return self.net(x) * steps.to(x.dtype)


def test_ratio_of_a_twice_slower_function_is_two() -> None:
    found = bench({"slow": lambda: busy(4), "fast": lambda: busy(2)}, warmup=1, runs=41)
    assert found.ratios["slow", "fast"].value == pytest.approx(2.0, rel=0.25)
    assert found.ratios["fast", "slow"].value == pytest.approx(0.5, rel=0.25)
    ratio = found.ratios["slow", "fast"]
    assert ratio.low <= ratio.value <= ratio.high
    assert found.rounds == 41 and found.timings["fast"].runs == 41


def test_order_turns_every_round() -> None:
    calls: list[str] = []
    bench({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, warmup=0, runs=4)
    assert "".join(calls) == "abbaabba"


def test_statistics_are_those_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    steps = rng.exponential(0.01, 501) + 0.001
    clock, order = [0.0], iter(steps)

    def step() -> None:
        clock[0] += next(order)

    # by sys.modules: the package's attribute of that name is the function
    monkeypatch.setattr(sys.modules["core.evaluation.bench"].time, "perf_counter", lambda: clock[0])
    timing = bench(step, warmup=0, runs=501).timings["it"]
    ms = 1e3 * steps
    assert timing.p50 == pytest.approx(np.median(ms)) and timing.p99 == pytest.approx(np.percentile(ms, 99))
    assert timing.min == pytest.approx(ms.min()) and timing.mean == pytest.approx(ms.mean())
    # the median of n exponentials of scale s has a standard error of s / sqrt(n)
    assert timing.spread == pytest.approx(1.96 * 10 / np.sqrt(501), rel=0.35)


def test_seconds_limit_the_rounds() -> None:
    found = bench(lambda: time.sleep(0.005), warmup=0, seconds=0.3)
    assert 5 <= found.rounds <= 60
    assert bench(lambda: time.sleep(0.01), warmup=0, seconds=0.001).rounds == 5


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "either runs or seconds"),
        ({"runs": 2, "seconds": 1.0}, "either runs or seconds"),
        ({"runs": 0}, "expected a number above 0"),
        ({"runs": 1, "threads": 4096}, "ask for 1 to"),
    ],
)
def test_bad_arguments(arguments: dict[str, float], text: str) -> None:
    with pytest.raises(InputError, match=text):
        bench(lambda: None, **arguments)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(InputError, match="nothing to time"):
        bench({}, runs=1)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no processor affinity here")
def test_pinning_holds_inside_and_ends_outside() -> None:
    cores, threads = available_cores(), torch.get_num_threads()
    with pinned(1):
        assert available_cores() == cores[:1] and torch.get_num_threads() == 1
    assert available_cores() == cores and torch.get_num_threads() == threads


@pytest.fixture(scope="module")
def figures(artifact: Artifact) -> dict[str, Figures]:
    """What `measure` finds for each variant."""
    return {name: measure(artifact, threads=1, seconds=0.3, variant=name) for name in artifact.variants}


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_measured_figures_name_this_machine(artifact: Artifact, figures: dict[str, Figures], runtime: str) -> None:
    found = {f.name: f for f in figures[f"fp32-{runtime}"]}
    assert set(found) == {"latency_p50", "latency_p99", "fps", "peak_memory", "size"}
    basis = found["latency_p50"].basis
    assert isinstance(basis, Measured)
    assert basis.device == device() and basis.device.startswith("this-host: ")
    version = onnxruntime.__version__ if runtime == "onnxruntime" else openvino.get_version().split("-")[0]
    title = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}[runtime]
    assert basis.runtime == f"{title} {version} FP32, 1 thread"
    assert basis.artifact == artifact.sha256 and basis.runs >= 5 and basis.spread is not None
    assert 0 < found["latency_p50"].value <= found["latency_p99"].value
    assert found["size"].value == artifact.size_bytes(f"fp32-{runtime}") / 1e6
    # torch and a runtime are loaded, so tens of MB at least; this small net cannot take more than a gigabyte or so
    assert 50 < found["peak_memory"].value < 1500
    gate = Gate("speed", "latency_p50", "< 100000", "ms", device="this-host")
    assert gate.judge(figures[f"fp32-{runtime}"]).verdict == "PASS"


def test_peak_memory_sees_what_is_allocated(artifact: Artifact, figures: dict[str, Figures], tmp_path: Path) -> None:
    """The same net on a 1024 x 1024 input keeps 16 maps of 4 MB each: at least 64 MB more."""
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 3, padding=1)).eval()
    graph = Graph("main", {"x": torch.rand(1, 3, 1024, 1024)}, ("y",))
    big = export({"fp32": net}, [graph], "this-host", tmp_path / "big", kit="demo", runtimes=["onnxruntime"])
    small = figures["fp32-onnxruntime"].find("peak_memory")
    assert small is not None
    assert peak_memory(big.folder, threads=1) - small.value > 60


def test_never_an_estimate_for_another_device(artifact: Artifact) -> None:
    with pytest.raises(InputError, match="'snapdragon-8-gen-2' is not this machine"):
        measure(artifact, "snapdragon-8-gen-2")


def test_peak_memory_reports_a_damaged_artifact(artifact: Artifact, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no artifact here"):
        peak_memory(tmp_path)


def test_example_inputs_have_the_exported_form(artifact: Artifact) -> None:
    x, steps = example_inputs(artifact, "main")
    assert x.shape == (1, 3, 64, 64) and x.dtype == torch.float32 and x.min() >= 0 and x.max() < 1
    assert torch.equal(steps, torch.zeros(1, dtype=torch.int64))
