"""The kit as `core` takes it: a small BEVFormer over scenes in nuScenes' format."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.compress import compress, history, replay
from core.evaluation.measure import device, runtime_title
from core.export import RUNTIMES, export
from core.export.artifact import origin_of
from core.figures import Figure, Figures, Measured, Stage
from core.files import write_text
from core.kit import Graph, InputError, Kit, Recipe
from core.pruning import Group
from core.search import Task
from core.weights import load_weights, save_weights
from kits.bev_perception import shipped, training
from kits.bev_perception.acceptance import CAR, GATES, RATE_HZ, freeze_threshold, observed, verdict
from kits.bev_perception.card import write_card
from kits.bev_perception.comparison import compare
from kits.bev_perception.data.boxes import Boxes
from kits.bev_perception.data.default import default_set
from kits.bev_perception.data.keyframes import Keyframe, keyframes
from kits.bev_perception.data.nuscenes import NuScenes
from kits.bev_perception.data.streams import AS_IT_IS, Variation, with_past
from kits.bev_perception.dynamic import Dynamic, Policy, freeze_alarm
from kits.bev_perception.metrics.results import write_results
from kits.bev_perception.model.boxes import detections
from kits.bev_perception.model.configs import NANO, Config, config_beside, from_json, to_json
from kits.bev_perception.model.detector import OUTPUTS, BEVFormer, example_inputs
from kits.bev_perception.model.learner import Batch, Learner
from kits.bev_perception.model.state import BevState
from kits.bev_perception.pictures.frame import scene_strip
from kits.bev_perception.predict import add_arguments, check, predict
from kits.bev_perception.prune import coupled
from kits.bev_perception.recipes import DEFAULT, READY, RECIPES
from kits.bev_perception.scenes import network_images, recorded

WEIGHTS = Path(__file__).parent / "weights"
DETECTOR = "detector"
"""What an artifact's meta calls the config of a detector that is not `nano`."""
DEPTH = 2
"""Frames before a sample that its memory is made of, where samples come in no order."""


