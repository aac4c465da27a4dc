"""`run`: one model from its weights to a judged report, stage by stage, each stage kept for `resume`."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core.compress import Trace, compress
from core.evaluation.bench import available_cores, bench
from core.evaluation.measure import device, measure, runtime_title
from core.export import Artifact, audit_trace, export_kit
from core.figures import Estimated, Figure, Figures, Measured, Stage, today
from core.files import write_text
from core.hardware import Target, estimate, profile, target, will_it_be_faster
from core.hardware.profile import Matrix, remembered
from core.kit import InputError, Kit, Recipe, Telling
from core.ledger import ledger
from core.quantization import half_layers, layer_sqnr, packed_layers, quant_layers, unquantized
from core.report import Report, judge, read_json

THREADS = min(2, len(available_cores()))
SECONDS = {"smoke": 6.0, "full": 30.0}
"""How long the side-by-side timing runs."""
MADE = "made.json"
"""In a run's folder: where and when each stage ran."""


@dataclass(frozen=True)
class Run:
    """What to run: a kit's recipe for a target, on a folder of data or (None) the kit's generated set.

    `recipe` None is the kit's default for the model; `weights` are a file or the folder that `fitkit train` left (None:
    the shipped ones).
    """

    kit: Kit
    recipe: Recipe | None
    target: str
    data: Path | None
    preset: str
    out: Path
    resume: bool = False
    weights: Path | None = None

    def __call__(self) -> Report:
        """Compress, export, score, measure, estimate, judge; leaves the artifact and the report in `out`."""
        box = target(self.target)
        self.out.mkdir(parents=True, exist_ok=True)
        original = self.kit.model(self.weights)
        kit = self.kit.of(original)
        recipe = self.recipe or kit.recipes[kit.default_recipe]
        self._begin(recipe)
        return replace(self, kit=kit)._go(original, recipe, box)

    def _go(self, original: nn.Module, recipe: Recipe, box: Target) -> Report:
        # first of all: a folder that cannot be read is told before minutes are spent
        split = self.kit.report_split(self.data)
        samples = self.kit.dataset(self.data, split, self.preset)
        _say(f"compressing with recipe {recipe.name!r}: {recipe.cost}")
        small, trace = compress(
            original,
            recipe,
            self.kit,
            data=self.data,
            preset=self.preset,
            folder=self.out / "steps",
            resume=self.resume,
        )
        precisions = _names(original, small)
        stages: dict[Stage, nn.Module] = {"original": original, "compressed": small}
        artifact = self._artifact(stages, precisions)
        scores = self._scores(artifact, samples)
        timing = self._timing(artifact, samples)
        figures = self._figures(artifact, precisions, scores, timing, len(samples), split)
        with remembered():  # no model changes from here on
            more, tables = self._compare(original, artifact, precisions["compressed"], samples)
            figures |= more
            stacked = self._stage(
                "ledger",
                lambda: {"table": ledger(self.kit, original, trace, self.out / "steps", samples, artifact.meta)},
            )["table"]
            for stage, model in stages.items():
                figures |= (self._estimates(model) | self._power(model)).restage(stage)
            notes = [
                f"{n['variant']}{': ' + n['layer'] if n['layer'] else ''}: {n['note']}" for n in artifact.trace_notes()
            ]
            notes += [
                f"{self.target}: {sentence}"
                for sentence in will_it_be_faster(small, self.kit.exports(), box, *_precision(small))
            ]
            report = judge(
                figures,
                self.kit.gates,
                [*trace, *audit_trace(artifact)],
                kit=self.kit.name,
                recipe=recipe,
                target=self.target,
                layers=self._layers(small, trace),
                tables=[
                    _variants_table(artifact, scores, timing, self.kit.headline),
                    *([stacked] if stacked is not None else []),
                    *tables,
                ],
                pictures=self.kit.pictures(
                    artifact.as_module(_compressed(artifact, precisions["compressed"]), THREADS), samples, artifact.meta
                ),
                notes=[
                    f"Scored on the split {split!r}: {len(samples)} samples, which the kit holds out of training and "
                    "of every choice it makes.",
                    *(self.kit.remarks(self.data, self.weights) if isinstance(self.kit, Telling) else ()),
                    *notes,
                ],
                title=self.kit.title,
            )
        report.save(self.out)
        return report

    def _begin(self, recipe: Recipe) -> None:
        """Refuse to mix two runs in one folder; forget the stages of the last one unless resumed."""
        wanted = {
            "kit": self.kit.name,
            "recipe": recipe.to_json(),
            "target": self.target,
            "data": str(self.data.resolve()) if self.data else None,
            "preset": self.preset,
            "weights": str(self.weights.resolve()) if self.weights else None,
        }
        path = self.out / "run.json"
        if self.resume and path.exists():
            found = read_json(path)
            if different := [k for k in wanted if found.get(k) != wanted[k]]:
                k = different[0]
                raise InputError(
                    f"{path}: was begun with another {k}; give the same {k}, or another --out, or leave out --resume"
                )
        elif not self.resume:
            for stage in (*self.out.glob("stage-*.json"), self.out / MADE):
                stage.unlink(missing_ok=True)
        write_text(path, json.dumps(wanted))

    def _stage(self, name: str, make: Callable[[], Any]) -> Any:
        """The stored result of a stage when resuming, or a new one, stored."""
        path = self.out / f"stage-{name}.json"
        if self.resume and path.exists():
            return read_json(path)
        value = make()
        made = self.out / MADE  # first, so that no stage is there without it
        known = read_json(made) if made.exists() else {}
        write_text(made, json.dumps(known | {name: {"device": device(), "date": today()}}))
        write_text(path, json.dumps(value))
        return value

    def _measured(
        self, stage: str, runtime: str, runs: int, spread: float | None, artifact: str, note: str = ""
    ) -> Measured:
        """The basis of what a stage found: where and when that ran, which a resumed run may be far from."""
        where = read_json(self.out / MADE).get(stage, {}) if (self.out / MADE).exists() else {}
        found = Measured(where.get("device", device()), runtime, runs, spread, artifact, note=note)
        return replace(found, date=where.get("date", found.date))

    def _artifact(self, stages: Mapping[Stage, nn.Module], precisions: Mapping[Stage, str]) -> Artifact:
        place = self.out / "artifact"

        def make() -> dict[str, Any]:
            _say("exporting and checking against torch")
            models = {precisions[stage]: model for stage, model in stages.items()}
            made = export_kit(models, self.kit, self.target, place)
            _say("choosing on validation data")
            # the threshold must serve every variant: it is frozen on the smallest, least exact one
            least = next(v.name for v in made.variants.values() if v.precision == precisions["compressed"])
            meta = self.kit.freeze(made.as_module(least, THREADS), self.data, self.preset)
            made.describe(meta)
            return {"sha256": made.sha256, "meta": made.meta}

        stored = self._stage("export", make)
        artifact = Artifact.open(place)
        if {"sha256": artifact.sha256, "meta": artifact.meta} != stored:
            raise InputError(f"{place}: not the artifact of this run; run again without --resume")
        return artifact

    def _scores(self, artifact: Artifact, samples: Sequence[Any]) -> dict[str, dict[str, tuple[float, str]]]:
        """{variant: metrics}, each scored in its own runtime."""

        def make() -> dict[str, Any]:
            found = {}
            for name in artifact.variants:
                _say(f"scoring {name} on {len(samples)} samples")
                found[name] = self.kit.score(artifact.as_module(name, THREADS), samples, artifact.meta)
            return found

        stored: dict[str, dict[str, tuple[float, str]]] = self._stage("scores", make)
        return stored

    def _timing(self, artifact: Artifact, samples: Sequence[Any]) -> dict[str, Any]:
        """Times end to end, all variants and baselines in turns, and each variant's own figures."""

        def make() -> dict[str, Any]:
            _say("timing all variants side by side")
            few = list(islice(samples, 32))
            runs = {name: self.kit.pipeline(artifact.as_module(name, THREADS), few) for name in artifact.variants}
            baselines = self.kit.baselines(few, THREADS)
            result = bench(runs | baselines, seconds=SECONDS[self.preset], threads=THREADS, label="timing")
            best = min(artifact.variants, key=lambda name: result.timings[name].p50)
            own = {
                name: [f.to_json() for f in measure(artifact, threads=THREADS, seconds=2.0, variant=name)]
                for name in artifact.variants
            }
            return {**result.to_json(), "baselines": list(baselines), "recommended": best, "own": own}

        stored: dict[str, Any] = self._stage("timing", make)
        artifact.choose(stored["recommended"])
        return stored

    def _compare(
        self, original: nn.Module, artifact: Artifact, precision: str, samples: Sequence[Any]
    ) -> tuple[Figures, list[dict[str, Any]]]:
        """What the kit finds with both models side by side."""

        def make() -> dict[str, Any]:
            small = artifact.as_module(_compressed(artifact, precision), THREADS)
            figures, tables = self.kit.compare(original, small, samples, artifact, self.preset, self.out / "compare")
            return {"figures": [f.to_json() for f in figures], "tables": tables}

        stored = self._stage("compare", make)
        return Figures(Figure.from_json(f) for f in stored["figures"]), stored["tables"]

    def _figures(
        self,
        artifact: Artifact,
        precisions: Mapping[Stage, str],
        scores: dict[str, dict[str, tuple[float, str]]],
        timing: dict[str, Any],
        samples: int,
        split: str,
    ) -> Figures:
        """Everything measured: original is the export of the model as it was, each stage in its faster runtime."""
        times = {t["name"]: t for t in timing["timings"]}
        figures = Figures()
        chosen: dict[Stage, str] = {}
        for stage, precision in precisions.items():
            names = [v.name for v in artifact.variants.values() if v.precision == precision]
            name = chosen[stage] = min(names, key=lambda n: times[n]["p50"])
            own = (Figure.from_json(f) for f in timing["own"][name])
            figures |= Figures(f for f in own if f.name != "fps").restage(stage)
            title = runtime_title(artifact, name, THREADS)
            basis = self._measured("scores", title, samples, None, artifact.sha256, f"split {split}")
            figures |= Figures(Figure(k, v, unit, basis, stage) for k, (v, unit) in scores[name].items())
        if all(self.kit.headline in scores[name] for name in chosen.values()):
            had, has = (scores[name][self.kit.headline][0] for name in chosen.values())
            both = " minus ".join(runtime_title(artifact, name) for name in chosen.values())
            note = f"{self.kit.headline}, split {split}"
            basis = self._measured("scores", both, samples, None, artifact.sha256, note)
            figures |= Figures([Figure("accuracy_loss", had - has, "points", basis)])
        before, after = chosen["original"], chosen["compressed"]
        pair = next(r for r in timing["ratios"] if r["of"] == before and r["over"] == after)
        title = f"{runtime_title(artifact, after, THREADS)}, end to end, in turns with {before}"
        spread = (pair["high"] - pair["low"]) / 2
        basis = self._measured("timing", title, times[after]["runs"], spread, artifact.sha256)
        figures |= Figures([Figure("speedup", pair["value"], "x", basis)])
        best = timing["recommended"]
        best_title = f"{runtime_title(artifact, best, THREADS)}, end to end"
        faster = f"the faster {precisions['original'].upper()} export"
        ends: tuple[tuple[Stage, str, str], ...] = (
            ("original", chosen["original"], faster),
            ("compressed", best, "recommended for this host"),
        )
        for stage, name, note in ends:
            title = f"{runtime_title(artifact, name, THREADS)}, end to end"
            t = times[name]
            rate = 1e3 / t["p50"]
            for figure, value, unit, spread, how in (
                ("fps", rate, "1/s", rate * t["spread"] / t["p50"], f"{note}; one over the median"),
                ("end_to_end_p50", t["p50"], "ms", t["spread"], note),
                ("end_to_end_p99", t["p99"], "ms", t["spread_p99"], note),
            ):
                basis = self._measured("timing", title, t["runs"], spread, artifact.sha256, how)
                figures |= Figures([Figure(figure, value, unit, basis, stage)])
        for name in timing["baselines"]:
            ratio = next(r for r in timing["ratios"] if r["of"] == name and r["over"] == best)
            spread = (ratio["high"] - ratio["low"]) / 2
            title = f"{best_title}, in turns with {name}"
            basis = self._measured("timing", title, times[best]["runs"], spread, artifact.sha256)
            figures |= Figures([Figure(f"speedup_{name.split('-')[0]}", ratio["value"], "x", basis)])
        return figures

    def _estimates(self, model: nn.Module) -> Figures:
        """Estimates for the target; its speed is that of the network alone, so no "fps", which is end to end here."""
        return Figures(f for f in self._estimate(model, self.target) if f.name != "fps")

    def _power(self, model: nn.Module) -> Figures:
        """The power estimate for the device of a power gate, which takes the place of that for the target."""
        found = Figures()
        for gate in self.kit.gates:
            if gate.figure == "power" and gate.device:
                for f in self._estimate(model, gate.device):
                    if f.name == "power" and isinstance(f.basis, Estimated):
                        assumed = (
                            f"device {gate.device} at {self.kit.rate_hz:g} inferences a second",
                            *f.basis.assumptions,
                        )
                        found |= Figures(
                            [Figure("power", f.value, f.unit, Estimated(f.basis.method, assumed, f.basis.error_band))]
                        )
        return found

    def _estimate(self, model: nn.Module, name: str) -> Figures:
        precision, bits = _precision(model)
        return estimate(
            model, self.kit.exports(), target(name), precision=precision, weight_bits=bits, rate_hz=self.kit.rate_hz
        )

    def _layers(self, small: nn.Module, trace: Trace) -> list[dict[str, Any]]:
        """A row a layer; the error is that against the same model with its quantizers off, or of packed weights."""
        graphs = self.kit.exports()
        samples = list(islice(self.kit.dataset(self.data, "val", self.preset), 4))
        inputs = [self.kit.inputs(b) for b in self.kit.batches(samples, 2, train=False)]
        errors = layer_sqnr(unquantized(small), small, inputs) if len(graphs) == 1 and quant_layers(small) else {}
        errors |= {row["layer"]: row["weight_sqnr"] for entry in trace for row in entry.changed if "weight_sqnr" in row}
        _, bits = _precision(small)
        rows = []
        for graph in graphs:
            for layer in profile(graph.module(small), tuple(graph.inputs.values())):
                if layer.macs or layer.parameters:
                    name = f"{graph.part}.{layer.name}" if graph.part else layer.name
                    size = math.ceil(layer.parameters * bits.get(name, 32) / 8)
                    rows.append(
                        {
                            "layer": name,
                            "kind": layer.kind,
                            "parameters": layer.parameters,
                            "bytes": size,
                            "macs": layer.macs,
                            "sqnr_db": errors.get(name),
                        }
                    )
        return rows


