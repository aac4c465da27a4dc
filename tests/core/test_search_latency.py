"""Times told from a table of operators: what counts as one, what is refused, and how near whole networks they come."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from core.hardware import target
from core.kit import InputError
from core.nas import Candidate, Space, Steps
from core.search import (
    Checked,
    Cost,
    Costs,
    LatencyTable,
    Operator,
    Prices,
    cost,
    estimated,
    estimated_latency,
    fitted_table,
    operators,
    table,
)
from core.search.latency import _line, graph_of


def net(width: int, depth: int = 1) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Upsample(scale_factor=2.0), nn.Conv2d(width, 4, 1)).eval()


IMAGE = (torch.zeros(1, 3, 64, 96),)


def test_operators_are_told_with_the_shapes_they_run_at() -> None:
    found = operators(net(8), IMAGE)
    assert found == [
        Operator("conv", (3, 64, 96), (8, 32, 48), (3, 3), (2, 2), (1, 1)),
        Operator("conv", (8, 32, 48), (8, 32, 48), (3, 3), (1, 1), (1, 1)),
        Operator("upsample", (8, 32, 48), (8, 64, 96)),
        Operator("conv", (8, 64, 96), (4, 64, 96)),
    ]
    assert str(found[0]) == "conv 3x64x96 -> 8x32x48 k3 s2 p1 g1"
    rows = nn.Linear(5, 7)
    assert operators(rows, (torch.zeros(1, 11, 5),)) == [Operator("linear", (5, 1, 11), (7, 1, 11))]


def test_pictures_side_by_side_count_one_by_one_and_rows_all_at_once() -> None:
    assert operators(net(8), (torch.zeros(6, 3, 64, 96),)) == [
        operator for operator in operators(net(8), IMAGE) for _ in range(6)
    ]
    assert operators(nn.Linear(5, 7), (torch.zeros(2, 11, 5),)) == [Operator("linear", (5, 1, 22), (7, 1, 22))]


def test_a_network_is_left_in_the_mode_it_was_in() -> None:
    model = net(4).train()
    operators(model, IMAGE)
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_model_of_an_operator_has_its_shapes(precision: str) -> None:
    for operator in (*operators(net(8), IMAGE), Operator("linear", (5, 1, 11), (7, 1, 11)), None):
        model = graph_of(operator, precision)
        onnx.checker.check_model(model, full_check=True)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        (given,) = session.get_inputs()
        kind = np.uint8 if given.type == "tensor(uint8)" else np.float32
        assert (kind == np.uint8) == (precision == "int8" and operator is not None)
        (out,) = session.run(None, {given.name: np.ones(given.shape, kind)})
        assert out.shape == (1, *(operator.outputs if operator else (1, 1, 1))) and out.dtype == kind


def test_a_table_adds_up_what_it_measured_and_refuses_what_it_did_not() -> None:
    a, b, c = operators(net(8), IMAGE)[:3]
    known = replace(table(), seconds={str(a): 2e-3, str(b): 1e-3}, scale=2.0, offset=5e-4)
    assert known.latency([a, b, b]) == pytest.approx(0.5 + 2 * (2 + 1 + 1))
    with pytest.raises(InputError, match="upsample .* was not measured"):
        known.latency([a, c])


def test_what_is_missing_is_measured_and_what_is_known_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = operators(net(8), IMAGE)[:2]
    asked: list[Operator | None] = []

    def alone(self: LatencyTable, operator: Operator | None, folder: Path) -> float:
        asked.append(operator)
        return 1e-3 if operator is None else 3e-3

    monkeypatch.setattr(LatencyTable, "_alone", alone)
    found = replace(table(), seconds={str(a): 7.0}).measured([a, b, b])
    assert found.seconds == {str(a): 7.0, str(b): pytest.approx(2e-3)} and asked == [None, b]
    assert found.measured([a, b]).seconds == found.seconds and len(asked) == 2


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_more_work_takes_more_time(runtime: str) -> None:
    small, large = (Operator("conv", (c, 64, 64), (c, 64, 64), (3, 3), (1, 1), (1, 1)) for c in (8, 64))
    found = table(runtime, threads=1).measured([small, large]).seconds
    assert found[str(large)] > 4 * found[str(small)] >= 0  # 64 times the multiplications


def test_a_line_is_fitted_to_shares_and_never_below_zero() -> None:
    x = np.array([1.0, 2.0, 4.0, 8.0])
    assert _line(x, 3 * x + 2) == pytest.approx((3.0, 2.0))
    slope, offset = _line(x, 3 * x - 1)
    assert offset == 0 and 2 < slope < 3


def test_a_fitted_table_comes_near_networks_that_it_was_not_fitted_to() -> None:
    widths, depths = (8, 16, 24, 32), (1, 3)
    networks = [(net(w, d), IMAGE) for w in widths for d in depths]
    found = table(threads=1).fitted([(model, tuple(inputs)) for model, inputs in networks])
    assert found.checked is not None and found.checked.networks == 4
    assert found.checked.tau > 0.5 and found.checked.mean < 0.6  # noise of a busy machine included
    told = [found.latency(operators(model, inputs)) for model, inputs in networks]
    assert told[-1] > told[0] > 0


def test_too_few_networks_are_refused() -> None:
    with pytest.raises(InputError, match="at least 8"):
        table().fitted([(net(8), IMAGE)] * 7)


@pytest.mark.parametrize(
    ("runtime", "precision", "named"), [("tensorrt", "fp32", "runtime"), ("openvino", "int2", "prec")]
)
def test_an_unknown_runtime_or_precision_is_refused(runtime: str, precision: str, named: str) -> None:
    with pytest.raises(InputError, match=named):
        table(runtime, precision)


def test_a_table_says_how_far_off_it_is_once_that_is_known(tmp_path: Path) -> None:
    made = replace(table(), checked=Checked(6, 0.061, 0.108, 0.8667))
    assert "off by 6 % in the mean and by 11 % at most, and ranks them with Kendall's tau 0.87" in made.sentence("tile")
    with pytest.raises(InputError, match="not checked"):
        table().sentence("tile")
    made.save(tmp_path / "latency.json")
    assert fitted_table(tmp_path / "latency.json", lambda: pytest.fail("measured again"), True) == made


def test_a_stored_table_is_read_back_and_that_of_another_machine_is_not(tmp_path: Path) -> None:
    place = tmp_path / "latency.json"
    made = replace(table(), seconds={"conv": 1.0}, scale=1.5)
    made.save(place)
    assert LatencyTable.load(place) == made
    data = json.loads(place.read_text())
    place.write_text(json.dumps(data | {"device": "a phone"}))
    with pytest.raises(InputError, match="measured on a phone"):
        LatencyTable.load(place)
    place.write_text("{")
    with pytest.raises(InputError, match="no latency table"):
        LatencyTable.load(place)


def test_costs_are_counted_exactly_and_each_candidate_is_built_once() -> None:
    built: list[int] = []

    def build(candidate: Candidate) -> tuple[nn.Module, tuple[Tensor, ...]]:
        built.append(int(candidate["width"]))
        return net(int(candidate["width"])), IMAGE

    costs = Costs(build, target=target("x86-edge-box"))
    found = costs.of({"width": 8})
    macs = 32 * 48 * 8 * 27 + 32 * 48 * 8 * 72 + 64 * 96 * 4 * 8
    assert found["macs"] == macs and found["parameters"] == 27 * 8 + 8 + 16 + 72 * 8 + 8 + 32 + 4
    assert found["bytes"] == 4 * found["parameters"] and found["estimated_latency"] > 0
    assert found["peak"] >= 4 * (8 * 32 * 48 + 8 * 64 * 96)  # the upsampling's input and output are alive at once
    assert costs.of({"width": 8}) == found and built == [8]
    assert cost(net(8), IMAGE, "int8").bytes == found["parameters"]
    assert isinstance(cost(net(8), IMAGE), Cost)
    assert estimated_latency(net(32), IMAGE, target("x86-edge-box")) > found["estimated_latency"]


def test_costs_bound_a_space() -> None:
    costs = Costs(lambda candidate: (net(int(candidate["width"])), IMAGE))
    limit = costs.of({"width": 16})["macs"]
    space = Space({"width": Steps((8, 16, 32))}, (costs.bound("macs", limit, "MAC"),))
    assert [c["width"] for c in space.members()] == [8, 16]
    with pytest.raises(InputError, match="macs at most 1 MAC"):
        Space({"width": Steps((8, 16))}, (costs.bound("macs", 1.0, "MAC"),)).check()


def test_a_candidate_has_its_price_by_the_table_and_the_score_falls_with_its_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(LatencyTable, "_alone", lambda self, operator, folder: 0.0 if operator is None else 2e-3)
    made = replace(table(), scale=1.5, checked=Checked(6, 0.05, 0.25, 0.9))
    made.save(tmp_path / "latency.json")
    prices = Prices(tmp_path / "latency.json", lambda c: (net(int(c["width"]), int(c["depth"])), IMAGE), 15.0)
    short, long = (prices.of({"width": 8, "depth": depth}, 80.0) for depth in (1, 3))
    assert short["latency"] == pytest.approx(4 * 3.0) and long["latency"] == pytest.approx(6 * 3.0)
    assert short["score"] == 80.0 and long["score"] == pytest.approx(80.0 * 15 / 18), "up to the target accuracy counts"
    assert long["macs"] - short["macs"] == 2 * 32 * 48 * 8 * 72 and long["parameters"] > short["parameters"]
    told = estimated(made, "map")
    assert told["latency"] == (f"table of operators measured in {made.version}", 0.25)
    assert told["score"][1] == pytest.approx(0.2) and told.keys() < {*short}
