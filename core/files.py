"""Files that are replaced whole: a kill or a full disk leaves the old one, and the error names the file."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError

from core.kit import InputError


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to, and move it to `path` at the end; makes the folder around it.

    Raises InputError naming `path` where the disk is full.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(path.name + ".new")
        yield fresh
        os.replace(fresh, path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise InputError naming `path` where the disk is full: the errors of a write and of safetensors name no file."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise _full(path) from error
    except SafetensorError as error:
        if f"os error {errno.ENOSPC}" not in str(error):
            raise
        raise _full(path) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8) whole or not at all, as `replaced` does."""
    with replaced(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


def read_object(path: Path, mend: str) -> dict[str, Any]:
    """The JSON object of a file; raises InputError that ends in `mend` where it is missing or holds something else."""
    found = _read_json(path, mend)
    if not isinstance(found, dict):
        raise InputError(f"{path}: not a JSON object; {mend}")
    return found


def read_list(path: Path, mend: str) -> list[Any]:
    """The JSON list of a file; raises InputError that ends in `mend` where it is missing or holds something else."""
    found = _read_json(path, mend)
    if not isinstance(found, list):
        raise InputError(f"{path}: not a list; {mend}")
    return found


def _read_json(path: Path, mend: str) -> Any:
    if not path.is_file():
        raise InputError(f"{path}: missing; {mend}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); {mend}") from error


def inside(folder: Path, name: str, listed: Path) -> Path:
    """The file of a path that `listed` names; refuses one that is absolute, climbs with '..', or links out of it."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name or not pure.parts:
        raise InputError(f"{listed}: path {name!r} is refused; expected a relative path inside its folder")
    file = folder / pure
    if not file.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{file}: links out of its folder and is refused; put the file itself there")
    return file


def _full(path: Path) -> InputError:
    return InputError(f"{path}: the disk is full; free some space and run again (--resume goes on where it stopped)")
