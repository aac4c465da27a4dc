"""The metrics of a search that cost nothing to learn: the time that a candidate takes here, and what it weighs."""

from __future__ import annotations

from pathlib import Path

from core.nas import Candidate, weighted
from core.search.cost import Build, Costs
from core.search.latency import LatencyTable, operators

UNITS = {"latency": "ms", "score": "", "parameters": "", "macs": "", "peak": "B"}
"""Of the metrics of `Prices`, by name."""


class Prices:
    """What a candidate costs beside an accuracy, and the score of both.

    `place` is the file of a latency table for this machine (`fitted_table`); operators that it lacks are measured when
    they come. `target_ms` is the latency up to which the accuracy alone counts.
    """

    def __init__(self, place: Path, build: Build, target_ms: float) -> None:
        self._place, self._build, self._target_ms = place, build, target_ms
        self._table: LatencyTable | None = None

    def of(self, candidate: Candidate, accuracy: float) -> dict[str, float]:
        """ "latency" in ms, "score", "parameters", "macs" and "peak" in bytes."""
        model, inputs = self._build(candidate)
        found = operators(model, inputs)
        self._table = (self._table or LatencyTable.load(self._place)).measured(found)
        costs, latency = Costs(lambda _: (model, inputs)).of(candidate), self._table.latency(found)
        score = weighted(accuracy, latency, self._target_ms, w=-1.0, within=0.0)
        return {"latency": latency, "score": score, **{name: costs[name] for name in ("parameters", "macs", "peak")}}


def estimated(table: LatencyTable, accuracy: str) -> dict[str, tuple[str, float]]:
    """Those of `Prices` that are told and not measured, how, and by which share they may be off (see `Task`).

    The latency, and the score that holds it, by the table's worst error on networks it was not fitted to.
    """
    assert table.checked is not None
    most = table.checked.most
    return {
        "latency": (f"table of operators measured in {table.version}", most),
        "score": (f"{accuracy} by the latency of the table", 1 - 1 / (1 + most)),
        "peak": ("activations alive at once", 0.25),
    }
