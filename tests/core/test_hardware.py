"""Hardware figures against torch's own counter, closed forms and the tables they come from."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from core.figures import Estimated, Measured
from core.hardware import (
    estimate,
    fit,
    measure_host,
    plan,
    profile,
    roofline,
    stored_bytes,
    target,
    targets,
    trace,
    will_it_be_faster,
)
from core.hardware.energy import byte_energy, energy, mac_energy
from core.hardware.targets import MemoryLevel, Number, Target
from core.kit import Graph, InputError

NAMES = {
    "this-host", "x86-edge-box", "snapdragon-8-gen-2", "dimensity-9200", "jetson-orin", "mdc-810",
    "automotive-10tops", "stm32f746", "cortex-m7-64k", "edge-1w",
}  # fmt: skip


def number(value, unit):
    return {"value": value, "unit": unit, "source": "test"}


def entry():
    """A device with round numbers: 100 GFLOP/s kept half busy, one memory of 10 GB/s."""
    ram = {"name": "RAM", "technology": "dram", "holds": ["weights", "activations"]}
    ram |= {"bytes": number(1e9, "B"), "bandwidth": number(1e10, "B/s")}
    return {
        "title": "round device",
        "device_class": "test",
        "peak": {"fp32": number(1e11, "op/s"), "int8": number(4e11, "op/s")},
        "memory": [ram],
        "power": {"rated": number(10, "W"), "static": number(2, "W")},
        "process": number(45, "nm"),
        "efficiency": number(0.5, "share of peak"),
        "latency_band": number(0.4, "relative"),
        "macs_per_instruction": number(8, "MAC"),
    }


def device(tmp_path: Path, **changes) -> Target:
    file = tmp_path / "round.json"
    file.write_text(json.dumps({**entry(), **changes}))
    return target(str(file))


def graph(*inputs: torch.Tensor, part: str = "") -> tuple[Graph, ...]:
    return (Graph("g", {f"x{i}": x for i, x in enumerate(inputs)}, ("y",), part),)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU()
        self.narrow = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x):
        return F.relu(self.narrow(self.act(self.norm(self.wide(x)))) + x)


class Attention(nn.Module):
    """Attention by matrix products outside any layer."""

    def __init__(self, dim=32):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, -1)
        return self.out(torch.einsum("bij,bjd->bid", weights, v))


class FakeQuantized(nn.Conv2d):
    """A wrapper as quantization makes them: a Conv2d that owns quantizers and simulates in its forward."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.quantizer = nn.Sequential(nn.Identity())
        self.step = nn.Parameter(torch.tensor(0.1))

    def forward(self, x):
        x = self.quantizer(torch.round(x / self.step) * self.step)
        weight = torch.clamp(torch.round(self.weight / self.step), -128, 127) * self.step
        return self._conv_forward(x, weight, self.bias)


def torch_macs(model, *inputs):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(*inputs)
    return counter.get_total_flops() // 2


# --- counting -------------------------------------------------------------------------------------------------


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


# --- memory ---------------------------------------------------------------------------------------------------


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


# --- latency --------------------------------------------------------------------------------------------------


def test_roofline_of_a_convolution_by_hand(tmp_path):
    box = device(tmp_path)
    (layer,) = profile(nn.Conv2d(16, 32, 3, padding=1, bias=False), (torch.randn(1, 16, 32, 32),))
    macs, moved = 32 * 32 * 32 * 16 * 9, 16 * 32 * 32 + 32 * 32 * 32 + 32 * 16 * 9
    (cost,) = roofline([layer], box, "fp32")
    assert cost.compute == pytest.approx(2 * macs / 5e10)
    assert cost.memory == pytest.approx(4 * moved / 1e10)
    assert cost.seconds == cost.compute and not cost.memory_bound
    (cost,) = roofline([layer], box, "int8")
    assert cost.seconds == cost.compute == pytest.approx(2 * macs / 2e11)
    (cost,) = roofline([layer], box, "fp32", {"*": 4})
    assert cost.memory == pytest.approx((4 * (moved - 4608) + 4608 / 2) / 1e10)


