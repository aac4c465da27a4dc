"""The search for a detector: its space, the supernet that holds all candidates, and what a candidate is judged by."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.nas import (
    Candidate,
    ElasticBatchNorm2d,
    ElasticConv2d,
    ElasticStage,
    Goal,
    OneOf,
    Phase,
    Space,
    Steps,
    cut,
    largest,
    train_supernet,
)
from core.search import UNITS, LatencyTable, Prices, estimated, fitted_table
from core.train import Fit
from core.weights import load_weights, save_weights
from kits.pcb_inspection import training
from kits.pcb_inspection.data.augment import Ready, drawn, prepare
from kits.pcb_inspection.data.resolution import resized, seen_at
from kits.pcb_inspection.model.design import BY_HAND, FILE, Design, load_design, save_design
from kits.pcb_inspection.model.network import PairDetector, Residual

CHOICES = {
    "width4": Steps((8, 16, 24)),
    "width8": Steps((24, 32, 48, 64)),
    "width16": Steps((48, 64, 96)),
    "width32": Steps((64, 96, 128)),
    "blocks8": Steps((1, 2)),
    "blocks16": Steps((1, 2)),
    "blocks32": Steps((1, 2)),
    "kernel8": Steps((3, 5)),
    "kernel16": Steps((3, 5)),
    "kernel32": Steps((3, 5)),
    "expand": Steps((0.5, 1.0)),
    "deepest": OneOf((16, 32)),
    "head": Steps((24, 32, 48, 64)),
    "size": Steps((512, 576, 640)),
    "fusion": OneOf((4, 2, 1)),
}
"""The last values make the largest network, which holds all others' weights."""
WIDTHS, STAGES = ("width4", "width8", "width16", "width32"), (8, 16, 32)
PHASES = {
    "full": (("largest", (), 6), ("size", ("size", "deepest", "kernel8", "kernel16", "kernel32"), 4),
             ("depth", tuple(n for n in CHOICES if not n.startswith("width") and n not in ("expand", "head")), 4),
             ("all", tuple(CHOICES), 14)),
    "smoke": (("largest", (), 1), ("all", tuple(CHOICES), 1)),
}  # fmt: skip
"""Progressive shrinking: what is free, phase by phase, and epochs."""
FINISHED = {"full": 64, "smoke": 1}
"""Epochs that the winner is trained on for."""
FRESH = {"full": 320, "smoke": 4}
"""Boards of the generator in each of them, new ones every time: names learnt on the same few carried less far."""
SHORT = {"full": 8, "smoke": 1}
"""Epochs of a finalist."""
PATHS = 3
TARGET_MS = 8.0
"""Of one tile in the exported FP32 network, two thirds of the hand design's: up to it only accuracy counts."""
GOALS = (Goal("map"), Goal("latency", higher=False))
SCORE = Goal("score")


def hand() -> dict[str, Any]:
    """The detector designed by hand, as a candidate."""
    return candidate_of(BY_HAND)


def design_of(candidate: Candidate) -> Design:
    """A candidate as a design."""
    c: dict[str, Any] = dict(candidate)
    blocks, kernels = (tuple(int(c[f"{part}{s}"]) for s in STAGES) for part in ("blocks", "kernel"))
    widths = tuple(int(c[name]) for name in WIDTHS)
    return Design(
        widths,  # type: ignore[arg-type]
        blocks,  # type: ignore[arg-type]
        kernels,  # type: ignore[arg-type]
        float(c["expand"]),
        int(c["deepest"]),
        int(c["head"]),
        int(c["size"]),
        int(c["fusion"]),
    )


def candidate_of(design: Design) -> dict[str, Any]:
    """A design as a candidate; it may lie outside of the space."""
    stages = {f"{part}{s}": v for part, values in (("blocks", design.blocks), ("kernel", design.kernels))
              for s, v in zip(STAGES, values)}  # fmt: skip
    widths = dict(zip(WIDTHS, design.widths))
    rest = {"expand": design.expand, "deepest": design.deepest, "head": design.head, "size": design.size,
            "fusion": design.fusion}  # fmt: skip
    found = {**widths, **stages, **rest}
    return {name: found[name] for name in CHOICES}


