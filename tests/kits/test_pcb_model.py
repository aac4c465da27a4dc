"""The detector: shapes, assignment and loss against references, decoding against a hand-made output."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision import ops

from kits.pcb_inspection import training
from kits.pcb_inspection.acceptance import GATES
from kits.pcb_inspection.data.augment import Ready
from kits.pcb_inspection.model.decode import MOST, OVERLAP, decode
from kits.pcb_inspection.model.design import Design
from kits.pcb_inspection.model.inspector import pad
from kits.pcb_inspection.model.loss import TOP_CELLS, assign, centres, detection_loss, giou, to_boxes
from kits.pcb_inspection.model.network import PRIOR, STRIDE, PairDetector
from kits.pcb_inspection.model.pair import stack


def boxes_at_random(count: int, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=rng) * 100
    return torch.cat((corners, corners + 2 + torch.rand(count, 2, generator=rng) * 60), 1)


def nothing() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)


def test_outputs_have_the_shapes_and_the_prior_they_state() -> None:
    model = PairDetector().eval()
    with torch.inference_mode():
        logits, distances = model(torch.rand(2, 4, 64, 96))
    assert logits.shape == (2, 6, 8, 12) and distances.shape == (2, 4, 8, 12)
    assert torch.isfinite(logits).all() and torch.isfinite(distances).all()
    bias = model.classes.bias.sigmoid()
    torch.testing.assert_close(bias, torch.full_like(bias, PRIOR))


def test_the_network_keeps_the_gate_on_parameters() -> None:
    count = sum(p.numel() for p in PairDetector().parameters())
    (gate,) = [g for g in GATES if g.figure == "parameters"]
    assert gate.bound == "<= 2.8e6" and count <= 2.8e6
    assert sum(p.numel() for p in PairDetector(Design((16, 32, 48, 64), head=32)).parameters()) < count / 3


def test_giou_is_torchvisions() -> None:
    a, b = boxes_at_random(40), boxes_at_random(30, seed=1)
    iou, generalised = giou(a[:, None], b[None])
    torch.testing.assert_close(iou, ops.box_iou(a, b))
    torch.testing.assert_close(generalised, ops.generalized_box_iou(a, b))
    assert (generalised < 0).any()  # boxes that do not touch are among them


def test_distances_become_boxes_and_back() -> None:
    points = centres(3, 4, torch.device("cpu"))
    assert points[:5].tolist() == [[4, 4], [12, 4], [20, 4], [28, 4], [4, 12]]
    sides = torch.tensor([[1.0, 2.0, 4.0, 8.0]]).expand(12, 4)
    boxes = to_boxes(points, sides.log())
    torch.testing.assert_close(boxes[5], torch.tensor([12 - 8.0, 12 - 16.0, 12 + 32.0, 12 + 64.0]))


@pytest.fixture
def grid() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(points, boxes, scores) of 16 x 16 cells that all predict 32 px boxes and 0.1 for every class."""
    points = centres(16, 16, torch.device("cpu"))
    return points, to_boxes(points, torch.full((256, 4), float(np.log(2.0)))), torch.full((256, 6), 0.1)


def test_every_box_gets_cells_and_its_best_has_quality_one(grid: tuple[torch.Tensor, ...]) -> None:
    points, boxes, scores = grid
    truth = torch.tensor(
        [[10, 10, 42, 42], [70, 20, 72, 24], [61, 100, 125, 103], [8, 90, 48, 126]], dtype=torch.float32
    )
    labels = torch.tensor([0, 1, 2, 3])
    cells, owners, quality = assign(scores, boxes, points, truth, labels)
    assert set(owners.tolist()) == {0, 1, 2, 3} and len(set(cells.tolist())) == len(cells)
    for box in range(4):
        mine = owners == box
        assert 1 <= mine.sum() <= TOP_CELLS
        assert quality[mine].max() == 1 and quality[mine].min() > 0
    # the cell that learns best is the one whose prediction fits best: its centre is nearest to the box's
    best = cells[owners == 0][quality[owners == 0].argmax()]
    assert (points[best] - torch.tensor([26.0, 26.0])).abs().max() <= 4
    # a box in which no centre of a cell lies is learnt by the nearest cell, and by no other
    assert points[cells[owners == 1]].tolist() == [[68.0, 20.0]]
    # cells outside their box learn nothing
    for cell, owner in zip(cells.tolist(), owners.tolist(), strict=True):
        if owner in (0, 3):
            x, y = points[cell].tolist()
            assert truth[owner, 0] < x < truth[owner, 2] and truth[owner, 1] < y < truth[owner, 3]


