"""The search: proposals of a sampler evaluated by a pool, kept in a storage, beside random search at the same cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.kit import InputError
from core.nas.samplers import PARETO, RANDOM, distributions, sampler
from core.nas.space import Space, Value
from core.nas.study import OWNER, WHY, Direction, abandoned, open_storage, open_study, owner, quiet
from core.nas.workers import Evaluate, Outcome, Pool, pool
from core.progress import progress

if TYPE_CHECKING:
    from optuna.study import Study

SECONDS = "fitkit.seconds"
METRICS = "fitkit.metrics"
DEATHS = 2
"""Workers that a candidate may take with it before it counts as failed."""
FAILURES = 10
"""Candidates in a row that fail before a search gives up."""


@dataclass(frozen=True)
class Goal:
    """A metric that is to be as high as can be, or as low."""

    name: str
    higher: bool = True


@dataclass(frozen=True)
class Trial:
    """A candidate with its metrics, or why it has none; `seconds` is what it cost."""

    number: int
    candidate: dict[str, Value]
    metrics: dict[str, float] | None
    seconds: float
    why: str = ""


@dataclass(frozen=True)
class Found:
    """What a searcher found: its trials in the order of their numbers."""

    searcher: str
    goals: tuple[Goal, ...]
    trials: tuple[Trial, ...]

    @property
    def scored(self) -> list[Trial]:
        """The trials that have metrics."""
        return [trial for trial in self.trials if trial.metrics is not None]

    @property
    def best(self) -> Trial:
        """The best by the first goal, the earlier of two alike; InputError where every trial failed."""
        if not self.scored:
            raise InputError(f"search {self.searcher!r}: no trial has a score; see their reasons")
        return max(self.scored, key=lambda trial: (self._score(trial, self.goals[0]), -trial.number))

    @property
    def front(self) -> list[Trial]:
        """The trials that no other is at least as good as by every goal and better by one, by the first goal."""
        return pareto(self.scored, self.goals)

    @property
    def seconds(self) -> float:
        """What all trials cost together."""
        return sum(trial.seconds for trial in self.trials)

    @staticmethod
    def _score(trial: Trial, goal: Goal) -> float:
        assert trial.metrics is not None
        return trial.metrics[goal.name] if goal.higher else -trial.metrics[goal.name]


def pareto(trials: Sequence[Trial], goals: Sequence[Goal]) -> list[Trial]:
    """The trials that no other dominates, the best by the first goal first; of equal ones the first."""

    def scores(trial: Trial) -> tuple[float, ...]:
        return tuple(Found._score(trial, goal) for goal in goals)

    front: list[Trial] = []
    for trial in sorted(trials, key=lambda t: ([-s for s in scores(t)], t.number)):
        mine = scores(trial)
        if not any(all(a >= b for a, b in zip(scores(kept), mine)) for kept in front):
            front.append(trial)
    return front


def weighted(accuracy: float, latency: float, target: float, w: float = -0.07, within: float | None = None) -> float:
    """accuracy x (latency / target)^w, as MnasNet's reward (Tan et al. 2019); `w` below 0 charges for time.

    `within` is the exponent up to the target (default: `w`): 0 with `w` -1 is their hard constraint.
    """
    if latency <= 0 or target <= 0:
        raise InputError(f"weighted: latency {latency} and target {target} must be above 0")
    return accuracy * (latency / target) ** (w if within is None or latency > target else within)


@dataclass(frozen=True)
class SearchPlan:
    """Who searches, how long, with whom, and where its trials are kept.

    In a `storage` (a file or an SQL URL; None: in memory) the study of `name` goes on from its trials, of which
    `trials` are wanted in all. `workers` are processes of this machine, or "ray"; `population` is that of the
    evolutions.
    """

    searcher: str
    trials: int
    storage: str | Path | None = None
    name: str = "search"
    workers: int | str = 1
    seed: int = 0
    population: int = 16

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise InputError(f"SearchPlan.trials: {self.trials}, expected a number above 0")


def search(space: Space, evaluate: Evaluate, goals: Sequence[Goal], plan: SearchPlan) -> Found:
    """Evaluate the planned number of candidates of a space and return them with what was found.

    `evaluate` gives metrics by name, every goal among them. A candidate that raises has failed, with its reason, and
    counts; one whose worker died is tried once more. Several processes may work on one study; those together may
    evaluate as many more as are under way when the last is begun. Raises InputError for a space without members, before
    anything is evaluated, for a storage that is not this search's, and where FAILURES candidates fail in a row.
    """
    if not goals:
        raise InputError("a search without a goal; give at least one")
    if plan.searcher == PARETO and len(goals) < 2:
        raise InputError(f"searcher {plan.searcher!r}: a front needs two goals; give another, or use another searcher")
    space.check()
    directions: dict[str, Direction] = {goal.name: "maximize" if goal.higher else "minimize" for goal in goals}
    with quiet():
        chosen = sampler(plan.searcher, space, len(goals), plan.seed, plan.population)
        study = open_study(open_storage(plan.storage), plan.name, space, directions, chosen)
        team = pool(evaluate, plan.workers)
        try:
            _run(study, space, goals, team, plan.trials, f"{plan.name}, {plan.searcher}")
        finally:
            team.close()
        return Found(plan.searcher, tuple(goals), tuple(_trials(study)))


def with_control(space: Space, evaluate: Evaluate, goals: Sequence[Goal], plan: SearchPlan) -> tuple[Found, Found]:
    """As `search`, and random search over the same number of trials beside it, in the study "NAME-random"."""
    if plan.searcher == RANDOM:
        raise InputError(f"searcher {RANDOM!r} is the control; name another one to hold it against")
    control = replace(plan, searcher=RANDOM, name=f"{plan.name}-{RANDOM}")
    return search(space, evaluate, goals, plan), search(space, evaluate, goals, control)


def _run(study: Study, space: Space, goals: Sequence[Goal], team: Pool, wanted: int, label: str) -> None:
    from optuna.trial import TrialState

    again: list[tuple[dict[str, Any], int]] = []
    for trial in abandoned(study):
        again.append((trial.params, 0))
        study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
    under_way: dict[int, tuple[Any, int]] = {}
    in_a_row = 0
    with progress(label, wanted, done=min(wanted, _counted(study))) as bar:
        while True:
            while len(under_way) < team.slots and _counted(study) + len(under_way) < wanted:
                params, deaths = again.pop(0) if again else (None, 0)
                if params is not None and set(params) == set(space.choices):
                    study.enqueue_trial(params)
                trial = study.ask(distributions(space))
                trial.set_user_attr(OWNER, owner())
                candidate = {choice: trial.params[choice] for choice in space.choices}
                under_way[trial.number] = trial, deaths
                team.submit(trial.number, candidate)
            if not under_way:
                return
            number, outcome = team.next()
            trial, deaths = under_way.pop(number)
            if outcome.died and deaths + 1 < DEATHS:
                study.tell(trial, state=TrialState.FAIL)
                again.append((dict(trial.params), deaths + 1))
                continue
            outcome = _valid(outcome, goals)
            trial.set_user_attr(SECONDS, outcome.seconds)
            if outcome.metrics is None:
                trial.set_user_attr(WHY, outcome.why)
                study.tell(trial, state=TrialState.FAIL)
                in_a_row += 1
                if in_a_row >= FAILURES:
                    raise InputError(f"search: {in_a_row} candidates failed in a row; the last: {outcome.why}")
            else:
                in_a_row = 0
                trial.set_user_attr(METRICS, dict(outcome.metrics))
                study.tell(trial, [outcome.metrics[goal.name] for goal in goals])
            bar.advance(_told(study, goals))


def _valid(outcome: Outcome, goals: Sequence[Goal]) -> Outcome:
    if outcome.metrics is None:
        return outcome
    for goal in goals:
        value = outcome.metrics.get(goal.name)
        if value is None or not math.isfinite(value):
            return Outcome(None, outcome.seconds, f"goal {goal.name!r} is {value}, expected a finite number")
    return outcome


def _counted(study: Study) -> int:
    """Trials that were paid for: those with metrics, and those that failed on their own account."""
    from optuna.trial import TrialState

    return sum(
        t.state == TrialState.COMPLETE or (t.state == TrialState.FAIL and WHY in t.user_attrs)
        for t in study.get_trials(deepcopy=False)
    )


def _told(study: Study, goals: Sequence[Goal]) -> str:
    found = Found("", tuple(goals), tuple(_trials(study)))
    if not found.scored:
        return "all have failed so far"
    best = found.best.metrics or {}
    return "best " + "  ".join(f"{goal.name} {best[goal.name]:.4g}" for goal in goals)


def _trials(study: Study) -> list[Trial]:
    from optuna.trial import TrialState

    found = []
    for t in study.get_trials(deepcopy=False):
        counted = t.state == TrialState.COMPLETE or (t.state == TrialState.FAIL and WHY in t.user_attrs)
        if counted:
            metrics: Mapping[str, float] | None = t.user_attrs.get(METRICS)
            found.append(
                Trial(
                    t.number, dict(t.params), dict(metrics) if metrics is not None else None,
                    float(t.user_attrs.get(SECONDS, 0.0)), str(t.user_attrs.get(WHY, "")),
                )
            )  # fmt: skip
    return found


def as_json(found: Found) -> dict[str, Any]:
    """Trials, best and front of a search, as a report stores them."""
    return {
        "searcher": found.searcher,
        "goals": [{"name": goal.name, "higher": goal.higher} for goal in found.goals],
        "seconds": found.seconds,
        "best": found.best.number,
        "front": [trial.number for trial in found.front],
        "trials": [
            {
                "number": t.number,
                "candidate": dict(t.candidate),
                "metrics": t.metrics,
                "seconds": t.seconds,
                "why": t.why,
            }
            for t in found.trials
        ],
    }
