"""A plan of peak memory before a run: what each way of running needs, phase by phase, and which one fits a limit."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import nn

from core.kit import InputError

W = TypeVar("W")

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Phase:
    """A part of a run: bytes of weights in memory meanwhile, and the most of activations, reached in layer `at`."""

    name: str
    weights: int
    activations: int
    at: str = ""

    @property
    def bytes(self) -> int:
        """Weights and activations."""
        return self.weights + self.activations


@dataclass(frozen=True)
class PeakPlan(Generic[W]):
    """What one way of running needs: `base` bytes of the process before the model, and the phases of the run.

    `name` says the way in words, `way` is what to run with. `reached` bytes is the most that the process has had
    before: a peak never falls again, even where pages were given back.
    """

    name: str
    way: W
    base: int
    phases: tuple[Phase, ...]
    reached: int = 0

    @property
    def worst(self) -> Phase:
        """The phase with the peak."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def peak(self) -> int:
        """The most bytes of resident memory of the whole process."""
        return max(self.reached, self.base + self.worst.bytes)

    def to_json(self) -> dict[str, Any]:
        """Bytes of the peak, the base and every phase."""
        phases = [{"name": p.name, "weights": p.weights, "activations": p.activations, "at": p.at} for p in self.phases]
        return {
            "way": self.name, "peak": self.peak, "base": self.base, "reached": self.reached, "phases": phases
        }  # fmt: skip

    def __str__(self) -> str:
        """One line: the peak, its phase, and what it is made of."""
        worst = self.worst
        if self.peak > self.base + worst.bytes:
            return f"~{self.peak / 1e6:.0f} MB, {self.name}: reached before the run, which itself needs less"
        at = f" at {worst.at}" if worst.at else ""
        return (
            f"~{self.peak / 1e6:.0f} MB, {self.name}: in {worst.name}{at}; process {self.base / 1e6:.0f}, "
            f"weights {worst.weights / 1e6:.0f}, activations {worst.activations / 1e6:.0f} MB"
        )


def choose(plans: Iterable[PeakPlan[W]], limit: int | None) -> PeakPlan[W]:
    """The first plan whose peak is within `limit` bytes, so give the fastest first; later ones are not even made.

    Without a limit it is the first that the memory free on this machine holds, or else the leanest. Raises InputError,
    before anything is loaded, where none is within a limit: it names the least that is needed and where.
    """
    most = limit if limit is not None else free_bytes()
    tried: list[PeakPlan[W]] = []
    for plan in plans:
        if most is None or plan.peak <= most:
            return plan
        tried.append(plan)
    if not tried:
        raise InputError("memory plan: no way to run; give at least one")
    least = min(tried, key=lambda plan: plan.peak)
    if limit is None:
        return least
    raise InputError(
        f"memory limit {limit / 1e6:.0f} MB: the leanest way needs {least}; raise the limit, make smaller pictures or "
        "batches, or pack the model in fewer bits"
    )


def free_bytes() -> int | None:
    """Bytes that this process could have: what it has and nine tenths of what the system can spare; None without /proc.

    A tenth is left because the system needs some itself, and is slow before it has none.
    """
    info = Path("/proc/meminfo")
    if not info.exists():
        return None
    line = next(row for row in info.read_text(encoding="ascii").splitlines() if row.startswith("MemAvailable:"))
    return int(0.9 * 1024 * int(line.split()[1])) + (resident_bytes() or 0)


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers as they are, shared ones once; works on the meta device."""
    seen: dict[int, int] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        storage = tensor.untyped_storage()
        seen[storage._cdata] = storage.nbytes()
    return sum(seen.values())


def largest_expansion(module: nn.Module) -> tuple[int, str]:
    """Bytes of the largest float weight that running packed makes, and its layer; (0, "") where nothing is packed.

    A packed layer is one that has `dequantized`; its weight is counted in FP32.
    """
    sizes = {
        name: 4 * m.weight_shape.numel()
        for name, m in module.named_modules()
        if hasattr(m, "dequantized") and not isinstance(m, nn.Embedding)
    }
    name = max(sizes, key=lambda n: sizes[n], default="")
    return sizes.get(name, 0), name


def resident_bytes(field: str = "VmRSS") -> int | None:
    """VmRSS (now) or VmHWM (the most so far) of this process in bytes; None where there is no /proc."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(row for row in status.read_text(encoding="ascii").splitlines() if row.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def parse_bytes(text: str) -> int:
    """Bytes of a size such as "1.5GB", "800 MB" (10^6) or "2GiB" (2^30); raises InputError for anything else."""
    found = _SIZE.fullmatch(text)
    scale = _UNITS.get(found[2].lower()) if found else None
    if found is None or scale is None or float(found[1]) <= 0:
        raise InputError(f"memory limit {text!r}: expected a size such as 1.5GB, 800MB or 2GiB")
    return round(float(found[1]) * scale)
