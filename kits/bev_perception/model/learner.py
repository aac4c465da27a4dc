"""The detector as it is trained: every decoder layer, denoising queries, and a history from the frames before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.train import bfloat16
from kits.bev_perception.model.denoising import Denoiser, Noise
from kits.bev_perception.model.dense_loss import PixelHead, cell_loss
from kits.bev_perception.model.detector import BEVFormer, Head, Predictions
from kits.bev_perception.model.loss import Truth, assigned_loss, matched_loss
from kits.bev_perception.model.proposals import Dense


@dataclass(frozen=True)
class View:
    """One moment of B samples, as `BEVFormer.forward` takes it, without the memory.

    `has_prev` (B,) is 0 for samples whose scene begins here.
    """

    images: Tensor
    lidar2img: Tensor
    can_bus: Tensor
    has_prev: Tensor
    camera_mask: Tensor


@dataclass(frozen=True)
class Batch:
    """What a step learns from: the views before, the oldest first, the view itself and its boxes.

    `prev_bev` (B, Q, C) is the memory before the first view, for training along a stream; None begins with zeros.
    """

    view: View
    truths: Sequence[Truth]
    past: Sequence[View] = ()
    prev_bev: Tensor | None = None


@dataclass(frozen=True)
class Losses:
    """The loss to minimise, its parts by name, and what it came from, with its graph.

    That is the memory (B, Q, C), the finest features (B, N, C, h, w), and where the detector has them what the dense
    head says and the logits of the pixels' distances (B, N, E, h, w).
    """

    total: Tensor
    parts: dict[str, Tensor]
    bev: Tensor
    features: Tensor
    dense: Dense | None
    distances: Tensor | None


def head_losses(
    head: Head,
    bev: Tensor,
    dense: Dense | None,
    truths: Sequence[Truth],
    denoiser: Denoiser | None = None,
    denoising_weight: float = 1.0,
    class_weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """What a head loses on a BEV (B, Q, C) and what its dense head says of it, by part: see `Learner.losses`."""
    queries = head.queries(bev, dense)
    parts: dict[str, Tensor] = {}
    if denoiser is None or not any(len(truth.labels) for truth in truths):
        parts |= matched_loss(head.decode(bev, queries), truths, head.code_weights, class_weights)
    else:
        extended, targets = denoiser(queries, truths)
        found, T = head.decode(bev, extended), targets.labels.shape[1]
        noised = Predictions(found.cls_scores[:, :, :T], found.bbox_preds[:, :, :T])
        plain = Predictions(found.cls_scores[:, :, T:], found.bbox_preds[:, :, T:])
        parts |= matched_loss(plain, truths, head.code_weights, class_weights)
        again = assigned_loss(noised, targets, head.code_weights, class_weights)
        parts |= {f"dn.{name}": denoising_weight * value for name, value in again.items()}
    if dense is not None:
        parts |= {
            f"dense.{name}": value for name, value in cell_loss(dense, truths, head.config, class_weights).items()
        }
    return parts


def features_in_bfloat16(detector: BEVFormer, images: Tensor) -> tuple[Tensor, ...]:
    """As `BEVFormer.features`, its convolutions as in `bfloat16`, in 32 bits again."""
    laid = images.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, images.shape[:2])
    with bfloat16(images.device):
        found = detector.features(laid)
    return tuple(f.float() for f in found)


def distances_in_bfloat16(
    head: Head, features: Tensor, lidar2img: Tensor, image_shape: tuple[int, int]
) -> Tensor | None:
    """What the head's `distances` say of the finest features, as in `bfloat16`; None where it has none."""
    if head.distances is None:
        return None
    with bfloat16(features.device):
        found: Tensor = head.distances(features, lidar2img, image_shape)
    return found.float()


class Learner(nn.Module):
    """Trains `detector`; `denoiser` is left out where `noise` is None, and `pixels` unless asked for.

    `class_weights` (K,) say how much each class counts, see `loss.rarity`.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        detector: BEVFormer,
        noise: Noise | None = None,
        denoising_weight: float = 1.0,
        pixels: bool = False,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.detector = detector
        self.denoiser = Denoiser(detector.config, noise) if noise is not None else None
        self.pixels = PixelHead(detector.config) if pixels else None
        self.denoising_weight = denoising_weight
        self.register_buffer("class_weights", class_weights, persistent=False)

    def heads(self) -> nn.ModuleDict:
        """What trains along and is thrown away after: the denoiser and the pixels' head, where they are there."""
        known = {"denoiser": self.denoiser, "pixels": self.pixels}
        return nn.ModuleDict({name: module for name, module in known.items() if module is not None})

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a batch, a scalar."""
        return self.losses(batch).total

    def losses(self, batch: Batch) -> Losses:
        """The loss of a batch with its parts: "0.cls", "0.box" by layer, "dn.0.cls", ... of the denoising, and of the
        dense losses "dense.heat", "dense.box", "pixel.heat", "pixel.depth",
        "pixel.shape", "pixel.bin".
        """
        head, view, truths = self.detector.pts_bbox_head, batch.view, batch.truths
        shape = (int(view.images.shape[-2]), int(view.images.shape[-1]))
        features = features_in_bfloat16(self.detector, view.images)
        far = distances_in_bfloat16(head, features[0], view.lidar2img, shape)
        bev = head.encode(
            features, view.lidar2img, view.can_bus, self.remember(batch), view.has_prev, view.camera_mask, shape, far
        )
        dense = head.dense(bev)
        parts = head_losses(head, bev, dense, truths, self.denoiser, self.denoising_weight, self.class_weights)
        if self.pixels is not None:
            seen = self.pixels(features[0], view.lidar2img, truths, far, self.class_weights)
            parts |= {f"pixel.{k}": v for k, v in seen.items()}
        return Losses(torch.stack(list(parts.values())).sum(), parts, bev, features[0], dense, far)

    def encode(self, view: View, prev_bev: Tensor) -> Tensor:
        """The memory (B, Q, C) after a view."""
        return self.detector.encode(
            view.images, view.lidar2img, view.can_bus, prev_bev, view.has_prev, view.camera_mask
        )

    @torch.no_grad()
    def remember(self, batch: Batch) -> Tensor:
        """The memory before the batch's view, as a deployed detector would have it: in eval mode, no gradient."""
        config = self.detector.config
        bev = batch.prev_bev
        if bev is None:
            images = batch.view.images
            bev = images.new_zeros(images.shape[0], config.bev_h * config.bev_w, config.embed_dims)
        if batch.past:
            training = self.detector.training
            self.detector.eval()
            for view in batch.past:
                bev = self.encode(view, bev)
            self.detector.train(training)
        return bev
