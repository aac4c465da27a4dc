"""Data of the PCB kit: DeepPCB's layout is read or refused by file and line; drawn defects are what they claim."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy import ndimage

from core.kit import InputError
from kits.pcb_inspection.data import boards, deeppcb, defects
from kits.pcb_inspection.data.generate import generate, make_pair

LINE = "group01000/01000/01000000.jpg group01000/01000_not/01000000.txt"


def write_pair(base: Path, group: str, image_id: str, notes: str = "10 20 40 45 1\n") -> str:
    """A 64 x 48 pair in DeepPCB's layout; returns its list line."""
    number = group.removeprefix("group")
    folder, annotations = base / group / number, base / group / f"{number}_not"
    folder.mkdir(parents=True, exist_ok=True)
    annotations.mkdir(exist_ok=True)
    for kind, level in (("test", 255), ("temp", 0)):
        cv2.imwrite(str(folder / f"{image_id}_{kind}.jpg"), np.full((48, 64), level, np.uint8))
    (annotations / f"{image_id}.txt").write_text(notes)
    return f"{group}/{number}/{image_id}.jpg {group}/{number}_not/{image_id}.txt"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    root = tmp_path / "PCBData"
    assert write_pair(root, "group01000", "01000000", "10 20 40 45 1\n1,2,64,48,6\n") == LINE
    (root / "trainval.txt").write_text(LINE + "\n\n")
    return root


def test_a_pair_is_read_as_published(base: Path) -> None:
    for root in (base, base.parent):
        (pair,) = deeppcb.read_list(root, "trainval")
        assert (pair.image_id, pair.group) == ("01000000", "group01000")
        assert pair.boxes.tolist() == [[10, 20, 40, 45], [1, 2, 64, 48]] and pair.boxes.dtype == np.float32
        assert pair.labels.tolist() == [0, 5] and pair.labels.dtype == np.int64
    test, template = pair.load()
    assert test.shape == template.shape == (48, 64) and test.min() == 255 and template.max() == 0


def test_a_good_board_has_an_empty_annotation(base: Path) -> None:
    (base / "group01000/01000_not/01000000.txt").write_text("")
    (pair,) = deeppcb.read_list(base, "trainval")
    assert pair.boxes.shape == (0, 4) and pair.labels.shape == (0,)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("1 2 3 4", "4 field(s) found, expected 5"),
        ("1 2 3 4 5 6", "6 field(s) found"),
        ("1 2 3.5 4 5", "'3.5' is not a whole number"),
        ("1 2 x 4 5", "'x' is not a whole number"),
        ("1 2 30 40 0", "defect type 0 is not known"),
        ("1 2 30 40 7", "defect type 7 is not known"),
        ("30 2 1 40 1", "inverted or empty"),
        ("1 2 1 40 1", "inverted or empty"),
        ("1 2 65 40 1", "not inside the image of 64 x 48"),
        ("1 2 40 49 1", "not inside the image of 64 x 48"),
        ("-1 2 40 48 1", "not inside the image"),
    ],
)
def test_an_annotation_is_refused_by_file_and_line(base: Path, row: str, says: str) -> None:
    notes = base / "group01000/01000_not/01000000.txt"
    notes.write_text(f"1 2 30 40 1\n\n{row}\n")
    with pytest.raises(InputError) as error:
        deeppcb.read_list(base, "trainval")
    assert says in str(error.value) and f"{notes}:3:" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("group01000/01000/01000000.jpg", "1 field(s) found"),
        (f"{LINE} more", "3 field(s) found"),
        ("group01000/01000_not/01000000.txt group01000/01000/01000000.jpg", "mend the line"),
        ("01000000.jpg 01000000.txt", "mend the line"),
        ("../PCBData/group01000/01000/01000000.jpg a/b.txt", "leaves the data folder"),
        ("/group01000/01000/01000000.jpg a/b.txt", "leaves the data folder"),
        ("group01000/01000/01000000.jpg ../x.txt", "leaves the data folder"),
        ("C:\\group\\x.jpg a/b.txt", "leaves the data folder"),
        ("group01000/01000/01000001.jpg a/b.txt", "01000001_test.jpg does not exist"),
        ("group01000/01000/01000000.jpg a/b.txt", "b.txt does not exist"),
        (LINE, "is listed again (first in line 1)"),
    ],
)
def test_a_list_is_refused_by_file_and_line(base: Path, row: str, says: str) -> None:
    (base / "trainval.txt").write_text(f"{LINE}\n{row}\n")
    with pytest.raises(InputError) as error:
        deeppcb.read_list(base, "trainval")
    assert says in str(error.value) and str(error.value).startswith(f"{base / 'trainval.txt'}:2:")