class Elastic:
    """The layers of a supernet, see `network.Layers`."""

    def conv(
        self, inputs: int, outputs: int, kernels: Sequence[int], stride: int = 1, *, padding: int | None = None,
        bias: bool = False, groups: int = 1,
    ) -> nn.Module:  # fmt: skip
        made = ElasticConv2d(inputs, outputs, tuple(sorted(set(kernels))), stride, bias=bias, padding=padding)
        made.set(groups=groups)
        return made

    def norm(self, channels: int) -> nn.Module:
        return ElasticBatchNorm2d(channels)

    def stage(self, blocks: Sequence[nn.Module]) -> nn.Module:
        return ElasticStage(blocks)


class Supernet(PairDetector):
    """All candidates of the space in one network."""

    space = Space(CHOICES)
    optional = ("down32.*", "stage32.*", "lateral32")

    def __init__(self) -> None:
        super().__init__(design_of(largest(self.space)), Elastic(), smaller=(3,))

    def configure(self, candidate: Candidate) -> None:
        """Set every layer to a candidate."""
        design = design_of(candidate)
        self.design = design
        c4, c8, c16, c32 = design.widths
        for name, channels in (("stem", c4), ("down8", c8), ("down16", c16), ("down32", c32), ("fuse", design.head)):
            self.get_submodule(name).conv.set(out_channels=channels)  # type: ignore[operator, union-attr]
        self.stem.conv.set(groups=design.fusion)  # type: ignore[operator]
        for name, channels in (("lateral32", c16), ("lateral16", c8)):
            self.get_submodule(name).set(out_channels=channels)  # type: ignore[operator]
        for stride, channels, depth, kernel in zip(STAGES, (c8, c16, c32), design.blocks, design.kernels):
            stage = self.get_submodule(f"stage{stride}")
            assert isinstance(stage, ElasticStage)
            stage.set(depth=depth)
            for block in stage.blocks:
                assert isinstance(block, Residual)
                block.first.conv.set(out_channels=round(channels * design.expand), kernel_size=kernel)  # type: ignore[operator]
                block.conv.set(out_channels=channels, kernel_size=kernel)  # type: ignore[operator]


