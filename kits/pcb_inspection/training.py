"""How a detector is trained: by `fitkit train pcb_inspection`, as a search's winner, and on from weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from core.evaluation.detection import mean_average_precision
from core.train import Fit, Schedule, bfloat16, faster_in_bfloat16, fit
from kits.pcb_inspection.data.augment import Crop, Ready, crops, drawn
from kits.pcb_inspection.data.resolution import resized, seen_at
from kits.pcb_inspection.model.decode import decode_all
from kits.pcb_inspection.model.design import COARSEST
from kits.pcb_inspection.model.inspector import pad, to_input
from kits.pcb_inspection.model.loss import detection_loss, response_loss
from kits.pcb_inspection.model.naming import Names, named
from kits.pcb_inspection.model.network import CLASS_COUNT, DUAL, PairDetector
from kits.pcb_inspection.model.pair import stack

Teacher = Callable[[Tensor], Tensor]
"""Tested images (N, H, W) uint8, copper dark, to class probabilities (N, 6, H / 8, W / 8)."""
SIZE = 320
"""Side of a training crop in pixels."""
TAUGHT = 0.5
"""Weight of the teacher's answer beside the annotations."""
EACH = 2
"""Crops a pair and epoch."""
DRAWN = 160
"""Clean boards of the generator that train along."""

SCHEDULES = {
    "full": Schedule(epochs=64, batch_size=8, lr=2e-3, weight_decay=1e-4, warmup=0.03, ema=0.999, clip=5.0,
                     evaluate_every=5),
    "smoke": Schedule(epochs=2, batch_size=8, lr=2e-3, weight_decay=1e-4, warmup=0.2, ema=0.9, clip=5.0),
}  # fmt: skip


class View(Protocol):
    """How a network that is part of a detector is shown its batches, and how it is judged."""

    known: tuple[int, ...]
    """The classes that it tells."""

    def shown(self, batches: Iterable[dict[str, Any]], rng: np.random.Generator) -> Iterable[dict[str, Any]]:
        """Batches as the network sees them."""
        ...

    def judged(self, network: nn.Module) -> nn.Module:
        """The detector that it is part of."""
        ...


