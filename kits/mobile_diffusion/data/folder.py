"""Captioned pictures of a user: an image folder with metadata.jsonl, checked line by line before any training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from core.kit import InputError

METADATA = "metadata.jsonl"
_EXAMPLE = '{"file_name": "a.png", "text": "a red circle"}'


class CaptionedFolder(Sequence[tuple[NDArray[np.uint8], str]]):
    """The (picture, caption) pairs of a folder whose metadata.jsonl holds {"file_name": ..., "text": ...} a line.

    Pictures are uint8 RGB (size, size, 3): the shorter side is resized to `size`, the middle is cut out. Lines, names
    and captions are checked at once, pictures when read. Raises InputError naming the file and its line.
    """

    def __init__(self, folder: Path, size: int = 64) -> None:
        if size < 1:
            raise InputError(f"size {size}, expected at least 1 pixel")
        self.folder, self.size = folder, size
        self._entries = _entries(folder)

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], str]: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[tuple[NDArray[np.uint8], str]]: ...

    def __getitem__(
        self, index: int | slice
    ) -> tuple[NDArray[np.uint8], str] | Sequence[tuple[NDArray[np.uint8], str]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        line, path, caption = self._entries[index]
        return _picture(path, self.size, f"{self.folder / METADATA} line {line}"), caption

    @property
    def captions(self) -> list[str]:
        """Every caption, without reading a picture."""
        return [caption for _, _, caption in self._entries]

    def check(self) -> None:
        """Read every picture once; raises InputError for the first that cannot be read."""
        for index in range(len(self)):
            self[index]


def _entries(folder: Path) -> list[tuple[int, Path, str]]:
    """(line, path of the picture, caption) for each line of metadata.jsonl."""
    metadata = folder / METADATA
    if not metadata.is_file():
        hint = "" if folder.is_dir() else " (there is no such folder)"
        raise InputError(
            f'{metadata}: not found{hint}; write one line {{"file_name": "a.png", "text": "..."}} a picture'
        )
    entries = []
    try:
        lines = metadata.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{metadata}: byte {error.start} is not UTF-8; save it as UTF-8 text") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            entries.append((number, *_entry(folder, line, f"{metadata} line {number}")))
    if not entries:
        raise InputError(f"{metadata}: empty; write one line a picture, such as {_EXAMPLE}")
    return entries


def _entry(folder: Path, line: str, where: str) -> tuple[Path, str]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON at column {error.colno} ({error.msg}); one object a line") from error
    if not isinstance(entry, dict):
        raise InputError(f"{where}: a {type(entry).__name__}, expected an object with file_name and text")
    for field in ("file_name", "text"):
        if not isinstance(entry.get(field), str):
            raise InputError(f"{where}: field {field!r} is {entry.get(field)!r}, expected a string")
    caption = " ".join(entry["text"].split())
    if not caption:
        raise InputError(f"{where}: field 'text' is empty; write a caption or take the line out")
    path = folder / entry["file_name"]
    # Metadata of strangers must not read pictures elsewhere on the disk, neither by .. nor through a link.
    if not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{where}: {entry['file_name']!r} lies outside the folder; name a file inside {folder}")
    if not path.is_file():
        raise InputError(f"{where}: {entry['file_name']!r} is missing; add the file or take the line out")
    return path, caption


def _picture(path: Path, size: int, where: str) -> NDArray[np.uint8]:
    """The middle square of a picture, uint8 RGB (size, size, 3); transparency is laid on white."""
    try:
        with Image.open(path) as opened:
            opened.load()
            image = opened.convert("RGBA")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise InputError(
            f"{where}: {path.name!r} cannot be read ({error}); the file is damaged or no picture"
        ) from error
    ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
    ground.alpha_composite(image)
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    # Cut before resizing: the filter would otherwise draw in what lies beside the square.
    square = ground.convert("RGB").crop((left, top, left + side, top + side))
    square = square.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(square, dtype=np.uint8)
