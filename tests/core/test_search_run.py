"""The verb `search`: what it leaves, what it refuses, and that a killed search goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from core.cli import main
from core.kit import InputError
from core.nas import Candidate, Found, Goal, Space, Trial
from core.run_search import SearchRun, compared, dominating
from tests.core.searchable import SPACE, smooth
from tests.core.toy import KIT, ToyKit

GOALS = (Goal("score"), Goal("macs", higher=False))


@dataclass
class HillTask:
    """`searchable.smooth` as a kit's task."""

    space: Space = SPACE
    evaluate: Any = staticmethod(smooth)
    goals: tuple[Goal, ...] = GOALS
    score: Goal = GOALS[0]
    notes: tuple[str, ...] = ("a hill",)

    @property
    def units(self) -> Mapping[str, str]:
        return {"score": "", "macs": "MAC"}

    @property
    def estimated(self) -> Mapping[str, tuple[str, float]]:
        return {"macs": ("a sum", 0.1)}

    @property
    def hand(self) -> Candidate:
        return {"width": 16, "depth": 3, "kernel": 3, "act": "relu", "ratio": 0.1}

    def trained(self, candidate: Candidate, folder: Path) -> Mapping[str, float]:
        folder.mkdir(parents=True)
        return {**smooth(candidate), "score": -smooth(candidate)["score"]}

    def keep(self, candidate: Candidate, folder: Path) -> str:
        (folder / "kept.json").write_text(json.dumps(dict(candidate)))
        return "kept"


class Searching(ToyKit):
    """The toy kit with a search space."""

    def __init__(self) -> None:
        self.made: list[bool] = []

    def task(self, data: Path | None, preset: str, folder: Path, resume: bool) -> HillTask:
        self.made.append(resume)
        return HillTask()


def run(out: Path, searcher: str = "nsga2", trials: int = 24, resume: bool = False, **given: Any) -> dict[str, Any]:
    report = SearchRun(Searching(), searcher, trials, None, "smoke", out, resume, **given)()  # type: ignore[arg-type]
    assert report.pictures[0].media_type == "image/png"
    found: dict[str, Any] = json.loads((out / "search.json").read_text())
    return found


