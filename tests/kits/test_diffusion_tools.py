"""The comparison with other tools: bytes counted by hand, tools that are absent or die, the table from the JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.diffusion_tools import TOOLS, Compressed, Tally, Tool, count, count_openvino, error, measure, run_apart
from benchmarks.diffusion_tools import table as markdown
from core.kit import InputError
from core.quantization.packed import pack_module
from kits.mobile_diffusion.model.architectures import build, build_folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tools") / "toy"
    build_folder("toy", folder)
    return folder


def test_the_stored_table_is_made_of_the_stored_results() -> None:
    stored = Path(__file__).resolve().parents[2] / "benchmarks" / "reports" / "mobile_diffusion"
    results = json.loads((stored / "tools.json").read_text(encoding="utf-8"))
    assert set(results["tools"]) == set(TOOLS), "a tool was added or dropped: run benchmarks/diffusion_tools.py"
    assert markdown(results) + "\n" == (stored / "tools.md").read_text(encoding="utf-8")


class Two(nn.Module):
    """A linear layer of 8 x 64 weights, a convolution of 16 x 4 x 3 x 3 and a norm of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.linear: nn.Module = nn.Linear(64, 8)
        self.conv: nn.Module = nn.Conv2d(4, 16, 3)
        self.norm = nn.GroupNorm(4, 16)


def test_packed_layers_are_counted_as_by_hand() -> None:
    plan, small = Two(), Two()
    small.linear = pack_module(plan.linear, 4, 64)
    small.conv = pack_module(plan.conv, 4, 64)
    found = count(plan, small.state_dict())
    linear = 8 * 32 + 8 * 2 + 8 * 2  # nibbles, one FP16 scale a row, biases at FP16
    conv = 16 * 18 + 16 * 2 + 16 * 2
    assert found.stored == linear + conv + 2 * 16 * 2
    assert found.linear == {4: 512} and found.convolutions == {4: 576}
    assert found.others == 8 + 16 + 32


def test_a_layer_left_in_float_counts_two_bytes_a_number() -> None:
    plan = Two()
    small = Two()
    small.linear = pack_module(plan.linear, 8, 64)
    found = count(plan, small.state_dict())
    assert found.stored == (512 + 8 * 2 + 8 * 2) + 2 * (576 + 16) + 2 * 32
    assert found.linear == {8: 512} and found.convolutions == {0: 576}


def test_a_tool_s_own_scales_are_not_halved_and_values_in_bytes_are_eight_bit() -> None:
    plan = Two()
    state: dict[str, Any] = {k: v for k, v in plan.state_dict().items() if not k.startswith("linear.weight")}
    unpacked = {"linear.weight": torch.zeros(8, 64, dtype=torch.int8), "linear.SCB": torch.zeros(8)}
    found = count(plan, state | unpacked)
    assert found.linear == {8: 512}
    assert found.stored == 512 + 8 * 4 + 2 * (8 + 576 + 16 + 32)
    halves = {"linear.weight": torch.zeros(256, 1, dtype=torch.uint8), "linear.weight.absmax": torch.zeros(8)}
    assert count(plan, state | halves).linear == {4: 512}


def test_an_openvino_model_is_counted_as_by_hand() -> None:
    openvino = pytest.importorskip("openvino")
    from openvino import opset13 as ops

    x = ops.parameter([1, 64], openvino.Type.f32)
    weight = openvino.op.Constant(openvino.Type.u4, openvino.Shape([8, 64]), [1] * 512)
    scale = openvino.op.Constant(openvino.Type.f32, openvino.Shape([8, 1]), [0.5] * 8)
    lifted = ops.multiply(ops.convert(weight, "f32"), scale)
    image = ops.parameter([1, 4, 8, 8], openvino.Type.f32)
    kernel = openvino.op.Constant(openvino.Type.f32, openvino.Shape([16, 4, 3, 3]), [1.0] * 576)
    model = openvino.Model(
        [
            ops.matmul(x, lifted, False, True),
            ops.convolution(image, kernel, [1, 1], [0, 0], [0, 0], [1, 1]),
        ],
        [x, image],
    )
    found = count_openvino(model, Two())
    assert found.linear == {4: 512} and found.convolutions == {0: 576}
    assert found.stored == 256 + 2 * 8 + 2 * 576

    wide = Two()
    wide.linear = nn.Linear(128, 8)
    with pytest.raises(InputError, match="found 1,088 weights .* expected 1,600"):
        count_openvino(model, wide)


def test_the_error_is_a_share_of_the_signal() -> None:
    expected = torch.tensor([3.0, 4.0])
    found = error(expected, torch.tensor([3.0, 3.5]))
    assert found["relative_error"] == pytest.approx(0.01) and found["sqnr_db"] == pytest.approx(20.0)
    assert error(expected, expected) == {"relative_error": 0.0, "sqnr_db": None}
    with pytest.raises(ArithmeticError, match="NaN"):
        error(expected, torch.tensor([3.0, torch.nan]))


