"""Every recipe of mobile_diffusion on its own, each scored on all held-out prompts and timed against its original.

    python benchmarks/diffusion_recipes.py --out DIR [--weights TRAINED] [--recipes NAME ...] [--resume]

Each is what `fitkit run mobile_diffusion --recipe NAME --preset full` does, without the trials in full size, which have
nothing to do with the recipe. Leaves a report a recipe in DIR/NAME; with --store the reports of all recipes that are
done go into `benchmarks/reports/mobile_diffusion/`, from which `benchmarks/readme.py` makes the README's table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from core.figures import Figures
from core.files import write_text
from core.kit import Kit
from core.report import read_json
from core.run import Run
from kits.mobile_diffusion.comparison import compare
from kits.mobile_diffusion.kit import MobileDiffusion
from kits.mobile_diffusion.model.pipeline import Diffusion
from kits.mobile_diffusion.recipes import READY, RECIPES

REPORTS = Path(__file__).resolve().parent / "reports" / "mobile_diffusion"


class Alone(MobileDiffusion):
    """The kit without the trials in full size."""

    def of(self, model: nn.Module) -> Kit:
        found = super().of(model)
        assert isinstance(found, MobileDiffusion)
        return Alone(found._original, found.default_recipe)

    def compare(
        self, original: nn.Module, compressed: nn.Module, samples: Sequence[Any], artifact: Any, preset: str, out: Path
    ) -> tuple[Figures, list[dict[str, Any]]]:
        assert isinstance(original, Diffusion) and isinstance(compressed, Diffusion)
        return compare(self, original, compressed, samples, artifact, preset)


def store(out: Path, to: Path = REPORTS) -> None:
    """Copy what the table is made of from the reports of `out`."""
    for report in sorted(out.glob("*/report.json")):
        found = read_json(report)
        kept = {key: found[key] for key in ("kit", "recipe", "target", "figures")}
        write_text(to / f"recipe-{report.parent.name}.json", json.dumps(kept, indent=1) + "\n")


def main() -> None:
    """Run the recipes that were named, one after the other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--recipes", nargs="+", default=[n for n in RECIPES if n != READY], choices=list(RECIPES))
    parser.add_argument("--preset", default="full", choices=("smoke", "full"))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--store", action="store_true", help="only store the reports that are there")
    options = parser.parse_args()
    if not options.store:
        for name in options.recipes:
            Run(
                Alone(), RECIPES[name], Alone.default_target, None, options.preset, options.out / name,
                options.resume, options.weights,
            )()  # fmt: skip
    store(options.out)


if __name__ == "__main__":
    main()
