"""Structured pruning: coupled channels, importance, per-layer ratios, and the step `Prune`."""

from core.pruning.coupling import Group, coupled_groups
from core.pruning.structured import Prune, restore
from core.pruning.surgery import shrink

__all__ = ["Group", "Prune", "coupled_groups", "restore", "shrink"]
