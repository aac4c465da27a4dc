"""Which cue of the dynamic path tells the frames in which a sudden obstacle has just appeared.

    python benchmarks/bev_cues.py --out FILE [--weights benchmarks/weights] [--split train]

Setup: the compressed detector in --weights (bev_whole.*) watches every scene of the split that holds a sudden obstacle,
in torch on one core, three times over (660 frames for the 33 of the training scenes). For each cue, their sum, and the
doubt as it was before (the most doubtful box within 35 m and 6 m aside): the area under the curve of the frames within
half a second of an obstacle against all others of these scenes. Then how many obstacles have such a frame looked at
again, by the alarm (frozen on the same scenes) and by about as many looks by the clock. On the training scenes the cues
were chosen, so what is told of those flatters them.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from core.compress import replay
from core.evaluation.measure import device
from core.figures import today
from core.files import read_object, write_text
from core.weights import load_weights
from kits.bev_perception.acceptance import observed
from kits.bev_perception.data.keyframes import Keyframe
from kits.bev_perception.dynamic import Dynamic, Policy, freeze_alarm
from kits.bev_perception.kit import BevPerception
from kits.bev_perception.metrics.events import WITHIN, Event
from kits.bev_perception.metrics.truth import read_events
from kits.bev_perception.model import boxes
from kits.bev_perception.model.configs import NANO

Flags = NDArray[np.bool_]


class Spied(Dynamic):
    """Never looks again; keeps what the doubt was before as well."""

    def __init__(self, small: nn.Module) -> None:
        super().__init__(small, small, NANO, Policy(alarm=math.inf))
        self.single: list[float] = []

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = super().forward(*inputs)
        said = boxes.detections(found[0][0], found[1][0], NANO)
        x, y, s = said.boxes[:, 0], said.boxes[:, 1], said.scores
        way = (y > 0) & (y < 35.0) & (x.abs() < 6.0) & (s > 0.05)
        self.single.append(float((4 * s * (1 - s))[way].max()) if bool(way.any()) else 0.0)
        return found


def fresh(samples: Sequence[Keyframe], event: Event) -> Flags:
    """The frames (n,) within half a second of an event."""
    since = np.array([(s.sample.timestamp - event.timestamp) * 1e-6 for s in samples])
    return np.array([s.scene == event.scene for s in samples]) & (since >= 0) & (since <= WITHIN)


def area(values: Sequence[float], wanted: Flags) -> float:
    """Under the curve: how often a wanted frame has the higher value of two, ties counted half."""
    v = np.asarray(values)
    return float(np.mean([(p > v[~wanted]).mean() + 0.5 * (p == v[~wanted]).mean() for p in v[wanted]]))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--weights", type=Path, default=Path(__file__).parent / "weights")
    options.add_argument("--split", choices=("train", "val"), default="train")
    options.add_argument("--preset", choices=("smoke", "full"), default="full")
    given = options.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    kit = BevPerception()
    small = replay(kit.model(), read_object(given.weights / "bev_whole.json", "take it from the repository")["steps"])
    load_weights(small, given.weights / "bev_whole.safetensors")
    samples = kit.dataset(None, given.split, given.preset)
    events = [e for e in read_events(samples[0].data) if e.scene in {s.scene for s in samples}]
    samples = [s for s in samples if s.scene in {e.scene for e in events}]
    spied = Spied(small.eval())
    observed(spied, samples, NANO, "cues")
    just = [fresh(samples, event) for event in events]
    wanted = np.any(just, axis=0)
    cues = dict(zip(("change", "novelty", "doubt"), zip(*spied.watch.cues)))
    cues |= {"sum": tuple(spied.watch.alarms), "the most doubtful box": tuple(spied.single)}
    alarm = freeze_alarm(list(spied.watch.alarms))
    looked: dict[str, dict[str, float]] = {}
    for name, policy in (("alarm", Policy(alarm=alarm)), ("clock", None)):
        share = looked["alarm"]["share"] if policy is None else 0.0
        path = Dynamic(small, small, NANO, policy or Policy(alarm=0.0, share=share, burst=1.0))
        observed(path, samples, NANO, f"looking again, {name}")
        again = np.array(path.watch.again)
        looked[name] = {"share": path.watch.share, "events": float(sum((again & f).any() for f in just))}
    found = {
        "area": {name: round(area(values, wanted), 3) for name, values in cues.items()},
        "looked": looked, "alarm": alarm, "events": len(events), "frames": len(samples), "split": given.split,
        "runtime": f"torch {torch.__version__}", "device": device(), "date": today(),
    }  # fmt: skip
    write_text(given.out, json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
