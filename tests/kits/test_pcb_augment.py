"""Training crops: repeatable, and whatever was turned, swapped or cut, boxes and classes stay true."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from kits.pcb_inspection.data import augment
from kits.pcb_inspection.data.augment import Crop, Ready, crops, prepare
from kits.pcb_inspection.data.boards import FAMILIES, draw_board, style
from kits.pcb_inspection.data.deeppcb import CLASSES, Pair
from kits.pcb_inspection.data.defects import add_defects
from kits.pcb_inspection.model.network import DUAL
from kits.pcb_inspection.model.pair import Grey, differences

SIZE = 160
LOST = [CLASSES.index(name) for name in ("open", "mousebite", "pin-hole")]


def board(seed: int) -> Grey:
    rng = np.random.default_rng(seed)
    copper = draw_board(style(list(FAMILIES)[seed % len(FAMILIES)], rng), rng)
    return np.where(copper[:400, :480] > 0, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def ready() -> list[Ready]:
    """Two boards with defects and one without."""
    pairs = []
    for seed in (0, 1):
        template = board(seed)
        test, boxes, labels = add_defects(template, np.random.default_rng(seed), 10)
        pairs.append(Ready(f"b{seed}", "g", test, template, boxes, labels))
    clean = board(2)
    return [*pairs, Ready("clean", "g", clean, clean, np.zeros((0, 4), np.float32), np.zeros(0, np.int64))]


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Edges and templates stay as they are, so that what differs are the defects alone."""
    monkeypatch.setattr(augment, "_edges", lambda image, rng, chance: image)
    monkeypatch.setattr(augment, "BLEMISHED", 0.0)


def all_alike(a: list[Crop], b: list[Crop]) -> bool:
    return all(
        np.array_equal(x.test, y.test) and np.array_equal(x.template, y.template)
        and np.array_equal(x.boxes, y.boxes) and np.array_equal(x.labels, y.labels)
        for x, y in zip(a, b, strict=True)
    )  # fmt: skip


def test_dual_pairs_the_classes_and_is_its_own_inverse() -> None:
    assert DUAL[DUAL].tolist() == [0, 1, 2, 3, 4, 5]
    names = {CLASSES[i]: CLASSES[j] for i, j in enumerate(DUAL)}
    assert names["open"] == "short" and names["mousebite"] == "spur" and names["copper"] == "pin-hole"
    assert all((i in LOST) != (j in LOST) for i, j in enumerate(DUAL))


def test_swapping_copper_and_bare_board_turns_gain_into_loss(ready: list[Ready]) -> None:
    gain, loss = differences(ready[0].test, ready[0].template)
    assert gain.any() and loss.any()
    swapped = differences(255 - ready[0].test, 255 - ready[0].template)
    assert np.array_equal(swapped[0], loss) and np.array_equal(swapped[1], gain)


def test_crops_are_the_same_for_a_seed_and_epoch_and_others_for_another(ready: list[Ready]) -> None:
    first = list(crops(ready, SIZE, 3, seed=5, epoch=2))
    assert len(first) == 9
    cv2.setRNGSeed(99)
    assert all_alike(first, list(crops(ready, SIZE, 3, seed=5, epoch=2)))
    assert not all_alike(first, list(crops(ready, SIZE, 3, seed=5, epoch=3)))
    assert not all_alike(first, list(crops(ready, SIZE, 3, seed=6, epoch=2)))


def test_crops_are_binary_and_their_boxes_lie_inside(ready: list[Ready]) -> None:
    for crop in crops(ready, SIZE, 12, seed=0, epoch=0):
        for image in (crop.test, crop.template):
            assert image.shape == (SIZE, SIZE) and image.dtype == np.uint8 and image.flags["C_CONTIGUOUS"]
            assert set(np.unique(image)) <= {0, 255}
        assert crop.boxes.dtype == np.float32 and crop.boxes.shape == (len(crop.labels), 4)
        assert (crop.boxes[:, :2] >= 0).all() and (crop.boxes[:, 2:] <= SIZE).all()
        assert (crop.boxes[:, 2:] > crop.boxes[:, :2]).all()
        assert set(crop.labels) <= set(range(6))


@pytest.mark.usefixtures("exact")
def test_boxes_cover_what_differs_and_classes_tell_its_sign(ready: list[Ready]) -> None:
    seen = signed = 0
    for epoch in range(4):
        for crop in crops(ready, SIZE, 8, seed=1, epoch=epoch):
            if not len(crop.boxes):
                continue
            gain, loss = differences(crop.test, crop.template)
            for (x1, y1, x2, y2), label in zip(crop.boxes.round().astype(int), crop.labels, strict=True):
                here = np.s_[y1:y2, x1:x2]
                changed = crop.test[here] != crop.template[here]
                assert changed.any(), (epoch, label)
                seen += 1
                share = np.count_nonzero(gain[here]), np.count_nonzero(loss[here])
                if max(share) > 4 * min(share):  # the template may lie 2 px off, which differs in both directions
                    signed += 1
                    assert (share[1] > share[0]) == (label in LOST), (epoch, label, share)
    assert seen > 60 and signed > 0.8 * seen


