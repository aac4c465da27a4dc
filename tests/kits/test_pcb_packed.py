"""Scans at a bit a pixel: the same pixels, the same detections, and a fraction of the memory."""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

import kits.pcb_inspection.predict  # noqa: F401  the package has a function of this name
from core.cli import main
from core.kit import InputError
from kits.pcb_inspection.data.deeppcb import find_pairs
from kits.pcb_inspection.model import packed as packing
from kits.pcb_inspection.model.packed import Packed
from kits.pcb_inspection.model.pair import Grey, binarise, level


def photograph(height: int = 700, width: int = 901, seed: int = 0) -> Grey:
    """Copper and bare board as a camera sees them: two grey levels that 127 does not part, and noise."""
    rng = np.random.default_rng(seed)
    copper = cv2.GaussianBlur(rng.normal(size=(height, width)), (0, 0), 9) > 0
    return np.clip(np.where(copper, 140, 190) + rng.normal(0, 6, copper.shape), 0, 255).astype(np.uint8)


def of(image: Grey) -> Packed:
    return Packed((image.shape[0], image.shape[1]), lambda top, bottom: image[top:bottom])


@pytest.mark.parametrize("rows", [7, 64, 1024])
def test_a_packed_image_is_the_binarised_one(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_ROWS", rows)
    monkeypatch.setattr(packing, "_PACKED", rows)
    image = photograph()
    assert level(image) > 140, "an image whose level is its own"
    whole, packed = binarise(image), of(image)
    assert packed.shape == image.shape
    np.testing.assert_array_equal(packed[:, :], whole)
    for here in (
        np.s_[3:90, 5:6],
        np.s_[100:101, 13:800],
        np.s_[600:5000, 850:4000],
        np.s_[-20:, -9:],
        np.s_[5:5, 7:3],
    ):
        np.testing.assert_array_equal(packed[here], whole[here])
    small = packed.reduced((90, 70))
    assert small.shape == (70, 90)
    near = cv2.resize(whole, (90, 70), interpolation=cv2.INTER_AREA).astype(int)
    assert np.abs(small.astype(int) - near).mean() < 12


def test_packed_files_are_those_that_are_loaded(tmp_path: Path) -> None:
    test, template = photograph(), photograph(seed=1)
    cv2.imwrite(str(tmp_path / "a_test.png"), test)
    cv2.imwrite(str(tmp_path / "a_temp.png"), cv2.cvtColor(template, cv2.COLOR_GRAY2BGR))  # not grey: read otherwise
    (pair,) = find_pairs(tmp_path)
    for packed, image in zip(pair.load_packed(), pair.load()):
        np.testing.assert_array_equal(packed[:, :], binarise(image))


def test_what_cannot_be_read_is_said_as_ever(tmp_path: Path) -> None:
    image = photograph()
    for name in ("test", "temp"):
        cv2.imwrite(str(tmp_path / f"a_{name}.png"), image)
    (pair,) = find_pairs(tmp_path)
    cv2.imwrite(str(pair.template), image[:-1])
    with pytest.raises(InputError, match="901 x 700"):
        pair.load_packed()
    data = (tmp_path / "a_test.png").read_bytes()
    (tmp_path / "a_test.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="cut off"):
        pair.load_packed()
    (tmp_path / "a_test.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(InputError, match="a_test.png"):
        pair.load_packed()


def test_predict_finds_the_same_in_a_packed_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predict = sys.modules["kits.pcb_inspection.predict"]
    template = np.full((1300, 1500), 255, np.uint8)
    for x in range(60, 1500, 120):
        template[:, x : x + 30] = 0
    test = template.copy()
    test[300:330, 90:180] = 0  # a short
    test[900:930, 660:690] = 255  # an open
    cv2.imwrite(str(tmp_path / "a_test.png"), test)
    cv2.imwrite(str(tmp_path / "a_temp.png"), template)
    words = ["predict", "pcb_inspection", str(tmp_path / "a_test.png"), str(tmp_path / "a_temp.png"), "--out"]
    assert main([*words, str(tmp_path / "plain")]) == 0
    monkeypatch.setattr(predict, "PACKED", 1000)
    loaded: list[int] = []
    monkeypatch.setattr(predict, "LONGEST_PICTURE", 700)
    real = predict.Pair.load_packed
    monkeypatch.setattr(predict.Pair, "load_packed", lambda self: (loaded.append(1), real(self))[1])
    assert main([*words, str(tmp_path / "packed")]) == 0
    assert loaded == [1]
    plain, packed = ((tmp_path / name / "results.csv").read_text() for name in ("plain", "packed"))
    assert plain == packed and plain.count("\n") >= 3
    pictures = sorted((tmp_path / "packed" / "overlays").iterdir())
    assert len(pictures) == 2 and pictures[1].stem == pictures[0].stem + "_defects"
    assert max(cv2.imread(str(pictures[0])).shape) == 700
