"""What a kit searches: a space with a hand design in it, how a candidate is judged, and what becomes of the winner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from core.nas import Candidate, Goal, Space
from core.nas.workers import Evaluate


@runtime_checkable
class Task(Protocol):
    """A search made ready: its supernet trained, its latency table measured.

    `goals` make the front, the first of them up and the second the cost; `score` is the one number for searchers that
    know one goal. `units` are those of the metrics by name; `estimated` names those that are told and not measured,
    with how, and by which share they may be off. `hand` is the design that the search is held against. `notes` say what
    the metrics are, measured on what, and how far off.
    """

    @property
    def space(self) -> Space: ...

    @property
    def evaluate(self) -> Evaluate: ...

    @property
    def goals(self) -> Sequence[Goal]: ...

    @property
    def score(self) -> Goal: ...

    @property
    def units(self) -> Mapping[str, str]: ...

    @property
    def estimated(self) -> Mapping[str, tuple[str, float]]: ...

    @property
    def hand(self) -> Candidate: ...

    @property
    def notes(self) -> Sequence[str]: ...

    def trained(self, candidate: Candidate, folder: Path) -> Mapping[str, float]:
        """A candidate's metrics after a short training of its own, which goes on in `folder` where it was killed."""
        ...

    def keep(self, candidate: Candidate, folder: Path) -> str:
        """Leave what is needed to go on from a candidate; returns a line that says how."""
        ...


@runtime_checkable
class Searched(Protocol):
    """A kit with a search space."""

    def task(self, data: Path | None, preset: str, folder: Path, resume: bool) -> Task:
        """Make a search ready in a folder; with `resume` what is there already is not made again."""
        ...


def told(candidate: Candidate) -> str:
    """A candidate in a line."""
    return "  ".join(f"{name} {value}" for name, value in candidate.items())
