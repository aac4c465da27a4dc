"""The detector searched: depth of the backbone, what its pyramid joins, the grid, layers and queries.

With shared weights: the largest candidate's hold all others' (`model.shared`), and every candidate is trained beside it
along the same streams, each with a memory of its own.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from core.distillation import softened_binary_kl
from core.nas import Candidate, Goal, OneOf, Phase, Space, Steps, largest, recalibrate, train_supernet
from core.progress import progress
from core.search import UNITS, Costs, LatencyTable, Prices, estimated, fitted_table, operators
from core.train import Schedule
from core.weights import load_weights, save_weights
from kits.bev_perception import training
from kits.bev_perception.acceptance import RATE_HZ, matched
from kits.bev_perception.data.keyframes import Keyframe, in_scenes
from kits.bev_perception.data.streams import Shot, collate
from kits.bev_perception.model.configs import NANO, Config, config_beside, save_config
from kits.bev_perception.model.denoising import Noise
from kits.bev_perception.model.detector import BEVFormer, empty_memory, example_inputs
from kits.bev_perception.model.learner import Batch, Learner, Losses
from kits.bev_perception.model.shared import grown, memory_of, resampled, taken
from kits.bev_perception.scenes import recorded, watch

STAGES = (1, 2, 3, 4)
CHOICES = {
    **{f"blocks{stage}": Steps((1, 2)) for stage in STAGES},
    "joined": Steps((2, 3)),
    "height": OneOf((128, 160)),
    "side": Steps((40, 50, 60)),
    "encoder": Steps((1, 2)),
    "decoder": Steps((1, 2, 3)),
    "queries": Steps((75, 100, 150)),
    "hidden": Steps((64, 128)),
}
"""The last values make the largest network, which holds all others' weights. `joined` maps of the backbone feed the
pyramid, pictures are `height` pixels high, the grid has `side` cells a side; layers, queries and hidden features are
those of the transformer."""
SCHEDULES = {
    "full": (Schedule(epochs=3, batch_size=training.LANES, lr=3e-4, weight_decay=0.01, warmup=0.05, ema=0.998,
                      clip=10.0), 0.4),
    "smoke": (Schedule(epochs=1, batch_size=training.LANES, lr=1e-4, weight_decay=0.01, warmup=0.2, ema=0.5,
                       clip=10.0), 0.5),
}  # fmt: skip
"""Of the supernet, and the share of the scenes that an epoch shows."""
FINISHED = {"full": (1, 1.0), "smoke": (1, 0.5)}
"""Epochs that the winner is trained on for, and the share of the scenes that each shows."""
SHORT = {"full": (1, 0.4), "smoke": (1, 0.5)}
"""The same of a finalist."""
PATHS = 3
TOPS = 10.0
"""The most that a car gives, at RATE_HZ frames a second."""
GOALS = (Goal("nds"), Goal("latency", higher=False))
SCORE = Goal("score")
JUDGED = {"full": 80, "smoke": 8}
"""Validation frames that candidates are judged on, whole scenes as far as they go."""


def config_of(candidate: Candidate) -> Config:
    """A candidate as a detector's config."""
    c: dict[str, Any] = dict(candidate)
    height, side = int(c["height"]), int(c["side"])
    share = height / NANO.images.height
    width = 32 * round(NANO.images.width * share / 32)
    images = replace(NANO.images, height=height, width=width, scale=NANO.images.scale * share)
    backbone = replace(
        NANO.backbone,
        blocks=(int(c["blocks1"]), int(c["blocks2"]), int(c["blocks3"]), int(c["blocks4"])),
        out_indices=NANO.backbone.out_indices[: int(c["joined"])],
    )
    return replace(
        NANO, name="searched", images=images, backbone=backbone, bev_h=side, bev_w=side,
        rotate_center=(side / 2, side / 2), encoder_layers=int(c["encoder"]), decoder_layers=int(c["decoder"]),
        num_query=int(c["queries"]), max_num=min(NANO.max_num, 2 * int(c["queries"])), ffn_dims=int(c["hidden"]),
    )  # fmt: skip


def hand() -> dict[str, Any]:
    """`nano` as a candidate."""
    blocks = {f"blocks{stage}": 2 for stage in STAGES}
    found = {
        **blocks, "joined": len(NANO.backbone.out_indices), "height": NANO.images.height, "side": NANO.bev_h,
        "encoder": NANO.encoder_layers, "decoder": NANO.decoder_layers, "queries": NANO.num_query,
        "hidden": NANO.ffn_dims,
    }  # fmt: skip
    return {name: found[name] for name in CHOICES}


