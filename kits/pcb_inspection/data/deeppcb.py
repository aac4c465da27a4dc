"""DeepPCB as published, and any folder laid out like it: pairs, splits by whole board groups, checked reading."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL.PngImagePlugin import PngImageFile

from core.kit import InputError
from kits.pcb_inspection.model.packed import Packed

CLASSES = ("open", "short", "mousebite", "spur", "copper", "pin-hole")
VALIDATION_GROUPS = ("group50600",)
HOLDOUT_GROUPS = ("group92000",)
SPLITS = ("train", "val", "holdout", "trainval", "test")
SHARE = 0.15  # of the groups, to validation and again to holdout, where the boards are not DeepPCB's
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")

Grey = NDArray[np.uint8]


@dataclass(frozen=True)
class Pair:
    """A tested image and its template: boxes (n, 4) float32 x1 y1 x2 y2 in pixels, labels (n,) int64 in 0..5."""

    image_id: str
    group: str
    test: Path
    template: Path
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]

    def load(self) -> tuple[Grey, Grey]:
        """(test, template), grey uint8 (H, W) of the same size; InputError if an image cannot be read whole."""
        test, template = read_image(self.test), read_image(self.template)
        self._same(test.shape, template.shape)
        return test, template

    def load_packed(self) -> tuple[Packed, Packed]:
        """The same binary and at a bit a pixel, one after the other: for scans of which two would fill the memory."""
        test, template = _read_packed(self.test), _read_packed(self.template)
        self._same(test.shape, template.shape)
        return test, template

    def _same(self, test: tuple[int, ...], template: tuple[int, ...]) -> None:
        if test != template:
            raise InputError(_sizes(self.test, test[::-1], self.template, template[::-1]))


def split(root: Path | str, name: str) -> list[Pair]:
    """The pairs of a split, whole board groups each, so that no board is in two of train, val and holdout.

    "trainval" and "test" are the published lists. Of trainval.txt, "val" is VALIDATION_GROUPS, "holdout" is
    HOLDOUT_GROUPS (never used for a choice) and "train" the rest. Where those groups do not all exist, groups
    are taken in the order of the hash of their name: 15 % (at least one) to val, as many to holdout.
    """
    if name not in SPLITS:
        raise InputError(f"split {name!r} is not known; use one of {', '.join(SPLITS)}")
    if name in ("trainval", "test"):
        return read_list(root, name)
    pairs = read_list(root, "trainval")
    groups = split_groups({pair.group for pair in pairs}, _base(Path(root)) / "trainval.txt")[name]
    return [pair for pair in pairs if pair.group in groups]


def has_test_list(root: Path | str) -> bool:
    """Whether a DeepPCB folder has the published test list beside trainval.txt."""
    return (_base(Path(root)) / "test.txt").is_file()


def split_groups(groups: set[str], where: Path) -> dict[str, set[str]]:
    """{"train" | "val" | "holdout": group names} by the rule of `split`; `where` is the list, for the error."""
    val, holdout = set(VALIDATION_GROUPS), set(HOLDOUT_GROUPS)
    if not (val | holdout) < groups:
        if len(groups) < 3:
            raise InputError(
                f"{where}: {len(groups)} board group(s) ({', '.join(sorted(groups))}), train, val and holdout need at "
                "least 3 whole groups; put the pairs of each board design in its own group folder"
            )
        order = sorted(groups, key=lambda group: hashlib.sha256(group.encode()).digest())
        count = max(1, round(SHARE * len(order)))
        val, holdout = set(order[:count]), set(order[count : 2 * count])
    return {"train": groups - val - holdout, "val": val, "holdout": holdout}


def read_list(root: Path | str, list_name: str) -> list[Pair]:
    """The pairs of `trainval.txt` or `test.txt`, in its order, every line and annotation checked.

    `root` is PCBData or the folder that contains it. A pair without defects has an empty annotation file.
    InputError names the list or annotation file, its line, what was found and the mend.
    """
    base = _base(Path(root))
    path = base / f"{list_name}.txt"
    if list_name == "test" and not path.is_file():
        raise InputError(f"{path}: no such file, this folder has no test list; use --split holdout")
    pairs: list[Pair] = []
    seen: dict[str, int] = {}
    for number, line in _lines(path):
        pair = _listed(base, line, f"{path}:{number}", annotated=True)
        if pair.image_id in seen:
            raise InputError(
                f"{path}:{number}: image {pair.image_id} is listed again (first in line {seen[pair.image_id]}); "
                "remove the line or rename the image"
            )
        seen[pair.image_id] = number
        pairs.append(pair)
    if not pairs:
        raise InputError(f"{path}: the list is empty; write one line a pair: 'group/id/NAME.jpg group/id_not/NAME.txt'")
    return pairs


def find_pairs(*paths: Path | str) -> list[Pair]:
    """The pairs to inspect, without annotations: a folder, a text list, or a tested image and its template.

    A folder is searched for `NAME_test.*` beside `NAME_temp.*`. A list has lines `TEST TEMPLATE` (two images,
    relative to the list; a tab between them where names hold blanks) or lines of a DeepPCB list.
    """
    given = [Path(path) for path in paths]
    if len(given) == 2:
        return [_pair(given[0], given[1], "", "the command line")]
    if len(given) != 1:
        raise InputError(f"{len(given)} paths given; give a folder, a list, or two images: TEST TEMPLATE")
    path = given[0]
    if path.is_dir():
        return _in_folder(path)
    if path.suffix.lower() in SUFFIXES:
        raise InputError(f"{path}: one image alone cannot be compared; give two images: TEST TEMPLATE")
    pairs = []
    for number, line in _lines(path):
        where = f"{path}:{number}"
        names = [name.strip() for name in line.split("\t")] if "\t" in line else line.split()
        if len(names) == 2 and names[1].lower().endswith(".txt"):
            pairs.append(_listed(path.parent, line, where, annotated=False))
        elif len(names) == 2:
            pairs.append(_pair(path.parent / names[0], path.parent / names[1], "", where))
        else:
            raise InputError(f"{where}: {len(names)} field(s) found, expected two: TEST TEMPLATE; mend the line")
    if not pairs:
        raise InputError(f"{path}: the list is empty; write one line a pair: TEST TEMPLATE")
    return pairs


def read_image(path: Path | str) -> Grey:
    """A whole image as grey uint8 (H, W); InputError if it is missing, cut off or not an image."""
    path = Path(path)
    data = _read(path)
    # OpenCV returns what it got of a cut file, the rest grey, with a warning on stderr: look for the end mark first.
    if (end := _end(data)) is not None and len(data) < end:
        raise InputError(f"{path}: the image is cut off ({len(data)} bytes, its end is missing); copy it again")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        image = None
    if image is None:
        raise InputError(f"{path}: not a readable image ({len(data)} bytes); expected {', '.join(SUFFIXES)}")
    return np.asarray(image, np.uint8)


def _read_packed(path: Path) -> Packed:
    """As `read_image`; of a grey PNG with one buffer of its size, where OpenCV takes two."""
    try:
        with (
            path.open("rb") as file,
            PngImageFile(file) as picture,
        ):  # not Image.open, which refuses scans by their size
            if picture.mode == "L":
                picture.load()
                width, height = picture.size
                return Packed((height, width), lambda a, b: np.asarray(picture.crop((0, a, width, b)), np.uint8))
    except (OSError, SyntaxError, ValueError):
        pass  # no PNG, or a broken one: which, `read_image` says
    image = read_image(path)
    return Packed((image.shape[0], image.shape[1]), lambda a, b: image[a:b])


def image_size(path: Path | str) -> tuple[int, int]:
    """(width, height), from the header alone for JPEG and PNG."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(65536)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); mend the path or its rights") from error
    if head[:8] == b"\x89PNG\r\n\x1a\n" and len(head) >= 24:
        return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    if head[:2] == b"\xff\xd8":
        for kind, start, _ in _segments(head):
            if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC) and len(head) >= start + 5:
                return int.from_bytes(head[start + 3 : start + 5], "big"), int.from_bytes(
                    head[start + 1 : start + 3], "big"
                )
    height, width = read_image(path).shape
    return width, height


