"""What ships with the kit: the default model, the student that recipe `whole` made of it, and their card.

`python -m kits.mobile_diffusion.shipped TRAINED RUN` takes both from a training (`fitkit train mobile_diffusion --out
TRAINED`) and a run (`fitkit run mobile_diffusion --recipe whole --weights TRAINED --out RUN`) into `weights/`; after a
run of another recipe, the model alone. A third argument says what else is to be known of how they came about.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from core.compress import Outcome, file_hash, handles
from core.figures import today
from core.files import read_object, write_text
from core.kit import Context, InputError, Step
from core.weights import state_hash
from kits.mobile_diffusion.model.pipeline import PARTS, load_diffusion

WEIGHTS = Path(__file__).parent / "weights"
DEFAULT, WHOLE = WEIGHTS / "default", WEIGHTS / "whole"
CARD = WEIGHTS / "card.json"
MOST = 25_000_000
"""Bytes of all that ships."""
RECIPE = "whole"


@dataclass(frozen=True)
class TakeShipped(Step):
    """Take the packed student that ships with the kit, in the place of the training that made it.

    For the shipped default model alone. The student is loaded as it is; whatever a report says of it is measured anew.
    """


@handles(TakeShipped, lambda model, step, structure: load_diffusion(WHOLE))
def take_shipped(model: nn.Module, step: TakeShipped, context: Context) -> Outcome:
    """The student, with what the steps of its recipe said when they made it."""
    if not is_there():
        raise InputError(f"TakeShipped: no student ships with this version; use --recipe int4, or {RECIPE} to make one")
    if not is_default(context.original):
        raise InputError(
            "TakeShipped: the student that ships is of the default model, and this is another; use --recipe int4, or "
            f"--recipe {RECIPE} to make its own student"
        )
    changed: list[dict[str, Any]] = [
        {"layer": row["layer"], "what": f"{entry['step']}, when the student was made: {row['what']}"}
        for entry in _card()["steps"]
        for row in entry["changed"]
    ]
    return Outcome(load_diffusion(WHOLE), changed)


def is_there() -> bool:
    """Whether a student ships beside the default model."""
    return CARD.is_file()


def is_default(model: nn.Module) -> bool:
    """Whether a model is the default one that a student ships of, weight for weight."""
    if not is_there():
        return False
    card = _card()
    # counted first: to hash a full-size model takes long
    return sum(p.numel() for p in model.parameters()) == card["parameters"] and state_hash(model) == card["original"]


def _card() -> dict[str, Any]:
    return read_object(CARD, "install the kit anew")


def ship(trained: Path, run: Path, weights: Path = WEIGHTS, note: str = "") -> None:
    """Copy the model of a training into `weights`, with the student if the run made one, and write the cards.

    Raises InputError where training and run do not belong together, and for more bytes than may ship.
    """
    report = read_object(run / "report.json", "run to the end")
    recipe = report["recipe"]["name"]
    source = trained / "model"
    model = load_diffusion(source)
    original = state_hash(model)
    for step in sorted((run / "steps").glob("*/step.json")):
        if read_object(step, "run again")["origin"]["model"] != original:
            raise InputError(f"{step}: began from another model than that of {source}")
    shutil.rmtree(weights, ignore_errors=True)
    shutil.copytree(source, weights / "default")
    if recipe == RECIPE:
        shutil.copytree(run / "artifact" / "int4", weights / "whole")
    files = sorted(p for p in weights.rglob("*") if p.is_file())
    if (total := sum(p.stat().st_size for p in files)) > MOST:
        raise InputError(f"{weights}: {total:,} bytes, at most {MOST:,} may ship")
    if recipe == RECIPE:
        card = {
            "original": original,
            "parameters": sum(p.numel() for p in model.parameters()),
            "steps": [{"step": e["step"]["step"], "changed": _told(e["changed"])} for e in report["trace"]],
            "sha256": {str(p.relative_to(weights)): file_hash(p) for p in files if p.suffix == ".safetensors"},
        }
        write_text(weights / "card.json", json.dumps(card, indent=1) + "\n")
    write_text(weights / "README.md", _text(report, {n: getattr(model, n) for n in PARTS}, total, note))


def _told(changed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a step said of the model as a whole, and the number of layers that it packed."""
    told = [{"layer": row["layer"], "what": row["what"]} for row in changed if row["layer"] in ("", "(model)", "unet")]
    if packed := sum("weight_sqnr" in row for row in changed):
        told.append({"layer": "(model)", "what": f"{packed} layers packed"})
    return told


def _text(report: dict[str, Any], parts: dict[str, nn.Module], total: int, note: str) -> str:
    """The model card for people, its figures from the run's report."""
    recipe = report["recipe"]["name"]
    values: dict[str, dict[str, float]] = {}
    for figure in report["figures"]:
        if figure["name"].startswith("alignment"):
            values.setdefault(figure["name"], {})[figure["stage"]] = figure["value"]
    rows = [
        f"| {name.replace('alignment_', '').replace('_', ', ')} | "
        + " | ".join(f"{stages[s]:.1f}" if s in stages else "-" for s in ("original", "compressed"))
        + " |"
        for name, stages in values.items()
    ]
    sizes = ", ".join(f"{name} {sum(p.numel() for p in part.parameters()):,}" for name, part in parts.items())
    commands = ["fitkit train mobile_diffusion --out TRAINED"]
    commands.append(f"fitkit run mobile_diffusion --recipe {recipe} --weights TRAINED --out RUN")
    commands.append("python -m kits.mobile_diffusion.shipped TRAINED RUN")
    student = f" `whole/`: what recipe `{RECIPE}` made of it, packed." if recipe == RECIPE else ""
    return "\n".join([
        "# Model card: weights of mobile_diffusion", "",
        "`default/`: a text-to-image model of diffusers' Stable Diffusion classes for 64x64 pictures, FP16 (parameters:"
        f" {sizes}).{student} {total / 1e6:.1f} MB in all.", "",
        "- **Data**: scenes that the kit draws itself (`data/scenes.py`), 1 to 4 coloured shapes on seven grounds, with"
        " captions in a language of some fifty words. No picture or text from elsewhere.",
        "- **Held out**: one composition of five (looks alone, by count, by size, on a ground; pairs; relations) is"
        " never trained on; the 600 prompts of `data/prompts/evaluation.txt` ask for such compositions alone.",
        "- **Seeds**: those of the plan in `training.py`; they fix data, weights at the start and noise.",
        f"- **Commands**: {', then '.join(f'`{c}`' for c in commands)}.",
        *([f"- **Of these weights**: {note}"] if note else []),
        "", f"Alignment in % ({today()}, decided by image processing, see `alignment.py`), as trained and after recipe"
        f" `{recipe}`:", "",
        f"| demand | as trained | {recipe} |", "| --- | --- | --- |", *rows, "",
        "Limits: knows its own language of scenes and nothing else; other words are cut into pieces that it never saw."
        " Things stand in loose places that number and relation decide. The pictures are 64x64. Licence: that of the"
        " project.", "",
    ])  # fmt: skip


if __name__ == "__main__":
    try:
        ship(Path(sys.argv[1]), Path(sys.argv[2]), note=" ".join(sys.argv[3:]))
    except IndexError:
        sys.exit("usage: python -m kits.mobile_diffusion.shipped TRAINED RUN")
    except InputError as error:
        sys.exit(str(error))
