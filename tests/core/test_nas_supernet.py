"""Supernets: parts of layers, candidates cut to the bit, statistics of their own, training by paths, and rankings."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import kendalltau
from torch import Tensor, nn

from core.kit import InputError
from core.nas import Candidate, OneOf, Space, Steps
from core.nas.elastic import ElasticBatchNorm2d, ElasticConv2d, ElasticLinear, ElasticStage, extract
from core.nas.ranking import kendall
from core.nas.supernet import Phase, cut, from_scratch, largest, recalibrate, smallest, train_supernet, within
from core.train import Schedule


class Block(nn.Module):
    """Expand, depthwise, project, with the input added."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        hidden = width * expansion
        self.expand, self.norm1 = ElasticConv2d(width, hidden, (1,)), ElasticBatchNorm2d(hidden)
        self.deep, self.norm2 = ElasticConv2d(hidden, hidden, (3, 5, 7), depthwise=True), ElasticBatchNorm2d(hidden)
        self.project, self.norm3 = ElasticConv2d(hidden, width, (1,)), ElasticBatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.expand(x)))
        y = F.relu(self.norm2(self.deep(y)))
        return x + self.norm3(self.project(y))


class Net(nn.Module):
    """Stem, a stage of blocks, a classifier of 4 classes."""

    space = Space(
        {"width": Steps((4, 8)), "depth": Steps((1, 2, 3)), "kernel": Steps((3, 5, 7)), "expansion": Steps((1, 2))}
    )

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = ElasticConv2d(1, 8, (3,), stride=2), ElasticBatchNorm2d(8)
        self.stage = ElasticStage([Block(8, 2) for _ in range(3)])
        self.head = ElasticLinear(8, 4)

    def configure(self, candidate: Candidate) -> None:
        width, depth, kernel, expansion = (int(candidate[n]) for n in ("width", "depth", "kernel", "expansion"))
        self.stem.set(out_channels=width)
        self.stage.set(depth=depth)
        for block in self.stage.blocks:
            assert isinstance(block, Block)
            block.expand.set(out_channels=width * expansion)
            block.deep.set(kernel_size=kernel)
            block.project.set(out_channels=width)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


def learnt(seed: int = 0) -> Net:
    """A network whose batch norms and kernel matrices are not as they begin."""
    torch.manual_seed(seed)
    net = Net()
    for module in net.modules():
        if isinstance(module, ElasticBatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
        if isinstance(module, ElasticConv2d):
            for turn in module.turns:
                nn.init.normal_(turn, std=0.3)
    return net.eval()


def shapes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures (count, 1, 12, 12) of four kinds: bars across, bars along, a block, nothing; with noise."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=rng)
    pictures = 0.5 * torch.randn(count, 1, 12, 12, generator=rng)
    at = torch.randint(1, 8, (count,), generator=rng)
    for i, (label, a) in enumerate(zip(labels.tolist(), at.tolist())):
        if label == 0:
            pictures[i, 0, a : a + 2] += 1.5
        elif label == 1:
            pictures[i, 0, :, a : a + 2] += 1.5
        elif label == 2:
            pictures[i, 0, a : a + 4, a : a + 4] += 1.5
    return pictures, labels


def test_every_candidate_is_cut_to_the_bit() -> None:
    net, x = learnt(), torch.randn(2, 1, 12, 12)
    for values in product(*(choice.values for choice in net.space.choices.values() if isinstance(choice, OneOf))):
        candidate = dict(zip(net.space.choices, values))
        net.configure(candidate)
        with torch.no_grad():
            wanted = net(x)
            plain = extract(net, x)
            assert torch.equal(plain(x), wanted), candidate
        kinds = {type(m) for m in plain.modules()}
        assert not any("Elastic" in kind.__name__ for kind in kinds)
    assert len(plain.get_submodule("stage")) == 3  # type: ignore[arg-type]
    assert plain.get_submodule("stage.0.deep").kernel_size == (7, 7)


def test_what_is_cut_is_as_small_as_it_says() -> None:
    net = learnt()
    small = cut(net, smallest(net.space), (torch.randn(1, 1, 12, 12),))
    large = cut(net, largest(net.space), (torch.randn(1, 1, 12, 12),))
    count = {name: sum(p.numel() for p in m.parameters()) for name, m in (("small", small), ("large", large))}
    # stem 4*9 + norm 8, block: 4*4 + 8, 4*9 + 8, 4*4 + 8, head 4*4 + 4
    assert count["small"] == 36 + 8 + (16 + 8 + 36 + 8 + 16 + 8) + 20
    assert count["large"] == 72 + 16 + 3 * (128 + 32 + 16 * 49 + 32 + 128 + 16) + 36
    again = net.stage.blocks[0]
    assert isinstance(again, Block) and again.deep.weight.shape == (16, 1, 7, 7), "the supernet is as it was"


def test_a_kernel_begins_as_the_middle_of_the_larger_one() -> None:
    torch.manual_seed(0)
    conv = ElasticConv2d(4, 4, (3, 7, 5), depthwise=True)
    conv.set(kernel_size=3)
    x = torch.randn(1, 4, 9, 9)
    torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight[:, :, 2:5, 2:5], padding=1, groups=4))
    conv.set(kernel_size=7)
    torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight, padding=3, groups=4))