def learner(config: Config, class_weights: Tensor | None = None) -> Learner:
    """A detector of random weights as it is trained."""
    return Learner(BEVFormer(config), Noise(groups=3), pixels=True, class_weights=class_weights)


class _Path(nn.Module):
    """One candidate's layers, whose weights are given it with every call."""

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self.learner = learner

    def forward(self, batch: Batch) -> Losses:
        return self.learner.losses(batch)


class Supernet(nn.Module):
    """All candidates of the space in one set of weights; called with shots it returns the loss of the one it is set to.

    Candidates that train in one step share its shots. The largest goes its own way, and so does what else is trained
    first, second, ... after it: each of these remembers what it saw, whatever candidate it was. All but the largest
    learn from its BEV and its dense head as well.
    """

    space = Space(CHOICES)
    _above: Losses | None

    def __init__(self, class_weights: Tensor | None = None) -> None:
        super().__init__()
        self.learner = learner(config_of(largest(self.space)), class_weights)
        self._memories: dict[int, Tensor] = {}
        self._place, self._above = 0, None
        self.configure(largest(self.space))

    def configure(self, candidate: Candidate) -> None:
        """Set the weights that the next forward takes to a candidate's."""
        self.config = config_of(candidate)
        self._largest = dict(candidate) == largest(self.space)
        self._place = 0 if self._largest else self._place + 1

    def begin(self, model: BEVFormer, heads: Path | None = None) -> None:
        """Take over a trained detector's weights, and what trained along with it."""
        detector = self.learner.detector
        detector.load_state_dict(grown(model.state_dict(), detector.state_dict()))
        if heads is not None:
            load_weights(self.learner.heads(), heads)

    def forward(self, shots: Sequence[Shot]) -> Tensor:
        """The loss of the candidate on a row of shots, a scalar."""
        path = self._path(self.config)
        device = self.learner.detector.pts_bbox_head.code_weights.device
        path.train(self.training)
        view, truths = collate(shots, self.config)
        moved = type(view)(*(t.to(device) for t in vars(view).values()))
        there = [type(t)(t.boxes.to(device), t.labels.to(device)) for t in truths]
        before = self._memories.get(self._place)
        memory = empty_memory(self.config, len(shots)).to(device)
        if before is not None and len(before) == len(shots):
            memory = memory_of(before, self.config.bev_h)
        found: Losses = functional_call(path, self._weights(path), (Batch(moved, there, (), memory),))
        self._memories[self._place] = found.bev.detach()
        if self._largest:
            self._above = replace(found, total=found.total.detach(), bev=found.bev.detach())
            return found.total
        if self._above is None or self._above.bev.shape[0] != len(shots):
            return found.total
        return found.total + apart(found, self._above)

    def _weights(self, path: _Path) -> dict[str, Tensor]:
        shared = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return taken(shared, {name: tuple(t.shape) for name, t in path.state_dict().items()})

    def _path(self, config: Config) -> _Path:
        found = self.__dict__.setdefault("_paths", {})
        if config not in found:
            if len(found) >= 4:  # the largest and the smallest come back with every step
                found.pop(next(k for k in reversed(found)))
            found[config] = _Path(learner(config, self.learner.class_weights))
        kept: _Path = found[config]
        return kept

    def __deepcopy__(self, memo: dict[int, Any]) -> Supernet:
        twin = Supernet(self.learner.class_weights)
        twin.load_state_dict(self.state_dict())
        return twin.train(self.training)

    def detector(self, candidate: Candidate) -> BEVFormer:
        """A candidate as a plain detector with these weights, in eval mode."""
        plain = BEVFormer(config_of(candidate))
        state = self.learner.detector.state_dict()
        plain.load_state_dict(taken(state, {name: tuple(t.shape) for name, t in plain.state_dict().items()}))
        return plain.eval()


def apart(found: Losses, above: Losses) -> Tensor:
    """How far a candidate is from the largest one on the same shots: its BEV and its dense head, a scalar."""
    assert found.dense is not None and above.dense is not None
    bev = memory_of(above.bev, round(found.bev.shape[1] ** 0.5)).detach()
    heat = resampled(above.dense.logits.detach(), found.dense.logits.shape[-1])
    return F.mse_loss(found.bev, bev) / bev.square().mean() + 10.0 * softened_binary_kl(found.dense.logits, heat, 1.0)


@dataclass(frozen=True)
class Setup:
    """What evaluations share: the folder with the supernet and the table, the data, and how much of it.

    Up to `target_ms` of a frame only accuracy counts.
    """

    folder: str
    data: str | None
    preset: str
    target_ms: float = 0.0


