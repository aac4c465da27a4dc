"""The trainings of a recipe with a process a core, which takes less time than one process with as many threads:

    python -m torch.distributed.run --nproc_per_node 2 -m kits.bev_perception.together --recipe whole --out RUN
    fitkit run bev_perception --recipe whole --out RUN --resume

The first command does the recipe's steps up to its last training and leaves them in RUN/steps, where the second finds
them; a step sees as many frames as processes have rows. Killed, it goes on when it is started anew with `--resume`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

import cv2
from accelerate import Accelerator

from core.compress import compress
from core.kit import InputError, Recipe
from kits.bev_perception.distil import FollowOriginal
from kits.bev_perception.kit import BevPerception


def trained(recipe: Recipe) -> Recipe:
    """A recipe up to its last training; raises InputError for one that trains nothing."""
    ends = [index + 1 for index, step in enumerate(recipe.steps) if isinstance(step, FollowOriginal)]
    if not ends:
        raise InputError(f"recipe {recipe.name!r} trains nothing; use fitkit run bev_perception --recipe {recipe.name}")
    return replace(recipe, steps=recipe.steps[: ends[-1]])


def main(words: Sequence[str]) -> None:
    """One process of the training: the first leaves its steps in RUN/steps, the others in a folder beside it."""
    kit = BevPerception()
    parser = argparse.ArgumentParser(prog="kits.bev_perception.together", description=__doc__)
    parser.add_argument("--recipe", default="whole", choices=list(kit.recipes))
    parser.add_argument("--weights", type=Path, help="the detector to begin with; the shipped one")
    parser.add_argument("--data", type=Path, help="a nuScenes-format folder; the generated world")
    parser.add_argument("--preset", default="full", choices=["full", "smoke"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    asked = parser.parse_args(words)
    recipe, model = trained(kit.recipes[asked.recipe]), kit.model(asked.weights)
    first, folder = asked.out / "steps", asked.out / "steps"
    if rank := int(os.environ.get("RANK", "0")):
        folder = asked.out / f"steps.{rank}"
        shutil.rmtree(folder, ignore_errors=True)
        if asked.resume and first.is_dir():
            shutil.copytree(first, folder)  # what it has itself may lie a step behind
    cv2.setNumThreads(1)  # as torch has under `torch.distributed.run`
    Accelerator().wait_for_everyone()
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere if rank else sys.stderr):
        compress(
            model, recipe, kit.of(model), data=asked.data, preset=asked.preset, folder=folder, resume=asked.resume
        )  # fmt: skip
    if rank:
        shutil.rmtree(folder)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(str(error))
