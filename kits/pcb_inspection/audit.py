"""A log of inspections that shows tampering: every entry carries the hash of the one before.

One JSON object a line. What was changed, taken out or put between breaks the chain at that place. Entries cut off at
the end leave a chain that is whole: keep the last hash elsewhere, `results.json` has it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from core.files import writing
from core.kit import InputError

BEGINNING = "0" * 64
"""What stands before the first entry."""


def sealed(entry: Mapping[str, Any], previous: str) -> dict[str, Any]:
    """An entry with the hash of the one before and its own, of its canonical JSON."""
    whole = {**entry, "previous": previous}
    return {**whole, "hash": _digest(whole)}


def _digest(entry: Mapping[str, Any]) -> str:
    text = json.dumps(entry, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def verify(path: Path) -> tuple[int, str]:
    """The number of entries of a log and its last hash; InputError naming the first line that does not fit."""
    if not path.exists():
        return 0, BEGINNING
    previous, count = BEGINNING, 0
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: no audit log ({error}); give another file to --audit") from error
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            own = entry.pop("hash")
            fits = entry["previous"] == previous and own == _digest(entry)
        except (ValueError, KeyError, TypeError, AttributeError):
            fits, own = False, ""
        if not fits:
            raise InputError(
                f"{path}:{number}: does not follow from the line before: it, or that one, was changed, taken out or "
                "cut off; keep the file as evidence and give another one to --audit"
            )
        previous, count = own, count + 1
    return count, previous


class AuditLog:
    """An audit log that goes on from a file, whose chain is looked through first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.count, self.last = verify(path)

    def add(self, entry: Mapping[str, Any]) -> str:
        """Append an entry, stamped with its number and the time, and return its hash; on the disk when it returns."""
        self.count += 1
        stamped = {"number": self.count, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), **entry}
        whole = sealed(stamped, self.last)
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(whole, ensure_ascii=True, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.last = whole["hash"]
        return self.last


def hash_of(path: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
