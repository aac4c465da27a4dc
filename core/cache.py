"""Where fitkit keeps what it can make again: generated sets and exports of shipped weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from core.kit import InputError


def cache_folder(name: str, depends_on: Iterable[Path] = ()) -> Path:
    """The folder for something named, apart for each content of the files it depends on; its parent exists.

    Below FITKIT_CACHE, or else the user's cache folder. Raises InputError where that cannot be written.
    """
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in depends_on)).hexdigest()[:12]
    home = os.environ.get("FITKIT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fitkit"
    base = Path(home)
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{base}: cannot be made ({error.strerror}); set FITKIT_CACHE to a folder that can be written"
        ) from error
    return base / f"{name}-{digest}"
