"""Taking channels out of layers: which tensors hold a channel, masking them, and making them smaller.

A layer has an "out" side and, where it reads other channels than it writes, an "in" side. Layers that
pass channels through (norms, depthwise convolutions, attention) have an "out" side only.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core.kit import InputError

Side = Literal["out", "in"]
Key = tuple[str, Side]
View = Literal["0", "1", "2", "last", "qkv", "grouped"]
Kind = Literal["filter", "bias", "norm", "statistic"]

_CONV = nn.modules.conv._ConvNd
_BATCHNORM = nn.modules.batchnorm._BatchNorm
_INSTANCENORM = nn.modules.instancenorm._InstanceNorm


@dataclass(frozen=True)
class Slot:
    """A tensor of a layer that has one row for each channel, seen through `view`.

    Views: "0", "1", "2", "last" are that axis; "qkv" is axis 0 of [3 * channels, ...]; "grouped" is
    axis 1 of a grouped convolution, whose rows belong to the blocks of axis 0. `reads` marks weights
    that the channel is multiplied with on its way into the layer.
    """

    tensor: str
    view: View
    kind: Kind
    reads: bool = False


def slots(layer: nn.Module | nn.Parameter, axis: int = 0) -> dict[Side, list[Slot]]:
    """The slots of a layer by side; empty for a layer that cannot be pruned.

    A parameter that stands outside of any layer has one slot, at `axis`.
    """
    if isinstance(layer, nn.Parameter):
        if axis in (layer.ndim - 1, -1):
            return {"out": [Slot("", "last", "filter")]}
        view: dict[int, View] = {0: "0", 1: "1", 2: "2"}
        return {"out": [Slot("", view[axis], "filter")]} if axis in view else {}
    if nn.utils.parametrize.is_parametrized(layer):
        return {}
    if isinstance(layer, _CONV):
        bias = [Slot("bias", "0", "bias")] if layer.bias is not None else []
        if is_depthwise(layer):
            return {"out": [Slot("weight", "0", "filter"), *bias]}
        local: View = "grouped" if layer.groups > 1 else "1"
        if layer.transposed:
            return {"out": [Slot("weight", local, "filter"), *bias], "in": [Slot("weight", "0", "filter", True)]}
        return {"out": [Slot("weight", "0", "filter"), *bias], "in": [Slot("weight", local, "filter", True)]}
    if isinstance(layer, nn.Linear):
        bias = [Slot("bias", "0", "bias")] if layer.bias is not None else []
        return {"out": [Slot("weight", "0", "filter"), *bias], "in": [Slot("weight", "1", "filter", True)]}
    if isinstance(layer, nn.Embedding):
        return {"out": [Slot("weight", "1", "filter")]}
    if isinstance(layer, nn.MultiheadAttention):
        return {"out": _attention(layer)} if layer._qkv_same_embed_dim else {}
    if isinstance(layer, nn.PReLU):
        return {"out": [Slot("weight", "0", "norm")]} if layer.num_parameters > 1 else {}
    if isinstance(layer, nn.LayerNorm):
        found = _present(layer, "last", {"weight": "norm", "bias": "bias"})
        return {"out": found} if len(layer.normalized_shape) == 1 else {}
    if isinstance(layer, (_BATCHNORM, _INSTANCENORM, nn.GroupNorm)):
        kinds: dict[str, Kind] = {
            "weight": "norm", "bias": "bias", "running_mean": "statistic", "running_var": "statistic"
        }  # fmt: skip
        return {"out": _present(layer, "0", kinds)}
    return {}


def is_depthwise(layer: nn.Module) -> bool:
    """Whether a convolution has one input and one output channel in every group."""
    return isinstance(layer, _CONV) and layer.groups == layer.in_channels == layer.out_channels > 1


def _present(layer: nn.Module, view: View, kinds: Mapping[str, Kind]) -> list[Slot]:
    return [Slot(name, view, kind) for name, kind in kinds.items() if getattr(layer, name, None) is not None]


def _attention(layer: nn.MultiheadAttention) -> list[Slot]:
    found = [
        Slot("in_proj_weight", "qkv", "filter"),
        Slot("in_proj_weight", "1", "filter", True),
        Slot("out_proj.weight", "0", "filter"),
        Slot("out_proj.weight", "1", "filter"),
    ]
    if layer.in_proj_bias is not None:
        found += [Slot("in_proj_bias", "qkv", "bias"), Slot("out_proj.bias", "0", "bias")]
    if layer.bias_k is not None:
        found += [Slot("bias_k", "2", "bias"), Slot("bias_v", "2", "bias")]
    return found


def channels(layer: nn.Module | nn.Parameter, side: Side, axis: int = 0) -> int:
    """The number of channels of a side of a layer; 0 when it has no such side."""
    if isinstance(layer, nn.Parameter):
        return layer.shape[axis]
    if not (side_slots := slots(layer).get(side)):
        return _attribute(layer, side)
    slot = side_slots[0]
    return rows(_tensor(layer, slot.tensor), slot.view, _groups(layer)).shape[0]


def _attribute(layer: nn.Module, side: Side) -> int:
    """The channels of a norm without parameters, which holds no tensor to read them from."""
    if side == "out" and isinstance(layer, (_BATCHNORM, _INSTANCENORM)):
        return layer.num_features
    if side == "out" and isinstance(layer, nn.GroupNorm):
        return layer.num_channels
    if side == "out" and isinstance(layer, nn.LayerNorm):
        return layer.normalized_shape[-1]
    return 0


def rows(tensor: Tensor, view: View, groups: int = 1) -> Tensor:
    """The tensor with its channels on axis 0: [channels, ...]."""
    if view == "qkv":
        return tensor.reshape(3, -1, *tensor.shape[1:]).movedim(1, 0)
    if view == "grouped":
        split = tensor.reshape(groups, -1, *tensor.shape[1:]).transpose(1, 2)
        return split.reshape(-1, *split.shape[2:])
    return tensor.movedim(-1 if view == "last" else int(view), 0)


def _unrows(channel_rows: Tensor, view: View, groups: int = 1) -> Tensor:
    if view == "qkv":
        stacked = channel_rows.movedim(0, 1)
        return stacked.reshape(-1, *stacked.shape[2:])
    if view == "grouped":
        split = channel_rows.reshape(groups, -1, *channel_rows.shape[1:]).transpose(1, 2)
        return split.reshape(-1, *split.shape[2:])
    return channel_rows.movedim(0, -1 if view == "last" else int(view))


def channel_sums(layer: nn.Module | nn.Parameter, slot: Slot, values: Tensor) -> Tensor:
    """Sum of `values` (shaped like the slot's tensor) over everything but the channel: [channels]."""
    channel_rows = rows(values, slot.view, _groups(layer))
    return channel_rows.reshape(channel_rows.shape[0], -1).sum(1)


def slot_tensor(layer: nn.Module | nn.Parameter, slot: Slot) -> Tensor:
    """The parameter or buffer behind a slot."""
    return _tensor(layer, slot.tensor)


def find(model: nn.Module, name: str) -> nn.Module | nn.Parameter:
    """The layer, or the parameter outside of any layer, of a dotted name."""
    owner, _, leaf = name.rpartition(".")
    found = getattr(model.get_submodule(owner), leaf) if leaf else model
    if not isinstance(found, (nn.Module, nn.Parameter)):
        raise InputError(f"layer {name!r}: neither a module nor a parameter of the model")
    return found


def shallow(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares the parameters, so that trials on big models stay cheap."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def structure_of(model: nn.Module, removed: Mapping[Key, Iterable[int]], axes: Mapping[str, int]) -> dict[str, Any]:
    """The JSON from which `shrink` prunes: {layer: {side: {"of": channels, "kept": [index, ...]}}}."""
    layers: dict[str, Any] = {}
    for (name, side), gone in removed.items():
        axis = axes.get(name, 0)
        total = channels(find(model, name), side, axis)
        entry = layers.setdefault(name, {})
        entry[side] = {"of": total, "kept": sorted(set(range(total)) - set(gone))}
        if name in axes:
            entry["axis"] = axis
    return layers


def shrink(model: nn.Module, layers: Mapping[str, Any]) -> nn.Module:
    """Keep only the listed channels of each layer, in place; the tensors really become smaller.

    Parameters are replaced, never written to. The queries of an attention are scaled by the root of
    the ratio of the head sizes, so that removing channels that were dead leaves its output unchanged.
    Raises InputError when a layer is missing or has another number of channels than `layers` says.
    """
    for name, entry in layers.items():
        try:
            layer = find(model, name)
        except AttributeError as error:
            raise InputError(f"pruned structure: the model has no layer {name!r}; it is of another model") from error
        axis = int(entry.get("axis", 0))
        by_side, groups = slots(layer, axis), _groups(layer)
        for side in ("out", "in"):
            if side not in entry:
                continue
            want, have = int(entry[side]["of"]), channels(layer, side, axis)
            if want != have:
                raise InputError(f"pruned structure: {name} has {have} {side} channels, expected {want}")
            kept = torch.tensor(entry[side]["kept"], dtype=torch.long)
            for slot in by_side[side]:
                old = _tensor(find(model, name), slot.tensor)
                new = rows(old.detach(), slot.view, groups).index_select(0, kept.to(old.device))
                _replace(model, f"{name}.{slot.tensor}" if slot.tensor else name, _unrows(new, slot.view, groups))
            if not by_side[side] and isinstance(layer, nn.Module):
                _resize_bare_norm(layer, len(kept))
        if isinstance(layer, nn.Module):
            _sync(layer)
    return model


def mask(model: nn.Module, removed: Mapping[Key, Iterable[int]], axes: Mapping[str, int]) -> nn.Module:
    """Zero the channels instead of removing them, in place; parameters are replaced, statistics stay."""
    for (name, side), gone in removed.items():
        layer = find(model, name)
        for slot in slots(layer, axes.get(name, 0)).get(side, []):
            if slot.kind == "statistic":
                continue
            old = _tensor(find(model, name), slot.tensor)
            zeroed = rows(old.detach(), slot.view, _groups(layer)).clone()
            zeroed[sorted(gone)] = 0
            new = _unrows(zeroed, slot.view, _groups(layer))
            _replace(model, f"{name}.{slot.tensor}" if slot.tensor else name, new)
    return model


def _tensor(layer: nn.Module | nn.Parameter, name: str) -> Tensor:
    if isinstance(layer, nn.Parameter):
        return layer
    owner, _, leaf = name.rpartition(".")
    tensor = getattr(layer.get_submodule(owner), leaf)
    assert isinstance(tensor, Tensor)
    return tensor


def _groups(layer: nn.Module | nn.Parameter) -> int:
    return layer.groups if isinstance(layer, _CONV) else 1


def _replace(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    old = getattr(module, leaf)
    value = value.contiguous()
    setattr(module, leaf, nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value)


def _resize_bare_norm(layer: nn.Module, count: int) -> None:
    if isinstance(layer, (_BATCHNORM, _INSTANCENORM)):
        layer.num_features = count
    elif isinstance(layer, nn.GroupNorm):
        layer.num_channels = count
    elif isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = (count,)


def _sync(layer: nn.Module) -> None:
    """Make the numbers that a layer keeps beside its tensors agree with them."""
    if isinstance(layer, _CONV):
        depthwise, (first, second) = is_depthwise(layer), layer.weight.shape[:2]
        layer.groups = first if depthwise else layer.groups
        outside, inside = (second * layer.groups, first) if layer.transposed else (first, second * layer.groups)
        layer.out_channels, layer.in_channels = outside, inside
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.Embedding):
        layer.embedding_dim = layer.weight.shape[1]
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = layer.weight.numel()
    elif isinstance(layer, nn.MultiheadAttention):
        _sync_attention(layer)
    elif (count := channels(layer, "out")) > 0:
        _resize_bare_norm(layer, count)


def _sync_attention(layer: nn.MultiheadAttention) -> None:
    embed, before = layer.out_proj.weight.shape[0], layer.head_dim
    layer.embed_dim = layer.kdim = layer.vdim = embed
    layer.head_dim = embed // layer.num_heads
    layer.out_proj.out_features = layer.out_proj.in_features = embed
    with torch.no_grad():  # new tensors of `shrink`: the scale is 1 / sqrt(head_dim), which has just changed
        scale = (layer.head_dim / before) ** 0.5
        layer.in_proj_weight[:embed] *= scale
        if layer.in_proj_bias is not None:
            layer.in_proj_bias[:embed] *= scale
