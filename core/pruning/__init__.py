"""Pruning: coupled channels that really go (`Prune`), and N:M patterns of zeros (`Sparsify`)."""

from core.pruning.coupling import Group, Member, coupled_groups
from core.pruning.nm import Sparsify, check_pattern, nm_mask, sparse_speedup, sparse_utilization
from core.pruning.structured import Prune, restore
from core.pruning.surgery import shrink

__all__ = [
    "Group", "Member", "Prune", "Sparsify", "check_pattern", "coupled_groups", "nm_mask", "restore", "shrink",
    "sparse_speedup", "sparse_utilization",
]  # fmt: skip
