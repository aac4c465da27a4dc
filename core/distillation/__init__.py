"""Distillation: response and feature losses, and the step `Distill`."""

from core.distillation.feature import features_loss
from core.distillation.response import response_loss, softened_binary_kl, softened_kl
from core.distillation.step import Distill

__all__ = ["Distill", "features_loss", "response_loss", "softened_binary_kl", "softened_kl"]
