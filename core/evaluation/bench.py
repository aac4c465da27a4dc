"""`bench`: time callables side by side, so that a machine that slows down slows them all alike."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from core.kit import InputError
from core.progress import Bar, progress

RESAMPLES = 400
CONFIDENCE = 0.95
# the least number of rounds that a time limit may cut a bench to
LEAST_ROUNDS = 5
# after so many seconds two rounds are enough: a picture of a large model takes minutes, and a user waits for it
PATIENCE = 600.0
# a callable is warm after so many seconds, however few calls they were
WARM = 10.0


@dataclass(frozen=True)
class Timing:
    """Times of one callable in ms; `spread` and `spread_p99` are half-widths of 95 % bootstrap intervals.

    `spread` is that of the median. The bootstrap takes the runs as independent; where the machine's
    load drifts over minutes, the truth varies more.
    """

    name: str
    p50: float
    p99: float
    min: float
    mean: float
    spread: float
    spread_p99: float
    runs: int


@dataclass(frozen=True)
class Ratio:
    """The median over the rounds of one callable's time over another's, with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


@dataclass(frozen=True)
class Bench:
    """The timings by name, and the ratios by (name, name): ratios["a", "b"] = 2 says that a takes twice b's time."""

    timings: Mapping[str, Timing]
    ratios: Mapping[tuple[str, str], Ratio]
    rounds: int
    threads: int | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: a list of timings, and of ratios with "slow over fast" in "of" and "over"."""
        ratios = [{"of": a, "over": b, **vars(r)} for (a, b), r in self.ratios.items()]
        timings = [vars(t) for t in self.timings.values()]
        return {"timings": timings, "ratios": ratios, "rounds": self.rounds, "threads": self.threads}


def bench(
    callables: Mapping[str, Callable[[], Any]] | Callable[[], Any],
    *,
    warmup: int = 3,
    runs: int | None = None,
    seconds: float | None = None,
    threads: int | None = None,
    label: str = "bench",
) -> Bench:
    """Time callables in turns (A B, then B A, and so on) for `runs` rounds or about `seconds` seconds.

    A single callable is named "it". Each is first called `warmup` times, or until that has taken ten seconds.
    `threads` pins torch to that many threads and this process to that many cores; a runtime's own threads are set where
    its module is made (`Artifact.as_module`). Give `runs` or `seconds`, not both. A bar shows when it takes over ten
    seconds.
    """
    named = dict(callables) if isinstance(callables, Mapping) else {"it": callables}
    if not named:
        raise InputError("bench: nothing to time; give at least one callable")
    if (runs is None) == (seconds is None):
        raise InputError("bench: give either runs or seconds")
    if (runs is not None and runs < 1) or (seconds is not None and seconds <= 0):
        raise InputError(f"bench: runs {runs}, seconds {seconds}; expected a number above 0")
    with pinned(threads):
        slow = _warm(named, warmup, label)
        with _collector_off():
            times = _rounds(named, runs, seconds, label, slow)
    timings = {name: _timing(name, times[i]) for i, name in enumerate(named)}
    order = {name: i for i, name in enumerate(named)}
    ratios = {(a, b): _ratio(times[order[a]] / times[order[b]]) for a, b in permutations(named, 2)}
    return Bench(timings, ratios, times.shape[1], threads)


def _warm(named: Mapping[str, Callable[[], Any]], calls: int, label: str) -> bool:
    """Call each until it is warm; tells whether that took so long that a bar does no harm to the timing."""
    began = time.perf_counter()
    with progress(f"{label}: warming up", calls * len(named)) as bar:
        for name, run in named.items():
            started = time.perf_counter()
            for call in range(calls):
                run()
                enough = time.perf_counter() - started > WARM
                bar.advance(name, calls - call if enough else 1)
                if enough:
                    break
    return time.perf_counter() - began > WARM


def _rounds(
    named: Mapping[str, Callable[[], Any]], runs: int | None, seconds: float | None, label: str, slow: bool
) -> NDArray[np.float64]:
    """Times in seconds, [callables, rounds]; a bar where it takes long."""
    started = time.perf_counter()
    with progress(f"{label}: first round", len(named), quiet=not slow) as bar:
        rows = [_one_round(named, False, bar)]
    round_time = time.perf_counter() - started
    least = min(LEAST_ROUNDS, max(2, math.ceil(PATIENCE / max(round_time, 1e-9))))
    expected = runs if runs is not None else max(least, int((seconds or 0.0) / max(round_time, 1e-9)))
    with progress(label, expected * len(named), done=len(named), quiet=expected * round_time < 10) as bar:
        while len(rows) < runs if runs is not None else _time_left(len(rows), started, seconds or 0.0):
            rows.append(_one_round(named, len(rows) % 2 == 1, bar))
    return np.array(rows, dtype=np.float64).T


def _time_left(done: int, started: float, seconds: float) -> bool:
    spent = time.perf_counter() - started
    return done < (LEAST_ROUNDS if spent < PATIENCE else 2) or spent < seconds


def _one_round(named: Mapping[str, Callable[[], Any]], backwards: bool, bar: Bar) -> list[float]:
    # the order turns each round: what one leaves behind in the caches falls on every one alike
    times = dict.fromkeys(named, 0.0)
    for name in reversed(list(named)) if backwards else named:
        begin = time.perf_counter()
        named[name]()
        times[name] = time.perf_counter() - begin
        bar.advance(name)
    return list(times.values())


def _timing(name: str, seconds: NDArray[np.float64]) -> Timing:
    ms = seconds * 1e3
    low, high = _interval(ms, 50)
    low99, high99 = _interval(ms, 99)
    p50, p99 = (float(v) for v in np.percentile(ms, [50, 99]))
    spread, spread99 = (high - low) / 2, (high99 - low99) / 2
    return Timing(name, p50, p99, float(ms.min()), float(ms.mean()), spread, spread99, len(ms))


def _ratio(ratios: NDArray[np.float64]) -> Ratio:
    low, high = _interval(ratios, 50)
    return Ratio(float(np.median(ratios)), low, high)


def _interval(values: NDArray[np.float64], percentile: float) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a percentile; the draws are seeded."""
    draws = np.random.default_rng(0)
    found = [np.percentile(draws.choice(values, len(values)), percentile) for _ in range(RESAMPLES)]
    low, high = np.percentile(found, [50 * (1 - CONFIDENCE), 100 - 50 * (1 - CONFIDENCE)])
    return float(low), float(high)


