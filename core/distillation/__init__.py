"""Distillation: response, feature, relation and cross-modal losses, and the step `Distill`."""

from core.distillation.cross_modal import guided_loss, relation_loss
from core.distillation.feature import features_loss
from core.distillation.response import response_loss, softened_binary_kl, softened_kl
from core.distillation.step import Distill

__all__ = [
    "Distill",
    "features_loss",
    "guided_loss",
    "relation_loss",
    "response_loss",
    "softened_binary_kl",
    "softened_kl",
]
