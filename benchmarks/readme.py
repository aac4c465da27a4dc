"""Write the result tables of the READMEs from the stored reports: `python benchmarks/readme.py`."""

from __future__ import annotations

from pathlib import Path

from core.report import read_json
from core.report.tables import markdown_gates, markdown_results, markdown_tables, replace_block

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = {
    "README.md": {"pcb_inspection": (markdown_gates, markdown_tables), "mobile_diffusion": (markdown_gates,)},
    "kits/pcb_inspection/README.md": {"pcb_inspection": (markdown_tables, markdown_results)},
    "kits/mobile_diffusion/README.md": {"mobile_diffusion": (markdown_tables, markdown_results)},
}
"""README -> kit whose stored report fills the block of that name -> what of it is shown."""


def rendered() -> dict[Path, str]:
    """Every README with its tables as the stored reports say."""
    texts: dict[Path, str] = {}
    for readme, blocks in BLOCKS.items():
        path = ROOT / readme
        text = path.read_text(encoding="utf-8")
        for kit, parts in blocks.items():
            report = read_json(ROOT / "benchmarks" / "reports" / kit / "report.json")
            text = replace_block(text, kit, "\n\n".join(part(report) for part in parts))
        texts[path] = text
    return texts


if __name__ == "__main__":
    for path, text in rendered().items():
        path.write_text(text, encoding="utf-8")
