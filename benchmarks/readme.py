"""Write the result tables of the READMEs from the stored reports: `python benchmarks/readme.py`."""

from __future__ import annotations

from pathlib import Path

from core.report import read_json
from core.report.tables import markdown_results, replace_block

ROOT = Path(__file__).resolve().parent.parent
TABLES = {
    "pcb_inspection": ("README.md", "kits/pcb_inspection/README.md"),
}


def rendered() -> dict[Path, str]:
    """Every README with its tables as the stored reports say."""
    texts: dict[Path, str] = {}
    for name, readmes in TABLES.items():
        table = markdown_results(read_json(ROOT / "benchmarks" / "reports" / name / "report.json"))
        for readme in readmes:
            path = ROOT / readme
            texts[path] = replace_block(texts.get(path) or path.read_text(encoding="utf-8"), name, table)
    return texts


if __name__ == "__main__":
    for path, text in rendered().items():
        path.write_text(text, encoding="utf-8")
