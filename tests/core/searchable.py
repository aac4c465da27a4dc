"""What tests search for: functions that worker processes can import."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from core.nas import Bound, Candidate, OneOf, Space, Span, Steps

WIDTHS = (8, 16, 24, 32, 48, 64)


def macs(candidate: Candidate) -> float:
    """As of a stack of square layers."""
    return float(candidate["depth"]) * float(candidate["width"]) ** 2


SPACE = Space(
    {
        "width": Steps(WIDTHS),
        "depth": Steps((1, 2, 3, 4, 5, 6)),
        "kernel": Steps((3, 5, 7)),
        "act": OneOf(("relu", "silu", "gelu")),
        "ratio": Span(0.0, 0.9),
    },
    (Bound("MACs", macs, 12_000.0),),
)


def smooth(candidate: Candidate) -> dict[str, float]:
    """One hill: width 48, depth 5, kernel 5, silu, ratio 0.3; its top is 0."""
    apart = (
        abs(WIDTHS.index(int(candidate["width"])) - 4) / 5 + abs(int(candidate["depth"]) - 5) / 5
        + abs(int(candidate["kernel"]) - 5) / 4 + (candidate["act"] != "silu") * 0.5
        + abs(float(candidate["ratio"]) - 0.3)
    )  # fmt: skip
    return {"score": -apart, "macs": macs(candidate)}


def slow(candidate: Candidate) -> dict[str, float]:
    """As `smooth`, in a tenth of a second."""
    time.sleep(0.1)
    return smooth(candidate)


def fails(candidate: Candidate) -> dict[str, float]:
    """As `smooth`, but never with gelu."""
    if candidate["act"] == "gelu":
        raise ValueError("gelu is not built")
    return smooth(candidate)


@dataclass(frozen=True)
class DiesOnce:
    """As `smooth`, but the first process that evaluates anything is killed; `mark` is a file that remembers it."""

    mark: str

    def __call__(self, candidate: Candidate) -> Mapping[str, float]:
        try:
            Path(self.mark).touch(exist_ok=False)
        except FileExistsError:
            return smooth(candidate)
        os.kill(os.getpid(), 9)
        return {}


def dies(candidate: Candidate) -> dict[str, float]:
    """Takes its worker with it where the kernel is 7."""
    if candidate["kernel"] == 7:
        os.kill(os.getpid(), 9)
    return smooth(candidate)
