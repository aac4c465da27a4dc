"""A training goes on after a real kill -9 to the same bytes; what it leaves is whole, and refused where it is not."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from core.files import replaced
from core.kit import InputError
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
    same,
    squared,
    train_net,
    without_seconds,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As in the processes that `run_here` starts: sums of several threads differ from those of one in the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train_net(tmp_path_factory.mktemp("whole"))


def test_a_killed_training_goes_on_to_the_same_bytes(uninterrupted: Any, tmp_path: Path) -> None:
    epoch = 1
    ran = run_here("kill", str(tmp_path), str(epoch))
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    epochs: list[int] = []
    found = train_net(tmp_path, resume=True, on_epoch=lambda done, model: epochs.append(done))
    assert epochs == list(range(epoch + 1, BUSY.epochs)), "finished epochs are not trained again"
    assert same(found.model, uninterrupted.model)
    assert without_seconds(found.history) == without_seconds(uninterrupted.history)


def test_a_training_ends_after_the_epoch_that_says_so() -> None:
    found = train_net(None, on_epoch=lambda done, model: done == 1)
    assert [entry["epoch"] for entry in found.history] == [0, 1]


def test_resuming_a_finished_training_trains_nothing(uninterrupted: Any, tmp_path: Path) -> None:
    train_net(tmp_path)
    found = fit(net(), no_batches, squared, BUSY, steps_per_epoch=STEPS, folder=tmp_path, resume=True)
    assert same(found.model, uninterrupted.model)


def no_batches(epoch: int) -> Iterator[Batch]:
    raise AssertionError("asked for batches")


def short(
    folder: Path, resume: bool = False, model: nn.Module | None = None, steps: int = STEPS, **changed: Any
) -> Any:
    schedule = replace(PLAIN, epochs=1, **changed)
    return fit(model or linear(), rows, squared, schedule, steps_per_epoch=steps, folder=folder, resume=resume)


def test_another_training_is_refused(tmp_path: Path) -> None:
    short(tmp_path)
    for other, what in (
        ({"lr": 0.5}, "another schedule"),
        ({"steps": 5}, "another number of steps an epoch, 6 instead"),
    ):
        with pytest.raises(InputError, match=f"last.safetensors: was written with {what}"):
            short(tmp_path, resume=True, **other)
    with pytest.raises(InputError, match="last.safetensors: was written for another network"):
        short(tmp_path, resume=True, model=nn.Linear(4, 1))
    short(tmp_path, lr=0.5)  # without resume it starts anew


@pytest.mark.parametrize("damage", ["torn", "empty", "foreign"])
def test_a_damaged_checkpoint_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    short(tmp_path)
    last = tmp_path / "last.safetensors"
    if damage == "foreign":
        save_file({"x": torch.zeros(1)}, str(last))
    else:
        last.write_bytes(last.read_bytes()[: -20 if damage == "torn" else 0])
    with pytest.raises(InputError, match=r"last\.safetensors: not a whole checkpoint") as caught:
        short(tmp_path, resume=True)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **named: Any) -> None:
        # word for word what safetensors 0.8 says on a full tmpfs
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("core.train.save_file", full)
    with pytest.raises(InputError, match=r"last\.safetensors: the disk is full; free some space"):
        short(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_named_for_a_plain_file_too(tmp_path: Path) -> None:
    (tmp_path / "run.json.new").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"run\.json: the disk is full"), replaced(tmp_path / "run.json") as fresh:
        fresh.write_text("{}")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "value.json"
    with replaced(path) as fresh:
        fresh.write_text("old")
    with pytest.raises(KeyError), replaced(path) as fresh:
        fresh.write_text("half")
        raise KeyError
    assert path.read_text() == "old"
