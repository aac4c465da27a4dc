"""Compute where something differs: what the gate lets pass, how crops cover it, and that the answers are the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from core.export import Artifact, export, reshaped
from core.kit import InputError
from kits.pcb_inspection import KIT, gates
from kits.pcb_inspection.conditional import (
    BATCHES,
    CROP,
    NOTHING,
    RIM,
    Conditional,
    Crops,
    _batched,
    blobs,
    conditional,
    cover,
    crossover,
    freeze_gate,
    gate_on,
    least_area,
)
from kits.pcb_inspection.data.deeppcb import Pair
from kits.pcb_inspection.model.inspector import inspect

SIDE = 640
EMPTY = np.zeros((SIDE, SIDE), np.uint8)


def differing(*squares: tuple[int, int, int]) -> np.ndarray:
    """Squares (x, y, side) of difference."""
    image = EMPTY.copy()
    for x, y, side in squares:
        image[y : y + side, x : x + side] = 255
    return image


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return list(KIT.dataset(None, "test", "smoke"))[:6]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    models, meta = KIT.shipped()
    validation = KIT.dataset(None, "val", "smoke")
    return export(models, KIT.exports(), "x86-edge-box", tmp_path_factory.mktemp("gated") / "artifact",
                  kit="pcb_inspection", meta={**meta, "gate": gate_on(validation, SIDE)})  # fmt: skip


def test_pieces_of_difference_are_found_on_both_sides() -> None:
    found = blobs(differing((10, 20, 5)), differing((300, 400, 7)))
    assert sorted(found.tolist()) == [[10, 20, 5, 5, 25], [300, 400, 7, 7, 49]]
    assert len(blobs(EMPTY, EMPTY)) == 0
    ring = differing((100, 100, 40))
    ring[110:130, 110:130] = 0
    assert blobs(ring, differing((118, 118, 4))).tolist() == [[100, 100, 40, 40, 1600 - 400 + 16]]


def test_the_gate_is_half_of_the_least_that_a_defect_shows() -> None:
    boxes = np.array([[5, 15, 30, 40], [290, 390, 320, 420], [500, 500, 540, 540]], np.float32)
    areas = least_area(differing((10, 20, 5), (25, 30, 3)), differing((300, 400, 7)), boxes)
    assert areas == [25, 49, 0]
    assert freeze_gate(areas) == 12 and freeze_gate([]) == 1 and freeze_gate([0, 1]) == 1


def test_crops_cover_every_piece_away_from_their_rims() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        squares = [(int(x), int(y), int(s)) for x, y, s in zip(*rng.integers(0, 600, (2, 7)), rng.integers(2, 40, 7))]
        pieces = blobs(differing(*squares), EMPTY)
        places = cover(pieces, 1, SIDE)
        if places is None:  # squares that touch make a piece larger than a crop
            assert pieces[:, 2:4].max() > CROP - 2 * RIM - 32
            continue
        for left, top, width, height, _ in pieces:
            shown = False
            for y, x in places:
                assert y % 32 == 0 and x % 32 == 0 and 0 <= y <= SIDE - CROP and 0 <= x <= SIDE - CROP
                shown |= all(
                    (low >= start + RIM or start == 0) and (high <= start + CROP - RIM or start == SIDE - CROP)
                    and start <= low and high <= start + CROP
                    for low, high, start in ((left, left + width, x), (top, top + height, y))
                )  # fmt: skip
            assert shown, (squares, places)
        assert len(places) <= len(pieces)


def test_small_pieces_pass_the_gate_unseen_and_large_ones_need_the_whole_tile() -> None:
    pieces = blobs(differing((100, 100, 3), (300, 300, 10)), EMPTY)
    assert len(cover(pieces, 10, SIDE) or []) == 1 and len(cover(pieces, 9, SIDE) or []) == 2
    assert cover(pieces, 101, SIDE) == []
    assert cover(blobs(differing((100, 100, 90)), EMPTY), 1, SIDE) is None
    assert cover(pieces, 9, SIDE, most=2) is None and len(cover(pieces, 9, SIDE, most=3) or []) == 2


def test_batches_take_every_crop_once() -> None:
    for count in range(30):
        parts = _batched(torch.arange(count))
        assert [int(n) for part, _ in parts for n in part] == list(range(count))
        assert all(len(part) <= size and size in BATCHES for part, size in parts)


class Local(nn.Module):
    """A network whose answer at a cell depends on the cell's own pixels alone."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(8)
        self.calls: list[tuple[int, ...]] = []

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.append(tuple(x.shape))
        seen = self.pool(x)
        return seen[:, :1].expand(-1, 6, -1, -1) * 9 - 5, seen


