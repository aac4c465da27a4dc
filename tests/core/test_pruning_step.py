"""The step Prune: its targets, what it removes, and that the output stays where dead channels leave."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.compress import compress
from core.kit import Graph, InputError, Recipe
from core.pruning import Prune, coupled_groups, shrink
from core.pruning.cost import count_macs, mac_cost, parameter_cost
from core.pruning.importance import magnitude
from core.pruning.sensitivity import allocate
from core.pruning.surgery import structure_of
from tests.core.prunable import (
    IMAGE,
    NETS,
    Toy,
    build,
    conv,
    macs,
    run,
)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("allocation", ["uniform", "sensitivity"])
def test_mac_target_is_reached_and_channels_are_rounded(net: str, allocation: str) -> None:
    original, small, trace = run(net, Prune(0.5, allocation=allocation, round_to=8 if net != "siamese" else 4))  # type: ignore[arg-type]
    inputs = build(net)[1]
    left = macs(small, inputs) / macs(original, inputs)
    assert abs(left - 0.5) <= 0.03
    assert small(*inputs).shape == original(*inputs).shape
    assert trace[0].changed[0]["macs"] == [count_macs(original, inputs), count_macs(small, inputs)]
    for name, layer in small.named_modules():
        if isinstance(layer, nn.Conv2d) and name not in ("head", "squeeze") or name in ("embed", "up", "down"):
            assert layer.weight.shape[0] % (8 if net != "siamese" else 4) == 0, name
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.shape[:2] == (layer.out_channels, layer.in_channels // layer.groups)
    small.train()(*inputs).sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("of", ["parameters", "channels"])
def test_other_targets(of: str) -> None:
    original, small, trace = run("residual", Prune(0.4, of=of, round_to=4))  # type: ignore[arg-type]
    reached = trace[0].changed[0]["reached"]
    assert abs(reached - 0.4) < 0.03
    if of == "parameters":
        counted = [sum(p.numel() for p in m.parameters()) for m in (original, small)]
        assert reached == pytest.approx(1 - counted[1] / counted[0], abs=1e-5)
    else:
        widths = [
            sum(m.stem[0].out_channels + m.inner1[0].out_channels + m.inner2[0].out_channels for m in [n])
            for n in (original, small)
        ]
        assert reached == pytest.approx(1 - widths[1] / widths[0], abs=1e-5)


@pytest.mark.parametrize("net", NETS)
def test_costs_predict_exactly_what_is_counted(net: str) -> None:
    model, inputs = build(net)
    groups, _ = coupled_groups(model, inputs)
    for cost, counter in ((mac_cost(model, inputs), lambda m: count_macs(m, inputs)),
                          (parameter_cost(model), lambda m: sum(p.numel() for p in m.parameters()))):  # fmt: skip
        keeps, reached = allocate(model, groups, cost, 0.4, 4)
        removed: dict[Any, list[int]] = {}
        for group, keep in zip(groups, keeps, strict=True):
            for key, gone in group.removed(group.lowest(torch.rand(group.channels), keep)).items():
                removed.setdefault(key, []).extend(gone)
        axes = {k: v for g in groups for k, v in g.axes.items()}
        small = shrink(copy.deepcopy(model), structure_of(model, removed, axes))
        assert 1 - counter(small) / counter(model) == pytest.approx(reached, abs=1e-9)


@pytest.mark.parametrize("net", ["residual", "concat", "grouped", "siamese"])
@pytest.mark.parametrize("importance", ["l1", "l2", "taylor"])
def test_dead_channels_are_the_ones_removed_and_the_output_stays(net: str, importance: str) -> None:
    kit = Toy(net)
    model, inputs = build(net)
    torch.manual_seed(11)
    dead: dict[str, list[int]] = {}
    groups, _ = coupled_groups(model, inputs)
    with torch.no_grad():
        for group in groups:
            per_block = max(group.channels // len(group.blocks) // 2, 1)
            gone = [b[i] for b in group.blocks for i in torch.randperm(len(b))[:per_block].tolist()]
            dead[group.name] = sorted(gone)
            for (name, side), channels in group.removed(gone).items():
                layer = model.get_submodule(name)
                if isinstance(layer, nn.Conv2d) and layer.groups > 1 and side == "in":
                    blocks = layer.in_channels // layer.groups
                    rows = layer.out_channels // layer.groups
                    for c in channels:
                        layer.weight[c // blocks * rows : (c // blocks + 1) * rows, c % blocks] = 0
                elif isinstance(layer, (nn.Conv2d, nn.Linear)):
                    (layer.weight if side == "out" else layer.weight.transpose(0, 1))[channels] = 0
                    if side == "out" and layer.bias is not None:
                        layer.bias[channels] = 0
    recipe = Recipe("r", (Prune(0.5, of="channels", importance=importance, round_to=1),), "", "")  # type: ignore[arg-type]
    small, trace = compress(model, recipe, kit)
    assert trace[0].changed[0]["reached"] == pytest.approx(0.5)
    torch.testing.assert_close(small(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)
    for name, gone in dead.items():
        layer, before = small.get_submodule(name), model.get_submodule(name)
        alive = [c for c in range(before.weight.shape[0]) if c not in gone]  # type: ignore[union-attr]
        torch.testing.assert_close(layer.weight.shape[0], len(alive))  # type: ignore[union-attr]


def test_dead_head_dimensions_of_attention_leave_the_output_unchanged() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(5, 32), nn.Linear(32, 3)
            self.attention = nn.MultiheadAttention(32, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            return self.head(x + self.attention(x, x, x, need_weights=False)[0])

    torch.manual_seed(5)
    model, inputs = Bare().eval(), (torch.randn(2, 7, 5),)
    (group,) = coupled_groups(model, inputs)[0]
    gone = [1, 3, 6, 7, 17, 20, 21, 30]
    a = model.attention
    with torch.no_grad():
        for tensor in (model.embed.weight, model.embed.bias, a.out_proj.weight, a.out_proj.bias, a.out_proj.weight.T):
            tensor[gone] = 0
        for part in range(3):
            a.in_proj_weight[[part * 32 + g for g in gone]] = 0
            a.in_proj_bias[[part * 32 + g for g in gone]] = 0
        a.in_proj_weight[:, gone] = 0
        model.head.weight[:, gone] = 0
    assert group.lowest(magnitude(model, group, 2), 24) == gone
    small = shrink(copy.deepcopy(model), structure_of(model, group.removed(gone), {}))
    assert (small.attention.embed_dim, small.attention.head_dim, small.attention.num_heads) == (24, 12, 2)
    torch.testing.assert_close(small(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)


def test_a_picture_joined_with_features_keeps_its_place() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = conv(3, 16), nn.Conv2d(19, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([x, self.stem(x)], 1))

    (group,), _ = coupled_groups(Skip().eval(), (torch.randn(1, *IMAGE),))
    assert group.removed([0, 5])["head", "in"] == [3, 8]


def test_a_part_of_a_model_is_pruned_where_it_stands(tmp_path: Path) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build("residual")[0]
            self.scale = nn.Conv2d(5, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.scale(self.inner(x))

    class PartKit(Toy):
        def exports(self) -> tuple[Graph, ...]:
            (graph,) = super().exports()
            return (Graph("inner", graph.inputs, graph.outputs, part="inner"),)

    torch.manual_seed(2)
    model, inputs = Whole().eval(), build("residual")[1]
    step = Prune(0.4, importance="taylor", allocation="sensitivity", keep=("inner.inner2*",))
    recipe, kit = Recipe("r", (step,), "", ""), PartKit("residual")
    small, trace = compress(model, recipe, kit, folder=tmp_path / "run")
    again, _ = compress(model, recipe, kit, folder=tmp_path / "run", resume=True)
    assert macs(small.inner, inputs) / macs(model.inner, inputs) == pytest.approx(0.6, abs=0.03)  # type: ignore[arg-type]
    assert all(c["layer"].startswith("inner") for c in trace[0].changed)
    assert torch.equal(again(*inputs), small(*inputs)) and small(*inputs).shape == model(*inputs).shape


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"ratio": 1.0}, "Prune.ratio: 1.0, expected a number between 0 and 1"),
        ({"of": "flops"}, "Prune.of: 'flops', expected one of macs"),
        ({"allocation": "global"}, "Prune.allocation: 'global' compares layers, 'l1' cannot; use 'taylor'"),
    ],
)
def test_a_step_that_cannot_be_is_refused_with_the_mend(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=re.escape(told)):
        Prune(**({"ratio": 0.5} | fields))


def test_what_ranks_channels_comes_from_all_over_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    kit = Toy("residual")
    seen: list[Any] = []
    count = len(kit.dataset(None, "train"))
    batches = kit.batches

    def noted(samples: Any, *args: Any, **kwargs: Any) -> Any:
        seen.extend(samples)
        return batches(samples, *args, **kwargs)

    monkeypatch.setattr(kit, "batches", noted)
    compress(
        build("residual")[0], Recipe("r", (Prune(0.3, importance="taylor", batches=1, batch_size=2),), "", ""), kit
    )
    inputs = [sample[0][0] for sample in kit.dataset(None, "train")]
    assert [next(i for i, x in enumerate(inputs) if torch.equal(x, mine[0][0])) for mine in seen] == [0, count // 2]
