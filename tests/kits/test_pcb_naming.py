"""Names of defects by what they do to pieces of copper and board."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kits.pcb_inspection.data.boards import FAMILIES, draw_board, style
from kits.pcb_inspection.data.deeppcb import CLASSES
from kits.pcb_inspection.data.defects import add_defects
from kits.pcb_inspection.model.inspector import inspect
from kits.pcb_inspection.model.naming import FLOOR, STATES, counted, named, state_of, told
from kits.pcb_inspection.model.network import DUAL
from kits.pcb_inspection.model.pair import Grey, stack

SIDE = 96
OPEN, SHORT, MOUSEBITE, SPUR, COPPER, PIN_HOLE = range(6)
BOX = np.array([28, 32, 60, 60], np.float32)


def board(*copper: tuple[int, int, int, int]) -> Grey:
    """Bare board with rectangles of copper x1 y1 x2 y2."""
    image = np.full((SIDE, SIDE), 255, np.uint8)
    for x1, y1, x2, y2 in copper:
        image[y1:y2, x1:x2] = 0
    return image


def with_patch(image: Grey, x1: int, y1: int, x2: int, y2: int, value: int) -> Grey:
    image = image.copy()
    image[y1:y2, x1:x2] = value
    return image


TRACES = board((0, 40, SIDE, 48), (0, 52, SIDE, 58))
"""Two traces side by side, from one side of the board to the other."""
POUR = board((0, 0, SIDE, SIDE))
CORNER = board((40, 20, SIDE, 52))
"""The corner of a pad: a cut across it leaves a piece, and joins no two parts of the board."""
EXAMPLES = {
    "open": (TRACES, (40, 38, 46, 50, 255), OPEN),
    "short": (TRACES, (40, 46, 46, 54, 0), SHORT),
    "mousebite": (TRACES, (40, 38, 46, 44, 255), MOUSEBITE),
    "spur": (TRACES, (40, 36, 46, 42, 0), SPUR),
    "pin-hole": (POUR, (40, 44, 46, 50, 255), PIN_HOLE),
    "copper": (board(), (40, 44, 46, 50, 0), COPPER),
}


@pytest.fixture(scope="module")
def names() -> Any:
    """Counted on boards of the generator."""
    rng = np.random.default_rng(3)
    boards = []
    for index in range(8):
        copper = draw_board(style(list(FAMILIES)[index % len(FAMILIES)], rng), rng)
        template = np.where(copper > 0, 0, 255).astype(np.uint8)
        test, boxes, labels = add_defects(template, rng, 12)
        boards.append((stack(test, template), boxes, labels))
    return counted(boards)


@pytest.mark.parametrize("name", EXAMPLES)
def test_pieces_tell_the_name(names: Any, name: str) -> None:
    template, patch, label = EXAMPLES[name]
    planes = stack(with_patch(template, *patch), template)
    assert int(np.asarray(names)[state_of(planes, BOX)].argmax()) == label == CLASSES.index(name)
    other = stack(255 - planes[0], 255 - planes[1])
    assert int(np.asarray(names)[state_of(other, BOX)].argmax()) == DUAL[label], "its dual, copper and board changed"


def test_a_cut_across_a_corner_is_an_open_and_a_bite_out_of_it_none(names: Any) -> None:
    bite = with_patch(CORNER, 40, 44, 48, 52, 255)
    slit = np.array([36, 20, 62, 56], np.float32)
    cut = CORNER.copy()
    for step in range(24):
        cut[28 + step : 32 + step, 38 + step : 42 + step] = 255
    told = [int(np.asarray(names)[state_of(stack(image, CORNER), slit)].argmax()) for image in (cut, bite)]
    assert told == [OPEN, MOUSEBITE]


def test_where_nothing_differs_and_beyond_the_image_there_is_a_state_too() -> None:
    planes = stack(TRACES, TRACES)
    assert state_of(planes, BOX) == STATES - 1
    spoiled = stack(with_patch(TRACES, 0, 38, 6, 50, 255), TRACES)
    assert state_of(spoiled, np.array([-9, 30, 12, 56], np.float32)) < 5
    assert state_of(spoiled, np.array([200, 200, 220, 220], np.float32)) == STATES - 1


def test_probabilities_are_counted_with_every_defect_as_its_dual_too() -> None:
    template, patch, label = EXAMPLES["open"]
    planes = stack(with_patch(template, *patch), template)
    table = np.exp(np.asarray(counted([(planes, BOX[None], np.array([label]))])))
    assert table.shape == (STATES, 6)
    np.testing.assert_allclose(table.sum(0), 1, atol=0.01)
    state = state_of(planes, BOX)
    assert table[state, OPEN] == table[(state + 5) % 10, SHORT] > 2.5 * table[state, SPUR]


def test_a_doubtful_name_is_corrected_and_a_sure_one_kept(names: Any) -> None:
    template, patch, _ = EXAMPLES["open"]
    planes = stack(with_patch(template, *patch), template)
    found = np.array([[*BOX, 0.9, MOUSEBITE]] * 3 + [[*BOX, FLOOR / 2, MOUSEBITE]], np.float32)
    logits = np.full((4, 6), -5.0, np.float32)
    logits[:, MOUSEBITE] = 2.2
    logits[[0, 3], OPEN] = 1.5
    logits[1, OPEN] = -1.0  # the network is sure
    logits[2, SPUR] = 2.0  # which no pieces speak for
    result = named(found, logits, planes, names)
    assert result[:, 5].tolist() == [OPEN, MOUSEBITE, MOUSEBITE, MOUSEBITE]
    np.testing.assert_array_equal(result[:, :5], found[:, :5])
    assert found[0, 5] == MOUSEBITE, "what was given stays as it was"
    assert named(found[:0], logits[:0], planes, names).shape == (0, 6)


class Fixed(nn.Module):
    """Says of the cell in the middle of BOX that it is a mousebite, and maybe an open."""

    def forward(self, planes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = torch.full((1, 6, planes.shape[2] // 8, planes.shape[3] // 8), -9.0)
        logits[0, MOUSEBITE, 5, 5], logits[0, OPEN, 5, 5] = 2.2, 1.5
        return logits, torch.zeros(1, 4, *logits.shape[2:]) + 0.4


def test_an_inspection_names_by_what_it_is_given(names: Any) -> None:
    template, patch, _ = EXAMPLES["open"]
    test = with_patch(template, *patch)
    assert inspect(Fixed(), test, template).detections[0, 5] == MOUSEBITE
    assert inspect(Fixed(), test, template, names=names).detections[0, 5] == OPEN


@pytest.mark.real_data
def test_pieces_alone_name_real_defects(deeppcb: Path) -> None:
    from kits.pcb_inspection import KIT
    from kits.pcb_inspection.data.augment import prepare

    def seen(name: str) -> list[tuple[Grey, Any, Any]]:
        pairs = prepare(KIT.dataset(deeppcb, name))
        return [(stack(p.test, p.template), p.boxes, p.labels) for p in pairs[::4]]

    names = counted(seen("train"))
    right = [
        told(planes, box, names).argmax() == label
        for planes, boxes, labels in seen("val")
        for box, label in zip(boxes, labels, strict=True)
    ]
    assert len(right) > 50 and np.mean(right) > 0.98
