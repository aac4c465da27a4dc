"""Prune a YOLO that you run already: channels go, Ultralytics' own trainer brings the score back, OpenVINO runs it.

    pip install 'fitkit[baseline]'
    python examples/prune_yolo.py --weights best.pt --data data.yaml --out DIR [--ratio 0.48] [--epochs 30] [--control]
        [--resume]

`--ratio` of the multiply-accumulates go, from the channels that the loss misses least, wherever they are, in --rounds
with a training after each; with --control the whole network is trained on for as long too, since what the epochs gave
is no gift of the pruning. Before and after are scored by Ultralytics' own validation of the files that OpenVINO runs,
on --split of data.yaml, and timed in turns on two threads. The last epoch is taken, so that the split chose nothing.
Leaves `yolo.json`, the pruned network's OpenVINO folder and `last.pt` in --out. Ultralytics' files are pickles: give
one of your own making only. Ultralytics is AGPL-3.0.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.compress import compress
from core.evaluation.bench import bench
from core.evaluation.measure import device
from core.export.openvino import OpenVINOModule, version
from core.figures import today
from core.files import write_text
from core.hardware.targets import target
from core.hardware.verdict import estimate
from core.kit import Graph, InputError, Recipe
from core.pruning import Prune
from core.pruning.cost import count_macs
from kits.pcb_inspection.baseline import fast

THREADS = 2


class Yolo:
    """As much of a kit as pruning asks for: a trainer's pictures and its loss."""

    name, title = "yolo", "YOLO"

    def __init__(self, trainer: Any, side: int) -> None:
        self.trainer, self.side = trainer, side

    def exports(self) -> tuple[Graph, ...]:
        """One graph: an image to the boxes of all cells."""
        return (Graph("detector", {"images": torch.rand(1, 3, self.side, self.side)}, ("boxes",)),)

    def dataset(self, data: Path | None, split: str, preset: str = "full") -> Any:
        """The pictures of a split, not augmented, with their boxes."""
        from ultralytics.data import build_yolo_dataset

        where = self.trainer.data
        stride = int(self.trainer.stride)
        return build_yolo_dataset(self.trainer.args, where[split], 8, where, mode="val", rect=False, stride=stride)

    def batches(self, samples: Sequence[Any], batch_size: int, *, train: bool, seed: int = 0) -> Iterator[Any]:
        """Batches as the trainer's loss takes them."""
        from ultralytics.data.dataset import YOLODataset

        for start in range(0, len(samples), batch_size):
            yield self.trainer.preprocess_batch(YOLODataset.collate_fn(list(samples[start : start + batch_size])))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss that the network was trained with."""
        total: Tensor = model.loss(batch)[0].sum()  # type: ignore[operator]
        return total


def trainer_of(network: nn.Module | None, folder: Path, given: argparse.Namespace, resume: Path | None = None) -> Any:
    """Ultralytics' trainer of a network whose layers are not those of its yaml."""
    from ultralytics.models.yolo.detect import DetectionTrainer

    class Trainer(DetectionTrainer):  # type: ignore[misc]
        def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
            return weights.float()  # of the checkpoint that is gone on from: its yaml tells the layers before pruning

    told: dict[str, Any] = {"model": str(resume), "resume": str(resume)} if resume else {"model": str(given.weights)}
    trainer = Trainer(overrides=told | {
        "data": str(given.data), "imgsz": given.imgsz, "batch": given.batch, "epochs": given.epochs, "device": "cpu",
        "workers": 0, "project": str(folder.parent.resolve()), "name": folder.name, "exist_ok": True, "plots": False,
        "lr0": given.lr, "optimizer": "AdamW", "warmup_epochs": 1.0, "verbose": False, "nbs": given.batch, "amp": False,
        "close_mosaic": max(1, given.epochs // 2),
    })  # fmt: skip
    if network is not None and resume is None:
        trainer.model = network
    trainer.stride = 32
    trainer.add_callback("on_train_start", fast)
    return trainer


def prune(network: nn.Module, ratio: float, folder: Path, given: argparse.Namespace) -> nn.Module:
    """The network with `ratio` of its multiply-accumulates gone, not trained yet."""
    trainer = trainer_of(network, folder, given)
    network.args = trainer.args  # type: ignore[assignment]  # the weights of the parts of its loss
    step = Prune(ratio, importance="taylor", allocation="global", batches=given.images // 8 or 1, batch_size=8)
    small, trace = compress(network.eval(), Recipe("pruned", (step,), "", ""), Yolo(trainer, given.imgsz))  # type: ignore[arg-type]
    for module in small.modules():
        if hasattr(module, "forward_split"):  # what it exports with knows its width by this number
            module.c = module.cv1.conv.out_channels // 2  # type: ignore[union-attr]
    print(trace[0].changed[0]["what"], flush=True)
    return small


def fine_tuned(network: nn.Module, folder: Path, given: argparse.Namespace) -> nn.Module:
    """The network after Ultralytics' training, which goes on from its last epoch with --resume; its average weights."""
    last = folder / "weights" / "last.pt"
    if not (given.resume and (folder / "done").is_file()):
        begun = last if given.resume and last.is_file() else None
        trainer_of(network, folder, given, begun).train()
        (folder / "done").touch()
    found: nn.Module = opened(last).model.float()
    return found


def rounds(ratio: float, name: str, given: argparse.Namespace) -> Path:
    """The weights after --rounds trainings, before each of which `ratio` of the multiply-accumulates go."""
    network = opened(given.weights).model.float()
    for number in range(given.rounds):
        folder = given.out / f"{name}{number + 1}"
        if ratio and not (given.resume and (folder / "weights" / "last.pt").is_file()):
            network = prune(network, ratio, folder, given)
        network = fine_tuned(network, folder, given)
    last = given.out / ("last.pt" if ratio else f"{name}.pt")
    shutil.copyfile(folder / "weights" / "last.pt", last)
    return last


def opened(weights: Path) -> Any:
    """Ultralytics' model of a file; InputError where it is none."""
    if not weights.is_file():
        raise InputError(f"{weights}: no such file; give the best.pt of a YOLO that you trained")
    from ultralytics import YOLO

    try:
        return YOLO(str(weights), task="detect", verbose=False)
    except Exception as error:  # noqa: BLE001  whatever its unpickling raises
        raise InputError(f"{weights}: Ultralytics cannot read it ({type(error).__name__}: {error})") from error


def exported(weights: Path, place: Path, side: int) -> Path:
    """The folder that OpenVINO runs, by Ultralytics' own export."""
    place.mkdir(parents=True, exist_ok=True)
    copy = place / "yolo.pt"  # it writes beside the weights
    shutil.copyfile(weights, copy)
    return Path(opened(copy).export(format="openvino", imgsz=side, dynamic=False, verbose=False))


def judged(folder: Path, weights: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Scores of an exported folder, and the counted and estimated cost of its network."""
    from ultralytics import YOLO

    found = YOLO(str(folder), task="detect", verbose=False).val(
        data=str(given.data), imgsz=given.imgsz, split=given.split, batch=1, device="cpu", plots=False, verbose=False,
        project=str(given.out.resolve()), name="val", exist_ok=True, workers=0,
    )  # fmt: skip
    network = opened(weights).model.float().eval()
    image = torch.rand(1, 3, given.imgsz, given.imgsz)
    figures = estimate(deepcopy(network), (Graph("detector", {"images": image}, ("boxes",)),), target(given.target))
    return {
        "map50": round(100 * float(found.box.map50), 2),
        "map5095": round(100 * float(found.box.map), 2),
        "macs": count_macs(network, (image,)),
        "parameters": sum(p.numel() for p in network.parameters()),
        "megabytes": round(sum(f.stat().st_size for f in folder.iterdir()) / 1e6, 2),
        "energy_mj_estimated": round(next(f.value for f in figures if f.name == "energy"), 2),
    }


def main(words: Sequence[str]) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--weights", type=Path, required=True)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--ratio", type=float, default=0.48)
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--epochs", type=int, default=30, help="of each round")
    options.add_argument("--lr", type=float, default=1e-3)
    options.add_argument("--control", action="store_true", help="train the whole network on for as long, too")
    options.add_argument("--imgsz", type=int, default=640)
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--images", type=int, default=64, help="that the channels are ranked by")
    options.add_argument("--split", default="val", choices=("val", "test"))
    options.add_argument("--target", default="x86-edge-box")
    options.add_argument("--resume", action="store_true")
    given = options.parse_args(words)
    given.out.mkdir(parents=True, exist_ok=True)
    if not given.data.is_file():
        raise InputError(f"{given.data}: no such file; give the data.yaml that the YOLO was trained with")
    os.environ.setdefault("YOLO_VERBOSE", "false")
    files = {"before": given.weights}
    if given.control:
        files["control"] = rounds(0.0, "control", given)
    files["after"] = rounds(1 - (1 - given.ratio) ** (1 / given.rounds), "round", given)
    folders = {name: exported(path, given.out / name, given.imgsz) for name, path in files.items()}
    rows = {name: judged(folders[name], files[name], given) for name in files}
    modules = {n: OpenVINOModule(next(f.glob("*.xml")), THREADS, as_tuple=False) for n, f in folders.items()}
    image = torch.rand(1, 3, given.imgsz, given.imgsz)
    timed = bench(
        {n: (lambda m=m: m(image)) for n, m in modules.items()}, seconds=20, threads=THREADS, label="in turns"
    )
    faster = timed.ratios["before", "after"]
    report = {
        "date": today(), "device": device(), "software": f"OpenVINO {version()}, {THREADS} threads",
        "split": given.split, **rows, "timing": timed.to_json(), "speedup": faster.value,
        "speedup_interval": [faster.low, faster.high],
        "macs_gone": round(100 * (1 - rows["after"]["macs"] / rows["before"]["macs"]), 1),
        "energy_gone_estimated": round(
            100 * (1 - rows["after"]["energy_mj_estimated"] / rows["before"]["energy_mj_estimated"]), 1
        ),
    }  # fmt: skip
    write_text(given.out / "yolo.json", json.dumps(report, indent=1) + "\n")
    for name, row in rows.items():
        print(f"{name:7} mAP50-95 {row['map5095']:.2f}  mAP50 {row['map50']:.2f}  {row['macs'] / 1e9:.2f} GMAC  "
              f"{timed.timings[name].p50:.2f} ms")  # fmt: skip
    kept = "control" if given.control else "before"
    lost = rows[kept]["map5095"] - rows["after"]["map5095"]
    print(f"{faster.value:.2f} times as fast, {report['macs_gone']} % of the multiply-accumulates gone, "
          f"{lost:+.2f} points of mAP50-95 lost against {kept}")  # fmt: skip


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(str(error))
