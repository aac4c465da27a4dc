"""Confidence intervals: of rates (exact for independent trials, bootstrap where they share a group), gains by seed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact two-sided interval of a binomial rate, (low, high) in 0..1; no trials give (0, 1).

    Each tail holds (1 - confidence) / 2. Source: Clopper and Pearson, Biometrika 26 (1934).
    Raises ValueError unless 0 <= successes <= trials.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials, expected 0 <= successes <= trials")
    from scipy.stats import beta  # 60 MB that running an artifact has no use for

    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, successes, trials - successes + 1)) if successes else 0.0
    high = float(beta.ppf(1 - tail, successes + 1, trials - successes)) if successes < trials else 1.0
    return low, high


def group_bootstrap(
    successes: ArrayLike, trials: ArrayLike, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The percentile interval of sum(successes) / sum(trials) when whole groups are drawn with replacement.

    `successes` and `trials` hold one count a group, shape (groups,). Defects on one board are alike, so
    this is mostly wider than an interval that takes them as independent; with few groups it is coarse, and when
    every group agrees it has no width. Groups without trials are left out. Raises ValueError where fewer
    than two groups remain. Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993).
    """
    hit, tried = np.asarray(successes, dtype=np.float64), np.asarray(trials, dtype=np.float64)
    if hit.shape != tried.shape or hit.ndim != 1:
        raise ValueError(f"successes {hit.shape} and trials {tried.shape}, expected one count a group in each")
    hit, tried = hit[tried > 0], tried[tried > 0]
    groups = len(tried)
    if groups < 2:
        raise ValueError(f"{groups} groups with trials, expected at least 2 to draw from")
    # How often each group was drawn says all that a resample says, so one matrix product does the sums.
    drawn = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=resamples)
    rates = (drawn @ hit) / (drawn @ tried)
    tail = (1 - confidence) / 2
    low, high = np.quantile(rates, [tail, 1 - tail])
    return float(low), float(high)


def paired_gain(differences: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """The mean of paired differences, one for each seed, and its two-sided interval of Student's t.

    Raises ValueError for fewer than two. Source: Student, The probable error of a mean (1908).
    """
    if len(differences) < 2:
        raise ValueError(f"{len(differences)} difference(s), expected at least 2 for an interval")
    from scipy.stats import t

    values = np.asarray(differences, dtype=np.float64)
    half = float(t.ppf((1 + confidence) / 2, len(values) - 1)) * float(values.std(ddof=1)) / math.sqrt(len(values))
    mean = float(values.mean())
    return mean, mean - half, mean + half
