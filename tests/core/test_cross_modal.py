"""Losses between networks of two sensors."""

from __future__ import annotations

import pytest
import torch

from core.distillation import guided_loss, relation_loss
from core.kit import InputError


def test_scale_and_offset_of_the_other_sensor_do_not_matter() -> None:
    torch.manual_seed(0)
    teacher, weight = torch.randn(2, 8, 4, 5), torch.rand(2, 1, 4, 5)
    assert float(guided_loss(3 * teacher + 1, teacher, weight)) == pytest.approx(0.0, abs=1e-6)
    assert float(guided_loss(torch.randn(2, 8, 4, 5), teacher, weight)) > 0.5


def test_only_what_matters_counts() -> None:
    torch.manual_seed(0)
    teacher = torch.randn(1, 8, 4, 5)
    student, weight = teacher.clone(), torch.zeros(1, 1, 4, 5)
    student[..., 0, 0] = torch.randn(8)
    weight[..., 0, 0] = 1.0
    there = guided_loss(student, teacher, weight, background=0.0)
    weight[..., 0, 0], weight[..., 1, 1] = 0.0, 1.0
    assert float(there) > 0.1 and float(guided_loss(student, teacher, weight, background=0.0)) == 0.0


def test_gradient_goes_to_the_student_alone() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 4, 3, 3, requires_grad=True), torch.randn(1, 4, 3, 3, requires_grad=True)
    (
        guided_loss(student, teacher, torch.ones(1, 1, 3, 3)) + relation_loss(student[0, :, 0], teacher[0, :, 1])
    ).backward()
    assert student.grad is not None and float(student.grad.abs().sum()) > 0 and teacher.grad is None


def test_relations_need_no_common_channels() -> None:
    torch.manual_seed(0)
    teacher = torch.randn(6, 16)
    turned, _ = torch.linalg.qr(torch.randn(16, 16))
    assert float(relation_loss(teacher @ turned, teacher)) == pytest.approx(0.0, abs=1e-6)
    assert float(relation_loss(torch.randn(6, 4), teacher)) > 0.01
    assert float(relation_loss(torch.randn(1, 4), teacher[:1])) == 0.0


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="resample"):
        guided_loss(torch.zeros(1, 4, 3, 3), torch.zeros(1, 8, 3, 3), torch.zeros(1, 1, 3, 3))
    with pytest.raises(InputError, match="same things"):
        relation_loss(torch.zeros(3, 4), torch.zeros(2, 4))
