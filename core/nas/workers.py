"""Who evaluates candidates: this process, processes beside it, or a Ray cluster; one that dies costs its trial alone.

A pool takes `(key, candidate)` and gives `(key, outcome)` in the order in which they are done. Evaluations are sent to
other processes, so they must be importable: functions of a module, or instances of its classes.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, Protocol

from core.kit import InputError
from core.nas.space import Candidate

Evaluate = Callable[[Candidate], Mapping[str, float]]


@dataclass(frozen=True)
class Outcome:
    """The metrics of a candidate, or why there are none; `died` where not the candidate failed but its worker."""

    metrics: Mapping[str, float] | None
    seconds: float
    why: str = ""
    died: bool = False


class Pool(Protocol):
    """Evaluates candidates, `slots` at a time."""

    slots: int

    def submit(self, key: int, candidate: Candidate) -> None:
        """Begin with a candidate; at most `slots` are under way."""

    def next(self) -> tuple[int, Outcome]:
        """Wait for one that is done."""

    def close(self) -> None:
        """Let go of what is under way."""


def evaluated(evaluate: Evaluate, candidate: Candidate) -> Outcome:
    """Metrics as floats, or the reason why there are none."""
    started = time.perf_counter()
    try:
        metrics = {name: float(value) for name, value in evaluate(dict(candidate)).items()}
    except Exception as error:  # noqa: BLE001  a candidate that cannot be built is an answer, not the end of a search
        last = traceback.extract_tb(error.__traceback__)[-1]
        why = f"{type(error).__name__}: {error} ({last.filename.rpartition('/')[2]}:{last.lineno})"
        return Outcome(None, time.perf_counter() - started, why)
    return Outcome(metrics, time.perf_counter() - started)


def pool(evaluate: Evaluate, workers: int | str) -> Pool:
    """A pool of `workers` processes (1: this one), or with "ray" of the cluster that Ray finds or begins."""
    if workers == "ray":
        return RayPool(evaluate)
    if not isinstance(workers, int) or workers < 1:
        raise InputError(f"workers {workers!r}: expected a number above 0, or 'ray'")
    return Here(evaluate) if workers == 1 else Processes(evaluate, workers)


class Here:
    """This process, one after the other."""

    slots = 1

    def __init__(self, evaluate: Evaluate) -> None:
        self._evaluate = evaluate
        self._waiting: list[tuple[int, Candidate]] = []

    def submit(self, key: int, candidate: Candidate) -> None:
        self._waiting.append((key, candidate))

    def next(self) -> tuple[int, Outcome]:
        key, candidate = self._waiting.pop(0)
        return key, evaluated(self._evaluate, candidate)

    def close(self) -> None:
        self._waiting.clear()


class Processes:
    """Processes of this machine, each in a pool of its own, so that one that dies takes no other's work with it."""

    def __init__(self, evaluate: Evaluate, workers: int) -> None:
        self.slots = workers
        self._evaluate = evaluate
        self._idle = [self._begin() for _ in range(workers)]
        self._busy: dict[Future[Outcome], tuple[int, ProcessPoolExecutor, float]] = {}

    def _begin(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, mp_context=get_context("spawn"))

    def submit(self, key: int, candidate: Candidate) -> None:
        worker = self._idle.pop()
        self._busy[worker.submit(evaluated, self._evaluate, candidate)] = key, worker, time.perf_counter()

    def next(self) -> tuple[int, Outcome]:
        done, _ = wait(self._busy, return_when=FIRST_COMPLETED)
        future = next(iter(done))
        key, worker, started = self._busy.pop(future)
        try:
            found = future.result()
        except BrokenProcessPool:
            worker.shutdown(wait=False)
            worker = self._begin()
            found = Outcome(
                None, time.perf_counter() - started, "its worker died (killed, or out of memory)", died=True
            )
        self._idle.append(worker)
        return key, found

    def close(self) -> None:
        for worker in (*self._idle, *(worker for _, worker, _ in self._busy.values())):
            for process in list((worker._processes or {}).values()):
                process.terminate()
            worker.shutdown(wait=False, cancel_futures=True)


class RayPool:
    """A Ray cluster: the one of RAY_ADDRESS or of this machine, else one that begins here; a task for each CPU."""

    def __init__(self, evaluate: Evaluate) -> None:
        try:
            import ray
        except ImportError as error:
            raise InputError("workers 'ray': Ray is not installed; pip install 'fitkit[cluster]'") from error
        self._ray = ray
        self._own = not ray.is_initialized()
        if self._own:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        self.slots = max(1, int(ray.cluster_resources().get("CPU", 1)))
        # a task whose worker died is not begun anew by Ray: the search counts it, and decides
        self._task = ray.remote(max_retries=0, num_cpus=1)(evaluated)
        self._evaluate = ray.put(evaluate)
        self._busy: dict[Any, tuple[int, float]] = {}

    def submit(self, key: int, candidate: Candidate) -> None:
        self._busy[self._task.remote(self._evaluate, dict(candidate))] = key, time.perf_counter()

    def next(self) -> tuple[int, Outcome]:
        (done, *_), _ = self._ray.wait(list(self._busy), num_returns=1)
        key, started = self._busy.pop(done)
        try:
            found: Outcome = self._ray.get(done)
        except self._ray.exceptions.RayError as error:
            why = f"its worker died ({type(error).__name__})"
            return key, Outcome(None, time.perf_counter() - started, why, died=True)
        return key, found

    def close(self) -> None:
        for task in self._busy:
            self._ray.cancel(task, force=True)
        if self._own:
            self._ray.shutdown()
