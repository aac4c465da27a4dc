"""What a process of its own says: the peak of a process never falls again, so each measurement takes a new one."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from core.kit import InputError


def told_by(command: Sequence[str], what: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The JSON object in the last line that a command prints; raises InputError with its last words if it fails."""
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if ran.returncode != 0:
        said = (ran.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"{what}: the process that runs it ended with {ran.returncode}: {said}")
    found: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
    return found
