"""Whether shared weights rank candidates as training each of them alone does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from core.kit import InputError


@dataclass(frozen=True)
class RankCorrelation:
    """Kendall's tau-b of pairs with its 95 % interval over which candidates were looked at."""

    tau: float
    low: float
    high: float
    count: int


def kendall(shared: Sequence[float], alone: Sequence[float], *, draws: int = 2000, seed: int = 0) -> RankCorrelation:
    """Kendall's tau-b between two scores of the same candidates, at least 8 (ties count half, as SciPy's).

    The interval is a bootstrap over the candidates; draws in which a score has one value only are left out. InputError
    for fewer candidates, unlike numbers or scores that are not finite.
    """
    from scipy.stats import kendalltau

    a, b = np.asarray(shared, float), np.asarray(alone, float)
    if a.shape != b.shape or a.ndim != 1:
        raise InputError(f"kendall: {a.size} scores against {b.size}; give one of each for every candidate")
    if len(a) < 8:
        raise InputError(f"kendall: {len(a)} candidates; fewer than 8 say nothing of a ranking")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InputError("kendall: a score is not finite; leave that candidate out")
    tau = float(kendalltau(a, b).statistic)
    if not np.isfinite(tau):
        raise InputError("kendall: all candidates have the same score, so there is no ranking")
    rng, found = np.random.default_rng(seed), []
    for _ in range(draws):
        rows = rng.integers(len(a), size=len(a))
        if len(set(a[rows])) > 1 and len(set(b[rows])) > 1:
            found.append(float(kendalltau(a[rows], b[rows]).statistic))
    low, high = np.quantile(found, (0.025, 0.975))
    return RankCorrelation(tau, float(low), float(high), len(a))
