"""Layers whose weights stay packed: uint8 rows of N-bit integers with an FP16 scale for each group of a kernel.

They are nn.Linear, nn.Conv2d and nn.Embedding to whoever asks (peft puts LoRA on them), but hold no float weight: a
forward makes it, uses it and lets it go, and a backward makes it again, so that training an adapter keeps no float
copy of the model alive. `expand` turns them into plain float layers, the fastest way to run.

Buffers: `weight_packed` uint8 (out, bytes), `weight_scale` float16 (out, groups); see `packing` for the bits. `bias` is
a parameter or None. A linear layer or convolution may carry a low-rank term, which is part of it: `low_rank_a` float16
(rank, kernel) and `low_rank_b` float16 (out, rank) add B(A(x)) to its output; without one both are None.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.kit import InputError
from core.quantization.folding import replace_module
from core.quantization.packing import (
    Rounding,
    check_width,
    dequantize_rows,
    group_count,
    pack,
    quantize_rows,
    row_bytes,
)

_FLOAT = (nn.Linear, nn.Conv2d, nn.Embedding)
_HALVES = ("weight_scale", "low_rank_a", "low_rank_b")
_UNCHANGING = ("requires_grad_", "retain_grad")


class _Lent(Tensor):
    """The float weight that a packed layer lends; a change in place would be lost in silence, so it is refused."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        in_place = name in ("__set__", "__setitem__") or name.endswith("_") and not name.endswith("__")
        if in_place and name not in _UNCHANGING and args and isinstance(args[0], cls):
            raise InputError(
                f"weight of a packed layer: {name} would change a copy; turn the model into float layers with "
                "core.quantization.expand(model) first, or keep an adapter beside the layer instead of merging it"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class _Packed(nn.Module):
    """What the packed layers share; stands before the layer's torch class among the bases."""

    bits: int
    group_size: int
    weight_packed: Tensor
    weight_scale: Tensor
    low_rank_a: Tensor | None
    low_rank_b: Tensor | None
    compute_dtype: torch.dtype

    def _hold(
        self, shape: tuple[int, ...], bits: int, group_size: int, rank: int, device: Any, dtype: torch.dtype | None
    ) -> None:
        """Buffers for a kernel of `shape` (out, ...)."""
        check_width(bits, group_size)
        self.bits, self.group_size, self.weight_shape = bits, group_size, torch.Size(shape)
        self.compute_dtype = dtype or torch.get_default_dtype()
        length = self.weight_shape[1:].numel()
        made: dict[str, Any] = {"device": device}
        self.register_buffer("weight_packed", torch.zeros(shape[0], row_bytes(length, bits), dtype=torch.uint8, **made))
        scales = torch.zeros(shape[0], group_count(length, group_size), dtype=torch.float16, **made)
        self.register_buffer("weight_scale", scales)
        self.register_buffer("low_rank_a", None)
        self.register_buffer("low_rank_b", None)
        if rank:
            self.hold_low_rank(rank)

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """peft makes an adapter's layers as type(layer)(...): a call without bits gives the float layer."""
        if args and "bits" not in kwargs:
            return next(base for base in _FLOAT if issubclass(cls, base))(*args, **kwargs)
        return super().__new__(cls)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of nn.Module, but the float weight that torch's constructor makes (on "meta") is let go."""
        if name != "weight":
            super().register_parameter(name, param)

    def reset_parameters(self) -> None:
        """Nothing: the values come from `pack_module` or a file."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves go through; a change of the float type is one of what the layer computes in, not of what it holds."""
        halves = {name: buffer for name in _HALVES if (buffer := getattr(self, name)) is not None}
        device = self.weight_scale.device
        super()._apply(fn, recurse)
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=device)).dtype
        for name, buffer in halves.items():
            if getattr(self, name).dtype != torch.float16:
                setattr(self, name, buffer.to(getattr(self, name).device))
        return self

    def assign_packed(self, packed: Tensor, scale: Tensor) -> None:
        """Take over uint8 rows and FP16 scales of the buffers' shapes."""
        for name, value in (("weight_packed", packed), ("weight_scale", scale)):
            held = getattr(self, name)
            if held.shape != value.shape or held.dtype != value.dtype:
                raise InputError(
                    f"{name}: found {value.dtype} {tuple(value.shape)}, expected {held.dtype} {tuple(held.shape)}"
                )
            setattr(self, name, value)

    @property
    def rank(self) -> int:
        """The rank of the low-rank term; 0: there is none."""
        return 0 if self.low_rank_a is None else len(self.low_rank_a)

    @property
    def layout(self) -> dict[str, int]:
        """What `empty_packed` needs to make the layer again: {"bits", "group_size"}, and "rank" where it has one."""
        found = {"bits": self.bits, "group_size": self.group_size}
        return {**found, "rank": self.rank} if self.rank else found

    def hold_low_rank(self, rank: int) -> None:
        """A low-rank term of zeros, its values to be loaded, in place of any that is there."""
        if rank < 1:
            raise InputError(f"rank is {rank}; a low-rank term takes 1 or more")
        if (why := no_low_rank(self)) is not None:
            raise InputError(f"{type(self).__name__}: no low-rank term, since {why}")
        made: dict[str, Any] = {"dtype": torch.float16, "device": self.weight_scale.device}
        self.low_rank_a = torch.zeros(rank, self.weight_shape[1:].numel(), **made)
        self.low_rank_b = torch.zeros(self.weight_shape[0], rank, **made)

    def add_low_rank(self, a: Tensor, b: Tensor) -> None:
        """Add B(A(x)) to the output for good: a (rank, kernel), b (out, rank), kept in FP16 beside any that is there.

        Each component is scaled by a power of two that makes its two halves alike in size, which changes nothing but
        what FP16 loses of small numbers.
        """
        if a.shape[1:] != (self.weight_shape[1:].numel(),) or b.shape != (self.weight_shape[0], len(a)):
            raise InputError(
                f"low-rank term: found {tuple(a.shape)} and {tuple(b.shape)}, expected (rank, "
                f"{self.weight_shape[1:].numel()}) and ({self.weight_shape[0]}, rank)"
            )
        before = self.low_rank_a, self.low_rank_b
        a, b = a.detach().double(), b.detach().double()
        ratio = b.abs().amax(0) / a.abs().amax(1)
        usable = ratio.isfinite() & (ratio > 0)
        factor = torch.where(usable, ratio, 1.0).sqrt().log2().round().exp2()
        halves = (a * factor[:, None]).half(), (b / factor).half()
        if not all(bool(half.isfinite().all()) for half in halves):
            raise InputError("low-rank term: found NaN, Inf or values beyond FP16; train it with a lower lr")
        self.hold_low_rank(len(a))
        kept = [old for old in before if old is not None]
        self.low_rank_a, self.low_rank_b = (
            (torch.cat([kept[0], halves[0]]), torch.cat([kept[1], halves[1]], 1)) if kept else halves
        )

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight that the integers stand for, in the float weight's shape; of `compute_dtype` unless told."""
        rows = dequantize_rows(
            self.weight_packed,
            self.weight_scale,
            self.bits,
            self.group_size,
            self.weight_shape[1:].numel(),
            dtype or self.compute_dtype,
        )
        return rows.view(self.weight_shape)

    def folded(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight of a float layer that does the same: `dequantized()` with the low-rank term added."""
        a, b, dtype = self.low_rank_a, self.low_rank_b, dtype or self.compute_dtype
        if a is None or b is None:
            return self.dequantized(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        return self.dequantized(wide).add_((b.to(wide) @ a.to(wide)).view(self.weight_shape)).to(dtype)

    @property
    def weight(self) -> Tensor:
        """`dequantized()`, so without a low-rank term, to be read only: a change in place raises InputError."""
        return self.dequantized().as_subclass(_Lent)

    @property
    def weight_bytes(self) -> int:
        """Bytes of integers, scales and the low-rank term."""
        return sum(buffer.nbytes for buffer in self.buffers(recurse=False))

    def extra_repr(self) -> str:
        """As of the float layer, with bits, group size and the low-rank term's rank."""
        return ", ".join([super().extra_repr(), *(f"{name}={value}" for name, value in self.layout.items())])

    def _lend(self, x: Tensor) -> tuple[Tensor, Any]:
        """The weight in x's type, and the context in which autograd keeps no copy of it."""
        weight = self.dequantized(x.dtype)
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad):
            return weight, nullcontext()
        place = weight.data_ptr()

        def keep(saved: Tensor) -> Any:
            if saved.data_ptr() != place:
                return saved
            return saved.size(), saved.stride(), saved.dtype

        def again(kept: Any) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            size, stride, dtype = kept
            return self.dequantized(dtype).as_strided(size, stride)

        return weight, torch.autograd.graph.saved_tensors_hooks(keep, again)

    def with_low_rank(self, x: Tensor, y: Tensor) -> Tensor:
        """The output y for an input x with the low-rank term added, in place where there is one."""
        a, b = self.low_rank_a, self.low_rank_b
        return y if a is None or b is None else y.add_(self._low_rank(x, a.to(x.dtype), b.to(x.dtype)))

    def _low_rank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        raise NotImplementedError

    def _bias_for(self, x: Tensor) -> Tensor | None:
        bias = self.bias
        return bias.to(x.dtype) if isinstance(bias, Tensor) else None