class BevPerception:
    """The kit. `model` (see `of`) makes the memory of batches; without one the shipped weights do."""

    name = "bev_perception"
    title = "BEV perception: a pruned, mixed-precision detector of six cameras"
    default_target = CAR
    headline = "nds"
    rate_hz = RATE_HZ
    gates = GATES
    runtimes: tuple[str, ...] = RUNTIMES

    def __init__(self, model: BEVFormer | None = None, default_recipe: str | None = None) -> None:
        self._model = model
        self.recipes: Mapping[str, Recipe] = {k: r for k, r in RECIPES.items() if k != READY or shipped.is_there()}
        self.default_recipe = default_recipe or (READY if shipped.is_there() else DEFAULT)
        self._seen: dict[tuple[str, str, tuple[str, ...]], dict[str, Boxes]] = {}

    @property
    def config(self) -> Config:
        """Of the kit's model."""
        return self._model.config if self._model is not None else NANO

    def of(self, model: nn.Module) -> Kit:
        """The kit whose batches remember with this model, and whose graph is its."""
        if not isinstance(model, BEVFormer):
            return self
        return BevPerception(model, READY if shipped.is_default(model) else DEFAULT)

    def model(self, weights: Path | None = None) -> nn.Module:
        """`nano` in eval mode with the shipped FP32 weights, those of a file or of what `train` left."""
        path = weights or WEIGHTS
        if path.is_dir():
            path = next(
                (p for p in (path / "fp32.safetensors", path / "weights" / "fp32.safetensors") if p.is_file()),
                path / "fp32.safetensors",
            )
        return _load(BEVFormer(config_beside(path)), path)

    def shipped(self) -> tuple[dict[str, nn.Module], dict[str, Any]]:
        """FP32 as shipped, what `whole` made of it (or `mixed`, where that alone ships), and what was frozen."""
        card = json.loads((WEIGHTS / "card.json").read_text(encoding="utf-8"))
        if shipped.is_there():
            int8 = shipped.build(self.model()).eval()
        else:
            int8 = _load(replay(BEVFormer(NANO), card["int8"]), WEIGHTS / "int8.safetensors")
        return {"fp32": self.model(), "int8": int8}, {k: card[k] for k in ("threshold", "alarm") if k in card}

    def dataset(self, data: Path | None, split: str, preset: str = "full") -> Sequence[Keyframe]:
        """The keyframes of a split of a nuScenes-format folder or of the generated set; "smoke" takes at most 24."""
        if data is None:
            return _samples(default_set(split, preset), "all")
        found = _samples(data, self._split(data, split))
        return found if preset == "full" else found[:24]

    def _split(self, data: Path, split: str) -> str:
        """The folder's name for a split: nuScenes has no third one, "test" is then "val"; never is one "train" too."""
        known = _folder(data).splits
        for name in (split, f"mini_{split}"):
            if known.get(name):
                return name
        if split in ("test", "val") and any(known.get(n) for n in ("val", "mini_val")):
            return "val" if known.get("val") else "mini_val"
        raise InputError(
            f"{data}: no split {split!r}; name its scenes in splits.json, apart from those of the others"
            " (predict needs none; evaluate takes --split all)"
        )

    def batches(self, samples: Sequence[Keyframe], batch_size: int, *, train: bool, seed: int = 0) -> Iterable[Batch]:
        """Keyframes with the frames before them; with `train` in any order and varied."""
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(samples)) if train else np.arange(len(samples))
        return self._batches([samples[i] for i in order], batch_size, rng if train else None)

    def _batches(
        self, samples: Sequence[Keyframe], batch_size: int, rng: np.random.Generator | None
    ) -> Iterator[Batch]:
        for start in range(0, len(samples), batch_size):
            part = samples[start : start + batch_size]
            varied = [Variation.drawn(rng) if rng is not None else AS_IT_IS for _ in part]
            yield with_past(part, varied, self.config, DEPTH)

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """The six inputs of the detector; the memory is what the kit's model remembers of the frames before."""
        view = batch.view
        memory = Learner(self._own()).remember(batch)
        return view.images, view.lidar2img, view.can_bus, memory, view.has_prev, view.camera_mask

    def stream(
        self, samples: Sequence[Keyframe], count: int, seed: int
    ) -> Generator[tuple[Tensor, ...], tuple[Tensor, ...], None]:
        """The detector's inputs along scenes, with the memory that it sends back: see `scenes.recorded`."""
        return recorded(samples, count, seed, self.config)

    def _own(self) -> BEVFormer:
        if self._model is None:
            shipped = self.model()
            assert isinstance(shipped, BEVFormer)
            self._model = shipped
        return self._model

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The training loss of a batch without denoising, a scalar."""
        found: Tensor = Learner(model)(batch)  # type: ignore[arg-type]
        return found

    def coupled(self, module: nn.Module) -> list[Group]:
        """The groups of channels that tracing cannot follow."""
        return coupled(module)

    def exports(self) -> tuple[Graph, ...]:
        """One graph: cameras, motion and memory to boxes and memory."""
        return (Graph("detector", example_inputs(self.config), OUTPUTS),)

    def remarks(self, data: Path | None, weights: Path | None) -> Sequence[str]:
        """What the model card says of how the shipped detectors compare, where they are what is judged."""
        card = json.loads((WEIGHTS / "card.json").read_text(encoding="utf-8"))
        told = card["about"].get("remark") if weights is None else None
        return (told,) if told else ()

    def report_split(self, data: Path | None) -> str:
        """ "test", or nuScenes' own "val" where a folder has no test split: no choice of the kit looks at it there."""
        return "test"

    def freeze(self, module: nn.Module, data: Path | None, preset: str) -> dict[str, Any]:
        """The threshold of pictures and warnings, and the alarm of the dynamic path, frozen on validation scenes; of a
        folder without a split of its own for that the shipped threshold stays.
        """
        own = {} if self.config == NANO else {DETECTOR: to_json(self.config)}
        if data is not None and self._split(data, "val") == self._split(data, "test"):
            return {**self.shipped()[1], **own}
        samples = self.dataset(data, "val", preset)
        cues = Dynamic(module, module, self.config, Policy(alarm=math.inf))
        threshold = freeze_threshold(samples, observed(cues, samples, self.config, "validating"))
        return {
            "threshold": threshold,
            "alarm": freeze_alarm(cues.watch.alarms),
            "frozen_on": f"{len(samples)} validation frames",
            **own,
        }

    def _config_of(self, module: nn.Module) -> Config:
        """Of a detector in torch, or of the one that an artifact was made of."""
        origin = origin_of(module)
        if origin is not None:
            return told_by(origin.artifact.meta)
        found = getattr(module, "config", None)
        return found if isinstance(found, Config) else self.config

    def predictions(self, module: nn.Module, samples: Sequence[Keyframe], label: str) -> dict[str, Boxes]:
        """What a detector finds in keyframes, by token; an artifact's variant watches the same frames only once."""
        origin = origin_of(module)
        if origin is None:
            return observed(module, samples, self._config_of(module), label)
        key = (origin.artifact.sha256, origin.variant, tuple(sample.token for sample in samples))
        if key not in self._seen:
            self._seen[key] = observed(module, samples, told_by(origin.artifact.meta), label)
        return self._seen[key]

    def score(
        self, module: nn.Module, samples: Sequence[Keyframe], meta: Mapping[str, Any]
    ) -> dict[str, tuple[float, str]]:
        """NDS and its parts, by day, by night and after events, and the recall of sudden obstacles."""
        found = self.predictions(module, samples, "watching")
        return verdict(samples, found, meta["threshold"]).figures()

    def evaluate(
        self, module: nn.Module, samples: Sequence[Keyframe], meta: Mapping[str, Any], out: Path
    ) -> dict[str, Any]:
        """Metrics in `metrics.json`; the devkit's own file in `predictions/results_nusc.json`."""
        found = self.predictions(module, samples, "watching")
        (out / "predictions").mkdir(parents=True, exist_ok=True)
        write_results(out / "predictions" / "results_nusc.json", found)
        result = verdict(samples, found, meta["threshold"]).to_json()
        write_text(out / "metrics.json", json.dumps(result, indent=1) + "\n")
        return result

    def train(self, data: Path | None, preset: str, out: Path, resume: bool, teacher: Path | None = None) -> Figures:
        """Train from random weights, then run the default recipe; leaves weights/ with their card and artifact/."""
        if teacher is not None:
            raise InputError("--teacher: this kit distils by recipe; leave it out")
        sets = {name: self.dataset(data, name, preset) for name in ("train", "val", "test")}
        started = time.perf_counter()
        schedule = training.SCHEDULES[preset]
        trained = training.train_detector(sets["train"], schedule, out / "training", resume)
        return self.finish(trained.model, sets, out, preset, data, resume, time.perf_counter() - started)

    def finish(
        self, model: nn.Module, sets: Mapping[str, Sequence[Keyframe]], out: Path, preset: str, data: Path | None,
        resume: bool, seconds: float,
    ) -> Figures:  # fmt: skip
        """From a trained detector to what ships: weights, the default recipe, artifact, scores and card."""
        weights = out / "weights"
        weights.mkdir(parents=True, exist_ok=True)
        save_weights(model.half(), weights / "fp32.safetensors")
        fp32 = self.model(weights / "fp32.safetensors")
        kit = BevPerception(fp32)  # type: ignore[arg-type]
        int8, _ = compress(fp32, RECIPES[DEFAULT], kit, data=data, preset=preset, folder=out / "steps", resume=resume)
        save_weights(int8, weights / "int8.safetensors")
        artifact = export(
            {"fp32": fp32, "int8": int8}, self.exports(), self.default_target, out / "artifact", kit=self.name
        )
        artifact.describe(kit.freeze(artifact.as_module("int8-openvino", threads=2), data, preset))
        figures, scores = Figures(), {}
        for name in artifact.variants:
            found = kit.predictions(artifact.as_module(name, threads=2), sets["test"], f"watching, {name}")
            judged = verdict(sets["test"], found, artifact.meta["threshold"])
            scores[name] = judged.to_json()
            basis = Measured(device(), runtime_title(artifact, name, 2), len(sets["test"]), None, artifact.sha256,
                             note="split test")  # fmt: skip
            stage: Stage = "original" if name.startswith("fp32") else "compressed"
            figures |= Figures(Figure(k, v, unit, basis, stage) for k, (v, unit) in judged.figures().items() if v == v)
        about = {
            "data": "the folder given" if data else "the kit's generated world",
            "frames": {name: len(samples) for name, samples in sets.items()},
            "parameters": sum(p.numel() for p in fp32.parameters()),
            "seconds": round(seconds),
            "device": device(),
            "seed": training.SCHEDULES[preset].seed,
            "command": f"fitkit train bev_perception {'--data DIR ' if data else ''}--preset {preset}",
        }
        write_card(weights, history(out / "steps"), artifact.meta, scores, about)
        return figures

    def task(self, data: Path | None, preset: str, folder: Path, resume: bool) -> Task:
        """A search for the detector's architecture: its supernet trained, its latency table measured."""
        from kits.bev_perception.search import make_task

        return make_task(data, preset, folder, resume)

    def check(self, inputs: Sequence[str]) -> None:
        """The folders of the inputs, in nuScenes' format."""
        check(inputs)

    def predict(
        self, module: nn.Module, inputs: Sequence[str], meta: Mapping[str, Any], out: Path, options: argparse.Namespace
    ) -> str:
        """Boxes on all cameras and the BEV map, a GIF a scene, and `results_nusc.json`."""
        return predict(module, told_by(meta), inputs, out, options, meta)

    def arguments(self, command: str, parser: argparse.ArgumentParser) -> None:
        """The options of `predict`."""
        if command == "predict":
            add_arguments(parser)

    def pipeline(self, module: nn.Module, samples: Sequence[Keyframe]) -> Callable[[], Any]:
        """State, network and boxes of the next decoded frame."""
        decoded, config = [], self.config
        for sample in samples:
            views = sample.views(config.images)
            matrices = torch.from_numpy(views.lidar2img).float()[None]
            decoded.append((sample.frame(views), network_images(views, config), matrices))
        waiting, state = cycle(decoded), BevState(config)

        def run() -> Any:
            frame, images, lidar2img = next(waiting)
            step = state.step(frame)
            scores, codes, bev = module(images, lidar2img, *step.inputs)
            state.keep(bev)
            return detections(scores[0], codes[0], config)

        return torch.inference_mode()(run)

    def baselines(self, samples: Sequence[Keyframe], threads: int) -> dict[str, Callable[[], Any]]:
        """No other tool here does this job without mmcv and a GPU."""
        return {}

    def compare(
        self, original: nn.Module, compressed: nn.Module, samples: Sequence[Any], artifact: Any, preset: str, out: Path
    ) -> tuple[Figures, list[dict[str, Any]]]:
        """Latency in the same runtime, channels, sparsity, compute, and losses by day, by night and after events."""
        steps = out.parent / "steps"
        return compare(self, original, compressed, samples, artifact, preset, steps, self.predictions, self.config)

    def pictures(self, module: nn.Module, samples: Sequence[Keyframe], meta: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Frames by day and by night with what was found and what was there."""
        return scene_strip(module, told_by(meta), samples, meta["threshold"])


def told_by(meta: Mapping[str, Any]) -> Config:
    """The config of the detector that an artifact's meta tells of; InputError for one that is none."""
    return from_json(meta[DETECTOR], "manifest.json") if DETECTOR in meta else NANO


@lru_cache(maxsize=8)
def _folder(root: Path) -> NuScenes:
    return NuScenes(root)


@lru_cache(maxsize=16)
def _samples(root: Path, split: str) -> list[Keyframe]:
    data = _folder(root)
    found = keyframes(data, data.split(split))
    if not found:
        raise InputError(f"{root}: split {split!r} holds no keyframe; give a folder that has some")
    return found


def _load(model: nn.Module, path: Path) -> nn.Module:
    """Weights of a safetensors file, strictly; raises InputError naming the file where they do not fit."""
    if not path.is_file():
        raise InputError(f"{path}: no weights here; train them with: fitkit train bev_perception --out DIR")
    load_weights(model, path)
    return model.eval()
