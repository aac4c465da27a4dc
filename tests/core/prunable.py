"""Small networks with coupled channels, and a kit around each, for the tests of core.pruning."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from core.compress import compress
from core.kit import Graph, Recipe
from core.pruning import Prune


def conv(i: int, o: int, k: int = 3, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, groups=groups, bias=False), nn.BatchNorm2d(o), nn.SiLU())


class Residual(nn.Module):
    """A stem, two residual blocks on it, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 32)
        self.inner1, self.outer1 = conv(32, 64), conv(64, 32)
        self.inner2, self.outer2 = conv(32, 48), conv(48, 32)
        self.head = nn.Conv2d(32, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.outer1(self.inner1(x))
        x = x + self.outer2(self.inner2(x))
        return self.head(x)


class Concat(nn.Module):
    """Two branches of unequal width, joined, with a depthwise convolution and a squeeze gate behind."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv(3, 32), conv(3, 48)
        self.depthwise, self.point = conv(80, 80, groups=80), conv(80, 64, 1)
        self.squeeze, self.excite = nn.Conv2d(64, 16, 1), nn.Conv2d(16, 64, 1)
        self.fc = nn.Linear(64 * 4, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(self.depthwise(torch.cat([self.left(x), self.right(x)], 1)))
        x = x * self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()
        return self.fc(F.adaptive_avg_pool2d(x, 2).flatten(1))


class Grouped(nn.Module):
    """A grouped convolution between dense ones, and a channel split into halves (CSP)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped, self.fuse = conv(3, 32), conv(32, 64, groups=4), conv(64, 64)
        self.branch, self.join = conv(32, 32), conv(96, 32)
        self.head = nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.fuse(self.grouped(self.stem(x))).chunk(2, 1)
        return self.head(self.join(torch.cat([a, b, b + self.branch(b)], 1)))


class Transformer(nn.Module):
    """One pre-norm block of self-attention and an MLP over tokens, with a learned position."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 64)
        self.position = nn.Parameter(torch.randn(1, 6, 64) * 0.1)
        self.norm1, self.norm2 = nn.LayerNorm(64), nn.LayerNorm(64)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head(x + self.down(F.gelu(self.up(self.norm2(x)))))


class Siamese(nn.Module):
    """One stem for two pictures, and their difference."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.join, self.head = conv(1, 16), conv(48, 32), nn.Conv2d(32, 4, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.stem(a), self.stem(b)
        return self.head(self.join(torch.cat([a, b, a - b], 1)))


IMAGE = (3, 12, 12)
NETS: dict[str, tuple[type[nn.Module], tuple[tuple[int, ...], ...]]] = {
    "residual": (Residual, (IMAGE,)),
    "concat": (Concat, (IMAGE,)),
    "grouped": (Grouped, (IMAGE,)),
    "transformer": (Transformer, ((6, 12),)),
    "siamese": (Siamese, ((1, 12, 12), (1, 12, 12))),
}


def build(name: str, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A net in eval mode whose batch norms have seen data, and inputs for it."""
    torch.manual_seed(seed)
    cls, shapes = NETS[name]
    model = cls()
    inputs = tuple(torch.randn(2, *shape) for shape in shapes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
            module.running_mean.normal_(std=0.2)  # type: ignore[union-attr]
    return model.eval(), inputs


class Toy:
    """A kit around one net: fits the outputs to those of a fixed random net of the same shape."""

    name, title = "toy", "Toy"
    default_recipe, default_target = "r", "this-host"
    gates = ()

    def __init__(self, net: str) -> None:
        self.net = net
        self.recipes: dict[str, Recipe] = {}

    def model(self, weights: Path | None = None) -> nn.Module:
        return build(self.net)[0]

    def dataset(self, data: Path | None, split: str, preset: str = "full") -> Sequence[Any]:
        teacher, _ = build(self.net, seed=7)
        generator = torch.Generator().manual_seed({"train": 1, "val": 2, "test": 3}[split])
        samples = []
        for _ in range(16):
            x = tuple(torch.randn(shape, generator=generator) for shape in NETS[self.net][1])
            with torch.no_grad():
                samples.append((x, teacher(*(t[None] for t in x))[0]))
        return samples

    def batches(self, samples: Sequence[Any], batch_size: int, *, train: bool, seed: int = 0) -> Iterable[Any]:
        order = list(range(len(samples)))
        if train:
            order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
        for start in range(0, len(samples), batch_size):
            chosen = [samples[i] for i in order[start : start + batch_size]]
            yield tuple(torch.stack(c) for c in zip(*(x for x, _ in chosen))), torch.stack([y for _, y in chosen])

    def inputs(self, batch: Any) -> tuple[Tensor, ...]:
        return batch[0]

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(model(*batch[0]), batch[1])

    def score(self, module: nn.Module, samples: Sequence[Any]) -> dict[str, tuple[float, str]]:
        return {}

    def exports(self) -> tuple[Graph, ...]:
        names = [f"x{i}" for i in range(len(NETS[self.net][1]))]
        return (Graph("net", dict(zip(names, build(self.net)[1])), ("y",)),)


def run(net: str, *steps: Prune, **options: Any) -> tuple[nn.Module, nn.Module, Any]:
    kit = Toy(net)
    original = kit.model()
    small, trace = compress(original, Recipe("r", steps, "", ""), kit, **options)
    return original, small, trace


def macs(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops() // 2