def train(setup: Setup, resume: bool) -> Path:
    """Train the supernet from the shipped detector on, unless its weights are there already; the file of its weights.

    Heads of a training before (`heads.safetensors`) in the folder are gone on with.
    """
    place = Path(setup.folder) / "supernet.safetensors"
    if place.is_file() and resume:
        return place
    torch.manual_seed(0)
    samples = _samples(setup, "train")
    net = _fresh(samples)
    schedule, share = SCHEDULES[setup.preset]
    batches, steps = training.shown(samples, training.LANES, share, schedule.seed)
    heads = Path(setup.folder) / training.HEADS
    net.begin(_shipped(), heads if heads.is_file() else None)
    train_supernet(
        net, (Phase("all", tuple(CHOICES), schedule),), batches, lambda module, shots: module(shots),
        steps_per_epoch=steps, folder=Path(setup.folder) / "supernet", resume=resume, paths=PATHS,
    )  # fmt: skip
    save_weights(net, place)
    return place


def _fresh(samples: Sequence[Keyframe]) -> Supernet:
    about = training.learner_of(BEVFormer(NANO), samples)
    return Supernet(about.class_weights)


def _shipped() -> BEVFormer:
    from kits.bev_perception import KIT

    found = KIT.model()
    assert isinstance(found, BEVFormer)
    return found


class Judge:
    """Gives a candidate its metrics; made once in every process that evaluates."""

    def __init__(self, setup: Setup) -> None:
        self.net = Supernet()
        load_weights(self.net, Path(setup.folder) / "supernet.safetensors")
        self.net.eval()
        self.prices = Prices(Path(setup.folder) / "latency.json", built, setup.target_ms)
        self.samples = few(_samples(setup, "val"), JUDGED[setup.preset])
        self.seen = few(_samples(setup, "train"), 32 if setup.preset == "full" else 8)

    def __call__(self, candidate: Candidate) -> dict[str, float]:
        return self.metrics(candidate, *scored(self.network(candidate), self.samples))

    def metrics(self, candidate: Candidate, nds: float, mean_ap: float) -> dict[str, float]:
        """What a candidate costs beside NDS and mAP, and the score of both."""
        return {"nds": nds, "map": mean_ap, **self.prices.of(candidate, nds)}

    def network(self, candidate: Candidate) -> BEVFormer:
        """A candidate with the supernet's weights and batch norms of its own."""
        plain = self.net.detector(candidate)
        recalibrate(plain, _recorded(plain, self.seen))
        return plain


def _recorded(model: BEVFormer, samples: Sequence[Keyframe]) -> Iterator[tuple[Tensor, ...]]:
    """Inputs along scenes; the memory is what the model puts out for the frame before."""
    source = recorded(samples, len(samples), 0, model.config)
    inputs = next(source)
    while True:
        yield inputs
        with torch.no_grad():
            found = model(*inputs)
        try:
            inputs = source.send(found)
        except StopIteration:
            return


