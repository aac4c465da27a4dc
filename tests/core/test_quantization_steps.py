"""The steps Quantize and QAT on a small kit: what they change, say, and restore."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.compress import compress
from core.kit import InputError, Recipe, Step
from core.quantization import QAT, PerGroup, Plan, Quantize, calibrate, layer_sqnr, prepare, quant_layers, unquantized
from core.quantization.modules import QuantConv2d, Quantizer, quantizers
from core.quantization.numerics import lsq_gradient_scale
from core.quantization.schemes import Scheme
from tests.core.toy import ToyKit


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1, bias=False)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.silu(self.left(x)) + self.right(x)
        return self.head(self.up(x).mean((2, 3)))


class Kit(ToyKit):
    """Two classes of noise images that differ by their mean colour."""

    def model(self, weights: Path | None = None) -> nn.Module:
        torch.manual_seed(1)
        net = Net()
        nn.init.normal_(net.stem[1].bias)
        net.train()(torch.randn(16, 3, 8, 8) + 0.5)
        return net.eval()

    def dataset(self, data: Path | None, split: str, preset: str = "full") -> Sequence[Any]:
        noise = torch.Generator().manual_seed(7)
        return [(torch.randn(3, 8, 8, generator=noise) + 0.6 * (i % 2), i % 2) for i in range(32)]

    def batches(self, samples: Sequence[Any], batch_size: int, *, train: bool, seed: int = 0) -> Iterable[Any]:
        order = list(range(len(samples)))
        if train:
            order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
        for i in range(0, len(order), batch_size):
            xs, ys = zip(*(samples[k] for k in order[i : i + batch_size]))
            yield torch.stack(xs), torch.tensor(ys)


KIT = Kit()


def run(*steps: Step, folder: Path | None = None, resume: bool = False) -> tuple[nn.Module, Any]:
    return compress(KIT.model(), Recipe("r", steps, "", ""), KIT, folder=folder, resume=resume)


def data() -> Tensor:
    return torch.stack([x for x, _ in KIT.dataset(None, "train")])


def test_int8_is_close_and_the_trace_says_what_happened() -> None:
    small, trace = run(Quantize())
    lines = {line["layer"]: line for line in trace[0].changed}
    assert set(quant_layers(small)) == {"stem.0", "left", "right", "head"}
    assert lines["stem.1"]["what"] == "batch norm folded into stem.0"
    assert "8 bit symmetric per channel [-128, 127]; input 8 bit asymmetric" in lines["stem.0"]["what"]
    assert lines["left"]["weight_sqnr"] > 35
    assert [(s.layer, "ConvTranspose2d is neither" in s.why) for s in trace[0].skipped] == [("up", True)]
    original, x = KIT.model(), data()
    assert (small(x) - original(x)).abs().max() < 0.05 * original(x).std()
    assert min(layer_sqnr(original, small, [(x,)]).values()) > 25


def test_layers_that_read_one_tensor_share_its_quantizer() -> None:
    small, _ = run(Quantize())
    layers = quant_layers(small)
    assert layers["left"].input_quantizer is layers["right"].input_quantizer
    assert layers["left"].input_quantizer is not layers["head"].input_quantizer


def test_fewer_bits_are_worse_and_weight_only_leaves_activations_float() -> None:
    original, x = KIT.model(), data()
    ratios = [
        layer_sqnr(original, run(Quantize(weight_bits=b, activation_bits=b))[0], [(x,)])["left"] for b in (8, 6, 4)
    ]
    # 6.02 dB a bit: 12 dB from 8 to 6 and from 6 to 4.
    assert 8 < ratios[0] - ratios[1] < 16 and 8 < ratios[1] - ratios[2] < 16
    weight_only, _ = run(
        Quantize(weight_bits=4, activation_bits=0, weight_granularity="group", group_size=8, keep=("stem.0",))
    )
    layer = quant_layers(weight_only)["left"]
    assert layer.input_quantizer is None and layer.weight_quantizer.scheme.granularity == PerGroup(8)
    assert layer.weight_quantizer.scale.shape == (8, 9)


def test_bias_correction_removes_the_shift_of_the_mean() -> None:
    original, x = KIT.model(), data()

    def shift(step: Quantize) -> float:
        small, _ = run(step)
        assert small.right.bias is not None or not step.bias_correction
        with torch.no_grad():
            return float((small(x) - original(x)).mean(0).abs().sum())

    plain = Quantize(weight_bits=3, bias_correction=False)
    assert shift(Quantize(weight_bits=3)) < 0.5 * shift(plain)


def test_keep_and_a_second_step_make_mixed_precision() -> None:
    small, trace = run(Quantize(keep=("head",)), Quantize(weight_bits=4))
    assert {n: m.weight_quantizer.scheme.bits for n, m in quant_layers(small).items()} == {
        "stem.0": 8, "left": 8, "right": 8, "head": 4,
    }  # fmt: skip
    assert {s.layer: s.why for s in trace[0].skipped}["head"] == "stays as it is: kept float by pattern 'head'"
    assert "quantized already" in {s.layer: s.why for s in trace[1].skipped}["left"]


def test_mistakes_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="'nothing' matches no"):
        run(Quantize(keep=("nothing",)))
    with pytest.raises(InputError, match=r"layer 'stem.0': group_size 64 does not divide"):
        run(Quantize(weight_granularity="group"))
    with pytest.raises(InputError, match="samples is 0"):
        Quantize(samples=0)


@pytest.mark.parametrize(
    "steps",
    [
        (Quantize(calibration="mse", quantize_outputs=True),),
        (Quantize(keep=("head",)), Quantize(weight_bits=4), QAT(epochs=1)),
        (QAT(epochs=1, weight_bits=4, weight_symmetric=False, ema=0.9),),
    ],
    ids=["ptq", "mixed-qat", "qat"],
)
def test_restored_models_are_the_same_to_the_bit(steps: tuple[Step, ...], tmp_path: Path) -> None:
    first, trace = run(*steps, folder=tmp_path)
    again, same = run(*steps, folder=tmp_path, resume=True)
    assert json.dumps([e.to_json() for e in trace]) == json.dumps([e.to_json() for e in same])
    assert torch.equal(first(data()), again(data()))
    a, b = first.state_dict(), again.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_qat_wins_back_what_two_bits_lost() -> None:
    """Training lowers the loss, moves the step sizes, and leaves no parameter of its own."""
    plain = Quantize(weight_bits=2, activation_bits=4)
    before, _ = run(plain)
    after, trace = run(plain, QAT(epochs=10, batch_size=8, lr=2e-2))
    batch = next(iter(KIT.batches(KIT.dataset(None, "train"), 32, train=False)))
    assert KIT.loss(after, batch) < 0.7 * KIT.loss(before, batch)
    assert not torch.equal(after.left.weight_quantizer.scale, before.left.weight_quantizer.scale)
    assert [n for n, _ in after.named_parameters()] == [n for n, _ in before.named_parameters()]
    assert "trained for 10 epochs" in trace[1].changed[-1]["what"]


def test_learning_moves_the_scale_as_lsq_does() -> None:
    """One small step of gradient descent on log_step changes the scale by -lr * g * dL/dscale."""
    scheme, x = Scheme(4), torch.randn(50)
    quantizer = Quantizer(scheme)
    quantizer.assign(torch.tensor(0.2), torch.tensor(0))
    quantizer.learn()
    assert quantizer.log_step is not None
    quantizer(x).square().sum().backward()
    v = x / 0.2
    inside = (v > -8) & (v < 7)
    derivative = torch.where(inside, v.round() - v, v.clamp(-8, 7))
    slope = float((2 * quantizer(x).detach() * derivative).sum()) * lsq_gradient_scale(50, scheme)
    lr = 1e-4
    with torch.no_grad():
        quantizer.log_step -= lr * quantizer.log_step.grad
    quantizer.settle()
    assert float(quantizer.scale) - 0.2 == pytest.approx(-lr * slope, rel=1e-2)


def test_prepare_changes_no_value_until_calibrated() -> None:
    model, x = KIT.model(), data()
    expected = model(x)
    prepared = prepare(copy.deepcopy(model), Plan(), (x,))
    torch.testing.assert_close(prepared(x), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(prepared.left, QuantConv2d) and not any(q.active for q in quantizers(prepared))


def test_modules_that_read_weights_past_forward_are_left_alone() -> None:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.out = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.attention(x, x, x)[0])

    prepared = prepare(Attend().eval(), Plan(), (torch.randn(2, 5, 8),))
    assert set(quant_layers(prepared)) == {"out"}


def test_steps_are_json() -> None:
    step = Quantize(keep=("head.*",), weight_bits=4)
    assert Step.from_json(json.loads(json.dumps(step.to_json()))) == step
    assert Step.from_json(json.loads(json.dumps(QAT(epochs=3).to_json()))) == QAT(epochs=3)


def test_unquantized_copy_computes_in_float():
    layer = nn.Conv2d(2, 3, 3)
    x = torch.rand(1, 2, 5, 5)
    expected = layer(x)
    model = prepare(nn.Sequential(layer), Quantize(weight_bits=3, activation_bits=3), (x,))
    calibrate(model, [(x,)], "minmax")
    assert not torch.allclose(model(x), expected, atol=1e-2)
    assert torch.allclose(unquantized(model)(x), expected, atol=1e-6)
    assert not torch.allclose(model(x), expected, atol=1e-2), "the original stays quantized"
