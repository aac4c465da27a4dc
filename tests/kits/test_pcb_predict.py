"""`predict` on a person's own boards: what it writes, what it refuses, and what stays when an image is broken."""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from core.kit import InputError
from kits.pcb_inspection.model.pair import Grey
from kits.pcb_inspection.predict import COLUMNS, add_arguments, predict

META = {"threshold": 0.5}
SPUR = (40, 30, 70, 54)
HOLE = (120, 88, 140, 112)


class Marker(nn.Module):
    """A perfect detector: every piece of copper gained is a spur at 0.99, of copper lost a pin-hole at 0.73."""

    def forward(self, planes: Tensor) -> tuple[Tensor, Tensor]:
        logits, distances = torch.full((1, 6, 80, 80), -9.0), torch.zeros(1, 4, 80, 80)
        for label, plane, logit in ((3, 2, 5.0), (5, 3, 1.0)):
            mask = (planes[0, plane].numpy() > 0.5).astype(np.uint8)
            for x, y, width, height, _ in cv2.connectedComponentsWithStats(mask)[2][1:].tolist():
                column, row = int(x + width / 2) // 8, int(y + height / 2) // 8
                cx, cy = 8 * column + 4, 8 * row + 4
                sides = torch.tensor([cx - x, cy - y, x + width - cx, y + height - cy], dtype=torch.float32)
                logits[0, label, row, column] = logit
                distances[0, :, row, column] = (sides.clamp(min=0.2) / 8).log()
        return logits, distances


def boards(height: int = 160, width: int = 200) -> tuple[Grey, Grey]:
    """(test, template): a trace and a broad plane; the test has a spur and a pin-hole at SPUR and HOLE."""
    template = np.full((height, width), 255, np.uint8)
    template[:, 10:22] = 0
    template[70:130, 80:180] = 0
    test = template.copy()
    test[SPUR[1] : SPUR[3], SPUR[0] : SPUR[2]] = 0
    test[HOLE[1] : HOLE[3], HOLE[0] : HOLE[2]] = 255
    return test, template


def save(folder: Path, name: str, images: tuple[Grey, Grey], suffix: str = ".png") -> tuple[str, str]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}_{kind}{suffix}" for kind in ("test", "temp")]
    for path, image in zip(paths, images, strict=True):
        assert cv2.imwrite(str(path), image)
    return str(paths[0]), str(paths[1])


def run(inputs: list[str], out: Path, *arguments: str) -> tuple[str, list[dict[str, Any]]]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    said = predict(Marker(), inputs, META, out, parser.parse_args(arguments))
    return said, json.loads((out / "results.json").read_text())["boards"]


def found(board: dict[str, Any]) -> list[tuple[str, tuple[float, ...]]]:
    return [(d["class"], tuple(d["box"])) for d in board["detections"]]


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    return list(save(tmp_path / "in", "a", boards()))