@contextmanager
def _collector_off() -> Iterator[None]:
    """No garbage collection inside: it would fall on whichever callable happens to run."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def pinned(threads: int | None) -> Iterator[None]:
    """Keep torch to `threads` threads and all threads of this process to that many cores, while inside.

    None changes nothing. Where the system has no processor affinity (macOS), only torch is kept.
    Raises InputError when more threads are asked for than this process has cores.
    """
    if threads is None:
        yield
        return
    cores = available_cores()
    if not 1 <= threads <= len(cores):
        raise InputError(f"threads {threads}: this process may use {len(cores)} cores; ask for 1 to {len(cores)}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    affinities = _affinities() if threads < len(cores) else {}
    try:
        for thread in affinities:
            _keep_to(thread, set(cores[:threads]))
        yield
    finally:
        for thread, affinity in affinities.items():
            _keep_to(thread, affinity)
        torch.set_num_threads(before)


def available_cores() -> list[int]:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _affinities() -> dict[int, set[int]]:
    """The cores of every thread of this process: a pool started earlier keeps its own."""
    found = {}
    tasks = Path("/proc/self/task")
    for thread in (int(p.name) for p in tasks.iterdir()) if tasks.exists() else ():
        try:
            found[thread] = os.sched_getaffinity(thread)
        except ProcessLookupError:  # ended since it was listed
            continue
    return found


def _keep_to(thread: int, cores: set[int]) -> None:
    try:
        os.sched_setaffinity(thread, cores)
    except ProcessLookupError:  # ended meanwhile
        return
