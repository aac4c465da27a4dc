"""The embedded default: a generated set, made once and kept in the cache."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from core.cache import cache_folder
from kits.pcb_inspection.data import boards, deeppcb, defects
from kits.pcb_inspection.data import generate as generator

SEED = 0


def default_set() -> Path:
    """The folder of the generated set, the same on every machine; made in some seconds where it is not there yet."""
    sources = [Path(str(module.__file__)) for module in (boards, deeppcb, defects, generator)]
    place = cache_folder(f"pcb_inspection-generated-{SEED}", sources)
    if not (place / "PCBData").is_dir():
        with tempfile.TemporaryDirectory(dir=place.parent) as work:
            made = generator.generate(Path(work) / "set", seed=SEED)
            if not place.exists():
                os.replace(made.parent, place)
    return place
