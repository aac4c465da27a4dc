"""Defects of bare printed circuit boards, found by comparing a board with its template."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.compress import compress, history, replay
from core.evaluation.measure import device, runtime_title
from core.export import RUNTIMES, export
from core.export.artifact import Origin, origin_of
from core.figures import Figure, Figures, Measured, Stage
from core.files import write_text
from core.kit import Graph, InputError, Kit, Recipe
from core.search import Task
from core.weights import load_weights, save_weights
from kits.pcb_inspection import drift, gates, line, training
from kits.pcb_inspection.acceptance import GATES
from kits.pcb_inspection.acceptance import score as score_predictions
from kits.pcb_inspection.agreement import agreement
from kits.pcb_inspection.card import FROZEN, board_groups, write_card
from kits.pcb_inspection.conditional import gate_on
from kits.pcb_inspection.data.augment import prepare
from kits.pcb_inspection.data.deeppcb import Pair, find_pairs, has_test_list, image_size, split
from kits.pcb_inspection.data.default import default_set
from kits.pcb_inspection.data.resolution import resized, seen_at
from kits.pcb_inspection.frozen import freeze_names, freeze_shift, freeze_threshold, shifted
from kits.pcb_inspection.inspection import clean_boards, detect, sheet
from kits.pcb_inspection.model.design import design_beside
from kits.pcb_inspection.model.inspector import TILE, input_side, inspect, shift_of
from kits.pcb_inspection.model.naming import Names
from kits.pcb_inspection.model.network import PairDetector
from kits.pcb_inspection.predict import add_arguments, predict
from kits.pcb_inspection.predictions import write_predictions
from kits.pcb_inspection.recipes import DEFAULT, RECIPES

WEIGHTS = Path(__file__).parent / "weights"


class PcbInspection:
    """The kit: a pair-input detector, quantized in training."""

    name = "pcb_inspection"
    title = "PCB inspection: INT8 defect detection against a template"
    recipes: Mapping[str, Recipe] = RECIPES
    default_recipe = DEFAULT
    default_target = "x86-edge-box"
    headline = "map33"
    rate_hz = 38.0
    gates = GATES
    runtimes: tuple[str, ...] = RUNTIMES

    def __init__(self, size: int = TILE) -> None:
        self._size = size

    def of(self, model: nn.Module) -> Kit:
        """The kit with batches and graph for the tile of a model."""
        size = input_side(model)
        return self if size == self._size else PcbInspection(size)

    def model(self, weights: Path | None = None) -> nn.Module:
        """The detector in eval mode with the shipped FP32 weights, those of a file or of what `train` left."""
        path = weights or WEIGHTS
        if path.is_dir():
            path = next(
                (p for p in (path / "fp32.safetensors", path / "weights" / "fp32.safetensors") if p.is_file()),
                path / "fp32.safetensors",
            )
        return _load(PairDetector(design_beside(path)), path)

    def shipped(self) -> tuple[dict[str, nn.Module], dict[str, Any]]:
        """FP32 and INT8 as shipped, and what was frozen for them."""
        card = json.loads((WEIGHTS / "card.json").read_text(encoding="utf-8"))
        int8 = replay(PairDetector(design_beside(WEIGHTS / "int8.safetensors")), card["int8"])
        frozen = {name: card[name] for name in FROZEN if name in card}
        return {"fp32": self.model(), "int8": _load(int8, WEIGHTS / "int8.safetensors")}, frozen

    def dataset(self, data: Path | None, split: str, preset: str = "full") -> Sequence[Pair]:
        """The pairs of a split of a DeepPCB folder or of the generated set; "smoke" takes at most 40."""
        pairs = _split(data or default_set(), split)
        return pairs if preset == "full" else pairs[:40]

    def batches(
        self, samples: Sequence[Pair], batch_size: int, *, train: bool, seed: int = 0
    ) -> Iterable[dict[str, Any]]:
        """Varied crops for training, whole pairs otherwise."""
        ready = prepare(samples)
        if train:
            shown = training.training_batches(ready, batch_size, -(-len(ready) // batch_size), seed, 0)
            return (resized(batch, self._size) for batch in shown)
        return training.whole_batches([seen_at(pair, self._size) for pair in ready], batch_size)

    def inputs(self, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        """The planes (N, 4, H, W)."""
        return (batch["images"],)

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """The detection loss, a scalar."""
        return training.loss(model, batch)

    def exports(self) -> tuple[Graph, ...]:
        """One graph for one tile of 640 x 640 pixels of a board."""
        example = torch.rand(1, 4, self._size, self._size, generator=torch.Generator().manual_seed(0)).round()
        return (Graph("detector", {"planes": example}, ("classes", "distances")),)

    def report_split(self, data: Path | None) -> str:
        """ "test" where the folder has a test list, else the board groups held out of every choice."""
        return "test" if data is None or has_test_list(data) else "holdout"

    def freeze(self, module: nn.Module, data: Path | None, preset: str) -> dict[str, Any]:
        """The threshold and where boxes lie, frozen on the validation boards; where a folder has none, what ships."""
        try:
            pairs = self.dataset(data, "val", preset)
        except InputError:
            return self.shipped()[1]
        names = self._names(data, preset, input_side(module))
        found, truths = detect(module, pairs, "validating", names), {p.image_id: (p.boxes, p.labels) for p in pairs}
        more, already = freeze_shift(found, truths), shift_of(module)
        return {
            "threshold": freeze_threshold(shifted(found, more), truths),
            "shift": [round(a + b, 2) for a, b in zip(already, more)],
            "names": names,
            "frozen_on": f"{len(pairs)} validation boards",
            "drift": drift.reference(pairs),
            "gate": gate_on(pairs, input_side(module)),
        }

    def _names(self, data: Path | None, preset: str, side: int) -> Names | None:
        """See `freeze_names`, of the training boards; where a folder has none, what ships."""
        try:
            pairs = self.dataset(data, "train", preset)
        except InputError:
            return self.shipped()[1].get("names")
        return freeze_names(prepare(pairs), side)

    def remarks(self, data: Path | None, weights: Path | None) -> Sequence[str]:
        """That the shipped detector has never seen generated boards, where those are what it is judged on."""
        if data is not None or weights is not None:
            return ()
        return (
            "The detector that ships was trained on DeepPCB's boards, and these are generated ones, which "
            "it has never seen the like of: a gate on accuracy that fails here says how far it carries over. Give "
            "--data for the verdict on your boards; the kit's README has the one on DeepPCB's.",
        )

    def score(
        self, module: nn.Module, samples: Sequence[Pair], meta: Mapping[str, Any]
    ) -> dict[str, tuple[float, str]]:
        """All metrics at the frozen threshold, defects and false rejects of good boards."""
        return self._metrics(module, samples, meta)[0].figures()

    def _metrics(
        self, module: nn.Module, samples: Sequence[Pair], meta: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        names = meta.get("names") if origin_of(module) is None else None
        found = detect(module, samples, "inspecting", names)
        if origin_of(module) is None:  # an artifact names defects and moves its boxes itself
            found = shifted(found, meta.get("shift", (0.0, 0.0)))
        clean = detect(module, clean_boards(samples), "inspecting good boards", names)
        truths = {p.image_id: (p.boxes, p.labels) for p in samples}
        return score_predictions(found, truths, meta["threshold"], {p.image_id: p.group for p in samples}, clean), found

    def evaluate(
        self, module: nn.Module, samples: Sequence[Pair], meta: Mapping[str, Any], out: Path
    ) -> dict[str, Any]:
        """Metrics, with `predictions/<image id>.txt` and `metrics.json` in `out`."""
        metrics, found = self._metrics(module, samples, meta)
        write_predictions(out / "predictions", found)
        result: dict[str, Any] = metrics.to_json()
        write_text(out / "metrics.json", json.dumps(result, indent=1) + "\n")
        return result

    def train(self, data: Path | None, preset: str, out: Path, resume: bool, teacher: Path | None = None) -> Figures:
        """Train from random weights, then run the default recipe; leaves weights/ with their card and artifact/.

        `teacher` are the weights of a YOLO trained by `benchmarks/pcb_yolo.py`.
        """
        sets = {name: self.dataset(data, name, preset) for name in ("train", "val", "holdout")}
        started = time.perf_counter()
        schedule = training.SCHEDULES[preset]
        trained = training.train_detector(
            prepare(sets["train"]), prepare(sets["val"]), schedule, out / "training", resume, _teacher(teacher)
        )
        weights = out / "weights"
        weights.mkdir(parents=True, exist_ok=True)
        save_weights(trained.model, weights / "fp32.safetensors")
        fp32 = self.model(weights / "fp32.safetensors")
        int8, _ = compress(fp32, RECIPES[DEFAULT], self, data=data, preset=preset, folder=out / "steps", resume=resume)
        save_weights(int8, weights / "int8.safetensors")
        artifact = export(
            {"fp32": fp32, "int8": int8}, self.exports(), self.default_target, out / "artifact", kit=self.name
        )
        artifact.describe(self.freeze(artifact.as_module("int8-openvino", threads=2), data, preset))
        scores = {
            name: self._metrics(artifact.as_module(name, threads=2), sets["holdout"], artifact.meta)[0].to_json()
            for name in artifact.variants
        }
        spent = sum(entry["seconds"] for entry in trained.history) + time.perf_counter() - started
        taught = " --teacher YOLO" if teacher else ""
        about = {
            "data": "DeepPCB, trainval" if data else "the kit's generated set",
            "deeppcb": data is not None,
            "device": device(),
            "pairs": {name: len(pairs) for name, pairs in sets.items()},
            "groups": {name: board_groups(pairs) for name, pairs in sets.items()},
            "parameters": sum(p.numel() for p in fp32.parameters()),
            "seed": schedule.seed,
            "seconds": round(spent),
            "command": f"fitkit train pcb_inspection {'--data DeepPCB ' if data else ''}--preset {preset}{taught}",
        }
        write_card(weights, history(out / "steps"), artifact.meta, scores, about)
        figures = Figures()
        for name, metrics in scores.items():
            basis = Measured(
                device(),
                runtime_title(artifact, name, 2),
                len(sets["holdout"]),
                None,
                artifact.sha256,
                note="split holdout",
            )
            stage: Stage = "original" if name.startswith("fp32") else "compressed"
            figures |= Figures(
                Figure(k, metrics[k], unit, basis, stage)
                for k, unit in metrics["units"].items()
                if metrics[k] is not None
            )
        return figures

    def task(self, data: Path | None, preset: str, folder: Path, resume: bool) -> Task:
        """A search for the detector's architecture: its supernet trained, its latency table measured."""
        from kits.pcb_inspection.search import make_task

        return make_task(data, preset, folder, resume)

    def check(self, inputs: Sequence[str]) -> None:
        """The pairs of the inputs, found and of one size each."""
        find_pairs(*inputs)

    def predict(
        self, module: nn.Module, inputs: Sequence[str], meta: Mapping[str, Any], out: Path, options: argparse.Namespace
    ) -> str:
        """JSON, CSV and overlays for pairs, folders and lists."""
        return predict(module, inputs, meta, out, options)

    def arguments(self, command: str, parser: argparse.ArgumentParser) -> None:
        """The options of `predict`."""
        if command == "predict":
            add_arguments(parser)

    def pipeline(self, module: nn.Module, samples: Sequence[Pair]) -> Callable[[], Any]:
        """Registration, network and suppression of the next decoded pair."""
        decoded = cycle([p.load() for p in samples])
        return lambda: inspect(module, *next(decoded))

    def baselines(self, samples: Sequence[Pair], threads: int) -> dict[str, Callable[[], Any]]:
        """YOLOv8n FP32 in OpenVINO, where ultralytics is installed (extra `baseline`)."""
        from kits.pcb_inspection.baseline import speed_baselines

        return speed_baselines(samples, threads)

    def compare(
        self, original: nn.Module, compressed: nn.Module, samples: Sequence[Any], artifact: Any, preset: str, out: Path
    ) -> tuple[Figures, list[dict[str, Any]]]:
        """How the compressed detector stands what a line does to pictures, and the same board many times."""
        few, shots = {"smoke": (6, 4), "full": (40, 20)}[preset]
        chosen = [samples[i * len(samples) // few] for i in range(min(few, len(samples)))]
        stood = line.stress(compressed, chosen, artifact.meta["threshold"])
        repeated = line.repeat(compressed, chosen[: few // 2], artifact.meta["threshold"], shots)
        origin = origin_of(compressed)
        software = runtime_title(origin.artifact, origin.variant, origin.threads) if origin is not None else "torch"
        basis = Measured(device(), software, 2 * repeated.boards * shots, None, artifact.sha256)
        known = {
            "repeat_agreement": repeated.agreement,
            "repeat_false_reject": repeated.false_reject,
            "repeat_false_accept": repeated.false_accept,
        }
        figures = Figures(Figure(name, value, "%", basis, "compressed") for name, value in known.items())
        tables = line.tables(stood, repeated)
        # of few boards a single defect is more than the tenth of a point that the gates allow
        judged = samples if preset == "full" else chosen
        if origin is not None and (other := _in_other_runtime(origin)) is not None:
            agreed = agreement(compressed, other[1], judged, artifact.meta["threshold"])
            both = f"{software} and {runtime_title(origin.artifact, other[0], origin.threads)}"
            alike = Measured(device(), both, agreed.of, None, artifact.sha256)
            figures |= Figures([Figure("runtime_agreement", agreed.share, "%", alike, "compressed")])
        fitting = [pair for pair in judged if max(image_size(pair.test)) <= TILE]
        if "gate" in artifact.meta and origin is not None and fitting:
            studied = gates.study(artifact, origin.variant, 2, fitting)
            tables += gates.tables(studied, gates.by_density(artifact, origin.variant, 2, fitting), artifact)
            gated, dense = (studied[name].metrics for name in ("crops however many", "always dense"))
            lost = {f"gated_{name}_loss": dense[name] - gated[name] for name in ("official_ap", "recall_right")}
            figures |= Figures(Figure(name, value, "points", basis, "compressed") for name, value in lost.items())
        if preset == "full" and origin is not None:
            from kits.pcb_inspection.scan import panel  # a program as well, which the kit must not have loaded first

            took = panel(artifact, origin.variant, 2, samples)
            note = f"{len(samples)} boards side by side, {took.tiles} tiles, decoding not counted"
            once = Measured(device(), software, 1, None, artifact.sha256, note=note)
            spent = {"scan_seconds": (took.seconds, "s"), "scan_memory": (took.peak, "MB")}
            figures |= Figures(Figure(name, *value, once, "compressed") for name, value in spent.items())
        return figures, tables

    def pictures(self, module: nn.Module, samples: Sequence[Pair], meta: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Four boards with what was found, missed and called falsely."""
        return sheet(module, samples, meta["threshold"])


def _in_other_runtime(origin: Origin) -> tuple[str, nn.Module] | None:
    """The same network in the artifact's other runtime, with the name of its variant; None where there is no other."""
    artifact, variant = origin.artifact, origin.variant
    precision = variant.partition("-")[0]
    others = [name for name in artifact.variants if name.partition("-")[0] == precision and name != variant]
    return (others[0], artifact.as_module(others[0], origin.threads)) if others else None


def _teacher(weights: Path | None) -> training.Teacher | None:
    if weights is None:
        return None
    from kits.pcb_inspection.baseline import yolo_teacher  # an extra, for training only

    return yolo_teacher(weights)


@lru_cache(maxsize=8)
def _split(root: Path, name: str) -> list[Pair]:
    return split(root, name)


def _load(model: nn.Module, path: Path) -> nn.Module:
    """Weights of a safetensors file, strictly; raises InputError naming the file where they do not fit."""
    if not path.is_file():
        raise InputError(f"{path}: no weights here; train them with: fitkit train pcb_inspection --out DIR")
    load_weights(model, path)
    return model.eval()


KIT = PcbInspection()
