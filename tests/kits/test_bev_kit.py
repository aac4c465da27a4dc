"""The kit on a small folder, with random weights: splits, batches, loss, scores and what evaluate leaves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from core.kit import InputError, Streamed
from core.weights import save_weights
from kits.bev_perception import comparison, shipped
from kits.bev_perception.acceptance import observed
from kits.bev_perception.card import write_card
from kits.bev_perception.data.world import generate_world
from kits.bev_perception.dynamic import Dynamic, Policy
from kits.bev_perception.kit import BevPerception
from kits.bev_perception.metrics.results import read_results
from kits.bev_perception.model.configs import NANO
from kits.bev_perception.model.detector import BEVFormer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world") / "set"
    return generate_world(root, 2, 4, samples=3, size=(96, 54), paired="none", val_share=0.5, supersample=1,
                          workers=1, lidar_sweeps=False, quiet=True)  # fmt: skip


@pytest.fixture(scope="module")
def kit() -> BevPerception:
    torch.manual_seed(0)
    return BevPerception(BEVFormer(NANO).eval())


def test_train_and_report_never_share_a_frame(kit: BevPerception, folder: Path) -> None:
    train, val, test = (kit.dataset(folder, name) for name in ("train", "val", "test"))
    assert val == test, "a folder without a test split is judged on val"
    assert not {s.token for s in train} & {s.token for s in test}
    assert len(train) == len(test) == 3


def test_a_folder_without_splits_is_not_split_by_guess(kit: BevPerception, tmp_path: Path) -> None:
    whole = generate_world(tmp_path / "set", 1, 4, samples=2, size=(96, 54), supersample=1, workers=1,
                           lidar_sweeps=False, quiet=True, val_share=0.0)  # fmt: skip
    (whole / "v1.0-mini" / "splits.json").unlink()
    (whole / "v1.0-mini").rename(whole / "v2.0-own")
    for name in ("train", "val", "test"):
        with pytest.raises(InputError, match="splits.json"):
            kit.dataset(whole, name)
    assert len(kit.dataset(whole, "all")) == 2


def test_batches_go_through_network_and_loss(kit: BevPerception, folder: Path) -> None:
    samples, model = kit.dataset(folder, "train"), kit._own()
    batch = next(iter(kit.batches(samples, 2, train=False)))
    inputs = kit.inputs(batch)
    assert [tuple(t.shape) for t in inputs[:3]] == [(2, 6, 3, 160, 288), (2, 6, 4, 4), (2, 18)]
    assert batch.view.has_prev.tolist() == [0.0, 1.0]
    assert float(inputs[3][1].abs().sum()) > 0, "the second frame remembers the first"
    scores, codes, bev = model(*inputs)
    assert scores.shape == (2, NANO.num_query, 10) and codes.shape == (2, NANO.num_query, 10)
    assert bev.shape == inputs[3].shape
    assert torch.isfinite(kit.loss(model, batch))


def test_the_stream_remembers_what_it_is_sent(kit: BevPerception, folder: Path) -> None:
    stream = kit.stream(kit.dataset(folder, "train"), 5, 0)
    assert isinstance(kit, Streamed)
    given = next(stream)
    seen, sent = [given], []
    while True:
        bev = torch.full_like(given[3], len(sent) + 1.0)
        sent.append(bev)
        try:
            given = stream.send((given[0], given[1], bev))
        except StopIteration:
            break
        seen.append(given)
    assert [g[4].item() for g in seen] == [0.0, 1.0, 1.0], "a scene of three frames"
    for after, bev in zip(seen[1:], sent):
        assert torch.equal(after[3], bev), "the memory of the frame before"


def test_evaluate_leaves_what_the_devkit_reads(kit: BevPerception, folder: Path, tmp_path: Path) -> None:
    samples = kit.dataset(folder, "test")
    metrics = kit.evaluate(kit._own(), samples, {"threshold": 0.3}, tmp_path)
    found, _ = read_results(tmp_path / "predictions" / "results_nusc.json", [s.token for s in samples])
    assert list(found) == [s.token for s in samples]
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    scored = kit.score(kit._own(), samples, {"threshold": 0.3})
    assert metrics["nds"] == pytest.approx(scored["nds"][0])
    assert 0 <= metrics["map"] < 5, "random weights find next to nothing"


def test_threshold_and_alarm_are_frozen_on_validation_frames(
    kit: BevPerception, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = kit.dataset(folder, "train")
    monkeypatch.setattr(kit, "_split", lambda data, split: split)
    monkeypatch.setattr(kit, "dataset", lambda data, split, preset: samples if split == "val" else [])
    meta = kit.freeze(kit._own(), folder, "full")
    path = Dynamic(kit._own(), kit._own(), NANO, Policy(alarm=meta["alarm"]))
    observed(path, samples, NANO, "again")
    assert meta["frozen_on"] == "3 validation frames"
    assert 0 < sum(alarm >= meta["alarm"] for alarm in path.watch.alarms) <= len(samples)
    assert any(alarm == pytest.approx(meta["alarm"]) for alarm in path.watch.alarms)


def test_an_answer_that_comes_late_is_judged_by_where_things_are_then(
    kit: BevPerception, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = kit.dataset(folder, "test")
    truth = {s.token: s.data.truth(s.token) for s in samples}
    known = {token: replace(boxes, scores=np.full(len(boxes), 0.9)) for token, boxes in truth.items()}
    monkeypatch.setattr(comparison, "runtime_title", lambda *_: "a runtime")
    artifact = SimpleNamespace(meta={"threshold": 0.3}, sha256="0" * 64, as_module=lambda name, threads: name)
    took = {"slow": 40.0, "fast": 0.0}
    figures, table = comparison._streaming(lambda *_: known, artifact, ("slow", "fast"), samples, took)
    slow, fast = table["rows"]
    assert fast[2] == fast[3] == fast[4], "what is ready at once is never late"
    assert slow[2] == fast[2] and slow[3] < slow[2], "the first frame has no answer yet, the others an old one"
    assert slow[3] <= slow[4] < slow[2], "boxes that were moved on are nearer"
    assert [(f.stage, round(f.value, 2)) for f in figures] == [("original", slow[4]), ("compressed", fast[4])]


def test_the_compressed_detector_is_the_one_of_whole_where_that_ships(
    kit: BevPerception, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, meta = kit.shipped()
    assert meta["threshold"] > 0 and alone["int8"] is not alone["fp32"]
    made = torch.nn.Linear(1, 1)
    monkeypatch.setattr(shipped, "is_there", lambda: True)
    monkeypatch.setattr(shipped, "build", lambda model: made)
    models, _ = kit.shipped()
    assert models["int8"] is made and isinstance(models["fp32"], BEVFormer)


def test_weights_that_are_not_there_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fitkit train bev_perception"):
        BevPerception().model(tmp_path)


def test_the_card_says_what_a_card_must(kit: BevPerception, folder: Path, tmp_path: Path) -> None:
    for name in ("fp32", "int8"):
        save_weights(torch.nn.Linear(1, 1), tmp_path / f"{name}.safetensors")
    scores = {"fp32-openvino": kit.evaluate(kit._own(), kit.dataset(folder, "test"), {"threshold": 0.3}, tmp_path)}
    about = {
        "data": "the folder given", "frames": {"train": 3, "val": 3, "test": 3}, "parameters": 2, "seconds": 60,
        "device": "a machine", "seed": 0, "command": "fitkit train",
    }  # fmt: skip
    write_card(tmp_path, [], {"threshold": 0.3, "alarm": 0.8}, scores, about)
    text = (tmp_path / "README.md").read_text()
    for word in ("fp32.safetensors", "int8.safetensors", "Licence", "Seed", "Data", "Limits"):
        assert word in text
    card = json.loads((tmp_path / "card.json").read_text())
    assert (card["threshold"], card["alarm"]) == (0.3, 0.8)
    (tmp_path / "int8.safetensors").rename(tmp_path / "whole.safetensors")
    write_card(tmp_path, [], {"threshold": 0.3}, scores, about)
    assert "`whole.safetensors` what the recipe `whole` made" in (tmp_path / "README.md").read_text()


def test_what_the_card_remarks_stands_in_every_report_of_what_ships(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = BevPerception().remarks(None, None)
    assert len(shown) == 1 and "120 scenes" in shown[0] and "no gift of compression" in shown[0]
    assert BevPerception().remarks(None, tmp_path) == (), "of other weights the card says nothing"
    monkeypatch.setattr("kits.bev_perception.kit.WEIGHTS", tmp_path)
    (tmp_path / "card.json").write_text(json.dumps({"about": {}}))
    assert BevPerception().remarks(None, None) == ()