def test_a_pair_leaves_json_csv_and_an_overlay(pair: list[str], tmp_path: Path) -> None:
    said, (board,) = run(pair, tmp_path / "out")
    assert "1 board(s): 0 accepted, 1 rejected at threshold 0.500" in said and "a: reject - spur 0.99" in said
    assert board["image"] == "a" and board["verdict"] == "reject" and board["size"] == [200, 160]
    assert (board["test"], board["template"]) == tuple(pair) and board["warnings"] == []
    assert found(board) == [("spur", SPUR), ("pin-hole", HOLE)]
    assert [d["confidence"] for d in board["detections"]] == [0.9933, 0.7311]
    assert [d["type"] for d in board["detections"]] == [4, 6]
    assert [d["longest_mm"] for d in board["detections"]] == [0.625, 0.5]  # 30 and 24 px of 48 a mm
    assert json.loads((tmp_path / "out/results.json").read_text())["threshold"] == 0.5
    with (tmp_path / "out/results.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == list(COLUMNS) and len(rows) == 3
    assert rows[1] == ["a", "reject", "spur", "4", "0.9933", "40.0", "30.0", "70.0", "54.0", "0.625", ""]
    overlay = cv2.imread(str(tmp_path / "out/overlays/a.png"))
    assert overlay.shape == (160, 200, 3)
    coloured = (overlay.max(2).astype(int) - overlay.min(2)) > 40
    assert coloured[30, 45:65].all() and coloured[88:112, 120].all()  # sides of both frames
    assert not coloured[:, :10].any()
    assert not (tmp_path / "out/overlays/a_defects.png").exists()


def test_a_good_board_is_accepted_with_a_row_of_its_own(tmp_path: Path) -> None:
    template = boards()[1]
    said, (board,) = run(list(save(tmp_path / "in", "g", (template, template))), tmp_path / "out", "--no-pictures")
    assert board["verdict"] == "accept" and board["detections"] == [] and "1 accepted" in said
    rows = (tmp_path / "out/results.csv").read_text().splitlines()
    assert rows[1] == "g,accept" + "," * 9
    assert not (tmp_path / "out/overlays").exists()


def test_the_threshold_decides_and_must_be_a_confidence(pair: list[str], tmp_path: Path) -> None:
    _, (board,) = run(pair, tmp_path / "out", "--threshold", "0.9")
    assert found(board) == [("spur", SPUR)]
    for wrong in ("0", "-1", "1.01", "nan"):
        with pytest.raises(InputError, match="--threshold"):
            run(pair, tmp_path / "wrong", "--threshold", wrong)
    for wrong in ("3", "2000", "nan", "inf"):
        with pytest.raises(InputError, match="--px-per-mm"):
            run(pair, tmp_path / "wrong", "--px-per-mm", wrong)
    assert not (tmp_path / "wrong").exists()


def test_a_folder_is_searched_and_its_structure_kept(tmp_path: Path) -> None:
    save(tmp_path / "in/line1", "b", boards())
    save(tmp_path / "in/line2", "b", boards())
    save(tmp_path / "in", "..", boards())  # an image named .._test.png
    _, results = run([str(tmp_path / "in")], tmp_path / "out")
    assert sorted(b["image"] for b in results) == ["..", "line1/b", "line2/b"]
    pictures = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.png") if "in" not in p.parts)
    assert pictures == ["out/overlays/...png", "out/overlays/line1/b.png", "out/overlays/line2/b.png"]


def test_a_list_may_name_one_template_twice_and_one_name_in_two_folders(tmp_path: Path) -> None:
    test, template = save(tmp_path / "one", "c", boards())
    clean = boards()[1]
    other, _ = save(tmp_path / "two", "c", (clean, clean))
    (tmp_path / "list.txt").write_text(f"{test} {template}\n{other} {template}\n{test}\t{template}\n")
    _, results = run([str(tmp_path / "list.txt")], tmp_path / "out")
    assert [(b["image"], b["verdict"]) for b in results] == [("c", "reject"), ("c_2", "accept"), ("c_3", "reject")]
    overlays = {p.name: cv2.imread(str(p)) for p in (tmp_path / "out/overlays").iterdir()}
    assert sorted(overlays) == ["c.png", "c_2.png", "c_3.png"]
    assert (overlays["c.png"] == overlays["c_3.png"]).all() and (overlays["c.png"] != overlays["c_2.png"]).any()


def test_lines_of_a_deeppcb_list_are_read(tmp_path: Path) -> None:
    save(tmp_path / "group1/1", "10", boards(), ".jpg")
    (tmp_path / "test.txt").write_text("group1/1/10.jpg group1/1_not/10.txt\n")
    _, (board,) = run([str(tmp_path / "test.txt")], tmp_path / "out")
    assert board["image"] == "10" and [d["class"] for d in board["detections"]] == ["spur", "pin-hole"]


def mask(path: Path, box: tuple[int, int, int, int], white: int = 255) -> str:
    image = np.zeros((160, 200), np.uint8)
    image[box[1] : box[3], box[0] : box[2]] = white
    cv2.imwrite(str(path), image)
    return str(path)


def regions(path: Path, *entries: Any) -> str:
    path.write_text(json.dumps(list(entries)))
    return str(path)


def test_masks_and_polygons_choose_where_and_what(pair: list[str], tmp_path: Path) -> None:
    spur, everything = [[30, 20], [80, 20], [80, 60], [30, 60]], [[0, 0], [200, 0], [200, 160], [0, 160]]
    here = mask(tmp_path / "spur.png", (50, 38, 60, 46))  # the centre decides
    of_spurs = regions(tmp_path / "spur.json", {"polygon": spur})
    typed = regions(tmp_path / "typed.json", {"polygon": everything, "classes": ["pin-hole", "open"]})
    two = regions(
        tmp_path / "two.json", {"polygon": spur, "classes": ["open"]}, {"polygon": everything, "classes": ["spur"]}
    )
    only_spur, only_hole = [("spur", SPUR)], [("pin-hole", HOLE)]
    for arguments, expected in [
        (("--roi", here), only_spur), (("--ignore", here), only_hole),
        (("--roi", of_spurs), only_spur), (("--ignore", of_spurs), only_hole),
        (("--roi", typed), only_hole), (("--ignore", typed), only_spur),
        (("--ignore", two), only_hole), (("--roi", here, "--ignore", of_spurs), []),
    ]:  # fmt: skip
        _, (board,) = run(pair, tmp_path / "out", *arguments, "--no-pictures")
        assert found(board) == expected, arguments
        assert board["verdict"] == ("reject" if expected else "accept")


def test_a_mask_that_does_not_fit_is_refused_before_any_board_is_inspected(pair: list[str], tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "small.png"), np.full((100, 200), 255, np.uint8))
    with pytest.raises(InputError, match="mask of 200 x 100 on an image of 200 x 160"):
        run(pair, tmp_path / "out", "--roi", str(tmp_path / "small.png"))
    with pytest.raises(InputError, match="brightest pixel is 1"):  # 0 and 1 instead of 0 and 255
        run(pair, tmp_path / "out", "--ignore", mask(tmp_path / "ones.png", (0, 0, 200, 160), white=1))
    with pytest.raises(InputError, match="not a readable image"):
        (tmp_path / "text.png").write_text("no image")
        run(pair, tmp_path / "out", "--roi", str(tmp_path / "text.png"))
    assert not (tmp_path / "out").exists()