def test_empty_lists_binary_lists_and_wrong_folders_are_refused(base: Path, tmp_path: Path) -> None:
    (base / "trainval.txt").write_text("\n \n")
    with pytest.raises(InputError, match="the list is empty"):
        deeppcb.read_list(base, "trainval")
    (base / "trainval.txt").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(InputError, match="not a text file"):
        deeppcb.read_list(base, "trainval")
    with pytest.raises(InputError, match=r"no trainval\.txt"):
        deeppcb.read_list(tmp_path / "nowhere", "trainval")
    with pytest.raises(InputError, match="use --split holdout"):
        deeppcb.split(base, "test")
    with pytest.raises(InputError, match="split 'dev' is not known"):
        deeppcb.split(base, "dev")


def test_a_pair_of_two_sizes_is_refused(base: Path) -> None:
    cv2.imwrite(str(base / "group01000/01000/01000000_temp.jpg"), np.zeros((48, 65), np.uint8))
    with pytest.raises(InputError, match=r"is 64 x 48 but its template .* is 65 x 48"):
        deeppcb.read_list(base, "trainval")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".tif"])
def test_images_are_grey_and_whole_or_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    picture = np.random.default_rng(0).integers(0, 256, (60, 80), np.uint8)
    cv2.imwrite(str(path), cv2.cvtColor(picture, cv2.COLOR_GRAY2BGR))
    image = deeppcb.read_image(path)
    assert deeppcb.image_size(path) == (80, 60) and image.dtype == np.uint8
    assert image.shape == (60, 80) and (suffix == ".jpg" or np.array_equal(image, picture))
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0\0")  # trailing bytes do no harm
    assert np.array_equal(deeppcb.read_image(path), image)
    for length in (0, 1, 10, len(whole) // 2, len(whole) - 12):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=f"a{suffix}"):
            deeppcb.read_image(path)


def test_a_cut_jpeg_with_a_thumbnail_is_still_seen_as_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    whole = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 256, (60, 80), np.uint8))[1].tobytes()
    thumbnail = b"\xff\xe1" + (2 + len(whole)).to_bytes(2, "big") + whole  # an APP1 segment that ends with FFD9
    path.write_bytes(whole[:2] + thumbnail + whole[2:])
    assert deeppcb.read_image(path).shape == (60, 80) and deeppcb.image_size(path) == (80, 60)
    path.write_bytes(whole[:2] + thumbnail + whole[2:-50])
    with pytest.raises(InputError, match="cut off"):
        deeppcb.read_image(path)


def test_splits_take_whole_groups(base: Path) -> None:
    names = ["group00041", *deeppcb.VALIDATION_GROUPS, *deeppcb.HOLDOUT_GROUPS]
    lines = [write_pair(base, name, f"{name[5:]}00{i}") for name in names for i in range(2)]
    (base / "trainval.txt").write_text("\n".join(lines))
    found = {s: {p.group for p in deeppcb.split(base, s)} for s in ("train", "val", "holdout")}
    assert found == {"train": {"group00041"}, "val": {"group50600"}, "holdout": {"group92000"}}

    own = {f"board{i}" for i in range(20)}
    parts = deeppcb.split_groups(own, base)
    assert [len(parts[s]) for s in ("train", "val", "holdout")] == [14, 3, 3]
    assert set.union(*parts.values()) == own and parts == deeppcb.split_groups(own, base)
    with pytest.raises(InputError, match="at least 3 whole groups"):
        deeppcb.split_groups({"a", "b"}, base)


