"""Training along streams: what lanes show, what a variation does to a scene, and the dense losses."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from core.train import Schedule
from kits.bev_perception.data import streams as data_streams
from kits.bev_perception.data.keyframes import Keyframe, in_scenes, keyframes, to_global
from kits.bev_perception.data.nuscenes import NuScenes
from kits.bev_perception.data.streams import AS_IT_IS, Shot, Variation, collate, streams, with_past
from kits.bev_perception.data.world import generate_world
from kits.bev_perception.model.configs import CLASSES
from kits.bev_perception.model.dense_loss import BIN_WEIGHT, SHAPE, PixelHead, cell_loss, covered, heat_loss, heatmap
from kits.bev_perception.model.detector import BEVFormer
from kits.bev_perception.model.geometry import shift
from kits.bev_perception.model.learner import Learner
from kits.bev_perception.model.lift import LENS, bin_of
from kits.bev_perception.model.loss import Truth, code_error, focal, rarity
from kits.bev_perception.model.proposals import FINE, Dense, Proposals
from kits.bev_perception.model.state import BevState
from kits.bev_perception.training import train_detector
from tests.kits.bev_models import MICRO

PROPOSING = replace(MICRO, proposals=True)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Keyframe]:
    root = tmp_path_factory.mktemp("world") / "set"
    generate_world(root, 2, 4, samples=4, size=(96, 54), paired="none", supersample=1, workers=1,
                   lidar_sweeps=False, quiet=True)  # fmt: skip
    data = NuScenes(root)
    return keyframes(data, data.split("all"))


def test_streams_show_every_frame_once_in_pieces_in_order(
    samples: list[Keyframe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_streams, "PIECE", 3)
    shown = [shot for (shot,) in streams(samples, 1, 0, train=True)]
    assert sorted(s.keyframe.token for s in shown) == sorted(sample.token for sample in samples)
    pieces: list[list[Shot]] = []
    for shot in shown:
        if shot.before is None:
            pieces.append([])
        pieces[-1].append(shot)
    assert len(pieces) >= 4 and max(map(len, pieces)) <= 3
    for piece in pieces:
        assert len({(s.keyframe.scene, s.variation) for s in piece}) == 1
        assert all(b.before == a.keyframe for a, b in zip(piece, piece[1:]))
    assert [s.keyframe.token for (s,) in streams(samples, 1, 0, train=True)] == [s.keyframe.token for s in shown]


def test_streams_as_they_are_show_whole_scenes(samples: list[Keyframe]) -> None:
    rows = list(streams(samples, 2, 0, train=False))
    for lane in zip(*rows, strict=True):
        assert [shot.keyframe.index for shot in lane] == [0, 1, 2, 3]
        assert lane[0].before is None and lane[2].before == lane[1].keyframe
        assert {shot.variation for shot in lane} == {AS_IT_IS}


def test_a_lane_that_runs_out_begins_another_scene(samples: list[Keyframe]) -> None:
    rows = list(streams(samples, 3, 0, train=True))
    assert all(len(row) == 3 for row in rows)
    assert {shot.keyframe.token for row in rows for shot in row} <= {sample.token for sample in samples}


@pytest.mark.parametrize(
    "variation",
    [Variation(mirror=True), Variation(turn=0.3), Variation(zoom=1.1), Variation(mirror=True, turn=-0.2, zoom=0.95)],
)
def test_a_variation_moves_boxes_and_cameras_alike(samples: list[Keyframe], variation: Variation) -> None:
    frame, before = samples[2], samples[1]
    wide = replace(MICRO, pc_range=(-500.0, -500.0, -50.0, 500.0, 500.0, 50.0))
    plain, (truth,) = collate([Shot(frame, before, AS_IT_IS)], wide)
    varied, (moved,) = collate([Shot(frame, before, variation)], wide)
    assert len(truth.labels) and torch.equal(truth.labels, moved.labels)
    width, height = MICRO.images.width, int(frame.views(MICRO.images).inner[0][0])
    order = (0, 2, 1, 3, 5, 4) if variation.mirror else range(6)

    def pixels(view_matrix: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        seen = torch.nn.functional.pad(boxes[:, :3], (0, 1), value=1.0) @ view_matrix.T
        return torch.stack((seen[:, 0] / seen[:, 2], seen[:, 1] / seen[:, 2], seen[:, 2]), 1)

    for place, camera in enumerate(order):
        was, now = pixels(plain.lidar2img[0, camera], truth.boxes), pixels(varied.lidar2img[0, place], moved.boxes)
        u = (was[:, 0] - width / 2) * variation.zoom * (-1 if variation.mirror else 1) + width / 2
        v = (was[:, 1] - height / 2) * variation.zoom + height / 2
        torch.testing.assert_close(now, torch.stack((u, v, was[:, 2]), 1), rtol=1e-3, atol=0.05)


@pytest.mark.parametrize("variation", [Variation(mirror=True), Variation(turn=0.3), Variation(mirror=True, turn=-0.2)])
def test_a_variation_moves_the_history_alike(samples: list[Keyframe], variation: Variation) -> None:
    square = (100.0, 100.0, 8.0)
    plain, _ = collate([Shot(samples[3], samples[2], AS_IT_IS)], MICRO)
    varied, _ = collate([Shot(samples[3], samples[2], variation)], MICRO)
    x, y = shift(plain.can_bus, square)[0]
    assert float(abs(x) + abs(y)) > 1e-4, "a car that stands tells nothing"
    x = -x if variation.mirror else x
    sin, cos = np.sin(variation.turn), np.cos(variation.turn)
    # the frame turns, so what lies in it turns back
    wanted = torch.stack((cos * x + sin * y, cos * y - sin * x))
    torch.testing.assert_close(shift(varied.can_bus, square)[0], wanted.float(), rtol=1e-4, atol=1e-5)
    sign = -1 if variation.mirror else 1
    assert float(varied.can_bus[0, 17]) == pytest.approx(sign * float(plain.can_bus[0, 17]), abs=1e-4)


def test_memory_of_loose_samples_is_that_of_the_stream(samples: list[Keyframe]) -> None:
    torch.manual_seed(0)
    net, third = BEVFormer(MICRO).eval(), samples[2]
    batch = with_past([samples[4], third], [AS_IT_IS, AS_IT_IS], MICRO, depth=2)
    assert batch.view.has_prev.tolist() == [0.0, 1.0]
    memory = Learner(net).remember(batch)
    state = BevState(MICRO)
    with torch.no_grad():
        for sample in samples[:2]:
            views = sample.views(MICRO.images)
            step = state.step(sample.frame(views))
            images = torch.from_numpy(views.normalised(MICRO.images.mean, MICRO.images.std))[None]
            *_, bev = net(images, torch.from_numpy(views.lidar2img).float()[None], *step.inputs)
            state.keep(bev)
    torch.testing.assert_close(memory[1], state.step(third.frame()).prev_bev[0], rtol=1e-4, atol=1e-4)


def test_truth_goes_to_the_network_and_back(samples: list[Keyframe]) -> None:
    sample = samples[1]
    truth = sample.truth((-75.0, -75.0, -9.0, 75.0, 75.0, 9.0))
    there = to_global(truth.boxes, torch.ones(len(truth.labels)), truth.labels, sample.sample)
    known = sample.data.annotations(sample.token).boxes
    for i in range(len(there)):
        nearest = int(np.abs(known.centers - there.centers[i]).sum(1).argmin())
        np.testing.assert_allclose(there.centers[i], known.centers[nearest], atol=1e-3)
        np.testing.assert_allclose(there.sizes[i], known.sizes[nearest], atol=1e-4)
        assert there.labels[i] == known.labels[nearest]
        turned = there.yaws[i] - known.yaws[nearest]
        # the LiDAR is tilted a little, and a heading seen from there leans
        assert abs(np.angle(np.exp(1j * turned))) < 0.02


def test_scenes_are_told_apart(samples: list[Keyframe]) -> None:
    assert [len(run) for run in in_scenes(samples)] == [4, 4]
    assert [len(run) for run in in_scenes([samples[0], samples[2], samples[3]])] == [1, 2]


def boxes_at(*places: tuple[float, float]) -> Truth:
    rows = [[x, y, -1.0, 1.9, 4.5, 1.6, 0.3 + x, 1.0, -2.0] for x, y in places]
    return Truth(torch.tensor(rows).reshape(-1, 9), torch.arange(len(places)) % len(CLASSES))


def said(truth: Truth) -> Dense:
    """What a dense head says that knows the truth."""
    h, w = FINE * PROPOSING.bev_h, FINE * PROPOSING.bev_w
    place = (truth.boxes[:, :2] + 51.2) / 102.4 * torch.tensor([w, h])
    cell = place.floor()
    heat = heatmap(cell, torch.full((len(cell),), 1.0), truth.labels, (len(CLASSES), h, w))
    codes = torch.zeros(1, 10, h, w)
    from kits.bev_perception.model.boxes import encode

    code = encode(truth.boxes)
    code[:, :2] = place - cell - 0.5
    for (column, row), values in zip(cell.long().tolist(), code, strict=True):
        codes[0, :, row, column] = values
    return Dense(
        torch.logit(heat.clamp(1e-4, 1 - 1e-4))[None], codes, torch.zeros(1, PROPOSING.embed_dims, h, w), codes
    )


def test_proposals_begin_where_the_dense_head_sees_something() -> None:
    truth = boxes_at((10.0, 20.0), (-33.0, 4.4), (0.5, -50.0))
    queries = Proposals(PROPOSING).eval().queries(said(truth))
    metres = queries.reference[0, :3] * torch.tensor(PROPOSING.extent) + torch.tensor(PROPOSING.pc_range[:3])
    apart = torch.cdist(metres, truth.boxes[:, :3])
    assert sorted(apart.argmin(1).tolist()) == [0, 1, 2]
    assert float(apart.min(1).values.max()) < 0.01


def test_dense_loss_is_least_at_the_truth() -> None:
    truth = boxes_at((10.0, 20.0), (-33.0, 4.4))
    right = cell_loss(said(truth), [truth], PROPOSING)
    wrong = cell_loss(said(boxes_at((12.0, 20.0), (-33.0, 14.4))), [truth], PROPOSING)
    assert float(right["box"]) == pytest.approx(0.0, abs=1e-5)
    assert float(right["heat"]) < 0.2 * float(wrong["heat"])
    assert float(wrong["box"]) > 0.1
    nothing = cell_loss(said(truth), [boxes_at()], PROPOSING)
    assert all(torch.isfinite(value) for value in nothing.values())


def test_an_unknown_velocity_is_not_learnt() -> None:
    truth = boxes_at((10.0, 20.0))
    unknown = Truth(truth.boxes.clone(), truth.labels)
    unknown.boxes[:, 7:] = float("nan")
    assert float(cell_loss(said(truth), [unknown], PROPOSING)["box"]) == pytest.approx(0.0, abs=1e-5)


def test_heatmap_has_a_peak_a_box_and_loss_knows_it() -> None:
    heat = heatmap(torch.tensor([[3.0, 1.0], [3.0, 2.0]]), torch.tensor([1.0, 1.0]), torch.tensor([0, 0]), (2, 5, 8))
    assert heat.shape == (2, 5, 8) and float(heat[0, 1, 3]) == 1.0 and float(heat[0, 2, 3]) == 1.0
    assert float(heat[1].max()) == 0.0 and float(heat.max()) == 1.0
    good, bad = torch.logit(heat.clamp(1e-4, 1 - 1e-4)), torch.zeros(2, 5, 8)
    assert float(heat_loss(good, heat)) < 0.1 * float(heat_loss(bad, heat))


def test_the_nearest_box_owns_a_pixel() -> None:
    place, reach = torch.tensor([[2.0, 1.5], [3.5, 1.5]]), torch.tensor([[1.5, 0.6], [1.0, 1.1]])
    owner, row, column = covered(place, reach, torch.tensor([20.0, 10.0]), (3, 6))
    shown = torch.full((3, 6), -1, dtype=torch.long)
    shown[row, column] = owner
    # columns 0.5 to 5.5: the first reaches 0.5 to 3.5 of the middle row, the second, nearer, 2.5 to 4.5 of all three
    assert shown.tolist() == [[-1, -1, 1, 1, 1, -1], [0, 0, 1, 1, 1, -1], [-1, -1, 1, 1, 1, -1]]
    assert [len(part) for part in covered(place[:0], reach[:0], torch.zeros(0), (3, 6))] == [0, 0, 0]


def test_a_pixel_that_knows_its_box_loses_nothing() -> None:
    """A camera that looks along y, 1 pixel a metre at 100 m; the box's middle right of and below a pixel's."""
    config = replace(PROPOSING, images=replace(PROPOSING.images, height=64, width=96))
    head = PixelHead(config)
    truth = Truth(torch.tensor([[3.0, 20.0, -1.0, 1.8, 4.4, 1.6, 0.5, 0.0, 0.0]]), torch.tensor([0]))
    matrix = torch.tensor([[100.0, 48, 0, 0], [0, 32, -100, 0], [0, 1, 0, 0], [0, 0, 0, 1]])[None, None]
    centre = torch.tensor([100 * 3 / 20 + 48, 100 / 20 + 32]) / 8
    known = torch.zeros(1, 1, config.embed_dims, 8, 12)
    far = 20 * LENS * 96 / 100  # metres through the lens that distances are told for

    class Knows(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            said = torch.full((1, 10 + 1 + SHAPE, 8, 12), -9.0)
            row, column = torch.meshgrid(torch.arange(8) + 0.5, torch.arange(12) + 0.5, indexing="ij")
            scale = 100 / 20 / 8
            ray = math.atan2(20, 3)
            values = [math.log(far), (centre[0] - column) / scale, (centre[1] - row) / scale, far / 10, math.log(1.8),
                      math.log(4.4), math.log(1.6), math.sin(0.5 + ray), math.cos(0.5 + ray)]  # fmt: skip
            for i, value in enumerate(values):
                said[0, 10 + i] = value
            return said

    head.layers = Knows()  # type: ignore[assignment]
    found = head(known, matrix, [truth])
    assert found["depth"].item() == pytest.approx(0, abs=1e-5) and found["shape"].item() == pytest.approx(0, abs=1e-5)
    share = float(bin_of(torch.tensor(far), 6)) % 1  # of two bins: what cannot be known better costs its entropy
    bins = torch.full((1, 1, 6, 8, 12), -30.0)
    first = int(bin_of(torch.tensor(far), 6))
    bins[:, :, first], bins[:, :, first + 1] = math.log(1 - share), math.log(share)
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert head(known, matrix, [truth], bins)["bin"].item() == pytest.approx(BIN_WEIGHT * entropy, abs=1e-4)
    assert head(known, matrix, [truth], bins.roll(3, 2))["bin"].item() > 2


def test_pixels_learn_what_stands_where(samples: list[Keyframe]) -> None:
    torch.manual_seed(0)
    view, truths = collate([Shot(samples[0], None, AS_IT_IS)], MICRO)
    head = PixelHead(MICRO)
    features = torch.randn(1, 6, MICRO.embed_dims, 8, 12, requires_grad=True)
    parameters = [*head.parameters(), features]
    optimizer = torch.optim.Adam(parameters, 0.05)
    values = []
    for _ in range(40):
        found = head(features, view.lidar2img, truths)
        total = torch.stack(list(found.values())).sum()
        optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        values.append({name: value.item() for name, value in found.items()})
    assert values[-1]["heat"] < 0.3 * values[0]["heat"]
    assert values[-1]["depth"] < 0.3 * values[0]["depth"]


def test_training_goes_on_where_it_stopped(samples: list[Keyframe], tmp_path: Path) -> None:
    schedule = Schedule(epochs=2, batch_size=2, lr=1e-3, warmup=0.1, ema=0.5, clip=10.0)
    whole = train_detector(samples, schedule, tmp_path / "whole", False, config=PROPOSING)

    class StoppedError(Exception):
        pass

    def stop(epoch: int, model: BEVFormer) -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        train_detector(samples, schedule, tmp_path / "parts", False, config=PROPOSING, on_epoch=stop)
    resumed = train_detector(samples, schedule, tmp_path / "parts", True, config=PROPOSING)
    assert [e["loss"] for e in resumed.history] == [e["loss"] for e in whole.history]
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


def test_training_goes_on_from_a_detector_of_another_grid(samples: list[Keyframe], tmp_path: Path) -> None:
    schedule = Schedule(epochs=1, batch_size=2, lr=1e-4, warmup=0.1, clip=10.0)
    wide = BEVFormer(replace(PROPOSING, bev_h=14, rotate_center=(6.0, 7.0)))
    trained = train_detector(samples, schedule, tmp_path / "wide", False, start=wide)
    assert np.isfinite(trained.history[-1]["loss"])


def test_training_goes_on_with_the_heads_of_another(samples: list[Keyframe], tmp_path: Path) -> None:
    schedule = Schedule(epochs=1, batch_size=2, lr=1e-4, warmup=0.1, ema=0.5, clip=10.0)
    first = train_detector(samples, schedule, tmp_path / "first", False, config=PROPOSING)
    left = tmp_path / "first" / "heads.safetensors"
    kept = {}
    for name, heads in (("with", left), ("without", None)):
        start = copy.deepcopy(first.model)
        assert isinstance(start, BEVFormer)
        train_detector(samples, schedule, tmp_path / name, False, config=PROPOSING, start=start, heads=heads)
        after = load_file(tmp_path / name / "heads.safetensors")
        before = load_file(left)
        kept[name] = float((after["pixels.layers.0.weight"] - before["pixels.layers.0.weight"]).norm())
    assert kept["with"] < 0.2 * kept["without"]


def test_rare_classes_count_more() -> None:
    """Sixteen cars and a bus, none of eight other classes: the mean is 1.7."""
    truths = [boxes_at((1.0, 2.0)), boxes_at((3.0, 4.0))]
    truths[0].labels[:] = CLASSES.index("bus")
    weights = rarity([*[truths[1]] * 16, truths[0]], 10)
    assert weights[CLASSES.index("bus")] == pytest.approx(math.sqrt(1.7))
    assert weights[0] == pytest.approx(0.5) and weights.max() == pytest.approx(math.sqrt(1.7))
    scores, labels = torch.zeros(4, 10), torch.tensor([0, CLASSES.index("bus"), 10, 10])
    each = torch.stack([focal(scores, labels, torch.eye(10)[k]) for k in range(10)])
    assert focal(scores, labels) == pytest.approx(each.sum().item(), rel=1e-5)
    assert focal(scores, labels, weights) == pytest.approx((each * weights).sum().item(), rel=1e-5)


def test_what_moves_counts_more_than_what_stands() -> None:
    wanted = torch.zeros(3, 10)
    wanted[1, 8:] = torch.tensor([3.0, 4.0])
    wanted[2, 8:] = torch.nan
    found = wanted.nan_to_num() + 1
    weights = torch.tensor([1.0] * 8 + [0.2, 0.2])
    lost = code_error(found, wanted, weights, torch.zeros(3, dtype=torch.long))
    assert lost[:, :8].tolist() == [[1.0] * 8] * 3
    assert lost[:, 8:].flatten().tolist() == pytest.approx([0.6, 0.6, 0.6 * 3.5, 0.6 * 3.5, 0.0, 0.0])


def test_a_barrier_may_face_either_way_and_nothing_else_may() -> None:
    heading = torch.tensor([[0.6, 0.8]] * 3)
    wanted = torch.cat((torch.zeros(3, 6), heading, torch.zeros(3, 2)), 1)
    found = torch.cat((torch.zeros(3, 6), heading * torch.tensor([[-0.9], [0.9], [-0.9]]), torch.zeros(3, 2)), 1)
    labels = torch.tensor([CLASSES.index("barrier"), CLASSES.index("barrier"), CLASSES.index("trailer")])
    lost = code_error(found, wanted, torch.ones(10), labels).sum(1)
    assert lost.tolist() == pytest.approx([0.14, 0.14, 1.9 * 1.4])
    found.requires_grad_(True)
    code_error(found, wanted, torch.ones(10), labels).sum().backward()
    assert found.grad is not None and (found.grad[0, 6:8] > 0).all(), "it is drawn on towards the way that it faces"
