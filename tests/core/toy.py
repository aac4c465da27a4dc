"""A whole kit in one small file: which corner of a 16 x 16 image is bright, told by a small network."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.figures import Figure, Figures, Gate, Measured
from core.kit import Graph, InputError, Kit, Recipe
from core.quantization import QAT, Quantize

PTQ = Quantize(samples=32, reduce_range=True, quantize_outputs=True)
SIZES = {"train": 64, "val": 24, "test": 40}


@dataclass(frozen=True)
class Sample:
    """An image (1, 16, 16) and the corner, 0 to 3, that is bright."""

    image: Tensor
    corner: int


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(8 * 4 * 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


class ToyKit:
    name = "toy"
    title = "The bright corner"
    recipes: Mapping[str, Recipe] = {
        "int8": Recipe("int8", (PTQ,), "a second", "INT8"),
        "qat": Recipe("qat", (PTQ, QAT(epochs=1, batch_size=16, lr=1e-3, ema=0.5)), "seconds", "INT8, trained"),
    }
    default_recipe = "int8"
    default_target = "x86-edge-box"
    headline = "accuracy"
    rate_hz = 10.0
    runtimes: tuple[str, ...] = ("onnxruntime", "openvino")
    gates: tuple[Gate, ...] = (
        Gate("accuracy", "accuracy", ">= 90", "%"),
        Gate("parameters", "parameters", "<= 2000"),
        Gate("speed", "fps", ">= 1", "1/s", device="this-host"),
        Gate("power", "power", "<= 1000", "W", device="edge-1w"),
    )

    def of(self, model: nn.Module) -> Kit:
        """Nothing here depends on the model."""
        return self

    def model(self, weights: Path | None = None) -> nn.Module:
        net = Toy()
        net.load_state_dict(_trained())
        return net.eval()

    def dataset(self, data: Path | None, split: str, preset: str = "full") -> Sequence[Sample]:
        if split not in SIZES:
            raise InputError(f"split {split!r}: the toy set has {', '.join(SIZES)}")
        seed = 0
        if data is not None:
            if not (data / "seed.txt").is_file():
                raise InputError(f"{data / 'seed.txt'}: no such file; a toy set is a folder with a seed")
            seed = int((data / "seed.txt").read_text())
        return _drawn(split, seed)

    def batches(self, samples: Sequence[Sample], batch_size: int, *, train: bool, seed: int = 0) -> Iterable[Any]:
        order = list(range(len(samples)))
        if train:
            order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
        for start in range(0, len(order), batch_size):
            chosen = [samples[i] for i in order[start : start + batch_size]]
            yield torch.stack([s.image for s in chosen]), torch.tensor([s.corner for s in chosen])

    def inputs(self, batch: Any) -> tuple[Tensor, ...]:
        return (batch[0],)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def score(
        self, module: nn.Module, samples: Sequence[Sample], meta: Mapping[str, Any]
    ) -> dict[str, tuple[float, str]]:
        right = sum(self.tell(module, s) == s.corner for s in samples)
        return {"accuracy": (100 * right / len(samples), "%"), "confident": (float(meta["threshold"]), "count")}

    def tell(self, module: nn.Module, sample: Sample) -> int:
        with torch.no_grad():
            return int(module(sample.image[None]).argmax())

    def exports(self) -> tuple[Graph, ...]:
        return (Graph("net", {"x": _example()}, ("scores",)),)

    def shipped(self) -> tuple[dict[str, nn.Module], dict[str, Any]]:
        from core.compress import compress

        return {"fp32": self.model(), "int8": compress(self.model(), self.recipes["int8"], self)[0]}, {"threshold": 3}

    def freeze(self, module: nn.Module, data: Path | None, preset: str) -> dict[str, Any]:
        return {"threshold": sum(self.tell(module, s) == s.corner for s in self.dataset(data, "val", preset))}

    def report_split(self, data: Path | None) -> str:
        return "test"

    def train(self, data: Path | None, preset: str, out: Path, resume: bool, teacher: Path | None = None) -> Figures:
        (out / "trained.json").write_text(json.dumps({"data": str(data), "preset": preset, "resume": resume}))
        return Figures([Figure("accuracy", 100.0, "%", Measured("this-host: toy", "torch", 1))])

    def evaluate(
        self, module: nn.Module, samples: Sequence[Sample], meta: Mapping[str, Any], out: Path
    ) -> dict[str, Any]:
        (out / "predictions").mkdir(parents=True, exist_ok=True)
        for index, sample in enumerate(samples):
            (out / "predictions" / f"{index}.txt").write_text(f"{self.tell(module, sample)}\n")
        metrics = {"threshold": meta["threshold"], "accuracy": self.score(module, samples, meta)["accuracy"][0]}
        (out / "metrics.json").write_text(json.dumps(metrics))
        return metrics

    def check(self, inputs: Sequence[str]) -> None:
        for text in inputs:
            if not text.isdigit():
                raise InputError(f"input {text!r}: expected the number of a sample")

    def predict(
        self, module: nn.Module, inputs: Sequence[str], meta: Mapping[str, Any], out: Path, options: Any
    ) -> str:
        out.mkdir(parents=True, exist_ok=True)
        found = [self.tell(module, self.dataset(None, "test")[int(i)]) + options.add for i in inputs]
        (out / "results.json").write_text(json.dumps(found))
        return f"corners {found}; results: {out}"

    def arguments(self, command: str, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--add", type=int, default=0)

    def pipeline(self, module: nn.Module, samples: Sequence[Sample]) -> Callable[[], Any]:
        turns = cycle(samples)
        return lambda: self.tell(module, next(turns))

    def baselines(self, samples: Sequence[Sample], threads: int) -> dict[str, Callable[[], Any]]:
        return {}

    def compare(
        self, original: nn.Module, compressed: nn.Module, samples: Sequence[Any], artifact: Any, preset: str, out: Path
    ) -> tuple[Figures, list[dict[str, Any]]]:
        """Nothing beyond the scores."""
        return Figures(), []

    def pictures(self, module: nn.Module, samples: Sequence[Sample], meta: Mapping[str, Any]) -> list[dict[str, Any]]:
        return []


class TwoGraphs(ToyKit):
    """The same in two graphs, as a kit whose parts run by themselves."""

    def exports(self) -> tuple[Graph, ...]:
        return (
            Graph("encoder", {"x": _example()}, ("features",), "encoder"),
            Graph("head", {"features": torch.rand(1, 8, 4, 4)}, ("scores",), "head"),
        )

    def tell(self, module: nn.Module, sample: Sample) -> int:
        with torch.no_grad():
            encoder, head = module.get_submodule("encoder"), module.get_submodule("head")
            return int(head(encoder(sample.image[None])).argmax())


def _example() -> Tensor:
    return torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))


@lru_cache
def _drawn(split: str, seed: int) -> tuple[Sample, ...]:
    draws = torch.Generator().manual_seed(1000 * seed + list(SIZES).index(split))
    made = []
    for index in range(SIZES[split]):
        image, corner = torch.rand(1, 16, 16, generator=draws), index % 4
        row, column = 8 * (corner // 2), 8 * (corner % 2)
        image[:, row : row + 8, column : column + 8] += 0.35
        made.append(Sample(image, corner))
    return tuple(made)


@lru_cache
def _trained() -> dict[str, Tensor]:
    """Weights after some steps on the training split: not perfect, so that a change of them shows in the accuracy."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, kit = Toy(), ToyKit()
        optimizer = torch.optim.AdamW(net.parameters(), 0.02)
        (batch,) = kit.batches(_drawn("train", 0), 64, train=False)
        for _ in range(25):
            optimizer.zero_grad()
            kit.loss(net, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return net.state_dict()


KIT = ToyKit()
TWO_GRAPHS = TwoGraphs()
