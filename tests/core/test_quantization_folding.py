"""Folded networks compute what they did; what cannot be folded is named."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.quantization import find_folds, fold


class Named(nn.Module):
    """Attributes conv/bn, a branch, a depthwise convolution, a norm that stands first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.deep, self.deep_bn = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8, affine=False)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.SiLU(inplace=True))
        self.forked, self.forked_bn = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.head, self.head_bn = nn.Linear(8, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(self.first(x))))
        x = self.body(self.deep_bn(self.deep(x)))
        y = self.forked(x)
        x = self.forked_bn(y) + y
        return self.head_bn(self.head(x.mean((2, 3))))


def trained(model: nn.Module) -> nn.Module:
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.2, 3)
            if m.affine:
                nn.init.normal_(m.weight)
                nn.init.normal_(m.bias)
    return model.eval()


def test_folding_keeps_the_function() -> None:
    model, x = trained(Named()), torch.randn(4, 3, 9, 9)
    pairs, _ = find_folds(model, (x,))
    assert pairs == [("conv", "bn"), ("deep", "deep_bn"), ("body.0", "body.1"), ("head", "head_bn")]
    folded = fold(copy.deepcopy(model), pairs)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)
    left = [n for n, m in folded.named_modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert left == ["first", "forked_bn"]


def test_what_is_not_folded_is_named_with_the_reason() -> None:
    _, skipped = find_folds(trained(Named()), (torch.randn(2, 3, 5, 5),))
    why = {s.layer: s.why for s in skipped}
    assert "not the output of a convolution" in why["first"]
    assert "the output of forked is used elsewhere" in why["forked_bn"]
    assert len(why) == 2


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.b.weight = self.a.weight
        self.twice, self.returned = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.bn_b, self.bn_twice, self.bn_returned = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.unused = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.bn_b(self.b(self.a(x)))
        x = self.bn_twice(self.twice(self.twice(x)))
        y = self.returned(x)
        return self.bn_returned(y), y


@pytest.mark.parametrize(
    "norm, reason",
    [
        ("bn_b", "shares its parameters"),
        ("bn_twice", "is called 2 times"),
        ("bn_returned", "is used elsewhere too"),
        ("unused", "was not called"),
    ],
)
def test_traps(norm: str, reason: str) -> None:
    pairs, skipped = find_folds(trained(Tied()), (torch.randn(1, 3, 4, 4),))
    assert pairs == []
    assert reason in {s.layer: s.why for s in skipped}[norm]


def test_watching_leaves_modes_and_statistics_alone() -> None:
    model = Named().train()
    model.body.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    find_folds(model, (torch.randn(2, 3, 5, 5),))
    assert model.training and model.conv.training and not model.body[0].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
