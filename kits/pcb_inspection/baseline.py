"""Ultralytics YOLO as baseline and teacher, through its own API; the shipped path never imports this file's tools.

Ultralytics is AGPL-3.0: installing it (extra `baseline`) is the user's choice, see LICENSE and README.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from core.cache import cache_folder
from core.kit import InputError
from core.train import bfloat16
from core.weights import load_weights, save_weights
from kits.pcb_inspection.data.deeppcb import CLASSES, Pair
from kits.pcb_inspection.model.decode import FLOOR, MOST
from kits.pcb_inspection.model.decode import OVERLAP as IOU
from kits.pcb_inspection.model.inspector import TILE
from kits.pcb_inspection.model.pair import Grey

STRIDES = (8, 16, 32)
BATCH = 8
"""Of a YOLO's training."""
ARCHITECTURES = ("yolov8n", "yolo11n", "yolo26n")
UNTRAINED = "yolov8n-fp32-openvino (random weights: architecture only)"


def available() -> bool:
    """Whether ultralytics is installed."""
    return importlib.util.find_spec("ultralytics") is not None


def speed_baselines(samples: Sequence[Pair], threads: int) -> dict[str, Callable[[], Any]]:
    """{UNTRAINED: the next decoded image through normalising, network and suppression}; empty without ultralytics.

    Its name says that the weights are random, so that its time is that of the architecture and of a suppression
    with next to nothing to suppress.
    """
    if not available():
        return {}
    from core.export.openvino import OpenVINOModule

    module = OpenVINOModule(exported("yolov8n"), threads, as_tuple=False)
    decoded = cycle([np.repeat(pair.load()[0][None, None], 3, 1) for pair in samples])
    return {UNTRAINED: lambda: _detect(module, next(decoded))}


def exported(architecture: str, weights: Path | None = None, calibration: Sequence[Pair] = ()) -> Path:
    """The OpenVINO file of a YOLO for this task at 640 x 640, made once through Ultralytics' own export.

    `weights` are those of `train_yolo` or `keep_yolo`; None gives the architecture with random weights. With
    `calibration` it is INT8, as Ultralytics quantizes after training: on those boards, its head in floating point.
    """
    _check(architecture)
    precision = f"-int8-{len(calibration)}" if calibration else ""
    sources = [*([weights] if weights else []), *(pair.test for pair in calibration)]
    place = cache_folder(f"{architecture}-640-{len(CLASSES)}{precision}", sources)
    if not place.is_dir():
        with tempfile.TemporaryDirectory(dir=place.parent) as work:
            # Ultralytics writes its export beside the weights, so they are put where nothing else is
            source = Path(work) / f"{architecture}.pt"
            if weights is not None and weights.suffix == ".pt":
                weights = Path(shutil.copyfile(weights, source))
            model = _yolo(architecture, weights)
            model.ckpt_path = str(source)
            model.model.pt_path = str(source)
            asked: dict[str, Any] = {"format": "openvino", "imgsz": TILE, "dynamic": False, "verbose": False}
            if calibration:
                boards = write_yolo_dataset(calibration, calibration, Path(work) / "boards")
                asked |= {"quantize": 8, "data": str(boards), "batch": 1}
            with contextlib.redirect_stderr(io.StringIO()):  # its deprecation warnings are none of the user's business
                made = Path(model.export(**asked))
            os.replace(made, place)
    return next(place.glob("*.xml"))


def yolo_macs(architecture: str) -> float:
    """Multiply-accumulates of a YOLO for this task at 640 x 640, as Ultralytics counts them."""
    network = _yolo(architecture, None).model
    from ultralytics.utils.torch_utils import get_flops

    return float(get_flops(network, TILE)) * 1e9 / 2


