"""The step `Prune`: really remove channels, whole coupled groups at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from core.compress import Outcome, Skipped, handles
from core.kit import Context, Graph, InputError, Step
from core.pruning.cost import Cost, channel_cost, count_macs, mac_cost, made_channels, output_cost, parameter_cost
from core.pruning.coupling import Group, coupled_groups, outputs
from core.pruning.importance import Criterion, bn_gamma, magnitude, taylor
from core.pruning.parts import Coupled, find_parts, groups_in_parts
from core.pruning.sensitivity import Loss, allocate, sensitivity, summed
from core.pruning.surgery import Key, shrink, structure_of
from core.train import Schedule, fit


@dataclass(frozen=True)
class Prune(Step):
    """Remove channels until `ratio` of the MACs, parameters or prunable channels is gone.

    "channels" counts those of a coupled group once, "outputs" counts the output channels of every layer that makes
    them. `parts` are submodules to prune each by itself, where the whole network cannot be traced, or only those are to
    be pruned: a name, a name pattern, or "a > b" where b takes what a gives (see `core.pruning.parts`).
    `keep` are name patterns of layers whose output channels stay (final heads); their inputs follow the
    layers before. Channels stay multiples of `round_to`. `batches` batches of the training split serve
    the Taylor importance and the sensitivity. With `finetune_epochs` the smaller model is trained after.
    """

    ratio: float
    of: Literal["macs", "parameters", "channels", "outputs"] = "macs"
    importance: Criterion = "l1"
    allocation: Literal["uniform", "sensitivity", "global"] = "uniform"
    round_to: int = 8
    keep: tuple[str, ...] = ()
    batches: int = 4
    finetune_epochs: int = 0
    finetune_lr: float = 1e-3
    batch_size: int = 8
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise InputError(f"Prune.ratio: {self.ratio}, expected a number between 0 and 1")
        for name, known in (
            ("of", ("macs", "parameters", "channels", "outputs")),
            ("importance", ("l1", "l2", "bn", "taylor")),
            ("allocation", ("uniform", "sensitivity", "global")),
        ):
            if getattr(self, name) not in known:
                raise InputError(f"Prune.{name}: {getattr(self, name)!r}, expected one of {', '.join(known)}")
        if self.allocation == "global" and self.importance != "taylor":
            raise InputError(f"Prune.allocation: 'global' compares layers, {self.importance!r} cannot; use 'taylor'")
        for name, least in (("round_to", 1), ("batches", 1), ("batch_size", 1), ("finetune_epochs", 0)):
            if getattr(self, name) < least:
                raise InputError(f"Prune.{name}: {getattr(self, name)}, expected {least} or more")


def restore(model: nn.Module, step: Prune, structure: dict[str, Any]) -> nn.Module:
    """Make the pruned modules again from `Outcome.structure`; raises InputError for another model's."""
    return shrink(model, structure["layers"])


