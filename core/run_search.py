"""`search`: a kit's space searched beside random search and the hand design; a report with the front as a picture."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from core.evaluation.measure import device
from core.figures import Estimated, Figure, Figures, Measured
from core.files import write_text
from core.kit import InputError, Kit, Recipe
from core.nas import PARETO, RANDOM, SEARCHERS, Found, Goal, SearchPlan, Trial, as_json, pareto, search, with_control
from core.progress import progress
from core.report import Picture, Report
from core.search.task import Searched, Task, told

HAND = "by hand"
FINALISTS = "finalists"


@dataclass(frozen=True)
class SearchRun:
    """What to search: a kit's space on a folder of data or (None) the kit's generated set, for so many trials.

    `searcher`, `storage`, `workers` and `seed` as in `core.nas.SearchPlan`; without a storage the trials are kept in
    `out`, from which `resume` goes on. `fixed` choices are not searched. Of the best, `finalists` are trained shortly
    each, and the best of those wins: shared weights rank candidates roughly.
    """

    kit: Kit
    searcher: str
    trials: int
    data: Path | None
    preset: str
    out: Path
    resume: bool
    storage: str | None = None
    workers: int | str = 1
    seed: int = 0
    fixed: Mapping[str, str] = field(default_factory=dict)
    finalists: int = 1

    def __call__(self) -> Report:
        """Search, and leave `report.json`, `report.html`, `search.json` and what the kit keeps of the winner in `out`.

        Raises InputError for a kit without a space, and as `core.nas.search` does.
        """
        if not isinstance(self.kit, Searched):
            raise InputError(f"{self.kit.name} has no search space; write its `task`, see core.search.Searched")
        if self.searcher not in SEARCHERS:
            raise InputError(f"--searcher {self.searcher!r} is not known; use one of {', '.join(SEARCHERS)}")
        journal = self.out / "trials.log"
        plan = SearchPlan(
            self.searcher, self.trials, self.storage or journal, f"{self.kit.name}-{self.searcher}", self.workers,
            self.seed, population=min(16, max(4, self.trials // 4)),
        )  # fmt: skip
        self.out.mkdir(parents=True, exist_ok=True)
        if not self.resume:
            journal.unlink(missing_ok=True)
            shutil.rmtree(self.out / FINALISTS, ignore_errors=True)
        task = self.kit.task(self.data, self.preset, self.out, self.resume)
        space = task.space.fixed(self.fixed)
        goals = tuple(task.goals) if self.searcher in (PARETO, RANDOM) else (task.score,)
        if self.searcher == RANDOM:
            found = control = search(space, task.evaluate, goals, plan)
        else:
            found, control = with_control(space, task.evaluate, goals, plan)
        every = everything(found, control)
        if not every:
            last = [*found.trials, *control.trials][-1]
            raise InputError(
                f"{journal if self.storage is None else self.storage}: none of {len(found.trials)} candidates has a "
                f"score, the last because of {last.why}; mend that and search without --resume"
            )
        by_hand = Trial(-1, dict(task.hand), dict(task.evaluate(task.hand)), 0.0)
        # what beats the hand design by every goal, where anything does: the score alone trades one for another
        best = distinct(dominating(by_hand, every, task.goals) or every, task.score)[: max(self.finalists, 1)]
        final = self._trained(task, best) if len(best) > 1 else []
        winner = best[final.index(max(final, key=lambda t: _value(t, task.score)))] if final else best[0]
        kept = task.keep(winner.candidate, self.out)
        report = self._report(task, found, control, by_hand, winner, kept)
        if final:
            titles = [_title(trial, found, control) for trial in best]
            report = replace(report, tables=(*report.tables, _finals(task, titles, best, final, winner)))
        data = {
            "searched": as_json(found), "control": as_json(control), "hand": _trial(by_hand), "winner": winner.number,
            "winner_of": (found if winner in found.scored else control).searcher, "space": space.to_json(),
            "finalists": [{"candidate": dict(t.candidate), "shared": t.metrics, "trained": f.metrics}
                          for t, f in zip(best, final)],
        }  # fmt: skip
        write_text(self.out / "search.json", json.dumps(data, indent=1) + "\n")
        report.save(self.out)
        return report

    def _trained(self, task: Task, best: Sequence[Trial]) -> list[Trial]:
        """The same candidates with the metrics that a short training of its own gives each."""
        found = []
        with progress("training finalists", len(best)) as bar:
            for trial in best:
                # by the candidate: with more trials another one may take its place, and must not go on with its weights
                named = json.dumps(dict(trial.candidate), sort_keys=True).encode()
                folder = self.out / FINALISTS / hashlib.sha256(named).hexdigest()[:12]
                found.append(replace(trial, metrics=dict(task.trained(trial.candidate, folder))))
                bar.advance(f"{task.score.name} {(found[-1].metrics or {})[task.score.name]:.4g}")
        return found

    def _report(self, task: Task, found: Found, control: Found, by_hand: Trial, winner: Trial, kept: str) -> Report:
        goals = task.goals
        every = everything(found, control)
        basis = Measured(device(), "candidates of the supernet", 1, note=f"found among {len(every)} of them")
        figures = Figures()
        for name, unit in task.units.items():
            told_by = task.estimated.get(name)
            of = basis if told_by is None else Estimated(told_by[0], (), told_by[1])
            for stage, trial in (("original", by_hand), ("compressed", winner)):
                value = (trial.metrics or {}).get(name)
                if value is not None:
                    figures |= Figures([Figure(f"searched_{name}", value, unit, of, stage)])  # type: ignore[arg-type]
        front = pareto(found.scored, goals)
        best = pareto(every, goals)
        shown = [(t, _title(t, found, control)) for t in every if t in best or t is winner]
        tables = (
            self._table(task, shown, by_hand, winner),
            _against(task, found, control, by_hand),
        )
        ahead = len(dominating(by_hand, found.scored, goals))
        notes = [
            f"{found.searcher}: {len(found.scored)} candidates in {found.seconds:.0f} s, {len(front)} on the front; "
            f"{ahead} of them are at least as good as the hand design by every goal and better by one",
            kept,
            *task.notes,
        ]
        if control is not found:
            notes.insert(1, f"random search, as long: {control.seconds:.0f} s; {compared(found, control, task.score)}")
        recipe = Recipe("search", (), f"{found.seconds + control.seconds:.0f} s of trials", "a front of candidates")
        return Report(
            kit=self.kit.name,
            title=f"{self.kit.title}: search",
            recipe=recipe,
            target=self.kit.default_target,
            figures=figures,
            judgements=(),
            trace=(),
            tables=tables,
            pictures=(Picture("The front", picture(task, found, control, by_hand, winner)),),
            notes=tuple(notes),
        )

    def _table(self, task: Task, front: Sequence[tuple[Trial, str]], by_hand: Trial, winner: Trial) -> dict[str, Any]:
        names = list(task.units)
        rows = []
        for trial, name in [*front, (by_hand, HAND)]:
            mark = " (winner)" if trial is winner else ""
            rows.append([name + mark, *(_rounded((trial.metrics or {}).get(n)) for n in names), told(trial.candidate)])
        return {
            "title": "The front and the winner",
            "columns": ["trial", *(_headed(n, task.units[n]) for n in names), "candidate"],
            "rows": rows, "note": "with the supernet's weights, each candidate's batch norms its own",
        }  # fmt: skip


def everything(found: Found, control: Found) -> list[Trial]:
    """The trials with metrics of both: what random search found is evaluated as well, and may win."""
    return list(found.scored) if control is found else [*found.scored, *control.scored]


def dominating(by_hand: Trial, trials: Sequence[Trial], goals: Sequence[Goal]) -> list[Trial]:
    """The trials that are at least as good as the hand design by every goal and better by one."""
    mine = [_value(by_hand, goal) for goal in goals]
    ahead = []
    for trial in trials:
        theirs = [_value(trial, goal) for goal in goals]
        if all(a >= b for a, b in zip(theirs, mine)) and theirs != mine:
            ahead.append(trial)
    return ahead


def distinct(trials: Sequence[Trial], score: Goal) -> list[Trial]:
    """The best first, each candidate once."""
    ordered = sorted(trials, key=lambda t: -_value(t, score))
    return list({tuple(sorted(t.candidate.items())): t for t in reversed(ordered)}.values())[::-1]


def compared(found: Found, control: Found, goal: Goal) -> str:
    """The best of a searcher beside that of the control, in words."""
    ours, theirs = (max(_value(t, goal) for t in f.scored) for f in (found, control))
    sign = 1 if goal.higher else -1
    return f"best {goal.name} {sign * ours:.4g} against {sign * theirs:.4g} of random search"


def _against(task: Task, found: Found, control: Found, by_hand: Trial) -> dict[str, Any]:
    """The best score after so many trials, of the searcher and of the control."""
    rows = []
    most = max(len(found.scored), len(control.scored))
    for count in sorted({max(1, most * share // 8) for share in range(1, 9)}):
        bests = [max(_value(t, task.score) for t in f.scored[:count]) for f in (found, control)]
        rows.append([count, *(_rounded(b if task.score.higher else -b) for b in bests)])
    mine = _rounded((by_hand.metrics or {})[task.score.name])
    return {
        "title": "Against random search", "columns": ["trials", found.searcher, control.searcher], "rows": rows,
        "note": f"best {task.score.name} so far; the hand design has {mine}",
    }  # fmt: skip


def _title(trial: Trial, found: Found, control: Found) -> str:
    """A trial's number, with the control's name where it is that one's."""
    return str(trial.number) if trial in found.scored else f"{control.searcher} {trial.number}"


