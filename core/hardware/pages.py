"""Resident pages given back to the system: what the allocator keeps of freed tensors, and clean pages of mapped files.

Everything here is a request that Linux with glibc fulfils; elsewhere nothing happens. No result changes, only how much
memory is resident meanwhile.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# mallopt's parameters (malloc.h) and madvise's advice (mman.h).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_DONTNEED = 4
_HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \d+\s*(.*)")

LARGE = 1 << 20
"""Tensors from this size on get pages of their own, which go back to the system when the tensor does."""


@dataclass(frozen=True)
class Mapping:
    """A part of the address space that shows a file, with permissions as in /proc/self/maps.

    `resident` bytes are in memory; `written` of those were changed by this process and are no longer the file's.
    """

    start: int
    end: int
    permissions: str
    file: str
    resident: int
    written: int


def return_large_blocks(threshold: int = LARGE) -> bool:
    """Let the allocator return every block of at least `threshold` bytes at once when it is freed; False: not glibc.

    Without it glibc raises its own threshold up to 32 MB as large blocks are freed, and keeps what is smaller.
    """
    libc = _libc()
    if libc is None:
        return False
    return all(
        [
            libc.mallopt(_MMAP_THRESHOLD, threshold),
            libc.mallopt(_MMAP_MAX, 1 << 16),
            libc.mallopt(_TRIM_THRESHOLD, LARGE),
        ]
    )


def give_back(belongs: Callable[[Mapping], bool] | None = None) -> int:
    """Return freed memory and the clean pages of mapped files to the system; the bytes of file pages let go.

    A page that is needed again comes from the file, as a rule out of the system's own cache. Only mappings of files
    in which nothing was written are let go of: `belongs` says which of those (default: program code).
    """
    libc = _libc()
    if libc is None:
        return 0
    libc.malloc_trim(0)
    chosen = [m for m in mappings() if m.written == 0 and m.resident and (belongs or is_code)(m)]
    return sum(m.resident for m in chosen if libc.madvise(m.start, m.end - m.start, _DONTNEED) == 0)


def is_code(mapping: Mapping) -> bool:
    """Whether a mapping is program code or its constants: nothing can write to it."""
    return mapping.permissions[1] != "w" and not is_weights(mapping)


def is_weights(mapping: Mapping) -> bool:
    """Whether a mapping shows a safetensors file."""
    return mapping.file.endswith(".safetensors")


def mappings() -> Iterator[Mapping]:
    """The mapped files of this process, from /proc/self/smaps; none where there is no such file."""
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        return
    found: Any = None
    sizes: dict[str, int] = {}
    for line in smaps.read_text(encoding="utf-8", errors="replace").splitlines() + ["0-0 ---- 0 0 0"]:
        if header := _HEADER.fullmatch(line):
            if found is not None and found[4].startswith("/"):
                rss, written = sizes.get("Rss", 0), sizes.get("Anonymous", 0)
                yield Mapping(int(found[1], 16), int(found[2], 16), found[3], found[4], rss, written)
            found, sizes = header, {}
        elif line.endswith(" kB"):
            key, _, value = line.partition(":")
            sizes[key] = int(value.split()[0]) * 1024


@cache
def _libc() -> Any:
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt.argtypes, libc.mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
        libc.malloc_trim.argtypes = [ctypes.c_size_t]
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    except (OSError, AttributeError):
        return None
    return libc