def test_pairs_to_inspect_are_found(base: Path, tmp_path: Path) -> None:
    folder = base / "group01000/01000"
    test, template = folder / "01000000_test.jpg", folder / "01000000_temp.jpg"
    (base / "own.txt").write_text(f"{test.relative_to(base)} {template.relative_to(base)}\n")
    (tmp_path / "tab.txt").write_text(f"{test}\t{template}\n")
    ways: list[tuple[Path, ...]] = [(base,), (base / "own.txt",), (tmp_path / "tab.txt",), (base / "trainval.txt",)]
    for given in (*ways, (test, template)):
        (pair,) = deeppcb.find_pairs(*given)
        assert (pair.test, pair.template) == (test, template) and pair.boxes.shape == (0, 4)
    (tmp_path / "empty").mkdir()
    (base / "bad.txt").write_text(f"{LINE}\nlonely.png\n")
    (base / "none.txt").write_text("\n")
    refused: dict[tuple[Path, ...], str] = {
        (tmp_path / "empty",): "no NAME_test",
        (base / "bad.txt",): "bad.txt:2: 1 field",
        (base / "none.txt",): "the list is empty",
        (test,): "one image alone",
        (test, folder / "no.jpg"): "no.jpg does not exist",
        (tmp_path / "nowhere",): "cannot be read",
    }
    for given, says in refused.items():
        with pytest.raises(InputError, match=says):
            deeppcb.find_pairs(*given)
    template.unlink()
    with pytest.raises(InputError, match=r"01000000_temp\.jpg is not beside it"):
        deeppcb.find_pairs(base)
    test.rename(folder / "_test.png")
    with pytest.raises(InputError, match=r"/_test\.png: has no name before _test; expected NAME_test\.png, so give it"):
        deeppcb.find_pairs(base)


def count(mask: np.ndarray, connectivity: int) -> int:
    """Pieces of at least 15 pixels, counted by SciPy."""
    structure = np.ones((3, 3)) if connectivity == 8 else None
    sizes = np.bincount(ndimage.label(mask, structure)[0].ravel())[1:]
    return int((sizes >= defects.COMPONENT).sum())


@pytest.mark.parametrize("kind", deeppcb.CLASSES)
def test_each_defect_is_what_its_name_says(kind: str) -> None:
    lost = kind in ("open", "mousebite", "pin-hole")
    drawn = 0
    for seed, family in enumerate(boards.FAMILIES):
        rng = np.random.default_rng(seed)
        template = (255 * (1 - boards.draw_board(boards.style(family, rng), rng))).astype(np.uint8)
        test, boxes, labels = defects.add_defects(template, rng, 6, kinds=(kind,))
        assert set(labels.tolist()) <= {deeppcb.CLASSES.index(kind)}
        elsewhere = np.ones(template.shape, bool)
        for x1, y1, x2, y2 in boxes.astype(int):
            assert 0 <= x1 < x2 < 640 and 0 <= y1 < y2 < 640
            changed = np.argwhere((test != template)[y1 : y2 + 1, x1 : x2 + 1])
            assert len(changed) >= 20
            if min(x1, y1) > 0 and max(x2, y2) < 639:
                assert changed.min() >= defects.MARGIN and (changed.max(0) <= (y2 - y1 - 10, x2 - x1 - 10)).all()
            elsewhere[y1 : y2 + 1, x1 : x2 + 1] = False
            near = np.s_[max(y1 - 6, 0) : y2 + 7, max(x1 - 6, 0) : x2 + 7]
            # Other defects may reach into the neighbourhood: put only this one on the template.
            one = template.copy()
            one[y1 : y2 + 1, x1 : x2 + 1] = test[y1 : y2 + 1, x1 : x2 + 1]
            before, after = template[near] < 128, one[near] < 128
            assert not (after & ~before if lost else before & ~after).any()
            copper = count(after, 8) - count(before, 8)
            openings = count(~after, 4) - count(~before, 4)
            assert {
                "open": copper > 0,
                "short": copper < 0,
                "copper": copper > 0,
                "pin-hole": openings > 0,
            }.get(kind, copper == 0 == openings)
            drawn += 1
        assert np.array_equal(test[elsewhere], template[elsewhere])
    assert drawn >= 25