def test_depthwise_convolution_is_memory_bound(tmp_path):
    (cost,) = roofline(profile(nn.Conv2d(64, 64, 1, groups=64), (torch.randn(1, 64, 32, 32),)), device(tmp_path))
    assert cost.memory_bound
    assert cost.seconds == pytest.approx(4 * (2 * 64 * 32 * 32 + 64) / 1e10)


def test_thin_layers_leave_lanes_idle(tmp_path):
    x, box = torch.randn(1, 16, 8, 8), device(tmp_path)
    (depthwise,) = roofline(profile(nn.Conv2d(16, 16, 3, padding=1, groups=16), (x,)), box)
    assert depthwise.compute == pytest.approx(8 * 2 * 64 * 16 * 9 / 5e10)
    (colour,) = roofline(profile(nn.Conv2d(3, 16, 3, padding=1), (x[:, :3],)), box)
    assert colour.compute == pytest.approx(8 / 3 * 2 * 64 * 16 * 3 * 9 / 5e10)


def test_traffic_goes_to_the_nearest_memory_that_holds_it(tmp_path):
    near = {"name": "SRAM", "technology": "sram", "holds": ["activations"]}
    near |= {"bytes": number(4 * 192, "B"), "bandwidth": number(1e11, "B/s")}
    box = device(tmp_path, memory=[near, entry()["memory"][0]])
    model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.Linear(128, 128, bias=False))
    small, large = roofline(profile(model, (torch.randn(1, 64),)), box)
    assert small.memory == pytest.approx(4 * 192 / 1e11 + 4 * 64 * 128 / 1e10)
    assert large.memory == pytest.approx(4 * (256 + 128 * 128) / 1e10)


def test_data_type_falls_back_to_a_wider_one_or_is_refused(tmp_path):
    layers = profile(nn.Linear(8, 8), (torch.randn(1, 8),))
    assert roofline(layers, device(tmp_path), "int4")[0].runs_as == "int8"
    assert roofline(layers, device(tmp_path), "fp16")[0].runs_as == "fp32"
    only = device(tmp_path, peak={"int8": number(1e9, "op/s")})
    with pytest.raises(InputError, match="layer model is fp32, it computes only in int8"):
        roofline(layers, only, "fp32")
    with pytest.raises(InputError, match="'int7' is not known"):
        roofline(layers, only, "int7")


# --- energy ---------------------------------------------------------------------------------------------------


def test_energy_table_is_horowitz_2014():
    assert mac_energy("fp32") == pytest.approx(3.7 + 0.9)
    assert mac_energy("fp16") == pytest.approx(1.1 + 0.4)
    assert mac_energy("int8") == pytest.approx(0.2 + 0.1)
    assert mac_energy("fp32", 90) == pytest.approx(2 * 4.6)
    assert mac_energy("fp32", 4) == mac_energy("fp32", 7) == pytest.approx(4.6 * 7 / 45)
    for size, access in ((8 * 1024, 10), (32 * 1024, 20), (1024 * 1024, 100), (16 * 1024, 10 * 2**0.5)):
        level = MemoryLevel("m", "sram", ("weights",), Number(size, "B", "t"), Number(1, "B/s", "t"))
        assert byte_energy(level) == pytest.approx(access / 8)
    dram = MemoryLevel("m", "dram", ("weights",), Number(1e9, "B", "t"), Number(1, "B/s", "t"))
    assert 1300 / 8 < byte_energy(dram) < 2600 / 8
    assert byte_energy(dram, 7) == byte_energy(dram, 90)


def test_energy_of_a_convolution_by_hand(tmp_path):
    box = device(tmp_path)
    costs = roofline(profile(nn.Conv2d(16, 32, 3, padding=1, bias=False), (torch.randn(1, 16, 32, 32),)), box)
    macs, moved = 32 * 32 * 32 * 16 * 9, 16 * 32 * 32 + 32 * 32 * 32 + 32 * 16 * 9
    spent = energy(costs, box)
    assert spent.arithmetic == pytest.approx(macs * 4.6e-12)
    assert spent.instructions == pytest.approx(macs * 70e-12 / (8 * 0.5))
    assert spent.movement == pytest.approx(4 * moved * 1950e-12 / 8)
    assert spent.static == pytest.approx(2 * costs[0].seconds)


