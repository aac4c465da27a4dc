"""Where activations lie while a model runs: the peak, and a plan that packs them into one arena."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

from core.hardware.profile import Buffer, Run
from core.hardware.targets import BITS
from core.kit import InputError

T = TypeVar("T")
Choice = str | Mapping[str, str]
"""One data type for all layers, or one by layer name; a name covers what is inside it and "*" all others."""


@dataclass(frozen=True)
class Placement:
    """A block of the arena: `size` bytes at `offset`, in use from step `born` to step `dies`."""

    producer: str
    offset: int
    size: int
    born: int
    dies: int


@dataclass(frozen=True)
class MemoryPlan:
    """`peak` is the most bytes alive at once (no plan can use less), at step `at`; `arena` is what the plan uses."""

    peak: int
    at: str
    arena: int
    placements: tuple[Placement, ...]


def lookup(choice: Mapping[str, T], layer: str, default: T) -> T:
    """The entry for `layer`: its own, or that of the closest module around it, or that of "*"."""
    name = layer
    while name:
        if name in choice:
            return choice[name]
        name = name.rpartition(".")[0]
    return choice.get("*", default)


def dtype_of(precision: Choice, layer: str) -> str:
    """The data type of a layer; raises InputError for one that is not in `BITS`."""
    dtype = precision if isinstance(precision, str) else lookup(precision, layer, "fp32")
    if dtype not in BITS:
        raise InputError(f"layer {layer}: data type {dtype!r} is not known; known are {', '.join(BITS)}")
    return dtype


def plan(run: Run, precision: Choice = "fp32", prefix: str = "", alignment: int = 16) -> MemoryPlan:
    """Pack the activations of a run, largest first, each at the lowest offset that is free while it lives.

    Element-wise results take the place of an input that nobody reads again. Offsets are multiples of
    `alignment` bytes (16, as in TensorFlow Lite Micro). Source: greedy by size of Pisarchyk and Lee,
    "Efficient memory management for deep neural net inference", 2020.
    """
    blocks = _merge(run.buffers, precision, prefix)
    changes = [0] * (len(run.steps) + 1)
    for block in blocks:
        changes[block.born] += block.size
        changes[block.dies + 1] -= block.size
    alive = list(accumulate(changes))[:-1]
    peak = max(alive, default=0)
    placed: list[Placement] = []
    for block in sorted(blocks, key=lambda b: (-b.size, b.born)):
        offset = 0
        for other in sorted(placed, key=lambda p: p.offset):
            if other.dies < block.born or other.born > block.dies:
                continue
            if offset + block.size <= other.offset:
                break
            offset = max(offset, math.ceil((other.offset + other.size) / alignment) * alignment)
        placed.append(Placement(block.producer, offset, block.size, block.born, block.dies))
    arena = max((p.offset + p.size for p in placed), default=0)
    return MemoryPlan(peak, run.steps[alive.index(peak)] if alive else "", arena, tuple(placed))


def _merge(buffers: Sequence[Buffer], precision: Choice, prefix: str) -> list[Placement]:
    """One block for every chain of results that share memory, live as long as any of them."""
    chains: dict[int, list[Buffer]] = {}
    for index, buffer in enumerate(buffers):
        root = index
        while (alias := buffers[root].alias) is not None:
            root = alias
        chains.setdefault(root, []).append(buffer)
    blocks = []
    for chain in chains.values():
        size = max(_bytes(b, precision, prefix) for b in chain)
        if size:
            blocks.append(Placement(chain[0].producer, 0, size, chain[0].born, max(b.dies for b in chain)))
    return blocks


def _bytes(buffer: Buffer, precision: Choice, prefix: str) -> int:
    if buffer.itemsize is not None:
        return buffer.elements * buffer.itemsize
    return math.ceil(buffer.elements * BITS[dtype_of(precision, prefix + buffer.producer)] / 8)
