"""Search spaces: values and their places, draws within bounds, spaces joined, and a space without members."""

from __future__ import annotations

import math

import numpy as np
import pytest

from core.kit import InputError
from core.nas import Bound, OneOf, Rule, Space, Span, Steps, joined, part_of
from core.nas.space import Choice
from tests.core.searchable import SPACE, macs


@pytest.mark.parametrize(
    "choice",
    [
        OneOf(("a", "b", "c")),
        Steps((1, 2, 4, 8)),
        Span(0.1, 0.9),
        Span(1e-4, 1e-1, log=True),
        OneOf((True, 1, 0, False)),
    ],
    ids=["one of", "steps", "span", "log", "mixed"],
)
def test_a_value_comes_back_from_its_place(choice: Choice) -> None:
    for share in np.linspace(0, 1, 41):
        value = choice.at(float(share))
        again = choice.at(choice.share(value))
        assert (
            type(again) is type(value) and again == pytest.approx(value) if choice.size == math.inf else again is value
        )


def test_values_of_a_choice_are_equally_likely() -> None:
    rng = np.random.default_rng(0)
    drawn = [Steps((3, 5, 7)).at(float(rng.random())) for _ in range(3000)]
    assert all(abs(drawn.count(v) / 3000 - 1 / 3) < 0.03 for v in (3, 5, 7))
    logs = [math.log10(Span(1e-4, 1.0, log=True).at(float(rng.random()))) for _ in range(3000)]
    assert abs(np.mean(logs) + 2) < 0.1 and min(logs) < -3.9 and max(logs) > -0.1


def test_what_is_other_is_near_where_there_is_an_order() -> None:
    rng = np.random.default_rng(0)
    assert {Steps((1, 2, 4, 8)).other(2, rng) for _ in range(50)} == {1, 4}
    assert {Steps((1, 2, 4, 8)).other(8, rng) for _ in range(50)} == {4}
    assert {OneOf(("a", "b", "c")).other("b", rng) for _ in range(50)} == {"a", "c"}
    moved = [Span(0.0, 1.0).other(0.02, rng) for _ in range(500)]
    assert 0 <= min(moved) and max(moved) < 0.6
    assert Steps((4,)).other(4, rng) == 4


def test_draws_and_mutations_keep_the_bounds() -> None:
    rng = np.random.default_rng(0)
    drawn = [SPACE.draw(rng) for _ in range(200)]
    assert all(macs(c) <= 12_000 for c in drawn)
    assert any(c["width"] == 64 for c in drawn) and any(c["depth"] == 6 for c in drawn)
    for candidate in drawn[:50]:
        changed = SPACE.mutated(candidate, rng)
        assert macs(changed) <= 12_000
        assert sum(changed[name] != candidate[name] for name in candidate) == 1
        np.testing.assert_allclose(SPACE.encode(SPACE.decode(SPACE.encode(candidate))), SPACE.encode(candidate))


def test_members_are_all_within_the_bounds() -> None:
    small = Space(
        {"w": Steps((1, 2, 3)), "k": OneOf(("a", "b"))}, (Rule("no wide b", lambda c: (c["w"], c["k"]) != (3, "b")),)
    )
    assert small.size == 6 and len(list(small.members())) == 5
    with pytest.raises(InputError, match="no list of members"):
        next(SPACE.members())


@pytest.mark.parametrize("fine", [False, True], ids=["counted", "drawn"])
def test_a_space_without_members_says_which_bound_is_how_far(fine: bool) -> None:
    ratio: dict[str, Choice] = {"ratio": Span(0.0, 0.5)} if fine else {}
    space = Space(
        {"width": Steps((32, 64)), "depth": Steps((4, 6)), **ratio},
        (Bound("MACs", macs, 4000.0, "MAC"), Rule("even depth", lambda c: int(c["depth"]) % 2 == 0)),
    )
    with pytest.raises(InputError) as told:
        space.check()
    assert "MACs at most 4000 MAC (least seen 4096)" in str(told.value)
    assert "even depth (kept by" in str(told.value) and "loosen a bound" in str(told.value)


def test_one_search_decides_architecture_pruning_and_bits() -> None:
    whole = joined(
        arch=Space({"width": Steps((8, 64)), "depth": Steps((1, 6))}, (Bound("MACs", macs, 4096.0),)),
        bits=Space({"conv1": OneOf((4, 8))}),
        prune=Space({"ratio": Span(0.0, 0.9)}),
    )
    assert list(whole.choices) == ["arch.width", "arch.depth", "bits.conv1", "prune.ratio"]
    rng = np.random.default_rng(1)
    drawn = [whole.draw(rng) for _ in range(100)]
    assert {(c["arch.width"], c["arch.depth"]) for c in drawn} == {(8, 1), (8, 6), (64, 1)}
    assert set(part_of(drawn[0], "arch")) == {"width", "depth"}
    assert whole.broken({**drawn[0], "arch.width": 64, "arch.depth": 6}) == {"arch.MACs": 5.0}


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: OneOf(()), "without values"),
        (lambda: OneOf((1, 2, 1)), "same value twice"),
        (lambda: Steps((2, 1)), "must rise"),
        (lambda: Span(1.0, 1.0), "the lower first"),
        (lambda: Span(0.0, 1.0, log=True), "above 0"),
        (lambda: Space({}), "without a choice"),
        (lambda: SPACE.encode({"width": 8}), "other choices"),
        (lambda: Steps((1, 2)).share(3), "not one of"),
        (lambda: Span(0.0, 1.0).share(2.0), "not in 0.0 to 1.0"),
    ],
)
def test_what_is_no_space_is_refused(make: object, why: str) -> None:
    with pytest.raises(InputError, match=why):
        make()  # type: ignore[operator]
