"""What a second look finds of sudden obstacles that no training and no threshold saw, on streets of its own.

    python benchmarks/bev_second_look.py --artifact RUN/artifact --out FILE

Setup: 44 generated scenes, half of them by night, each with a sudden obstacle and cut 2 s after it, made once and kept
in the cache; the artifact of `fitkit run bev_perception`, its INT8 and FP32 in OpenVINO, its threshold and alarm as
frozen. The dynamic path, as it is and with the original's answer alone on a second look, beside the clock and beside
each detector alone. How both answers are joined was chosen here, which flatters that row.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from torch import Tensor, nn

from core.evaluation.measure import device, runtime_title
from core.export import Artifact
from core.figures import today
from core.files import write_text
from kits.bev_perception.acceptance import observed, verdict
from kits.bev_perception.data.default import LARGE, kept_world
from kits.bev_perception.data.keyframes import Keyframe, keyframes
from kits.bev_perception.data.nuscenes import NuScenes
from kits.bev_perception.dynamic import Dynamic, Policy
from kits.bev_perception.metrics.truth import read_events
from kits.bev_perception.model.configs import NANO

SCENES, SEED, AFTER = 44, 3000, 2.0
SMALL, ORIGINAL = "int8-openvino", "fp32-openvino"


class Replaces(Dynamic):
    """Of a second look the original's answer alone."""

    def _both(
        self, small: tuple[Tensor, Tensor, Tensor], large: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        return large[0], large[1]


def streets() -> list[Keyframe]:
    """The scenes, each from its start to `AFTER` seconds past its obstacle."""
    how = {**LARGE, "scenes": SCENES, "seed": SEED, "paired": "none", "event_share": 1.0}
    data = NuScenes(kept_world(f"bev_perception-sudden-{SCENES}", how))
    appears = {event.scene: event.timestamp for event in read_events(data)}
    samples = keyframes(data, data.split("all"))
    return [k for k in samples if k.sample.timestamp <= appears.get(k.scene, -1) + AFTER * 1e6]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--artifact", type=Path, required=True)
    options.add_argument("--out", type=Path, required=True)
    given = options.parse_args()
    artifact, samples = Artifact.open(given.artifact), streets()
    small, large = (artifact.as_module(name, 2) for name in (SMALL, ORIGINAL))
    policy = Policy(alarm=artifact.meta["alarm"])
    joined = Dynamic(small, large, NANO, policy)
    rows: dict[str, dict[str, float]] = {}

    def judge(name: str, module: nn.Module) -> None:
        found = verdict(samples, observed(module, samples, NANO, name), artifact.meta["threshold"])
        said = {k: value for k, (value, _) in found.figures().items()}
        share = module.watch.share if isinstance(module, Dynamic) else 0.0
        rows[name] = {"found": found.sudden.found, "share": 100 * share, **{k: said[k] for k in ("nds", "nds_event")}}

    judge(f"{SMALL} alone", small)
    judge("looks again at surprises, both answers", joined)
    judge("looks again at surprises, the original's answer", Replaces(small, large, NANO, policy))
    judge(
        "looks again by the clock, both answers",
        Dynamic(small, large, NANO, Policy(alarm=0.0, share=joined.watch.share, burst=1.0)),
    )
    judge(f"{ORIGINAL} alone", large)
    done = {
        "rows": rows, "events": len({k.scene for k in samples}), "frames": len(samples), "date": today(),
        "threshold": artifact.meta["threshold"], "alarm": artifact.meta["alarm"],
        "runtime": runtime_title(artifact, SMALL, 2), "device": device(),
    }  # fmt: skip
    write_text(given.out, json.dumps(done, indent=1) + "\n")
    print(json.dumps(done, indent=1))


if __name__ == "__main__":
    main()
