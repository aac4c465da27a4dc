"""BEVFormer-tiny in full size, mixed precision against its own FP32, in turns in one runtime on this machine.

    python benchmarks/bev_tiny.py --out DIR [--runtime openvino] [--seconds 120]

Setup: 33,521,157 seeded random parameters (architecture only: time does not depend on their values, no box means
anything), six cameras of 480 x 800, one graph of the whole detector with its memory. Backbone and neck INT8, calibrated
along generated scenes with the memory that the network puts out; the transformer's weights FP16. Two threads. The
export takes some ten minutes and about 20 GB of memory. Leaves `tiny.json` in --out, which a README's table is made of.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.compress import compress
from core.evaluation.bench import bench
from core.evaluation.measure import device, runtime_title
from core.export import RUNTIMES, export
from core.figures import Figure, Figures, Measured, today
from core.files import write_text
from core.hardware.profile import profile
from core.kit import Graph, Recipe
from core.quantization import Half, Quantize
from kits.bev_perception.data.default import default_set
from kits.bev_perception.data.keyframes import Keyframe, keyframes
from kits.bev_perception.data.nuscenes import NuScenes
from kits.bev_perception.model.configs import TINY
from kits.bev_perception.model.detector import OUTPUTS, BEVFormer, example_inputs, parameters_of
from kits.bev_perception.scenes import recorded

THREADS = 2
STEPS = (
    Quantize(layers=("img_backbone.*", "img_neck.*"), samples=8, reduce_range=True, bias_correction=False),
    Half(layers=("pts_bbox_head.*",)),
)


class Tiny:
    """As much of a kit as compressing and exporting ask for."""

    name = "bev_perception"

    def exports(self) -> tuple[Graph, ...]:
        return (Graph("detector", example_inputs(TINY), OUTPUTS),)

    def dataset(self, data: Path | None, split: str, preset: str = "full") -> Sequence[Keyframe]:
        folder = NuScenes(default_set("train", "smoke"))
        return keyframes(folder, folder.split("all"))

    def stream(
        self, samples: Sequence[Keyframe], count: int, seed: int
    ) -> Generator[tuple[Tensor, ...], tuple[Tensor, ...], None]:
        return recorded(samples, count, seed, TINY)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--runtime", choices=RUNTIMES, default="openvino")
    options.add_argument("--seconds", type=float, default=120.0)
    given = options.parse_args()
    torch.manual_seed(0)
    model, kit = BEVFormer(TINY).eval(), Tiny()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and not module.weight.any():
            nn.init.constant_(module.weight, 0.5)  # a block begins as its shortcut: give its convolutions a say
    mixed, trace = compress(model, Recipe("mixed", STEPS, "", ""), kit)  # type: ignore[arg-type]
    inputs = tuple(example_inputs(TINY).values())
    macs = sum(layer.macs for layer in profile(model, inputs))
    artifact = export(
        {"fp32": model, "mixed": mixed}, kit.exports(), "this-host", given.out / "artifact", kit=kit.name,
        runtimes=[given.runtime],
    )  # fmt: skip
    names = [f"{precision}-{given.runtime}" for precision in ("fp32", "mixed")]
    modules = {name: artifact.as_module(name, THREADS) for name in names}
    runs = {name: (lambda module=module: module(*inputs)) for name, module in modules.items()}
    timed = bench(runs, seconds=given.seconds, threads=THREADS, label="both precisions in turns")
    ratio = timed.ratios[names[1], names[0]]
    title = f"{runtime_title(artifact, names[1], THREADS)} in turns with {runtime_title(artifact, names[0], THREADS)}"
    basis = Measured(
        device(), title, timed.timings[names[1]].runs, (ratio.high - ratio.low) / 2, artifact.sha256,
        note="the network alone, FP32 is 1; random weights: architecture only",
    )  # fmt: skip
    counted = Measured(device(), "counted", 1, 0.0, artifact.sha256, note="two operations a MAC, 10 frames a second")
    figures = Figures(
        [
            Figure("tiny_latency_share", ratio.value, "x", basis),
            Figure("tiny_tops", 2 * macs * 10 / 1e12, "TOPS", counted),
            Figure("tiny_parameters", float(parameters_of(model)), "count", counted),
        ]
    )
    result: dict[str, Any] = {
        "date": today(),
        "device": device(),
        "runtime": given.runtime,
        "interval": [ratio.low, ratio.high],
        **timed.to_json(),
        "figures": [figure.to_json() for figure in figures],
        "audit": {name: artifact.variant(name).audit["weighted"] for name in names},
        "trace": [entry.to_json()["step"] for entry in trace],
    }
    write_text(given.out / "tiny.json", json.dumps(result, indent=1) + "\n")
    print(f"{ratio} of FP32 in {given.runtime}; {result['audit']}")


if __name__ == "__main__":
    main()
