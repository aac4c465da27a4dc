"""Conditional compute beside always-dense, oracle and random gates: what it costs in accuracy and what it saves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from core.evaluation.bench import Bench, bench
from core.export import Artifact
from core.progress import progress
from kits.pcb_inspection.acceptance import score
from kits.pcb_inspection.conditional import CROP, RIM, Conditional, Place, blobs, conditional, cover
from kits.pcb_inspection.data.deeppcb import Pair
from kits.pcb_inspection.data.defects import add_defects
from kits.pcb_inspection.inspection import clean_boards
from kits.pcb_inspection.model.design import COARSEST
from kits.pcb_inspection.model.inspector import TILE, input_side, inspect, pad, shown_to
from kits.pcb_inspection.model.pair import Grey, binarise, register, stack
from kits.pcb_inspection.model.shrink import shrink

NEVER = 10**9
"""A crossover that is not reached: what crops cost in accuracy shows only where they are taken."""
DENSITIES = (0, 1, 2, 5, 10, 20)
"""Defects drawn into a good board."""
TILES_TIMED = 240
"""At least, each way, where gates are timed; in no fewer than seven rounds."""
SHOWN = ("official_ap", "map33", "map5095", "recall_any", "recall_right", "precision")


@dataclass(frozen=True)
class Studied:
    """One gate: its metrics in %, milliseconds of the network's part, and the share of tiles that went each way."""

    metrics: Mapping[str, float]
    milliseconds: float
    ways: Mapping[str, int]


def study(artifact: Artifact, variant: str, threads: int, pairs: Sequence[Pair]) -> dict[str, Studied]:
    """Always dense, the frozen gate, one that knows the defects, and one that looks at as many crops anywhere."""
    gated = conditional(artifact, variant, threads)
    side = input_side(gated.dense)
    shown = _Shown()
    gates: dict[str, nn.Module] = {
        "always dense": gated.dense,
        "difference gate": gated,
        "crops however many": Conditional(gated.dense, gated.crops, gated.area, NEVER),
        "oracle": _with_gate(gated, lambda gained, lost: around(shown.boxes, side)),
        "random": _with_gate(gated, lambda gained, lost: anywhere(_count(gated, gained, lost, side), side, shown.rng)),
    }
    truths = {p.image_id: (p.boxes, p.labels) for p in pairs}
    groups = {p.image_id: p.group for p in pairs}
    found: dict[str, dict[str, Any]] = {name: {} for name in gates}
    tiles = []
    with progress("gates", len(pairs)) as bar:
        for number, pair in enumerate(pairs):
            test, template = pair.load()
            shown.boxes, shown.rng = pair.boxes * (side / TILE), np.random.default_rng(number)
            for name, module in gates.items():
                found[name][pair.image_id] = inspect(module, test, template).detections
            tiles.append(planes_of(test, template, side))
            bar.advance()
    ways = {name: dict(m.ways) if isinstance(m, Conditional) else {"dense": len(pairs)} for name, m in gates.items()}
    spent = times({n: m for n, m in gates.items() if n in ("always dense", "difference gate")}, tiles, threads)
    studied = {}
    for name in gates:
        metrics = score(found[name], truths, float(artifact.meta["threshold"]), groups).figures()
        studied[name] = Studied({k: metrics[k][0] for k in SHOWN}, spent.get(name, float("nan")), ways[name])
    return studied


class _Shown:
    """The board that is looked at: what the oracle knows, and the draws of the random gate."""

    boxes: Any = np.zeros((0, 4), np.float32)
    rng = np.random.default_rng(0)


def _with_gate(like: Conditional, gate: Callable[[Grey, Grey], list[Place] | None]) -> Conditional:
    return Conditional(like.dense, like.crops, like.area, like.crossover, gate)


def _count(like: Conditional, gained: Grey, lost: Grey, side: int) -> int:
    places = cover(blobs(gained, lost), like.area, side)
    return like.crossover if places is None else len(places)


def around(boxes: Any, side: int) -> list[Place] | None:
    """Crops about true boxes (n, 4)."""
    sizes = boxes[:, 2:] - boxes[:, :2]
    pieces = np.concatenate((boxes[:, :2], sizes, np.full((len(boxes), 1), CROP)), 1).round().astype(np.int64)
    return cover(pieces, 1, side)


