"""A full disk is told with the name of the file that did not fit, and the old file stays."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from core.cli import main
from core.export.artifact import write_manifest
from core.figures import Figures
from core.files import write_text
from core.kit import InputError, Recipe
from core.report import judge
from core.run import Run
from tests.core.toy import KIT


@pytest.fixture
def full_for(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the disk full for files of a name: what `write` raises then names no file."""
    real = Path.write_text

    def begin(name: str) -> None:
        def write(path: Path, *given: Any, **named: Any) -> int:
            if path.name.startswith(name):
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(path, *given, **named)

        monkeypatch.setattr(Path, "write_text", write)

    return begin


@pytest.mark.parametrize("name", ["report.json", "report.html"])
def test_a_report_that_does_not_fit(name: str, full_for: Any, tmp_path: Path) -> None:
    report = judge(Figures(), (), [], kit="toy", recipe=Recipe("none", (), "", ""), target="this-host")
    report.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    full_for(name)
    with pytest.raises(InputError, match=rf"{name}: the disk is full; free some space and run again"):
        report.save(tmp_path)
    assert (tmp_path / name).read_bytes() == before[name]


@pytest.mark.parametrize("name", ["run.json", "stage-export.json", "manifest.json", "step.json"])
def test_a_record_of_a_run_that_does_not_fit(name: str, full_for: Any, tmp_path: Path) -> None:
    full_for(name)
    with pytest.raises(InputError, match=rf"{name}: the disk is full; free some space and run again"):
        Run(KIT, KIT.recipes["int8"], KIT.default_target, None, "smoke", tmp_path)()


def test_a_manifest_that_does_not_fit(full_for: Any, tmp_path: Path) -> None:
    full_for("manifest.json")
    with pytest.raises(InputError, match=r"manifest\.json: the disk is full"):
        write_manifest(tmp_path, {})


def test_the_command_line_names_the_file(full_for: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full_for("run.json")
    assert main(["run", "tests.core.toy", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"fitkit: {tmp_path / 'run.json'}: the disk is full") and said.count("\n") == 1


def test_other_errors_pass(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory|File exists"):
        write_text(tmp_path / "file" / "below", "text")
