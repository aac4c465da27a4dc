"""Energy of one inference: arithmetic, instructions and data movement, then what the chip draws besides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from core.hardware.roofline import LayerCost
from core.hardware.targets import MemoryLevel, Target

SOURCE = "M. Horowitz, Computing's energy problem (and what we can do about it), ISSCC 2014: 45 nm, 0.9 V"
ERROR_BAND = 1.0
"""Relative error of an energy: the table is of bare circuits, and whole chips differ from it by twice."""

# pJ of (multiply, add). Integer products are summed in 32 bits. Not in the table: int4, whose multiplier is a
# quarter of the 8 bit one (its area goes with the square of the width), and bf16, taken as fp16.
_ARITHMETIC = {"fp32": (3.7, 0.9), "fp16": (1.1, 0.4), "bf16": (1.1, 0.4), "int8": (0.2, 0.1), "int4": (0.05, 0.1)}
_INSTRUCTION = 70.0  # pJ to fetch, decode and control one instruction
_SRAM = ((8 * 1024, 10.0), (32 * 1024, 20.0), (1024 * 1024, 100.0))  # pJ of a 64 bit access by capacity in bytes
_DRAM = (1300.0 + 2600.0) / 2  # pJ of a 64 bit access; the table gives this range
_NODE = 45.0
_SMALLEST_NODE = 7.0  # below, wires and leakage eat what smaller transistors save


@dataclass(frozen=True)
class Energy:
    """Joules of one inference by what they are spent on."""

    arithmetic: float
    instructions: float
    movement: float
    static: float

    @property
    def dynamic(self) -> float:
        """All that grows with the work, not with the time."""
        return self.arithmetic + self.instructions + self.movement

    @property
    def total(self) -> float:
        """Everything, in joules."""
        return self.dynamic + self.static


def mac_energy(dtype: str, process: float = _NODE) -> float:
    """pJ of one multiply-accumulate in a process of that many nm, scaled in proportion to the node above 7 nm."""
    return sum(_ARITHMETIC[dtype]) * _scale(process)


def byte_energy(level: MemoryLevel, process: float = _NODE) -> float:
    """pJ of moving one byte to or from a memory level.

    SRAM is read off the table by capacity (straight in log-log) and scaled with the process; DRAM is off
    the chip and is not scaled; flash is taken as SRAM of its capacity, which no table gives.
    """
    if level.technology == "dram":
        return _DRAM / 8
    size = level.bytes.value
    left, right = (_SRAM[0], _SRAM[1]) if size <= _SRAM[1][0] else (_SRAM[1], _SRAM[2])
    slope = math.log(right[1] / left[1]) / math.log(right[0] / left[0])
    access: float = left[1] * (size / left[0]) ** slope
    return access / 8 * _scale(process)


def energy(costs: Sequence[LayerCost], target: Target) -> Energy:
    """The energy of one inference whose layers cost `costs`."""
    node = target.process.value
    per_mac = _INSTRUCTION * _scale(node) / (target.macs_per_instruction.value * target.efficiency.value)
    return Energy(
        arithmetic=1e-12 * sum(c.layer.macs * mac_energy(c.runs_as, node) for c in costs),
        # Cycles that the efficiency takes from arithmetic go to loads and control, which are instructions too.
        instructions=1e-12 * per_mac * sum(c.layer.macs for c in costs),
        movement=1e-12 * sum(t.bytes * byte_energy(t.level, node) for c in costs for t in c.traffic),
        static=target.power["static"].value * sum(c.seconds for c in costs),
    )


def assumptions(target: Target, spent: Energy, seconds: float) -> tuple[str, ...]:
    """What the figure rests on, as sentences."""
    node = target.process.value
    ceiling = target.power["rated"].value * seconds
    return (
        f"energy table: {SOURCE}; logic and SRAM scaled by {_scale(node):.2f} for {node:g} nm, DRAM not scaled",
        f"static power {target.power['static'].value:g} W ({target.power['static'].source})",
        f"of it arithmetic {spent.arithmetic * 1e3:.3g} mJ, instructions {spent.instructions * 1e3:.3g} mJ, "
        f"data movement {spent.movement * 1e3:.3g} mJ, static {spent.static * 1e3:.3g} mJ",
        f"rated power for the whole estimated time would be {ceiling * 1e3:.3g} mJ",
    )


def _scale(process: float) -> float:
    return max(process, _SMALLEST_NODE) / _NODE