# --- estimate, fit, will_it_be_faster -------------------------------------------------------------------------


def test_estimate_names_units_and_bases(tmp_path):
    box, model, x = device(tmp_path), Residual(), torch.randn(1, 4, 8, 8)
    figures = estimate(model, graph(x), box, rate_hz=10.0)
    assert {f.name: f.unit for f in figures} == {
        "parameters": "count", "macs": "GMAC", "size": "MB", "peak_memory": "MB", "latency_p50": "ms", "fps": "1/s",
        "energy": "mJ", "efficiency": "TOPS/W", "power": "W",
    }  # fmt: skip
    found = {f.name: f for f in figures}
    counted = ("parameters", "macs")
    assert all(isinstance(found[n].basis, Measured) and found[n].basis.device == "count" for n in counted)
    others = [f for n, f in found.items() if n not in counted]
    assert all(isinstance(f.basis, Estimated) and f.basis.error_band and f.basis.assumptions for f in others)
    assert found["parameters"].value == sum(p.numel() for p in model.parameters()) == 604
    assert found["macs"].value == torch_macs(model, x) / 1e9
    assert found["size"].value == 4 * 604 / 1e6
    assert found["peak_memory"].value == 4096 / 1e6
    costs = roofline(profile(model, (x,)), box)
    seconds, spent = sum(c.seconds for c in costs), energy(costs, box)
    assert found["latency_p50"].value == pytest.approx(1e3 * seconds)
    assert found["latency_p50"].basis.error_band == 0.4
    assert found["efficiency"].value == pytest.approx(2 * found["macs"].value / found["energy"].value)
    assert found["power"].value == pytest.approx(10 * spent.dynamic + 2)
    assert "power" not in {f.name for f in estimate(model, graph(x), box)}


def test_estimate_adds_graphs_up_under_their_names_in_the_model(tmp_path):
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64))
    both = graph(torch.randn(1, 64), part="0") + graph(torch.randn(1, 32), part="1")
    figures = estimate(model, both, device(tmp_path), precision={"0": "int8", "1": "fp32"})
    assert figures.find("macs").value == 2 * 64 * 32 / 1e9
    assert figures.find("size").value == (64 * 32 + 4 * 32 + 4 * 32 + 4 * 32 * 64 + 4 * 64) / 1e6
    assert figures.find("peak_memory").value == 4 * (64 + 32) / 1e6  # the second graph, in FP32


def test_rate_that_is_out_of_reach_is_said(tmp_path):
    figures = estimate(nn.Linear(512, 512), graph(torch.randn(64, 512)), device(tmp_path), rate_hz=1e9)
    assert "this is the power at" in figures.find("power").basis.assumptions[1]
    with pytest.raises(InputError, match="rate_hz"):
        estimate(nn.Linear(8, 8), graph(torch.randn(1, 8)), device(tmp_path), rate_hz=0)


def test_fit_on_a_microcontroller_names_what_fails():
    x, model = torch.randn(1, 3, 128, 128), nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 3))
    small = target("stm32f746")
    verdict = fit(model, graph(x), small, "fp32")
    arena = 4 * 16 * 128 * 128 + 4 * 8 * 126 * 126
    assert not verdict.fits and verdict.arena.arena == arena
    assert verdict.failures == (
        f"activations take {arena / 1e6:.3g} MB of the 328 kB of SRAM: {(arena - 327680) / 1e6:.3g} MB too much; "
        "the most is alive at 1.",
    )
    narrow = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 8, 3))
    assert fit(narrow, graph(x), small, "int8").fits
    heavy = nn.Sequential(nn.Linear(1200, 1200))
    failed = fit(heavy, graph(torch.randn(1, 1200)), small, "int8")
    assert not failed.fits and failed.failures[0].startswith("weights take 1.45 MB of the 1.05 MB of flash")
    assert fit(heavy, graph(torch.randn(1, 1200)), small, "int8", {"*": 4}).fits
    volume = fit(nn.Sequential(nn.Conv3d(1, 1, 3)), graph(torch.randn(1, 1, 4, 4, 4)), small, "int8")
    assert volume.failures == ("No operator Conv3d on STMicroelectronics STM32F746, Cortex-M7 at 216 MHz: 0.",)


