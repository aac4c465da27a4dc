"""Matching, losses and denoising queries: closed forms, another library's sums, and a model that learns a scene."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from kits.bev_perception.model.boxes import detections, encode
from kits.bev_perception.model.denoising import Denoiser, Noise
from kits.bev_perception.model.detector import CODE_WEIGHTS, BEVFormer, Predictions, empty_memory, example_inputs
from kits.bev_perception.model.learner import Batch, Learner, View, features_in_bfloat16
from kits.bev_perception.model.loss import (
    IGNORED,
    MOVING,
    VELOCITY_WEIGHT,
    Targets,
    Truth,
    assigned_loss,
    focal,
    layer_loss,
    matched_loss,
)
from kits.bev_perception.model.matching import cost, match
from tests.kits.bev_models import MICRO

SQUARE = replace(MICRO, bev_w=10, rotate_center=(5.0, 5.0), num_query=20, max_num=20)
WEIGHTS = torch.tensor(CODE_WEIGHTS)


def scene(count: int, seed: int = 0) -> Truth:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(count, 9, generator=generator)
    low = torch.tensor([-40.0, -40, -1, 0.6, 0.8, 1.2, -3, -4, -4])
    high = torch.tensor([40.0, 40, 1, 2.5, 6.0, 3.0, 3, 4, 4])
    return Truth(low + (high - low) * drawn, torch.randint(0, 10, (count,), generator=generator))


def predictions(queries: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(queries, 10, generator=generator), 3 * torch.randn(queries, 10, generator=generator)


def test_cost_is_that_of_the_published_formula() -> None:
    scores, codes = predictions(3)
    truth = scene(2)
    wanted = encode(truth.boxes)
    found = cost(scores, codes, truth.labels, wanted)
    for o, g in itertools.product(range(3), range(2)):
        p = 1 / (1 + math.exp(-float(scores[o, truth.labels[g]])))
        positive, negative = 0.25 * (1 - p) ** 2 * -math.log(p), 0.75 * p**2 * -math.log(1 - p)
        distance = float((codes[o, :8] - wanted[g, :8]).abs().sum())
        assert float(found[o, g]) == pytest.approx(2.0 * (positive - negative) + 0.25 * distance, rel=1e-5)


def test_matching_is_the_cheapest_of_all_assignments() -> None:
    scores, codes = predictions(6)
    truth = scene(3)
    wanted = encode(truth.boxes)
    rows, columns = match(scores, codes, truth.labels, wanted)
    prices = cost(scores, codes, truth.labels, wanted)
    best = min(sum(float(prices[o, g]) for g, o in enumerate(way)) for way in itertools.permutations(range(6), 3))
    assert sorted(columns.tolist()) == [0, 1, 2]
    assert float(prices[rows, columns].sum()) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize(("queries", "boxes"), [(4, 0), (2, 5)])
def test_matching_without_boxes_and_with_more_than_queries(queries: int, boxes: int) -> None:
    truth = scene(boxes)
    rows, columns = match(*predictions(queries), truth.labels, encode(truth.boxes))
    assert len(rows) == len(columns) == min(queries, boxes)


def test_a_prediction_that_is_not_finite_is_matched_last() -> None:
    scores, codes = predictions(3)
    scores[1], codes[1] = torch.nan, torch.inf
    truth = scene(2)
    assert match(scores, codes, truth.labels, encode(truth.boxes))[0].tolist() == [0, 2]


def test_focal_loss_agrees_with_torchvision() -> None:
    scores, _ = predictions(7)
    labels = torch.tensor([3, 10, 0, 9, 10, IGNORED, 2])
    kept = labels != IGNORED
    wanted = torch.nn.functional.one_hot(labels[kept], 11)[:, :10].float()
    reference = sigmoid_focal_loss(scores[kept], wanted, alpha=0.25, gamma=2.0, reduction="sum")
    assert float(focal(scores, labels)) == pytest.approx(float(reference), rel=1e-5)


def test_layer_loss_counts_boxes_and_leaves_unknown_velocities_out() -> None:
    scores, codes = predictions(4)
    labels = torch.tensor([[2, 10, 5, IGNORED]])
    wanted = torch.zeros(1, 4, 10)
    wanted[0, 0, 8:] = torch.nan
    cls, box = layer_loss(scores[None], codes[None], Targets(labels, wanted), WEIGHTS)
    still = torch.cat((WEIGHTS[:8], VELOCITY_WEIGHT * WEIGHTS[8:]))
    apart = float(codes[0, :8].abs().sum() + (codes[2].abs() * still).sum())
    assert float(box) == pytest.approx(0.25 * apart / 2, rel=1e-5)
    assert float(cls) == pytest.approx(2.0 * float(focal(scores, labels[0])) / 2, rel=1e-5)


def test_nan_velocities_give_finite_gradients() -> None:
    codes = torch.randn(1, 2, 10, requires_grad=True)
    wanted = torch.full((1, 2, 10), torch.nan)
    _, box = layer_loss(torch.zeros(1, 2, 10), codes, Targets(torch.tensor([[1, 2]]), wanted), WEIGHTS)
    box.backward()
    assert box.item() == 0
    assert codes.grad is not None
    assert not codes.grad.any()


def test_perfect_predictions_cost_nothing_in_any_order() -> None:
    truth = scene(5)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(2))
    scores = torch.full((1, 1, 8, 10), -20.0)
    codes = torch.zeros(1, 1, 8, 10)
    scores[0, 0, order, truth.labels], codes[0, 0, order] = 20.0, encode(truth.boxes)
    parts = matched_loss(Predictions(scores, codes), [truth], WEIGHTS)
    assert sum(float(v) for v in parts.values()) == pytest.approx(0.0, abs=1e-5)
    worse = matched_loss(Predictions(scores, codes + 0.1), [truth], WEIGHTS)
    moving = float((1 + truth.boxes[:, 7:9].norm(dim=1) / MOVING).mean()) * VELOCITY_WEIGHT
    wanted = 0.25 * 0.1 * (sum(CODE_WEIGHTS[:8]) + moving * sum(CODE_WEIGHTS[8:]))
    assert float(worse["0.box"]) == pytest.approx(wanted, rel=1e-4)


def test_an_empty_scene_has_a_loss() -> None:
    scores, codes = (t[None, None] for t in predictions(4))
    parts = matched_loss(Predictions(scores, codes), [scene(0)], WEIGHTS)
    assert float(parts["0.box"]) == 0
    assert float(parts["0.cls"]) == pytest.approx(2.0 * float(focal(scores[0, 0], torch.full((4,), 10))), rel=1e-5)


def model(seed: int = 0) -> BEVFormer:
    torch.manual_seed(seed)
    return BEVFormer(SQUARE)


def test_denoising_queries_do_not_change_what_the_plain_ones_say() -> None:
    net = model().eval()
    denoiser, bev = Denoiser(SQUARE, Noise(groups=3)), torch.randn(2, 100, 32)
    head, truths = net.pts_bbox_head, [scene(4), scene(2, 1)]
    with torch.no_grad():
        extended, targets = denoiser(head.queries(bev), truths)
        found, plain = head.decode(bev, extended), head.decode(bev, head.queries(bev))
    T = targets.labels.shape[1]
    assert T == 12
    torch.testing.assert_close(found.cls_scores[:, :, T:], plain.cls_scores, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.bbox_preds[:, :, T:], plain.bbox_preds, rtol=1e-4, atol=1e-4)


def test_a_group_of_denoising_queries_does_not_see_another() -> None:
    net = model().eval()
    head, bev = net.pts_bbox_head, torch.randn(1, 100, 32)
    with torch.no_grad():
        extended, _ = Denoiser(SQUARE, Noise(groups=2))(head.queries(bev), [scene(3)])
        first = head.decode(bev, extended)
        extended.content[:, 3:6] += 5.0
        second = head.decode(bev, extended)
    torch.testing.assert_close(first.cls_scores[:, :, :3], second.cls_scores[:, :, :3], rtol=1e-4, atol=1e-4)
    assert (first.cls_scores[:, :, 3:6] - second.cls_scores[:, :, 3:6]).abs().max() > 0.01


def test_denoising_targets_are_the_boxes_that_were_disturbed() -> None:
    noise = Noise(groups=50, margin=0.5, split=0.7, flip=0.0)
    truths = [scene(4), scene(1, 3), scene(0)]
    queries = model().pts_bbox_head.queries(torch.zeros(3, 100, 32))
    extended, targets = Denoiser(SQUARE, noise)(queries, truths)
    assert targets.labels[2].eq(IGNORED).all()
    slots = targets.labels[1].view(50, 4)
    assert slots[:, 1:].eq(IGNORED).all()
    box, label = truths[0].boxes, truths[0].labels
    for group in range(50):
        chosen = targets.labels[0, group * 4 : group * 4 + 4]
        assert torch.equal(torch.where(chosen == 10, label, chosen), label)
        torch.testing.assert_close(targets.codes[0, group * 4 : group * 4 + 4], encode(box))
        low, extent = torch.tensor(SQUARE.pc_range[:3]), torch.tensor(SQUARE.extent)
        centre = extended.reference[0, group * 4 : group * 4 + 4] * extent + low
        reach = (((centre - box[:, :3]) / (box[:, 3:6] / 2 + 0.5)) ** 2).sum(-1).sqrt()
        assert (reach <= 1 + 1e-4).all()
        assert torch.equal(chosen == 10, reach > 0.7)
    rejected = float((targets.labels[0] == 10).float().mean())
    assert rejected == pytest.approx(0.3, abs=0.1)


def test_assigned_losses_ignore_empty_slots() -> None:
    scores, codes = (t[None, None] for t in predictions(3))
    empty = Targets(torch.full((1, 3), IGNORED), torch.zeros(1, 3, 10))
    assert all(float(v) == 0 for v in assigned_loss(Predictions(scores, codes), empty, WEIGHTS).values())


def view(count: int = 1, known: float = 0.0) -> View:
    inputs = example_inputs(SQUARE, count)
    return View(
        inputs["images"], inputs["lidar2img"], inputs["can_bus"], torch.full((count,), known), inputs["camera_mask"]
    )


def test_a_history_is_made_as_it_would_be_deployed() -> None:
    learner = Learner(model()).train()
    first, second = view(known=0.0), view(known=1.0)
    statistics = learner.detector.img_backbone.bn1.running_mean.clone()
    made = learner.remember(Batch(second, [scene(2)], past=(first,)))
    assert learner.detector.training
    assert not made.requires_grad
    assert torch.equal(learner.detector.img_backbone.bn1.running_mean, statistics)
    with torch.no_grad():
        wanted = learner.detector.eval().encode(
            first.images, first.lidar2img, first.can_bus, empty_memory(SQUARE), first.has_prev, first.camera_mask
        )
    torch.testing.assert_close(made, wanted)
    given = learner.remember(Batch(second, [scene(2)], prev_bev=made))
    assert given is made


def test_a_batch_with_an_empty_sample_trains() -> None:
    learner = Learner(model(), Noise(groups=2)).train()
    found = learner.losses(Batch(view(2), [scene(3), scene(0)]))
    found.total.backward()
    assert set(found.parts) == {f"{dn}{i}.{k}" for dn in ("", "dn.") for i in range(2) for k in ("cls", "box")}
    assert math.isfinite(found.total.item())
    grads = [p.grad for p in learner.parameters() if p.requires_grad and p.grad is not None]
    assert all(bool(g.isfinite().all()) for g in grads)
    nothing = learner.losses(Batch(view(1), [scene(0)]))
    assert set(nothing.parts) == {"0.cls", "0.box", "1.cls", "1.box"}


def test_features_in_bfloat16_are_those_of_the_network_and_learn_like_them() -> None:
    detector, images = model().eval(), view().images
    whole = detector.features(images)[0]
    fast = features_in_bfloat16(detector, images)[0]
    assert fast.dtype == torch.float32 and fast.shape == whole.shape
    assert float((fast - whole).detach().norm() / whole.detach().norm()) < 0.02, "bfloat16 has eight bits"
    grads = []
    for found in (whole, fast):
        detector.zero_grad()
        found.square().mean().backward()
        grads.append(detector.img_backbone.conv1.weight.grad.clone())  # type: ignore[union-attr]
    assert float((grads[1] - grads[0]).norm() / grads[0].norm()) < 0.05


@pytest.mark.parametrize("noise", [None, Noise(groups=2)], ids=["plain", "denoising"])
def test_a_micro_model_learns_one_scene(noise: Noise | None) -> None:
    torch.manual_seed(0)
    learner, truth = Learner(model(), noise).train(), scene(6)
    batch = Batch(view(), [truth])
    optimizer = torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad], lr=4e-3)
    plain: list[float] = []
    for _ in range(150):
        found = learner.losses(batch)
        plain.append(sum(v.item() for name, v in found.parts.items() if not name.startswith("dn.")))
        optimizer.zero_grad()
        found.total.backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 10.0)
        optimizer.step()
    assert np.mean(plain[-5:]) < 0.1 * plain[0], (plain[0], plain[-5:])
    with torch.no_grad():
        last = learner.detector.eval().pts_bbox_head
        bev = learner.encode(batch.view, empty_memory(SQUARE))
        said = last.decode(bev, last.queries(bev), last_only=True)
    best = detections(said.cls_scores[0, 0], said.bbox_preds[0, 0], SQUARE)
    near = torch.cdist(best.boxes[:6, :2], truth.boxes[:, :2]).argmin(1)
    assert sorted(near.tolist()) == list(range(6))
    assert best.labels[:6].tolist() == truth.labels[near].tolist()
    assert float((best.boxes[:6, :2] - truth.boxes[near, :2]).norm(dim=1).max()) < 2.0
