"""Scans of any size: every pixel has one owner, a defect is reported once and whole, memory stays that of a tile."""

from __future__ import annotations

import tracemalloc

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kits.pcb_inspection.model.inspector import OVERLAP, TILE, inspect, spans, tile_count
from kits.pcb_inspection.model.pair import Grey

LOSS, GAIN = 0, 1


class Marker(nn.Module):
    """A perfect detector: the bounding box of every connected piece of copper gained (class 1) or lost (class 0)."""

    def __init__(self, confidence: float = 5.0) -> None:
        super().__init__()
        self.confidence = confidence

    def forward(self, planes: Tensor) -> tuple[Tensor, Tensor]:
        assert planes.shape == (1, 4, TILE, TILE)
        logits, distances = torch.full((1, 6, 80, 80), -9.0), torch.zeros(1, 4, 80, 80)
        for label, plane in ((GAIN, 2), (LOSS, 3)):
            mask = (planes[0, plane].numpy() > 0.5).astype(np.uint8)
            for x, y, width, height, _ in cv2.connectedComponentsWithStats(mask)[2][1:].tolist():
                column, row = int(x + width / 2) // 8, int(y + height / 2) // 8
                cx, cy = 8 * column + 4, 8 * row + 4
                sides = torch.tensor([cx - x, cy - y, x + width - cx, y + height - cy], dtype=torch.float32)
                logits[0, label, row, column] = self.confidence
                distances[0, :, row, column] = (sides.clamp(min=0.2) / 8).log()
        return logits, distances


def board(height: int, width: int) -> Grey:
    """Bare board with a sparse grid of traces, so that a tile can be registered."""
    image = np.full((height, width), 255, np.uint8)
    for x in range(37, width, 211):
        image[:, x : x + 10] = 0
    for y in range(61, height, 307):
        image[y : y + 10] = 0
    return image


