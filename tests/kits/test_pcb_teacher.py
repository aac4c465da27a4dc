"""A YOLO as teacher: where its probabilities land on the detector's cells, and the loss that follows them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from core.kit import InputError
from kits.pcb_inspection import baseline
from kits.pcb_inspection.data.augment import Crop
from kits.pcb_inspection.model.loss import response_loss
from kits.pcb_inspection.training import taught

SIDE = 64
CELLS = [(SIDE // s) ** 2 for s in (8, 16, 32)]


class Yolo(nn.Module):
    """Answers as YOLOv8 does, (rows, features), with one hot cell at each stride."""

    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        self.nc = classes

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        rows = torch.zeros(len(images), 4 + self.nc, sum(CELLS))
        rows[:, 4 + 0, 9] = 0.9  # stride 8: second row, second cell
        rows[:, 4 + 1, CELLS[0] + 3] = 0.8  # stride 16: first row, last cell
        rows[:, 4 + 1, 6] = 0.3  # stride 8, inside that cell
        rows[:, 4 + 2, CELLS[0] + CELLS[1] + 2] = 0.7  # stride 32: lower left
        return rows, None


def teach(monkeypatch: pytest.MonkeyPatch, network: nn.Module) -> baseline.Callable[[Tensor], Tensor]:
    monkeypatch.setattr(baseline, "_yolo", lambda architecture, weights: SimpleNamespace(model=network))
    return baseline.yolo_teacher(Path("best.pt"))


def test_all_strides_meet_on_the_finest_and_the_larger_probability_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = teach(monkeypatch, Yolo())(torch.zeros(2, SIDE, SIDE, dtype=torch.uint8))
    wanted = torch.zeros(2, 6, 8, 8)
    wanted[:, 0, 1, 1] = 0.9
    wanted[:, 1, 0:2, 6:8] = 0.8  # over the 0.3 in its first row
    wanted[:, 2, 4:8, 0:4] = 0.7
    assert torch.equal(found, wanted)


def test_a_yolo_of_other_classes_and_an_end_to_end_head_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="best.pt: a YOLO of 80 classes, expected the 6"):
        teach(monkeypatch, Yolo(80))

    class EndToEnd(Yolo):
        def forward(self, images: Tensor) -> tuple[Tensor, None]:
            return torch.zeros(len(images), 300, 6), None

    with pytest.raises(InputError, match="yolov8n and yolo11n can teach"):
        teach(monkeypatch, EndToEnd())(torch.zeros(1, SIDE, SIDE, dtype=torch.uint8))


def test_a_file_that_is_no_yolo_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("ultralytics", reason="the extra 'baseline' (ultralytics) is not installed")
    (tmp_path / "a.log").write_text("no weights")
    (tmp_path / "torn.pt").write_bytes(b"PK no weights either")
    with pytest.raises(InputError, match=r"a\.log: not a file of Ultralytics' weights \(\.pt\); give the best\.pt"):
        baseline.yolo_teacher(tmp_path / "a.log")
    with pytest.raises(InputError, match=r"torn\.pt: Ultralytics cannot read it"):
        baseline.yolo_teacher(tmp_path / "torn.pt")


def test_an_inverted_crop_is_shown_as_it_was_and_answered_in_dual_classes() -> None:
    seen: list[Tensor] = []

    def teacher(images: Tensor) -> Tensor:
        seen.append(images)
        return torch.arange(6.0)[None, :, None, None].expand(len(images), 6, 1, 1)

    image = np.full((8, 8), 255, np.uint8)
    image[2:4] = 0
    nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    batch = [Crop(image, image, *nothing), Crop(255 - image, 255 - image, *nothing, True)]
    answer = taught(teacher, batch)
    assert torch.equal(seen[0][0], seen[0][1])
    assert answer[0, :, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert answer[1, :, 0, 0].tolist() == [1, 0, 3, 2, 5, 4]  # what it calls open is a short there, and so on


def test_the_response_loss_vanishes_where_student_and_teacher_agree() -> None:
    taught_ = torch.full((1, 6, 2, 2), 0.25)
    agreed = torch.logit(taught_).requires_grad_()
    assert response_loss(agreed, taught_).item() == 0
    apart = torch.zeros(1, 6, 2, 2, requires_grad=True)
    # 24 cells of ln 2 * 0.25^2, over the teacher's mass of 24 * 0.25
    assert response_loss(apart, taught_).item() == pytest.approx(0.6931472 * 0.0625 / 0.25)
    response_loss(apart, taught_).backward()
    assert apart.grad is not None
    assert (apart.grad > 0).all()  # towards the teacher's smaller probability


def test_a_real_yolov8n_teaches_and_has_a_cell_for_each_of_ours() -> None:
    pytest.importorskip("ultralytics", reason="the extra 'baseline' (ultralytics) is not installed")
    network = baseline._yolo("yolov8n", None).model.eval()
    with torch.no_grad():
        rows = network(torch.zeros(1, 3, SIDE, SIDE))[0]
    assert rows.shape == (1, 10, sum(CELLS))