def test_a_confident_cell_is_preferred_and_a_contested_one_goes_where_it_fits_better(
    grid: tuple[torch.Tensor, ...],
) -> None:
    points, boxes, scores = grid
    alone = torch.tensor([[24.0, 24.0, 56.0, 56.0]])  # centre (40, 40) lies between four cells
    label = torch.tensor([4])
    scores[4 * 16 + 5, 4] = 0.9  # the cell at (44, 36)
    cells, _, quality = assign(scores, boxes, points, alone, label)
    assert cells[quality.argmax()] == 4 * 16 + 5
    torch.testing.assert_close(quality[cells == 4 * 16 + 4], torch.tensor([(0.1 / 0.9) ** 0.5]))

    twins = torch.tensor([[28.0, 20.0, 60.0, 52.0], [24.0, 24.0, 96.0, 96.0]])
    cells, owners, _ = assign(torch.full((256, 6), 0.1), boxes, points, twins, torch.tensor([0, 1]))
    assert owners[cells == 4 * 16 + 5].tolist() == [0]  # its 32 px box is the first one's, to the pixel
    assert set(owners.tolist()) == {0, 1}


def test_the_loss_is_least_where_the_prediction_is_right_and_finite_without_truths() -> None:
    truth, label = torch.tensor([[20.0, 12.0, 52.0, 44.0]]), torch.tensor([2])
    logits, distances = torch.full((1, 6, 8, 8), -12.0), torch.zeros(1, 4, 8, 8)
    points = centres(8, 8, torch.device("cpu"))
    sides = torch.cat((points - truth[:, :2], truth[:, 2:] - points), -1).clamp(min=1) / STRIDE
    distances[0] = sides.log().T.reshape(4, 8, 8)
    wrong = detection_loss(logits, distances, [(truth, label)])
    cells, _, quality = assign(
        logits[0].flatten(1).T.sigmoid(), to_boxes(points, distances[0].flatten(1).T), points, truth, label
    )
    right = logits.clone()
    right[0, 2].view(-1)[cells] = torch.logit(quality.clamp(1e-5, 1 - 1e-5))
    found = detection_loss(right, distances, [(truth, label)])
    shifted = detection_loss(right, distances + 0.3, [(truth, label)])
    assert 0 <= found < 0.25 * wrong and found < shifted
    empty = detection_loss(logits, distances, [nothing()])
    assert torch.isfinite(empty) and 0 <= empty < 1e-6
    assert detection_loss(torch.zeros_like(logits), distances, [nothing()]) > 10  # 384 cells at 0.5: ln 2 / 4 each
    torch.testing.assert_close(
        detection_loss(torch.zeros_like(logits), distances, [nothing()]),
        torch.tensor(384 * np.log(2) / 4, dtype=torch.float32),
    )


