"""The detector's search space: candidates and configs, weights that are shared, memories, and what evaluates."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import bev_winner
from core.kit import InputError
from core.nas import Space, largest, smallest
from core.weights import save_weights
from kits.bev_perception import KIT, search, training
from kits.bev_perception.data.streams import Shot, streams
from kits.bev_perception.kit import DETECTOR, BevPerception, told_by
from kits.bev_perception.model.configs import FILE, NANO, config_beside, from_json, save_config, to_json
from kits.bev_perception.model.detector import BEVFormer
from kits.bev_perception.model.shared import grown, memory_of, taken
from kits.bev_perception.search import Supernet, config_of, example, hand

SPACE = Space(search.CHOICES)


def drawn(count: int, **fixed: Any) -> list[dict[str, Any]]:
    rng = np.random.default_rng(3)
    return [{**SPACE.draw(rng), **fixed} for _ in range(count)]


@pytest.fixture(scope="module")
def rows() -> list[list[Shot]]:
    """Two rows of a shot of the short training set."""
    found = streams(KIT.dataset(None, "train", "smoke"), 1, 0, train=True)
    return [next(found) for _ in range(2)]


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    torch.manual_seed(0)
    return Supernet().eval()


def test_nano_is_a_candidate_and_its_config_is_nanos() -> None:
    SPACE.encode(hand())
    made = config_of(hand())
    assert replace(made, name="nano", backbone=replace(made.backbone, blocks=None)) == NANO


@pytest.mark.parametrize("candidate", [largest(SPACE), smallest(SPACE), hand(), *drawn(2)])
def test_a_candidate_shares_the_largest_ones_weights_and_runs(supernet: Supernet, candidate: dict[str, Any]) -> None:
    plain, config = supernet.detector(candidate), config_of(candidate)
    shared = supernet.learner.detector.state_dict()
    for name, tensor in plain.state_dict().items():
        if "embed" not in name:
            assert torch.equal(tensor, shared[name][tuple(slice(0, size) for size in tensor.shape)]), name
    with torch.no_grad():
        scores, codes, bev = plain(*example(candidate))
    assert scores.shape == (1, config.num_query, 10) and codes.shape == (1, config.num_query, 10)
    assert bev.shape == (1, config.bev_h**2, config.embed_dims)
    assert all(torch.isfinite(t).all() for t in (scores, codes, bev))


def test_the_largest_ones_extraction_is_the_supernet_to_the_bit(supernet: Supernet) -> None:
    inputs = example(largest(SPACE))
    with torch.no_grad():
        pairs = zip(supernet.learner.detector(*inputs), supernet.detector(largest(SPACE))(*inputs))
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_supernet_begins_with_the_weights_of_the_shipped_detector() -> None:
    net, shipped = Supernet(), KIT.model()
    assert isinstance(shipped, BEVFormer)
    net.begin(shipped)
    own = shipped.state_dict()
    for name, tensor in net.detector(hand()).state_dict().items():
        if "embed" in name:  # brought to a finer grid and back
            assert torch.corrcoef(torch.stack((tensor.flatten(), own[name].flatten())))[0, 1] > 0.9, name
        else:
            assert torch.equal(tensor, own[name]), name


def test_every_weight_learns_and_statistics_are_kept_where_they_belong(rows: list[list[Shot]]) -> None:
    torch.manual_seed(0)
    net = Supernet(torch.ones(10)).train()
    mean = net.learner.detector.img_backbone.bn1.running_mean
    assert mean is not None
    before = mean.clone()
    for candidate in (largest(SPACE), smallest(SPACE)):
        net.configure(candidate)
        net(rows[0]).backward()
    still = [n for n, p in net.named_parameters() if p.grad is None]
    assert still == ["learner.detector.pts_bbox_head.code_weights"]
    assert not torch.equal(before, mean)


def test_each_of_a_steps_candidates_remembers_what_it_saw(rows: list[list[Shot]]) -> None:
    net = Supernet(torch.ones(10)).eval()
    with torch.no_grad():
        for row, between in zip(rows, (drawn(1, side=40)[0], drawn(1, side=50)[0])):
            for candidate in (largest(SPACE), smallest(SPACE), between):
                net.configure(candidate)
                assert torch.isfinite(net(row))
    cells = {place: memory.shape[1] for place, memory in net._memories.items()}
    assert cells == {0: 60**2, 1: 40**2, 2: 50**2}


def test_a_candidate_learns_from_the_largest_one_too(rows: list[list[Shot]]) -> None:
    torch.manual_seed(0)
    net = Supernet(torch.ones(10)).eval()
    alone = Supernet(torch.ones(10)).eval()
    alone.load_state_dict(net.state_dict())
    with torch.no_grad():
        net.configure(largest(SPACE))
        net(rows[0])
        torch.manual_seed(1)
        net.configure(smallest(SPACE))
        taught = net(rows[0])
        torch.manual_seed(1)
        alone.configure(smallest(SPACE))
        assert float(taught) > float(alone(rows[0])), "what the two are apart is added"


def test_memories_and_weights_of_cells_go_to_other_grids() -> None:
    bev = torch.arange(16.0).view(1, 16, 1)
    assert memory_of(bev, 4) is bev
    fine = memory_of(bev, 8)
    assert fine.shape == (1, 64, 1) and fine.min() == 0 and fine.max() == 15
    assert torch.allclose(memory_of(torch.ones(2, 16, 3), 3), torch.ones(2, 9, 3))
    with pytest.raises(InputError, match="no such weights"):
        taken({}, {"a": (2,)})
    with pytest.raises(InputError, match="wanted"):
        taken({"a": torch.ones(2)}, {"a": (3,)})
    larger = grown({"a": torch.ones(1, 2)}, {"a": torch.zeros(2, 3), "b": torch.zeros(1)})
    assert larger["a"].tolist() == [[1, 1, 0], [0, 0, 0]] and larger["b"].tolist() == [0]


def test_configs_are_stored_and_what_is_none_is_refused(tmp_path: Path) -> None:
    config = config_of(smallest(SPACE))
    assert from_json(json.loads(json.dumps(to_json(config))), "here") == config
    weights = tmp_path / "fp32.safetensors"
    assert config_beside(weights) == NANO
    save_config(config, tmp_path)
    assert config_beside(weights) == config
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(InputError, match=f"{FILE}: no config of a detector"):
        config_beside(weights)
    (tmp_path / FILE).write_text("{")
    with pytest.raises(InputError, match="no JSON"):
        config_beside(weights)


def test_frames_to_judge_on_are_whole_scenes_from_all_over() -> None:
    samples = KIT.dataset(None, "val", "smoke")
    some = search.few(samples, 8)
    assert len(some) == min(8, len(samples)) and some == sorted(some, key=samples.index)


def test_the_kit_takes_a_winner_with_its_own_pictures_and_grid(tmp_path: Path) -> None:
    config = config_of(smallest(SPACE))
    torch.manual_seed(0)
    save_weights(BEVFormer(config), tmp_path / "fp32.safetensors")
    with pytest.raises(InputError, match="fp32.safetensors"):
        KIT.model(tmp_path)  # without its config it does not fit
    save_config(config, tmp_path)
    model = KIT.model(tmp_path)
    kit = KIT.of(model)
    assert isinstance(model, BEVFormer) and model.config == config and isinstance(kit, BevPerception)
    (graph,) = kit.exports()
    assert graph.inputs["images"].shape[-2:] == (config.images.height, config.images.width)
    samples = KIT.dataset(None, "val", "smoke")[:2]
    found = kit.predictions(model, samples, "watching")
    assert set(found) == {sample.token for sample in samples}
    kit.pipeline(model, samples)()
    meta = kit.freeze(model, None, "smoke")
    assert told_by(meta) == config and told_by({}) == NANO and DETECTOR not in KIT.freeze(KIT.model(), None, "smoke")
    with pytest.raises(InputError, match=r"manifest.json: no config"):
        told_by({DETECTOR: {"name": "odd"}})


def test_a_winner_is_trained_on_and_a_second_start_does_nothing_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, before, out = config_of(smallest(SPACE)), tmp_path / "before", tmp_path / "out"
    torch.manual_seed(0)
    start = BEVFormer(config)
    before.mkdir()
    save_config(config, before)
    save_weights(start, before / "fp32.safetensors")
    samples = KIT.dataset(None, "val", "smoke")[:2]
    save_weights(training.learner_of(start, samples).heads(), before / training.HEADS)
    monkeypatch.setattr(BevPerception, "dataset", lambda *asked: samples)
    command = ["bev_winner.py", "--weights", str(before), "--out", str(out), "--epochs", "1", "--preset", "smoke"]
    monkeypatch.setattr(sys, "argv", command)
    bev_winner.main()
    assert "NDS on the 2 validation frames" in capsys.readouterr().out
    history = json.loads((out / "training.json").read_text())
    assert [entry["epoch"] for entry in history] == [0]
    after = KIT.model(out)
    assert isinstance(after, BEVFormer) and after.config == config
    assert any(not torch.equal(a, b) for a, b in zip(start.parameters(), after.parameters(), strict=True))
    assert (out / training.HEADS).is_file(), "a third training can begin with them"
    bev_winner.main()
    assert json.loads((out / "training.json").read_text()) == history


@pytest.mark.slow
def test_a_search_from_end_to_end(tmp_path: Path) -> None:
    from core.cli import main

    out = tmp_path / "out"
    command = ["search", "bev_perception", "--preset", "smoke", "--out", str(out), "--trials"]
    assert main([*command, "2"]) == 0
    found = json.loads((out / "search.json").read_text())
    assert len(found["searched"]["trials"]) == len(found["control"]["trials"]) == 2
    part = "control" if found["winner_of"] == "random" else "searched"
    winner = {t["number"]: t["candidate"] for t in found[part]["trials"]}[found["winner"]]
    model = KIT.model(out / "winner")
    assert isinstance(model, BEVFormer) and model.config == config_of(winner)
    assert main([*command, "3", "--resume"]) == 0
    assert len(json.loads((out / "search.json").read_text())["searched"]["trials"]) == 3
