"""Keep what native libraries print while they are imported or run out of the user's sight."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silenced() -> Iterator[None]:
    """Send the process's own standard output and error aside, and show them only where the body raises.

    Native code writes past `sys.stdout`, so the descriptors themselves are turned; other threads' prints go the same
    way meanwhile.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    kept = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as aside:
        whole = False
        try:
            for number in (1, 2):
                os.dup2(aside.fileno(), number)
            yield
            whole = True
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            for number, descriptor in zip((1, 2), kept, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)
            if not whole:
                aside.seek(0)
                sys.stderr.write(aside.read().decode(errors="replace"))
