"""What fixes a detector, as it is stored beside its weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.files import write_text
from core.kit import InputError

COARSEST = 32
"""Stride of the last stage; the sides of an input are multiples of it."""
FILE = "design.json"
"""Beside weights of another design than that of the kit's own."""


@dataclass(frozen=True)
class Design:
    """What fixes a detector: channels at strides 4, 8, 16, 32, and of the three stages blocks and kernels.

    A block's hidden channels are `expand` times those it is given, those of the head `head`. With `deepest` 16 the
    stage at stride 32 is left out. `size` is the side in pixels of the tile that the exported network takes, which
    shows 640 pixels of a board at 48 px/mm. `fusion` says in how many groups the first layer takes the four planes:
    1 mixes all at once; 2 has test and template apart from the differences, 4 every plane by itself, until stride 8.
    """

    widths: tuple[int, int, int, int] = (24, 48, 96, 128)
    blocks: tuple[int, int, int] = (1, 1, 1)
    kernels: tuple[int, int, int] = (3, 3, 3)
    expand: float = 1.0
    deepest: int = 32
    head: int = 48
    size: int = 640
    fusion: int = 1

    def __post_init__(self) -> None:
        if self.size % COARSEST or self.deepest not in (16, 32):
            raise InputError(
                f"design: size {self.size} must be a multiple of {COARSEST}, deepest {self.deepest} 16 or 32"
            )
        if self.fusion not in (1, 2, 4) or self.widths[0] % self.fusion:
            raise InputError(f"design: fusion {self.fusion}, expected 1, 2 or 4, a divisor of width {self.widths[0]}")


BY_HAND = Design()
"""The kit's own."""


def save_design(design: Design, path: Path) -> None:
    """As JSON."""
    write_text(path, json.dumps(asdict(design), indent=1) + "\n")


def load_design(path: Path) -> Design:
    """Read back; InputError for a file that is no design."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return Design(**fields)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: no design of a detector ({error}); give one that `fitkit search` left") from error


def design_beside(weights: Path) -> Design:
    """The design beside a file of weights, or else the kit's own."""
    place = weights.parent / FILE
    return load_design(place) if place.is_file() else BY_HAND
