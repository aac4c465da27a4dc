"""Structured pruning: closed forms of the importances, coupled channels on small nets, targets, restore."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from core.compress import compress
from core.kit import Graph, InputError, Recipe
from core.pruning import Prune, coupled_groups, restore, shrink
from core.pruning.cost import count_macs, mac_cost, parameter_cost
from core.pruning.importance import bn_gamma, magnitude, taylor
from core.pruning.sensitivity import Curve, allocate, sensitivity
from core.pruning.surgery import structure_of


def conv(i: int, o: int, k: int = 3, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, groups=groups, bias=False), nn.BatchNorm2d(o), nn.SiLU())


class Residual(nn.Module):
    """A stem, two residual blocks on it, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 32)
        self.inner1, self.outer1 = conv(32, 64), conv(64, 32)
        self.inner2, self.outer2 = conv(32, 48), conv(48, 32)
        self.head = nn.Conv2d(32, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.outer1(self.inner1(x))
        x = x + self.outer2(self.inner2(x))
        return self.head(x)


class Concat(nn.Module):
    """Two branches of unequal width, joined, with a depthwise convolution and a squeeze gate behind."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv(3, 32), conv(3, 48)
        self.depthwise, self.point = conv(80, 80, groups=80), conv(80, 64, 1)
        self.squeeze, self.excite = nn.Conv2d(64, 16, 1), nn.Conv2d(16, 64, 1)
        self.fc = nn.Linear(64 * 4, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(self.depthwise(torch.cat([self.left(x), self.right(x)], 1)))
        x = x * self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()
        return self.fc(F.adaptive_avg_pool2d(x, 2).flatten(1))


class Grouped(nn.Module):
    """A grouped convolution between dense ones, and a channel split into halves (CSP)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped, self.fuse = conv(3, 32), conv(32, 64, groups=4), conv(64, 64)
        self.branch, self.join = conv(32, 32), conv(96, 32)
        self.head = nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.fuse(self.grouped(self.stem(x))).chunk(2, 1)
        return self.head(self.join(torch.cat([a, b, b + self.branch(b)], 1)))


class Transformer(nn.Module):
    """One pre-norm block of self-attention and an MLP over tokens, with a learned position."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 64)
        self.position = nn.Parameter(torch.randn(1, 6, 64) * 0.1)
        self.norm1, self.norm2 = nn.LayerNorm(64), nn.LayerNorm(64)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head(x + self.down(F.gelu(self.up(self.norm2(x)))))


class Siamese(nn.Module):
    """One stem for two pictures, and their difference."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.join, self.head = conv(1, 16), conv(48, 32), nn.Conv2d(32, 4, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.stem(a), self.stem(b)
        return self.head(self.join(torch.cat([a, b, a - b], 1)))


IMAGE = (3, 12, 12)
NETS: dict[str, tuple[type[nn.Module], tuple[tuple[int, ...], ...]]] = {
    "residual": (Residual, (IMAGE,)),
    "concat": (Concat, (IMAGE,)),
    "grouped": (Grouped, (IMAGE,)),
    "transformer": (Transformer, ((6, 12),)),
    "siamese": (Siamese, ((1, 12, 12), (1, 12, 12))),
}


def build(name: str, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A net in eval mode whose batch norms have seen data, and inputs for it."""
    torch.manual_seed(seed)
    cls, shapes = NETS[name]
    model = cls()
    inputs = tuple(torch.randn(2, *shape) for shape in shapes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
            module.running_mean.normal_(std=0.2)  # type: ignore[union-attr]
    return model.eval(), inputs


class Toy:
    """A kit around one net: fits the outputs to those of a fixed random net of the same shape."""

    name, title = "toy", "Toy"
    default_recipe, default_target = "r", "this-host"
    gates = ()

    def __init__(self, net: str) -> None:
        self.net = net
        self.recipes: dict[str, Recipe] = {}

    def model(self, weights: Path | None = None) -> nn.Module:
        return build(self.net)[0]

    def dataset(self, data: Path | None, split: str, preset: str = "full") -> Sequence[Any]:
        teacher, _ = build(self.net, seed=7)
        generator = torch.Generator().manual_seed({"train": 1, "val": 2, "test": 3}[split])
        samples = []
        for _ in range(16):
            x = tuple(torch.randn(shape, generator=generator) for shape in NETS[self.net][1])
            with torch.no_grad():
                samples.append((x, teacher(*(t[None] for t in x))[0]))
        return samples

    def batches(self, samples: Sequence[Any], batch_size: int, *, train: bool, seed: int = 0) -> Iterable[Any]:
        order = list(range(len(samples)))
        if train:
            order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
        for start in range(0, len(samples), batch_size):
            chosen = [samples[i] for i in order[start : start + batch_size]]
            yield tuple(torch.stack(c) for c in zip(*(x for x, _ in chosen))), torch.stack([y for _, y in chosen])

    def inputs(self, batch: Any) -> tuple[Tensor, ...]:
        return batch[0]

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(model(*batch[0]), batch[1])

    def score(self, module: nn.Module, samples: Sequence[Any]) -> dict[str, tuple[float, str]]:
        return {}

    def exports(self) -> tuple[Graph, ...]:
        names = [f"x{i}" for i in range(len(NETS[self.net][1]))]
        return (Graph("net", dict(zip(names, build(self.net)[1])), ("y",)),)


def run(net: str, *steps: Prune, **options: Any) -> tuple[nn.Module, nn.Module, Any]:
    kit = Toy(net)
    original = kit.model()
    small, trace = compress(original, Recipe("r", steps, "", ""), kit, **options)
    return original, small, trace


def macs(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops() // 2


# importances against closed forms


def chain() -> tuple[nn.Module, Any]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    nn.init.uniform_(model[1].weight, -1, 1)
    groups, _ = coupled_groups(model, (torch.randn(1, 2, 8, 8),))
    assert [g.name for g in groups] == ["0"]
    return model, groups[0]


def test_magnitude_is_the_norm_of_all_weights_that_leave_with_a_channel() -> None:
    model, group = chain()
    weights = torch.cat([model[0].weight.flatten(1), model[3].weight.transpose(0, 1).flatten(1)], 1).double()
    torch.testing.assert_close(magnitude(model, group, 1), weights.abs().sum(1))
    torch.testing.assert_close(magnitude(model, group, 2), torch.linalg.vector_norm(weights, dim=1))


def test_bn_importance_is_the_size_of_gamma() -> None:
    model, group = chain()
    gamma = bn_gamma(model, group)
    assert gamma is not None
    torch.testing.assert_close(gamma, model[1].weight.detach().abs().double())


def test_taylor_of_a_loss_linear_in_the_channels_is_the_squared_change_by_removal() -> None:
    model, group = chain()
    batches = [torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        return net(x).mean()

    (scores,) = taylor(model, [group], loss, batches)
    expected = torch.zeros(8, dtype=torch.float64)
    with torch.no_grad():
        for channel in range(8):
            cut = copy.deepcopy(model)
            cut[3].weight[:, channel] = 0
            expected[channel] = sum((loss(cut, x) - loss(model, x)).double() ** 2 for x in batches) / 3
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-12)
    assert all(p.grad is None for p in model.parameters())


# coupled groups


def test_groups_follow_residuals_concats_and_gates() -> None:
    groups = {g.name: g for g in coupled_groups(*build("residual"))[0]}
    outs = sorted(m.layer for g in groups.values() for m in g.members if m.side == "out" and m.layer.endswith(".0"))
    assert outs == ["inner1.0", "inner2.0", "outer1.0", "outer2.0", "stem.0"]
    assert sorted(g.channels for g in groups.values()) == [32, 48, 64]
    concat = {g.name: g for g in coupled_groups(*build("concat"))[0]}
    assert sorted(g.channels for g in concat.values()) == [16, 32, 48, 64]
    right = next(g for g in concat.values() if g.name == "right.0")
    assert next(m.index for m in right.members if m.layer == "depthwise.0") == tuple(range(32, 80))


def test_attention_heads_and_conv_groups_are_blocks() -> None:
    groups, _ = coupled_groups(*build("transformer"))
    by_width = {g.channels: g for g in groups}
    assert len(by_width[64].blocks) == 4 and len(by_width[128].blocks) == 1
    assert by_width[64].blocks[1] == tuple(range(16, 32))
    grouped, skipped = coupled_groups(*build("grouped"))
    assert {len(g.blocks) for g in grouped if any(m.layer == "grouped.0" for m in g.members)} == {4}
    assert [(s.layer, s.why.split(":")[0]) for s in skipped] == [("head", "output layer")]


# the step


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


# keep patterns, reasons, errors


def test_every_layer_is_changed_or_skipped_with_a_reason() -> None:
    _, small, trace = run("residual", Prune(0.3, keep=("inner2*",)))
    assert small.inner2[0].out_channels == 48
    reasons = {s.layer: s.why for s in trace[0].skipped}
    assert reasons["head"].startswith("output layer") and "inner2*" in reasons["inner2.0"]
    what = {c["layer"]: c["what"] for c in trace[0].changed}
    widest = small.inner1[0].out_channels
    assert what["inner1.0"] == f"inner1.0 64->{widest} with outer1.0 inputs"


def test_what_cannot_be_removed_is_said() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow, self.mixed, self.wide = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 32, 1)
            self.head = nn.Conv2d(32, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.normalize(F.relu(self.narrow(x)), dim=2)
            x = self.mixed(x)
            x = x + x.mean(1, keepdim=True)  # the mean divides by the number of channels
            return self.head(F.relu(self.wide(x)))

    model, inputs = Odd().eval(), (torch.randn(1, 3, 6, 6),)
    groups, skipped = coupled_groups(model, inputs)
    assert sorted(g.name for g in groups) == ["narrow", "wide"]
    assert {s.layer: s.why for s in skipped}["mixed"].endswith("removing channels differs from zeroing them")
    assert [g.keepable(8) for g in groups if g.name == "narrow"] == [[]]


def test_bad_arguments_name_the_mend() -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        Prune(1.5)
    with pytest.raises(InputError, match="expected one of l1, l2, bn, taylor"):
        Prune(0.5, importance="l3")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="'haed' matches no layer"):
        run("residual", Prune(0.5, keep=("haed",)))
    with pytest.raises(InputError, match="cannot be removed, expected at most 0.[0-9]+; lower the ratio"):
        run("residual", Prune(0.99))
    with pytest.raises(InputError, match="has 32 out channels, expected 33"):
        restore(build("residual")[0], Prune(0.5), {"layers": {"stem.0": {"out": {"of": 33, "kept": [0]}}}})
    with pytest.raises(InputError, match="no layer 'trunk'"):
        restore(build("residual")[0], Prune(0.5), {"layers": {"trunk": {"out": {"of": 33, "kept": [0]}}}})


# sensitivity


def test_sensitivity_spares_the_group_the_loss_depends_on() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    with torch.no_grad():
        model[4].weight[:, 8:] = 0  # three quarters of the second hidden layer do nothing
        model[2].weight[8:] *= 20  # though they look large
    x = torch.randn(64, 8)
    target = model(x).detach()
    groups, _ = coupled_groups(model, (x,))
    batches = [(x, target)]

    def loss(net: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(net(batch[0]), batch[1])

    ranks = [magnitude(model, g, 1) for g in groups]
    for rank, group in zip(ranks, groups, strict=True):
        if group.name == "2":
            rank[8:] = 0
    curves = sensitivity(model, groups, ranks, 8, loss, batches)
    by_name = {g.name: c for g, c in zip(groups, curves, strict=True)}
    assert by_name["2"].at(8) == pytest.approx(0.0, abs=1e-8) and by_name["0"].at(8) > 1e-4
    keeps, _ = allocate(model, groups, parameter_cost(model), 0.6, 8, curves)
    chosen = {g.name: k for g, k in zip(groups, keeps, strict=True)}
    assert chosen == {"0": 32, "2": 8}


def test_curve_is_linear_between_its_points() -> None:
    curve = Curve((8, 16, 32), (4.0, 1.0, 0.0))
    assert [curve.at(k) for k in (8, 12, 16, 24, 32)] == [4.0, 2.5, 1.0, 0.5, 0.0]


# checkpoints


@pytest.mark.parametrize("net", NETS)
def test_checkpoint_restores_strictly_and_resumes_to_the_same_outputs(net: str, tmp_path: Path) -> None:
    step = Prune(0.4, round_to=4, batch_size=4)
    _, small, trace = run(net, step, folder=tmp_path / "run")
    _, again, trace2 = run(net, step, folder=tmp_path / "run", resume=True)
    inputs = build(net)[1]
    torch.testing.assert_close(again(*inputs), small(*inputs), rtol=0, atol=0)
    assert [t.to_json() for t in trace2] == [t.to_json() for t in trace]
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in small.state_dict().items()}


def test_finetuning_lowers_the_loss() -> None:
    kit = Toy("residual")
    batch = next(iter(kit.batches(kit.dataset(None, "train"), 16, train=False)))
    _, cut, _ = run("residual", Prune(0.5, batch_size=4))
    _, tuned, trace = run("residual", Prune(0.5, batch_size=4, finetune_epochs=4, finetune_lr=1e-2))
    assert kit.loss(tuned, batch) < 0.8 * kit.loss(cut, batch)
    assert trace[0].changed[-1]["what"] == "fine-tuned for 4 epochs"
    assert not tuned.training
