"""What `phone_measure.py` measured, taken up into the report of a run, whose gates are judged anew."""

from __future__ import annotations

import base64
import html
import json
import re
from dataclasses import replace
from pathlib import Path

from core.figures import Figure, Figures, Judgement, Measured
from core.kit import InputError
from core.report import Picture, Report
from kits.mobile_diffusion import phone_measure, recipes  # noqa: F401  a report names the steps of recipes


def fill_in(measured_file: Path | str, folder: Path | str, run: Path | str) -> list[Judgement]:
    """Put a phone's figures into the report of a run, judge its gates anew, and return those that look at them.

    `folder` is what `export_phone` wrote from that very run. Writes `report.json` and `report.html`; the pictures of
    the page stay. Raises InputError where the measurement, the files and the report do not belong together.
    """
    run, folder = Path(run), Path(folder)
    figures = measured(measured_file, folder)
    report = Report.load(run)
    origin = phone_measure.read_manifest(folder).get("origin", {})
    artifacts = {f.basis.artifact for f in report.figures if isinstance(f.basis, Measured)}
    if not origin.get("artifact") or origin["artifact"] not in artifacts:
        raise InputError(
            f"{folder}: exported from another model than that of {run / 'report.json'}; "
            f"python -m kits.mobile_diffusion.phone {run} --out {folder}"
        )
    figures = figures.restage(origin["stage"])
    whole = report.figures | figures
    names = {f.name for f in figures}
    notes = json.loads(Path(measured_file).read_text(encoding="utf-8")).get("notes", [])
    judged = tuple(j.gate.judge(whole) for j in report.judgements)
    replace(
        report,
        figures=whole,
        judgements=judged,
        pictures=_pictures(run / "report.html"),
        notes=(*report.notes, *(n for n in notes if n not in report.notes)),
    ).save(run)
    return [j for j in judged if j.gate.figure in names]


def _pictures(page: Path) -> tuple[Picture, ...]:
    """The pictures of a report's page, which `report.json` does not hold."""
    if not page.is_file():
        return ()
    found = re.findall(r'<img src="data:[a-z/]+;base64,([^"]+)" alt="([^"]*)"', page.read_text(encoding="utf-8"))
    return tuple(Picture(html.unescape(title), base64.b64decode(data)) for data, title in found)


def measured(path: Path | str, folder: Path | str) -> Figures:
    """The figures that `phone_measure.py` wrote to `path`, if they are of the very files in `folder`.

    Raises InputError where the file is not such, or measured other files.
    """
    path = Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        figures = [Figure.from_json(f) for f in record["figures"]]
        runtime, weights, artifact = record["runtime"], record["weights"], record["artifact"]
        manifest = phone_measure.read_manifest(Path(folder))
        now = phone_measure.artifact_hash(phone_measure.chosen_files(manifest, runtime, weights))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); measure with phone_measure.py") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no measurement for {folder} ({error}); measure with phone_measure.py") from error
    if now != artifact:
        raise InputError(f"{path}: measured other files than those in {folder}; measure again with phone_measure.py")
    return Figures(figures)
