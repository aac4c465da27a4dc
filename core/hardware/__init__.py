"""Devices with sourced numbers, and what a model costs on them: latency, energy, memory, fit."""

from core.hardware.host import Host, measure_host
from core.hardware.memory import MemoryPlan, plan
from core.hardware.profile import LayerProfile, profile, trace
from core.hardware.roofline import LayerCost, roofline
from core.hardware.targets import BITS, MemoryLevel, Number, Target, target, targets
from core.hardware.verdict import FitVerdict, estimate, fit, stored_bytes, will_it_be_faster

__all__ = [
    "BITS", "FitVerdict", "Host", "LayerCost", "LayerProfile", "MemoryLevel", "MemoryPlan", "Number", "Target",
    "estimate", "fit", "measure_host", "plan", "profile", "roofline", "stored_bytes", "target", "targets", "trace",
    "will_it_be_faster",
]  # fmt: skip
