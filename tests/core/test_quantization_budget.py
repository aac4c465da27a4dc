"""Sensitivity of the output to each layer's bits, and the choice of bits under a number of bytes."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from torch import nn

from core.kit import InputError
from core.quantization import bit_errors, choose_bits, pack_module
from core.quantization.sensitivity import read_errors, write_errors

WIDTHS = (4, 8, 16)


def knapsack(layers: int, seed: int) -> tuple[dict[str, dict[int, int]], dict[str, dict[int, float]]]:
    draw = random.Random(seed)
    weights = {f"l{i}": draw.randrange(100, 5000) for i in range(layers)}
    sizes = {name: {bits: n * bits // 8 for bits in WIDTHS} for name, n in weights.items()}
    scale = {name: 10 ** draw.uniform(-6, -1) for name in weights}
    errors = {name: {4: s, 8: s / 250 * draw.uniform(0.5, 2), 16: 0.0} for name, s in scale.items()}
    return sizes, errors


@pytest.mark.parametrize("seed", range(6))
def test_choice_equals_brute_force(seed: int) -> None:
    sizes, errors = knapsack(7, seed)
    least, most = (sum(f(row.values()) for row in sizes.values()) for f in (min, max))
    for share in (0.0, 0.1, 0.4, 0.8, 1.0):
        limit = int(least + share * (most - least))
        chosen = choose_bits(sizes, errors, limit)
        assert sum(sizes[n][b] for n, b in chosen.items()) <= limit
        best = min(
            sum(errors[n][b] for n, b in zip(sizes, combination))
            for combination in itertools.product(WIDTHS, repeat=len(sizes))
            if sum(sizes[n][b] for n, b in zip(sizes, combination)) <= limit
        )
        assert sum(errors[n][b] for n, b in chosen.items()) == pytest.approx(best, rel=1e-6, abs=1e-12)


def test_a_model_of_hundreds_of_layers_is_solved_in_seconds() -> None:
    sizes, errors = knapsack(686, 0)
    limit = int(1.3 * sum(row[4] for row in sizes.values()))
    chosen = choose_bits(sizes, errors, limit)
    spent = sum(sizes[n][b] for n, b in chosen.items())
    assert limit - 100 < spent <= limit  # the smallest step up is 50 bytes


def test_what_breaks_the_model_is_taken_only_where_nothing_else_fits() -> None:
    sizes = {"a": {4: 10, 8: 20}, "b": {4: 10, 8: 20}}
    errors = {"a": {4: float("inf"), 8: 0.5}, "b": {4: 0.4, 8: 0.1}}
    assert choose_bits(sizes, errors, 30) == {"a": 8, "b": 4}
    assert choose_bits(sizes, errors, 20) == {"a": 4, "b": 4}
    with pytest.raises(InputError, match="19 bytes for the layers, but the least that their widths reach is 20"):
        choose_bits(sizes, errors, 19)
    assert choose_bits({}, {}, 0) == {}


def model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 16, 5)).eval()


def test_errors_are_those_of_one_packed_layer() -> None:
    net, batches = model(), [(torch.randn(4, 3, 6, 6),) for _ in range(2)]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    errors = bit_errors(net, ["0", "3"], WIDTHS, 16, batches)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    for index in (0, 3):
        for bits in (4, 8):
            other = model()
            other.load_state_dict(before)
            other[index] = pack_module(other[index], bits, 16)
            with torch.no_grad():
                pairs = [(net(*batch), other(*batch)) for batch in batches]
            expected = sum((a - b).square().sum() for a, b in pairs) / sum(a.square().sum() for a, _ in pairs)
            assert errors[str(index)][bits] == pytest.approx(float(expected), rel=1e-4)
        assert errors[str(index)][16] == 0 < errors[str(index)][8] < errors[str(index)][4] / 50


class Both(nn.Module):
    """Two layers with an output each, the second a thousand times the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.a(x), 1000 * self.b(x)


def test_no_output_outweighs_another_by_its_size() -> None:
    net, x = Both().eval(), torch.randn(32, 16)
    errors = bit_errors(net, ["a", "b"], (4,), 16, [(x,)])
    for index, name in enumerate("ab"):
        alone = bit_errors(nn.Sequential(net.get_submodule(name)), ["0"], (4,), 16, [(x,)])
        assert errors[name][4] == pytest.approx(alone["0"][4] / 2, rel=1e-4), index


def test_known_errors_are_not_measured_again(tmp_path: Path) -> None:
    key = {"seed": 0, "widths": [4, 8]}
    write_errors(tmp_path / "e.json", key, {"0": {4: 0.25, 8: 0.5}})
    assert read_errors(tmp_path / "e.json", {**key, "seed": 1}) == {}
    assert read_errors(tmp_path / "none.json", key) == {}
    done = read_errors(tmp_path / "e.json", key)
    errors = bit_errors(model(), ["0", "3"], (4, 8), 16, [(torch.randn(2, 3, 6, 6),)], done=done)
    assert errors["0"] == {4: 0.25, 8: 0.5} and 0 < errors["3"][4] < 0.1


def test_nothing_to_measure_is_an_error() -> None:
    with pytest.raises(InputError, match="found no batches"):
        bit_errors(model(), ["0"], WIDTHS, 16, [])