@pytest.mark.parametrize("searcher", ["nsga2", "differential-evolution", "regularised-evolution"])
def test_a_search_leaves_its_report_its_trials_and_the_winner(tmp_path: Path, searcher: str) -> None:
    found = run(tmp_path / "out", searcher)
    trials = {t["number"]: t for t in found["searched"]["trials"]}
    assert len(trials) == len(found["control"]["trials"]) == 24
    mine = smooth(HillTask().hand)
    metrics = [t["metrics"] for part in ("searched", "control") for t in found[part]["trials"]]
    ahead = [m for m in metrics if m["score"] >= mine["score"] and m["macs"] <= mine["macs"]]
    best = max(ahead or metrics, key=lambda t: t["score"])
    part = "searched" if found["winner_of"] == searcher else "control"
    (won,) = (t for t in found[part]["trials"] if t["number"] == found["winner"])
    assert won["metrics"]["score"] == best["score"]
    assert json.loads((tmp_path / "out" / "kept.json").read_text()) == won["candidate"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["kit"] == "toy" and report["recipe"]["name"] == "search"
    values = {(f["name"], f["stage"]): f["value"] for f in report["figures"]}
    assert values["searched_score", "original"] == pytest.approx(smooth(HillTask().hand)["score"])
    assert values["searched_score", "compressed"] == best["score"]
    front, against = report["tables"]
    assert front["rows"][-1][0] == "by hand" and any("(winner)" in row[0] for row in front["rows"])
    kinds = {f["name"]: f["basis"]["kind"] for f in report["figures"]}
    assert kinds == {"searched_score": "measured", "searched_macs": "estimated"}
    assert [row[0] for row in against["rows"]][-1] == 24
    bests = [row[1] for row in against["rows"]]
    assert bests == sorted(bests)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "data:image/png;base64," in page and "a hill" in page


def test_random_search_alone_is_its_own_control(tmp_path: Path) -> None:
    found = run(tmp_path, "random", 10)
    assert found["searched"] == found["control"] and len(found["searched"]["trials"]) == 10


def test_finalists_are_trained_each_and_the_best_of_them_wins(tmp_path: Path) -> None:
    found = run(tmp_path, finalists=3)
    finalists = found["finalists"]
    shared = [f["shared"]["score"] for f in finalists]
    assert len(finalists) == 3 and shared == sorted(shared, reverse=True) and len(set(shared)) == 3
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert kept == finalists[-1]["candidate"], "its training alone turns the order round"
    front, *_, table = json.loads((tmp_path / "report.json").read_text())["tables"]
    assert sum("(winner)" in row[0] for row in front["rows"]) == 1, "on the front or not"
    assert table["title"] == "Finalists" and [("winner" in row[0]) for row in table["rows"]] == [False, False, True]
    run(tmp_path, finalists=2)
    assert len(list((tmp_path / "finalists").iterdir())) == 2, "another search's trainings are gone"


def test_what_is_fixed_is_not_searched(tmp_path: Path) -> None:
    found = run(tmp_path, fixed={"width": "24", "act": "gelu"})
    chosen = [t["candidate"] for part in ("searched", "control") for t in found[part]["trials"]]
    assert {(c["width"], c["act"]) for c in chosen} == {(24, "gelu")} and len({c["depth"] for c in chosen}) > 1
    assert found["space"]["choices"]["width"] == {"steps": [24]}
    with pytest.raises(InputError, match="goes|begun|space"):
        run(tmp_path, resume=True)


def test_resume_goes_on_from_what_was_evaluated(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", trials=20)
    run(tmp_path / "parts", trials=7)
    parts = run(tmp_path / "parts", trials=20, resume=True)
    assert [t["candidate"] for t in parts["control"]["trials"]] == [t["candidate"] for t in whole["control"]["trials"]]
    assert len(parts["searched"]["trials"]) == 20
    again = run(tmp_path / "parts", trials=5)  # without resume it begins anew
    assert len(again["searched"]["trials"]) == 5


def test_what_cannot_be_searched_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    kit = Searching()
    with pytest.raises(InputError, match="'annealing' is not known; use one of differential-evolution"):
        SearchRun(kit, "annealing", 5, None, "smoke", tmp_path, False)()  # type: ignore[arg-type]
    with pytest.raises(InputError, match="trials: 0"):
        SearchRun(kit, "nsga2", 0, None, "smoke", tmp_path, False)()  # type: ignore[arg-type]
    assert not kit.made
    with pytest.raises(InputError, match="toy has no search space"):
        SearchRun(KIT, "nsga2", 5, None, "smoke", tmp_path, False)()


def test_a_search_whose_candidates_all_failed_says_why(tmp_path: Path) -> None:
    class Broken(Searching):
        def task(self, data: Path | None, preset: str, folder: Path, resume: bool) -> HillTask:
            return HillTask(evaluate=broken)

    def broken(candidate: Candidate) -> dict[str, float]:
        raise ValueError("no memory left")

    with pytest.raises(InputError, match=r"trials.log: none of 3 candidates .* no memory left .*without --resume"):
        SearchRun(Broken(), "nsga2", 3, None, "smoke", tmp_path, False)()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--workers", "many"], "--workers many: expected a number above 0, or 'ray'"),
        (["--workers", "0"], "--workers 0"),
        (["--trials", "few"], "argument --trials: invalid int value"),
        (["--finalists", "0"], "--finalists 0: expected 1 or more"),
        (["--fix", "width"], "--fix width: expected NAME=VALUE"),
        ([], "toy has no search space"),
    ],
)
def test_the_command_line_says_what_is_wrong(given: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "tests.core.toy", *given]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"breadth": "8"}, "breadth: no choice of this space; known are width, depth"),
        ({"width": "9"}, "width 9: expected one of 8, 16, 24"),
        ({"ratio": "0.5"}, "ratio: a span of numbers"),
    ],
)
def test_what_cannot_be_fixed_is_refused(given: dict[str, str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        SPACE.fixed(given)


def trial(number: int, score: float, macs: float) -> Trial:
    return Trial(number, {}, {"score": score, "macs": macs}, 1.0)


def test_the_hand_design_is_held_against_the_front() -> None:
    mine = trial(-1, 1.0, 100.0)
    others = [
        trial(0, 1.0, 100.0),
        trial(1, 1.0, 90.0),
        trial(2, 2.0, 100.0),
        trial(3, 2.0, 101.0),
        trial(4, 0.5, 50.0),
    ]
    assert [t.number for t in dominating(mine, others, GOALS)] == [1, 2]
    found, control = (Found(name, GOALS, tuple(ts)) for name, ts in (("nsga2", others), ("random", others[:2])))
    assert compared(found, control, GOALS[0]) == "best score 2 against 1 of random search"
    assert compared(found, control, GOALS[1]) == "best macs 50 against 90 of random search"


def test_the_winner_beats_the_hand_design_by_every_goal_where_something_does(tmp_path: Path) -> None:
    mine = smooth(HillTask().hand)
    found = run(tmp_path, trials=40)
    parts = {found[part]["searcher"]: found[part]["trials"] for part in ("searched", "control")}
    (won,) = (t["metrics"] for t in parts[found["winner_of"]] if t["number"] == found["winner"])
    assert won["score"] >= mine["score"] and won["macs"] <= mine["macs"]
    metrics = [t["metrics"] for trials in parts.values() for t in trials]
    assert max(m["score"] for m in metrics) > won["score"], "another has the best score, at more MACs"
