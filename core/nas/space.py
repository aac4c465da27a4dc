"""What can be chosen: typed choices by name, and the bounds that a choice must keep, in one description.

Architectures, prune ratios and bit widths are choices alike, so one search decides them together (`joined`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.kit import InputError

Value = bool | int | float | str
Candidate = Mapping[str, Value]
TRIES = 2000
"""Draws after which a space counts as having no member under its bounds."""


@dataclass(frozen=True)
class OneOf:
    """One of some values that have no order, such as kinds of a layer."""

    values: tuple[Value, ...]

    def __post_init__(self) -> None:
        _checked(self.values)

    @property
    def size(self) -> float:
        """How many values there are."""
        return len(self.values)

    def at(self, share: float) -> Value:
        """The value at a share of the unit interval."""
        return self.values[min(int(share * len(self.values)), len(self.values) - 1)]

    def share(self, value: Value) -> float:
        """The middle of a value's part of the unit interval; InputError for one that is not there."""
        return (_index(self.values, value) + 0.5) / len(self.values)

    def other(self, value: Value, rng: np.random.Generator) -> Value:
        """A value besides the given one, each as likely."""
        others = [v for i, v in enumerate(self.values) if i != _index(self.values, value)]
        return others[int(rng.integers(len(others)))] if others else value

    def to_json(self) -> dict[str, Any]:
        """Kind and values."""
        return {"one_of": list(self.values)}