def path_loss(net: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The loss of the path that a supernet is set to, at its resolution."""
    assert isinstance(net, PairDetector)
    return training.fast_loss(net, resized(batch, net.design.size))


@dataclass(frozen=True)
class Setup:
    """What evaluations share: the folder with the supernet and the table, the data, and how much of it."""

    folder: str
    data: str | None
    preset: str
    target_ms: float = TARGET_MS


def train(setup: Setup, resume: bool) -> Path:
    """Train the supernet, unless its weights are there already; the file of its weights."""
    place = Path(setup.folder) / "supernet.safetensors"
    if place.is_file() and resume:
        return place
    torch.manual_seed(0)
    basis = training.SCHEDULES[setup.preset]
    phases = [
        Phase(name, free, replace(basis, epochs=epochs, lr=basis.lr if number == 0 else basis.lr / 2))
        for number, (name, free, epochs) in enumerate(PHASES[setup.preset])
    ]
    return shrink(Supernet(), _pairs(setup, "train"), phases, Path(setup.folder), resume)


def shrink(net: Supernet, pairs: Sequence[Any], phases: Sequence[Phase], folder: Path, resume: bool) -> Path:
    """Train a supernet on pairs by phases; the file of its weights in the folder."""
    net, basis = net.to(memory_format=torch.channels_last), phases[0].schedule
    ready = [*prepare(pairs), *drawn(training.drawn_beside(len(pairs)), 0)]
    steps = max(1, len(ready) * training.EACH // basis.batch_size)

    def batches(epoch: int) -> Iterable[dict[str, Any]]:
        return training.training_batches(ready, basis.batch_size, steps, basis.seed, epoch)

    train_supernet(
        net, phases, batches, path_loss, steps_per_epoch=steps, folder=folder / "supernet", resume=resume, paths=PATHS
    )
    save_weights(net, folder / "supernet.safetensors")
    return folder / "supernet.safetensors"


class Judge:
    """Gives a candidate its metrics; made once in every process that evaluates."""

    def __init__(self, setup: Setup, train: Sequence[Any], validation: Sequence[Any]) -> None:
        self.net = Supernet()
        load_weights(self.net, Path(setup.folder) / "supernet.safetensors")
        self.net.eval()
        self.prices = Prices(Path(setup.folder) / "latency.json", built, setup.target_ms)
        self.validation = prepare(validation)
        ready, basis = prepare(train), training.SCHEDULES[setup.preset]
        wanted = 16 if setup.preset == "full" else 2
        self.seen = list(training.training_batches(ready, basis.batch_size, wanted, basis.seed, 10_000))

    def __call__(self, candidate: Candidate) -> dict[str, float]:
        plain = self.network(candidate)
        return self.metrics(candidate, average_precision(plain, self.validation, design_of(candidate).size))

    def metrics(self, candidate: Candidate, accuracy: float) -> dict[str, float]:
        """What a candidate costs beside an accuracy, and the score of both."""
        return {"map": accuracy, **self.prices.of(candidate, accuracy)}

    def largest(self) -> PairDetector:
        """The candidate that holds all others' weights."""
        top = largest(Supernet.space)
        detector = PairDetector(design_of(top))
        detector.load_state_dict(self.network(top).state_dict())
        return detector.eval()

    def teacher(self) -> tuple[PairDetector, str]:
        """The better on validation boards of the largest candidate and the detector that ships, and its name."""
        from kits.pcb_inspection import KIT

        shipped: Any = KIT.model()
        known = {"the supernet's largest candidate": self.largest(), "the detector that ships": shipped}
        best = max(known, key=lambda name: average_precision(known[name], self.validation, known[name].design.size))
        return known[best], best

    def network(self, candidate: Candidate) -> nn.Module:
        """A candidate with the supernet's weights and batch norms of its own."""
        size = design_of(candidate).size
        batches: Iterator[tuple[Tensor]] = ((resized(batch, size)["images"],) for batch in self.seen)
        return cut(self.net, candidate, example(candidate), batches)


def example(candidate: Candidate) -> tuple[Tensor]:
    """One tile for a candidate."""
    size = design_of(candidate).size
    return (torch.rand(1, 4, size, size, generator=torch.Generator().manual_seed(0)).round(),)


def built(candidate: Candidate) -> tuple[PairDetector, tuple[Tensor]]:
    """A candidate with any weights, and one tile for it."""
    return PairDetector(design_of(candidate)).eval(), example(candidate)


def average_precision(model: nn.Module, ready: Sequence[Ready], size: int) -> float:
    """mAP50-95 in % of registered pairs seen at a tile size."""
    return training.mean_average_precision_5095(model, [seen_at(pair, size) for pair in ready])


@dataclass(frozen=True)
class Evaluation:
    """A candidate's metrics by the supernet, as a function that worker processes can be sent."""

    setup: Setup

    def __call__(self, candidate: Candidate) -> dict[str, float]:
        return _judge(self.setup)(candidate)


@lru_cache(maxsize=1)
def _judge(setup: Setup) -> Judge:
    few = 40 if setup.preset == "full" else 4
    return Judge(setup, _pairs(setup, "train")[:few], _pairs(setup, "val")[: 2 * few])


def _pairs(setup: Setup, split: str) -> Sequence[Any]:
    from kits.pcb_inspection import KIT

    return KIT.dataset(Path(setup.data) if setup.data else None, split, setup.preset)


def measure_table(setup: Setup, resume: bool) -> LatencyTable:
    """The times of the space's operators in OpenVINO here, fitted to whole networks; kept in the folder."""
    rng, space, whole = np.random.default_rng(0), Space(CHOICES), 16 if setup.preset == "full" else 8

    def networks() -> list[tuple[nn.Module, tuple[Tensor, ...]]]:
        return [built(c) for c in (hand(), *(space.draw(rng) for _ in range(whole - 1)))]

    return fitted_table(Path(setup.folder) / "latency.json", networks, resume)


@dataclass(frozen=True)
class DetectorTask:
    """The search as `core.run_search` takes it, see `core.search.Task`."""

    setup: Setup
    evaluate: Evaluation
    checked: LatencyTable
    space: Space = Space(CHOICES)
    goals: tuple[Goal, ...] = GOALS
    score: Goal = SCORE

    @property
    def hand(self) -> dict[str, Any]:
        """The design that ships."""
        return hand()

    @property
    def units(self) -> dict[str, str]:
        """Of the metrics."""
        return {"map": "%", **UNITS}

    @property
    def estimated(self) -> dict[str, tuple[str, float]]:
        """What the latency table tells, and the memory."""
        return estimated(self.checked, "map")

    @property
    def notes(self) -> tuple[str, ...]:
        """What the metrics are."""
        return (
            "map is mAP50-95 with the supernet's weights on validation boards; no board that a report is scored on was "
            "looked at",
            self.checked.sentence("tile"),
            f"score is map, over {self.setup.target_ms:g} ms times {self.setup.target_ms:g} ms / latency",
        )

    def trained(self, candidate: Candidate, folder: Path) -> dict[str, float]:
        """Train it for `SHORT` epochs from the supernet's weights; mAP50-95 on the validation boards, and the score."""
        fitted, _ = self._train(candidate, folder, SHORT[self.setup.preset])
        judge, design = _judge(self.setup), design_of(candidate)
        accuracy = average_precision(fitted.model.eval(), judge.validation, design.size)
        return judge.metrics(candidate, accuracy)

    def _train(self, candidate: Candidate, folder: Path, epochs: int) -> tuple[Fit, str]:
        """A candidate trained on from the supernet's weights, towards a teacher, and the teacher's name."""
        detector, judge = PairDetector(design_of(candidate)), _judge(self.setup)
        detector.load_state_dict(judge.network(candidate).state_dict())
        ready = prepare(_pairs(self.setup, "train"))
        basis = training.SCHEDULES[self.setup.preset]
        teacher, name = judge.teacher()
        fitted = training.train_detector(
            ready, judge.validation, replace(basis, epochs=epochs, lr=basis.lr / 2), folder, folder.is_dir(),
            start=detector, larger=[teacher], fresh=FRESH[self.setup.preset],
        )  # fmt: skip
        return fitted, name

    def keep(self, candidate: Candidate, folder: Path) -> str:
        """Train the winner on from the supernet's weights; its weights and design go to `folder`/winner."""
        design, place = design_of(candidate), folder / "winner"
        if not (place / FILE).is_file() or load_design(place / FILE) != design:
            shutil.rmtree(place, ignore_errors=True)  # another search's winner
        place.mkdir(parents=True, exist_ok=True)
        save_design(design, place / FILE)
        judge, epochs = _judge(self.setup), FINISHED[self.setup.preset]
        before = average_precision(judge.network(candidate), judge.validation, design.size)
        fitted, name = self._train(candidate, place / "training", epochs)
        save_weights(fitted.model, place / "fp32.safetensors")
        after = average_precision(fitted.model.eval(), judge.validation, design.size)
        return (
            f"the winner was trained on for {epochs} epochs, towards {name} as well: mAP50-95 on the "
            f"validation boards {before:.2f} to {after:.2f} %; quantize and score it with: "
            f"fitkit run pcb_inspection --weights {place}"
        )


def make_task(data: Path | None, preset: str, folder: Path, resume: bool) -> DetectorTask:
    """Train the supernet and measure the table, unless `resume` finds them in the folder."""
    setup = Setup(str(folder), str(data) if data is not None else None, preset)
    train(setup, resume)
    return DetectorTask(setup, Evaluation(setup), measure_table(setup, resume))