def test_a_tiny_set_is_learnt() -> None:
    template = np.full((64, 64), 255, np.uint8)
    template[:, 30:38] = 0
    test = template.copy()
    test[12:28, 8:24] = 0
    test[44:56, 30:38] = 255
    truths = [
        (np.array([[8, 12, 24, 28], [30, 44, 38, 56]], np.float32), np.array([4, 0])),
        (np.zeros((0, 4), np.float32), np.zeros(0, np.int64)),
    ]
    batch = training.collate([stack(test, template), stack(template, template)], truths)
    model = PairDetector(Design((8, 16, 16, 16), head=16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        loss = training.loss(model.train(), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all() and np.mean(losses[-5:]) < 0.15 * losses[0]
    with torch.inference_mode():
        logits, distances = model(batch["images"])
    found = decode(logits[0].numpy(), distances[0].numpy())[:2]
    found = found[found[:, 5].argsort()]
    assert found[:, 5].tolist() == [0, 4]
    assert (ops.box_iou(torch.tensor(found[:, :4]), torch.tensor(truths[0][0][::-1].copy())).diagonal() > 0.6).all()
    assert not (decode(logits[1].numpy(), distances[1].numpy())[:, 4] > 0.3).any()


def empty_output() -> tuple[np.ndarray, np.ndarray]:
    return np.full((6, 10, 20), -9.0, np.float32), np.zeros((4, 10, 20), np.float32)


def put(
    output: tuple[np.ndarray, np.ndarray], row: int, column: int, label: int, score: float, box: list[float]
) -> None:
    x, y = column * 8 + 4, row * 8 + 4
    output[0][label, row, column] = np.log(score / (1 - score))
    output[1][:, row, column] = np.log(np.array([x - box[0], y - box[1], box[2] - x, box[3] - y]) / 8)


def test_decoding_inverts_a_hand_made_output() -> None:
    output = empty_output()
    expected = [[100, 20, 130, 60, 0.9, 5], [3, 2, 30, 25, 0.6, 1], [40.5, 50.25, 60, 78, 0.3, 0]]
    put(output, 5, 14, 5, 0.9, expected[0][:4])
    put(output, 1, 1, 1, 0.6, expected[1][:4])
    put(output, 7, 6, 0, 0.3, expected[2][:4])
    put(output, 9, 19, 3, 0.005, [140, 60, 158, 79])  # below the floor
    np.testing.assert_allclose(decode(*output), expected, rtol=1e-5)
    np.testing.assert_allclose(decode(*output, floor=0.5), expected[:2], rtol=1e-5)
    assert decode(*empty_output()).shape == (0, 6)
    put(output, 0, 0, 2, 0.95, [-20, -20, 10, 10])
    np.testing.assert_allclose(decode(*output)[0], [0, 0, 10, 10, 0.95, 2], rtol=1e-5)


def test_suppression_is_blind_to_the_class_and_bounded() -> None:
    output = empty_output()
    put(output, 5, 10, 0, 0.9, [70, 30, 100, 60])
    put(output, 5, 11, 1, 0.8, [72, 30, 102, 60])  # IoU 28 / 32 of another class
    put(output, 4, 10, 2, 0.7, [70, 30, 100, 43])  # 13 / 30 = 0.43 goes, 0.4 is the limit
    put(output, 6, 10, 3, 0.6, [70, 49, 100, 60])  # 11 / 30 = 0.37 stays
    assert OVERLAP == 0.4
    assert decode(*output)[:, 5].tolist() == [0, 3]
    logits, distances = np.full((6, 80, 80), 3.0, np.float32), np.full((4, 80, 80), np.log(0.45), np.float32)
    assert len(decode(logits, distances)) == MOST  # 6400 boxes that do not touch


def test_boards_of_other_sizes_are_padded_to_the_strides() -> None:
    test = np.full((70, 100), 255, np.uint8)
    small = Ready("a", "g", test, test, np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    large = Ready(
        "b",
        "g",
        np.zeros((96, 40), np.uint8),
        np.zeros((96, 40), np.uint8),
        np.array([[1, 2, 30, 40]], np.float32),
        np.array([1]),
    )
    (batch,) = training.whole_batches([small, large], 2)
    assert batch["images"].shape == (2, 4, 96, 128)
    assert batch["images"][0, :2].min() == 1 and batch["images"][0, 2:].max() == 0
    assert batch["images"][1, 0, :, :40].max() == 0 and batch["images"][1, 0, :, 40:].min() == 1
    assert batch["truths"][1][0].tolist() == [[1, 2, 30, 40]]
    found = training.detections(PairDetector(), [small, large])
    assert found["a"].shape[1] == 6 and set(found) == {"a", "b"}
    planes = stack(test, test)
    assert pad(planes, 70, 100) is planes
