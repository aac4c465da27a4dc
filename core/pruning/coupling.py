"""Which channels must go together: groups of coupled channels, read from Torch-Pruning's DependencyGraph.

Method: DepGraph (Fang et al., CVPR 2023). Groups are read once from the untouched network; removing
channels is done by `core.pruning.surgery`, so that a stored structure can repeat it.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from core.compress import Skipped
from core.pruning.surgery import Key, Side, channels, find, is_depthwise, mask, shallow, shrink, slots, structure_of

_CONV = nn.modules.conv._ConvNd


@dataclass(frozen=True)
class Member:
    """A side of a layer in a group: its channel `index[i]` goes with the group's channel `position[i]`."""

    layer: str
    side: Side
    index: tuple[int, ...]
    position: tuple[int, ...]
    axis: int = 0


@dataclass(frozen=True)
class Group:
    """Coupled channels, named after the layer that makes them.

    `blocks` are sets of positions that must lose equally many channels, such as the heads of an
    attention or the groups of a convolution; mostly there is one block. `exact` tells that masking the
    channels gives the same output as removing them (a layer norm over the channels would change).
    """

    name: str
    channels: int
    members: tuple[Member, ...]
    blocks: tuple[tuple[int, ...], ...]
    exact: bool = True

    @property
    def key(self) -> Key:
        """The key under which the group itself, not one of its layers, stands in a cost."""
        return f"group of {self.name}", "out"

    @property
    def axes(self) -> dict[str, int]:
        """The axis of each parameter outside of any layer."""
        return {m.layer: m.axis for m in self.members if m.axis}

    def removed(self, positions: Iterable[int]) -> dict[Key, list[int]]:
        """The channels of every side that go when these positions of the group go."""
        gone = set(positions)
        return {
            (m.layer, m.side): [i for i, p in zip(m.index, m.position, strict=True) if p in gone] for m in self.members
        }

    def keepable(self, round_to: int) -> list[int]:
        """The numbers of channels that may stay, fewest first: equal in every block, multiples in every layer."""
        shares = {len(set(m.position)) for m in self.members}
        return [
            n for n in range(round_to, self.channels, round_to)
            if n % len(self.blocks) == 0 and all(n * share % (self.channels * round_to) == 0 for share in shares)
        ]  # fmt: skip

    def makers(self, model: nn.Module) -> list[str]:
        """The layers whose output channels the group holds, its own name first."""
        outs = [m.layer for m in self.members if m.side == "out" and m.layer != self.name]
        return [self.name, *(n for n in outs if any(s.kind == "filter" for s in slots(find(model, n)).get("out", [])))]

    def lowest(self, importance: Tensor, keep: int) -> list[int]:
        """The positions to remove so that `keep` stay: the least important of each block."""
        per_block = (self.channels - keep) // len(self.blocks)
        gone: list[int] = []
        for block in self.blocks:
            order = torch.argsort(importance[list(block)], stable=True)[:per_block]
            gone += [block[i] for i in order.tolist()]
        return sorted(gone)

    def sentence(self, model: nn.Module, keep: int) -> str:
        """ "stem.conv 64->40 with b1.conv2 outputs and b1.conv1, head inputs"."""
        outs = self.makers(model)[1:]
        ins = [m.layer for m in self.members if m.side == "in"]
        parts = [f"{', '.join(names)} {word}" for names, word in ((outs, "outputs"), (ins, "inputs")) if names]
        return f"{self.name} {self.channels}->{keep}" + (f" with {' and '.join(parts)}" if parts else "")


def slots_of(model: nn.Module, member: Member) -> list[Any]:
    """The slots of a member's side."""
    return slots(find(model, member.layer), member.axis).get(member.side, [])


def outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """All tensors that a model gives in eval mode, in order."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        found = [leaf for leaf in _pytree.tree_leaves(model(*inputs)) if isinstance(leaf, Tensor)]
    model.train(was_training)
    return found


def coupled_groups(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[list[Group], list[Skipped]]:
    """The groups of a model, narrowest first, and the layers for which there is none and why.

    Every group is tried alone: half of its channels are removed and the outputs compared with those of
    the network in which the same channels are zero. A group that fails is skipped with what happened.
    """
    trace = _Trace(model, inputs)
    graph, names = trace.graph, trace.names
    taken: dict[Key, set[int]] = defaultdict(set)
    shared = {id(p) for p, n in Counter(p for _, p in model.named_parameters(remove_duplicate=False)).items() if n > 1}
    groups: list[Group] = []
    reasons: dict[str, str] = {}
    reference = outputs(model, inputs)
    roots = [m for m in graph.module2node if isinstance(m, (_CONV, nn.Linear)) and m in names and not is_depthwise(m)]
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    # narrow first: a wide layer may be coupled to several narrow ones, each to a part of it
    for root in sorted(roots, key=lambda m: (channels(m, "out"), order[names[m]])):
        name = names[root]
        free = [i for i in range(channels(root, "out")) if i not in taken[name, "out"]]
        if not free:
            continue
        found = _group(trace, model, root, free) if len(free) > 1 else "one channel: nothing to remove"
        if isinstance(found, str):
            reasons[name] = found
        elif overlap := [m.layer for m in found.members if taken[m.layer, m.side] & set(m.index)]:
            reasons[name] = f"coupled with channels of {overlap[0]} that another group holds"
        elif tied := [m.layer for m in found.members if any(_is_shared(model, m, s, shared) for s in ("", "weight"))]:
            reasons[name] = f"{tied[0]} shares its weight with another layer"
        elif why := fault(model, inputs, found, reference):
            reasons[name] = why
        else:
            groups.append(found)
            for member in found.members:
                taken[member.layer, member.side] |= set(member.index)
    open_roots = {names[m] for m in roots if len(taken[names[m], "out"]) < channels(m, "out")}
    skipped = [Skipped(name, why) for name, why in reasons.items() if name in open_roots]
    seen = {names[m] for m in graph.module2node if m in names}
    for layer, module in model.named_modules():
        if isinstance(module, (_CONV, nn.Linear)) and layer not in seen:
            inside = isinstance(model.get_submodule(layer.rpartition(".")[0]), nn.MultiheadAttention)
            if not inside:
                skipped.append(Skipped(layer, "not reached from the example inputs"))
    return groups, skipped


def _is_shared(model: nn.Module, member: Member, tensor: str, shared: set[int]) -> bool:
    found = find(model, member.layer)
    return id(getattr(found, tensor, None) if tensor else found) in shared


class _Watch(TorchFunctionMode):
    """Notes while tracing what DependencyGraph cannot read from autograd: where parts are cut and joined.

    It infers the sizes of a concatenation, and mixes up parts of a split that are used twice; so splits
    become slices here. `joins` has the sizes of a concatenation along the channels by its autograd node.
    `parts` has, for each slice of a `chunk`, which divides whatever it is given into equal parts, the
    number of the call, of the part, and of all its parts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.joins: dict[Any, list[int]] = {}
        self.parts: dict[Any, tuple[int, int, int]] = {}
        self._calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.cat, torch.concat, torch.concatenate):
            return self._join(func, args, kwargs)
        result = func(*args, **kwargs)
        if func in (torch.chunk, Tensor.chunk, torch.split, Tensor.split) and result[0].requires_grad:
            dim = kwargs.get("dim", args[2] if len(args) > 2 else 0)
            return self._cut(args[0], result, dim % result[0].ndim, func in (torch.chunk, Tensor.chunk))
        return result

    def _join(self, func: Any, args: Any, kwargs: Any) -> Any:
        # an input picture among the parts would have no node, and the offsets would be those without it
        parts = [
            t if t.requires_grad or not t.is_floating_point() else t.detach().requires_grad_(True).clone()
            for t in (args[0] if args else kwargs["tensors"])
        ]
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        result = func(parts, dim)
        if result.grad_fn is not None and dim % result.ndim == 1:
            self.joins[result.grad_fn] = [t.shape[dim] for t in parts]
        return result

    def _cut(self, whole: Tensor, pieces: Sequence[Tensor], dim: int, equal: bool) -> tuple[Tensor, ...]:
        slices, start = [], 0
        for part, piece in enumerate(pieces):
            end = start + piece.shape[dim]
            slices.append(torch.ops.aten.slice.Tensor(whole, dim, start, end))
            if equal:
                self.parts[slices[-1].grad_fn] = (self._calls, part, len(pieces))
            start = end
        self._calls += 1
        return tuple(slices)


