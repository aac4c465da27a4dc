"""Who proposes the next candidate: samplers on Optuna's study, so that a search resumes from what is stored.

Each is a function of the finished trials and of the trial's number, with no state of its own: after a crash, or with
many workers, it goes on from what the storage holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from core.kit import InputError
from core.nas.space import TRIES, Candidate, OneOf, Space, Value

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.study import Study
    from optuna.trial import FrozenTrial

RANDOM, EVOLUTION, DIFFERENTIAL, PARETO = "random", "regularised-evolution", "differential-evolution", "nsga2"
SEARCHERS = (DIFFERENTIAL, EVOLUTION, PARETO, RANDOM)
"""By name; `nsga2` takes several goals, the two evolutions take one, `random` any number: it is the control."""


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """The space as Optuna stores it: values as they are, so that a study reads without this library."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    return {
        name: CategoricalDistribution(choice.values)
        if isinstance(choice, OneOf)
        else FloatDistribution(choice.low, choice.high, log=choice.log)
        for name, choice in space.choices.items()
    }


def sampler(searcher: str, space: Space, goals: int, seed: int, population: int) -> BaseSampler:
    """The sampler of a searcher's name; InputError for a name or a number of goals that it does not know."""
    if searcher not in SEARCHERS:
        raise InputError(f"searcher {searcher!r} is not known; use one of {', '.join(SEARCHERS)}")
    if goals > 1 and searcher in (EVOLUTION, DIFFERENTIAL):
        raise InputError(f"searcher {searcher!r}: knows one goal, not {goals}; use {PARETO!r} for a Pareto front")
    if population < 4:
        raise InputError(f"population {population}: expected 4 or more")
    if searcher == PARETO:
        return _nsga2(space, seed, population)
    propose = {
        RANDOM: _random, EVOLUTION: _regularised_evolution, DIFFERENTIAL: _differential_evolution
    }[searcher]  # fmt: skip
    return _proposer(propose, space, seed, population)


Finished = Sequence[tuple[int, Candidate, float]]
"""Number, candidate and score of finished trials in the order of their numbers; more is better."""
Propose = Callable[[Space, Finished, int, np.random.Generator, int], dict[str, Value]]


def _proposer(propose: Propose, space: Space, seed: int, population: int) -> BaseSampler:
    from optuna.samplers import BaseSampler
    from optuna.study import StudyDirection
    from optuna.trial import TrialState

    class Proposer(BaseSampler):
        """Asks `propose` for each trial; of what it has proposed before it asks again."""

        def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
            return distributions(space)

        def sample_relative(
            self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
        ) -> dict[str, Any]:
            all_ = study.get_trials(deepcopy=False)
            sign = -1.0 if study.directions[0] == StudyDirection.MINIMIZE else 1.0
            done = sorted(
                (t.number, t.params, sign * t.values[0])
                for t in all_
                if t.state == TrialState.COMPLETE and t.values is not None and set(t.params) == set(space.choices)
            ) if len(study.directions) == 1 else []  # fmt: skip
            seen = {_key(t.params) for t in all_ if t.number != trial.number and t.params}
            rng = np.random.default_rng((seed, trial.number))
            return fresh(space, seen, rng, lambda: propose(space, done, trial.number, rng, population))

        def sample_independent(
            self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
        ) -> Any:
            raise InputError(f"choice {param_name!r} is none of the search space")

    return Proposer()


def fresh(
    space: Space, seen: set[tuple[Any, ...]], rng: np.random.Generator, propose: Callable[[], dict[str, Value]]
) -> dict[str, Value]:
    """A proposal that was not seen yet, else a draw that was not, else, in a space that is used up, any proposal."""
    for _ in range(20):
        candidate = propose()
        if _key(candidate) not in seen:
            return candidate
    for _ in range(200):
        candidate = space.draw(rng)
        if _key(candidate) not in seen:
            return candidate
    return propose()


def _key(candidate: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple((name, type(candidate[name]).__name__, candidate[name]) for name in sorted(candidate))


def _random(space: Space, done: Finished, number: int, rng: np.random.Generator, population: int) -> dict[str, Value]:
    return space.draw(rng)


def _regularised_evolution(
    space: Space, done: Finished, number: int, rng: np.random.Generator, population: int
) -> dict[str, Value]:
    """Ageing evolution (Real et al. 2019): of a sample of the youngest `population` the best, one choice changed."""
    if len(done) < population:
        return space.draw(rng)
    young = done[-population:]
    sample = rng.choice(len(young), size=max(2, population // 4), replace=False)
    _, parent, _ = max((young[int(i)] for i in sample), key=lambda trial: trial[2])
    return space.mutated(parent, rng)


def _differential_evolution(
    space: Space, done: Finished, number: int, rng: np.random.Generator, population: int
) -> dict[str, Value]:
    """DE/rand/1/bin (Storn and Price 1997) on the unit cube, choices by their part of it; steady state.

    A trial's slot is its number modulo the population; a slot holds the best that was tried in it, so that a trial
    replaces its target where it is no worse. F is drawn anew for each trial (dither), which discrete choices need.
    """
    slots: dict[int, tuple[NDArray[np.float64], float]] = {}
    for index, candidate, score in done:
        slot = index % population
        if slot not in slots or score >= slots[slot][1]:
            slots[slot] = space.encode(candidate), score
    target = number % population
    others = [slot for slot in sorted(slots) if slot != target]
    if target not in slots or len(others) < 3:
        return space.draw(rng)
    for _ in range(TRIES // 10):
        a, b, c = (slots[others[int(i)]][0] for i in rng.choice(len(others), size=3, replace=False))
        mutant = a + rng.uniform(0.4, 1.0) * (b - c)
        mutant = np.where((mutant < 0) | (mutant > 1), rng.random(len(mutant)), mutant)
        crossed = rng.random(len(mutant)) < 0.7
        crossed[int(rng.integers(len(mutant)))] = True
        candidate = space.decode(np.where(crossed, mutant, slots[target][0]))
        if not space.broken(candidate):
            return candidate
    return space.draw(rng)


def _nsga2(space: Space, seed: int, population: int) -> BaseSampler:
    """Optuna's NSGA-II (Deb 2002), begun from draws within the bounds; children outside of them are made anew."""
    from optuna.samplers import NSGAIISampler
    from optuna.trial import TrialState

    class Pareto(NSGAIISampler):
        def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
            return distributions(space)

        def sample_relative(
            self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
        ) -> dict[str, Any]:
            rng = np.random.default_rng((seed, trial.number))
            all_ = study.get_trials(deepcopy=False)
            seen = {_key(t.params) for t in all_ if t.number != trial.number and t.params}
            # its generator is its own, so that a resumed study goes on as an uninterrupted one would
            self._rng.rng.seed(int(rng.integers(2**31)))

            def propose() -> dict[str, Value]:
                for _ in range(50):
                    found = NSGAIISampler.sample_relative(self, study, trial, search_space)
                    whole = {
                        n: found[n] if n in found else space.choices[n].at(float(rng.random())) for n in space.choices
                    }
                    if not space.broken(whole):
                        return whole
                return space.draw(rng)

            if sum(t.state == TrialState.COMPLETE for t in all_) < population:
                return fresh(space, seen, rng, lambda: space.draw(rng))
            return fresh(space, seen, rng, propose)

    return Pareto(population_size=population, seed=seed)