def test_channels_that_groups_do_not_divide_are_told() -> None:
    conv = ElasticConv2d(4, 12)
    conv.set(out_channels=9, groups=2)
    with pytest.raises(InputError, match="4 to 9 channels in 2 groups"):
        conv(torch.ones(1, 4, 3, 3))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_are_the_blocks_on_the_diagonal(groups: int) -> None:
    torch.manual_seed(0)
    conv, x = ElasticConv2d(4, 12, (3,), bias=True), torch.randn(2, 4, 6, 6)
    conv.set(out_channels=8, groups=groups)
    apart = torch.zeros(8, 4, 3, 3)
    for n in range(groups):
        rows, columns = slice(n * 8 // groups, (n + 1) * 8 // groups), slice(n * 4 // groups, (n + 1) * 4 // groups)
        apart[rows, columns] = conv.weight[rows, columns].detach()
    torch.testing.assert_close(conv(x), F.conv2d(x, apart, conv.bias[:8], padding=1))
    plain = conv.cut(4)
    assert plain.groups == groups and plain.weight.shape == (8, 4 // groups, 3, 3)
    assert torch.equal(plain(x), conv(x))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: ElasticConv2d(3, 8, (2, 3)), "odd sizes"),
        (lambda: ElasticConv2d(3, 8).set(groups=0), "0 groups of a convolution"),
        (lambda: ElasticConv2d(4, 4, depthwise=True).set(groups=2), "2 groups of a depthwise convolution"),
        (lambda: ElasticConv2d(3, 8, depthwise=True), "give the same"),
        (lambda: ElasticConv2d(3, 8).set(out_channels=9), "9 channels of 8"),
        (lambda: ElasticConv2d(3, 8).set(kernel_size=5), "kernel 5, known are"),
        (lambda: ElasticStage([nn.Identity()]).set(depth=0), "depth 0 of 1"),
        (lambda: ElasticLinear(4, 4).set(out_features=5), "5 features of 4"),
        (lambda: within(Net.space, ["heads"]), "heads is no choice"),
        (lambda: cut(nn.Identity(), {}, ()), "no supernet"),
        (lambda: recalibrate(nn.BatchNorm2d(1), []), "no batch"),
        (lambda: extract(nn.ModuleDict({"a": nn.Identity(), "b": ElasticLinear(2, 2)})["a"], torch.ones(1)), None),
    ],
)
def test_what_cannot_be_is_refused(make: object, why: str | None) -> None:
    if why is None:
        assert isinstance(make(), nn.Identity)  # type: ignore[operator]
        return
    with pytest.raises(InputError, match=why):
        make()  # type: ignore[operator]


def test_a_layer_that_the_example_does_not_reach_is_told() -> None:
    class Beside(Net):
        def __init__(self) -> None:
            super().__init__()
            self.unused = ElasticLinear(8, 4)

    with pytest.raises(InputError, match="unused is not reached"):
        extract(Beside(), torch.randn(1, 1, 12, 12))


def test_recalibrated_statistics_are_those_of_the_batches() -> None:
    net = learnt()
    x = torch.randn(64, 1, 12, 12) * 3 + 1
    plain = cut(net, smallest(net.space), (x,), [(x[:32],), (x[32:],)])
    norm = plain.get_submodule("norm")
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
    seen = plain.get_submodule("stem")(x).detach()
    torch.testing.assert_close(norm.running_mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    parts = torch.stack([seen[:32].transpose(0, 1).flatten(1).var(1), seen[32:].transpose(0, 1).flatten(1).var(1)])
    torch.testing.assert_close(norm.running_var, parts.mean(0), rtol=1e-4, atol=1e-5)
    assert norm.momentum == 0.1 and not norm.training


def train(net: Net, folder: Path | None = None, resume: bool = False, epochs: int = 3) -> Net:
    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(12):
            yield shapes(32, 100 * epoch + i)

    def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1])

    one = Schedule(epochs, 32, 4e-3)
    phases = (
        Phase("largest", (), one),
        Phase("kernels", ("kernel",), one),
        Phase("all", tuple(Net.space.choices), one),
    )
    train_supernet(net, phases, batches, loss, steps_per_epoch=12, paths=3, folder=folder, resume=resume)
    return net


def accuracy(model: nn.Module) -> float:
    x, y = shapes(400, 9999)
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def test_a_trained_supernet_holds_candidates_that_know_the_task() -> None:
    torch.manual_seed(0)
    net = train(Net())
    x, _ = shapes(256, 5)
    for candidate in (smallest(net.space), largest(net.space), net.space.draw(np.random.default_rng(1))):
        plain = cut(net, candidate, (x[:1],), [(x,)])
        fresh = from_scratch(plain, 1).eval()
        assert accuracy(plain) > 0.6 > 0.5 > accuracy(fresh), candidate
    assert accuracy(cut(net, largest(net.space), (x[:1],), [(x,)])) > 0.85


def test_a_supernet_that_was_stopped_goes_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = train(Net(), tmp_path / "whole", epochs=1)
    torch.manual_seed(1)
    again = train(Net(), tmp_path / "whole", resume=True, epochs=1)
    for (name, mine), its in zip(first.named_parameters(), again.parameters()):
        assert torch.equal(mine, its), name


def test_ranks_agree_with_scipy_and_have_an_interval() -> None:
    rng = np.random.default_rng(0)
    alone = rng.random(12)
    shared = alone + 0.1 * rng.random(12)
    found = kendall(shared.tolist(), alone.tolist())
    assert found.tau == pytest.approx(kendalltau(shared, alone).statistic) and found.count == 12
    assert found.low < found.tau <= found.high <= 1
    nothing = kendall(rng.random(40).tolist(), rng.random(40).tolist())
    assert nothing.low < 0 < nothing.high
    for bad, why in (([1.0] * 7, "fewer than 8"), ([1.0] * 8, "no ranking"), ([float("nan")] * 8, "not finite")):
        with pytest.raises(InputError, match=why):
            kendall(bad, bad)
