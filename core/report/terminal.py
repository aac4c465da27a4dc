"""A report on the terminal: before/after, gates, and a line per step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.figures import Figure
from core.report import Report
from core.report.rows import bound_text, rows, value_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

_VERDICT = {"PASS": "bold blue", "FAIL": "bold red", "UNPROVEN": "yellow"}
_SENSE = {"better": "blue", "worse": "red", "same": "dim", "unknown": "dim"}


def show(report: Report, console: Console | None = None) -> None:
    """Print the report; without a console to standard output."""
    from rich.console import Console
    from rich.text import Text

    out = console or Console()
    out.print(Text(f"{report.heading}  recipe {report.recipe.name}  target {report.target}", style="bold"))
    out.print(_figures(report))
    if report.judgements:
        out.print(_gates(report))
    if report.trace:
        out.print(_trace(report))
    for note in report.notes:
        out.print(Text(f"note: {note}", style="dim"))
    counts = report.counts
    out.print(Text(", ".join(f"{counts[v]} {v}" for v in counts), style=_VERDICT["FAIL"] if report.failed else "bold"))


def _figures(report: Report) -> Table:
    from rich.text import Text

    table = _table("Before and after")
    table.add_column("", overflow="fold")
    for head in ("original", "compressed", "change"):
        table.add_column(head, justify="right")
    table.add_column("basis", style="dim")
    for row in rows(report.figures):
        changed = Text("")
        if row.change is not None:
            note = f" ({row.change.note})" if row.change.note else ""
            changed = Text(row.change.text + note, style=_SENSE[row.change.sense])
        kinds = dict.fromkeys(f.basis.kind for f in (row.original, row.compressed) if f is not None)
        table.add_row(Text(row.label), _value(row.original), _value(row.compressed), changed, Text(" / ".join(kinds)))
    return table


def _gates(report: Report) -> Table:
    from rich.text import Text

    table = _table("Gates")
    for head in ("gate", "bound", "verdict", "why"):
        table.add_column(head, overflow="fold")
    for j in report.judgements:
        verdict = Text(j.verdict, style=_VERDICT[j.verdict])
        table.add_row(Text(j.gate.name), Text(bound_text(j.gate)), verdict, Text(j.why))
    return table


def _trace(report: Report) -> Table:
    from rich.text import Text

    table = _table("Steps")
    table.add_column("step")
    for head in ("changed", "skipped", "seconds"):
        table.add_column(head, justify="right")
    table.add_column("why skipped", overflow="fold", style="dim")
    for entry in report.trace:
        reasons = "; ".join(dict.fromkeys(s.why for s in entry.skipped))
        name, changed, skipped = type(entry.step).__name__, str(len(entry.changed)), str(len(entry.skipped))
        table.add_row(Text(name), changed, skipped, f"{entry.seconds:.1f}", Text(reasons))
    return table


def _table(title: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)


def _value(figure: Figure | None) -> Text:
    from rich.text import Text

    return Text(value_text(figure) if figure is not None else "")
