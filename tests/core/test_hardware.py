"""Latency, energy and verdicts against closed forms and the tables they come from."""

import pytest
import torch
from torch import nn

from core.figures import Estimated, Measured
from core.hardware import (
    estimate,
    fit,
    profile,
    roofline,
    target,
    will_it_be_faster,
)
from core.hardware.energy import byte_energy, energy, mac_energy
from core.hardware.targets import MemoryLevel, Number
from core.kit import InputError
from tests.core.devices import Residual, device, entry, graph, number, torch_macs

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
