"""Markdown tables for the READMEs, generated from a stored `report.json`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from core.figures import Figure
from core.kit import InputError
from core.report import figures_of, judgements_of
from core.report.rows import Row, basis_line, bound_text, rows, value_text


def markdown_results(report_json: Mapping[str, Any]) -> str:
    """The before/after table and the gates of a stored report as Markdown.

    Estimates print with `~`. The basis column names the kind and the line of the numbered list under the
    table that says what the number stands on.
    """
    sources: dict[str, int] = {}
    results = [
        (row.label, _value(row.original), _value(row.compressed), _change(row), _basis(row, sources))
        for row in rows(figures_of(report_json))
    ]
    parts = [
        _table(("figure", "original", "compressed", "change", "basis"), results, ":--|--:|--:|--:|:--"),
        "\n".join(f"{number}. {_cell(source)}" for source, number in sources.items()),
    ]
    parts.append(markdown_gates(report_json))
    return "\n\n".join(part for part in parts if part)


def markdown_gates(report_json: Mapping[str, Any]) -> str:
    """The gates of a stored report as Markdown; nothing where it has none."""
    gates = [(j.gate.name, bound_text(j.gate), j.verdict, j.why) for j in judgements_of(report_json)]
    return _table(("gate", "bound", "verdict", "why"), gates, ":--|:--|:--|:--") if gates else ""


def markdown_tables(report_json: Mapping[str, Any]) -> str:
    """The comparison tables of a stored report as Markdown, each under its title and above its note."""
    parts = []
    for table in report_json["tables"]:
        body = [["" if value is None else str(value) for value in row] for row in table["rows"]]
        text = _table(table["columns"], body, "|".join([":--", *["--:"] * (len(table["columns"]) - 1)]))
        parts += [f"**{table['title']}**", text, table["note"]]
    return "\n\n".join(part for part in parts if part)


def replace_block(readme_text: str, name: str, table: str) -> str:
    """The text with `table` between `<!-- fitkit:NAME -->` and `<!-- /fitkit -->`; the rest stays as it is.

    Raises InputError where the opening marker is not there exactly once or is not closed.
    """
    opening, closing = f"<!-- fitkit:{name} -->", "<!-- /fitkit -->"
    count = readme_text.count(opening)
    if count != 1:
        raise InputError(f"found {count} markers {opening!r}, expected one; put it and {closing!r} around the table")
    head, rest = readme_text.split(opening)
    body, mark, tail = rest.partition(closing)
    if not mark or "<!-- fitkit:" in body:
        raise InputError(f"marker {opening!r} is not closed; add {closing!r} behind the table")
    return f"{head}{opening}\n{table.strip()}\n{closing}{tail}"


def _value(figure: Figure | None) -> str:
    return value_text(figure) if figure is not None else ""


def _change(row: Row) -> str:
    if row.change is None:
        return ""
    return f"{row.change.text} ({row.change.note})" if row.change.note else row.change.text


def _basis(row: Row, sources: dict[str, int]) -> str:
    """ "measured (1, 2)": kinds of basis, then their numbers in `sources`, which grows."""
    bases = [f.basis for f in (row.original, row.compressed) if f is not None]
    numbers = dict.fromkeys(sources.setdefault(basis_line(basis), len(sources) + 1) for basis in bases)
    return f"{' and '.join(dict.fromkeys(b.kind for b in bases))} ({', '.join(map(str, numbers))})"


def _table(head: Sequence[str], body: Iterable[Sequence[str]], align: str) -> str:
    lines = ["| " + " | ".join(head) + " |", f"|{align}|"]
    lines += ["| " + " | ".join(_cell(text) for text in line) + " |" for line in body]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text that stays in its cell: no pipe, no line break, nothing that opens an HTML tag."""
    flat = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", flat)
