"""The image folder with metadata.jsonl: pairs as written, resized and cropped; each fault refused by file and line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.kit import InputError
from kits.mobile_diffusion.data.folder import CaptionedFolder


def write(folder: Path, *lines: object) -> Path:
    """A folder with a.png (40 wide, 20 high: red, then 20 columns of green, then blue) and the given lines."""
    folder.mkdir(exist_ok=True)
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :10, 0] = pixels[:, 10:30, 1] = pixels[:, 30:, 2] = 255
    Image.fromarray(pixels).save(folder / "a.png")
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metadata.jsonl").write_text(text + "\n")
    return folder


def test_pairs_are_resized_and_cropped_to_the_middle(tmp_path: Path) -> None:
    pairs = CaptionedFolder(
        write(
            tmp_path,
            {"file_name": "a.png", "text": " a green  wall ", "by": "me"},
            "",
            {"file_name": "a.png", "text": "b"},
        ),
        size=10,
    )
    image, caption = pairs[0]
    assert (len(pairs), caption, image.shape, image.dtype) == (2, "a green wall", (10, 10, 3), np.uint8)
    assert np.array_equal(image, np.broadcast_to([0, 255, 0], (10, 10, 3)))
    assert pairs.captions == ["a green wall", "b"] and [c for _, c in pairs[1:]] == ["b"]
    pairs.check()


def test_transparency_is_laid_on_white_and_grey_becomes_rgb(tmp_path: Path) -> None:
    write(tmp_path, {"file_name": "clear.png", "text": "x"}, {"file_name": "grey.png", "text": "y"})
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("L", (8, 8), 77).save(tmp_path / "grey.png")
    pairs = CaptionedFolder(tmp_path, size=8)
    assert (pairs[0][0] == 255).all() and (pairs[1][0] == 77).all()


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"file_name": "a.png"', "line 2: not JSON at column"),
        ('["a.png", "text"]', "line 2: a list, expected an object"),
        ('{"text": "a"}', "line 2: field 'file_name' is None, expected a string"),
        ('{"file_name": "a.png", "text": 3}', "line 2: field 'text' is 3, expected a string"),
        ('{"file_name": "a.png", "text": "  "}', "line 2: field 'text' is empty"),
        ('{"file_name": "b.png", "text": "a"}', "line 2: 'b.png' is missing"),
        ('{"file_name": "../a.png", "text": "a"}', "line 2: '../a.png' lies outside the folder"),
        ('{"file_name": "/etc/passwd", "text": "a"}', "line 2: '/etc/passwd' lies outside the folder"),
        ('{"file_name": "link.png", "text": "a"}', "line 2: 'link.png' lies outside the folder"),
    ],
)
def test_a_bad_line_is_refused(tmp_path: Path, line: str, why: str) -> None:
    folder = write(tmp_path / "set", {"file_name": "a.png", "text": "fine"}, line)
    (tmp_path / "a.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "link.png").symlink_to(tmp_path / "a.png")
    with pytest.raises(InputError, match=why) as caught:
        CaptionedFolder(folder)
    assert "metadata.jsonl" in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_picture_is_refused_by_its_line(tmp_path: Path) -> None:
    folder = write(tmp_path, {"file_name": "a.png", "text": "a"}, {"file_name": "cut.png", "text": "b"})
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / "cut.png")
    whole = (folder / "cut.png").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"not a picture", b""):
        (folder / "cut.png").write_bytes(damaged)
        with pytest.raises(InputError, match=r"line 2: 'cut.png' cannot be read"):
            CaptionedFolder(folder).check()


def test_a_folder_without_metadata_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="metadata.jsonl: not found; write one line"):
        CaptionedFolder(tmp_path)
    with pytest.raises(InputError, match="there is no such folder"):
        CaptionedFolder(tmp_path / "none")
    with pytest.raises(InputError, match="metadata.jsonl: empty"):
        CaptionedFolder(write(tmp_path))
    with pytest.raises(InputError, match="size 0, expected at least 1"):
        CaptionedFolder(tmp_path, size=0)
