"""Where annotators draw their boxes: measured on validation boards, and applied to what an artifact finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from core.export import export
from kits.pcb_inspection import KIT
from kits.pcb_inspection.frozen import SHIFTED, freeze_shift, shifted
from kits.pcb_inspection.model.inspector import inspect, shift_of


def test_the_shift_is_the_median_from_found_boxes_to_true_ones() -> None:
    rng = np.random.default_rng(0)
    corners = rng.uniform(50, 500, (60, 2))
    boxes = np.concatenate((corners, corners + rng.uniform(20, 40, (60, 2))), 1).astype(np.float32)
    labels = rng.integers(0, 6, 60)
    found = np.concatenate((boxes + rng.normal(0, 0.2, boxes.shape), np.full((60, 1), 0.9), labels[:, None]), 1)
    found[:, [0, 2]] += 0.5
    found[:, [1, 3]] -= 0.25
    found[:3, :4] += 300  # found elsewhere, so not these defects
    told = freeze_shift({"a": found.astype(np.float32)}, {"a": (boxes, labels)})
    assert told == pytest.approx((-0.5, 0.25), abs=0.08)
    moved = shifted({"a": found.astype(np.float32)}, told)["a"]
    assert moved[:, 4:].tolist() == found[:, 4:].astype(np.float32).tolist() and moved.dtype == np.float32
    again = freeze_shift({"a": moved}, {"a": (boxes, labels)})
    assert again == pytest.approx((0, 0), abs=0.02)


def test_few_boxes_tell_nothing_and_other_classes_do_not_count() -> None:
    few = SHIFTED - 1
    boxes = np.tile(np.array([10, 10, 40, 40], np.float32), (few, 1)) + 50 * np.arange(few, dtype=np.float32)[:, None]
    found = np.concatenate((boxes + 1, np.ones((few, 1)), np.zeros((few, 1))), 1).astype(np.float32)
    assert freeze_shift({"a": found}, {"a": (boxes, np.zeros(few))}) == (0.0, 0.0)
    assert freeze_shift({"a": np.tile(found, (3, 1))}, {"a": (np.tile(boxes, (3, 1)), np.ones(3 * few))}) == (0.0, 0.0)
    assert freeze_shift({"a": found[:0]}, {"a": (boxes, np.zeros(few))}) == (0.0, 0.0)


def test_an_artifact_moves_its_boxes_and_freezing_goes_on_from_there(tmp_path: Path) -> None:
    models, meta = KIT.shipped()
    artifact = export({"int8": models["int8"]}, KIT.exports(), "x86-edge-box", tmp_path / "artifact", kit=KIT.name,
                      meta={**meta, "shift": [0.0, 0.0]}, runtimes=["openvino"])  # fmt: skip
    pairs = list(KIT.dataset(None, "val", "smoke"))[:6]
    plain = [inspect(artifact.as_module("int8-openvino"), *pair.load()).detections for pair in pairs]
    first = KIT.freeze(artifact.as_module("int8-openvino"), None, "smoke")
    artifact.describe({**artifact.meta, "shift": [1.5, -2.0]})
    module = artifact.as_module("int8-openvino")
    assert shift_of(module) == (1.5, -2.0) and shift_of(models["int8"]) == (0.0, 0.0)
    for pair, before in zip(pairs, plain):
        after = inspect(module, *pair.load()).detections
        wanted = (before[:, :4] + np.array([1.5, -2, 1.5, -2], np.float32)).clip(0, 640)
        np.testing.assert_allclose(after[:, :4], wanted, atol=1e-3)
        np.testing.assert_array_equal(after[:, 4:], before[:, 4:])
    then = KIT.freeze(module, None, "smoke")
    assert then["shift"] == pytest.approx(first["shift"], abs=0.05)
