"""Pruning part by part, where the whole network cannot be traced."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from core.compress import compress
from core.kit import Graph, InputError, Recipe
from core.pruning import Group, Member, Prune
from core.pruning.parts import Part, find_parts, groups_in_parts
from tests.core.prunable import Toy, conv


class Branch(nn.Module):
    """Takes a keyword and gives what it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 48), nn.Linear(48, 24)

    def forward(self, x: Tensor, *, scale: float) -> Tensor:
        return x + scale * self.down(self.up(x).relu())


class Net(nn.Module):
    """Two parts in a row, two branches, one of them idle, and a shuffle that no tracing follows."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.neck = nn.Sequential(conv(3, 32), conv(32, 32)), conv(32, 24)
        self.branches = nn.ModuleList((Branch(), Branch()))
        self.wide, self.head = nn.Conv2d(24, 64, 1), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.neck(self.body(x))
        x = self.branches[1](x.movedim(1, -1), scale=0.5).movedim(-1, 1)
        return self.head(nn.functional.pixel_shuffle(self.wide(x), 2))


SHUFFLE = Group(
    "wide", 16,
    (Member("wide", "out", tuple(range(64)), tuple(i // 4 for i in range(64))),
     Member("head", "in", tuple(range(16)), tuple(range(16)))),
    (tuple(range(16)),),
)  # fmt: skip
INPUT = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Kit(Toy):
    """The toy kit of the net above, which tells the group of the shuffle."""

    def __init__(self) -> None:
        super().__init__("residual")

    def model(self, weights: object = None) -> nn.Module:
        torch.manual_seed(0)
        return Net().eval()

    def exports(self) -> tuple[Graph, ...]:
        return (Graph("net", {"x": INPUT}, ("y",)),)

    def coupled(self, module: nn.Module) -> Sequence[Group]:
        return [SHUFFLE]


def test_parts_by_name_chain_and_pattern() -> None:
    net = Net()
    assert find_parts(net, ("body > neck",)) == [Part(("body", "neck"))]
    assert find_parts(net, ("branches*", "branches.1")) == [Part(("branches",)), Part(("branches.1",))]
    assert find_parts(net, ("branches.?",)) == [Part(("branches.0",)), Part(("branches.1",))]
    with pytest.raises(InputError, match=r"'body > tail': no submodule 'tail'"):
        find_parts(net, ("body > tail",))
    with pytest.raises(InputError, match=r"'tail.\*' matches no submodule"):
        find_parts(net, ("tail.*",))


def test_groups_carry_the_names_of_the_whole_and_what_a_part_gives_stays() -> None:
    net = Net().eval()
    groups, skipped = groups_in_parts(net, (INPUT,), find_parts(net, ("body > neck", "branches.?", "wide")), [SHUFFLE])
    assert [g.name for g in groups] == ["body.0.0", "body.1.0", "branches.1.up", "wide"]
    assert {m.layer for m in groups[1].members} == {"body.1.0", "body.1.1", "neck.0"}
    why = {s.layer: s.why for s in skipped}
    assert why["neck.0"].startswith("output layer") and why["branches.1.down"].startswith("output layer")
    assert why["branches.0"] == "not called as a module when the example inputs run"
    again, skipped = groups_in_parts(net, (INPUT,), find_parts(net, ("body", "body > neck")))
    assert [g.name for g in again] == ["body.0.0", "body.1.0"]
    assert any(s.why == "coupled with channels of body.0.0 that another group holds" for s in skipped)


def test_step_prunes_parts_and_told_groups_and_counts_outputs() -> None:
    kit = Kit()
    step = Prune(0.5, of="outputs", parts=("body > neck", "branches.1", "wide"), round_to=4)
    original = kit.model()
    small, (entry,) = compress(original, Recipe("r", (step,), "", ""), kit)
    before, after = entry.changed[0]["outputs"]
    assert before == 32 + 32 + 48 + 64
    shapes = [small.get_submodule(n).weight.shape[0] for n in ("body.0.0", "body.1.0", "branches.1.up", "wide")]
    assert after == sum(shapes) and abs(1 - after / before - 0.5) <= 0.03  # type: ignore[arg-type, operator]
    assert entry.changed[0]["reached"] == pytest.approx(1 - after / before, abs=1e-6)
    assert small.get_submodule("wide").weight.shape[0] == 4 * small.get_submodule("head").weight.shape[1]  # type: ignore[union-attr, index, operator]
    assert small(INPUT).shape == original(INPUT).shape
    assert small.get_submodule("branches.0.up").weight.shape == (48, 24)


def test_told_group_that_is_wrong_is_skipped() -> None:
    net = Net().eval()
    wrong = Group(
        "wide", 16, (Member("wide", "out", tuple(range(16)), tuple(range(16))), SHUFFLE.members[1]), SHUFFLE.blocks
    )
    groups, skipped = groups_in_parts(net, (INPUT,), find_parts(net, ("wide",)), [wrong])
    assert not groups and skipped[0].layer == "wide"
    assert "unsupported operation" in skipped[0].why
