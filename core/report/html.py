"""The report as one HTML file that asks nothing of the network: inline CSS, pictures as data, charts as SVG."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from core.compress import TraceEntry
from core.report import Picture, Report
from core.report.rows import Row, basis_facts, bound_text, rows, significant, value_text

# The tiles at the top: the first figure found of each group, in this order.
_HEADLINES = (("size",), ("fps", "latency_p50", "latency_p99"), ("energy", "power", "efficiency"))
_MEASURES = (
    ("bytes", "Size", "largest"),
    ("macs", "MACs", "most"),
    ("sqnr_db", "Quantization error, SQNR", "lowest"),
)


def render(report: Report) -> str:
    """The whole page as text."""
    table = rows(report.figures)
    return _template().render(
        report=report,
        headlines=headlines(table),
        rows=table,
        charts=[_chart(report.layers, *measure) for measure in _MEASURES],
        layers=_layers(report.layers),
        steps=[_step(entry) for entry in report.trace],
        tables=[_table(t) for t in report.tables],
        pictures=[{"title": p.title, "source": _data(p)} for p in report.pictures],
        recipe_json=json.dumps(report.recipe.to_json(), indent=2, ensure_ascii=False),
    )


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"value": value_text, "facts": basis_facts, "bound": bound_text, "breakable": breakable}
    return environment.from_string(files("core.report").joinpath("report.html.jinja").read_text(encoding="utf-8"))


def columns(values: Sequence[float | None], titles: Sequence[str]) -> Markup:
    """A column chart as SVG that fills its container: one column a value, scaled to the largest, a dash for None."""
    top = max((v for v in values if v is not None), default=0.0)
    bars = []
    for x, (value, title) in enumerate(zip(values, titles, strict=True)):
        if value is None:
            shape = Markup('<rect class="none" x="{}" y="99" width="0.8" height="1"/>').format(x + 0.1)
        else:
            height = max(100 * value / top, 1.0) if top > 0 else 1.0  # a negative SQNR draws as the shortest column
            shape = Markup('<rect x="{}" y="{}" width="0.8" height="{}"/>').format(
                round(x + 0.1, 2), round(100 - height, 2), round(height, 2)
            )
        # The invisible full-height column lets a small bar show its title too.
        catch = Markup('<rect class="catch" x="{}" y="0" width="1" height="100"/>').format(x)
        bars.append(Markup("<g><title>{}</title>{}{}</g>").format(title, catch, shape))
    return Markup(
        '<svg class="columns" viewBox="0 0 {} 100" preserveAspectRatio="none" aria-hidden="true">{}</svg>'
    ).format(max(len(values), 1), Markup("").join(bars))


def quantity(value: float, unit: str) -> str:
    """A byte or operation count with a decimal prefix: 48200 bytes read "48.2 kB"."""
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{significant(value / factor, 3)} {prefix}{unit}".rstrip()
    return f"{significant(value, 3)} {unit}".rstrip()


def breakable(name: str) -> Markup:
    """A dotted name that may break behind its dots, so that long ones wrap where a reader expects it."""
    return Markup(".<wbr>").join(str(name).split("."))


def headlines(table: Iterable[Row]) -> list[Row]:
    """The rows for the tiles: size, speed, energy, and the first percentage (a kit names its main score first)."""
    whole = [row for row in table if row.change is not None and row.change.sense != "unknown"]
    found = []
    for names in _HEADLINES:
        found += [row for name in names for row in whole if row.name == name][:1]
    return found + [row for row in whole if row.compressed is not None and row.compressed.unit == "%"][:1]


def _number(layer: Mapping[str, Any], key: str) -> float | None:
    value = layer.get(key)
    return float(value) if value is not None and math.isfinite(value) else None


def _show(value: float | None, key: str) -> str:
    if value is None:
        return "\N{EN DASH}"
    if key == "sqnr_db":
        return f"{value:.1f} dB"
    return quantity(value, "B" if key == "bytes" else "")


def _chart(layers: Sequence[Mapping[str, Any]], key: str, title: str, extreme: str) -> dict[str, Any]:
    values = [_number(layer, key) for layer in layers]
    known = [(v, str(layer["layer"])) for v, layer in zip(values, layers, strict=True) if v is not None]
    caption = "no figures"
    if known:
        value, name = (min if extreme == "lowest" else max)(known, key=lambda pair: pair[0])
        caption = f"{extreme}: {name}, {_show(value, key)}"
    titles = [f"{layer['layer']}: {_show(v, key)}" for v, layer in zip(values, layers, strict=True)]
    return {"key": key, "title": title, "caption": caption, "svg": columns(values, titles), "known": bool(known)}


def _layers(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the layer table, each with (measure, words, share of the longest bar in percent)."""
    tops = {key: max((_number(x, key) or 0.0 for x in layers), default=0.0) for key, _, _ in _MEASURES}
    result = []
    for layer in layers:
        cells = []
        for key, title, _ in _MEASURES:
            value = _number(layer, key)
            share = 100 * max(value, 0.0) / tops[key] if value is not None and tops[key] > 0 else 0.0
            cells.append({"key": key, "title": title, "text": _show(value, key), "share": round(share, 1)})
        result.append({"layer": layer["layer"], "kind": layer.get("kind", ""), "cells": cells})
    return result


def _step(entry: TraceEntry) -> dict[str, Any]:
    fields = {k: v for k, v in entry.step.to_json().items() if k != "step"}
    reasons: dict[str, list[str]] = {}
    for skipped in entry.skipped:
        reasons.setdefault(skipped.why, []).append(skipped.layer)
    changed = [
        {
            "layer": item.get("layer", ""),
            "what": item.get("what", ""),
            "numbers": [(k.replace("_", " "), _plain(v)) for k, v in item.items() if k not in ("layer", "what")],
        }
        for item in entry.changed
    ]
    return {
        "name": type(entry.step).__name__,
        "fields": [(k, _plain(v)) for k, v in fields.items()],
        "changed": changed,
        "skipped": len(entry.skipped),
        "reasons": sorted(reasons.items(), key=lambda item: -len(item[1])),
        "seconds": _duration(entry.seconds),
    }


def _table(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table with its cells as text and which columns hold numbers, so that they align to the right."""
    by_column = [_column([row[i] for row in table["rows"]]) for i in range(len(table["columns"]))]
    cells = [list(row) for row in zip(*by_column, strict=True)]
    numeric = [all(_numeric(row[i]) for row in cells) for i in range(len(table["columns"]))]
    return {**table, "rows": cells, "numeric": numeric}


def _column(values: Sequence[Any]) -> list[str]:
    """A column's cells as text; its decimal fractions get the same number of places."""
    texts = [_plain(v) for v in values]
    places = max((len(t.partition(".")[2]) for v, t in zip(values, texts, strict=True) if _fraction(v)), default=0)
    return [f"{v:,.{places}f}" if _fraction(v) and places <= 4 else t for v, t in zip(values, texts, strict=True)]


def _fraction(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _numeric(text: str) -> bool:
    return not text or text in "-\N{EN DASH}" or text.lstrip("~+-")[:1].isdigit()


def _plain(value: Any) -> str:
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return significant(value, 4)
    if isinstance(value, list | tuple):
        return ", ".join(_plain(v) for v in value) or "none"
    return str(value)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _data(picture: Picture) -> str:
    return f"data:{picture.media_type};base64,{base64.b64encode(picture.data).decode('ascii')}"
