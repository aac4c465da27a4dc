"""The report of one run: figures judged by their gates, with the trace of what every step did."""

from __future__ import annotations

import json
import math
import numbers
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from core.compress import TraceEntry
from core.figures import Figure, Figures, Gate, Judgement, Verdict
from core.files import write_text
from core.kit import InputError, Recipe, Step

VERDICTS: tuple[Verdict, ...] = ("PASS", "FAIL", "UNPROVEN")


@dataclass(frozen=True)
class Picture:
    """An example picture: a title and the bytes of a PNG, JPEG, GIF or WebP file."""

    title: str
    data: bytes

    @property
    def media_type(self) -> str:
        """The media type by the file's first bytes; raises InputError for any other format."""
        if self.data.startswith(b"\x89PNG\r\n\x1a\n"):
            return "image/png"
        if self.data.startswith(b"\xff\xd8\xff"):
            return "image/jpeg"
        if self.data.startswith((b"GIF87a", b"GIF89a")):
            return "image/gif"
        if self.data[:4] == b"RIFF" and self.data[8:12] == b"WEBP":
            return "image/webp"
        raise InputError(f"picture {self.title!r}: expected PNG, JPEG, GIF or WebP, found {self.data[:8]!r}")


@dataclass(frozen=True)
class Report:
    """All that one run found out; made by `judge`, stored by `save`.

    `layers` lists {"layer", "kind", "parameters", "bytes", "macs", "sqnr_db"} with None for what is not known.
    `tables` lists {"title", "columns", "rows", "note"} with text or numbers in the cells. `pictures` are shown in
    `report.html` only: a report read back from disk has none.
    """

    kit: str
    recipe: Recipe
    target: str
    figures: Figures
    judgements: tuple[Judgement, ...]
    trace: tuple[TraceEntry, ...]
    layers: tuple[Mapping[str, Any], ...] = ()
    tables: tuple[Mapping[str, Any], ...] = ()
    pictures: tuple[Picture, ...] = ()
    notes: tuple[str, ...] = ()
    title: str = ""
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    fitkit: str = field(default_factory=lambda: _version())

    @property
    def failed(self) -> bool:
        """Whether any gate failed; a gate that is not proven has not failed."""
        return any(j.verdict == "FAIL" for j in self.judgements)

    @property
    def heading(self) -> str:
        """The kit's title, or else its name."""
        return self.title or self.kit

    @property
    def counts(self) -> dict[Verdict, int]:
        """How many gates got each verdict."""
        found = Counter(j.verdict for j in self.judgements)
        return {verdict: found[verdict] for verdict in VERDICTS}

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON; numbers that are not finite become null."""
        data = {
            "fitkit": self.fitkit,
            "created": self.created,
            "kit": self.kit,
            "title": self.title,
            "recipe": self.recipe.to_json(),
            "target": self.target,
            "figures": [f.to_json() for f in self.figures],
            "gates": [j.to_json() | {"stage": j.gate.stage} for j in self.judgements],
            "trace": [t.to_json() for t in self.trace],
            "layers": list(self.layers),
            "tables": list(self.tables),
            "notes": list(self.notes),
        }
        plain: dict[str, Any] = _strict(data)
        return plain

    def save(self, folder: Path | str) -> Path:
        """Write `report.json` and `report.html` into a folder, each whole or not at all; returns the folder.

        Raises InputError naming the file where the disk is full.
        """
        from core.report.html import render

        place = Path(folder)
        page = render(self)
        write_text(place / "report.json", json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")
        write_text(place / "report.html", page)
        return place

    @staticmethod
    def load(folder: Path | str) -> Report:
        """Read back a saved report, without its pictures.

        The module that defines the recipe's steps must have been imported. Raises InputError where
        `report.json` is missing, is not JSON, or lacks a field.
        """
        path = Path(folder) / "report.json"
        data = read_json(path)
        try:
            recipe = data["recipe"]
            return Report(
                kit=data["kit"],
                recipe=Recipe(recipe["name"], tuple(Step.from_json(s) for s in recipe["steps"]),
                              recipe["cost"], recipe["expects"]),
                target=data["target"],
                figures=figures_of(data),
                judgements=judgements_of(data),
                trace=tuple(TraceEntry.from_json(t) for t in data["trace"]),
                layers=tuple(data["layers"]),
                tables=tuple(data["tables"]),
                notes=tuple(data["notes"]),
                title=data["title"],
                created=data["created"],
                fitkit=data["fitkit"],
            )  # fmt: skip
        except KeyError as error:
            raise InputError(f"{path}: field {error} is missing; run the kit again to write a whole report") from error
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}: {error}; run the kit again to write a whole report") from error


def judge(
    figures: Figures,
    gates: Iterable[Gate],
    trace: Sequence[TraceEntry],
    *,
    kit: str,
    recipe: Recipe,
    target: str,
    layers: Iterable[Mapping[str, Any]] = (),
    tables: Iterable[Mapping[str, Any]] = (),
    pictures: Iterable[Mapping[str, Any]] = (),
    notes: Iterable[str] = (),
    title: str = "",
) -> Report:
    """Judge figures by gates and gather everything in a report; `kit` and `target` are names, `title` is for people.

    `pictures` lists {"title", "path"} or {"title", "png": bytes}; files are read at once. Raises InputError
    for a picture that cannot be read and for a table whose rows do not fit its columns.
    """
    return Report(
        kit=kit,
        recipe=recipe,
        target=target,
        figures=figures,
        judgements=tuple(gate.judge(figures) for gate in gates),
        trace=tuple(trace),
        layers=tuple(layers),
        tables=tuple(_table(t) for t in tables),
        pictures=tuple(_picture(p) for p in pictures),
        notes=tuple(notes),
        title=title,
    )


def read_json(path: Path) -> dict[str, Any]:
    """The content of a `report.json`; raises InputError where it is missing or not a JSON object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; `fitkit run` writes it into its --out folder") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not JSON ({error}); run the kit again to write it anew") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: found a {type(data).__name__}, expected a JSON object; run the kit again")
    return data


