"""`evaluate`: score what ships, on data that no choice has seen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from core.evaluation.measure import device
from core.figures import Figure, Figures, Measured, Stage
from core.kit import Kit


def evaluate(
    kit: Kit,
    module: nn.Module,
    data: Path | None = None,
    *,
    meta: Mapping[str, Any] | None = None,
    stage: Stage = "compressed",
    artifact: str = "",
) -> Figures:
    """The kit's metrics of a module on its report split, as measured figures.

    `meta` is an artifact's (None: that of the shipped weights), `artifact` its sha256 for the basis.
    """
    split = kit.report_split(data)
    samples = kit.dataset(data, split)
    chosen = kit.shipped()[1] if meta is None else meta
    basis = Measured(device(), type(module).__name__, len(samples), None, artifact, note=f"split {split}")
    scores = kit.score(module, samples, chosen)
    return Figures(Figure(name, value, unit, basis, stage) for name, (value, unit) in scores.items())