def _compressed(artifact: Artifact, precision: str) -> str:
    """The variant of what was compressed, also where the original is the faster one here and so the chosen one."""
    names = [v.name for v in artifact.variants.values() if v.precision == precision]
    return artifact.chosen if artifact.chosen in names else names[0]


def _names(original: nn.Module, small: nn.Module) -> dict[Stage, str]:
    """What the two models are called in the artifact, first the original: by the bits that they have."""
    before, after = _bits_name(original), _bits_name(small)
    if before == after:
        here, there = (sum(int(p.count_nonzero()) for p in m.parameters()) for m in (small, original))
        after += "-pruned" if here < 0.99 * there else "-compressed"
    return {"original": before, "compressed": after}


def _bits_name(model: nn.Module) -> str:
    """ "int8" by the bits of weights and inputs, "w4a8" where these differ, "mixed" for several; or "fp32"."""
    widths: Counter[int] = Counter()
    for layer in packed_layers(model).values():
        widths[layer.bits] += layer.weight_shape.numel()
    if widths:
        return f"int{widths.most_common(1)[0][0]}"  # the width of most of the weights
    found = {
        (q.weight_quantizer.scheme.bits, q.input_quantizer.scheme.bits if q.input_quantizer is not None else 0)
        for q in quant_layers(model).values()
    }
    if not found:
        if half_layers(model):
            return "fp16"
        floats = {p.dtype for p in model.parameters()}
        return "fp16" if floats == {torch.float16} else "bf16" if floats == {torch.bfloat16} else "fp32"
    weight, inputs = found.pop()
    return "mixed" if found else f"int{weight}" if inputs in (0, weight) else f"w{weight}a{inputs}"


