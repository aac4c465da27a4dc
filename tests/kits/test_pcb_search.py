"""The detector's search space: candidates and designs, the supernet cut to the bit, resolutions, and what evaluates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.kit import InputError
from core.nas import Space, cut, largest, smallest
from core.search import LatencyTable, table
from core.weights import save_weights
from kits.pcb_inspection import search, training
from kits.pcb_inspection.data.augment import Ready
from kits.pcb_inspection.data.resolution import resized, seen_at
from kits.pcb_inspection.model.design import Design, load_design, save_design
from kits.pcb_inspection.model.network import PairDetector
from kits.pcb_inspection.model.pair import stack
from kits.pcb_inspection.search import Evaluation, Setup, Supernet, design_of, example, hand

SPACE = Space(search.CHOICES)


def drawn(count: int, **fixed: Any) -> list[dict[str, Any]]:
    rng = np.random.default_rng(3)
    return [{**SPACE.draw(rng), **fixed} for _ in range(count)]


def board(side: int = 128) -> Ready:
    """A board with one square of copper too much."""
    template = np.full((side, side), 255, np.uint8)
    template[:, 40:48] = 0
    test = template.copy()
    test[64:84, 80:100] = 0
    boxes = np.array([[80, 64, 100, 84]], np.float32)
    return Ready("b", "g", test, template, boxes, np.array([4]))


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    torch.manual_seed(0)
    net = Supernet()
    for module in net.modules():  # statistics and turns that are not those of the beginning
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5) if name == "running_var" else buffer.normal_(0, 0.1)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "turns" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return net.eval()


def test_a_candidate_is_a_design_and_back() -> None:
    for candidate in drawn(20):
        assert search.candidate_of(design_of(candidate)) == candidate
    assert design_of(hand()) == Design() and set(hand()) == set(search.CHOICES)
    SPACE.encode(hand())  # the hand design is a member of the space


@pytest.mark.parametrize("fusion", [1, 2, 4])
def test_planes_meet_where_the_fusion_says(fusion: int) -> None:
    stem = PairDetector(Design(fusion=fusion)).eval().stem
    with torch.no_grad():
        bare = stem(torch.zeros(1, 4, 32, 32))
        for plane in range(4):
            planes = torch.zeros(1, 4, 32, 32)
            planes[:, plane] = 1
            moved = (stem(planes) != bare).any((0, 2, 3)).reshape(4, -1).any(1).tolist()
            width = 4 // fusion
            assert moved == [plane // width == quarter // width for quarter in range(4)]


@pytest.mark.parametrize("deepest", [16, 32])
def test_candidates_are_cut_to_the_bit_and_are_plain_detectors(supernet: Supernet, deepest: int) -> None:
    for candidate in (*drawn(4, deepest=deepest), {**largest(SPACE), "deepest": deepest}, smallest(SPACE), hand()):
        (tile,) = example(candidate)
        supernet.configure(candidate)
        with torch.no_grad():
            wanted = supernet(tile)
            plain = cut(supernet, candidate, (tile,))
            found = plain(tile)
        assert all(torch.equal(a, b) for a, b in zip(wanted, found))
        side = int(candidate["size"]) // 8
        assert [tuple(t.shape) for t in found] == [(1, 6, side, side), (1, 4, side, side)]
        fresh = PairDetector(design_of(candidate)).eval()
        fresh.load_state_dict(plain.state_dict())  # strict: the same names, the same shapes
        with torch.no_grad():
            assert torch.allclose(fresh(tile)[0], found[0], atol=1e-5)


def test_every_weight_of_the_supernet_learns_in_some_candidate(supernet: Supernet) -> None:
    net = Supernet()
    batch = {
        "images": torch.rand(1, 4, 64, 64).round(),
        "truths": [(torch.tensor([[10.0, 10, 40, 40]]), torch.tensor([2]))],
    }
    moved: set[str] = set()
    for candidate in (largest(SPACE), smallest(SPACE), {**largest(SPACE), "kernel8": 3, "kernel16": 3, "kernel32": 3}):
        net.configure({**candidate, "size": 640, "deepest": 32})
        net.zero_grad(set_to_none=True)
        training.loss(net, batch).backward()
        moved |= {n for n, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {n for n, _ in net.named_parameters()}


def test_a_smaller_tile_shows_the_same_board() -> None:
    pair = board()
    seen = seen_at(pair, 512)
    assert seen.test.shape == (102, 102) and set(np.unique(seen.test)) == {0, 255}
    assert seen.boxes == pytest.approx(pair.boxes * 0.8)
    x1, y1, x2, y2 = seen.boxes[0].round().astype(int)
    assert (seen.test[y1 + 1 : y2 - 1, x1 + 1 : x2 - 1] == 0).all() and (seen.template[y1:y2, x1:x2] == 255).all()
    assert seen_at(pair, 640) is pair


def test_training_sees_what_inspection_will_see() -> None:
    pair = board(160)
    batch = training.collate([stack(pair.test, pair.template)], [(pair.boxes, pair.labels)])
    small = resized(batch, 512)
    seen = seen_at(pair, 512)
    wanted = training.collate([stack(seen.test, seen.template)], [(seen.boxes, seen.labels)])
    assert torch.equal(small["images"], wanted["images"])
    assert torch.allclose(small["truths"][0][0], wanted["truths"][0][0])
    assert resized(batch, 640) is batch


def test_designs_are_stored_and_what_is_none_is_refused(tmp_path: Path) -> None:
    for candidate in drawn(3):
        save_design(design_of(candidate), tmp_path / "design.json")
        assert load_design(tmp_path / "design.json") == design_of(candidate)
    (tmp_path / "design.json").write_text('{"widths": [1, 2, 3, 4], "size": 600}')
    with pytest.raises(InputError, match="600 must be a multiple of 32"):
        load_design(tmp_path / "design.json")
    (tmp_path / "design.json").write_text('{"widths": [10, 2, 3, 4], "fusion": 4}')
    with pytest.raises(InputError, match="fusion 4, expected 1, 2 or 4, a divisor of width 10"):
        load_design(tmp_path / "design.json")
    (tmp_path / "design.json").write_text('{"wings": 2}')
    with pytest.raises(InputError, match="no design of a detector"):
        load_design(tmp_path / "design.json")


def test_an_evaluation_says_what_a_candidate_is_worth(
    tmp_path: Path, supernet: Supernet, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kits.pcb_inspection as kit

    save_weights(supernet, tmp_path / "supernet.safetensors")
    table(threads=1).save(tmp_path / "latency.json")
    monkeypatch.setattr(LatencyTable, "_alone", lambda self, operator, folder: 1e-3 if operator is None else 2e-3)
    pairs = kit.KIT.dataset(None, "train", "smoke")[:3]
    monkeypatch.setattr(type(kit.KIT), "dataset", lambda self, data, split, preset="full": pairs)
    evaluate = Evaluation(Setup(str(tmp_path), None, "smoke"))
    candidate = {**smallest(SPACE), "deepest": 16}
    found = evaluate(candidate)
    assert set(found) == {"map", "latency", "score", "parameters", "macs", "peak"}
    operators = 11 + 1  # convolutions of this candidate, and one upsampling
    assert found["latency"] == pytest.approx(operators)
    assert 0 <= found["map"] <= 100
    assert found["score"] == pytest.approx(found["map"] * search.TARGET_MS / found["latency"])  # over the target
    assert evaluate(candidate) == found, "batch norms are those of the candidate, whoever came before"


@pytest.mark.slow
def test_a_search_from_end_to_end(tmp_path: Path) -> None:
    from core.cli import main

    out = tmp_path / "out"
    assert main(["search", "pcb_inspection", "--preset", "smoke", "--trials", "6", "--out", str(out)]) == 0
    found = json.loads((out / "search.json").read_text())
    assert len(found["searched"]["trials"]) == len(found["control"]["trials"]) == 6
    design = load_design(out / "winner" / "design.json")
    part = "control" if found["winner_of"] == "random" else "searched"
    assert found[part]["searcher"] == found["winner_of"]
    winner = {t["number"]: t["candidate"] for t in found[part]["trials"]}[found["winner"]]
    assert design == design_of(winner)
    assert main(["search", "pcb_inspection", "--preset", "smoke", "--trials", "8", "--out", str(out), "--resume"]) == 0
    assert len(json.loads((out / "search.json").read_text())["searched"]["trials"]) == 8


@pytest.mark.parametrize("size", [640, 512])
def test_what_an_ensemble_says_reaches_the_loss_at_the_size_of_the_one_that_learns(size: int) -> None:
    torch.manual_seed(1)
    larger = [PairDetector(), PairDetector()]
    ready = board(160)
    batch = training.collate([stack(ready.test, ready.template)], [(ready.boxes, ready.labels)])
    told = training.told(larger, batch["images"])
    with torch.no_grad():
        apart = [d.eval()(batch["images"])[0].sigmoid() for d in larger]
    assert told.shape == (1, 6, 20, 20) and not told.requires_grad
    torch.testing.assert_close(told, (apart[0] + apart[1]) / 2, atol=5e-3, rtol=0.05)  # bfloat16 where there is some
    small = PairDetector(Design(size=size))
    seen = resized({**batch, "taught": told}, size)
    cells = seen["images"].shape[-1] // 8
    assert seen["taught"].shape == (1, 6, cells, cells)
    untaught = {name: value for name, value in seen.items() if name != "taught"}
    with torch.no_grad():
        with_it, without = (float(training.loss(small, each)) for each in (seen, untaught))
    assert with_it > without


def test_a_detector_follows_larger_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SIZE", 64)
    monkeypatch.setattr(training, "drawn", lambda *_: [])
    asked: list[int] = []
    said = training.told

    def told(larger: Any, *others: Any, **named: Any) -> torch.Tensor:
        asked.append(len(larger))
        return said(larger, *others, **named)

    monkeypatch.setattr(training, "told", told)
    schedule = training.Schedule(epochs=1, batch_size=2, lr=1e-3)
    ready = [board()] * 4
    fitted = training.train_detector(ready, ready, schedule, tmp_path, False, larger=[PairDetector()] * 3)
    assert asked and set(asked) == {3}
    assert np.isfinite(fitted.history[0]["loss"])