def train_detector(
    train: Sequence[Ready],
    validation: Sequence[Ready],
    schedule: Schedule,
    folder: Path,
    resume: bool,
    teacher: Teacher | None = None,
    start: PairDetector | None = None,
    larger: Sequence[nn.Module] = (),
    view: View | None = None,
    fresh: int = 0,
) -> Fit:
    """Train a detector from random weights or from `start`; the epoch is chosen by mAP50-95 on `validation`.

    It follows a `teacher` of single images, or an ensemble of `larger` detectors of pairs, beside the annotations. With
    a `view` it learns what that shows. With `fresh` that many boards of the generator are drawn anew for every epoch,
    so that names are learnt on layouts without end; otherwise DRAWN of them train along, the same in all epochs.
    """
    torch.manual_seed(schedule.seed)
    # channels last: 0.20 against 0.23 s a step of 8 crops on two cores
    model = (start or PairDetector()).to(memory_format=torch.channels_last)
    larger = [each.to(memory_format=torch.channels_last) for each in larger]
    size = model.design.size
    validation = [seen_at(pair, size) for pair in validation]
    count = fresh or drawn_beside(len(train))
    same = [] if fresh else drawn(count, schedule.seed)
    steps = max(1, (len(train) + count) * EACH // schedule.batch_size)
    fast = _faster_in_bfloat16(model, larger, train, schedule)

    def batches(epoch: int) -> Iterable[dict[str, Any]]:
        ready = [*train, *(drawn(count, schedule.seed, epoch) if fresh else same)]
        cut = training_batches(ready, schedule.batch_size, steps, schedule.seed, epoch, teacher)
        for batch in cut if view is None else view.shown(cut, np.random.default_rng((schedule.seed, epoch))):
            taught_too = {**batch, "taught": told(larger, batch["images"], view, fast)} if larger else batch
            yield resized(taught_too, size)

    def validate(network: nn.Module) -> float:
        return mean_average_precision_5095(network if view is None else view.judged(network), validation)

    trained = fit(
        model,
        batches,
        partial(fast_loss, fast=fast),
        schedule,
        steps_per_epoch=steps,
        folder=folder,
        resume=resume,
        evaluate=validate,
        label="training",
    )
    trained.model.to(memory_format=torch.contiguous_format)  # as safetensors stores it
    return trained


def _faster_in_bfloat16(
    model: nn.Module, larger: Sequence[nn.Module], train: Sequence[Ready], schedule: Schedule
) -> bool:
    """Whether this device trains the network faster in bfloat16, its larger ones' answers included."""
    tried = copy.deepcopy(model).train()  # its norms' statistics stay out of the training
    batch = next(training_batches(train, schedule.batch_size, 1, schedule.seed, 0))

    def step(fast: bool) -> None:
        taught_too = {**batch, "taught": told(larger, batch["images"], fast=fast)} if larger else batch
        fast_loss(tried, taught_too, fast).backward()

    return faster_in_bfloat16(step, batch["images"].device)


def drawn_beside(pairs: int) -> int:
    """How many boards of the generator train along with so many pairs."""
    return max(4, round(DRAWN * min(1.0, pairs / 800)))


def training_batches(
    ready: Sequence[Ready], batch_size: int, steps: int, seed: int, epoch: int, teacher: Teacher | None = None
) -> Iterator[dict[str, Any]]:
    """`steps` batches of crops: "images" (N, 4, SIZE, SIZE) float32 in 0..1, "truths" [(boxes (n, 4), labels (n,))].

    With a teacher also "taught", its class probabilities (N, 6, SIZE / 8, SIZE / 8).
    """
    cut = crops(ready, SIZE, -(-steps * batch_size // len(ready)), seed, epoch)
    for _ in range(steps):
        batch: list[Crop] = list(islice(cut, batch_size))
        collated = collate([stack(c.test, c.template) for c in batch], [(c.boxes, c.labels) for c in batch])
        yield collated if teacher is None else {**collated, "taught": taught(teacher, batch)}


def whole_batches(ready: Sequence[Ready], batch_size: int) -> Iterator[dict[str, Any]]:
    """The same for whole pairs in order, with bare board beside them up to the size of the batch's largest."""
    for start in range(0, len(ready), batch_size):
        part = ready[start : start + batch_size]
        height, width = (_whole(max(r.test.shape[axis] for r in part)) for axis in (0, 1))
        planes = [pad(stack(r.test, r.template), height, width) for r in part]
        yield collate(planes, [(r.boxes, r.labels) for r in part])


def _whole(side: int) -> int:
    """The next length that the network's strides divide."""
    return -(-side // COARSEST) * COARSEST


def collate(planes: list[np.ndarray], truths: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """A batch of planes (4, H, W) uint8 and their boxes and labels."""
    images = torch.cat([to_input(p) for p in planes]).contiguous(memory_format=torch.channels_last)
    return {"images": images, "truths": [(torch.from_numpy(b), torch.from_numpy(n)) for b, n in truths]}


def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The training loss of a batch, a scalar."""
    logits, distances = model(batch["images"])
    return _lost(logits, distances, batch)


def fast_loss(model: nn.Module, batch: dict[str, Any], fast: bool = True) -> Tensor:
    """The same with the network as in `core.train.bfloat16`: for trainings of its own, not for quantized ones."""
    images = batch["images"]
    with bfloat16(images.device, fast):
        logits, distances = model(images)
    return _lost(logits.float(), distances.float(), batch)


def _lost(logits: Tensor, distances: Tensor, batch: dict[str, Any]) -> Tensor:
    found = detection_loss(logits, distances, batch["truths"])
    return found + TAUGHT * response_loss(logits, batch["taught"]) if "taught" in batch else found


def taught(teacher: Teacher, batch: Sequence[Crop]) -> Tensor:
    """What a teacher sees in crops: class probabilities (N, 6, SIZE / 8, SIZE / 8).

    The teacher has only seen boards of dark copper: an inverted crop is shown as it was, and its answer is turned
    into the dual classes.
    """
    shown = [255 - crop.test if crop.dual else crop.test for crop in batch]
    seen = teacher(torch.from_numpy(np.stack(shown)))
    dual = torch.tensor([crop.dual for crop in batch])
    return torch.where(dual[:, None, None, None], seen[:, DUAL.tolist()], seen)


@torch.no_grad()
def told(larger: Sequence[nn.Module], images: Tensor, view: View | None = None, fast: bool = True) -> Tensor:
    """What an ensemble says of pairs (N, 4, H, W): the mean of its class probabilities (N, 6, H / 8, W / 8).

    Of the classes that a `view` leaves out it says nothing.
    """
    with bfloat16(images.device, fast):
        said = [detector.eval()(images)[0].float().sigmoid() for detector in larger]
    mean = torch.stack(said).mean(0)
    if view is not None:
        mean[:, [n for n in range(CLASS_COUNT) if n not in view.known]] = 0.0
    return mean


@torch.no_grad()
def detections(model: nn.Module, ready: Sequence[Ready], names: Names | None = None) -> dict[str, np.ndarray]:
    """Image id -> detections (n, 6) of pairs that are registered already, with the network's names or by `names`."""
    model.eval()
    found = {}
    for pair in ready:
        height, width = pair.test.shape
        planes = pad(stack(pair.test, pair.template), _whole(height), _whole(width))
        logits, distances = model(to_input(planes))
        boxes, said = decode_all(logits[0].numpy(), distances[0].numpy())
        found[pair.image_id] = boxes if names is None else named(boxes, said, planes, names)
    return found


def mean_average_precision_5095(model: nn.Module, ready: Sequence[Ready]) -> float:
    """mAP50-95 in % on registered pairs; the official AP saturates, this one still tells epochs apart."""
    truths = {r.image_id: (r.boxes, r.labels) for r in ready}
    return 100 * mean_average_precision(detections(model, ready), truths, CLASS_COUNT)
