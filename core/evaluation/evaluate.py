"""`evaluate`: score what ships, on the split that a kit holds out of training and of every choice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core.evaluation.measure import device, runtime_title
from core.export.artifact import origin_of
from core.figures import Figure, Figures, Measured, Stage
from core.kit import Kit


def evaluate(
    kit: Kit,
    module: nn.Module,
    data: Path | None = None,
    *,
    meta: Mapping[str, Any] | None = None,
    stage: Stage = "compressed",
) -> Figures:
    """The kit's metrics of a module on its report split, as measured figures.

    `meta` is what was chosen on validation data; None takes that of the artifact that the module comes from, or
    else that of the shipped weights. The basis names the artifact's runtime, precision and hash; a module
    that comes from none is named by its class.
    """
    split = kit.report_split(data)
    samples = kit.dataset(data, split)
    origin = origin_of(module)
    software, sha256 = f"torch {torch.__version__}, {type(module).__name__}", ""
    if origin is not None:
        software = runtime_title(origin.artifact, origin.variant, origin.threads)
        sha256 = origin.artifact.sha256
    if meta is None:
        meta = origin.artifact.meta if origin is not None and origin.artifact.meta else kit.shipped()[1]
    basis = Measured(device(), software, len(samples), None, sha256, note=f"split {split}")
    scores = kit.score(module, samples, meta)
    return Figures(Figure(name, value, unit, basis, stage) for name, (value, unit) in scores.items())
