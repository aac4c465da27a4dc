"""Searchers on Optuna's storage: better than the control, the same after a crash, and at the price of one trial."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.kit import InputError
from core.nas import (
    DIFFERENTIAL,
    EVOLUTION,
    PARETO,
    RANDOM,
    Bound,
    Found,
    Goal,
    SearchPlan,
    Space,
    Steps,
    Trial,
    as_json,
    pareto,
    search,
    weighted,
    with_control,
)
from tests.core import searchable
from tests.core.searchable import SPACE, DiesOnce, dies, fails, macs, slow, smooth

SCORE, MACS = Goal("score"), Goal("macs", higher=False)


@pytest.mark.parametrize("searcher", [DIFFERENTIAL, EVOLUTION])
def test_a_searcher_beats_random_search_at_the_same_cost(searcher: str) -> None:
    gains = []
    for seed in range(3):
        own, control = with_control(
            SPACE, smooth, [SCORE], SearchPlan(searcher=searcher, trials=80, seed=seed, population=10)
        )
        assert len(own.trials) == len(control.trials) == 80
        gains.append(own.best.metrics["score"] - control.best.metrics["score"])  # type: ignore[index]
    assert np.mean(gains) > 0.05, gains


def test_nsga2_finds_a_front_that_random_search_does_not_reach() -> None:
    own, control = with_control(
        SPACE, smooth, [SCORE, MACS], SearchPlan(searcher=PARETO, trials=120, seed=0, population=16)
    )
    assert all(macs(trial.candidate) <= 12_000 for trial in own.trials)

    def covered(found: Found) -> float:
        """The area of score (from -3) and MACs (to 12,000) that a front dominates."""
        steps = sorted((t.metrics["macs"], t.metrics["score"]) for t in found.front if t.metrics)
        ends = [*(cost for cost, _ in steps[1:]), 12_000.0]
        return sum((end - cost) * (score + 3) for (cost, score), end in zip(steps, ends))

    assert covered(own) > covered(control)
    scores = [t.metrics["score"] for t in own.front if t.metrics]
    costs = [t.metrics["macs"] for t in own.front if t.metrics]
    assert scores == sorted(scores, reverse=True) and costs == sorted(costs, reverse=True)


def test_a_front_leaves_out_what_is_dominated_and_what_is_equal() -> None:
    points = [(1.0, 5.0), (2.0, 5.0), (2.0, 5.0), (0.5, 1.0), (0.4, 2.0)]
    trials = [Trial(i, {}, {"score": s, "macs": m}, 0.0) for i, (s, m) in enumerate(points)]
    assert [t.number for t in pareto(trials, [SCORE, MACS])] == [1, 3]
    assert Found("x", (SCORE,), tuple(trials)).best.number == 1


@pytest.mark.parametrize("searcher", [DIFFERENTIAL, EVOLUTION, RANDOM])
def test_a_search_that_was_stopped_goes_on_as_if_it_had_not_been(searcher: str, tmp_path: Path) -> None:
    at_once = search(SPACE, smooth, [SCORE], SearchPlan(searcher=searcher, trials=30, seed=3, population=6))
    for wanted in (7, 19, 30):
        found = search(
            SPACE,
            smooth,
            [SCORE],
            SearchPlan(searcher=searcher, trials=wanted, seed=3, population=6, storage=tmp_path / "s.jsonl"),
        )
    assert [t.candidate for t in found.trials] == [t.candidate for t in at_once.trials]
    assert json.loads(json.dumps(as_json(found)))["best"] == at_once.best.number


def test_a_kill_costs_the_trial_that_ran(tmp_path: Path) -> None:
    storage = tmp_path / "study.jsonl"
    code = (
        "from core.nas import Goal, SearchPlan, search\nfrom tests.core.searchable import SPACE, slow\n"
        f"search(SPACE, slow, [Goal('score')], SearchPlan(searcher='random', trials=200, storage={str(storage)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    for _ in range(600):
        if storage.exists() and storage.read_text().count("fitkit.metrics") >= 3:
            break
        time.sleep(0.05)
    process.kill()
    process.wait()
    kept = storage.read_text().count("fitkit.metrics")
    assert kept >= 3
    storage.write_bytes(storage.read_bytes() + b'{"op_code": 6, "cut by the cra')
    found = search(SPACE, slow, [SCORE], SearchPlan(searcher=RANDOM, trials=kept + 2, storage=storage))
    assert len(found.scored) == kept + 2
    numbers = [trial.number for trial in found.trials]
    assert len(set(range(numbers[-1] + 1)) - set(numbers)) <= 1, "one number was lost with the process"


def test_a_corrupt_study_is_refused_with_the_way_back(tmp_path: Path) -> None:
    storage = tmp_path / "study.jsonl"
    search(SPACE, smooth, [SCORE], SearchPlan(searcher=RANDOM, trials=3, storage=storage))
    lines = storage.read_bytes().splitlines(keepends=True)
    storage.write_bytes(b"".join([*lines[:4], b"\x00\x00 torn\n", *lines[5:]]))
    with pytest.raises(InputError, match=rf"line 5 of {len(lines)} is not one.*put a copy of it back"):
        search(SPACE, smooth, [SCORE], SearchPlan(searcher=RANDOM, trials=4, storage=storage))
    assert storage.read_bytes().splitlines(keepends=True)[5:] == lines[5:], "nothing was thrown away"
    storage.write_bytes(b"".join(lines[:4]))
    assert len(search(SPACE, smooth, [SCORE], SearchPlan(searcher=RANDOM, trials=4, storage=storage)).scored) == 4
    storage.write_text('{"no": "journal"}\n')
    with pytest.raises(InputError, match="move it away to begin anew"):
        search(SPACE, smooth, [SCORE], SearchPlan(searcher=RANDOM, trials=4, storage=storage))
    with pytest.raises(InputError, match="is a folder"):
        search(SPACE, smooth, [SCORE], SearchPlan(searcher=RANDOM, trials=4, storage=tmp_path))


def test_a_study_of_another_space_is_not_gone_on_with(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    search(SPACE, smooth, [SCORE], SearchPlan(searcher=RANDOM, trials=2, storage=url))
    other = Space({**SPACE.choices, "width": Steps((8, 16))}, SPACE.bounds)
    with pytest.raises(InputError, match="another search space"):
        search(other, smooth, [SCORE], SearchPlan(searcher=RANDOM, trials=4, storage=url))
    with pytest.raises(InputError, match="other goals"):
        search(SPACE, smooth, [Goal("score", higher=False)], SearchPlan(searcher=RANDOM, trials=4, storage=url))
    assert len(search(SPACE, smooth, [SCORE], SearchPlan(searcher=RANDOM, trials=4, storage=url)).scored) == 4


def test_a_candidate_that_fails_is_counted_with_its_reason() -> None:
    found = search(SPACE, fails, [SCORE], SearchPlan(searcher=RANDOM, trials=30, seed=1))
    bad = [trial for trial in found.trials if trial.metrics is None]
    assert bad and all(t.candidate["act"] == "gelu" and "gelu is not built" in t.why for t in bad)
    assert len(found.trials) == 30 and found.best.candidate["act"] != "gelu"
    with pytest.raises(InputError, match="10 candidates failed in a row.*'score' is nan"):
        search(SPACE, lambda c: {"score": float("nan")}, [SCORE], SearchPlan(searcher=RANDOM, trials=30))


def test_workers_share_a_study_and_one_that_dies_is_replaced(tmp_path: Path) -> None:
    found = search(SPACE, DiesOnce(str(tmp_path / "mark")), [SCORE], SearchPlan(EVOLUTION, 12, workers=2, population=4))
    assert len(found.scored) == 12, "the candidate whose worker died was tried once more"
    assert (tmp_path / "mark").exists()


def test_a_candidate_that_kills_every_worker_fails_and_the_rest_go_on() -> None:
    found = search(SPACE, dies, [SCORE], SearchPlan(searcher=RANDOM, trials=8, workers=2, seed=0))
    bad = [trial for trial in found.trials if trial.metrics is None]
    assert bad and len(found.trials) == 8
    assert all(t.candidate["kernel"] == 7 and "its worker died" in t.why for t in bad)


def test_a_space_that_is_used_up_is_searched_to_its_end() -> None:
    small = Space({"w": Steps((1, 2, 3)), "d": Steps((1, 2))})
    found = search(
        small, lambda c: {"score": float(c["w"])}, [SCORE], SearchPlan(searcher=DIFFERENTIAL, trials=6, population=4)
    )
    assert len({tuple(t.candidate.items()) for t in found.trials}) == 6


TIGHT = Space(SPACE.choices, (Bound("MACs", macs, 1.0),))


@pytest.mark.parametrize(
    ("space", "goals", "change", "why"),
    [
        (SPACE, [SCORE], {"searcher": "magic"}, "searcher 'magic' is not known"),
        (SPACE, [SCORE, MACS], {"searcher": DIFFERENTIAL}, "knows one goal, not 2"),
        (SPACE, [SCORE], {"searcher": PARETO}, "needs two goals"),
        (SPACE, [SCORE], {"trials": 0}, "trials: 0"),
        (SPACE, [SCORE], {"workers": 0}, "workers 0"),
        (SPACE, [SCORE], {"population": 3}, "population 3"),
        (SPACE, [], {}, "without a goal"),
        (TIGHT, [SCORE], {}, "no member under its bounds"),
    ],
)
def test_a_search_that_cannot_be_says_so_before_it_begins(
    space: Space, goals: list[Goal], change: dict[str, Any], why: str
) -> None:
    calls: list[object] = []

    def counted(candidate: object) -> dict[str, float]:
        calls.append(candidate)
        return {"score": 0.0}

    with pytest.raises(InputError, match=why):
        search(space, counted, goals, SearchPlan(**{"searcher": RANDOM, "trials": 3, **change}))
    assert not calls


def test_accuracy_is_weighed_against_time_as_published() -> None:
    # MnasNet's example: with w = -0.07 twice the latency costs about 5 % of the accuracy
    assert weighted(0.75, 80.0, 80.0) == 0.75
    assert weighted(1.0, 160.0, 80.0) == pytest.approx(0.9526, abs=1e-4)
    hard = {"w": -1.0, "within": 0.0}
    assert [weighted(1.0, ms, 80.0, **hard) for ms in (40.0, 80.0, 160.0)] == [1.0, 1.0, 0.5]
    with pytest.raises(InputError, match="above 0"):
        weighted(0.5, 0.0, 80.0)


@pytest.mark.slow
def test_a_ray_cluster_loses_no_more_than_the_trial_of_a_killed_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray", reason="the extra `cluster` is not installed")
    monkeypatch.setenv(
        "PYTHONPATH", str(Path(searchable.__file__).parents[2]) + os.pathsep + os.environ.get("PYTHONPATH", "")
    )
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        storage = tmp_path / "study.jsonl"
        killed = DiesOnce(str(tmp_path / "mark"))
        found = search(SPACE, killed, [SCORE], SearchPlan(RANDOM, 10, storage, workers="ray"))
    finally:
        ray.shutdown()
    assert len(found.scored) == 10 and (tmp_path / "mark").exists()
    again = search(SPACE, smooth, [SCORE], SearchPlan(searcher=RANDOM, trials=10, storage=storage))
    assert [t.candidate for t in again.trials] == [t.candidate for t in found.trials]
