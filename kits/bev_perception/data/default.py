"""The embedded default: generated streets, one folder a split, made once and kept in the cache."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.cache import cache_folder
from core.kit import InputError
from kits.bev_perception.data.world import generate, generate_world

SMALL = {"size": (400, 225), "samples": 6, "paired": "all", "lidar_sweeps": False}
LARGE = {"size": (288, 160), "samples": 20, "paired": "all", "lidar_sweeps": False}

SETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "smoke": {
        "train": {**SMALL, "scenes": 2, "seed": 31},
        "val": {**SMALL, "scenes": 2, "seed": 32},
        "test": {**SMALL, "scenes": 4, "seed": 33, "event_share": 0.5},
    },
    "full": {
        "train": {**LARGE, "scenes": 110, "seed": 1000, "paired": "none"},
        "val": {**LARGE, "scenes": 16, "seed": 77},
        "test": {**LARGE, "scenes": 24, "seed": 5, "event_share": 0.5},
    },
}
"""Arguments of `generate_world` by preset and split: towns that have nothing in common but the generator.

Scenes are 10 s at 2 Hz ("smoke": 3 s), by day and by night in turns; in "val" and "test" every street is shown in both.
"""


def default_set(split: str, preset: str) -> Path:
    """The folder of a split, the same on every machine; made where it is not there yet.

    A frame of "full" takes about half a second on two idle cores.
    """
    if split not in SETS[preset]:
        raise InputError(f"split {split!r}: the generated set has {', '.join(SETS[preset])}")
    return kept_world(f"bev_perception-{preset}-{split}", SETS[preset][split])


def kept_world(name: str, arguments: Mapping[str, Any]) -> Path:
    """The folder of a world of these arguments of `generate_world`, one split; made once and kept under its name."""
    sources = [Path(__file__), *sorted(Path(str(generate.__file__)).parent.glob("*.py"))]
    place = cache_folder(name, sources)
    if not place.is_dir():
        with tempfile.TemporaryDirectory(dir=place.parent) as work:
            made = generate_world(Path(work) / "set", **{"val_share": 0.0, **arguments})
            if not place.exists():
                os.replace(made, place)
    return place