@pytest.mark.usefixtures("exact")
def test_flips_and_transposition_keep_every_changed_pixel_in_a_box(ready: list[Ready]) -> None:
    """Of the clean board nothing but drawn defects can differ, unless its template was moved, which draws no box."""
    seen = 0
    for epoch in range(12):
        for crop in crops([ready[2]], SIZE, 8, seed=2, epoch=epoch):
            if not len(crop.boxes):
                continue
            changed = crop.test != crop.template
            for x1, y1, x2, y2 in crop.boxes.round().astype(int):
                part = changed[y1:y2, x1:x2]
                assert part.any()
                seen += 1
                part[:] = False
            assert not changed.any()
    assert seen > 100


@pytest.mark.usefixtures("exact")
def test_a_good_board_has_no_boxes(ready: list[Ready]) -> None:
    bare = [c for e in range(12) for c in crops([ready[2]], SIZE, 8, 3, e) if not len(c.boxes)]
    alike = sum(np.array_equal(c.test, c.template) for c in bare)
    assert len(bare) >= 4 and alike >= 0.4 * len(bare)
    for crop in bare:  # what else differs is the template moved by at most 2 px, 2.4 where the window was enlarged
        moved = [np.roll(crop.template, (y, x), (0, 1)) for y in range(-2, 3) for x in range(-2, 3)]
        inner = np.s_[3:-3, 3:-3]
        assert min(np.mean(crop.test[inner] != m[inner]) for m in moved) < 0.01


@pytest.mark.usefixtures("exact")
def test_a_flaw_of_the_template_differs_and_has_no_box(ready: list[Ready], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "BLEMISHED", 1.0)
    flawed = 0
    for crop in crops([ready[2]], SIZE, 24, seed=7, epoch=0):
        gain, loss = differences(crop.test, crop.template)
        for plane in (gain, loss):
            for x1, y1, x2, y2 in crop.boxes.round().astype(int):
                plane[y1:y2, x1:x2] = 0
        # the template lacks copper that the board has; the other way round where the two were exchanged
        apart = (loss if crop.dual else gain), (gain if crop.dual else loss)
        if len(crop.boxes):  # these crops are drawn on the template itself, which lies exactly
            assert not apart[1].any()
            flawed += bool(apart[0].any())
    assert flawed >= 10


def test_a_defect_that_the_window_cuts_is_kept_or_erased(ready: list[Ready]) -> None:
    template = np.full((200, 200), 255, np.uint8)
    test = template.copy()
    boxes = np.array([[90, 20, 130, 60], [70, 100, 110, 140]], np.float32)  # 25 and 75 % left of x = 100
    for x1, y1, x2, y2 in boxes.astype(int):
        test[y1:y2, x1:x2] = 0
    pair = Ready("p", "g", test, template, boxes, np.array([4, 1]))
    window = test[:100, :100].copy()
    kept, labels = augment._visible(pair, 0, 0, 100, window, template[:100, :100])
    assert kept.shape == (0, 4) and len(labels) == 0 and window.min() == 255
    window = test[50:150, :100].copy()
    kept, labels = augment._visible(pair, 0, 50, 100, window, template[50:150, :100])
    assert kept.tolist() == [[70, 50, 100, 90]] and labels.tolist() == [1]
    assert window[:11, 85:].min() == 255 and window[50:90, 70:].max() == 0


def test_a_board_smaller_than_a_crop_is_enlarged() -> None:
    template = np.full((80, 120), 255, np.uint8)
    template[30:50] = 0
    small = Ready("s", "g", template, template, np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    assert {c.test.shape for c in crops([small], SIZE, 6, 0, 0)} == {(SIZE, SIZE)}


def test_prepare_binarises_and_registers(tmp_path: Path, ready: list[Ready]) -> None:
    test = np.roll(ready[0].template, (5, -7), (0, 1))
    for name, image in (("a_test.png", test // 2 + 40), ("a_temp.png", ready[0].template // 2 + 40)):
        cv2.imwrite(str(tmp_path / name), image)
    pair = Pair("a", "g", tmp_path / "a_test.png", tmp_path / "a_temp.png", ready[0].boxes, ready[0].labels)
    (made,) = prepare([pair])
    assert np.array_equal(made.test, test)
    assert np.array_equal(made.template[20:-20, 20:-20], test[20:-20, 20:-20])
    assert made.boxes is pair.boxes and (made.image_id, made.group) == ("a", "g")


def test_drawn_boards_are_clean_and_all_different() -> None:
    boards = augment.drawn(3, seed=4)
    assert [b.test is b.template and len(b.boxes) == 0 for b in boards] == [True] * 3
    assert len({b.test.tobytes() for b in boards}) == 3
    assert np.array_equal(augment.drawn(3, seed=4)[2].test, boards[2].test)