def write_yolo_dataset(train: Sequence[Pair], val: Sequence[Pair], out: Path, test: Sequence[Pair] = ()) -> Path:
    """The pairs' tested images in YOLO's own layout (images/, labels/, data.yaml); returns the yaml file."""
    splits = {"train": train, "val": val} | ({"test": test} if test else {})
    for name, pairs in splits.items():
        images, labels = out / "images" / name, out / "labels" / name
        images.mkdir(parents=True, exist_ok=True)
        labels.mkdir(parents=True, exist_ok=True)
        for pair in pairs:
            height, width = pair.load()[0].shape
            shutil.copyfile(pair.test, images / f"{pair.image_id}{pair.test.suffix}")
            middle, size = (pair.boxes[:, :2] + pair.boxes[:, 2:]) / 2, pair.boxes[:, 2:] - pair.boxes[:, :2]
            rows = np.concatenate((middle, size), 1) / np.array([width, height, width, height])
            lines = [f"{n} {' '.join(f'{v:.6f}' for v in row)}\n" for n, row in zip(pair.labels, rows, strict=True)]
            (labels / f"{pair.image_id}.txt").write_text("".join(lines))
    names = "\n".join(f"  {i}: {name}" for i, name in enumerate(CLASSES))
    table = out / "data.yaml"
    folders = "\n".join(f"{name}: images/{name}" for name in splits)
    table.write_text(f"path: {out.resolve()}\n{folders}\nnames:\n{names}\n")
    return table


def train_yolo(
    architecture: str, train: Sequence[Pair], val: Sequence[Pair], out: Path, epochs: int, resume: bool = False
) -> Path:
    """Train a YOLO from random weights on the same boards, by Ultralytics' own trainer; returns its best weights.

    Its optimizer steps after every batch: it would else collect 64 images a step, which is for longer schedules.
    """
    last, done = out / "runs" / "train" / "weights" / "last.pt", out / "done"
    if resume and done.is_file():
        return last.with_name("best.pt")
    begun = resume and last.is_file()
    model = _yolo(architecture, last if begun else None)
    model.add_callback("on_train_start", fast)
    if begun:
        model.train(resume=True)
    else:
        table = write_yolo_dataset(train, val, out / "dataset")
        model.train(
            data=str(table), epochs=epochs, imgsz=TILE, batch=BATCH, nbs=BATCH, project=str((out / "runs").resolve()),
            name="train", exist_ok=True, pretrained=False, device="cpu", workers=1, plots=False, amp=False,
        )  # fmt: skip
    done.touch()
    return last.with_name("best.pt")


def keep_yolo(architecture: str, weights: Path, file: Path) -> None:
    """Write the weights of `train_yolo` as safetensors in FP16, since Ultralytics' own files are pickles."""
    save_weights(_yolo(architecture, weights).model.half(), file)


def fast(trainer: Any) -> None:
    """A callback of Ultralytics' trainer: channels last and `core.train.bfloat16`, which its `amp` refuses on a CPU."""
    network = trainer.model.to(memory_format=torch.channels_last)
    plain = network.forward

    def forward(*inputs: Any, **named: Any) -> Any:
        with bfloat16(trainer.device):
            return plain(*inputs, **named)

    network.forward = forward


def detect_yolo(file: Path, pairs: Sequence[Pair], threads: int) -> dict[str, np.ndarray]:
    """Image id -> detections (n, 6) of an `exported` YOLO, run in OpenVINO, suppressed class-blind as ours are."""
    detect = detector(file, threads)
    return {p.image_id: detect(p.load()[0]) for p in pairs}


def detector(file: Path, threads: int) -> Callable[[Grey], np.ndarray]:
    """An `exported` YOLO: a grey tile (640, 640) to detections (n, 6), normalising and suppression included."""
    from core.export.openvino import OpenVINOModule

    module = OpenVINOModule(file, threads, as_tuple=False)
    return lambda tile: _detect(module, np.repeat(tile[None, None], 3, 1))


