"""Cross-modal losses: maps of one sensor's network against maps of another's that cover the same ground."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from core.kit import InputError


def guided_loss(student: Tensor, teacher: Tensor, weight: Tensor, *, background: float = 0.05) -> Tensor:
    """The squared difference of standardised features where `weight` says that it matters, a scalar.

    Features (B, C, ...) of the same shape; `weight` (B, 1, ...) from 0 (background) to 1 (an object), to which
    `background` is added. Both are standardised along the channels, since two sensors' features have no common
    scale. Source: Wang et al., "DistillBEV" (2023), in its masking. Raises InputError for shapes that differ.
    """
    if student.shape != teacher.shape or weight.shape != (student.shape[0], 1, *student.shape[2:]):
        raise InputError(
            f"guided_loss: student {tuple(student.shape)}, teacher {tuple(teacher.shape)} and weight "
            f"{tuple(weight.shape)} do not fit; resample to one grid and adapt the channels first"
        )
    apart = (_standard(student) - _standard(teacher.detach())).square().mean(1, keepdim=True)
    share = weight + background
    return (apart * share).sum() / share.sum()


def relation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """How far the likenesses among n things differ between two networks, a scalar; the channels need not agree.

    Features (n, C) and (n, D) of the same things in the same order; a likeness is the cosine of two of them. Fewer
    than two things tell nothing and give 0. Source: Park et al., "Relational Knowledge Distillation" (2019).
    """
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise InputError(
            f"relation_loss: {tuple(student.shape)} and {tuple(teacher.shape)} are not features of the same things; "
            "give (n, channels) of both"
        )
    if len(student) < 2:
        return student.sum() * 0
    ours, theirs = (F.normalize(f, dim=1) for f in (student, teacher.detach()))
    return F.smooth_l1_loss(ours @ ours.T, theirs @ theirs.T)


def _standard(features: Tensor) -> Tensor:
    """Mean 0 and variance 1 along the channels at every place."""
    middle = features - features.mean(1, keepdim=True)
    return middle * torch.rsqrt(middle.square().mean(1, keepdim=True) + 1e-5)