class _Trace:
    """The dependency graph of a copy of a model, the names of its layers and stray parameters, its chunks."""

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        from torch_pruning import DependencyGraph

        traced = copy.deepcopy(model).requires_grad_(True)  # autograd sees no frozen layers

        def differentiable(result: Any) -> list[Tensor]:
            return [t for t in _pytree.tree_leaves(result) if isinstance(t, Tensor) and t.grad_fn is not None]

        def forward(net: nn.Module, example: tuple[Tensor, ...]) -> Any:
            with watch:
                return net(*example)

        def nodes_with_sizes(*args: Any, **kwargs: Any) -> Any:
            nodes = plain_nodes(*args, **kwargs)
            for node in nodes.values():
                if node.grad_fn in watch.joins and hasattr(node.module, "concat_sizes"):
                    node.module.concat_sizes = watch.joins[node.grad_fn]
            return nodes

        watch, self.graph = _Watch(), DependencyGraph()
        plain_nodes, self.graph._trace = self.graph._trace, nodes_with_sizes  # before it derives any offsets
        with torch.enable_grad():
            self.graph.build_dependency(
                traced, inputs, forward_fn=forward, output_transform=differentiable, verbose=False
            )
        self.parts = watch.parts
        self.names: dict[Any, str] = {module: name for name, module in traced.named_modules()}
        self.names |= {parameter: name for name, parameter in traced.named_parameters()}


