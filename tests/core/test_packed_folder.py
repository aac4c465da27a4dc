"""The packed folder: what its manifest holds, what is refused and with which file named, and how it is replaced."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path

import pytest

from core.export.packed import MANIFEST, packing, read_manifest, unfinished, verify
from core.kit import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = tmp_path / "packed"
    with packing(out, {"made_by": "a test"}) as stage:
        (stage / "unet").mkdir()
        (stage / "unet" / "weights.safetensors").write_bytes(b"abc")
        (stage / "model_index.json").write_text("{}")
    return out


def edit(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, **changes}))


def test_manifest_lists_bytes_and_sha256_of_every_file(folder: Path) -> None:
    manifest = verify(folder)
    assert manifest["about"] == {"made_by": "a test"}
    assert manifest["files"] == {
        "model_index.json": {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()},
        "unet/weights.safetensors": {
            "bytes": 3,
            "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",  # FIPS 180-2's own example
        },
    }


@pytest.mark.parametrize(
    ("harm", "named", "why"),
    [
        (lambda f: (f / "unet/weights.safetensors").write_bytes(b"abd"), "weights.safetensors", "sha256"),
        (lambda f: (f / "unet/weights.safetensors").write_bytes(b"abcd"), "weights.safetensors", "4 bytes, expected 3"),
        (lambda f: (f / "unet/weights.safetensors").unlink(), "weights.safetensors", "missing"),
        (lambda f: (f / "model_index.json").write_text("[]"), "model_index.json", "sha256"),
        (lambda f: (f / "unet/model.bin").write_bytes(b""), "model.bin", "not listed"),
        (lambda f: (f / MANIFEST).unlink(), MANIFEST, "missing"),
        (lambda f: (f / MANIFEST).write_text("{"), MANIFEST, "not JSON"),
        (lambda f: edit(f, format=2), MANIFEST, "'format': expected 1"),
        (lambda f: edit(f, files=[]), MANIFEST, "'files'"),
        (lambda f: edit(f, files={"a": {}}), MANIFEST, r"files\['a'\]"),
    ],
    ids=["changed", "longer", "gone", "text", "added", "no manifest", "torn", "format", "files", "record"],
)
def test_harm_is_refused_and_the_file_named(folder: Path, harm, named: str, why: str) -> None:
    harm(folder)
    with pytest.raises(InputError, match=f"{named}.*{why}|{why}.*{named}|{named} is {why}") as caught:
        verify(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside.json", "a/../../outside.json", "C:x", "a\\b", ""])
def test_paths_out_of_the_folder_are_refused(folder: Path, name: str) -> None:
    edit(folder, files={name: {"bytes": 0, "sha256": ""}})
    with pytest.raises(InputError, match="is refused"):
        verify(folder)


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"abc")
    (folder / "unet/weights.safetensors").unlink()
    (folder / "unet/weights.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="links out of its folder"):
        verify(folder)


def test_what_is_hashed_later_is_still_checked_for_size(folder: Path) -> None:
    (folder / "unet/weights.safetensors").write_bytes(b"abd")
    verify(folder, later=["unet"])
    (folder / "unet/weights.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="0 bytes"):
        verify(folder, later=["unet"])


def test_a_failure_leaves_the_older_folder(folder: Path) -> None:
    before = read_manifest(folder)
    with pytest.raises(RuntimeError), packing(folder, {}) as stage:
        (stage / "half").write_bytes(b"x")
        raise RuntimeError
    assert verify(folder) == before
    assert not unfinished(folder).exists()


def test_a_full_disk_is_one_clear_line_and_nothing_is_lost(folder: Path) -> None:
    before = read_manifest(folder)
    with pytest.raises(InputError, match="the disk is full"), packing(folder, {}, keep=True) as stage:
        (stage / "done").write_bytes(b"x")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert verify(folder) == before
    assert (unfinished(folder) / "done").is_file()  # kept, to go on with


def test_a_kill_between_the_two_moves_is_mended(folder: Path) -> None:
    before = read_manifest(folder)
    folder.rename(folder.with_name(f".{folder.name}.old"))
    assert verify(folder) == before


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.png").write_bytes(b"x")
    with pytest.raises(InputError, match="not a packed folder"), packing(tmp_path / "photos", {}):
        pass
    assert (tmp_path / "photos" / "one.png").is_file()
