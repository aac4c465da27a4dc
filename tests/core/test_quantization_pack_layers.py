"""Packed integers and the layers that hold them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from core.kit import InputError
from core.quantization import PackedConv2d, PackedLinear, empty_packed, expand, pack_module, packed_layers
from core.quantization.packed import unpacked
from core.quantization.packing import dequantize_rows, pack, quantize_rows, row_bytes, unpack
from core.quantization.slices import in_slices


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("length", [1, 7, 8, 63, 64, 577])
def test_integers_come_back(bits: int, length: int) -> None:
    integers = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, length))
    packed = pack(integers, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (5, row_bytes(length, bits))
    assert torch.equal(unpack(packed, bits, length).long(), integers)


@pytest.mark.parametrize("bits", range(2, 9))
def test_rows_are_little_endian_streams_of_bits(bits: int) -> None:
    """Against Python's own integers."""
    integers = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (1, 21))
    stream = sum((q + 2 ** (bits - 1)) << (bits * i) for i, q in enumerate(integers[0].tolist()))
    assert bytes(pack(integers, bits)[0].tolist()) == stream.to_bytes(row_bytes(21, bits), "little")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [16, 64, 1000])
def test_dequantized_rows_are_within_half_a_step(bits: int, group_size: int) -> None:
    rows = torch.randn(6, 150)
    packed, scale = quantize_rows(rows, bits, group_size)
    assert scale.shape == (6, -(-150 // group_size)) and scale.dtype == torch.float16
    made = dequantize_rows(packed, scale, bits, group_size, 150)
    step = scale.float().abs().repeat_interleave(group_size, 1)[:, :150]
    lost = (made - rows).abs() / step
    # The far end of the range of integers is one step shorter: values above it are clipped by up to a whole step.
    assert lost.max() < 1.01 and (lost > 0.51).float().mean() < 0.1
    expected = unpack(packed, bits, 150).float() * scale.float().repeat_interleave(group_size, 1)[:, :150]
    assert torch.equal(made, expected)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(dequantize_rows(packed, scale, bits, group_size, 150, dtype), expected.to(dtype))


def test_the_largest_magnitude_takes_the_end_that_reaches_farther() -> None:
    packed, scale = quantize_rows(torch.tensor([[8.0, -7.0, 1.0, 0.0], [-4.0, 3.5, 0.5, 0.0]]), 4, 4)
    assert scale.tolist() == [[-1.0], [0.5]]
    assert unpack(packed, 4, 4).tolist() == [[-8, 7, -1, 0], [-8, 7, 1, 0]]


def test_mse_scales_lose_less() -> None:
    rows = torch.randn(64, 256)

    def noise(rounding: Any) -> float:
        made = dequantize_rows(*quantize_rows(rows, 4, 64, rounding), 4, 64, 256)
        return float((made - rows).square().sum() / rows.square().sum())

    assert noise("mse") < 0.95 * noise("nearest")


def test_zeros_stay_zeros_and_what_cannot_be_scaled_is_refused() -> None:
    assert not dequantize_rows(*quantize_rows(torch.zeros(2, 8), 4, 4), 4, 4, 8).any()
    with pytest.raises(InputError, match="layer 'up.0': found a weight that is not finite"):
        pack_module(broken(float("nan")), 4, 64, name="up.0")
    with pytest.raises(InputError, match=r"layer 'up.0': found 1e\+06, expected magnitudes below 524032"):
        pack_module(broken(1e6), 4, 64, name="up.0")
    with pytest.raises(InputError, match="bits is 9"):
        pack_module(nn.Linear(4, 4), 9, 64)
    with pytest.raises(InputError, match="layer 'x': Conv1d: Conv1d is none of"):
        pack_module(nn.Conv1d(4, 4, 3), 4, 64, name="x")


def broken(value: float) -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.weight.data[1, 2] = value
    return layer


Case = tuple[Callable[[], nn.Linear | nn.Conv2d], tuple[int, ...]]
CASES: dict[str, Case] = {
    "linear": (lambda: nn.Linear(130, 24), (2, 5, 130)),
    "no-bias": (lambda: nn.Linear(64, 24, bias=False), (3, 64)),
    "conv": (lambda: nn.Conv2d(8, 12, 3, padding=1), (2, 8, 6, 7)),
    "strided": (lambda: nn.Conv2d(8, 12, (3, 2), (2, 1), (1, 0), bias=False), (2, 8, 6, 7)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, padding=2, dilation=2, groups=4), (2, 8, 6, 7)),
    "same": (lambda: nn.Conv2d(8, 12, 3, padding="same"), (2, 8, 6, 7)),
    "circular": (lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular"), (2, 8, 6, 7)),
}


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradient_are_those_of_the_dequantized_weight(case: str, bits: int) -> None:
    make, shape = CASES[case]
    layer = make()
    packed = pack_module(layer, bits, 64)
    assert isinstance(packed, type(layer)) and not any(n == "weight" for n, _ in packed.named_parameters())
    plain = copy.deepcopy(layer)
    plain.weight.data = packed.dequantized()
    x = torch.randn(shape, requires_grad=True)
    y, expected = packed(x), plain(x)
    assert torch.equal(y, expected)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(grad, torch.autograd.grad(expected.square().sum(), x)[0])


def test_embeddings_make_the_rows_asked_for() -> None:
    layer = nn.Embedding(50, 70, padding_idx=1)
    packed, ids = pack_module(layer, 4, 64), torch.randint(0, 50, (2, 9))
    assert torch.equal(packed(ids), F.embedding(ids, packed.dequantized()))
    assert packed.padding_idx == 1


def test_sizes_are_exact() -> None:
    """4.25 bits a weight at 4 bits and groups of 64."""
    conv = pack_module(nn.Conv2d(64, 32, 3, bias=False), 4, 64)
    assert conv.weight_bytes * 8 == 4.25 * 64 * 32 * 9
    assert sum(b.nbytes for b in conv.state_dict().values()) == conv.weight_bytes
    short = pack_module(nn.Linear(130, 10, bias=False), 8, 64)
    assert short.weight_bytes == 10 * (130 + 2 * 3)


@pytest.mark.parametrize("case", ["linear", "conv"])
def test_autograd_keeps_no_float_weight(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape = CASES[case]
    layer = make()
    packed = pack_module(layer, 4, 64)
    made: list[StorageWeakRef] = []
    plain = type(packed).dequantized

    def watched(self: PackedLinear, dtype: torch.dtype | None = None) -> Tensor:
        weight = plain(self, dtype)
        made.append(StorageWeakRef(weight.untyped_storage()))
        return weight

    monkeypatch.setattr(type(packed), "dequantized", watched)
    y = packed(torch.randn(shape, requires_grad=True))
    assert [ref.expired() for ref in made] == [True]
    y.sum().backward()
    assert [ref.expired() for ref in made] == [True, True]


def test_the_lent_weight_tells_type_and_shape_and_refuses_changes() -> None:
    packed = pack_module(nn.Linear(8, 4), 4, 64)
    assert (packed.weight.shape, packed.weight.dtype) == ((4, 8), torch.float32)
    assert type(packed.weight + 1) is Tensor
    with pytest.raises(InputError, match="would change a copy"):
        packed.weight.data += 1
    with pytest.raises(InputError, match="would change a copy"):
        packed.weight.mul_(2)
    with pytest.raises(InputError, match="would change a copy"):
        packed.weight[0] = 0


def test_a_change_of_type_leaves_the_scales_in_fp16() -> None:
    packed = pack_module(nn.Linear(64, 4), 4, 64)
    before = {k: v.clone() for k, v in packed.state_dict().items() if k != "bias"}
    packed.half()
    assert packed.weight.dtype == packed.bias.dtype == torch.float16
    packed.double()
    assert packed(torch.randn(2, 64, dtype=torch.double)).dtype == torch.double
    assert packed(torch.randn(2, 64)).dtype == torch.float32
    for key, value in before.items():
        assert packed.state_dict()[key].dtype == value.dtype and torch.equal(packed.state_dict()[key], value)


def test_empty_layers_take_what_was_saved() -> None:
    first = pack_module(nn.Conv2d(8, 12, 3, groups=2), 5, 16)
    with torch.device("meta"):
        shape = nn.Conv2d(8, 12, 3, groups=2)
    second = empty_packed(shape, 5, 16)
    assert second.weight_packed.is_meta
    second.load_state_dict(first.state_dict(), assign=True)
    x = torch.randn(1, 8, 5, 5)
    assert torch.equal(second(x), first(x))
    third = empty_packed(nn.Conv2d(8, 12, 3, groups=2), 5, 16)
    third.load_state_dict(first.state_dict())
    assert torch.equal(third(x), first(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        empty_packed(shape, 4, 16).load_state_dict(first.state_dict(), assign=True)


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, 32), nn.Unflatten(1, (2, 4, 4)), nn.Conv2d(2, 4, 3, padding=1), nn.Flatten(), nn.Linear(64, 3)
    ).eval()


def packed_net(bits: int = 4) -> nn.Sequential:
    return nn.Sequential(*(pack_module(m, bits, 64) if hasattr(m, "weight") else m for m in net()))


def test_expanded_models_are_plain_and_compute_the_same() -> None:
    model = packed_net()
    x = torch.randn(3, 64)
    expected = model(x)
    assert list(packed_layers(model)) == ["0", "2", "4"]
    assert expand(model) is model and not packed_layers(model)
    assert [type(m) for m in model] == [nn.Linear, nn.Unflatten, nn.Conv2d, nn.Flatten, nn.Linear]
    assert torch.equal(model(x), expected)
    half = expand(packed_net(), torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16}


def test_packed_models_can_be_exported_by_torch() -> None:
    model, x = packed_net(), torch.randn(1, 64)
    exported = torch.export.export(model, (x,))
    assert torch.equal(exported.module()(x), model(x))


def test_copies_are_apart() -> None:
    model = packed_net()
    copied = copy.deepcopy(model)
    copied[0].weight_packed.zero_()
    assert model[0].weight_packed.any()


def test_peft_trains_a_lora_beside_packed_layers_and_unloads_to_the_same_bytes() -> None:
    model = packed_net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(4, 64)
    plain = model(x)
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0", "2", "4"]))
    assert torch.equal(lora(x), plain), "an adapter begins at zero"
    trained = [p for p in lora.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, 1e-2)
    losses = []
    for _ in range(20):
        loss = (lora(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    with pytest.raises(InputError, match="packed layer"):
        lora.merge_adapter()
    model = lora.unload()
    assert isinstance(model[0], PackedLinear) and isinstance(model[2], PackedConv2d)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    assert torch.equal(model(x), plain)


CARRIERS = {name: CASES[name] for name in CASES if name not in ("grouped", "depthwise")}


def carrying(layer: nn.Module, rank: int = 3, bits: int = 4, group_size: int = 64) -> PackedLinear | PackedConv2d:
    """The packed layer with a low-rank term of random numbers, as large as its weights."""
    packed = pack_module(layer, bits, group_size)
    assert isinstance(packed, PackedLinear | PackedConv2d)
    draws = torch.Generator().manual_seed(rank)
    rows, length = packed.weight_shape[0], packed.weight_shape[1:].numel()
    packed.add_low_rank(
        torch.randn(rank, length, generator=draws) * 0.1, torch.randn(rows, rank, generator=draws) * 0.1
    )
    return packed


@pytest.mark.parametrize("case", CARRIERS)
def test_a_low_rank_term_adds_b_of_a_of_x(case: str) -> None:
    make, shape = CARRIERS[case]
    layer = make()
    plain, packed = pack_module(layer, 4, 64), carrying(layer)
    a, b = packed.low_rank_a, packed.low_rank_b
    assert a is not None and b is not None and packed.rank == 3
    x = torch.randn(shape, requires_grad=True)
    inner = copy.deepcopy(layer)
    inner.bias, inner.weight = None, nn.Parameter(a.float().view(3, *layer.weight.shape[1:]))
    outer = torch.einsum("or,nrhw->nohw", b.float(), inner(x)) if x.ndim == 4 else F.linear(inner(x), b.float())
    expected = plain(x) + outer
    torch.testing.assert_close(packed(x), expected)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (packed(x), expected)]
    torch.testing.assert_close(*grads)
    floats = unpacked(packed)
    torch.testing.assert_close(floats(x), packed(x))
    whole = plain.dequantized() + (b.float() @ a.float()).view(layer.weight.shape)
    torch.testing.assert_close(floats.weight.detach(), whole)
    assert torch.equal(packed.weight + 0, plain.dequantized())


def test_a_term_of_zeros_changes_no_bit() -> None:
    layer, x = nn.Conv2d(8, 12, 3, padding=1), torch.randn(2, 8, 6, 6)
    plain, zero = pack_module(layer, 4, 64), pack_module(layer, 4, 64)
    zero.hold_low_rank(4)
    assert torch.equal(zero(x), plain(x))
    assert "rank=4" in repr(zero) and "rank" not in repr(plain)
    assert plain.state_dict().keys() == {"weight_packed", "weight_scale", "bias"}
    assert plain.layout == {"bits": 4, "group_size": 64}


def test_a_term_is_held_in_fp16_counted_and_loaded() -> None:
    packed = carrying(nn.Conv2d(64, 32, 3, bias=False))
    assert packed.weight_bytes == 32 * 64 * 9 // 2 + 2 * 32 * 9 + 2 * 3 * (32 + 576)
    assert sum(b.nbytes for b in packed.state_dict().values()) == packed.weight_bytes
    before = {name: value.clone() for name, value in packed.state_dict().items()}
    packed.double().float().bfloat16()
    assert all(value.dtype == before[name].dtype for name, value in packed.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in packed.state_dict().items())
    with torch.device("meta"):
        shape = nn.Conv2d(64, 32, 3, bias=False)
    again = empty_packed(shape, **packed.layout, dtype=torch.float32)
    assert again.low_rank_a is not None and again.low_rank_a.is_meta
    again.load_state_dict(before, assign=True)
    x = torch.randn(1, 64, 5, 5)
    assert torch.equal(again(x), packed.float()(x))
    with pytest.raises(RuntimeError, match="low_rank_a"):
        empty_packed(shape, 4, 64).load_state_dict(before, assign=True)


def test_terms_add_up_and_small_numbers_survive_fp16() -> None:
    layer = nn.Linear(64, 32)
    packed, plain, x = carrying(layer, 2), pack_module(layer, 4, 64), torch.randn(5, 64)
    first = packed(x) - plain(x)
    a, b = torch.randn(3, 64) * 300, torch.randn(32, 3) * 1e-7
    b[:, 1] = 0
    packed.add_low_rank(a, b)
    assert packed.rank == 5
    second = packed(x) - plain(x) - first
    expected = x.double() @ a.T.double() @ b.T.double()
    assert (second - expected).norm() < 0.02 * expected.norm(), "1e-7 is 0 or twice itself in FP16"


def test_terms_that_do_not_fit_are_refused() -> None:
    packed = pack_module(nn.Linear(8, 4), 4, 64)
    with pytest.raises(InputError, match=r"found \(2, 7\) and \(4, 2\), expected \(rank, 8\) and \(4, rank\)"):
        packed.add_low_rank(torch.zeros(2, 7), torch.zeros(4, 2))
    with pytest.raises(InputError, match="NaN, Inf or values beyond FP16"):
        packed.add_low_rank(torch.full((1, 8), 1e9), torch.full((4, 1), 1e9))
    with pytest.raises(InputError, match="since it is a convolution in 2 groups"):
        empty_packed(nn.Conv2d(4, 4, 3, groups=2), 4, 64, 2)
    with pytest.raises(InputError, match="since it is an embedding"):
        empty_packed(nn.Embedding(4, 4), 4, 64, 2)
    with pytest.raises(InputError, match="rank is -1"):
        empty_packed(nn.Linear(4, 4), 4, 64, -1)
    assert packed.rank == 0


def test_slices_keep_the_term() -> None:
    conv, linear = carrying(nn.Conv2d(16, 96, 3, padding=1)), carrying(nn.Linear(96, 130))
    net = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    x = torch.randn(2, 16, 12, 12)
    with torch.no_grad():
        expected = net(x)
        with in_slices(net, 16 * 9 * 4 * 20):
            assert sum("forward" in vars(m) for m in packed_layers(net).values()) == 2
            torch.testing.assert_close(net(x), expected)


def test_a_lora_goes_on_top_of_a_term_and_off_again() -> None:
    model = nn.Sequential(*(carrying(m) if hasattr(m, "weight") else m for m in net()))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(4, 64)
    plain = model(x)
    config = peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    lora = peft.get_peft_model(model, config)
    assert not torch.allclose(lora(x), plain)
    model = lora.unload()
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    assert torch.equal(model(x), plain)
