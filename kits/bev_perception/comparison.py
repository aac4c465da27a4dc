"""The compressed detector against its original: latency in one runtime, channels, patterns, compute, and who loses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from core.compress import TraceEntry, history, replay
from core.evaluation.bench import bench
from core.evaluation.measure import device, runtime_title
from core.export.artifact import origin_of
from core.figures import Figure, Figures, Measured, Stage
from core.hardware.profile import profile
from core.kit import Kit
from core.pruning import sparse_utilization
from core.pruning.parts import output_channels
from core.report import read_json
from core.weights import load_weights
from kits.bev_perception.acceptance import RATE_HZ, matched, verdict
from kits.bev_perception.data.boxes import Boxes
from kits.bev_perception.data.keyframes import Keyframe
from kits.bev_perception.dynamic import Dynamic, Policy
from kits.bev_perception.metrics.streaming import Frame as StreamFrame
from kits.bev_perception.metrics.streaming import streamed
from kits.bev_perception.model.configs import Config
from kits.bev_perception.prune import channels_removed

Watch = Callable[[nn.Module, Sequence[Keyframe], str], Mapping[str, Boxes]]
SECONDS = {"smoke": 4.0, "full": 30.0}
AGAIN = "looks again at surprises"


def compare(
    kit: Kit,
    original: nn.Module,
    compressed: nn.Module,
    samples: Sequence[Keyframe],
    artifact: Any,
    preset: str,
    steps: Path,
    watch: Watch,
    config: Config,
) -> tuple[Figures, list[dict[str, Any]]]:
    """Figures that need both models, and tables: the scores by group of frames, the dynamic path, streaming accuracy.

    `steps` is the folder of the steps' checkpoints, from which the compressed network is built once more;
    `watch` gives what a variant finds in the samples, by token.
    """
    origin = origin_of(compressed)
    assert origin is not None  # the run compares what it exported
    variant = artifact.variants[origin.variant]
    twin = next(v.name for v in artifact.variants.values() if v.runtime == variant.runtime and v.precision == "fp32")
    figures, milliseconds = _latency(kit, artifact, twin, variant.name, samples, preset)
    figures |= _compute(kit, original, artifact, steps)
    more, table = _groups(watch, artifact, twin, variant.name, samples)
    share = figures.find("latency_share")
    assert share is not None
    surprise, ways = _dynamic(watch, artifact, twin, variant.name, samples, config, share.value)
    late, moved = _streaming(watch, artifact, (twin, variant.name), samples, milliseconds)
    return figures | more | surprise | late, [table, ways, moved]


def _latency(
    kit: Kit, artifact: Any, twin: str, variant: str, samples: Sequence[Keyframe], preset: str
) -> tuple[Figures, dict[str, float]]:
    """Both variants in turns in one runtime, and the milliseconds that each took."""
    few = list(samples[:4])
    runs = {name: kit.pipeline(artifact.as_module(name, 2), few) for name in (twin, variant)}
    timed = bench(runs, seconds=SECONDS[preset], threads=2, label="both precisions in turns")
    ratio = timed.ratios[variant, twin]
    basis = Measured(
        device(), f"{runtime_title(artifact, variant, 2)} in turns with {runtime_title(artifact, twin, 2)}",
        timed.timings[variant].runs, (ratio.high - ratio.low) / 2, artifact.sha256,
        note="decoded images to boxes, FP32 is 1",
    )  # fmt: skip
    share = Figures([Figure("latency_share", ratio.value, "x", basis)])
    return share, {name: timed.timings[name].p50 for name in (twin, variant)}


def _compute(kit: Kit, original: nn.Module, artifact: Any, steps: Path) -> Figures:
    """Channels, patterns and exact operations of the network that was exported, built again from its steps."""
    (graph,) = kit.exports()
    inputs = tuple(graph.inputs.values())
    done = sorted(steps.glob("[0-9][0-9]-*/step.json"))
    small = replay(copy.deepcopy(original), history(steps))
    load_weights(small, done[-1].parent / "model.safetensors")
    trace = [TraceEntry.from_json(read_json(step)["trace"]) for step in done]
    before, after = channels_removed(trace)
    counted = Measured(device(), "counted", 1, 0.0, artifact.sha256)
    whole = output_channels(original), output_channels(small)
    found = Figures(
        [
            Figure("channels_removed", 100 * (1 - after / before) if before else 0.0, "%",
                   replace(counted, note="of the output channels that pruning may take")),
            Figure("channels_removed_of_all", 100 * (1 - whole[1] / whole[0]), "%",
                   replace(counted, note="of those of every convolution and linear layer")),
        ]
    )  # fmt: skip
    stages: tuple[tuple[Stage, nn.Module], ...] = (("original", original), ("compressed", small))
    for stage, model in stages:
        used = sparse_utilization(model.eval(), inputs)
        macs = sum(layer.macs for layer in profile(model, inputs))
        found |= Figures(
            [
                Figure("sparse_utilization", 100 * used.share, "%",
                       replace(counted, note="2:4, of the MACs of all matrix products"), stage),
                Figure("tops", 2 * macs * RATE_HZ / 1e12, "TOPS",
                       replace(counted, note=f"two operations a MAC, {RATE_HZ:g} frames a second"), stage),
            ]
        )  # fmt: skip
    return found


def beyond(day: float, night: float) -> float:
    """How many points more are lost by night than by day, NaN where there is only one of them.

    What has gained has lost nothing: by which light it gained more is no loss.
    """
    lost = [max(points, 0.0) if points == points else points for points in (day, night)]
    return lost[1] - lost[0]


def _groups(
    watch: Watch, artifact: Any, twin: str, variant: str, samples: Sequence[Keyframe]
) -> tuple[Figures, dict[str, Any]]:
    """Losses by day, by night and after sudden obstacles, both variants over the same frames."""
    threshold = artifact.meta["threshold"]
    judged = {
        name: verdict(samples, watch(artifact.as_module(name, 2), samples, f"comparing, {name}"), threshold)
        for name in (twin, variant)
    }
    values: Mapping[str, Mapping[str, tuple[float, str]]] = {name: v.figures() for name, v in judged.items()}
    before, after = values[twin], values[variant]
    basis = Measured(
        device(), f"{runtime_title(artifact, twin)} minus {runtime_title(artifact, variant)}",
        len(samples), None, artifact.sha256, note="the same frames",
    )  # fmt: skip
    excess = beyond(*(before[f"nds_{light}"][0] - after[f"nds_{light}"][0] for light in ("day", "night")))
    figures = Figures([Figure("night_loss_excess", excess, "points", basis)] if excess == excess else [])
    rows = []
    for name in ("all", "day", "night", "rain", "event"):
        if name == "rain" and name not in judged[twin].frames:
            continue
        key = "" if name == "all" else f"_{name}"
        frames = len(samples) if name == "all" else judged[twin].frames.get(name, 0)
        cells = [v[f"{metric}{key}"][0] for metric in ("nds", "map") for v in (before, after)]
        rows.append([name, frames, *(round(c, 2) if c == c else None for c in cells)])
    sudden = judged[twin].sudden
    table = {
        "title": "By day, by night, in rain where there is some, and within 2 s of a sudden obstacle",
        "columns": ["frames", "number", f"NDS {twin}", f"NDS {variant}", f"mAP {twin}", f"mAP {variant}"],
        "rows": rows,
        "note": f"{len(sudden.delays)} sudden obstacles, found within 0.5 s: "
        f"{sudden.found} with {twin}, {judged[variant].sudden.found} with {variant}",
    }
    return figures, table


def _dynamic(
    watch: Watch, artifact: Any, twin: str, variant: str, samples: Sequence[Keyframe], config: Config, share: float
) -> tuple[Figures, dict[str, Any]]:
    """The compressed detector that lets the original look again at surprises, beside each of them alone.

    Its control looks again as often, by the clock. Costs are of one FP32 pass: `share` for a small one, as measured.
    """
    small, large = (artifact.as_module(name, 2) for name in (variant, twin))
    policy = Policy(alarm=artifact.meta.get("alarm", Policy.alarm))
    surprise = Dynamic(small, large, config, policy)
    again = watch(surprise, samples, AGAIN)
    clock = Dynamic(small, large, config, Policy(alarm=0.0, share=surprise.watch.share, burst=1.0))
    found = {
        f"{variant} alone": (watch(small, samples, f"comparing, {variant}"), share),
        AGAIN: (again, share + surprise.watch.share),
        "looks again by the clock": (watch(clock, samples, "by the clock"), share + clock.watch.share),
        f"{twin} alone": (watch(large, samples, f"comparing, {twin}"), 1.0),
    }
    threshold = artifact.meta["threshold"]
    judged = {name: (verdict(samples, boxes, threshold), cost) for name, (boxes, cost) in found.items()}
    rows = []
    for name, (v, cost) in judged.items():
        values = {k: value for k, (value, _) in v.figures().items()}
        cells = [values[k] for k in ("nds", "nds_event", "sudden_recall")]
        rows.append([name, round(cost, 3), *(round(c, 2) if c == c else None for c in cells)])
    table = {
        "title": "Looking again: what it finds and what it costs",
        "columns": ["detector", "mean cost [FP32 passes]", "NDS", "NDS within 2 s of an event", "found in 0.5 s [%]"],
        "rows": rows,
        "note": f"{100 * surprise.watch.share:.1f} % of the frames were looked at again, from an alarm of "
        f"{policy.alarm:.3g} on; a frame earns {policy.share:g} looks, and a scene begins with {policy.burst:g}. "
        f"The worst frame costs {share + 1:.2f} passes. "
        f"{len(judged[f'{twin} alone'][0].sudden.delays)} sudden obstacles.",
    }
    basis = Measured(
        device(), f"{runtime_title(artifact, variant)} with {runtime_title(artifact, twin)} for surprises",
        len(samples), None, artifact.sha256, note="the dynamic path, against FP32 alone on the same frames",
    )  # fmt: skip
    path, alone = (judged[name][0].sudden.recall for name in (AGAIN, f"{twin} alone"))
    made = {"sudden_recall_gain": (100 * (path - alone), "points"), "dynamic_share": (100 * surprise.watch.share, "%"),
            "dynamic_cost": (judged[AGAIN][1], "x")}  # fmt: skip
    return Figures(Figure(k, value, unit, basis) for k, (value, unit) in made.items() if value == value), table


def _streaming(
    watch: Watch, artifact: Any, names: Sequence[str], samples: Sequence[Keyframe], milliseconds: Mapping[str, float]
) -> tuple[Figures, dict[str, Any]]:
    """Scores of the answers that are ready at each keyframe's time, as they are and moved on to it."""
    times = {sample.token: (sample.scene, sample.sample.timestamp) for sample in samples}
    rows, figures = [], Figures()
    for name, stage in zip(names, ("original", "compressed")):
        found = watch(artifact.as_module(name, 2), samples, f"comparing, {name}")
        frames = [StreamFrame(*times[sample.token], found[sample.token]) for sample in samples]
        seconds = [milliseconds[name] * 1e-3] * len(frames)
        scores = [100 * matched(samples, found).score().nds]
        for forecast in (False, True):
            ready = streamed(frames, seconds, times, forecast=forecast)
            scores.append(100 * matched(samples, ready).score().nds)
        rows.append([name, round(milliseconds[name], 1), *(round(score, 2) for score in scores)])
        basis = Measured(
            device(), runtime_title(artifact, name, 2), len(samples), None, artifact.sha256,
            note="of the newest answer that is ready at a keyframe's time, its boxes moved on at their velocities",
        )  # fmt: skip
        figures |= Figures([Figure("nds_streaming", scores[-1], "%", basis, cast(Stage, stage))])
    table = {
        "title": "Streaming accuracy: what is known when a frame arrives",
        "columns": [
            "detector",
            "latency [ms]",
            "NDS of the frame itself",
            "NDS when it arrives",
            "NDS, boxes moved on",
        ],
        "rows": rows,
        "note": "The newest answer that is ready when a keyframe arrives is of the frame before; where frames are half "
        "a second apart, every detector that needs less is as late. Moved on: at the velocities that it gives.",
    }
    return figures, table
