"""The READMEs say what the stored reports say, and their commands exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from core.cli import parser
from core.kit import load

ROOT = Path(__file__).resolve().parent.parent


def _rendered() -> dict[Path, str]:
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "benchmarks" / "readme.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[Path, str] = module.rendered()
    return found


def test_tables_are_those_of_the_stored_reports() -> None:
    rendered = _rendered()
    assert rendered
    for path, text in rendered.items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python benchmarks/readme.py"


KITS = ("pcb_inspection", "mobile_diffusion", "bev_perception")


@pytest.mark.parametrize("readme", ["README.md", *(f"kits/{name}/README.md" for name in KITS)])
def test_options_in_the_readme_exist(readme: str) -> None:
    text = (ROOT / readme).read_text(encoding="utf-8")
    helps = {
        name: {c: sub.format_help() for c, sub in parser(load(name))._subparsers._group_actions[0].choices.items()}  # type: ignore[union-attr, index]
        for name in KITS
    }
    lines = re.findall(r"fitkit (list|run|train|search|evaluate|bench|predict)([^\n`]*)", text)
    assert len(lines) > 4
    for command, rest in lines:
        kit = next((name for name in KITS if name in rest), KITS[0])
        for option in re.findall(r"(?<!\S)--[a-z][a-z-]+", rest):
            assert option in helps[kit][command], f"{readme}: fitkit {command} {kit} has no {option}"


@pytest.mark.parametrize("readme", ["README.md", "CONTRIBUTING.md", *(f"kits/{name}/README.md" for name in KITS)])
def test_links_lead_somewhere(readme: str) -> None:
    path = ROOT / readme
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / link).exists(), f"{readme}: {link} does not exist"
