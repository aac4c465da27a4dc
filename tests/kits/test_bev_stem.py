"""The stem over depth gives what the stem gave."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from core.compress import compress
from core.kit import InputError, Recipe
from core.pruning import Sparsify, sparse_utilization
from kits.bev_perception.model.detector import BEVFormer, example_inputs
from kits.bev_perception.stem import DepthStem, SpaceToDepth, restore
from tests.kits.bev_models import MICRO


def test_it_is_the_same_convolution() -> None:
    torch.manual_seed(0)
    stem, images = nn.Conv2d(3, 8, 7, 2, 3, bias=False), torch.randn(2, 3, 30, 44)
    torch.testing.assert_close(SpaceToDepth.of(stem)(images), stem(images), rtol=1e-4, atol=1e-5)


def test_a_detector_says_the_same_and_can_be_built_again() -> None:
    torch.manual_seed(0)
    net, inputs = BEVFormer(MICRO).eval(), tuple(example_inputs(MICRO).values())
    small, trace = compress(net, Recipe("r", (DepthStem(),), "", ""), object())  # type: ignore[arg-type]
    with torch.no_grad():
        for ours, theirs in zip(small(*inputs), net(*inputs), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert "same result" in trace[0].changed[0]["what"]
    again = restore(copy.deepcopy(net), DepthStem(), {})
    again.load_state_dict(small.state_dict())


def test_the_stem_can_then_be_thinned_out() -> None:
    torch.manual_seed(0)
    net, inputs = BEVFormer(MICRO).eval(), tuple(example_inputs(MICRO).values())
    shares = []
    for steps in ((Sparsify(),), (DepthStem(), Sparsify())):
        small, _ = compress(net, Recipe("r", steps, "", ""), object())  # type: ignore[arg-type]
        shares.append(sparse_utilization(small, inputs).share)
    assert shares[1] > shares[0] + 0.05


def test_another_stem_is_refused() -> None:
    with pytest.raises(InputError, match="no img_backbone.conv1"):
        compress(nn.Linear(2, 2), Recipe("r", (DepthStem(),), "", ""), object())  # type: ignore[arg-type]