TRIANGLE = [[0, 0], [9, 0], [9, 9]]


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"polygon": TRIANGLE[:2]}, "region 0: expected \"polygon\""),
        ({"polygon": [[0, 0], [9], [9, 9]]}, "at least three"),
        ({"polygon": [[0, 0], ["9", 0], [9, 9]]}, "at least three"),
        ({"polygon": [[0, 0], [float("nan"), 0], [9, 9]]}, "at least three"),
        ({"polygon": "0 0 9 0 9 9"}, "at least three"),
        ({"poligon": TRIANGLE}, "at least three"),
        ([1, 2], "at least three"),
        ({"polygon": TRIANGLE, "classes": ["scratch"]}, "class 'scratch' is not known"),
        ({"polygon": TRIANGLE, "classes": [["spur"]]}, "is not known"),
        ({"polygon": TRIANGLE, "classes": "spur"}, "to be a list"),
        ({"polygon": TRIANGLE, "classes": []}, "to be a list"),
        ({"polygon": TRIANGLE, "classes": None}, "to be a list"),
    ],
)  # fmt: skip
def test_wrong_regions_are_refused_by_number(pair: list[str], tmp_path: Path, entry: Any, says: str) -> None:
    with pytest.raises(InputError) as error:
        run(pair, tmp_path / "out", "--roi", regions(tmp_path / "r.json", entry))
    assert says in str(error.value) and "r.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"), [("{", "cannot be read as JSON"), ("[]", "no region in it"), (None, "r.json")]
)
def test_a_region_file_without_regions_is_refused(pair: list[str], tmp_path: Path, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / "r.json").write_text(text)
    with pytest.raises(InputError, match=says):
        run(pair, tmp_path / "out", "--ignore", str(tmp_path / "r.json"))