def test_sizes_are_those_of_deeppcb() -> None:
    boxes_, labels_, per_image = [], [], []
    for seed in range(21):
        rng = np.random.default_rng(seed)
        board = boards.style(list(boards.FAMILIES)[seed % len(boards.FAMILIES)], rng)
        _, _, boxes, labels = make_pair(board, rng)
        boxes_.append(boxes)
        labels_.append(labels)
        per_image.append(len(boxes))
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3]
    sides = np.concatenate(boxes_)[:, 2:] - np.concatenate(boxes_)[:, :2]
    longest = sides.max(1)
    # DeepPCB: longest side 20 to 173 px with median 38, all but 5 of 6,873 reach 24; 1 to 15 defects, mean 6.9.
    assert 34 <= np.median(longest) <= 42 and longest.min() >= 20 and longest.max() <= 173
    assert (longest >= 24).mean() > 0.97
    assert min(per_image) >= 1 and max(per_image) <= 15 and 6 <= np.mean(per_image) <= 8
    assert np.bincount(np.concatenate(labels_), minlength=6).min() >= 8


def test_only_what_fits_is_drawn_and_kept_places_stay_free() -> None:
    rng = np.random.default_rng(0)
    bare = np.full((640, 640), 255, np.uint8)
    _, boxes, labels = defects.add_defects(bare, rng, 5)
    assert len(boxes) == 5 and set(labels.tolist()) == {deeppcb.CLASSES.index("copper")}
    _, _, labels = defects.add_defects(255 - bare, rng, 5)
    assert set(labels.tolist()) == {deeppcb.CLASSES.index("pin-hole")}
    _, boxes, _ = defects.add_defects(bare, rng, 5, avoid=np.array([[0, 0, 640, 400]], np.float32))
    assert len(boxes) and (boxes[:, 1] >= 400).all()
    test, boxes, labels = defects.add_defects(bare, rng, 0)
    assert boxes.shape == (0, 4) and labels.shape == (0,) and np.array_equal(test, bare)
    with pytest.raises(InputError, match="expected some of open"):
        defects.add_defects(bare, rng, 1, kinds=("scratch",))
    with pytest.raises(InputError, match="expected a grey uint8 image"):
        defects.add_defects(np.stack([bare] * 3, 2), rng, 1)


def test_the_same_seed_gives_the_same_bytes_in_the_published_layout(tmp_path: Path) -> None:
    counts = {"train": 2, "val": 1, "holdout": 1, "test": 1}
    roots = [generate(tmp_path / name, **counts, seed=1) for name in ("a", "b")]
    roots.append(generate(tmp_path / "c", train=1, val=1, holdout=1, test=0, seed=2))
    a, b, c = ({p.relative_to(r): p.read_bytes() for p in sorted(r.rglob("*")) if p.is_file()} for r in roots)
    assert a == b and len(a) == 5 * 3 + 2 and len(c) == 3 * 3 + 1
    assert not {a[p] for p in a if p.suffix == ".jpg"} & set(c.values())
    found = {name: deeppcb.split(tmp_path / "a", name) for name in counts}
    assert {name: len(pairs) for name, pairs in found.items()} == counts
    groups = [{p.group for p in pairs} for pairs in found.values()]
    assert sum(map(len, groups)) == len(set.union(*groups))
    for pair in (p for pairs in found.values() for p in pairs):
        test, template = pair.load()
        assert test.shape == (640, 640) and 0.02 < (template < 128).mean() < 0.9 and len(pair.boxes)
    with pytest.raises(InputError, match="already exists"):
        generate(tmp_path / "a")
    with pytest.raises(InputError, match="train: 0 pairs"):
        generate(tmp_path / "d", train=0)