def test_fit_adds_weights_and_activations_that_share_a_memory(tmp_path):
    ram = {**entry()["memory"][0], "bytes": number(4 * (64 * 64 + 128), "B")}
    model, x = nn.Sequential(nn.Linear(64, 64, bias=False)), torch.randn(1, 64)
    assert fit(model, graph(x), device(tmp_path, memory=[ram])).fits
    ram["bytes"] = number(4 * (64 * 64 + 128) - 1, "B")
    assert not fit(model, graph(x), device(tmp_path, memory=[ram])).fits


def test_fit_notes_a_fallback_and_fails_without_one(tmp_path):
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(1, 8)
    verdict = fit(model, graph(x), device(tmp_path), "int4")
    assert verdict.fits and "No int4 on round device: 0 would run in int8." in verdict.notes
    assert verdict.arena.peak == 8 + 8  # activations in the type that really runs
    assert verdict.weight_bytes == 8 * 8 // 2 + 4 * 8 + 4 * 8  # nibbles, a scale and a bias for each output
    with pytest.raises(InputError, match="'int7' is not known"):
        fit(model, graph(x), device(tmp_path), "int7")
    only = device(tmp_path, peak={"int8": number(1e9, "op/s")})
    assert fit(model, graph(x), only, "fp32").failures == ("No fp32 on round device, and nothing wider: 0.",)


def test_warnings_name_layers(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(16, 30, 3, padding=1), nn.Conv2d(30, 30, 1, groups=30), nn.Conv2d(30, 64, 1), nn.Conv2d(64, 8, 3)
    )
    x = torch.randn(1, 16, 16, 16)
    box = device(tmp_path, peak={"fp32": number(1e12, "op/s"), "int8": number(4e12, "op/s")})
    said = will_it_be_faster(model, graph(x), box, "fp16")
    assert said[0] == "No fp16 on round device: 0, 1, 2, 3 would fall back to fp32, no faster."
    odd = "0 (16 to 30), 1 (30 to 30), 2 (30 to 64)"
    assert said[1] == f"Channels that are no multiple of 8 leave vector lanes idle: {odd}."
    bound = next(s for s in said if s.startswith("Bound by memory"))
    # Activations in FP32 and weights in FP16 at 10 GB/s, in us: 10.0, 8.1, 6.1 and 5.6; arithmetic 2.1, 3.6, 0.2, 4.4.
    assert bound == "Bound by memory, so fewer operations do not help (100% of the time): 2, 3, 1, 0."
    aligned = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1))
    assert will_it_be_faster(aligned, graph(torch.randn(1, 64, 32, 32)), box, "int8") == []


def test_warnings_on_data_types_that_gain_nothing(tmp_path):
    slow = device(tmp_path, peak={"fp32": number(1e11, "op/s"), "int8": number(1.3e11, "op/s")})
    model, x = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1)), torch.randn(1, 64, 32, 32)
    assert will_it_be_faster(model, graph(x), slow, "int8") == [
        "int8 is at most 1.3 times as fast as fp32 on round device: 0."
    ]


def test_warnings_on_zeros_that_nothing_skips(tmp_path):
    model, x = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1)), torch.randn(1, 64, 32, 32)
    with torch.no_grad():
        model[0].weight.view(-1, 4)[:, :2] = 0
    assert will_it_be_faster(model, graph(x), device(tmp_path)) == ["round device does not skip 2:4 zeros: 0 (50%)."]
    assert will_it_be_faster(model, graph(x), device(tmp_path, sparsity=["2:4"])) == []


# --- targets --------------------------------------------------------------------------------------------------