def _finals(
    task: Task, titles: Sequence[str], best: Sequence[Trial], final: Sequence[Trial], winner: Trial
) -> dict[str, Any]:
    """What shared weights and what a training of its own say of each finalist."""
    names = [name for name in task.units if name in (final[0].metrics or {})]
    rows = []
    for title, shared, alone in zip(titles, best, final):
        mark = f"{title}{' (winner)' if shared is winner else ''}"
        before, after = shared.metrics or {}, alone.metrics or {}
        rows.append(
            [mark, _rounded(before[task.score.name]), *(_rounded(after[n]) for n in names), told(shared.candidate)]
        )
    return {
        "title": "Finalists",
        "columns": ["trial", f"{task.score.name}, shared weights", *(_headed(n, task.units[n]) for n in names),
                    "candidate"],
        "rows": rows,
        "note": "the best by shared weights, each after a short training of its own, which chose the winner",
    }  # fmt: skip


def picture(task: Task, found: Found, control: Found, by_hand: Trial, winner: Trial) -> bytes:
    """Every candidate by its cost and its quality, with the front, the control's front and the hand design: a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Sheet

    up, cost = task.goals[0].name, task.goals[1].name
    sheet = Sheet(figsize=(9, 5.5), dpi=120, layout="constrained")
    FigureCanvasAgg(sheet)
    axes = sheet.add_subplot()

    def points(trials: Sequence[Trial]) -> tuple[list[float], list[float]]:
        known: list[Mapping[str, float]] = [t.metrics or {} for t in trials]
        return [m[cost] for m in known], [m[up] for m in known]

    fronts = [(found, "#0a6ed1", "o")] if control is found else [(control, "#8a8f98", "s"), (found, "#0a6ed1", "o")]
    for of, colour, mark in fronts:
        axes.scatter(*points(of.scored), s=14, c=colour, alpha=0.35, marker=mark, linewidths=0)
        line = sorted(zip(*points(pareto(of.scored, task.goals))))
        axes.plot(*zip(*line), c=colour, marker=mark, ms=4, drawstyle="steps-post", label=f"front of {of.searcher}")
    axes.scatter(*points([by_hand]), s=130, c="#d1440a", marker="*", label=HAND, zorder=4)
    axes.scatter(*points([winner]), s=110, facecolors="none", edgecolors="black", linewidths=1.5, label="winner")
    seen = sorted(t.metrics[up] for f in (found, control) for t in f.scored if t.metrics is not None)
    low = seen[len(seen) // 10]
    axes.set_ylim(bottom=low - 0.1 * (seen[-1] - low + 1e-9))  # the worst tenth would press the front flat
    axes.set_xlabel(_headed(cost, task.units.get(cost, "")))
    axes.set_ylabel(_headed(up, task.units.get(up, "")))
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right")
    png = io.BytesIO()
    sheet.savefig(png, format="png")
    return png.getvalue()


def _value(trial: Trial, goal: Goal) -> float:
    assert trial.metrics is not None
    return trial.metrics[goal.name] if goal.higher else -trial.metrics[goal.name]


def _trial(trial: Trial) -> dict[str, Any]:
    return {"candidate": dict(trial.candidate), "metrics": trial.metrics}


def _rounded(value: float | None) -> float | str:
    return "" if value is None else float(f"{value:.4g}") if abs(value) < 1e4 else round(value)


def _headed(name: str, unit: str) -> str:
    return f"{name} [{unit}]" if unit else name