def yolo_teacher(weights: Path) -> Callable[[Tensor], Tensor]:
    """A trained YOLO as a teacher: images (N, H, W) uint8 to class probabilities (N, 6, H / 8, W / 8).

    The cells of its strides 16 and 32 are spread over the finer ones and the larger probability counts. Ultralytics'
    files are pickles: give one of your own making only. Raises InputError for a file that it cannot read.
    """
    mend = "give the best.pt that benchmarks/pcb_yolo.py left"
    if weights.suffix != ".pt":
        raise InputError(f"{weights}: not a file of Ultralytics' weights (.pt); {mend}")
    try:
        network = _yolo(ARCHITECTURES[0], weights).model.eval()
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001  whatever its unpickling raises
        raise InputError(f"{weights}: Ultralytics cannot read it ({type(error).__name__}); {mend}") from error
    classes = int(getattr(network, "nc", 0) or len(getattr(network, "names", ())))
    if classes != len(CLASSES):
        raise InputError(f"{weights}: a YOLO of {classes} classes, expected the {len(CLASSES)} of this kit")

    @torch.no_grad()
    def probabilities(images: Tensor) -> Tensor:
        count, height, width = images.shape
        found = network((images[:, None].float() / 255).expand(-1, 3, -1, -1))
        rows = found[0] if isinstance(found, tuple) else found
        cells = [(height // s) * (width // s) for s in STRIDES]
        if rows.ndim != 3 or rows.shape[1:] != (4 + classes, sum(cells)):
            raise InputError(
                f"{weights}: gives {tuple(rows.shape)} and not a score a cell; yolov8n and yolo11n can teach, "
                "end-to-end heads such as yolo26n's cannot"
            )
        scales = rows[:, 4:].split(cells, 2)
        planes = [s.reshape(count, classes, height // n, width // n) for s, n in zip(scales, STRIDES, strict=True)]
        return torch.stack([functional.interpolate(p, planes[0].shape[2:]) for p in planes]).amax(0)

    return probabilities


def _check(architecture: str) -> None:
    if architecture not in ARCHITECTURES:
        raise InputError(f"YOLO {architecture!r} is not known here; known are {', '.join(ARCHITECTURES)}")


def _yolo(architecture: str, weights: Path | None) -> Any:
    _check(architecture)
    if not available():
        raise InputError(
            "the YOLO baseline needs ultralytics (AGPL-3.0); install it with: pip install 'fitkit[baseline]'"
        )
    os.environ.setdefault("YOLO_VERBOSE", "false")  # read when ultralytics is first imported
    from ultralytics import YOLO
    from ultralytics.nn.tasks import DetectionModel

    if weights is not None and weights.suffix != ".safetensors":
        return YOLO(str(weights), task="detect", verbose=False)
    model = YOLO(f"{architecture}.yaml", task="detect", verbose=False)
    network = DetectionModel(f"{architecture}.yaml", nc=len(CLASSES), verbose=False)
    if weights is not None:
        load_weights(network, weights)
    network.args, network.task = model.model.args, "detect"
    model.model = network
    return model


def _detect(module: Any, image: np.ndarray) -> np.ndarray:
    """Detections (n, 6) of one image (1, 3, H, W) uint8, from YOLO's output (1, 4 + classes, cells)."""
    from core.evaluation.detection import suppress

    output = module(torch.from_numpy(image))  # the graph normalises, as ours does
    rows = output[0].numpy()
    if rows.shape[0] > rows.shape[1]:  # the end-to-end heads of YOLO26: (detections, x1 y1 x2 y2 score label)
        return rows[rows[:, 4] > FLOOR]
    scores = rows[4:].max(0)
    cells = np.flatnonzero(scores > FLOOR)
    labels, scores = rows[4:, cells].argmax(0), scores[cells]
    middle, half = rows[:2, cells].T, rows[2:4, cells].T / 2
    boxes = np.concatenate((middle - half, middle + half), 1)
    kept = suppress(boxes, scores, IOU, MOST)
    return np.concatenate((boxes[kept], scores[kept, None], labels[kept, None]), 1).astype(np.float32)