def _precision(model: nn.Module) -> tuple[dict[str, str], dict[str, int]]:
    """({layer: data type}, {layer: bits of its weights}) of a model; layers that no step quantized are FP32."""
    quantized, packed, halves = quant_layers(model), packed_layers(model), set(half_layers(model))
    # "*" is what stands between the layers
    layers = {"*": "fp16" if packed or halves else "int8" if quantized else "fp32"}
    for name, module in model.named_modules():
        if name in quantized:
            inputs, weight = quantized[name].input_quantizer, quantized[name].weight_quantizer
            wide = max(inputs.scheme.bits, weight.scheme.bits) if inputs is not None else 32
            layers[name] = "int4" if wide <= 4 else "int8" if wide <= 8 else "fp32"
        elif name in halves:
            layers[name] = "fp16"
        elif isinstance(module, Matrix):
            # packed weights are multiplied as floats, in FP16 where the device has it
            layers[name] = "fp16" if packed else "fp32"
    bits = {name: q.weight_quantizer.scheme.bits for name, q in quantized.items()} | dict.fromkeys(halves, 16)
    return layers, bits | {name: layer.bits for name, layer in packed.items()}


def _variants_table(
    artifact: Artifact, scores: Mapping[str, Any], timing: Mapping[str, Any], headline: str
) -> dict[str, Any]:
    times = {t["name"]: t for t in timing["timings"]}
    rows = []
    for name, v in artifact.variants.items():
        mark = " (recommended here)" if name == timing["recommended"] else ""
        rows.append(
            [
                name + mark,
                round(times[name]["p50"], 2),
                round(times[name]["p99"], 2),
                round(artifact.size_bytes(name) / 1e6, 2),
                round(scores[name][headline][0], 2) if headline in scores[name] else "",
                ", ".join(f"{n} {p}" for p, n in v.audit["weighted"].items()),
            ]
        )
    for name in timing["baselines"]:
        rows.append([name, round(times[name]["p50"], 2), round(times[name]["p99"], 2), "", "", ""])
    return {
        "title": "Side by side on this machine",
        "columns": ["variant", "end to end p50 [ms]", "p99 [ms]", "size [MB]", headline, "layers with weights ran as"],
        "rows": rows,
        "note": f"{device()}, {THREADS} threads, in turns: {timing['rounds']} rounds in one run",
    }


def _say(text: str) -> None:
    from rich.console import Console

    Console(stderr=True).print(text, style="dim", highlight=False, markup=False)