def _listed(base: Path, line: str, where: str, *, annotated: bool) -> Pair:
    """The pair of a DeepPCB list line: `group/id/NAME.jpg group/id_not/NAME.txt`."""
    names = line.split()
    if len(names) != 2:
        raise InputError(f"{where}: {len(names)} field(s) found, expected 'group/id/NAME.jpg group/id_not/NAME.txt'")
    for name in names:
        _inside(name, where)
    image, annotation = PurePosixPath(names[0]), PurePosixPath(names[1])
    if image.suffix.lower() not in SUFFIXES or annotation.suffix.lower() != ".txt" or len(image.parts) < 2:
        raise InputError(f"{where}: found {line!r}, expected 'group/id/NAME.jpg group/id_not/NAME.txt'; mend the line")
    test = base / image.with_name(f"{image.stem}_test{image.suffix}")
    template = base / image.with_name(f"{image.stem}_temp{image.suffix}")
    pair = _pair(test, template, image.parts[0], where, image.stem)
    if not annotated:
        return pair
    notes = base / annotation
    if not notes.is_file():
        raise InputError(
            f"{where}: annotation {notes} does not exist; add it (empty if the board is good) or remove the line"
        )
    boxes, labels = read_annotation(notes, image_size(test))
    return Pair(pair.image_id, pair.group, test, template, boxes, labels)


