"""Files that are replaced whole: a kill or a full disk leaves the old one, and the error names the file."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def _full(path: Path) -> InputError:
    return InputError(f"{path}: the disk is full; free some space and run again (--resume goes on where it stopped)")
