"""The rows of the before/after table: which figures belong side by side, and what changed between them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import zip_longest
from typing import Literal

from core.figures import Basis, Estimated, Figure, Figures, Gate, Measured, Stage

Sense = Literal["better", "worse", "same", "unknown"]
Better = Literal["lower", "higher"]

# Patterns of names: which way is better, and the words for a better and a worse ratio. The first match counts.
_NAMES: tuple[tuple[str, Better, tuple[str, str]], ...] = (
    ("*escape*", "lower", ("fewer", "more")),
    ("*overkill*", "lower", ("fewer", "more")),
    ("false_*", "lower", ("fewer", "more")),
    ("*_loss", "lower", ("less", "more")),
    ("*_error", "lower", ("less", "more")),
    ("size*", "lower", ("smaller", "larger")),
    ("parameters", "lower", ("fewer", "more")),
    ("macs", "lower", ("fewer", "more")),
    ("latency*", "lower", ("faster", "slower")),
    ("*memory", "lower", ("smaller", "larger")),
    ("energy*", "lower", ("less", "more")),
    ("power*", "lower", ("less", "more")),
    ("fps*", "higher", ("faster", "slower")),
    ("efficiency*", "higher", ("higher", "lower")),
)
_UNITS_HIGHER = ("%", "dB", "1/s", "fps", "TOPS/W")
_POINTS = ("%", "points")
_UNIT_WORDS = {"1/s": "fps", "1/cm2": "per cm2", "count": ""}

_LABELS = {
    "size": "Size", "parameters": "Parameters", "macs": "Multiply-accumulates",
    "latency_p50": "Latency, median", "latency_p99": "Latency, 99th percentile", "fps": "Throughput",
    "peak_memory": "Peak memory", "energy": "Energy per inference", "power": "Power",
    "efficiency": "Energy efficiency",
}  # fmt: skip


@dataclass(frozen=True)
class Change:
    """What compression did to one figure: the words, whether that is better, and a caution if there is one."""

    text: str
    sense: Sense
    note: str = ""

    @property
    def is_difference(self) -> bool:
        """Whether the words alone do not tell better from worse, as in "-0.2 points"."""
        return self.text.lstrip("~")[:1] in ("+", "-")


@dataclass(frozen=True)
class Row:
    """One line of the before/after table; a side without a figure is None."""

    name: str
    original: Figure | None
    compressed: Figure | None
    change: Change | None

    @property
    def label(self) -> str:
        """The name for people."""
        return label(self.name)


def rows(figures: Iterable[Figure]) -> list[Row]:
    """Pair original with compressed, like basis with like; one without a partner of its kind takes what is left."""
    table = Figures(figures)
    result = []
    for name in dict.fromkeys(f.name for f in table):
        before, after = _by_kind(table, name, "original"), _by_kind(table, name, "compressed")
        shared = [kind for kind in before if kind in after]
        result += [_row(name, before[kind], after[kind]) for kind in shared]
        alone = zip_longest(
            (f for kind, f in before.items() if kind not in shared),
            (f for kind, f in after.items() if kind not in shared),
        )
        result += [_row(name, left, right) for left, right in alone]
    return result


def better(name: str, unit: str) -> Better | None:
    """Which way a figure improves, by its name or else its unit; None where that is not known."""
    for pattern, way, _ in _NAMES:
        if fnmatchcase(name, pattern):
            return way
    return "higher" if unit in _UNITS_HIGHER else None


def label(name: str) -> str:
    """A figure's name for people: "latency_p50" reads "Latency, median", "map33" reads "mAP@0.33"."""
    if name in _LABELS:
        return _LABELS[name]
    words = [_word(word) for word in name.split("_") if word]
    if words and words[0].islower():
        words[0] = words[0].capitalize()
    return " ".join(words)


def value_text(figure: Figure) -> str:
    """A figure's value with its unit, `~` before an estimate: "7.412 MB", "~0.61 W", "2.713 M"."""
    estimated = isinstance(figure.basis, Estimated)
    if not math.isfinite(figure.value):
        return "no value"
    value, unit = figure.value, _UNIT_WORDS.get(figure.unit, figure.unit)
    if figure.unit == "count" and abs(value) >= 1e6:
        value, unit = (value / 1e9, "G") if abs(value) >= 1e9 else (value / 1e6, "M")
    text = f"{value:.2f}" if unit in _POINTS else significant(value, 3 if estimated else 4)
    return f"{'~' if estimated else ''}{text} {unit}".rstrip()


def bound_text(gate: Gate) -> str:
    """A gate's bound with its unit: ">= 99.6 %", "<= 2,800,000"."""
    sign, bound = gate.parsed
    words = f"{bound:,.0f}" if gate.unit == "count" else f"{bound:.10g} {_UNIT_WORDS.get(gate.unit, gate.unit)}"
    return f"{sign} {words}".rstrip()


