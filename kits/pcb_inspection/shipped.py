"""What ships, taken from a finished run: `python -m kits.pcb_inspection.shipped RUN [--made COMMAND --minutes N
--seed N --history TEXT]`.

RUN is that of `fitkit run pcb_inspection --data DIR --weights FOLDER --preset full --out RUN`; without `--weights` it
tells what ships already anew, with what that run froze and scored. The options say how the weights of FOLDER came
about.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.compress import history, replay
from core.evaluation.measure import device
from core.files import read_object
from core.kit import InputError
from core.weights import load_weights, save_weights
from kits.pcb_inspection import KIT, WEIGHTS
from kits.pcb_inspection.card import board_groups, write_card
from kits.pcb_inspection.data.deeppcb import HOLDOUT_GROUPS
from kits.pcb_inspection.model.design import BY_HAND, FILE, Design, save_design
from kits.pcb_inspection.recipes import DEFAULT

SPLITS = ("train", "val", "holdout")
MEND = "give the folder of a run that went to its end"


def ship(run: Path, made: Mapping[str, Any] | None = None, weights: Path = WEIGHTS) -> None:
    """Copy both networks of a run into `weights`, with their design and cards.

    `made` are "command", "seconds", "seed" and maybe "history" of weights that did not ship so far. InputError for a
    run of another recipe, of a part of the boards, or one that is not finished, and where nothing says how new weights
    were made.
    """
    asked = read_object(run / "run.json", MEND)
    name = asked["recipe"]["name"]
    if name != DEFAULT or asked["preset"] != "full" or asked["data"] is None:
        raise InputError(
            f"{run}: recipe {name!r}, preset {asked['preset']!r}, data {asked['data']!r}; what ships is of recipe "
            f"{DEFAULT!r} and --preset full on --data DIR"
        )
    scores = read_object(run / "stage-scores.json", MEND)
    meta = read_object(run / "artifact" / "manifest.json", MEND)["meta"]
    given = asked["weights"]
    if given is None:
        about = read_object(WEIGHTS / "card.json", "install the kit anew")["about"]
    elif made is None:
        raise InputError(f"{given}: say how these weights were made, with --made and --minutes")
    else:
        about = {**told(Path(asked["data"])), **made}
    fp32 = KIT.model(None if given is None else Path(given))
    int8 = replay(KIT.model(None if given is None else Path(given)), history(run / "steps"))
    steps = sorted((run / "steps").glob("[0-9][0-9]-*/model.safetensors"))
    if not steps:
        raise InputError(f"{run / 'steps'}: no step has left its model; {MEND}")
    load_weights(int8, steps[-1])
    weights.mkdir(parents=True, exist_ok=True)
    design = fp32.design
    assert isinstance(design, Design)
    if design == BY_HAND:
        (weights / FILE).unlink(missing_ok=True)
    else:
        save_design(design, weights / FILE)
    save_weights(fp32, weights / "fp32.safetensors")
    save_weights(int8, weights / "int8.safetensors")
    about = {**about, "parameters": sum(p.numel() for p in fp32.parameters())}
    write_card(weights, history(run / "steps"), meta, values(scores), about)


def told(data: Path) -> dict[str, Any]:
    """What a card says of the boards."""
    sets = {name: KIT.dataset(data, name) for name in SPLITS}
    deeppcb = set(HOLDOUT_GROUPS) == {pair.group for pair in sets["holdout"]}
    return {
        "data": "DeepPCB, trainval" if deeppcb else f"{data.name}, trainval", "deeppcb": deeppcb, "device": device(),
        "pairs": {name: len(pairs) for name, pairs in sets.items()},
        "groups": {name: board_groups(pairs) for name, pairs in sets.items()},
    }  # fmt: skip


def values(scores: Mapping[str, Mapping[str, tuple[float, str]]]) -> dict[str, dict[str, float | None]]:
    """Variant -> metric -> value of a run's stored scores; a rate over nothing is None."""
    return {v: {k: None if x != x else x for k, (x, _) in found.items()} for v, found in scores.items()}


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("run", type=Path)
    options.add_argument("--made")
    options.add_argument("--minutes", type=float)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--history")
    chosen = options.parse_args()
    known = None
    if chosen.made and chosen.minutes:
        known = {"command": chosen.made, "seconds": round(60 * chosen.minutes), "seed": chosen.seed}
        known |= {"history": chosen.history} if chosen.history else {}
    try:
        ship(chosen.run, known)
    except InputError as error:
        sys.exit(str(error))
