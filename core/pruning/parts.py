"""Groups of coupled channels in parts of a network that as a whole cannot be traced.

A part is looked at on the tensors that reach it in a run of the whole network; the channels that it takes and gives
stay. What no tracing can follow (values that are sampled, pixels that are shuffled) a kit tells itself.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.utils import _pytree

from core.compress import Skipped
from core.kit import InputError
from core.progress import progress
from core.pruning.coupling import Group, coupled_groups, fault, outputs
from core.pruning.surgery import Key

ARROW = ">"


@runtime_checkable
class Coupled(Protocol):
    """A kit that tells which channels of its network go together where tracing cannot find out."""

    def coupled(self, module: nn.Module) -> Sequence[Group]:
        """Groups of the module that its first graph exports, named from there; each is checked before it is used."""
        ...


@dataclass(frozen=True)
class Part:
    """Submodules that run one after the other, each on what the one before gives."""

    names: tuple[str, ...]

    def __str__(self) -> str:
        return f" {ARROW} ".join(self.names)

    def holds(self, layer: str) -> bool:
        """Whether a layer is of this part."""
        return any(layer == name or layer.startswith(f"{name}.") for name in self.names)


class _Chain(nn.Module):
    """A part as a module of its own, which calls the first submodule just as the whole network did."""

    def __init__(self, modules: Iterable[nn.Module], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.kwargs = kwargs
        for index, module in enumerate(modules):
            self.add_module(str(index), module)

    def forward(self, *args: Any) -> Any:
        first, *rest = self.children()
        x = first(*args, **self.kwargs)
        for module in rest:
            x = module(x)
        return x


def find_parts(model: nn.Module, patterns: Iterable[str]) -> list[Part]:
    """The parts that "a", "a > b" or a name pattern ("*.ffns.0") stand for; of nested matches the outermost.

    Raises InputError for a pattern that matches nothing.
    """
    names = [name for name, _ in model.named_modules() if name]
    parts: list[Part] = []
    for pattern in patterns:
        chain = tuple(name.strip() for name in pattern.split(ARROW))
        if len(chain) > 1:
            if unknown := [name for name in chain if name not in names]:
                raise InputError(f"Prune.parts: {pattern!r}: no submodule {unknown[0]!r}; name them as the model does")
            parts.append(Part(chain))
            continue
        found = [name for name in names if fnmatchcase(name, chain[0])]
        if not found:
            raise InputError(f"Prune.parts: {pattern!r} matches no submodule; they are named like {names[-1]!r}")
        parts += [Part((name,)) for name in found if not any(Part((o,)).holds(name) for o in found if o != name)]
    return list(dict.fromkeys(parts))


def groups_in_parts(
    model: nn.Module, inputs: tuple[Tensor, ...], parts: Sequence[Part], told: Sequence[Group] = ()
) -> tuple[list[Group], list[Skipped]]:
    """The groups of all parts by the names of the whole model, and the layers without one and why.

    A part in which `told` has groups is not traced. Told groups are checked as traced ones are: zeroing channels must
    give what removing them gives, here of the whole network in float64.
    """
    groups: list[Group] = []
    skipped: list[Skipped] = []
    taken: dict[Key, set[int]] = defaultdict(set)
    mine = [group for group in told if any(part.holds(group.name) for part in parts)]
    traced = [part for part in parts if not any(part.holds(group.name) for group in mine)]
    calls = _calls(model, inputs, [part.names[0] for part in traced])
    with progress("find coupled channels", len(traced) + len(mine)) as bar:
        for part in traced:
            bar.advance(str(part))
            if part.names[0] not in calls:
                skipped.append(Skipped(str(part), "not called as a module when the example inputs run"))
                continue
            found, without = _trace(model, part, *calls[part.names[0]])
            skipped += without
            for group in found:
                _take(group, taken, groups, skipped)
        if mine:
            exact = copy.deepcopy(model).double()
            wide = tuple(t.double() if t.is_floating_point() else t for t in inputs)
            reference = outputs(exact, wide)
        for group in mine:
            if why := fault(exact, wide, group, reference):
                skipped.append(Skipped(group.name, why))
            else:
                _take(group, taken, groups, skipped)
            bar.advance(group.name)
    return groups, skipped


def _take(group: Group, taken: dict[Key, set[int]], groups: list[Group], skipped: list[Skipped]) -> None:
    """Add a group unless another holds some of its channels."""
    if overlap := [m.layer for m in group.members if taken[m.layer, m.side] & set(m.index)]:
        skipped.append(Skipped(group.name, f"coupled with channels of {overlap[0]} that another group holds"))
        return
    groups.append(group)
    for member in group.members:
        taken[member.layer, member.side] |= set(member.index)


def _trace(
    model: nn.Module, part: Part, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Group], list[Skipped]]:
    """The groups of one part, named as in the whole model."""
    chain = _Chain((model.get_submodule(name) for name in part.names), kwargs).train(model.training)

    def full(layer: str) -> str:
        index, _, rest = layer.partition(".")
        return f"{part.names[int(index)]}.{rest}" if rest else part.names[int(index)]

    try:
        found, skipped = coupled_groups(chain, args)
    except (TypeError, RuntimeError, ValueError, IndexError, KeyError, AttributeError, AssertionError) as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return [], [Skipped(str(part), f"cannot be traced ({text[:100]}); name smaller parts")]
    renamed = [
        replace(g, name=full(g.name), members=tuple(replace(m, layer=full(m.layer)) for m in g.members)) for g in found
    ]
    return renamed, [Skipped(full(s.layer), s.why) for s in skipped]


def _calls(
    model: nn.Module, inputs: tuple[Tensor, ...], names: Sequence[str]
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """(args, kwargs) of the first call of each submodule in a run of the model, of those that it calls."""
    found: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def watch(name: str) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name not in found:
                found[name] = _pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))

        return note

    hooks = [model.get_submodule(name).register_forward_pre_hook(watch(name), with_kwargs=True) for name in names]
    try:
        outputs(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def output_channels(model: nn.Module, layers: Iterable[str] | None = None) -> int:
    """Output channels of the convolutions and linear layers of a model, or of those of these names."""
    chosen = None if layers is None else set(layers)
    total = 0
    for name, module in model.named_modules():
        if chosen is not None and name not in chosen:
            continue
        if isinstance(module, nn.modules.conv._ConvNd):
            total += module.out_channels
        elif isinstance(module, nn.Linear):
            total += module.out_features
    return total
