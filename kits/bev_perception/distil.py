"""The step that brings a pruned detector back: trained along streams, towards what the original sees.

The object queries of two detectors come in no common order, so what is compared is what lies before them: the neck's
features, how far away every pixel is, the BEV where something stands, and what every cell of the dense head says. What
the decoders answer is compared on the original's queries, which the trained one is asked as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.compress import Outcome, handles
from core.distillation import guided_loss, softened_binary_kl, softened_kl
from core.kit import Context, InputError, Step
from core.pruning import check_pattern
from core.train import Schedule, fit
from core.weights import load_weights, save_weights
from kits.bev_perception.data.streams import Shot
from kits.bev_perception.lidar import foreground
from kits.bev_perception.model.detector import BEVFormer, Predictions
from kits.bev_perception.model.learner import Learner, distances_in_bfloat16, features_in_bfloat16
from kits.bev_perception.model.loss import BOX_WEIGHT, CLASS_WEIGHT
from kits.bev_perception.training import HEADS, LANES, Memory, learner_of, shown


@dataclass(frozen=True)
class FollowOriginal(Step):
    """Train as the original was, and towards its neck, distances, BEV, dense head and answers, by these weights.

    An epoch shows a `share` of the scenes, other ones each time, and those by night `nights` times as often. With
    `hold_zeros` weights that are 2:4 sparse stay so, but for those whose names match a pattern in `free`, which may
    fill their zeros in.
    """

    epochs: int
    lr: float = 3e-4
    neck: float = 1.0
    far: float = 1.0
    bev: float = 1.0
    heat: float = 20.0
    answers: float = 0.0
    ema: float = 0.99
    share: float = 1.0
    nights: int = 1
    hold_zeros: bool = False
    free: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"FollowOriginal.share: {self.share}, expected more than 0 and at most 1")
        if self.nights < 1:
            raise InputError(f"FollowOriginal.nights: {self.nights}, expected 1 or more")


class _Following(nn.Module):
    """A learner beside the original, each with its own memory; the forward takes shots and returns the loss."""

    def __init__(self, learner: Learner, original: BEVFormer, step: FollowOriginal) -> None:
        super().__init__()
        self.learner, self.step = learner, step
        self.memory, self.theirs = Memory(original.config, LANES), Memory(original.config, LANES)
        self._original = [original]  # in a list, so that it is no part of what is trained

    def forward(self, shots: Sequence[Shot]) -> Tensor:
        (original,) = self._original
        head, config = original.pts_bbox_head, original.config
        device = head.code_weights.device
        batch = self.memory.batch(shots, device)
        found = self.learner.losses(batch)
        self.memory.keep(found.bev)
        view, shape = batch.view, (config.images.height, config.images.width)
        with torch.no_grad():
            features = features_in_bfloat16(original, view.images)
            distances = distances_in_bfloat16(head, features[0], view.lidar2img, shape)
            bev = head.encode(
                features, view.lidar2img, view.can_bus, self.theirs.remembered(len(shots), device), view.has_prev,
                view.camera_mask, shape, distances,
            )  # fmt: skip
            dense = head.dense(bev)
            queries = head.queries(bev, dense) if self.step.answers else None
            answers = head.decode(bev, queries) if queries is not None else None
        self.theirs.keep(bev)
        step, total = self.step, found.total
        # by the size of what is to be met, so that the weight means the same for every original
        total = total + step.neck * F.mse_loss(found.features, features[0]) / features[0].square().mean()
        grid = (config.bev_h, config.bev_w)
        ours, theirs = (b.transpose(1, 2).unflatten(2, grid) for b in (found.bev, bev))
        total = total + step.bev * guided_loss(ours, theirs, foreground(batch.truths, config))
        if found.distances is not None and distances is not None:
            total = total + step.far * softened_kl(found.distances, distances, 1.0, dim=2)
        if found.dense is not None and dense is not None:
            total = total + step.heat * softened_binary_kl(found.dense.logits, dense.logits, 1.0)
        if queries is not None and answers is not None:
            ours_too = self.learner.detector.pts_bbox_head.decode(found.bev, queries)
            total = total + step.answers * answers_apart(ours_too, answers, head.code_weights)
        return total


def answers_apart(ours: Predictions, theirs: Predictions, code_weights: Tensor) -> Tensor:
    """How far answers to the same queries are apart, of all layers: what stands there, and where it is sure, which box.

    Each is the sum over the queries for one that is sure, as the matched loss counts its truths.
    """
    sure = theirs.cls_scores.sigmoid().amax(-1, keepdim=True)
    count = sure.sum().clamp(min=1.0) / len(sure)
    classes = softened_binary_kl(ours.cls_scores, theirs.cls_scores, 1.0) * ours.cls_scores.numel()
    boxes = (sure * (ours.bbox_preds - theirs.bbox_preds).abs() * code_weights).sum()
    return (CLASS_WEIGHT * classes + BOX_WEIGHT * boxes) / count


@handles(FollowOriginal)
def follow(model: nn.Module, step: FollowOriginal, context: Context) -> Outcome:
    """Train the given detector; its modules stay what they are."""
    original = context.original
    if not isinstance(model, BEVFormer) or not isinstance(original, BEVFormer):
        raise InputError(
            f"FollowOriginal: takes a BEVFormer, this is a {type(model).__name__}; put it before the others"
        )
    samples = context.kit.dataset(context.data, "train", context.preset)
    schedule = Schedule(
        step.epochs, LANES, step.lr, weight_decay=0.01, warmup=0.05, clip=10.0, ema=step.ema, seed=step.seed
    )

    batches, steps = shown(samples, LANES, step.share, step.seed, step.nights)
    held = [
        p for name, p in model.named_parameters()
        if step.hold_zeros and p.ndim >= 2 and p.any() and check_pattern(p, 2, 4)
        and not any(fnmatchcase(name, pattern) for pattern in step.free)
    ]  # fmt: skip
    masks = [p.detach() == 0 for p in held]
    if step.hold_zeros and not held:
        raise InputError("FollowOriginal.hold_zeros: no weight of the network is 2:4 sparse; put Sparsify before it")

    def loss(net: nn.Module, shots: Sequence[Shot]) -> Tensor:
        _clear(held, masks)
        value: Tensor = net(shots)
        return value

    modes = [(module, module.training) for module in original.modules()]
    original.eval()
    folder = context.folder / "follow" if context.folder is not None else None
    learner = learner_of(model, samples)
    if context.folder is not None and (before := _heads_before(context.folder)) is not None:
        load_weights(learner.heads(), before)
    try:
        trained = fit(
            _Following(learner, original, step), batches, loss, schedule, steps_per_epoch=steps,
            folder=folder, resume=context.resume, label="following the original",
        )  # fmt: skip
    finally:
        for module, training in modes:
            module.training = training
    losses = [entry["loss"] for entry in trained.history]
    if context.folder is not None:
        place = context.folder.with_suffix(".heads")  # beside the step's own folder, which goes when the step is done
        place.mkdir(exist_ok=True)
        save_weights(learner.heads(), place / HEADS)
    detector: Any = trained.model.get_submodule("learner.detector")
    _clear(held, masks)  # the weights' average remembers what lay between two batches
    seen = step.epochs * steps * LANES
    what = f"trained on {seen} frames towards the original; loss {losses[0]:.4g} -> {losses[-1]:.4g}"
    if held:
        what += f"; {len(held)} weights stayed 2:4 sparse"
    return Outcome(detector, [{"layer": "(model)", "what": what}])


def _heads_before(folder: Path) -> Path | None:
    """What the last step before left of the heads that only training has: begun at random they disturb the network."""
    found = [p for p in sorted(folder.parent.glob(f"[0-9][0-9]-*.heads/{HEADS}")) if p.parent.stem < folder.stem]
    return found[-1] if found else None


@torch.no_grad()
def _clear(weights: Sequence[nn.Parameter], masks: Sequence[Tensor]) -> None:
    """Back to zero with what the optimizer moved away from it."""
    for weight, mask in zip(weights, masks, strict=True):
        weight.masked_fill_(mask, 0)
