"""What a customer accepts: the nuScenes detection score by day and by night, sudden obstacles, and the gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from torch import nn

from core.figures import Gate
from core.kit import InputError
from core.progress import progress
from kits.bev_perception.data.boxes import Boxes
from kits.bev_perception.data.keyframes import Keyframe
from kits.bev_perception.data.nuscenes import NuScenes
from kits.bev_perception.metrics.events import SuddenRecall, Track, sudden_recall
from kits.bev_perception.metrics.nds import Matches, Score, Truth, match
from kits.bev_perception.metrics.streaming import Frame
from kits.bev_perception.metrics.truth import groups, read_events, tracks, truth_of
from kits.bev_perception.model.configs import Config
from kits.bev_perception.scenes import watch

CAR = "mdc-810"
RATE_HZ = 10.0
"""Inferences a second of the gates on compute and power."""

GATES: tuple[Gate, ...] = (
    Gate("mAP of the FP32 detector", "map", ">= 30", "%", stage="original"),
    Gate("NDS of the FP32 detector", "nds", ">= 40", "%", stage="original"),
    Gate("loss of NDS", "accuracy_loss", "<= 1.5", "points"),
    Gate("loss by night beyond that by day", "night_loss_excess", "<= 0", "points"),
    Gate("sudden obstacles found with the dynamic path, against FP32", "sudden_recall_gain", ">= 0", "points"),
    Gate("channels gone", "channels_removed", ">= 60", "%"),
    Gate("sparse utilization", "sparse_utilization", ">= 82", "%"),
    Gate("compute at 10 Hz", "tops", "<= 10", "TOPS"),
    Gate("latency against FP32, same runtime", "latency_share", "<= 0.66", "x", device="this-host"),
    Gate("latency in the car", "latency_p50", "<= 89", "ms", device=CAR),
    Gate("power in the car", "power", "<= 28", "W", device=CAR),
)

THRESHOLDS = np.linspace(0.05, 0.9, 35)


def observed(module: nn.Module, samples: Sequence[Keyframe], config: Config, label: str) -> dict[str, Boxes]:
    """What a detector finds in keyframes, each scene in the order of time: boxes in the global frame by token."""
    found = {}
    with progress(label, len(samples)) as bar:
        for seen in watch(module, samples, config):
            found[seen.keyframe.token] = seen.boxes
            bar.advance()
    return found


@dataclass(frozen=True)
class Verdict:
    """The score of a set of frames, by group of frames as well, and of its sudden obstacles at a threshold."""

    score: Score
    groups: Mapping[str, Score]
    frames: Mapping[str, int]
    sudden: SuddenRecall
    matches: Matches
    scenes: Mapping[str, str]

    def interval(self) -> dict[str, tuple[float, float]]:
        """Of NDS and mAP, whole scenes drawn again; none of a single scene. Takes seconds of hundreds of frames."""
        return self.matches.interval(self.scenes) if len(set(self.scenes.values())) > 1 else {}

    def figures(self) -> dict[str, tuple[float, str]]:
        """{name: (value, unit)}: NDS and mAP in %, the five errors in their units, NaN for what was not there."""
        errors = self.score.mean_errors
        values = {"nds": (100 * self.score.nds, "%"), "map": (100 * self.score.mean_ap, "%")}
        present = self.score.over(self.score.present)
        values |= {"nds_present": (100 * present.nds, "%"), "map_present": (100 * present.mean_ap, "%")}
        units = {"trans_err": "m", "scale_err": "1-IoU", "orient_err": "rad", "vel_err": "m/s", "attr_err": "1-acc"}
        values |= {name: (errors[name], unit) for name, unit in units.items()}
        for name in ("day", "night", "rain", "event"):
            found = self.groups.get(name)
            values[f"nds_{name}"] = (100 * found.nds if found else float("nan"), "%")
            values[f"map_{name}"] = (100 * found.mean_ap if found else float("nan"), "%")
        return values | {"sudden_recall": (100 * self.sudden.recall, "%")}

    def to_json(self) -> dict[str, Any]:
        """The content of `metrics.json`: the devkit's summary of all frames, and each group's."""
        return {
            **{name: None if np.isnan(value) else value for name, (value, _) in self.figures().items()},
            "units": {name: unit for name, (_, unit) in self.figures().items()},
            "all": self.score.to_json(),
            "groups": {name: {"frames": self.frames[name], **s.to_json()} for name, s in self.groups.items()},
            "sudden_obstacles": {
                "events": len(self.sudden.delays),
                "found": self.sudden.found,
                "delays_seconds": list(self.sudden.delays),
                "interval": [100 * bound for bound in self.sudden.interval],
            },
            "intervals": {n: [100 * b for b in bounds] for n, bounds in self.interval().items()},
        }


def matched(samples: Sequence[Keyframe], predictions: Mapping[str, Boxes]) -> Matches:
    """Predictions (global frame, by token) of keyframes of one folder beside what was there."""
    tokens = tuple(sample.token for sample in samples)
    return match(_truth_of(samples[0].data, tokens), {token: predictions[token] for token in tokens})


@lru_cache(maxsize=4)
def _truth_of(data: NuScenes, tokens: tuple[str, ...]) -> dict[str, Truth]:
    """`truth_of`, kept: a report scores several detectors on the same frames."""
    return truth_of(data, tokens)


@lru_cache(maxsize=4)
def _tracks(data: NuScenes, instances: frozenset[str], tokens: tuple[str, ...]) -> dict[str, Track]:
    return tracks(data, instances, tokens)


def verdict(samples: Sequence[Keyframe], predictions: Mapping[str, Boxes], threshold: float) -> Verdict:
    """Score predictions (global frame, by token) of keyframes of one folder.

    A sudden obstacle is found by boxes of `threshold` or more. Raises InputError where there is nothing to score.
    """
    if not samples:
        raise InputError("no keyframe to score; give a split that has some")
    data, tokens = samples[0].data, tuple(sample.token for sample in samples)
    matches = matched(samples, predictions)
    scenes = {sample.token: sample.scene for sample in samples}
    events = [event for event in read_events(data) if event.scene in set(scenes.values())]
    chosen = groups(data, tokens, events)
    frames = [Frame(s.scene, s.sample.timestamp, predictions[s.token]) for s in samples]
    seen = _tracks(data, frozenset(event.instance for event in events), tokens)
    events = [event for event in events if event.instance in seen]
    return Verdict(
        matches.score(),
        {name: matches.score(part) for name, part in chosen.items()},
        {name: len(part) for name, part in chosen.items()},
        sudden_recall(events, seen, frames, min_score=threshold),
        matches,
        scenes,
    )


def freeze_threshold(samples: Sequence[Keyframe], predictions: Mapping[str, Boxes]) -> float:
    """The confidence from which a box is shown and counts as a warning: the best F1 over all classes at 2 m."""
    matches = matched(samples, predictions)
    best, chosen = -1.0, float(THRESHOLDS[0])
    for threshold in THRESHOLDS:
        hits = said = truths = 0
        for (_, distance), found in matches.found.items():
            if distance == 2.0:
                kept = found.scores >= threshold
                hits += int(found.hit[kept].sum())
                said += int(kept.sum())
                truths += int(found.truths.sum())
        f1 = 2 * hits / max(1, said + truths)
        if f1 > best:
            best, chosen = f1, float(threshold)
    return chosen
