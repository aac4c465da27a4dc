"""Blocks passed by: what goes through them, what keeps its name, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from core.kit import InputError
from core.pruning.bypass import Bypass, bypass, bypassed

X = torch.arange(18.0).reshape(1, 2, 3, 3)


class Residual(nn.Module):
    """A residual block with a projection, as diffusers names it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(2, channels, 1) if channels != 2 else None

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + (x if self.conv_shortcut is None else self.conv_shortcut(x))


def test_what_goes_in_comes_out_in_the_form_asked_for() -> None:
    assert Bypass()(X, torch.zeros(1)) is X
    found = Bypass()(X, encoder_hidden_states=None, return_dict=False)
    assert isinstance(found, tuple) and found[0] is X


def test_a_projection_stays_under_its_name() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Residual(2), Residual(4))
    shortcut = net.get_submodule("1.conv_shortcut")
    assert bypass(net, ["0", "1"]) is net
    assert bypassed(net) == ["0", "1"]
    assert list(net.state_dict()) == ["1.conv_shortcut.weight", "1.conv_shortcut.bias"]
    assert torch.equal(net(X), shortcut(X))


def test_passing_by_twice_is_passing_by_once() -> None:
    net = nn.Sequential(Residual(4))
    bypass(net, ["0"])
    before = net.state_dict()
    assert list(bypass(net, ["0"]).state_dict()) == list(before)


def test_a_name_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="removed block 'down.9': no such module in this Sequential"):
        bypass(nn.Sequential(Residual(2)), ["down.9"])
