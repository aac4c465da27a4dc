"""Structured pruning: closed forms of the importances, coupled channels, reasons, sensitivity, restore."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.kit import InputError
from core.pruning import Prune, coupled_groups, restore
from core.pruning.cost import channel_cost, parameter_cost
from core.pruning.importance import bn_gamma, magnitude, taylor
from core.pruning.sensitivity import Curve, allocate, sensitivity, summed
from tests.core.prunable import (
    NETS,
    Toy,
    build,
    run,
)

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


def test_a_global_ranking_takes_the_channels_that_matter_least_wherever_they_are() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    groups, _ = coupled_groups(model, (torch.randn(2, 8),))
    first, second = (next(g for g in groups if g.name == name) for name in "02")
    # 24 of the first layer's channels matter less than any of the second's, of which 8 matter less than the rest
    ranks = [torch.tensor([1.0] * 24 + [9.0] * 8), torch.tensor([3.0] * 8 + [5.0] * 24)]
    curves = summed([first, second], ranks, 8)
    assert curves[0].keeps == (8, 16, 24, 32) and curves[0].rises == (24.0, 16.0, 8.0, 0.0)
    assert curves[1].at(24) == 24.0 and curves[1].at(8) == 24.0 + 16 * 5.0
    for ratio, kept in ((0.25, [16, 32]), (0.5, [8, 24])):
        assert allocate(model, [first, second], channel_cost([first, second]), ratio, 8, curves) == (kept, ratio)


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
