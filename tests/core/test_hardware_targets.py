"""The targets that ship, those that are refused, and the host."""

import json

import pytest
import torch
from torch import nn

from core.hardware import (
    estimate,
    measure_host,
    profile,
    roofline,
    target,
    targets,
)
from core.hardware.energy import energy
from core.kit import InputError
from tests.core.devices import NAMES, Residual, entry, graph, number


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
    assert 1e6 < box.memory[-1].bandwidth.value < 5e12, "a busy machine's two threads wait for each other"
    if "int8" in box.peak and not {"avx512_vnni", "avx_vnni", "amx_int8"} & set(first.flags) and "avx2" in first.flags:
        assert box.peak["int8"].value == pytest.approx(4 / 3 * box.peak["fp32"].value)
