import json
import math

import pytest

from core.figures import Estimated, Figure, Figures, Gate, Measured, Quoted

HOST = Measured("this-host: AMD EPYC, 2 cores", "OpenVINO 2026.4.1 INT8", runs=200, spread=0.4, date="2026-03-01")
PHONE = Measured("snapdragon-8-gen-2", "QNN 2.30", runs=50, date="2026-03-01")
ROOFLINE = Estimated("roofline", assumptions=("batch 1", "weights from DRAM"), error_band=0.5)
PAPER = Quoted("Tang et al. 2019, table 2")


@pytest.mark.parametrize("basis", [HOST, ROOFLINE, PAPER], ids=lambda b: b.kind)
def test_a_figure_survives_json(basis):
    figure = Figure("latency_p50", 21.25, "ms", basis, "original")
    assert Figure.from_json(json.loads(json.dumps(figure.to_json()))) == figure


def test_an_unknown_kind_of_basis_is_refused():
    data = Figure("size", 1.0, "MB", PAPER).to_json()
    data["basis"]["kind"] = "guessed"
    with pytest.raises(ValueError, match=r"'size'.*'guessed'.*estimated"):
        Figure.from_json(data)


def test_only_an_estimate_prints_with_a_tilde():
    assert str(Figure("energy", 11.4, "mJ", ROOFLINE)) == "~11.4 mJ"
    assert str(Figure("energy", 11.4, "mJ", HOST)) == "11.4 mJ"
    assert str(Figure("energy", 11.4, "mJ", PAPER)) == "11.4 mJ"


def test_an_estimate_never_replaces_a_measurement():
    measured, estimated = Figure("energy", 9.0, "mJ", HOST), Figure("energy", 11.4, "mJ", ROOFLINE)
    for merged in (Figures([measured]) | Figures([estimated]), Figures([estimated]) | Figures([measured])):
        assert len(merged) == 2
        assert merged.find("energy") == measured
        assert merged.find("energy", kind="estimated") == estimated


def test_of_two_figures_with_one_key_the_right_side_wins():
    old, new = Figure("size", 2.0, "MB", HOST), Figure("size", 1.5, "MB", PHONE)
    assert list(Figures([old]) | Figures([new])) == [new]


def test_find_keeps_stages_apart_and_restage_moves_them():
    figures = Figures([Figure("size", 10.0, "MB", HOST, "original")])
    assert figures.find("size") is None
    assert figures.find("size", "original").value == 10.0
    assert figures.restage("compressed").find("size").value == 10.0


@pytest.mark.parametrize(
    ("bound", "value", "verdict"),
    [
        (">= 99.6", 99.6, "PASS"), (">= 99.6", 99.599, "FAIL"), ("<= 2800000", 2_800_000, "PASS"), ("> 1", 1.0, "FAIL"),
        ("< 1", 1.0, "FAIL"), ("== 0", 0.0, "PASS"), ("<= 1e-3", 0.002, "FAIL"), (">= -0.5", -0.4, "PASS"),
    ],
)  # fmt: skip
def test_a_measurement_is_held_against_the_bound(bound, value, verdict):
    assert Gate("g", "x", bound).judge(Figures([Figure("x", value, "", HOST)])).verdict == verdict


@pytest.mark.parametrize("bound", ["99.6", "=> 99.6", ">= ninety", ">= 1 %", ""])
def test_a_bad_bound_is_refused_where_it_is_written(bound):
    with pytest.raises(ValueError, match="expected for instance '>= 99.6'"):
        Gate("g", "x", bound)


@pytest.mark.parametrize(
    ("basis", "device", "verdict"),
    [
        (HOST, "", "PASS"), (HOST, "this-host", "PASS"), (HOST, "snapdragon-8-gen-2", "UNPROVEN"),
        (PHONE, "snapdragon-8-gen-2", "PASS"), (PHONE, "snapdragon-8", "UNPROVEN"),
        (ROOFLINE, "", "UNPROVEN"), (ROOFLINE, "edge-1w", "UNPROVEN"), (PAPER, "", "UNPROVEN"),
    ],
)  # fmt: skip
def test_only_a_measurement_from_the_gates_device_can_pass(basis, device, verdict):
    figures = Figures([Figure("fps", 45.0, "1/s", basis)])
    assert Gate("g", "fps", ">= 38", "fps", device).judge(figures).verdict == verdict


def test_an_unproven_gate_says_what_is_missing():
    gate = Gate("Power", "power", "<= 1", "W", "edge-1w")
    why = gate.judge(Figures([Figure("power", 0.61, "W", ROOFLINE)])).why
    assert "~0.61 W" in why and "50%" in why and "needs a measurement on edge-1w" in why
    assert gate.judge(Figures()).verdict == "UNPROVEN"
    assert "no figure 'power'" in gate.judge(Figures()).why


def test_a_measured_nan_proves_nothing():
    assert Gate("g", "x", "<= 1").judge(Figures([Figure("x", math.nan, "", HOST)])).verdict == "UNPROVEN"
