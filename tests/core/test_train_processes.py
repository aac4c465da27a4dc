"""Training in two processes, as `accelerate launch` starts them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from core.train import fit
from tests.core.training import (
    BUSY,
    PLAIN,
    STEPS,
    Batch,
    linear,
    net,
    rows,
    run_here,
    squared,
    without_seconds,
)

# what `accelerate launch` itself starts its processes with; for processors it would want mpirun installed
TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.slow
def test_two_processes_share_the_batches_and_end_alike(tmp_path: Path) -> None:
    ran = run_here("share", str(tmp_path), launch=TWO_PROCESSES)
    assert ran.returncode == 0, ran.stderr
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [t["seen"] for t in told] == [[0, 2, 4] * BUSY.epochs, [1, 3, 5] * BUSY.epochs]
    assert without_seconds(told[0]["history"]) == without_seconds(told[1]["history"])
    assert [t["evaluated"] for t in told] == [BUSY.epochs, 0]
    one, two = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert one.keys() == two.keys() == net().state_dict().keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name
    assert set(load_file(tmp_path / "last.safetensors")) >= {"model/norm.running_mean", "average/norm.running_mean"}


@pytest.mark.slow
def test_two_processes_step_on_the_mean_gradient(tmp_path: Path) -> None:
    """Three rounds of two batches are three steps on double batches in one process."""

    def doubled(epoch: int) -> Iterator[Batch]:
        batches = list(rows(epoch))
        for one, two in zip(batches[::2], batches[1::2], strict=True):
            yield torch.cat([one[0], two[0]]), torch.cat([one[1], two[1]])

    ran = run_here("double", str(tmp_path), launch=TWO_PROCESSES)
    assert ran.returncode == 0, ran.stderr
    expected = fit(linear(), doubled, squared, PLAIN, steps_per_epoch=STEPS // 2)
    for name, value in load_file(tmp_path / "0.safetensors").items():
        torch.testing.assert_close(value, expected.model.state_dict()[name], atol=1e-5, rtol=0, msg=name)
    history = json.loads((tmp_path / "0.json").read_text())["history"]
    assert [h["loss"] for h in history] == pytest.approx([h["loss"] for h in expected.history], abs=1e-5)


@pytest.mark.slow
def test_two_processes_end_together_when_the_first_says_so(tmp_path: Path) -> None:
    ran = run_here("end", str(tmp_path), launch=TWO_PROCESSES)
    assert ran.returncode == 0, ran.stderr
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [len(t["history"]) for t in told] == [2, 2]
