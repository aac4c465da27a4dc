"""How many channels each group keeps: evenly, or by what the loss says of every group alone."""

from __future__ import annotations

import bisect
import math
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core.kit import InputError
from core.pruning.cost import Cost, Term
from core.pruning.coupling import Group
from core.pruning.importance import loss_mode
from core.pruning.surgery import Key, channels, find, shallow, shrink, structure_of

Loss = Callable[[nn.Module, Any], Tensor]
_Change = tuple[float, float, tuple[tuple[int, int], ...]]  # miss of the target, harm, (group, channels to keep) ...
_TOLERANCE = 0.01
_BROKEN = 1e9  # the rise where the loss became infinite or not a number


@dataclass(frozen=True)
class Curve:
    """The rise of the loss when a group alone keeps so many channels: points by rising number, linear between.

    The last point is (all channels, 0). A rise is never less than that of keeping more channels.
    """

    keeps: tuple[int, ...]
    rises: tuple[float, ...]

    def at(self, keep: int) -> float:
        """The rise at a number of kept channels; below the first point the first segment goes on."""
        right = min(max(bisect.bisect_left(self.keeps, keep), 1), len(self.keeps) - 1)
        (x0, x1), (y0, y1) = self.keeps[right - 1 : right + 1], self.rises[right - 1 : right + 1]
        return y0 + (y1 - y0) * (keep - x0) / (x1 - x0)


def mean_loss(model: nn.Module, loss: Loss, batches: Iterable[Any]) -> float:
    """Mean loss of a model over batches, without gradients and with frozen statistics."""
    with loss_mode(model), torch.no_grad():
        values = [loss(model, batch).item() for batch in batches]
    return sum(values) / len(values)


def sensitivity(
    model: nn.Module,
    groups: Sequence[Group],
    importances: Sequence[Tensor],
    round_to: int,
    loss: Loss,
    batches: Sequence[Any],
    ratios: Sequence[float] = (0.25, 0.5, 0.75),
) -> list[Curve]:
    """Prune each group alone at a few ratios and measure the mean loss: one curve a group."""
    base = mean_loss(model, loss, batches)
    curves = []
    for group, importance in zip(groups, importances, strict=True):
        keepable = group.keepable(round_to)
        tried = {min(keepable, key=lambda n: abs(n - group.channels * (1 - r))) for r in ratios}
        keeps, rises = [group.channels], [0.0]
        for keep in sorted(tried, reverse=True):
            removed = group.removed(group.lowest(importance, keep))
            small = shrink(shallow(model), structure_of(model, removed, group.axes))
            rise = mean_loss(small, loss, batches) - base
            keeps.append(keep)
            rises.append(max(rises[-1], rise if math.isfinite(rise) else _BROKEN))
        curves.append(Curve(tuple(reversed(keeps)), tuple(reversed(rises))))
    return curves


def summed(groups: Sequence[Group], importances: Sequence[Tensor], round_to: int) -> list[Curve]:
    """Curves of a global ranking: what a group loses is the sum of the importances of the channels that go.

    Molchanov et al., "Importance Estimation for Neural Network Pruning" (2019), ranks all layers' channels together.
    """
    curves = []
    for group, importance in zip(groups, importances, strict=True):
        keeps = [*group.keepable(round_to), group.channels]
        rises = [importance[group.lowest(importance, keep)].sum().item() for keep in keeps]
        curves.append(Curve(tuple(keeps), tuple(rises)))
    return curves


def allocate(
    model: nn.Module,
    groups: Sequence[Group],
    cost: Cost,
    ratio: float,
    round_to: int,
    curves: Sequence[Curve] | None = None,
) -> tuple[list[int], float]:
    """Channels to keep in each group so that `ratio` of the cost goes, and the ratio that this reaches.

    Without curves the group that has lost the smallest share of its channels goes next, one rounding
    step at a time. With curves it is the move of least predicted rise of the loss for its saving, over
    all moves of all groups (the incremental greedy for knapsacks with several choices a group). Groups
    then change back or forth until the target is met within 1 % of the cost, or no step of the rounding
    comes nearer. Raises InputError when the target is out of reach.
    """
    state = _State(model, groups, cost)
    keepable = [group.keepable(round_to) for group in groups]
    target = cost.total * (1 - ratio)
    while state.value > target:
        moves = [(i, keep) for i, counts in enumerate(keepable) for keep in counts if keep < state.keep[i]]
        if not moves:
            reach = 1 - state.value / cost.total
            raise InputError(
                f"Prune.ratio: {ratio:g} of the {cost.unit} cannot be removed, expected at most {reach:.3f}; "
                f"lower the ratio, or allow more layers (keep) or finer steps (round_to)"
            )
        if curves is None:
            steps = dict(moves)  # the largest count below the present one comes last
            chosen = min(steps, key=lambda i: (1 - steps[i] / groups[i].channels, -groups[i].channels, i))
            state.set(chosen, steps[chosen])
        else:
            state.set(*_cheapest(state, moves, curves, target))
    _settle(state, keepable, curves, target, _TOLERANCE * cost.total)
    return list(state.keep), 1 - state.value / cost.total


