"""Registration and signed differences: exact shifts are found, a bend is followed, tolerance is one pixel."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from kits.pcb_inspection.data.boards import FAMILIES, draw_board, style
from kits.pcb_inspection.data.defects import add_defects
from kits.pcb_inspection.model.pair import MAX_SHIFT, Grey, binarise, differences, level, register, stack

KERNEL = np.ones((3, 3), np.uint8)


def board(family: str, seed: int = 3) -> Grey:
    """A clean binary board (640, 640), copper black."""
    rng = np.random.default_rng(seed)
    return np.where(draw_board(style(family, rng), rng) > 0, 0, 255).astype(np.uint8)


def window(image: Grey, dx: int, dy: int, side: int = 480, corner: int = 80) -> Grey:
    """A part of a larger board: what a camera sees that stands (dx, dy) off, so that the content moves by as much."""
    return np.ascontiguousarray(image[corner - dy : corner - dy + side, corner - dx : corner - dx + side])


BOARDS = {family: board(family) for family in list(FAMILIES)[:4]}


@pytest.mark.parametrize("family", BOARDS)
@pytest.mark.parametrize(("dx", "dy"), [(0, 0), (1, -1), (5, 9), (-10, 3), (-16, 16), (16, 0), (0, -16), (13, -14)])
def test_a_known_shift_is_found_exactly(family: str, dx: int, dy: int) -> None:
    test = window(BOARDS[family], dx, dy)
    rng = np.random.default_rng(7)
    with_defects, boxes, _ = add_defects(test, rng, 4)
    moved, found = register(with_defects, window(BOARDS[family], 0, 0))
    assert (found.dx, found.dy) == (dx, dy)
    # what is left are the defects themselves: the moved template is the clean tested image
    rest = cv2.bitwise_xor(moved, test)
    for x1, y1, x2, y2 in boxes.astype(int):  # but at the rim it is the tested image, defects and all
        rest[y1:y2, x1:x2] = 0
    assert not rest.any()
    assert found.residual == np.count_nonzero(moved != with_defects) / with_defects.size


def test_the_search_ends_at_its_reach() -> None:
    image = BOARDS[next(iter(BOARDS))]
    _, found = register(window(image, 40, 0), window(image, 0, 0))
    assert max(abs(found.dx), abs(found.dy)) <= MAX_SHIFT
    assert found.residual > 0.02


@pytest.mark.parametrize("family", BOARDS)
@pytest.mark.parametrize(("turn", "stretch"), [(0.008, 0.0), (0.0, 0.01)], ids=["turn", "stretch"])
def test_a_slight_turn_or_stretch_is_followed_by_tiles(family: str, turn: float, stretch: float) -> None:
    template = BOARDS[family]
    matrix = np.array([[1 + stretch, -turn, 320 * (turn - stretch)], [turn, 1 - stretch, 320 * (stretch - turn)]])
    test = binarise(cv2.warpAffine(template, matrix, (640, 640), borderMode=cv2.BORDER_REPLICATE))
    moved, found = register(test, template)
    shifted = np.roll(template, (found.dy, found.dx), (0, 1))  # the best that a translation alone gives
    inner = np.s_[20:-20, 20:-20]
    assert found.warped
    assert np.count_nonzero(moved[inner] != test[inner]) < 0.4 * np.count_nonzero(shifted[inner] != test[inner])
    left, alone = (sum(np.count_nonzero(p[inner]) for p in differences(test, against)) for against in (moved, shifted))
    assert left < 0.3 * alone


def test_a_defect_at_the_rim_does_not_push_the_template_aside() -> None:
    template = np.full((320, 320), 255, np.uint8)
    template[:, 150:170] = 0  # along this trace any shift fits
    test = template.copy()
    test[305:320, 40:80] = 0
    moved, found = register(test, template)
    assert (found.dx, found.dy) == (0, 0) and (moved == template).all()


def test_identical_images_differ_nowhere() -> None:
    for image in BOARDS.values():
        moved, found = register(image, image)
        assert (found.dx, found.dy, found.residual, found.warped) == (0, 0, 0.0, False)
        assert (moved == image).all()
        planes = stack(image, moved)
        assert planes.shape == (4, 640, 640) and planes.dtype == np.uint8
        assert not planes[2:].any()


@pytest.mark.parametrize("side", [1, 2, 5, 17, 40])
def test_an_image_of_a_few_pixels_is_compared_too(side: int) -> None:
    rng = np.random.default_rng(side)
    test, template = (np.where(rng.random((side, 2 * side)) < 0.5, 0, 255).astype(np.uint8) for _ in range(2))
    moved, found = register(test, template)
    assert moved.shape == test.shape and 0 <= found.residual <= 1


def test_gain_and_loss_are_the_changed_copper_less_a_rim_of_one_pixel() -> None:
    template = np.full((60, 80), 255, np.uint8)
    template[20:40, :] = 0  # a trace, rows 20 to 39
    test = template.copy()
    test[5:12, 10:30] = 0  # copper gained on bare board
    test[24:35, 50:62] = 255  # copper lost within the trace
    gain, loss = differences(test, template)
    expected_gain, expected_loss = np.zeros_like(test), np.zeros_like(test)
    expected_gain[5:12, 10:30] = 255
    expected_loss[24:35, 50:62] = 255
    assert (gain == expected_gain).all() and (loss == expected_loss).all()


def test_a_difference_at_an_edge_loses_its_first_pixel() -> None:
    template = np.full((60, 80), 255, np.uint8)
    template[20:40, :] = 0
    test = template.copy()
    test[14:20, 10:18] = 0  # a spur grown from the upper edge, 6 px high
    test[34:40, 40:48] = 255  # a mousebite from the lower edge, 6 px deep
    gain, loss = differences(test, template)
    expected_gain, expected_loss = np.zeros_like(test), np.zeros_like(test)
    expected_gain[14:19, 10:18] = 255  # row 19 touches the trace
    expected_loss[34:39, 40:48] = 255  # row 39 touches bare board
    assert (gain == expected_gain).all() and (loss == expected_loss).all()


@pytest.mark.parametrize("change", [cv2.erode, cv2.dilate])
def test_one_pixel_of_etching_is_tolerated_and_two_are_not(change: object) -> None:
    template = np.full((64, 64), 255, np.uint8)
    template[10:50, 22:40] = 0
    for times, differs in ((1, False), (2, True)):
        test = change(template, KERNEL, iterations=times)  # type: ignore[operator]
        assert any(plane.any() for plane in differences(test, template)) == differs


def test_a_border_that_only_one_image_shows_is_no_difference() -> None:
    template = np.full((160, 160), 255, np.uint8)
    cv2.rectangle(template, (40, 50), (110, 100), 0, 3)
    cv2.circle(template, (60, 75), 9, 0, -1)
    test = np.roll(template, (6, -9), (0, 1))
    test[:6] = 0  # copper that the template does not reach
    test[:, -9:] = 0
    moved, found = register(test, template)
    assert (found.dx, found.dy, found.residual) == (-9, 6, 0.0)
    assert (moved == test).all()


def test_a_binary_image_is_cut_in_the_middle_and_a_photograph_at_otsus_level() -> None:
    binary = np.array([[0, 20, 127, 128, 240, 255]], np.uint8).repeat(8, 1).repeat(64, 0)
    binary[:, 16:32] = np.where(np.arange(16) % 8 == 0, 0, binary[:, 16:32])  # the sampled columns are black and white
    assert level(binary) == 127
    assert binarise(binary)[0, ::8].tolist() == [0, 0, 0, 0, 255, 255]
    assert binarise(np.array([[127, 128]], np.uint8)[:, :1].repeat(9, 0), 127).max() == 0
    rng = np.random.default_rng(0)
    truth = next(iter(BOARDS.values()))
    photograph = (np.where(truth > 0, 120, 60) + rng.normal(0, 6, truth.shape)).clip(0, 255).astype(np.uint8)
    reference = int(cv2.threshold(photograph, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)[0])
    assert level(photograph) == reference and 70 < reference < 110
    assert np.mean(binarise(photograph) != truth) < 0.001