@dataclass(frozen=True)
class Steps(OneOf):
    """One of some numbers in rising order, of which neighbours are alike: widths, depths, kernel sizes, bits."""

    values: tuple[int | float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(b <= a for a, b in zip(self.values, self.values[1:])):
            raise InputError(f"steps {self.values}: must rise; sort them")

    def other(self, value: Value, rng: np.random.Generator) -> Value:
        """The number below or above, each as likely."""
        index = _index(self.values, value)
        near = [i for i in (index - 1, index + 1) if 0 <= i < len(self.values)]
        return self.values[near[int(rng.integers(len(near)))]] if near else value

    def to_json(self) -> dict[str, Any]:
        """Kind and values."""
        return {"steps": list(self.values)}


@dataclass(frozen=True)
class Span:
    """Any number from `low` to `high`, such as a prune ratio; evenly spread, or with `log` its logarithm is."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise InputError(f"span {self.low} to {self.high}: expected two finite numbers, the lower first")
        if self.log and self.low <= 0:
            raise InputError(f"span {self.low} to {self.high}: a logarithm needs numbers above 0; leave log out")

    @property
    def size(self) -> float:
        """Infinity."""
        return math.inf

    def at(self, share: float) -> float:
        """The number at a share of the unit interval."""
        if self.log:
            return float(min(self.high, max(self.low, self.low * (self.high / self.low) ** share)))
        return float(min(self.high, max(self.low, self.low + share * (self.high - self.low))))

    def share(self, value: Value) -> float:
        """Where a number lies in the unit interval; InputError for one outside."""
        number = float(value)
        if not self.low <= number <= self.high:
            raise InputError(f"{value!r}: not in {self.low} to {self.high}")
        if self.log:
            return math.log(number / self.low) / math.log(self.high / self.low)
        return (number - self.low) / (self.high - self.low)

    def other(self, value: Value, rng: np.random.Generator) -> float:
        """A number a tenth of the span away, more or less, turned back at the ends."""
        moved = abs(self.share(value) + float(rng.normal(0, 0.1)))
        return self.at(1 - abs(1 - moved))

    def to_json(self) -> dict[str, Any]:
        """Kind and ends."""
        return {"span": [self.low, self.high], "log": self.log}


Choice = OneOf | Span
"""`Steps` is a `OneOf`."""


@dataclass(frozen=True)
class Bound:
    """What a candidate may cost at most, measured before it is evaluated: MACs, bytes, peak memory.

    `measure` must be cheap; it is called for every draw.
    """

    name: str
    measure: Callable[[Candidate], float]
    at_most: float
    unit: str = ""

    def excess(self, candidate: Candidate) -> float:
        """How far above the bound, as a share of it; 0 or less within. NaN counts as above."""
        found = float(self.measure(candidate))
        if math.isnan(found):
            return math.inf
        return (found - self.at_most) / (abs(self.at_most) or 1.0)


@dataclass(frozen=True)
class Rule:
    """What must hold of a candidate, such as two choices that go together."""

    name: str
    holds: Callable[[Candidate], bool]

    def excess(self, candidate: Candidate) -> float:
        """0 where it holds, 1 where it does not."""
        return 0.0 if self.holds(candidate) else 1.0


@dataclass(frozen=True)
class Space:
    """Choices by name, and bounds and rules that every candidate keeps."""

    choices: Mapping[str, Choice]
    bounds: Sequence[Bound | Rule] = field(default=())

    def __post_init__(self) -> None:
        if not self.choices:
            raise InputError("a search space without a choice; give at least one")

    @property
    def size(self) -> float:
        """How many candidates there are without the bounds; infinite with a `Span`."""
        return math.prod(choice.size for choice in self.choices.values())

    def fixed(self, values: Mapping[str, str]) -> Space:
        """The space with some choices made, each given as its value is written; InputError for one not there."""
        choices = dict(self.choices)
        for name, text in values.items():
            if name not in choices:
                raise InputError(f"{name}: no choice of this space; known are {', '.join(choices)}")
            choice = choices[name]
            if not isinstance(choice, OneOf):
                raise InputError(f"{name}: a span of numbers, of which none can be fixed; fix one of the other choices")
            found = [value for value in choice.values if str(value) == text]
            if not found:
                raise InputError(f"{name} {text}: expected one of {', '.join(map(str, choice.values))}")
            choices[name] = replace(choice, values=(found[0],))
        return replace(self, choices=choices)

    def decode(self, vector: NDArray[np.float64]) -> dict[str, Value]:
        """The candidate at a point of the unit cube, one coordinate a choice."""
        return {name: choice.at(float(x)) for (name, choice), x in zip(self.choices.items(), vector, strict=True)}

    def encode(self, candidate: Candidate) -> NDArray[np.float64]:
        """The point of the unit cube in the middle of a candidate's part; InputError for one that is none of this."""
        self._named(candidate)
        return np.array([choice.share(candidate[name]) for name, choice in self.choices.items()])

    def broken(self, candidate: Candidate) -> dict[str, float]:
        """The bounds and rules that a candidate breaks, each with its excess."""
        found = {bound.name: bound.excess(candidate) for bound in self.bounds}
        return {name: excess for name, excess in found.items() if excess > 0}

    def draw(self, rng: np.random.Generator) -> dict[str, Value]:
        """A candidate within the bounds, each as likely; InputError where none is found in `TRIES` draws."""
        for _ in range(TRIES):
            candidate = self.decode(rng.random(len(self.choices)))
            if not self.broken(candidate):
                return candidate
        raise InputError(self._hopeless([self.decode(rng.random(len(self.choices))) for _ in range(200)]))

    def mutated(self, candidate: Candidate, rng: np.random.Generator) -> dict[str, Value]:
        """The candidate with one choice made otherwise, within the bounds where `TRIES` tries find one."""
        self._named(candidate)
        names = [name for name, choice in self.choices.items() if choice.size > 1]
        found = dict(candidate)
        for _ in range(TRIES if names else 0):
            name = names[int(rng.integers(len(names)))]
            changed = {**candidate, name: self.choices[name].other(candidate[name], rng)}
            if not self.broken(changed):
                return changed
        return found

    def members(self) -> Iterator[dict[str, Value]]:
        """Every candidate within the bounds; InputError for a space with a `Span`."""
        if math.isinf(self.size):
            raise InputError("a space with a span has no list of members; draw from it")
        lists = [choice.values for choice in self.choices.values() if isinstance(choice, OneOf)]
        for values in product(*lists):
            candidate = dict(zip(self.choices, values, strict=True))
            if not self.broken(candidate):
                yield candidate

    def check(self) -> None:
        """InputError for a space with no member under its bounds: each bound's least excess is named."""
        if self.size <= TRIES:
            if next(self.members(), None) is None:
                lists = [c.values for c in self.choices.values() if isinstance(c, OneOf)]
                everything = [dict(zip(self.choices, values, strict=True)) for values in product(*lists)]
                raise InputError(self._hopeless(everything))
        else:
            self.draw(np.random.default_rng(0))

    def to_json(self) -> dict[str, Any]:
        """Choices, and the bounds' names and limits: what a stored study is compared with."""
        return {
            "choices": {name: choice.to_json() for name, choice in self.choices.items()},
            "bounds": [
                {"name": b.name, "at_most": b.at_most, "unit": b.unit} if isinstance(b, Bound) else {"name": b.name}
                for b in self.bounds
            ],
        }

    def _named(self, candidate: Candidate) -> None:
        if set(candidate) != set(self.choices):
            odd = sorted(set(candidate) ^ set(self.choices))
            raise InputError(f"candidate with other choices than the space: {', '.join(odd)}")

    def _hopeless(self, seen: Sequence[Candidate]) -> str:
        told = []
        for bound in self.bounds:
            if isinstance(bound, Bound):
                least = min(float(bound.measure(candidate)) for candidate in seen)
                unit = f" {bound.unit}" if bound.unit else ""
                told.append(f"{bound.name} at most {bound.at_most:g}{unit} (least seen {least:g})")
            else:
                kept = sum(bound.holds(candidate) for candidate in seen)
                told.append(f"{bound.name} (kept by {kept} of {len(seen)})")
        return f"the search space has no member under its bounds: {'; '.join(told)}; loosen a bound or widen a choice"


def joined(**parts: Space) -> Space:
    """One space of several, their choices and bounds named "part.name"."""
    choices: dict[str, Choice] = {}
    bounds: list[Bound | Rule] = []
    for part, space in parts.items():
        choices |= {f"{part}.{name}": choice for name, choice in space.choices.items()}
        for bound in space.bounds:
            name = f"{part}.{bound.name}"
            if isinstance(bound, Bound):
                bounds.append(Bound(name, _Of(part, bound.measure), bound.at_most, bound.unit))
            else:
                bounds.append(Rule(name, _Of(part, bound.holds)))
    return Space(choices, bounds)


def part_of(candidate: Candidate, part: str) -> dict[str, Value]:
    """What a candidate of a joined space chose for one part, under the part's own names."""
    return {name.removeprefix(f"{part}."): v for name, v in candidate.items() if name.startswith(f"{part}.")}


@dataclass(frozen=True)
class _Of:
    """A function of a part's candidate as one of the whole's; a class, so that workers can be sent it."""

    part: str
    function: Callable[[Candidate], Any]

    def __call__(self, candidate: Candidate) -> Any:
        return self.function(part_of(candidate, self.part))


def _checked(values: Sequence[Value]) -> None:
    if not values:
        raise InputError("a choice without values; give at least one")
    if len({(type(v), v) for v in values}) != len(values):
        raise InputError(f"a choice with the same value twice: {list(values)}")


def _index(values: Sequence[Value], value: Value) -> int:
    for index, known in enumerate(values):
        if known == value and isinstance(known, bool) == isinstance(value, bool):
            return index
    raise InputError(f"{value!r}: not one of {list(values)}")