def _settle(
    state: _State, keepable: Sequence[Sequence[int]], curves: Sequence[Curve] | None, target: float, tolerance: float
) -> None:
    """Change one group, or two where one is not enough, until the target is met within the tolerance.

    Stops where no such change comes nearer. Among changes that meet the target the one with the least
    predicted rise is taken, or without curves the one that changes the fewest channels.
    """

    def changes() -> list[_Change]:
        found: list[_Change] = []
        for index, counts in enumerate(keepable):
            for keep in (*counts, state.full(index)):
                miss = abs(state.value - state.saving(index, keep) - target)
                if curves is None:
                    harm = float(abs(keep - state.keep[index]))
                else:
                    harm = curves[index].at(keep) - curves[index].at(state.keep[index])
                found.append((max(miss, tolerance), harm, ((index, keep),)))
        return found

    def double_changes() -> Iterator[_Change]:
        for _, first_harm, ((index, keep),) in changes():
            old = state.keep[index]
            state.set(index, keep)
            for miss, harm, second in changes():
                yield miss, first_harm + harm, ((index, keep), *second)
            state.set(index, old)

    while (off := abs(state.value - target)) > tolerance:
        best = min(changes())
        if best[0] >= off:
            best = min(double_changes())
        if best[0] >= off:
            return
        for index, keep in best[2]:
            state.set(index, keep)


def _cheapest(
    state: _State, moves: Sequence[tuple[int, int]], curves: Sequence[Curve], target: float
) -> tuple[int, int]:
    """The move with the least rise of the loss for each unit saved; what overshoots the target saves nothing."""
    best, best_price = moves[0], (math.inf, math.inf, math.inf)
    for index, keep in moves:
        saving = state.saving(index, keep)
        if saving <= 0:
            continue
        rise = curves[index].at(keep) - curves[index].at(state.keep[index])
        useful = min(saving, state.value - target)
        price = rise / useful, -useful, saving
        if price < best_price:
            best, best_price = (index, keep), price
    return best


class _State:
    """The channels kept so far and the cost that follows."""

    def __init__(self, model: nn.Module, groups: Sequence[Group], cost: Cost) -> None:
        self.keep = [group.channels for group in groups]
        self.value = cost.total
        self._groups = groups
        self._kept: dict[Key, float] = {}
        self._shares: list[Mapping[Key, float]] = []
        self._terms: list[tuple[Term, ...]] = []
        for group in groups:
            shares = {
                (m.layer, m.side): len(m.index) / channels(find(model, m.layer), m.side, m.axis) for m in group.members
            }
            shares[group.key] = 1.0
            self._shares.append(shares)
            self._terms.append(cost.touching(shares))

    def full(self, index: int) -> int:
        """All channels of a group."""
        return self._groups[index].channels

    def saving(self, index: int, keep: int) -> float:
        """What the cost falls by when a group keeps that many channels."""
        lost = (self.keep[index] - keep) / self._groups[index].channels
        changed = {key: self._kept.get(key, 1.0) - share * lost for key, share in self._shares[index].items()}
        after = ChainMap(changed, self._kept)
        return sum(term.at(self._kept) - term.at(after) for term in self._terms[index])

    def set(self, index: int, keep: int) -> None:
        """Let a group keep that many channels."""
        self.value -= self.saving(index, keep)
        lost = (self.keep[index] - keep) / self._groups[index].channels
        for key, share in self._shares[index].items():
            self._kept[key] = self._kept.get(key, 1.0) - share * lost
        self.keep[index] = keep
