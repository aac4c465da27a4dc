"""The stacking ledger: a row a step, scored on the checkpoints that the run left."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.compress import compress
from core.kit import Recipe
from core.ledger import ledger, parameters, weight_bytes
from core.quantization import Pack
from tests.core.toy import KIT

META = {"threshold": 3}


def test_changes_add_up_to_the_loss_of_the_whole(tmp_path: Path) -> None:
    original = KIT.model()
    recipe = KIT.recipes["qat"]
    small, trace = compress(original, recipe, KIT, folder=tmp_path)
    samples = KIT.dataset(None, "test")
    table = ledger(KIT, original, trace, tmp_path, samples, META)
    assert table is not None
    assert [row[0] for row in table["rows"]] == ["(original)", "Quantize", "QAT"]
    points, changes = [row[3] for row in table["rows"]], [row[4] for row in table["rows"][1:]]
    assert points[0] == pytest.approx(KIT.score(original, samples, META)["accuracy"][0], abs=0.01)
    assert points[-1] == pytest.approx(KIT.score(small, samples, META)["accuracy"][0], abs=0.01)
    assert sum(changes) == pytest.approx(points[-1] - points[0], abs=0.02)


def test_packed_weights_count_as_the_bytes_that_they_take(tmp_path: Path) -> None:
    original = KIT.model()
    recipe = Recipe("int4", (Pack(bits=4, group_size=32, rounding="nearest", overrides=("head.1=16",)),), "", "")
    small, _ = compress(original, recipe, KIT)
    assert parameters(small) == parameters(original) == sum(p.numel() for p in original.parameters())
    kernels = [8 * 9, 8 * 8 * 9]
    floats = parameters(original) - sum(kernels)
    # 4 bits a weight in whole bytes a row, FP16 scales for each group of 32 of a row
    packed = 8 * 5 + 8 * 2 * 1 + 8 * 36 + 8 * 2 * 3
    assert weight_bytes(small) == 4 * floats + packed
    assert weight_bytes(original) == 4 * parameters(original)


def test_a_recipe_of_one_step_has_no_ledger(tmp_path: Path) -> None:
    original = KIT.model()
    _, trace = compress(original, KIT.recipes["int8"], KIT, folder=tmp_path)
    assert ledger(KIT, original, trace, tmp_path, KIT.dataset(None, "test"), META) is None