def free_places(template: Grey, places: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Places whose square, with a margin, is bare board."""
    return [(x, y) for x, y in places if template[y - 3 : y + size + 3, x - 3 : x + size + 3].min() == 255]


@pytest.mark.parametrize("length", [1, 31, 639, 640, 641, 700, 831, 832, 833, 1088, 1280, 4000, 4321, 16000, 16384])
@pytest.mark.parametrize("scale", [1.0, 0.5, 2.0, 0.96])
def test_every_pixel_has_one_owner_well_inside_its_tile(length: int, scale: float) -> None:
    parts = list(spans(length, scale))
    tile, overlap = int(TILE / scale), int(OVERLAP / scale)
    owners = np.zeros(length, int)
    x = np.arange(length) + 0.5
    for start, end, (low, high) in parts:
        assert 0 <= start < end <= length and end - start == min(length, tile)
        mine = (x >= low) & (x < high)
        owners += mine
        assert (x[mine] > start).all() and (x[mine] < end).all()
        if start > 0:
            assert low - start >= overlap / 2 - 1
        if end < length:
            assert end - high >= overlap / 2 - 1
    assert (owners == 1).all()
    assert len(parts) <= max(1, -(-(length - overlap) // (tile - overlap)))
    assert tile_count(length, 100, scale) == len(parts)


@pytest.fixture(scope="module")
def scan() -> tuple[Grey, Grey, np.ndarray]:
    """(test, template, boxes): a 3500 x 3000 scan with copper on, beside and across every seam, corner and border."""
    height, width = 3000, 3500
    template = np.full((height, width), 255, np.uint8)
    rows = [0, *(int(owned[1]) for _, _, owned in list(spans(height))[:-1]), height]
    columns = [0, *(int(owned[1]) for _, _, owned in list(spans(width))[:-1]), width]
    assert len(rows) == 7 and len(columns) == 8
    rng = np.random.default_rng(0)
    boxes = []
    for number, (y, x) in enumerate((y, x) for y in rows for x in columns):
        # centred on the crossing of two seams, or 8, 9, 30 or 96 px (a tile's rim) off it
        w, h = (int(v) for v in rng.integers(16, 90, 2))
        dx, dy = ((0, 0), (8, -8), (-9, 9), (30, 96), (-96, -30), (96, 0), (0, -96))[number % 7]
        left, top = int(np.clip(x + dx - w // 2, 0, width - w)), int(np.clip(y + dy - h // 2, 0, height - h))
        boxes.append((left, top, left + w, top + h))
    for number, (a, b) in enumerate(
        zip(columns, columns[1:], strict=False)
    ):  # between crossings, on and near the seams
        y = rows[1 + number % 5] + (0, 5, -7, 40, 90)[number % 5]
        boxes.append(((a + b) // 2 - 20, y - 30, (a + b) // 2 + 20, y + 30))
    test = template.copy()
    for x1, y1, x2, y2 in boxes:
        test[y1:y2, x1:x2] = 0
    pieces = cv2.connectedComponents(255 - test)[0] - 1
    assert pieces == len(boxes) == 63
    return test, template, np.array(sorted(boxes), np.float32)


def test_defects_on_and_near_every_seam_are_reported_once_and_whole(scan: tuple[Grey, Grey, np.ndarray]) -> None:
    test, template, boxes = scan
    counted = []
    found = inspect(Marker(), test, template, on_tile=lambda: counted.append(1))
    assert len(counted) == tile_count(*test.shape) == len(found.registrations) == 42
    # to a hundredth of a pixel before they are put in order: 2e-6 sorts behind a 0
    got = np.array(sorted(found.detections[:, :4].round(2).tolist()), np.float32)
    assert got.shape == boxes.shape
    np.testing.assert_allclose(got, boxes, atol=0.01)
    assert set(found.detections[:, 5]) == {GAIN}


def test_copper_lost_is_told_from_copper_gained(scan: tuple[Grey, Grey, np.ndarray]) -> None:
    test, template, boxes = scan
    found = inspect(Marker(), 255 - test[:1100, :1500], 255 - template[:1100, :1500])  # holes in a plane of copper
    inside = boxes[(boxes[:, 2] < 1500) & (boxes[:, 3] < 1100)]
    assert len(inside) > 8 and set(found.detections[:, 5]) == {LOSS}
    missing = [b for b in inside.tolist() if np.abs(found.detections[:, :4] - b).max(1).min() > 0.01]
    assert not missing


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("offset", [0, -100, 60, 140])
@pytest.mark.parametrize("length", [129, 250, 400, 520, 1100])
def test_a_defect_longer_than_the_overlap_is_joined_across_seams(length: int, offset: int, across: bool) -> None:
    width = 1700
    template = np.full((600, width), 255, np.uint8)
    seam = int(next(spans(width))[2][1])
    start = max(2, seam + offset - length // 2)
    test = template.copy()
    test[300:318, start : start + length] = 0
    test[100:120, seam - 10 : seam + 10] = 0  # another beside it
    test[340:350, seam - 150 : seam - 140] = 0  # and one not far below
    expected = [[start, 300, start + length, 318], [seam - 10, 100, seam + 10, 120], [seam - 150, 340, seam - 140, 350]]
    if across:
        test, template, expected = test.T.copy(), template.T.copy(), [[b[1], b[0], b[3], b[2]] for b in expected]
    found = inspect(Marker(), test, template).detections[:, :4]
    np.testing.assert_allclose(sorted(found.tolist()), sorted(expected), atol=0.01)


def test_a_long_diagonal_defect_through_a_corner_of_four_tiles_is_one() -> None:
    template = np.full((1088, 1088), 255, np.uint8)
    seam = int(next(spans(1088))[2][1])
    test = template.copy()
    cv2.line(test, (seam - 210, seam - 190), (seam + 200, seam + 180), 0, 9)
    ys, xs = np.nonzero(test == 0)
    box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    found = inspect(Marker(), test, template).detections
    np.testing.assert_allclose(found[:, :4], [box], atol=0.01)


def test_two_defects_of_other_classes_at_a_seam_stay_two() -> None:
    template = np.full((640, 1088), 255, np.uint8)
    template[200:400] = 0
    test = template.copy()
    seam = int(next(spans(1088))[2][1])
    test[150:170, seam - 200 : seam + 200] = 0
    test[300:320, seam - 200 : seam + 200] = 255
    found = inspect(Marker(), test, template).detections
    expected = [[seam - 200, 150, seam + 200, 170, GAIN], [seam - 200, 300, seam + 200, 320, LOSS]]
    np.testing.assert_allclose(sorted(found[:, [0, 1, 2, 3, 5]].tolist()), sorted(expected), atol=0.01)


def test_a_part_seen_better_than_the_whole_keeps_its_confidence() -> None:
    class Doubting(Marker):
        """Sees the left tile with confidence 0.99 and every later one with 0.02."""

        def forward(self, planes: Tensor) -> tuple[Tensor, Tensor]:
            result = super().forward(planes)
            self.confidence = float(torch.logit(torch.tensor(0.02)))
            return result

    template = np.full((640, 1088), 255, np.uint8)
    seam = int(next(spans(1088))[2][1])
    test = template.copy()
    test[150:170, seam - 110 : seam + 180] = 0
    found = inspect(Doubting(confidence=float(torch.logit(torch.tensor(0.99)))), test, template).detections
    np.testing.assert_allclose(found, [[seam - 110, 150, seam + 180, 170, 0.99, GAIN]], atol=0.01)


@pytest.mark.parametrize(("height", "width"), [(640, 640), (333, 517), (90, 50), (17, 2000), (650, 20), (8, 8), (1, 1)])
def test_sizes_below_a_tile_and_odd_ones_are_padded(height: int, width: int) -> None:
    template = np.full((height, width), 255, np.uint8)
    test = template.copy()
    box = [width // 3, height // 4, max(width // 3 + 1, min(width // 3 + 40, width)), max(1, height // 2)]
    test[box[1] : box[3], box[0] : box[2]] = 0
    found = inspect(Marker(), test, template).detections
    expected = [[*box, 1 / (1 + np.exp(-5)), GAIN]]
    # the marker's distances end at 0.2 px, so it widens a thin box
    np.testing.assert_allclose(found, expected, atol=0.01 if min(height, width) > 17 else 0.3)


def test_a_clean_scan_gives_nothing_and_detections_come_best_first(scan: tuple[Grey, Grey, np.ndarray]) -> None:
    template = board(900, 1200)
    found = inspect(Marker(), template, template)
    assert found.detections.shape == (0, 6) and found.residual == 0
    test = template.copy()
    (place,) = free_places(template, [(500, 200)], 60)
    test[place[1] : place[1] + 60, place[0] : place[0] + 60] = 0
    scores = inspect(Marker(), test, template).detections[:, 4]
    assert len(scores) == 1 and (np.diff(scores) <= 0).all()


@pytest.mark.parametrize("scale", [0.5, 0.48, 2.0])
def test_another_resolution_gives_boxes_in_the_images_own_pixels(scale: float) -> None:
    height, width = (1500, 2900) if scale < 1 else (500, 700)
    template = board(height, width)
    test = template.copy()
    size = 60 if scale < 1 else 24
    edge = int(next(spans(width, scale))[2][1])  # a seam
    steps = [
        (x, y)
        for y in range(5, height - size - 4, 3 * size)
        for x in (edge - size // 2, edge + 40, 5, width - size - 4)
    ]
    places = free_places(template, steps, size)
    assert len(places) >= 8
    for x, y in places:
        test[y : y + size, x : x + size] = 0
    found = inspect(Marker(), test, template, scale=scale)
    assert len(found.registrations) == tile_count(height, width, scale) > 1
    expected = sorted([x, y, x + size, y + size] for x, y in places)
    # a pixel of the network is 1 / scale pixels of the image
    np.testing.assert_allclose(sorted(found.detections[:, :4].tolist()), expected, atol=1.01 / scale + 0.5)


def test_a_grey_scan_is_cut_at_one_level_also_where_a_tile_is_bare() -> None:
    rng = np.random.default_rng(0)
    template = np.full((640, 1600), 190, np.uint8)
    template[:, 40:300] = 60  # copper in the first tile alone
    noisy = [(template + rng.normal(0, 5, template.shape)).clip(0, 255).astype(np.uint8) for _ in range(2)]
    noisy[0][300:340, 1400:1440] = 60
    found = inspect(Marker(), *noisy)
    np.testing.assert_allclose(found.detections[:, :4], [[1400, 300, 1440, 340]], atol=0.01)
    assert found.residual < 0.01


def test_memory_beyond_the_images_is_that_of_a_tile() -> None:
    def peak(height: int, width: int, scale: float) -> int:
        template = board(height, width)
        test = template.copy()
        test[height // 2 : height // 2 + 40, width // 2 + 13 : width // 2 + 53] = 0
        tracemalloc.start()
        try:
            inspect(Marker(), test, template, scale=scale)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small, large = peak(700, 700, 1.0), peak(1800, 2600, 1.0)
    assert small > 640 * 640 * 4 * 4  # the network's input alone: the measurement sees the arrays
    assert large < small + 600_000  # one image has 4.7 MB
    assert peak(1800, 2600, 0.5) < small + 600_000
