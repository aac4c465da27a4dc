"""Counting and memory plans against torch's own counter and plans written by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from core.hardware import (
    plan,
    profile,
    stored_bytes,
    trace,
)
from core.hardware.profile import remembered
from core.quantization import pack_module
from tests.core.devices import Attention, FakeQuantized, Residual, torch_macs


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        pytest.param(Residual(), (2, 4, 9, 9), id="convolutions"),
        pytest.param(Attention(), (2, 7, 32), id="matrix products outside layers"),
        pytest.param(nn.Conv2d(12, 24, 3, stride=2, groups=6), (1, 12, 11, 13), id="grouped"),
        pytest.param(nn.ConvTranspose2d(6, 4, 4, stride=2, padding=1), (1, 6, 5, 7), id="transposed"),
        pytest.param(nn.ConvTranspose2d(6, 12, 3, stride=2, groups=3), (1, 6, 5, 7), id="transposed grouped"),
        pytest.param(nn.Conv1d(4, 6, 5), (2, 4, 20), id="1-d"),
        pytest.param(nn.Conv3d(2, 4, 3), (1, 2, 5, 6, 7), id="3-d"),
        pytest.param(FakeQuantized(4, 8, 3), (1, 4, 8, 8), id="quantized wrapper"),
    ],
)
def test_macs_equal_half_of_torchs_flop_counter(model, shape):
    x = torch.randn(shape)
    assert sum(layer.macs for layer in profile(model, (x,))) == torch_macs(model, x) > 0


def test_multihead_attention_counts_what_the_fast_path_and_flash_attention_hide():
    model, x = nn.MultiheadAttention(32, 4, batch_first=True), torch.randn(2, 16, 32)
    expected = 2 * (16 * 32 * 96 + 2 * 16 * 16 * 32 + 16 * 32 * 32)  # batch x (qkv + scores and values + output)
    model.train()
    with FlopCounterMode(display=False) as counter:  # with gradients and weights, nothing is hidden
        model(x, x, x)
    assert counter.get_total_flops() // 2 == expected
    (layer,) = profile(model, (x, x, x))
    assert (layer.kind, layer.macs, layer.parameters) == ("MultiheadAttention", expected, 4224)
    fused = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    assert sum(p.macs for p in profile(fused, (x,))) == expected + 2 * (2 * 16 * 32 * 64)


def test_recurrent_layer_counts_both_weight_matrices_at_every_step():
    (layer,) = profile(nn.LSTM(10, 6, batch_first=True), (torch.randn(3, 5, 10),))
    assert layer.macs == 3 * 5 * 4 * 6 * (10 + 6)


def test_layer_profile_of_a_convolution():
    (layer,) = profile(nn.Conv2d(12, 24, 3, stride=2, groups=6), (torch.randn(1, 12, 11, 13),))
    assert layer.output_shape == (1, 24, 5, 6)
    assert (layer.weight_elements, layer.parameters) == (24 * 2 * 9, 24 * 2 * 9 + 24)
    assert (layer.input_elements, layer.output_elements) == (12 * 11 * 13, 24 * 5 * 6)
    assert (layer.channels, layer.groups) == ((12, 24), 6)


def test_arithmetic_outside_layers_is_named_after_its_module():
    model = nn.ModuleDict({"block": Attention()})
    model.forward = lambda x: model["block"](x)
    layers = {p.name: p for p in profile(model, (torch.randn(2, 7, 32),))}
    assert layers["block.bmm"].kind == "matmul"
    assert layers["block.bmm"].macs == layers["block.bmm_2"].macs == 2 * 7 * 7 * 32
    assert layers["block.qkv"].macs == 2 * 7 * 32 * 96


def test_profile_leaves_the_model_as_it_was():
    model = Residual().train()
    model.norm.eval()
    before = copy.deepcopy(model.state_dict())
    profile(model, (torch.randn(1, 4, 8, 8),))
    assert model.training and not model.norm.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_quantizer_parameters_are_not_parameters_of_the_model():
    plain, wrapped = nn.Sequential(nn.Conv2d(4, 8, 3)), nn.Sequential(FakeQuantized(4, 8, 3))
    assert stored_bytes(plain, "int8") == stored_bytes(wrapped, "int8") == 8 * 4 * 9 + 4 * 8 + 4 * 8
    x = torch.randn(1, 4, 8, 8)
    (a,), (b,) = profile(plain, (x,)), profile(wrapped, (x,))
    assert a == b


def test_plan_of_a_residual_block_by_hand():
    run = trace(Residual(), (torch.randn(1, 4, 8, 8),))
    # x (256) is kept for the sum; wide, norm and act share 512; narrow makes 256 more; sum and relu work in place.
    assert plan(run).peak == plan(run).arena == 4 * (256 + 512 + 256)
    assert plan(run).at == "narrow"
    assert plan(run, "int8").arena == 256 + 512 + 256
    # The wide tensor alone in 16 bits: 4 * 256 + 2 * 512 + 4 * 256.
    assert plan(run, {"wide": "fp16", "norm": "fp16", "act": "fp16", "*": "fp32"}).peak == 3072


def test_plan_of_a_chain_reuses_the_first_buffer():
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 128))
    made = plan(trace(model, (torch.randn(1, 64),)))
    assert made.peak == made.arena == 4 * (64 + 128)
    for a in made.placements:
        for b in made.placements:
            if a is not b and a.born <= b.dies and b.born <= a.dies:
                assert a.offset + a.size <= b.offset or b.offset + b.size <= a.offset


def test_plan_drops_weights_of_a_simulation_and_unread_indices():
    x = torch.randn(1, 4, 8, 8)
    simulated = plan(trace(FakeQuantized(4, 8, 3, padding=1), (x,)), "int8")
    assert simulated == plan(trace(nn.Conv2d(4, 8, 3, padding=1), (x,)), "int8")

    class Pool(nn.Module):
        def forward(self, x):
            return F.max_pool2d(F.relu(x) * F.sigmoid(x), 2)

    assert plan(trace(nn.Sequential(Pool()), (x,))).peak == 4 * 3 * 256


def test_a_model_is_run_once_while_it_is_remembered() -> None:
    runs: list[int] = []

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            runs.append(len(x))
            return self.layer(x)

    model, other = Counts(), Counts()
    with remembered():
        first = profile(model, (torch.rand(1, 3),))
        assert profile(model, (torch.rand(1, 3),)) == first and runs == [1]
        profile(model, (torch.rand(2, 3),))
        profile(other, (torch.rand(1, 3),))
        assert runs == [1, 2, 1]
    profile(model, (torch.rand(1, 3),))
    assert runs == [1, 2, 1, 1], "forgotten at its end"


def test_a_packed_weight_is_not_expanded_to_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack_module(nn.Linear(8, 4), bits=4, group_size=8)
    calls: list[int] = []
    real = type(packed).dequantized
    monkeypatch.setattr(type(packed), "dequantized", lambda self, *given: (calls.append(1), real(self, *given))[1])
    (layer,) = profile(nn.Sequential(packed), (torch.rand(1, 8),))
    assert (layer.parameters, layer.weight_elements) == (36, 32) and len(calls) == 1, "for the run itself"
