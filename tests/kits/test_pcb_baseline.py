"""The YOLO baseline: the data set that it writes, and what it says where it cannot run."""

from __future__ import annotations

import importlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from core.kit import InputError
from core.weights import save_weights
from kits.pcb_inspection import KIT, baseline
from kits.pcb_inspection.data.deeppcb import CLASSES, Pair


def pair(folder: Path, name: str, boxes: list[list[float]], labels: list[int]) -> Pair:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{name}_{kind}.png" for kind in ("test", "temp")]
    for path, level in zip(paths, (200, 100), strict=True):
        cv2.imwrite(str(path), np.full((80, 160), level, np.uint8))
    return Pair(name, "g", *paths, np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64))


def test_pairs_become_yolos_own_layout(tmp_path: Path) -> None:
    train = [
        pair(tmp_path / "in", "a", [[16, 20, 48, 40], [0, 0, 160, 80]], [3, 0]),
        pair(tmp_path / "in", "b", [], []),
    ]
    val = [pair(tmp_path / "in", "c", [[80, 60, 120, 80]], [5])]
    table = baseline.write_yolo_dataset(train, val, tmp_path / "out")
    files = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*"))
    assert files == [
        "data.yaml", "images/train/a.png", "images/train/b.png", "images/val/c.png",
        "labels/train/a.txt", "labels/train/b.txt", "labels/val/c.txt",
    ]  # fmt: skip
    # class, centre and size over the image's width of 160 and height of 80
    rows = (tmp_path / "out/labels/train/a.txt").read_text().splitlines()
    assert rows == ["3 0.200000 0.375000 0.200000 0.250000", "0 0.500000 0.500000 1.000000 1.000000"]
    assert (tmp_path / "out/labels/train/b.txt").read_text() == ""
    assert (tmp_path / "out/labels/val/c.txt").read_text() == "5 0.625000 0.875000 0.250000 0.250000\n"
    assert (tmp_path / "out/images/val/c.png").read_bytes() == val[0].test.read_bytes()
    lines = table.read_text().splitlines()
    assert lines[:4] == [f"path: {(tmp_path / 'out').resolve()}", "train: images/train", "val: images/val", "names:"]
    assert lines[4:] == [f"  {i}: {name}" for i, name in enumerate(CLASSES)]
    three = baseline.write_yolo_dataset(train, val, tmp_path / "three", val).read_text().splitlines()
    assert three[1:4] == ["train: images/train", "val: images/val", "test: images/test"]
    assert (tmp_path / "three/images/test/c.png").is_file()


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    for call in (
        lambda: baseline.exported("yolov5n"),
        lambda: baseline.train_yolo("yolov5n", [], [], tmp_path, 1),
        lambda: baseline.yolo_macs("yolov5n"),
    ):
        with pytest.raises(InputError, match=r"YOLO 'yolov5n' is not known here; known are yolov8n, yolo11n, yolo26n"):
            call()


def test_without_ultralytics_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline, "available", lambda: False)
    assert baseline.speed_baselines([], 1) == {}
    with pytest.raises(
        InputError, match=r"ultralytics \(AGPL-3.0\); install it with: pip install 'fitkit\[baseline\]'"
    ):
        baseline.train_yolo("yolov8n", [], [], tmp_path, 1)


def test_the_untrained_baseline_says_so_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline, "available", lambda: True)
    monkeypatch.setattr(baseline, "exported", lambda architecture: tmp_path / f"{architecture}.xml")
    monkeypatch.setattr(
        importlib.import_module("core.export.openvino"), "OpenVINOModule", lambda path, threads, as_tuple: None
    )
    (name,) = baseline.speed_baselines([pair(tmp_path, "a", [], [])], 1)
    assert name == "yolov8n-fp32-openvino (random weights: architecture only)"
    assert name.split("-")[0] == "yolov8n", "its figure is speedup_yolov8n"


class Output(nn.Module):
    """Returns one output whatever it is given."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, image: Tensor) -> Tensor:
        assert image.shape == (1, 3, 8, 8) and image.dtype == torch.uint8 and image.max() == 255
        return self.output


IMAGE = np.full((1, 3, 8, 8), 255, np.uint8)


def test_an_output_of_cells_is_decoded_and_suppressed_class_blind() -> None:
    rows = torch.zeros(1, 10, 400)
    rows[0, :4, 0] = torch.tensor([50.0, 40.0, 20.0, 10.0])  # centre and size
    rows[0, 4 + 2, 0] = 0.9
    rows[0, :4, 7] = torch.tensor([51.0, 40.0, 20.0, 10.0])  # the same place, another class
    rows[0, 4 + 5, 7] = 0.8
    rows[0, :4, 399] = torch.tensor([200.0, 100.0, 8.0, 40.0])
    rows[0, 4 + 1, 399] = 0.3
    rows[0, 4 + 1, 5] = 0.005  # below the floor
    found = baseline._detect(Output(rows), IMAGE)
    np.testing.assert_allclose(found, [[40, 35, 60, 45, 0.9, 2], [196, 80, 204, 120, 0.3, 1]], rtol=1e-6)


def test_an_end_to_end_output_is_taken_as_it_is() -> None:
    rows = torch.zeros(1, 300, 6)
    rows[0, 0] = torch.tensor([40.0, 35, 60, 45, 0.9, 2])
    np.testing.assert_allclose(baseline._detect(Output(rows), IMAGE), rows[0, :1])


def test_weights_of_a_yolo_are_kept_without_a_pickle(tmp_path: Path) -> None:
    pytest.importorskip("ultralytics")
    first, other = (baseline._yolo("yolov8n", None).model for _ in range(2))
    name = "model.0.conv.weight"
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])
    save_weights(first.half(), tmp_path / "weights.safetensors")
    again = baseline._yolo("yolov8n", tmp_path / "weights.safetensors").model
    kept = again.state_dict()
    assert kept[name].dtype == torch.float32 and torch.equal(kept[name], first.state_dict()[name].float())
    with pytest.raises(InputError, match=r"weights.safetensors: not weights of this DetectionModel"):
        baseline._yolo("yolo11n", tmp_path / "weights.safetensors")


def test_a_trained_yolo_is_not_trained_again(tmp_path: Path) -> None:
    (tmp_path / "done").touch()
    best = baseline.train_yolo("yolov8n", [], [], tmp_path, 1, resume=True)
    assert best == tmp_path / "runs" / "train" / "weights" / "best.pt"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ultralytics' and NNCF's own
def test_a_yolo_is_quantized_by_its_own_tool_and_detects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ultralytics")
    monkeypatch.setenv("FITKIT_CACHE", str(tmp_path))
    boards = KIT.dataset(None, "train", "smoke")[:4]
    plain, small = baseline.exported("yolov8n"), baseline.exported("yolov8n", None, boards)
    assert small.with_suffix(".bin").stat().st_size < 0.4 * plain.with_suffix(".bin").stat().st_size
    found = baseline.detect_yolo(small, boards[:1], 1)
    assert list(found) == [boards[0].image_id] and found[boards[0].image_id].shape[1] == 6
    assert 3e9 < baseline.yolo_macs("yolov8n") < 5e9