def test_every_shipped_target_is_valid_and_runs_a_small_network():
    assert set(targets()) == NAMES
    model, x = Residual(), torch.randn(1, 4, 16, 16)
    for name, box in targets().items():
        assert box.name == name and "fp32" in box.dtypes
        figures = estimate(model, graph(x), box, precision="int8", rate_hz=1.0)
        assert figures.find("latency_p50").value > 0
        # Static power and the dynamic work of a network that keeps a device busy stay within its rating.
        assert box.power["static"].value < box.power["rated"].value


@pytest.mark.parametrize("name", sorted(NAMES - {"this-host"}))
def test_full_load_stays_near_the_rated_power(name):
    box = target(name)
    model, x = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1)), torch.randn(1, 64, 64, 64)
    costs = roofline(profile(model, (x,)), box, "int8")
    spent = energy(costs, box)
    assert spent.total / sum(c.seconds for c in costs) < 2 * box.power["rated"].value


def test_published_numbers():
    assert target("jetson-orin").peak["fp32"].value == 5.3e12
    assert target("jetson-orin").sparsity == ("2:4",)
    assert target("mdc-810").peak["int8"].value == 400e12
    assert target("stm32f746").level_for("weights", 1).bytes.value == 1 << 20
    assert target("stm32f746").level_for("activations", 1).bytes.value == 320 << 10
    assert target("cortex-m7-64k").level_for("activations", 1).bytes.value == 64 << 10
    assert target("edge-1w").power["rated"].value == 1


def _without(key):
    data = entry()
    del data[key]
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({**entry(), "colour": "red"}, "target mine: the target: unknown field 'colour'"),
        (_without("process"), "target mine: the target: field 'process' is missing"),
        ({**entry(), "process": {"value": 7, "unit": "nm"}}, "target mine: process: field 'source' is missing"),
        ({**entry(), "process": {"value": 7, "unit": "nm", "source": " "}}, "field process.source: found ' '"),
        ({**entry(), "process": number(0, "nm")}, "field process.value: found 0, expected a positive number"),
        ({**entry(), "process": number(True, "nm")}, "field process.value: found True"),
        ({**entry(), "process": number(7, "um")}, "field process.unit: found 'um', expected 'nm'"),
        ({**entry(), "peak": {"int3": number(1, "op/s")}}, "target mine: peak: unknown field 'int3'"),
        ({**entry(), "peak": {}}, "field peak: empty"),
        ({**entry(), "memory": []}, "field memory: found"),
        ({**entry(), "memory": [{**entry()["memory"][0], "holds": ["code"]}]}, "holds: found"),
        ({**entry(), "memory": [{**entry()["memory"][0], "holds": ["weights"]}]}, "no level holds activations"),
        ({**entry(), "memory": [{**entry()["memory"][0], "technology": "tape"}]}, "technology: 'tape'"),
        ({**entry(), "efficiency": number(1.2, "share of peak")}, "expected at most 1"),
        ([], "found list, expected a JSON object"),
    ],
)
def test_bad_target_files_are_refused_with_target_and_field(tmp_path, data, message):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(data))
    with pytest.raises(InputError) as error:
        target(str(file))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_unknown_and_unreadable_targets(tmp_path):
    with pytest.raises(InputError, match="no target 'abacus'; known are this-host"):
        target("abacus")
    with pytest.raises(InputError, match="cannot be read"):
        target(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        target(str(tmp_path / "bad.json"))


def test_host_is_measured_once_and_names_itself():
    first = measure_host(1)
    assert measure_host(1) is first
    box = target("this-host")
    assert box.title == measure_host().name and box.title.endswith("cores")
    assert "measured on this host" in box.peak["fp32"].source
    assert 1e9 < box.peak["fp32"].value < 1e14
    assert 1e8 < box.memory[-1].bandwidth.value < 5e12
    if "int8" in box.peak and not {"avx512_vnni", "avx_vnni", "amx_int8"} & set(first.flags) and "avx2" in first.flags:
        assert box.peak["int8"].value == pytest.approx(4 / 3 * box.peak["fp32"].value)
