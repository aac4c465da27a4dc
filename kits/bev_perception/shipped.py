"""What ships beside the detector: the one that recipe `whole` made of it, taken by recipe `shipped`.

`python -m kits.bev_perception.shipped RUN` takes it from a run of that recipe (`fitkit run bev_perception --recipe
whole --out RUN`) into `weights/`, where the detector that it began from must lie already. Of a run of recipe `shipped`
it takes what that froze and scored into the model card.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from core.compress import Outcome, file_hash, handles, history, replay
from core.files import read_object, write_text
from core.kit import Context, InputError, Step
from core.weights import load_weights, save_weights, state_hash
from kits.bev_perception.card import tell_anew

WEIGHTS = Path(__file__).parent / "weights"
WHOLE, CARD = WEIGHTS / "whole.safetensors", WEIGHTS / "whole.json"
RECIPE, READY = "whole", "shipped"


@dataclass(frozen=True)
class TakeWhole(Step):
    """Take the compressed detector that ships with the kit, in the place of the training that made it.

    For the shipped detector alone. Weights are loaded as they are; whatever a report says of them is measured anew.
    """


def build(model: nn.Module) -> nn.Module:
    """The compressed detector that ships, of the shipped one; InputError for files that are not those of its card."""
    small = replay(model, _card()["steps"])
    if file_hash(WHOLE) != _card()["sha256"]:
        raise InputError(f"{WHOLE}: bytes differ from {CARD.name}; install the kit anew")
    load_weights(small, WHOLE)
    return small


@handles(TakeWhole, lambda model, step, structure: build(model))
def take_shipped(model: nn.Module, step: TakeWhole, context: Context) -> Outcome:
    """The compressed detector, with what the steps of its recipe said when they made it."""
    if not is_there():
        raise InputError(f"TakeWhole: none ships with this version; use --recipe mixed, or {RECIPE} to make one")
    if not is_default(context.original):
        raise InputError(
            "TakeWhole: what ships was made of the shipped detector, and this is another; use --recipe mixed, or "
            f"--recipe {RECIPE} to make its own"
        )
    return Outcome(build(model), _card()["changed"])


def is_there() -> bool:
    """Whether a compressed detector ships beside the shipped one."""
    return CARD.is_file()


def is_default(model: nn.Module) -> bool:
    """Whether a model is the detector that the shipped compressed one was made of, weight for weight."""
    return is_there() and state_hash(model) == _card()["original"]


def _card() -> dict[str, Any]:
    return read_object(CARD, "install the kit anew")


def ship(run: Path, original: nn.Module, weights: Path = WEIGHTS) -> None:
    """Copy what a run of recipe `whole` made of `original` into `weights`, with its card.

    Raises InputError for a run of another recipe, one that is not finished, or one that began from another detector.
    """
    report = _report(run, RECIPE)
    steps, records = run / "steps", sorted((run / "steps").glob("[0-9][0-9]-*/step.json"))
    if len(records) != len(report["recipe"]["steps"]):
        raise InputError(f"{steps}: {len(records)} of {len(report['recipe']['steps'])} steps; run again with --resume")
    began = state_hash(original)
    for record in records:
        if read_object(record, "run again")["origin"]["model"] != began:
            raise InputError(f"{record}: began from another detector than {weights / 'fp32.safetensors'}")
    small = replay(original, history(steps))
    load_weights(small, records[-1].parent / "model.safetensors")
    write(small, began, history(steps), told(report["trace"][: len(records)]), weights)


def tell(run: Path, original: nn.Module, weights: Path = WEIGHTS) -> None:
    """The model card in `weights` with the scores of a run of recipe `shipped` on the default data, in full.

    Raises InputError for another run, and for one of other weights than lie there now.
    """
    _report(run, READY)
    asked = read_object(run / "run.json", "run to the end")
    if asked["data"] is not None or asked["preset"] != "full":
        raise InputError(f"{run}: on {asked['data'] or 'a part'}; the card tells --preset full on the default data")
    ready = state_hash(build(copy.deepcopy(original)))
    taken = replay(original, _card()["steps"])
    (step,) = sorted((run / "steps").glob("[0-9][0-9]-*/model.safetensors"))
    load_weights(taken, step)
    if state_hash(taken) != ready:
        raise InputError(f"{run}: scored other weights than {WHOLE}; run --recipe {READY} again")
    tell_anew(weights, run)


def _report(run: Path, recipe: str) -> dict[str, Any]:
    """The report of a run of a recipe; InputError for another's."""
    report = read_object(run / "report.json", "run to the end")
    if report["recipe"]["name"] != recipe:
        raise InputError(f"{run}: a run of recipe {report['recipe']['name']!r}; run --recipe {recipe}")
    return report


def told(trace: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the steps of a trace (as JSON) said of the whole network, as something of the past."""
    return [
        {**row, "what": f"{entry['step']['step']}, when it was made: {row['what']}"}
        for entry in trace
        for row in entry["changed"]
        if row["layer"] in ("", "(model)") or "outputs" in row
    ]


def write(
    small: nn.Module, original: str, steps: list[dict[str, Any]], changed: list[dict[str, Any]], folder: Path
) -> None:
    """Leave a compressed detector in `folder` as `build` reads it; `original` is the hash of what it was made of."""
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(small, folder / WHOLE.name)
    card = {"original": original, "sha256": file_hash(folder / WHOLE.name), "steps": steps, "changed": changed}
    write_text(folder / CARD.name, json.dumps(card, indent=1) + "\n")


if __name__ == "__main__":
    from kits.bev_perception.kit import BevPerception

    try:
        given = Path(sys.argv[1])
        name = read_object(given / "report.json", "run to the end")["recipe"]["name"]
        (tell if name == READY else ship)(given, BevPerception().model())
    except IndexError:
        sys.exit("usage: python -m kits.bev_perception.shipped RUN")
    except InputError as error:
        sys.exit(str(error))