class PackedLinear(_Packed, nn.Linear):  # type: ignore[override]  # whose weight can be set
    """nn.Linear with a packed weight; computes in its input's type, [..., in] -> [..., out]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int,
        group_size: int,
        rank: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, False, device="meta")
        self.bias = _bias(out_features, device, dtype) if bias else None  # type: ignore[assignment]
        self._hold((out_features, in_features), bits, group_size, rank, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        weight, saving = self._lend(x)
        with saving:
            y = F.linear(x, weight, self._bias_for(x))
        del weight
        return self.with_low_rank(x, y)

    def _low_rank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(F.linear(x, a), b)


class PackedConv2d(_Packed, nn.Conv2d):  # type: ignore[override]
    """nn.Conv2d with a packed weight; computes in its input's type, [N, in, H, W] -> [N, out, H', W']."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        bits: int,
        group_size: int,
        rank: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Conv2d.__init__(
            self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, False,
            padding_mode,  # type: ignore[arg-type]
            device="meta",
        )  # fmt: skip
        self.bias = _bias(out_channels, device, dtype) if bias else None
        self._hold((out_channels, in_channels // groups, *self.kernel_size), bits, group_size, rank, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        weight, saving = self._lend(x)
        with saving:
            y = self._conv_forward(x, weight, self._bias_for(x))
        del weight
        return self.with_low_rank(x, y)

    def _low_rank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        inner = self._conv_forward(x, a.view(-1, *self.weight_shape[1:]), None)
        return F.conv2d(inner, b[:, :, None, None])


class PackedEmbedding(_Packed, nn.Embedding):  # type: ignore[override]
    """nn.Embedding with a packed table; only the rows that are asked for are made float, int [...] -> [..., width]."""

    bias: None = None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        bits: int,
        group_size: int,
        rank: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, padding_idx, device="meta")
        self._hold((num_embeddings, embedding_dim), bits, group_size, rank, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        rows = input.flatten()
        made = dequantize_rows(
            self.weight_packed[rows],
            self.weight_scale[rows],
            self.bits,
            self.group_size,
            self.embedding_dim,
            self.compute_dtype,
        )
        return made.view(*input.shape, self.embedding_dim)


PackedLayer = PackedLinear | PackedConv2d | PackedEmbedding
FloatLayer = nn.Linear | nn.Conv2d | nn.Embedding


def empty_packed(
    module: nn.Module,
    bits: int,
    group_size: int,
    rank: int = 0,
    *,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> PackedLayer:
    """A packed layer of the shape of an nn.Linear, nn.Conv2d or nn.Embedding, its values to be loaded.

    `rank` is that of its low-rank term (0: none). `device` and `dtype` (of the bias and of what it computes in) are the
    module's own unless told; a module on "meta" gives buffers on "meta". Raises InputError for another module, and for
    a rank where `no_low_rank` tells why not.
    """
    why = unpackable(module)
    if why is not None:
        raise InputError(f"{type(module).__name__}: {why}; expected nn.Linear, nn.Conv2d or nn.Embedding")
    assert isinstance(module, FloatLayer)
    made: dict[str, Any] = {
        "bits": bits,
        "group_size": group_size,
        "rank": rank,
        "device": device or module.weight.device,
        "dtype": dtype or module.weight.dtype,
    }
    new: PackedLayer
    if isinstance(module, nn.Linear):
        new = PackedLinear(module.in_features, module.out_features, module.bias is not None, **made)
    elif isinstance(module, nn.Conv2d):
        new = PackedConv2d(
            module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding,  # type: ignore[arg-type]
            module.dilation, module.groups, module.bias is not None, module.padding_mode, **made,  # type: ignore[arg-type]
        )  # fmt: skip
    else:
        new = PackedEmbedding(module.num_embeddings, module.embedding_dim, module.padding_idx, **made)
    return new.train(module.training)


def pack_module(
    module: nn.Module,
    bits: int,
    group_size: int,
    rounding: Rounding = "nearest",
    *,
    name: str = "",
    integers: Tensor | None = None,
    scale: Tensor | None = None,
) -> PackedLayer:
    """The packed layer of an nn.Linear, nn.Conv2d or nn.Embedding, which is left as it is; the bias is shared.

    `integers` (out, kernel) and FP16 `scale` (out, groups), if given, are packed instead of what `rounding` makes of
    the weight. Raises InputError naming the layer where it cannot be packed.
    """
    try:
        new = empty_packed(module, bits, group_size, device="meta", dtype=_weight(module).dtype)
    except InputError as error:
        raise InputError(f"layer {name!r}: {error}") from error
    if integers is None or scale is None:
        packed, scale = quantize_rows(_weight(module).detach().flatten(1), bits, group_size, rounding, name)
    else:
        packed = pack(integers, bits)
    new.assign_packed(packed, scale)
    if not isinstance(new, PackedEmbedding):
        new.bias = module.bias  # type: ignore[assignment]
    return new


def unpackable(module: nn.Module) -> str | None:
    """Why a module cannot be packed, or None."""
    if isinstance(module, _Packed):
        return "it is packed already"
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
            return "an embedding with max_norm, scale_grad_by_freq or sparse changes its weight in use"
    if type(module) not in _FLOAT:
        return f"{type(module).__name__} is none of nn.Linear, nn.Conv2d, nn.Embedding"
    if not _weight(module).is_floating_point():
        return f"its weight is {_weight(module).dtype}"
    return None


def no_low_rank(layer: nn.Module) -> str | None:
    """Why a packed layer cannot carry a low-rank term, or None."""
    if isinstance(layer, nn.Embedding):
        return "it is an embedding"
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        return f"it is a convolution in {layer.groups} groups"
    return None


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """The packed layers of a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedLayer)}


def unpacked(layer: PackedLayer, dtype: torch.dtype | None = None) -> FloatLayer:
    """The plain float layer of a packed one with its low-rank term, of `dtype` or the type that it computes in."""
    dtype = dtype or layer.compute_dtype
    made: dict[str, Any] = {"device": "meta", "dtype": dtype}
    new: FloatLayer
    if isinstance(layer, PackedLinear):
        new = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, **made)
    elif isinstance(layer, PackedConv2d):
        new = nn.Conv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,  # type: ignore[arg-type]
            layer.dilation, layer.groups, layer.bias is not None, layer.padding_mode, **made,  # type: ignore[arg-type]
        )  # fmt: skip
    else:
        new = nn.Embedding(layer.num_embeddings, layer.embedding_dim, layer.padding_idx, **made)
    new.weight = nn.Parameter(layer.folded(dtype), requires_grad=False)
    if layer.bias is not None and not isinstance(new, nn.Embedding):
        new.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=layer.bias.requires_grad)
    return new.train(layer.training)


def expand(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Put plain float layers in the place of the packed ones, in place, and return the model.

    `dtype` is that of the float layers, by default what each computes in; their weights are frozen.
    """
    if isinstance(model, PackedLayer):
        return unpacked(model, dtype)
    for layer in packed_layers(model).values():
        replace_module(model, layer, unpacked(layer, dtype))
    return model


def _bias(size: int, device: Any, dtype: torch.dtype | None) -> nn.Parameter:
    return nn.Parameter(torch.zeros(size, device=device, dtype=dtype))


def _weight(module: nn.Module) -> Tensor:
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) else torch.empty(0)