@pytest.mark.parametrize("px_per_mm", [24.0, 96.0])
def test_another_resolution_gives_boxes_in_the_images_pixels(tmp_path: Path, px_per_mm: float) -> None:
    factor = px_per_mm / 48
    test, template = (
        cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST) for image in boards()
    )
    inputs = list(save(tmp_path / "in", "s", (np.asarray(test), np.asarray(template))))
    _, (board,) = run(inputs, tmp_path / "out", "--px-per-mm", str(px_per_mm))
    assert board["size"] == [200 * factor, 160 * factor]
    assert [d["class"] for d in board["detections"]] == ["spur", "pin-hole"]
    for d, box, longest in zip(board["detections"], (SPUR, HOLE), (0.625, 0.5), strict=True):
        np.testing.assert_allclose(d["box"], np.array(box) * factor, atol=1.5 * factor)
        assert d["longest_mm"] == pytest.approx(longest, abs=0.045)


def test_the_template_of_another_board_is_warned_about(tmp_path: Path) -> None:
    test, template = boards()
    said, (board,) = run(
        list(save(tmp_path / "in", "w", (test, template.T[:160].copy().repeat(2, 1)[:, :200]))), tmp_path / "o"
    )
    assert len(board["warnings"]) == 1 and "w_temp.png after registration" in board["warnings"][0]
    assert "warning: " in said and board["registration"]["residual"] > 0.12


def test_a_broken_image_in_a_folder_keeps_what_was_done(tmp_path: Path) -> None:
    for name in "abc":
        save(tmp_path / "in", name, boards(), ".jpg")
    broken = tmp_path / "in/b_test.jpg"
    broken.write_bytes(broken.read_bytes()[:-400])
    with pytest.raises(InputError, match="b_test.jpg: the image is cut off"):
        run([str(tmp_path / "in")], tmp_path / "out")
    results = json.loads((tmp_path / "out/results.json").read_text())["boards"]
    assert [b["image"] for b in results] == ["a"] and len(results[0]["detections"]) == 2
    assert len((tmp_path / "out/results.csv").read_text().splitlines()) == 3


def test_inputs_that_are_no_pairs_are_refused(tmp_path: Path, pair: list[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.txt").write_text("\n")
    for inputs, says in [
        ([str(tmp_path / "empty")], "no NAME_test"), ([str(tmp_path / "list.txt")], "the list is empty"),
        ([pair[0]], "one image alone"), ([pair[0], str(tmp_path / "no.png")], "does not exist"),
        ([*pair, pair[0]], "3 paths"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=says):
            run(inputs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_scan_is_shown_reduced_with_a_sheet_of_its_detections(tmp_path: Path) -> None:
    template = np.full((300, 2200), 255, np.uint8)
    template[140:150] = 0
    test = template.copy()
    for x in range(20, 2180, 40):  # 54 spots, more than the sheet shows
        test[40:56, x : x + 16] = 0
    _, (board,) = run(list(save(tmp_path / "in", "s", (test, template))), tmp_path / "out")
    assert len(board["detections"]) == 54
    assert cv2.imread(str(tmp_path / "out/overlays/s.png")).shape == (round(300 * 2000 / 2200), 2000, 3)
    sheet = cv2.imread(str(tmp_path / "out/overlays/s_defects.png"))
    assert sheet.shape == (12 * 168, 4 * 268, 3)  # 48 cells: 128 px high and two of them wide, margins and text
    x1, y1, x2, _ = board["detections"][0]["box"]
    left, top = round((x1 + x2) / 2 - 64), round(y1 + 8 - 64)
    inside = np.s_[max(0, -top) + 2 : 126, max(0, -left) + 2 : 126]
    shown = np.full((128, 128), 255, np.uint8)
    part = template[max(0, top) : top + 128, max(0, left) : left + 128]
    shown[128 - part.shape[0] :, 128 - part.shape[1] :] = part
    beside = sheet[:128, 132:260, 0]  # the template's crop, at half contrast
    assert (np.abs(beside[inside].astype(int) - (shown[inside] // 2 + 128)) <= 1).all()
    spot = sheet[:128, :128, 0][56:72, 56:72]
    assert spot[4:12, 4:12].max() <= 130 and beside[56:72, 56:72].min() == 255