def planes(gained: np.ndarray) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, 2, SIDE, SIDE, generator=generator).round()
    return torch.cat((noise, torch.from_numpy(gained)[None, None] / 255, torch.zeros(1, 1, SIDE, SIDE)), 1)


def test_what_is_looked_at_is_what_the_whole_tile_would_say_and_the_rest_is_nothing() -> None:
    net = Local()
    module = Conditional(net, Crops(dict.fromkeys(BATCHES, net)), 1, 99)
    tile = planes(differing((200, 210, 12), (620, 4, 12), (330, 600, 8)))
    logits, distances = module(tile)
    assert net.calls == [(4, 4, CROP, CROP)] and dict(module.ways) == {"crops": 1}
    whole, sides = net(tile)
    looked = logits[0, 0] != NOTHING
    assert 0 < looked.sum() < 0.2 * looked.numel()
    assert torch.equal(logits[0][:, looked], whole[0][:, looked])
    assert torch.equal(distances[0][:, looked], sides[0][:, looked])
    for x, y in ((206, 216), (626, 10), (334, 604)):
        assert looked[y // 8, x // 8]


def test_a_clean_tile_costs_no_network_and_a_crowded_one_a_single_whole_look() -> None:
    net = Local()
    module = Conditional(net, Crops(dict.fromkeys(BATCHES, net)), 4, crossover=3)
    logits, _ = module(planes(differing((50, 50, 1))))
    assert (logits == NOTHING).all() and net.calls == [] and dict(module.ways) == {"clean": 1}
    module(planes(differing((50, 50, 9), (300, 300, 9), (500, 100, 9))))
    assert net.calls == [(1, 4, SIDE, SIDE)] and module.ways["dense"] == 1


class Counted(nn.Module):
    """Costs as much as its inputs have pixels."""

    cost = 0.0

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.cost += float(x.shape[0] * x.shape[2] * x.shape[3])
        cells = x[:, :1, ::8, ::8]
        return cells.expand(-1, 6, -1, -1), cells.expand(-1, 4, -1, -1)


def test_the_crossover_is_where_crops_cost_as_much_as_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    module, more, asked, disturbed = Counted(), 0.0, 0, 0

    def costs(modules: Sequence[nn.Module], tile: torch.Tensor, repeats: int) -> list[float]:
        nonlocal asked
        asked, found = asked + 1, []
        for shown in modules:
            module.cost = 0.0
            shown(tile)
            late = 1e9 if asked == disturbed else 0.0
            found.append(module.cost + (more + late if isinstance(shown, Conditional) else 0.0))
        return found

    monkeypatch.setattr("kits.pcb_inspection.conditional._medians", costs)
    crops = Crops(dict.fromkeys(BATCHES, module))
    # 25 crops have the pixels of a tile, and the last of them fills a batch alone
    assert crossover(module, crops, SIDE) == 25
    asked, disturbed = 0, 3
    assert crossover(module, crops, SIDE) == 25, "what happens once is chance"
    more = 2.0 * CROP * CROP  # what lies about the network counts
    assert crossover(module, crops, SIDE) == 21, "from 21 on they fill three batches of 8"
    more = -1.0 * SIDE * SIDE
    assert crossover(module, crops, SIDE) == 50, "never"


@pytest.mark.parametrize("variant", ["fp32-onnxruntime", "fp32-openvino", "int8-onnxruntime", "int8-openvino"])
def test_the_shipped_file_runs_crops(artifact: Artifact, variant: str) -> None:
    whole = artifact.as_module(variant, threads=1)
    torch.manual_seed(0)
    tile = torch.rand(1, 4, SIDE, SIDE).round()
    crop = reshaped(artifact, [(2, 4, CROP, CROP)], variant, threads=1)
    logits, distances = crop(tile[:, :, :256, :128].reshape(1, 4, 2, CROP, CROP)[0].transpose(0, 1))
    assert logits.shape == (2, 6, 16, 16) and distances.shape == (2, 4, 16, 16)
    again = reshaped(artifact, [(1, 4, SIDE, SIDE)], variant, threads=1)(tile)
    assert torch.allclose(again[0], whole(tile)[0], atol=1e-4)


def test_shapes_that_cannot_be_are_refused(artifact: Artifact) -> None:
    with pytest.raises(InputError, match="expected one of each input's rank"):
        reshaped(artifact, [(4, 64, 64)])
    with pytest.raises(InputError, match="cannot be run at"):
        reshaped(artifact, [(1, 5, 64, 64)], "int8-openvino")
    with pytest.raises(InputError, match="no graph 'encoder'"):
        reshaped(artifact, [(1, 4, 64, 64)], graph="encoder")


def test_the_gate_misses_no_defect_of_validation_and_finds_what_the_whole_tile_finds(
    artifact: Artifact, pairs: list[Pair]
) -> None:
    gate = artifact.meta["gate"]
    assert gate["missed"] == 0 and gate["area"] >= 1 and gate["defects"] > 20
    module = conditional(artifact, "int8-openvino", 1)
    module.crossover = 99
    dense = artifact.as_module("int8-openvino", 1)
    threshold = artifact.meta["threshold"]
    counts = []
    for pair in pairs:
        test, template = pair.load()
        counts.append([sum(inspect(m, test, template).detections[:, 4] >= threshold) for m in (module, dense)])
    ours, theirs = np.array(counts).sum(0)
    assert theirs > 10 and abs(ours - theirs) <= 0.1 * theirs
    assert module.ways["crops"] >= 4


def test_without_a_gate_there_is_no_conditional_compute(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(artifact.manifest, "meta", {"threshold": 0.5})
    with pytest.raises(InputError, match="no gate was frozen"):
        conditional(artifact, None, 1)


def test_the_study_holds_the_gate_against_the_others(artifact: Artifact, pairs: list[Pair], tmp_path: Path) -> None:
    studied = gates.study(artifact, "int8-openvino", 1, pairs[:3])
    assert list(studied) == ["always dense", "difference gate", "crops however many", "oracle", "random"]
    assert studied["always dense"].ways == {"dense": 3}
    assert all(sum(s.ways.values()) == 3 for s in studied.values())
    assert studied["random"].metrics["recall_any"] <= studied["oracle"].metrics["recall_any"]
    assert studied["difference gate"].milliseconds > 0
    densities = gates.by_density(artifact, "int8-openvino", 1, pairs, boards=2)
    assert [row[0] for row in densities] == list(gates.DENSITIES)
    assert densities[0][1] < densities[-1][1] and densities[0][2] < densities[0][3], "a good board costs less gated"
    tables: list[dict[str, Any]] = gates.tables(studied, densities, artifact)
    assert [len(row) == len(t["columns"]) for t in tables for row in t["rows"]] == [True] * 11


def test_a_smaller_tile_is_given_the_whole_board(pairs: list[Pair]) -> None:
    test, template = pairs[0].load()
    whole, small = (gates.planes_of(test, template, side) for side in (640, 512))
    assert whole.shape == (4, 640, 640) and small.shape == (4, 512, 512)
    copper = [float((planes[1] == 0).mean()) for planes in (whole, small)]
    assert copper[0] == pytest.approx(copper[1], abs=0.01)


@pytest.mark.parametrize("gated", [False, True])
def test_tiles_looked_at_side_by_side_give_what_they_give_one_by_one(
    artifact: Artifact, pairs: list[Pair], gated: bool
) -> None:
    test, template = (np.tile(image, (4, 4)) for image in pairs[0].load())
    assert len(pairs[0].boxes)

    def module(threads: int) -> nn.Module:
        if not gated:
            return artifact.as_module("int8-openvino", threads)
        found = conditional(artifact, "int8-openvino", threads)
        found.crossover = 4  # else measured, so that tiles would be looked at now in crops, now as a whole
        return found

    seen: list[int] = []
    one, two = (inspect(module(n), test, template, on_tile=lambda: seen.append(1)) for n in (1, 2))
    assert len(seen) == 2 * len(one.registrations) >= 2 * 16
    assert one.registrations == two.registrations
    np.testing.assert_allclose(two.detections, one.detections, atol=1e-3)
    assert len(one.detections) >= 16


def test_a_network_that_fails_on_a_thread_says_so(artifact: Artifact, pairs: list[Pair]) -> None:
    class Broken(nn.Module):
        def forward(self, planes: Tensor) -> tuple[Tensor, Tensor]:
            raise RuntimeError("no more memory")

    module = artifact.as_module("int8-openvino", 2)
    module.alone = Broken  # type: ignore[assignment]
    test, template = (np.tile(image, (4, 4)) for image in pairs[0].load())
    with pytest.raises(RuntimeError, match="no more memory"):
        inspect(module, test, template)