def figures_of(report_json: Mapping[str, Any]) -> Figures:
    """The figures of a stored report; null values read as NaN."""
    found = (f if f["value"] is not None else {**f, "value": math.nan} for f in report_json["figures"])
    return Figures(Figure.from_json(dict(f)) for f in found)


def judgements_of(report_json: Mapping[str, Any]) -> tuple[Judgement, ...]:
    """The gates of a stored report with their verdicts; raises ValueError for an unknown verdict."""
    result = []
    for g in report_json["gates"]:
        if g["verdict"] not in VERDICTS:
            raise ValueError(f"gate {g['name']!r}: verdict {g['verdict']!r}, expected one of {', '.join(VERDICTS)}")
        gate = Gate(g["name"], g["figure"], g["bound"], g.get("unit", ""), g.get("device", ""),
                    g.get("stage", "compressed"))  # fmt: skip
        result.append(Judgement(gate, g["verdict"], g["why"]))
    return tuple(result)


def _picture(given: Mapping[str, Any]) -> Picture:
    title = str(given["title"])
    if "png" in given:
        picture = Picture(title, bytes(given["png"]))
    else:
        try:
            picture = Picture(title, Path(given["path"]).read_bytes())
        except OSError as error:
            raise InputError(f"picture {title!r}: {given['path']} cannot be read ({error.strerror})") from error
    picture.media_type  # noqa: B018  refuse a format that no browser shows here, not at the end of the run
    return picture


def _table(given: Mapping[str, Any]) -> dict[str, Any]:
    title, columns = str(given["title"]), [str(c) for c in given["columns"]]
    rows = [list(row) for row in given["rows"]]
    for index, row in enumerate(rows):
        if len(row) != len(columns):
            raise InputError(f"table {title!r}: row {index} has {len(row)} cells, expected {len(columns)}")
    return {"title": title, "columns": columns, "rows": rows, "note": str(given.get("note", ""))}


def _strict(value: Any) -> Any:
    """JSON without NaN or infinity, which strict parsers refuse; numpy's scalars become plain numbers."""
    if isinstance(value, Mapping):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(v) for v in value]
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    return value


def _version() -> str:
    try:
        return version("fitkit")
    except PackageNotFoundError:
        return "not installed"
