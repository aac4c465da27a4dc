"""The kit's own prompts and captioned scenes by split, or a team's folder of captioned pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.kit import InputError
from kits.mobile_diffusion.data import scenes
from kits.mobile_diffusion.data.captions import evaluation_prompts
from kits.mobile_diffusion.data.folder import CaptionedFolder

SPLITS = ("train", "val", "test")
DRAWN = {"smoke": 256, "full": 16_384}
"""Scenes of the training split."""
CHECKED = {"smoke": 64, "full": 256}
"""Scenes of the validation split, of training compositions too, from other seeds."""
SMOKE_PROMPTS = 5
"""Prompts of each kind in a short trial."""
_SEED, _CHECK_SEED = 40_000_003, 50_000_017


@dataclass(frozen=True)
class Prompt:
    """A prompt with the seed of its picture; `kind` is the kind of its composition ("" where it is not known).

    `steps` is the most that a picture takes in a short trial; None leaves the model its own.
    """

    text: str
    seed: int
    kind: str = ""
    steps: int | None = None


@dataclass(frozen=True)
class Captioned:
    """A picture (H, W, 3) uint8 RGB, read or drawn when asked for, and its caption."""

    text: str
    source: Callable[[], NDArray[np.uint8]]

    def picture(self) -> NDArray[np.uint8]:
        """The picture."""
        return self.source()


class Scenes(Sequence[Captioned]):
    """`count` generated scenes, each drawn from its own seed when asked for."""

    def __init__(self, count: int, seed: int = _SEED) -> None:
        self._count, self._seed = count, seed

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        scene = scenes.sample_scene(np.random.default_rng((self._seed, index % self._count)))
        return Captioned(scene.caption, partial(scenes.draw, scene))


def samples(data: Path | None, split: str, preset: str, size: int) -> Sequence[Any]:
    """The samples of a split: `Captioned` pictures to train on and to choose by ("val"), `Prompt`s to report ("test").

    Without `data` the scenes of the kit, where "test" are compositions that training never sees. With a folder its
    pictures at `size` pixels: a tenth of them each, by the hash of their captions, validates and is reported.
    """
    if split not in SPLITS:
        raise InputError(f"split {split!r} is not known; use one of {', '.join(SPLITS)}")
    if data is None:
        return _own(split, preset)
    folder = CaptionedFolder(data, size)
    captions = folder.captions
    chosen = [i for i, caption in enumerate(captions) if _split_of(caption) == split]
    if not chosen:
        raise InputError(
            f"{data}: {len(captions)} pictures, none of which falls into the split {split!r}; give 50 or more"
        )
    if split != "test":
        return [Captioned(captions[i], partial(_picture, folder, i)) for i in chosen]
    return [Prompt(captions[i], i) for i in chosen]


def _picture(folder: CaptionedFolder, index: int) -> NDArray[np.uint8]:
    return folder[index][0]


def _own(split: str, preset: str) -> Sequence[Any]:
    if split == "train":
        return Scenes(DRAWN[preset])
    if split == "val":
        return Scenes(CHECKED[preset], _CHECK_SEED)
    kinds = evaluation_prompts()
    most = SMOKE_PROMPTS if preset == "smoke" else None
    chosen = [(text, kind) for kind, texts in kinds.items() for text in texts[:most]]
    return [Prompt(text, i, kind) for i, (text, kind) in enumerate(chosen)]


def _split_of(caption: str) -> str:
    share = int.from_bytes(blake2b(caption.encode(), digest_size=4).digest()) / 2**32
    return "test" if share < 0.1 else "val" if share < 0.2 else "train"