def anywhere(count: int, side: int, rng: np.random.Generator) -> list[Place]:
    """Crops at random places on the grid."""
    starts = rng.integers(0, (side - CROP) // COARSEST + 1, (count, 2)) * COARSEST
    return [(int(a), int(b)) for a, b in starts]


def planes_of(test: Grey, template: Grey, side: int) -> Grey:
    """The planes (4, S, S) of a board no larger than a tile, registered, for a network of `side` px."""
    board = binarise(test)
    golden = register(board, binarise(template))[0]
    if side != TILE:
        board, golden = (shrink(image, side / TILE) for image in (board, golden))
    return pad(stack(board, golden), side, side)


def timed(modules: Mapping[str, nn.Module], tiles: Sequence[Grey], threads: int) -> Bench:
    """The network's part of the time in turns, milliseconds for a call through all tiles (4, S, S)."""

    def through(module: nn.Module) -> Callable[[], Any]:
        inputs = [shown_to(module, tile) for tile in tiles]

        def call() -> None:
            with torch.inference_mode():
                for planes in inputs:
                    module(planes)

        return call

    runs = max(7, TILES_TIMED // len(tiles))
    return bench({name: through(m) for name, m in modules.items()}, runs=runs, threads=threads, label="gates")


def times(modules: Mapping[str, nn.Module], tiles: Sequence[Grey], threads: int) -> dict[str, float]:
    """Median milliseconds a tile."""
    return {name: t.p50 / len(tiles) for name, t in timed(modules, tiles, threads).timings.items()}


def by_density(
    artifact: Artifact, variant: str, threads: int, pairs: Sequence[Pair], boards: int = 6
) -> list[tuple[int, float, float, float, float]]:
    """(defects a tile, crops, milliseconds gated, dense, their ratio) on good boards with defects drawn into them.

    The ratio is the median over rounds, which a machine that runs faster for a while does not change.
    """
    gated = conditional(artifact, variant, threads)
    side = input_side(gated.dense)
    rows = []
    for density in DENSITIES:
        tiles, counts = crowded(pairs, density, side, boards), []
        for tile in tiles:
            counts.append(_count(gated, tile[2], tile[3], side))
        found = timed({"dense": gated.dense, "gated": gated}, tiles, threads)
        gated_ms, dense_ms = (found.timings[name].p50 / len(tiles) for name in ("gated", "dense"))
        rows.append((density, float(np.mean(counts)), gated_ms, dense_ms, found.ratios["gated", "dense"].value))
    return rows


def crowded(pairs: Sequence[Pair], density: int, side: int, boards: int = 6) -> list[Grey]:
    """The planes (4, S, S) of good boards with so many defects drawn into each."""
    tiles = []
    for number, pair in enumerate(clean_boards(pairs)[:boards]):
        test, template = pair.load()
        if density:
            test = add_defects(binarise(test), np.random.default_rng((density, number)), density)[0]
        tiles.append(planes_of(test, template, side))
    return tiles


def tables(
    studied: Mapping[str, Studied], densities: Sequence[tuple[int, float, float, float, float]], artifact: Artifact
) -> list[dict[str, Any]]:
    """Both studies as tables of a report."""
    rows = []
    for name, found in studied.items():
        ways = ", ".join(f"{count} {way}" for way, count in sorted(found.ways.items()))
        spent = "" if np.isnan(found.milliseconds) else round(found.milliseconds, 2)
        rows.append([name, *(round(found.metrics[k], 2) for k in SHOWN), spent, ways])
    gate = artifact.meta["gate"]
    return [
        {
            "title": "Conditional compute", "columns": ["gate", *(f"{k} [%]" for k in SHOWN), "network [ms]", "tiles"],
            "rows": rows,
            "note": f"crops of {CROP} px, {RIM} px of rim not taken, about differences of {gate['area']} px or more: "
            f"on the {gate['boards']} validation boards the gate misses {gate['missed']} of {gate['defects']} defects; "
            "the oracle knows where defects are, the random gate looks at as many crops anywhere",
        },
        {
            "title": "Time by defects in a tile", "columns": ["defects", "crops", "gated [ms]", "dense [ms]", "ratio"],
            "rows": [[d, round(c, 1), round(a, 2), round(b, 2), round(r, 2)] for d, c, a, b, r in densities],
            "note": "good boards with defects drawn into them, the network's part alone, in turns; from the measured "
            "crossover on a tile is looked at as a whole",
        },
    ]  # fmt: skip