def _group(trace: _Trace, model: nn.Module, root: nn.Module, free: list[int]) -> Group | str:
    """The group of these output channels of a layer, or why there is none."""
    from torch_pruning import ops

    graph, names = trace.graph, trace.names
    coupled = graph.get_pruning_group(root, graph.get_pruner_of_module(root).prune_out_channels, free)
    place = {channel: position for position, channel in enumerate(free)}
    members: list[Member] = []
    constraints: list[tuple[str, list[tuple[int, int]], int]] = []
    chunks: dict[tuple[int, int], list[tuple[int, int]]] = {}
    exact = True
    for item in coupled:
        node, target = item.dep.target, item.dep.target.module
        if None in item.root_idxs:
            return "contains an unsupported operation: channels are repeated on the way"
        pairs = [(i, place[r]) for i, r in zip(item.idxs, item.root_idxs, strict=True)]
        if node.type == ops.OPTYPE.OUTPUT:
            return "output layer: its channels are the network's output"
        if node.type == ops.OPTYPE.SLICE and node.grad_fn in trace.parts:
            call, part, parts = trace.parts[node.grad_fn]
            chunks.setdefault((call, parts), []).extend((part, p) for _, p in pairs)
            continue
        if target not in names:
            continue
        name, layer = names[target], find(model, names[target])
        side: Side = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
        axis = node.pruning_dim % layer.ndim if isinstance(layer, nn.Parameter) else 0
        if isinstance(layer, nn.Module) and not isinstance(target, tuple(_prunable())):
            if any(True for _ in layer.parameters()):
                return f"contains an unsupported layer: {name} ({type(layer).__name__})"
            continue
        count = channels(layer, side, axis)
        if count == 1 and len(pairs) > 1:
            continue  # broadcast over the channels, such as a spatial attention map
        if isinstance(layer, nn.PReLU) and layer.num_parameters == 1:
            continue
        if any(i >= count > 0 for i, _ in pairs):
            return f"contains an unsupported operation: its channels cannot be followed through to {name}"
        if count == 0:
            return f"contains an unsupported layer: {name} ({type(layer).__name__})"
        members.append(Member(name, side, tuple(i for i, _ in pairs), tuple(p for _, p in pairs), axis))
        exact = exact and not isinstance(layer, (nn.LayerNorm, nn.GroupNorm))
        if (division := _parts(layer)) > 1:
            constraints.append((name, [(i * division // count, p) for i, p in pairs], division))
    if not any(m.side == "in" or any(s.reads for s in slots_of(model, m)) for m in members):
        return "output layer: no layer reads its channels"
    constraints += [("a split into equal parts", pairs, parts) for (_, parts), pairs in chunks.items()]
    blocks = _blocks(len(free), constraints)
    if isinstance(blocks, str):
        return blocks
    for member in members:
        covered = set(member.position)
        if any(0 < len(covered & set(block)) < len(block) for block in blocks):
            return f"{member.layer} holds only some of its channels, so that equal shares cannot be removed"
    return Group(names[root], len(free), tuple(members), blocks, exact)


def _prunable() -> list[type]:
    return [
        _CONV, nn.Linear, nn.Embedding, nn.MultiheadAttention, nn.PReLU, nn.LayerNorm, nn.GroupNorm,
        nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.Parameter,
    ]  # fmt: skip


def _parts(layer: nn.Module | nn.Parameter) -> int:
    """Into how many equal parts a layer divides its channels."""
    if isinstance(layer, nn.MultiheadAttention):
        return layer.num_heads
    if isinstance(layer, nn.GroupNorm):
        return layer.num_groups
    if isinstance(layer, _CONV) and not is_depthwise(layer):
        return layer.groups
    return 1


def _blocks(count: int, constraints: list[tuple[str, list[tuple[int, int]], int]]) -> tuple[tuple[int, ...], ...] | str:
    """Positions by the parts they fall in, for all constraints at once; or why no equal removal is possible."""
    labels: list[tuple[int, ...]] = [() for _ in range(count)]
    for name, pairs, parts in constraints:
        part_of = {position: part for part, position in pairs}
        if len(part_of) < count or len(set(part_of.values())) < parts:
            return f"{name} divides its channels into {parts} parts, of which this group is only some"
        labels = [(*label, part_of[position]) for position, label in enumerate(labels)]
    blocks: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for position, label in enumerate(labels):
        blocks[label].append(position)
    if len({len(b) for b in blocks.values()}) > 1:
        return f"{', '.join(name for name, _, _ in constraints)} divide the channels in ways that do not fit together"
    return tuple(tuple(b) for b in blocks.values())


def fault(model: nn.Module, inputs: tuple[Tensor, ...], group: Group, reference: list[Tensor]) -> str:
    """What goes wrong when half of a group is removed; empty when nothing does."""
    half = group.channels // 2 // len(group.blocks) * len(group.blocks)
    if half == 0:
        return f"{group.channels} channels in {len(group.blocks)} equal parts: nothing to remove"
    removed = group.removed(group.lowest(torch.zeros(group.channels), group.channels - half))
    try:
        small = outputs(shrink(shallow(model), structure_of(model, removed, group.axes)), inputs)
    except (RuntimeError, ValueError, IndexError, AssertionError, TypeError) as error:
        return f"contains an unsupported operation: {str(error).strip().splitlines()[0][:120]}"
    if [t.shape for t in small] != [t.shape for t in reference]:
        return "output layer: its channels are the network's output"
    if group.exact:
        masked = outputs(mask(shallow(model), removed, group.axes), inputs)
        for got, want in zip(small, masked, strict=True):
            scale = want.abs().max().item() if want.numel() and want.is_floating_point() else 0.0
            if got.is_floating_point() and not torch.allclose(got, want, rtol=1e-3, atol=1e-3 * scale + 1e-6):
                return "contains an unsupported operation: removing channels differs from zeroing them"
    return ""
