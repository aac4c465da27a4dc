"""Which channels of the detector can go, in the order of least harm, and what their going comes to in figures.

What counts as prunable are the output channels of the convolutions and linear layers that make a group: all of the
backbone's (inside its blocks and along its residual streams), the FPN's lateral ones, the hidden units of the
feed-forward layers, the values of the sampling attentions, and what lies inside of the heads. What stays is what the
network gives or remembers (embed_dims, and so everything that is added to the queries), the self-attention of the
object queries, whose width torch ties to them, and always sampling offsets, attention weights and the last layers of
the heads, whose outputs have a meaning each.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from core.compress import Trace
from core.figures import Figure, Figures, Measured, Stage
from core.pruning import Group, Member, Prune
from core.pruning.cost import count_macs
from core.pruning.parts import output_channels
from kits.bev_perception.model.attention import CameraAttention, DeformableAttention, TemporalSelfAttention
from kits.bev_perception.model.detector import parameters_of
from kits.bev_perception.model.fusion import Fusion
from kits.bev_perception.model.lift import Distances
from kits.bev_perception.model.proposals import FINE, Proposals

BACKBONE = ("img_backbone > img_neck",)
FEED_FORWARD = ("*.ffns.0",)
VALUES = ("*.layers.*.attentions.*",)
REGRESSION = ("*.reg_branches.*",)
HEADS = ("*.cls_branches.*", "*.can_bus_mlp")
DENSE = ("*.proposals", "*.fusion", "*.distances")
"""What `nano` has and the published models have not."""


def coupled(model: nn.Module) -> list[Group]:
    """What sampling and pixel shuffling hide from tracing: values of the attentions, the dense head, and
    what lies inside of the fusion and of the pixels' distances.
    """
    groups: list[Group] = []
    for name, module in model.named_modules():
        if isinstance(module, TemporalSelfAttention | DeformableAttention):
            groups.append(_values(module, f"{name}.value_proj", f"{name}.output_proj"))
        elif isinstance(module, CameraAttention):
            groups.append(_values(module, f"{name}.value_proj", f"{name.rpartition('.')[0]}.output_proj"))
        elif isinstance(module, Proposals):
            groups += _dense(module, name)
        elif isinstance(module, Fusion):
            groups.append(_inside(name, "conv1", ("bn1",), "conv2", module.conv1.out_channels))
        elif isinstance(module, Distances):
            for maker, reader in ((0, 2), (2, 4)):
                hidden = cast(nn.Conv2d, module.layers[maker]).out_channels
                groups.append(_inside(name, f"layers.{maker}", (), f"layers.{reader}", hidden))
    return groups


def _inside(name: str, maker: str, norms: Sequence[str], reader: str, count: int) -> Group:
    """Channels that one layer of a module makes and one other reads."""
    ids = tuple(range(count))
    outs = tuple(Member(f"{name}.{layer}", "out", ids, ids) for layer in (maker, *norms))
    return Group(f"{name}.{maker}", count, (*outs, Member(f"{name}.{reader}", "in", ids, ids)), (ids,))


def _values(attention: TemporalSelfAttention | CameraAttention | DeformableAttention, maker: str, reader: str) -> Group:
    """Value channels, of which every head loses equally many."""
    count, each = attention.value_proj.out_features, attention.head_dim
    all_ = tuple(range(count))
    members = (Member(maker, "out", all_, all_), Member(reader, "in", all_, all_))
    return Group(maker, count, members, tuple(all_[i : i + each] for i in range(0, count, each)))


def _dense(head: Proposals, name: str) -> list[Group]:
    """The hidden channels of the dense head, its features (four channels before the shuffle make one), the positions'.

    The features stand first in what `content` reads; the classes and codes behind them stay.
    """

    def one(count: int) -> tuple[int, ...]:
        return tuple(range(count))

    hidden, positions = head.conv1.out_channels, cast(nn.Linear, head.position[0]).out_features
    features, fold = head.bn2.num_features, FINE**2
    ids, wide = one(features), one(features * fold)
    members = (
        Member(f"{name}.conv2", "out", wide, tuple(i // fold for i in wide)),
        Member(f"{name}.bn2", "out", ids, ids),
        *(Member(f"{name}.{reader}", "in", ids, ids) for reader in ("classify", "regress", "content")),
    )
    return [
        _inside(name, "conv1", ("bn1",), "conv2", hidden),
        Group(f"{name}.conv2", features, members, (ids,)),
        _inside(name, "position.0", (), "position.2", positions),
    ]


def prune_steps(
    ratio: float | tuple[float, float, float, float, float] = 0.6, dense: bool = True, like: Prune | None = None
) -> tuple[Prune, ...]:
    """The steps in the order of the notes: backbone and neck, feed-forward, values, heads; a distillation fits between.

    Each takes `ratio`, or one of the five, of the output channels of the layers of its own parts. `like` gives the
    other fields. The heads are two: what regresses boxes loses equally in every layer, see below, then the rest.
    """
    ratios = ratio if isinstance(ratio, tuple) else (ratio,) * 5
    basis = replace(like, of="outputs") if like is not None else Prune(ratios[0], of="outputs")
    parts = (BACKBONE, FEED_FORWARD, VALUES, REGRESSION, HEADS + (DENSE if dense else ()))
    steps = tuple(replace(basis, ratio=share, parts=part) for share, part in zip(ratios, parts))
    # the loss of a trained detector hardly has a slope in them: a ranking over all layers leaves 8 channels, with which
    # the last decoder layer scored less than the first
    return tuple(replace(s, allocation="uniform") if s.parts == REGRESSION else s for s in steps)


def channels_removed(trace: Trace) -> tuple[int, int]:
    """(before, after): output channels of the layers that the pruning steps of a trace may shrink."""
    pairs = [line["outputs"] for entry in trace for line in entry.changed if "outputs" in line]
    return sum(before for before, _ in pairs), sum(after for _, after in pairs)


def pruning_figures(
    original: nn.Module, pruned: nn.Module, trace: Trace, inputs: tuple[Tensor, ...], device: str, runs: int = 10
) -> Figures:
    """What pruning came to: channels, multiply-accumulates, parameters, and the latency of torch side by side.

    "channels_removed" is of the prunable output channels, "channels_removed_of_all" of those of every convolution and
    linear layer. The two networks run in turns on `inputs`, so that a busy machine slows both; medians of `runs`.
    """
    before, after = channels_removed(trace)
    whole = output_channels(original), output_channels(pruned)
    counted, timed = Measured(device, "counted", 1), _medians((original, pruned), inputs, runs)
    measured = Measured(device, f"torch {torch.__version__}, {torch.get_num_threads()} threads", runs)
    figures = [
        Figure("channels_removed", 100 * (1 - after / before) if before else 0.0, "%", counted),
        Figure("channels_removed_of_all", 100 * (1 - whole[1] / whole[0]), "%", counted),
        Figure("pruned_latency_ratio", timed[1] / timed[0], "x", measured),
    ]
    stages: tuple[tuple[Stage, nn.Module, float], ...] = (
        ("original", original, timed[0]),
        ("compressed", pruned, timed[1]),
    )
    for stage, model, seconds in stages:
        figures += [
            Figure("pruned_gmacs", count_macs(model, inputs) / 1e9, "GMAC", counted, stage),
            Figure("pruned_parameters", float(parameters_of(model)), "", counted, stage),
            Figure("pruned_torch_latency", 1e3 * seconds, "ms", measured, stage),
        ]
    return Figures(figures)


@torch.no_grad()
def _medians(models: Sequence[nn.Module], inputs: tuple[Tensor, ...], runs: int) -> list[float]:
    """The median seconds of each model, run in turns after one warm-up."""
    times: list[list[float]] = [[] for _ in models]
    for turn in range(runs + 1):
        for model, taken in zip(models, times, strict=True):
            started = time.perf_counter()
            model(*inputs)
            if turn:
                taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in times]