def few(samples: Sequence[Keyframe], count: int) -> list[Keyframe]:
    """Whole scenes, drawn from all and as many as hold `count` frames; the last one is cut."""
    scenes = in_scenes(samples)
    needed = -(-count // len(scenes[0]))
    drawn = sorted(int(i) for i in np.random.default_rng(0).permutation(len(scenes))[:needed])
    return [k for i in drawn for k in scenes[i]][:count]


def example(candidate: Candidate) -> tuple[Tensor, ...]:
    """Inputs of one frame for a candidate."""
    return tuple(example_inputs(config_of(candidate)).values())


def built(candidate: Candidate) -> tuple[BEVFormer, tuple[Tensor, ...]]:
    """A candidate with any weights, and inputs of one frame for it."""
    return BEVFormer(config_of(candidate)).eval(), example(candidate)


def scored(model: nn.Module, samples: Sequence[Keyframe]) -> tuple[float, float]:
    """(NDS, mAP) in % of frames along their scenes, in torch."""
    with progress("judging", len(samples)) as bar:
        found = {}
        for seen in watch(model, samples):
            found[seen.keyframe.token] = seen.boxes
            bar.advance()
    score = matched(samples, found).score()
    return 100 * score.nds, 100 * score.mean_ap


@dataclass(frozen=True)
class Evaluation:
    """A candidate's metrics by the supernet, as a function that worker processes can be sent."""

    setup: Setup

    def __call__(self, candidate: Candidate) -> dict[str, float]:
        return _judge(self.setup)(candidate)


@lru_cache(maxsize=1)
def _judge(setup: Setup) -> Judge:
    return Judge(setup)


def _samples(setup: Setup, split: str) -> Sequence[Keyframe]:
    from kits.bev_perception import KIT

    return KIT.dataset(Path(setup.data) if setup.data else None, split, setup.preset)


def measure_table(setup: Setup, resume: bool) -> LatencyTable:
    """The times of the space's operators in OpenVINO here, fitted to whole networks; kept in the folder."""
    rng, space, whole = np.random.default_rng(0), Space(CHOICES), 12 if setup.preset == "full" else 8

    def networks() -> list[tuple[nn.Module, tuple[Tensor, ...]]]:
        return [built(c) for c in (hand(), *(space.draw(rng) for _ in range(whole - 1)))]

    return fitted_table(Path(setup.folder) / "latency.json", networks, resume)


@dataclass(frozen=True)
class DetectorTask:
    """The search as `core.run_search` takes it, see `core.search.Task`."""

    setup: Setup
    evaluate: Evaluation
    checked: LatencyTable
    space: Space
    goals: tuple[Goal, ...] = GOALS
    score: Goal = SCORE

    @property
    def hand(self) -> dict[str, Any]:
        """`nano`."""
        return hand()

    @property
    def units(self) -> dict[str, str]:
        """Of the metrics."""
        return {"nds": "%", "map": "%", **UNITS}

    @property
    def estimated(self) -> dict[str, tuple[str, float]]:
        """What the latency table tells, and the memory."""
        return estimated(self.checked, "NDS")

    @property
    def notes(self) -> tuple[str, ...]:
        """What the metrics are."""
        return (
            f"NDS and mAP are with the supernet's weights on {JUDGED[self.setup.preset]} validation frames at most, in "
            "torch; no frame that a report is scored on was looked at",
            f"every candidate is held to {TOPS:g} TOPS at {RATE_HZ:g} frames a second",
            self.checked.sentence("frame"),
            f"score is NDS, over nano's {self.setup.target_ms:.1f} ms times {self.setup.target_ms:.1f} ms / latency",
        )

    def trained(self, candidate: Candidate, folder: Path) -> dict[str, float]:
        """Train it for `SHORT` of the scenes from the supernet's weights; what the validation frames say of it then."""
        model = self._train(candidate, folder, *SHORT[self.setup.preset])
        judge = _judge(self.setup)
        return judge.metrics(candidate, *scored(model.eval(), judge.samples))

    def _train(self, candidate: Candidate, folder: Path, epochs: int, share: float) -> BEVFormer:
        """A candidate trained on from the supernet's weights, with the heads that trained along there."""
        judge = _judge(self.setup)
        heads = folder.parent / training.HEADS
        folder.parent.mkdir(parents=True, exist_ok=True)
        save_weights(judge.net.learner.heads(), heads)
        fitted = training.train_detector(
            _samples(self.setup, "train"), replace(training.SCHEDULES[self.setup.preset], epochs=epochs, lr=3e-4),
            folder, folder.is_dir(), start=judge.network(candidate), heads=heads, share=share,
        )  # fmt: skip
        assert isinstance(fitted.model, BEVFormer)
        return fitted.model

    def keep(self, candidate: Candidate, folder: Path) -> str:
        """Train the winner on from the supernet's weights; its weights and config go to `folder`/winner."""
        place, config, setup = folder / "winner", config_of(candidate), self.setup
        weights = place / "fp32.safetensors"
        if config_beside(weights) != config:
            shutil.rmtree(place, ignore_errors=True)  # another search's winner
        place.mkdir(parents=True, exist_ok=True)
        save_config(config, place)
        val, (epochs, share) = _samples(setup, "val"), FINISHED[setup.preset]
        (before, _), (ours, _) = scored(_judge(setup).network(candidate), val), scored(_shipped(), val)
        save_weights(self._train(candidate, place / "training", epochs, share).half(), weights)
        model = BEVFormer(config)
        load_weights(model, weights)
        after, mean_ap = scored(model.eval(), val)
        return (
            f"the winner was trained on, {epochs} epoch(s): NDS on the {len(val)} validation frames {before:.2f} to "
            f"{after:.2f} % (mAP {mean_ap:.2f} %), nano's {ours:.2f} %; quantize and score it with: "
            f"fitkit run bev_perception --weights {place}"
        )


def make_task(data: Path | None, preset: str, folder: Path, resume: bool) -> DetectorTask:
    """Train the supernet and measure the table, unless `resume` finds them in the folder."""
    setup = Setup(str(folder), str(data) if data is not None else None, preset)
    if not resume:  # a winner's training goes on where it was killed, and this one would be of other shared weights
        shutil.rmtree(folder / "winner", ignore_errors=True)
    train(setup, resume)
    known = measure_table(setup, resume)
    setup = replace(setup, target_ms=known.latency(operators(*built(hand()))))
    costs = Costs(built)
    most = TOPS * 1e12 / 2 / RATE_HZ
    space = Space(CHOICES, (costs.bound("macs", most),))
    return DetectorTask(setup, Evaluation(setup), known, space)
