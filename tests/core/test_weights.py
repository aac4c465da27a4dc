"""Files of weights: the same bytes from every process, strict loading, one line of error that names the file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

from core.compress import file_hash
from core.kit import InputError
from core.weights import load_mean, load_weights, save_weights, stored

ROOT = Path(__file__).resolve().parents[2]
COMPRESS = """
import sys
from pathlib import Path
import torch
from core.compress import compress
from core.kit import Recipe
from core.quantization import Quantize
from tests.core.test_weights import Branches, BranchesKit
torch.manual_seed(0)
compress(Branches(), Recipe("int8", (Quantize(samples=2),), "", ""), BranchesKit(), folder=Path(sys.argv[1]))
"""


class Branches(nn.Module):
    """Six layers that read the same tensor: quantized, they share an input quantizer."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([branch(x) for branch in self.branches]).sum(0)


class BranchesKit:
    """What Quantize asks of a kit."""

    name = "branches"

    def dataset(self, data: Path | None, split: str, preset: str = "full") -> list[Tensor]:
        return [torch.arange(4.0), -torch.arange(4.0)]

    def batches(self, samples: list[Tensor], batch_size: int, *, train: bool, seed: int = 0) -> list[Tensor]:
        return [torch.stack(samples)]

    def inputs(self, batch: Tensor) -> tuple[Tensor, ...]:
        return (batch,)


class Tied(nn.Module):
    """Two names for one weight, and one memory that two tensors are parts of."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.second.weight = self.first.weight
        whole = torch.randn(2, width)
        self.register_buffer("low", whole[0])
        self.register_buffer("high", whole[1])
        self.register_buffer("nothing", torch.zeros(0))
        self.register_buffer("empty", torch.zeros(0))


def test_a_checkpoint_with_shared_quantizers_has_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    hashes = []
    for seed in ("1", "2", "3"):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", COMPRESS, str(tmp_path / seed)]
        ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr
        hashes.append(file_hash(tmp_path / seed / "00-quantize" / "model.safetensors"))
    assert len(set(hashes)) == 1
    scales = [name for name in load_file(tmp_path / "1" / "00-quantize" / "model.safetensors") if "input" in name]
    assert scales == ["branches.0.input_quantizer.scale", "branches.0.input_quantizer.zero_point"]


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    one, two = Tied(), Tied()
    save_weights(one, tmp_path / "new" / "w.safetensors")
    load_weights(two, tmp_path / "new" / "w.safetensors")
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    assert two.first.weight is two.second.weight and not list(tmp_path.rglob("*.new"))
    assert set(stored(one)) == {"first.weight", "low", "high", "nothing", "empty"}


def test_without_shared_tensors_the_bytes_are_those_of_safetensors(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    save_weights(net, tmp_path / "ours.safetensors")
    save_model(net, str(tmp_path / "theirs.safetensors"))
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


@pytest.mark.parametrize("how", ["one name", "the other name", "both names"])
def test_any_name_of_a_shared_tensor_will_do(how: str, tmp_path: Path) -> None:
    net, path, value = Tied(), tmp_path / "w.safetensors", torch.randn(4, 4)
    names = {"one name": ["first"], "the other name": ["second"], "both names": ["first", "second"]}[how]
    rest = {name: torch.zeros_like(net.state_dict()[name]) for name in ("low", "high", "nothing", "empty")}
    save_file({f"{name}.weight": value.clone() for name in names} | rest, str(path))
    load_weights(net, path)
    assert torch.equal(net.second.weight, value)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"low": None}, "'low' is missing$"),
        ({"first.weight": None, "low": None}, "'first.weight' is missing and 1 more$"),
        ({"stray": torch.zeros(1)}, "'stray' is none of its tensors"),
        ({"high": torch.zeros(5)}, r"'high' is \(5,\) and not \(4,\)"),
        ({"second.weight": torch.zeros(4, 4)}, "'first.weight' and 'second.weight' differ and are one tensor here"),
    ],
)
def test_weights_of_another_network_are_refused(change: dict[str, Tensor | None], what: str, tmp_path: Path) -> None:
    net, path = Tied(), tmp_path / "w.safetensors"
    before = {name: value.clone() for name, value in net.state_dict().items()}
    changed = {name: value.clone() for name, value in stored(net).items()} | change
    save_file({name: value + 1 for name, value in changed.items() if value is not None}, str(path))
    with pytest.raises(InputError, match=rf"w\.safetensors: not weights of this Tied: {what}"):
        load_weights(net, path)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items()), "nothing was loaded"


@pytest.mark.parametrize("damage", ["missing", "torn", "empty"])
def test_a_file_that_is_not_whole_is_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(Tied(), path)
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: -9 if damage == "torn" else 0])
    what = "no such file" if damage == "missing" else "not a whole safetensors file"
    with pytest.raises(InputError, match=rf"w\.safetensors: {what}"):
        load_weights(Tied(), path)


def test_the_mean_of_files_is_loaded_and_counters_are_the_lasts(tmp_path: Path) -> None:
    files = []
    for number, value in enumerate((1.0, 2.0, 6.0)):
        net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        for tensor in net.state_dict().values():
            tensor.fill_(value)
        files.append(tmp_path / f"{number}.safetensors")
        save_weights(net, files[-1])
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    load_mean(net, files)
    found = {name: set(tensor.flatten().tolist()) for name, tensor in net.state_dict().items()}
    assert found.pop("1.num_batches_tracked") == {6}
    assert set(map(tuple, found.values())) == {(3.0,)}
    with pytest.raises(InputError, match="mean of no weights"):
        load_mean(net, [])
    with pytest.raises(InputError, match="not weights of this"):
        load_mean(nn.Linear(2, 2), files)