@handles(Prune, restore)
def prune(model: nn.Module, step: Prune, context: Context) -> Outcome:
    """Find coupled groups, rank and choose channels, remove them, and fine-tune if asked to."""
    graph = context.kit.exports()[0]
    part, prefix = graph.module(model), f"{graph.part}." if graph.part else ""
    device = next(model.parameters()).device
    inputs = tuple(tensor.to(device) for tensor in graph.inputs.values())
    before_macs, before_parameters = count_macs(part, inputs), _parameters(part)
    shapes = [t.shape for t in outputs(part, inputs)]

    if step.parts:
        told = context.kit.coupled(part) if isinstance(context.kit, Coupled) else ()
        found, skipped = groups_in_parts(part, inputs, find_parts(part, step.parts), told)
    else:
        found, skipped = coupled_groups(part, inputs)
    skipped = [Skipped(prefix + s.layer, s.why) for s in skipped]
    groups, importances = _candidates(model, part, found, step, context, graph, skipped)
    if not groups:
        raise InputError(f"Prune: no layer of {context.kit.name} can be pruned; first reason: {skipped[0].why}")
    cost = _cost(part, inputs, groups, step)
    made = [made_channels(part, group) for group in groups]
    curves = None
    if step.allocation == "sensitivity":
        loss = _part_loss(model, part, context, graph)
        curves = sensitivity(part, groups, importances, step.round_to, loss, _sample(step, context))
    elif step.allocation == "global":
        curves = summed(groups, importances, step.round_to)
    keeps, reached = allocate(part, groups, cost, step.ratio, step.round_to, curves)

    removed: dict[Key, list[int]] = {}
    axes: dict[str, int] = {}
    changed: list[dict[str, Any]] = []
    for index, (group, importance, keep) in enumerate(zip(groups, importances, keeps, strict=True)):
        if keep == group.channels:
            skipped += [Skipped(prefix + name, "the target was met without it") for name in group.makers(part)]
            continue
        for key, gone in group.removed(group.lowest(importance, keep)).items():
            removed.setdefault(key, []).extend(gone)
        axes |= group.axes
        entry = {"layer": prefix + group.name, "what": group.sentence(part, keep), "from": group.channels, "to": keep}
        changed.append(entry | ({"predicted_rise": round(curves[index].at(keep), 6)} if curves else {}))
    layers = structure_of(part, removed, axes)
    shrink(part, layers)
    if [t.shape for t in outputs(part, inputs)] != shapes:
        raise RuntimeError("Prune: the outputs changed their shapes though every group alone kept them")

    macs, parameters = count_macs(part, inputs), _parameters(part)
    left = sum(m * keep // group.channels for m, keep, group in zip(made, keeps, groups, strict=True))
    changed.insert(0, {
        "layer": graph.part or "(model)",
        "what": f"{reached:.1%} of the {step.of} removed of {step.ratio:.1%} asked: "
                f"MACs {before_macs:,} -> {macs:,}, parameters {before_parameters:,} -> {parameters:,}",
        "reached": round(reached, 6), "macs": [before_macs, macs], "parameters": [before_parameters, parameters],
        "outputs": [sum(made), left],
    })  # fmt: skip
    if step.finetune_epochs:
        model = _finetune(model, step, context)
        changed.append({"layer": "(model)", "what": f"fine-tuned for {step.finetune_epochs} epochs"})
    return Outcome(model, changed, skipped, {"layers": {prefix + name: entry for name, entry in layers.items()}})


def _candidates(
    model: nn.Module,
    part: nn.Module,
    found: Sequence[Group],
    step: Prune,
    context: Context,
    graph: Graph,
    skipped: list[Skipped],
) -> tuple[list[Group], list[Tensor]]:
    """The groups that may be pruned and the importance of their channels; the others join `skipped`."""
    prefix = f"{graph.part}." if graph.part else ""
    names = [name for name, _ in model.named_modules()]
    for pattern in step.keep:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(f"Prune.keep: {pattern!r} matches no layer; layers are named like {names[-1]!r}")
    groups: list[Group] = []
    for group in found:
        outs = [prefix + m.layer for m in group.members if m.side == "out"]
        kept = [(name, pattern) for name in outs for pattern in step.keep if fnmatchcase(name, pattern)]
        why = ""
        if kept:
            why = f"kept: {kept[0][0]} matches the pattern {kept[0][1]!r}"
        elif not group.keepable(step.round_to):
            parts = f" in {len(group.blocks)} equal parts" if len(group.blocks) > 1 else ""
            why = f"{group.channels} channels{parts}: rounding to {step.round_to} leaves nothing to remove"
        elif step.importance == "bn" and bn_gamma(part, group) is None:
            why = "no batch norm in the group to rank its channels by"
        if why:
            skipped += [Skipped(prefix + name, why) for name in group.makers(part)]
        else:
            groups.append(group)
    return groups, _importances(model, part, groups, step, context, graph)


def _importances(
    model: nn.Module, part: nn.Module, groups: Sequence[Group], step: Prune, context: Context, graph: Graph
) -> list[Tensor]:
    if step.importance == "taylor":
        ranked = copy.deepcopy(model).requires_grad_(True)
        loss = _part_loss(ranked, graph.module(ranked), context, graph)
        return taylor(graph.module(ranked), groups, loss, _sample(step, context))
    if step.importance == "bn":
        return [gamma for group in groups if (gamma := bn_gamma(part, group)) is not None]
    return [magnitude(part, group, 1 if step.importance == "l1" else 2) for group in groups]


def _part_loss(model: nn.Module, part: nn.Module, context: Context, graph: Graph) -> Loss:
    """The kit's loss as a function of the pruned part: another one stands in its place meanwhile."""
    if not graph.part:
        return context.kit.loss
    owner, _, leaf = graph.part.rpartition(".")

    def loss(other: nn.Module, batch: Any) -> Tensor:
        setattr(model.get_submodule(owner), leaf, other)
        try:
            return context.kit.loss(model, batch)
        finally:
            setattr(model.get_submodule(owner), leaf, part)

    return loss


def _sample(step: Prune, context: Context) -> list[Any]:
    """A few batches from all over the training split, not augmented: frames in a row would show one scene."""
    samples = context.kit.dataset(context.data, "train", context.preset)
    count = min(len(samples), step.batches * step.batch_size)
    spread = [samples[i * len(samples) // count] for i in range(count)]
    batches = context.kit.batches(spread, step.batch_size, train=False, seed=context.seed)
    return list(islice(batches, step.batches))


def _cost(part: nn.Module, inputs: tuple[Tensor, ...], groups: Sequence[Group], step: Prune) -> Cost:
    if step.of == "macs":
        return mac_cost(part, inputs)
    if step.of == "outputs":
        return output_cost(part, groups)
    return parameter_cost(part) if step.of == "parameters" else channel_cost(groups)


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _finetune(model: nn.Module, step: Prune, context: Context) -> nn.Module:
    samples = context.kit.dataset(context.data, "train", context.preset)

    def batches(epoch: int) -> Iterable[Any]:
        return context.kit.batches(samples, step.batch_size, train=True, seed=context.seed + epoch)

    folder: Path | None = context.folder / "finetune" if context.folder is not None else None
    return fit(
        model, batches, context.kit.loss,
        Schedule(step.finetune_epochs, step.batch_size, step.finetune_lr, seed=context.seed),
        steps_per_epoch=math.ceil(len(samples) / step.batch_size), folder=folder, resume=context.resume,
        label="fine-tune after pruning",
    ).model  # fmt: skip
