"""The packed folder: a pipeline's folder with a manifest of hashes, verified before use and replaced as a whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from core.compress import file_hash
from core.export.artifact import list_files, recover
from core.files import inside, write_text, writing
from core.kit import InputError

MANIFEST = "fitkit.json"
FORMAT = 1
MEND = "pack the model again, or copy the folder anew"
# What a loader of pipelines reads: a file of such a kind that the manifest does not list could take another's place.
LOADED = {".bin", ".ckpt", ".json", ".pkl", ".pt", ".pth", ".py", ".safetensors", ".txt"}


def verify(folder: Path | str, later: Collection[str] = ()) -> dict[str, Any]:
    """Check every file of a packed folder against its manifest, and return the manifest.

    `later` names subfolders ("unet") whose files are checked for presence and size only, since their hashes
    are checked when they are loaded. Raises InputError naming the file that is missing, changed, not listed
    or outside of the folder.
    """
    folder = Path(folder)
    recover(folder)
    manifest = read_manifest(folder)
    files = {name: inside(folder, name, folder / MANIFEST) for name in manifest["files"]}
    for name, file in files.items():
        if not file.is_file():
            raise InputError(f"{file}: missing, though {folder / MANIFEST} lists it; {MEND}")
        found, wanted = file.stat().st_size, manifest["files"][name]["bytes"]
        if found != wanted:
            raise InputError(f"{file}: {found} bytes, expected {wanted} by {folder / MANIFEST}; {MEND}")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix in LOADED and path.is_file() and name not in files and name != MANIFEST:
            raise InputError(f"{path}: not listed in {folder / MANIFEST}, so it is not trusted; remove it, or {MEND}")
    for name, file in files.items():
        if PurePosixPath(name).parts[0] in later:
            continue
        if file_hash(file) != manifest["files"][name]["sha256"]:
            raise InputError(f"{file}: its bytes differ from the sha256 in {folder / MANIFEST}; {MEND}")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest {"format", "files": {path: {"bytes", "sha256"}}, "about"} of a packed folder, its form checked.

    Raises InputError naming the manifest and the field that is missing or of another kind.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder}: no packed folder here ({MANIFEST} is missing); {MEND}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); {MEND}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path}: field 'format': expected {FORMAT}; {MEND}")
    for key in ("files", "about"):
        if not isinstance(manifest.get(key), dict):
            raise InputError(f"{path}: field {key!r}: expected an object; {MEND}")
    for name, record in manifest["files"].items():
        whole = isinstance(record, dict) and isinstance(record.get("bytes"), int)
        if not whole or not isinstance(record.get("sha256"), str):
            raise InputError(f"{path}: field files[{name!r}]: expected an object with bytes and sha256; {MEND}")
    return manifest


def write_manifest(folder: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """Write the manifest of all files that are in a folder now; `about` is JSON on how they were made."""
    (folder / MANIFEST).unlink(missing_ok=True)
    manifest = {"format": FORMAT, "about": dict(about), "files": list_files(folder)}
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False) + "\n")
    return manifest


@contextmanager
def packing(out: Path | str, about: Mapping[str, Any], *, keep: bool = False) -> Iterator[Path]:
    """A folder beside `out` to build a packed folder in; at the end it gets its manifest and takes the place of `out`.

    A failure or a kill leaves an older packed folder as it was. With `keep` the unfinished folder stays after a
    failure and is given again by the next call, so that work can go on where it stopped. `about` may be filled
    while the folder is built. Raises InputError when `out` holds something else, or when the disk is full.
    """
    out = Path(os.path.abspath(out))
    recover(out)
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST).is_file())):
        raise InputError(f"{out}: exists and is not a packed folder, so it is not replaced; choose another folder")
    stage, aside = unfinished(out), out.with_name(f".{out.name}.old")
    if not keep:
        shutil.rmtree(stage, ignore_errors=True)
    try:
        with writing(out):
            stage.mkdir(parents=True, exist_ok=True)
            yield stage
            write_manifest(stage, about)
            # A folder cannot be exchanged in one portable call; `recover` mends a kill between the two moves.
            shutil.rmtree(aside, ignore_errors=True)
            if out.exists():
                os.replace(out, aside)
            os.replace(stage, out)
            shutil.rmtree(aside, ignore_errors=True)
    finally:
        recover(out)
        if not keep:
            shutil.rmtree(stage, ignore_errors=True)


def unfinished(out: Path) -> Path:
    """Where a packed folder is built before it takes the place of `out`."""
    return out.with_name(f".{out.name}.packing")