def read_annotation(path: Path, size: tuple[int, int]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Boxes (n, 4) float32 and labels (n,) int64 in 0..5 of lines `x1 y1 x2 y2 type`, inside (width, height)."""
    rows = []
    for number, line in _lines(path):
        where, fields = f"{path}:{number}", line.replace(",", " ").split()
        if len(fields) != 5:
            raise InputError(f"{where}: {len(fields)} field(s) found, expected 5: x1 y1 x2 y2 type; mend the line")
        for value in fields:
            if not re.fullmatch(r"-?[0-9]{1,9}", value):
                raise InputError(f"{where}: {value!r} is not a whole number; expected x1 y1 x2 y2 type in pixels")
        x1, y1, x2, y2, kind = (int(value) for value in fields)
        if not 1 <= kind <= len(CLASSES):
            known = ", ".join(f"{i} {name}" for i, name in enumerate(CLASSES, 1))
            raise InputError(f"{where}: defect type {kind} is not known; expected {known}")
        if x1 >= x2 or y1 >= y2:
            raise InputError(f"{where}: box {x1} {y1} {x2} {y2} is inverted or empty; expected x1 < x2 and y1 < y2")
        if x1 < 0 or y1 < 0 or x2 > size[0] or y2 > size[1]:
            raise InputError(
                f"{where}: box {x1} {y1} {x2} {y2} is not inside the image of {size[0]} x {size[1]}; clip it"
            )
        rows.append((x1, y1, x2, y2, kind - 1))
    table = np.array(rows, np.int64).reshape(-1, 5)
    return table[:, :4].astype(np.float32), table[:, 4].copy()


def _pair(test: Path, template: Path, group: str, where: str, image_id: str = "") -> Pair:
    for kind, path in (("tested image", test), ("template", template)):
        if not path.is_file():
            raise InputError(f"{where}: {kind} {path} does not exist; add the file or mend the path")
    sizes = image_size(test), image_size(template)
    if sizes[0] != sizes[1]:
        raise InputError(f"{where}: {_sizes(test, sizes[0], template, sizes[1])}")
    stem = image_id or test.stem.removesuffix("_test")
    return Pair(stem, group, test, template, np.zeros((0, 4), np.float32), np.zeros(0, np.int64))


def _in_folder(folder: Path) -> list[Pair]:
    pairs = []
    for test in sorted(folder.rglob("*_test.*")):
        if test.suffix.lower() not in SUFFIXES:
            continue
        stem = test.stem.removesuffix("_test")
        if not stem:
            raise InputError(f"{test}: has no name before _test; expected NAME_test{test.suffix}, so give it one")
        found = [
            p for s in SUFFIXES for p in (test.with_name(f"{stem}_temp{s}"), test.with_name(f"{stem}_temp{s.upper()}"))
        ]
        template = next((p for p in [test.with_name(f"{stem}_temp{test.suffix}"), *found] if p.is_file()), None)
        if template is None:
            raise InputError(
                f"{test}: its template {stem}_temp{test.suffix} is not beside it; add it or move the image away"
            )
        pairs.append(_pair(test, template, "", str(folder), test.relative_to(folder).with_name(stem).as_posix()))
    if not pairs:
        raise InputError(f"{folder}: no NAME_test.* image in it; expected pairs NAME_test.jpg and NAME_temp.jpg")
    return pairs


def _sizes(test: Path, a: Sequence[int], template: Path, b: Sequence[int]) -> str:
    return f"{test} is {a[0]} x {a[1]} but its template {template} is {b[0]} x {b[1]}; both must have the same size"


def _base(root: Path) -> Path:
    for base in (root / "PCBData", root):
        if (base / "trainval.txt").is_file() or (base / "test.txt").is_file():
            return base
    raise InputError(
        f"{root}: no trainval.txt in it or in its PCBData; give the folder of DeepPCB or one laid out like it"
    )


def _inside(name: str, where: str) -> None:
    # A drive letter or backslash is a path of another system and would escape there.
    if name.startswith("/") or ".." in PurePosixPath(name).parts or "\\" in name or ":" in name or "\0" in name:
        raise InputError(f"{where}: path {name!r} leaves the data folder; use a path below it, with /")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, text) of the lines of a text file that are not blank."""
    try:
        text = _read(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text file (byte {error.start} is not UTF-8); save it as UTF-8") from error
    if "\0" in text:
        raise InputError(f"{path}: not a text file (it holds zero bytes); save it as UTF-8")
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, line.strip()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); mend the path or its rights") from error


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start of its payload, end) of a JPEG's segments, up to and with the first scan header."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        kind = data[position + 1]
        if kind == 0xFF:  # fill byte
            position += 1
            continue
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        yield kind, position + 4, end
        if kind == 0xDA:
            return
        position = end


def _end(data: bytes) -> int | None:
    """The least length of a whole JPEG, PNG or BMP with this beginning, len + 1 if its end mark is missing."""
    if data[:2] == b"\xff\xd8":
        # The mark cannot occur in entropy-coded data, but it can in a thumbnail: search from the first scan on.
        scan = next((end for kind, _, end in _segments(data) if kind == 0xDA), len(data))
        found = data.find(b"\xff\xd9", scan)
        return found + 2 if found >= 0 else len(data) + 1
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        found = data.rfind(b"IEND")
        return found + 8 if found >= 0 else len(data) + 1
    if data[:2] == b"BM" and len(data) >= 6:
        return int.from_bytes(data[2:6], "little")
    return None