def test_fitkit_packs_the_convolutions_and_the_error_is_that_of_its_prediction(toy: Path) -> None:
    row = measure(TOOLS["fitkit-int4"], toy, inputs=8, seconds=0.05)
    assert "why" not in row, row
    counts = row["parameters"]
    plan = build("toy").unet
    total = sum(sum(counts[kind].values()) for kind in ("convolutions", "linear")) + counts["others"]
    assert total == sum(p.numel() for p in plan.parameters())
    # first and last convolution stay in float, the two layers of the time embedding have 8 bits
    ends = plan.conv_in.weight.numel() + plan.conv_out.weight.numel()
    times = sum(p.numel() for n, p in plan.time_embedding.named_parameters() if n.endswith("weight"))
    assert counts["convolutions"]["0"] == ends and counts["linear"]["8"] == times
    assert set(counts["convolutions"]) == {"0", "4"} and set(counts["linear"]) == {"4", "8"}
    assert 1e-4 < row["relative_error"] < 0.5
    assert row["forward"]["rounds"] >= 5 and row["compress_seconds"] > 0


def test_an_absent_tool_and_a_failing_one_have_rows(toy: Path) -> None:
    def fail(folder: Path, plan: nn.Module, threads: int) -> Compressed:
        raise NotImplementedError("no kernel for this CPU\nand much more")

    absent = measure(Tool("Absent", "no-such-tool-of-any-kind", {}, fail), toy)
    assert absent["why"] == "not installed; pip install no-such-tool-of-any-kind" and "version" not in absent
    row = measure(Tool("Failing", "torch", {"bits": 4}, fail), toy)
    assert row["why"] == "NotImplementedError: no kernel for this CPU"
    assert row["settings"] == {"bits": 4} and row["version"]


def test_sizes_alone_run_no_prediction(toy: Path) -> None:
    def refuse(latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        raise AssertionError("predicts")

    tool = Tool("Sizes", "torch", {}, lambda folder, plan, threads: Compressed(refuse, Tally(stored=7)))
    row = measure(tool, toy, sizes_only=True)
    assert row["bytes"] == 7 and "relative_error" not in row
    assert "calibration" in measure(TOOLS["fitkit-int4-compensated"], toy, sizes_only=True)["why"]


@pytest.mark.parametrize(
    ("code", "limit", "why"),
    [
        ("import os; os.abort()", 120.0, "its process was ended by SIGABRT"),
        ("raise SystemError('broken inside')", 120.0, "SystemError: broken inside"),
        ("raise SystemExit(3)", 120.0, "its process ended with status 3"),
        ("import time; time.sleep(600)", 1.0, "not done after 1 s"),
    ],
)
def test_a_process_that_dies_has_a_row(code: str, limit: float, why: str, tmp_path: Path) -> None:
    assert run_apart([sys.executable, "-c", code], tmp_path / "row.json", limit) == {"why": why}


def test_the_table_comes_from_the_results() -> None:
    row = {
        "title": "A", "version": "1.2", "bytes": 5000, "compress_seconds": 1.26, "compress_cpu_seconds": 1.0,
        "relative_error": 0.01, "sqnr_db": 20.0,
        "parameters": {"convolutions": {"0": 1000, "4": 3000}, "linear": {"8": 5000}, "others": 1000},
        "forward": {"value": 1.5, "low": 1.4, "high": 1.61}, "note": "a|b",
    }  # fmt: skip
    results: dict[str, Any] = {
        "parameters": 10_000, "architecture": None, "device": "a CPU", "threads": 1, "inputs": 8,
        "tools": {"a": row, "b": {"title": "B", "why": "not installed"}},
    }  # fmt: skip
    text = markdown(results)
    lines = [[cell.strip() for cell in line.split(" | ")] for line in text.splitlines() if line.startswith("| ")]
    assert lines[1] == [
        "| A (1.2)", "0.01", "4.00", "30.0 %", "50.0 %", "20.0 %", "4 bit 75.0 %, float 25.0 %", "1.00e-02", "20.0",
        "1.3 (1.0)",
        "1.50 (1.40 to 1.61)", "a\\|b |",
    ]  # fmt: skip
    assert lines[2][0] == "| B" and lines[2][-1] == "not installed |" and len(lines[2]) == len(lines[0]) == 12
    assert "10,000 parameters, FP32 0.04 MB" in text and "architecture only" not in text
    assert "sd-1.5, random weights: architecture only" in markdown(results | {"architecture": "sd-1.5"})