def significant(value: float, digits: int) -> str:
    """A number rounded to significant digits, without an exponent unless it is tiny: 12345.6 reads "12,350"."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    if abs(value) < 1e-4:
        return f"{value:.{digits}g}"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    text = f"{round(value, places):,.{max(places, 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def change(original: Figure, compressed: Figure) -> Change:
    """The improvement from original to compressed, `~` if either is an estimate.

    Percentages and decibels differ by points, everything else by a ratio. Measurements from two
    devices are not compared, and a difference inside the spread of both counts as the same.
    """
    before, after = original.value, compressed.value
    if not (math.isfinite(before) and math.isfinite(after)):
        return Change("not comparable", "unknown", "one side has no value")
    if original.unit != compressed.unit:
        return Change("not comparable", "unknown", f"units differ: {original.unit} and {compressed.unit}")
    a, b = original.basis, compressed.basis
    if isinstance(a, Measured) and isinstance(b, Measured) and a.device != b.device:
        return Change("not comparable", "unknown", "measured on two devices")

    way = better(compressed.name, compressed.unit)
    difference = after - before
    if compressed.unit in (*_POINTS, "dB") or before <= 0 or after <= 0:
        text, same = _difference(difference, compressed.unit)
    else:
        text, same = _ratio(before, after, way, compressed.name)
    if isinstance(a, Estimated) or isinstance(b, Estimated):
        text = f"~{text}"
    if same:
        return Change(text, "same")
    spread = math.hypot(_spread(a), _spread(b))
    if abs(difference) <= spread:
        return Change(text, "same", "within the spread")
    if way is None:
        return Change(text, "unknown")
    return Change(text, "better" if (difference < 0) == (way == "lower") else "worse")


def basis_facts(figure: Figure) -> list[tuple[str, str]]:
    """What a figure stands on, as (term, words) in reading order; empty facts are left out."""
    basis = figure.basis
    if isinstance(basis, Measured):
        unit = _UNIT_WORDS.get(figure.unit, figure.unit)
        spread = f"+-{significant(basis.spread, 3)} {unit}".rstrip() if basis.spread is not None else "not known"
        facts = [("Device", basis.device), ("Runtime", basis.runtime), ("Runs", f"{basis.runs:,}"), ("Spread", spread),
                 ("Artifact", basis.artifact), ("Date", basis.date), ("Note", basis.note)]  # fmt: skip
    elif isinstance(basis, Estimated):
        band = f"+-{basis.error_band:.0%}" if basis.error_band is not None else "not known"
        facts = [("Method", basis.method), *(("Assumes", text) for text in basis.assumptions), ("Error band", band)]
    else:
        facts = [("Source", basis.source)]
    return [(term, words) for term, words in facts if words]


def basis_line(basis: Basis) -> str:
    """What a figure stands on, in one line."""
    if isinstance(basis, Measured):
        return f"measured on {basis.device}, {basis.runtime}, n = {basis.runs:,}"
    if isinstance(basis, Estimated):
        band = f" +-{basis.error_band:.0%}" if basis.error_band is not None else ""
        return f"estimated{band}: {basis.method}"
    return f"quoted: {basis.source}"


def _word(word: str) -> str:
    if match := re.fullmatch(r"map(\d\d)(\d\d)?", word):
        return f"mAP@0.{match[1]}" + (f":0.{match[2]}" if match[2] else "")
    return {"ap": "AP", "f": "F-score", "map": "mAP", "cm2": "per cm2"}.get(word, word)


def _by_kind(figures: Figures, name: str, stage: Stage) -> dict[str, Figure]:
    found = {kind: figures.find(name, stage, kind) for kind in ("measured", "estimated", "quoted")}
    return {kind: figure for kind, figure in found.items() if figure is not None}


def _row(name: str, before: Figure | None, after: Figure | None) -> Row:
    return Row(name, before, after, change(before, after) if before is not None and after is not None else None)


def _difference(difference: float, unit: str) -> tuple[str, bool]:
    word = "points" if unit in _POINTS else _UNIT_WORDS.get(unit, unit)
    if unit in (*_POINTS, "dB"):
        if abs(difference) < 0.005:
            return "no change", True
        return f"{difference:+.2f}".rstrip("0").rstrip(".") + f" {word}", False
    if difference == 0:
        return "no change", True
    sign = "+" if difference > 0 else "-"
    return f"{sign}{significant(abs(difference), 3)} {word}".rstrip(), False


def _ratio(before: float, after: float, way: Better | None, name: str) -> tuple[str, bool]:
    ratio = before / after if way != "higher" else after / before
    if 0.995 < ratio < 1.005:
        return "no change", True
    good, bad = next((words for pattern, _, words in _NAMES if fnmatchcase(name, pattern)), ("", ""))
    if not good:
        good, bad = ("higher", "lower") if way == "higher" else ("lower", "higher")
    factor = max(ratio, 1 / ratio)
    text = f"{factor:.2f}" if factor < 2 else f"{factor:.1f}" if factor < 10 else significant(factor, 3)
    return f"{text}x {good if ratio > 1 else bad}", False


def _spread(basis: Basis) -> float:
    return basis.spread if isinstance(basis, Measured) and basis.spread is not None else 0.0
