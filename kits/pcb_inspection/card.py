"""What goes with the weights: `card.json` for the program and README.md, the model card, for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.compress import file_hash
from core.figures import today
from core.files import write_text

SHOWN = (
    ("map33", "mean AP per class at IoU 0.33"), ("official_ap", "DeepPCB's pooled AP"),
    ("official_f", "F-score at the threshold"),
    ("map50", "mAP50"), ("map5095", "mAP50-95"), ("recall_any", "recall, any class"),
    ("recall_right", "recall, right class"),
    ("recall_half_mm", "recall of defects of 0.5 mm or more"), ("precision", "precision"),
    ("overkill_rate", "good boards rejected"),
)  # fmt: skip


FROZEN = ("threshold", "shift", "names", "gate", "drift")
"""What an artifact's meta and the card of its weights share: confidence, where annotators' boxes lie, what defects of a
name do to copper, difference gate, and how pictures looked."""


def write_card(
    out: Path,
    steps: list[dict[str, Any]],
    frozen: Mapping[str, Any],
    scores: Mapping[str, Mapping[str, Any]],
    about: Mapping[str, Any],
) -> None:
    """Write both cards beside fp32.safetensors and int8.safetensors in `out`.

    `steps` rebuild the INT8 modules (`core.compress.history`), `frozen` is what was chosen on validation boards (see
    FROZEN), `scores` are {variant: metrics} on boards held out of every choice, `about` tells data, split sizes, seed,
    command and seconds.
    """
    hashes = {name: file_hash(out / name) for name in ("fp32.safetensors", "int8.safetensors")}
    known = {name: frozen[name] for name in FROZEN if name in frozen}
    card = {**known, "int8": steps, "scores": scores, "about": about, "sha256": hashes, "date": today()}
    write_text(out / "card.json", json.dumps(card, indent=1) + "\n")
    write_text(out / "README.md", _text(card, _licence(bool(about["deeppcb"]))))


def _text(card: Mapping[str, Any], licence: str) -> str:
    about, scores = card["about"], card["scores"]
    sizes = about["pairs"]
    rows = [
        f"| {title} [%] | " + " | ".join(_cell(scores[v][key]) for v in scores) + " |"
        for key, title in SHOWN
        if key in next(iter(scores.values()))
    ]
    return "\n".join([
        "# Model card: weights of pcb_inspection", "",
        f"`fp32.safetensors` ({about['parameters']:,} parameters) and `int8.safetensors`, the same network after"
        " quantization-aware training. `card.json` holds the frozen threshold and the structure of the INT8 modules.",
        "",
        f"- **Data**: {about['data']}: {sizes['train']} pairs to train, {sizes['val']} pairs"
        f" ({', '.join(about['groups']['val'])}) to choose epoch and threshold, {sizes['holdout']} pairs"
        f" ({', '.join(about['groups']['holdout'])}) held out of every choice. Whole board groups, never single pairs.",
        f"- **Licence of the data**: {licence}",
        f"- **Seed** {about['seed']}, **command** `{about['command']}`, **time** {about['seconds'] / 60:.0f} minutes on"
        f" {about['device']} (other work ran beside it), {card['date']}.",
        *([f"- **History**: {about['history']}."] if about.get("history") else []),
        f"- **Threshold** {card['threshold']:.4f}, frozen on the validation pairs with the exported INT8 network.",
        f"- **Boxes** are moved by {card.get('shift', (0, 0))} pixels (x, y): from where they are found to where the"
        " annotators drew them, the median on the validation pairs.", "",
        f"Scores on the {sizes['holdout']} held-out pairs, each exported file in its own runtime:", "",
        "| metric | " + " | ".join(scores) + " |", "| --- |" + " --- |" * len(scores), *rows, "",
        "Limits: binary images at 48 px/mm, templates within 16 px of the board, the six defects of DeepPCB. Its"
        " defects were drawn by hand on real boards; natural ones may look different. A board differs by more than the"
        " model knows when `predict` warns of a poor match. A flaw of the template that the board has not is no defect"
        " here, so that a small opening which the template shows and the board lacks is not called.", "",
    ])  # fmt: skip


def _cell(value: float | None) -> str:
    """A number of the table; a rate over nothing (no call at all, so no precision) is none."""
    return "-" if value is None else f"{value:.2f}"


def _licence(deeppcb: bool) -> str:
    if deeppcb:
        return (
            "DeepPCB comes with an MIT licence file, but its README says that the data set is for research only. Take"
            " these weights as for research and evaluation, and ask the authors of DeepPCB before commercial use;"
            " weights that you train on your own boards are yours."
        )
    return "that of the data given to the command."


def board_groups(pairs: Sequence[Any]) -> list[str]:
    """The board groups of pairs, sorted."""
    return sorted({pair.group for pair in pairs})
