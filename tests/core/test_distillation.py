"""Distillation: closed forms of the losses, adapters, and the step on a toy task."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy
from torch import Tensor, nn
from torch.nn import functional as F

from core.compress import compress
from core.distillation import Distill, features_loss, response_loss, softened_binary_kl, softened_kl
from core.distillation.feature import adapter, captured, parse_pairs
from core.distillation.response import responses_loss
from core.kit import InputError, Recipe, Step
from core.weights import load_weights, save_weights
from tests.core.toy import ToyKit


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(shape, generator=generator) * 2, torch.randn(shape, generator=generator) * 2


# losses against references


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_softened_kl_agrees_with_scipy(temperature: float) -> None:
    student, teacher = pair(6, 5)
    p, q = (softmax(t.double().numpy() / temperature, axis=1) for t in (teacher, student))
    expected = temperature**2 * np.mean(entropy(p, q, axis=1))
    assert softened_kl(student.double(), teacher.double(), temperature).item() == pytest.approx(expected, rel=1e-9)


def test_softened_kl_agrees_with_torch_on_a_dense_map() -> None:
    student, teacher = pair(2, 5, 3, 4)
    logs = [F.log_softmax(t / 3, 1).permute(0, 2, 3, 1).reshape(-1, 5) for t in (student, teacher)]
    expected = 9 * F.kl_div(*logs, reduction="batchmean", log_target=True)
    torch.testing.assert_close(softened_kl(student, teacher, 3.0), expected)


def test_binary_kl_agrees_with_scipy() -> None:
    student, teacher = pair(3, 4)
    p, q = (torch.sigmoid(t.double() / 2).numpy() for t in (teacher, student))
    expected = 4 * np.mean(entropy(np.stack([p, 1 - p]), np.stack([q, 1 - q]), axis=0))
    assert softened_binary_kl(student.double(), teacher.double(), 2.0).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", ["logits", "logits-last", "sigmoid", "regression", "l1"])
def test_equal_outputs_cost_nothing_and_others_something(kind: str) -> None:
    student, teacher = pair(3, 5)
    assert response_loss(kind, teacher, teacher, 4.0).item() == pytest.approx(0.0, abs=1e-7)
    assert response_loss(kind, student, teacher, 4.0).item() > 0.05


@pytest.mark.parametrize("loss", [softened_kl, softened_binary_kl])
def test_temperature_keeps_the_gradient_magnitude(loss: Any) -> None:
    student, teacher = pair(8, 10)
    sizes = []
    for temperature in (50.0, 100.0):
        leaf = student.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(leaf, teacher, temperature), leaf)
        sizes.append(gradient.norm().item())
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)  # without T^2 it would be a quarter


def test_high_temperature_gradient_is_the_difference_of_centred_logits() -> None:
    student, teacher = (t - t.mean(1, keepdim=True) for t in pair(1, 6))
    leaf = student.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(softened_kl(leaf, teacher, 1000.0), leaf)
    torch.testing.assert_close(gradient, (student - teacher) / 6, rtol=0.01, atol=1e-3)  # Hinton 2015, equation 4


def test_regression_losses_are_the_squared_and_absolute_errors() -> None:
    student, teacher = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 5.0]])
    assert response_loss("regression", student, teacher, 4.0).item() == 5.0
    assert response_loss("l1", student, teacher, 4.0).item() == 2.0


def test_outputs_have_a_kind_each() -> None:
    student, teacher = pair(2, 3)
    nested = {"box": student, "ids": torch.ones(2, dtype=torch.long), "rest": [student, student]}
    target = {"box": teacher, "ids": torch.ones(2, dtype=torch.long), "rest": [teacher, teacher]}
    total = responses_loss(("l1", "none", "regression"), nested, target, 4.0)
    torch.testing.assert_close(total, F.l1_loss(student, teacher) + F.mse_loss(student, teacher))
    with pytest.raises(InputError, match="2 kinds for 3 outputs"):
        responses_loss(("l1", "l1"), nested, target, 4.0)
    with pytest.raises(InputError, match=r"student gives \(2, 3\) where the teacher gives \(2, 2\)"):
        responses_loss("l1", student, teacher[:, :2], 4.0)


# features


@pytest.mark.parametrize(
    ("ours", "theirs", "kind"),
    [((2, 3, 4, 4), (2, 5, 4, 4), nn.Conv2d), ((2, 7, 3), (2, 7, 5), nn.Linear), ((2, 3), (2, 5), nn.Linear),
     ((2, 3, 9), (2, 5, 9), nn.Conv1d), ((2, 3, 4, 4), (2, 3, 4, 4), nn.Identity)],
)  # fmt: skip
def test_adapter_takes_the_students_shape_to_the_teachers(ours: Any, theirs: Any, kind: type[nn.Module]) -> None:
    made = adapter(torch.zeros(ours), torch.zeros(theirs), "a=b")
    assert type(made) is kind and made(torch.zeros(ours)).shape == theirs
    if kind is nn.Conv2d:
        assert made.kernel_size == (1, 1)


def test_adapter_refuses_other_differences() -> None:
    with pytest.raises(InputError, match=r"neck=body has shapes \(2, 3, 4, 4\) and \(2, 3, 8, 8\)"):
        adapter(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 8, 8), "neck=body")


def test_feature_loss_is_half_the_squared_error() -> None:
    student, teacher = {"a": torch.tensor([[1.0, 2.0]])}, {"b": torch.tensor([[0.0, 5.0]])}
    assert features_loss([("a", "b")], [nn.Identity()], student, teacher).item() == pytest.approx(2.5)
    assert parse_pairs(("a=b", "c")) == [("a", "b"), ("c", "c")]


def test_hooks_go_with_the_block_even_after_an_error() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    with pytest.raises(RuntimeError), captured(net, ["0", "1"]) as seen:
        net(torch.zeros(1, 3))
        assert seen["0"].shape == (1, 4)
        net(torch.zeros(1, 9))
    assert not any(m._forward_hooks for m in net.modules())
    with pytest.raises(InputError, match="no layer 'body'; layers are 0, 1"), captured(net, ["0", "body"]):
        pass
    assert not any(m._forward_hooks for m in net.modules())


# the step on a toy task


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(6, width), nn.Tanh()), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Toy(ToyKit):
    """Points whose labels are noise: only the teacher knows anything."""

    def model(self, weights: Path | None = None) -> nn.Module:
        torch.manual_seed(1)
        net = Net(24)
        if weights is not None:
            load_weights(net, weights)
        return net.eval()

    def dataset(self, data: Path | None, split: str, preset: str = "full") -> Sequence[Any]:
        generator = torch.Generator().manual_seed(2)
        points, labels = torch.randn(64, 6, generator=generator), torch.randint(0, 4, (64,), generator=generator)
        return list(zip(points, labels))

    def batches(self, samples: Sequence[Any], batch_size: int, *, train: bool, seed: int = 0) -> Iterable[Any]:
        order = torch.arange(len(samples))
        if train:
            order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
        for start in range(0, len(samples), batch_size):
            chosen = [samples[i] for i in order[start : start + batch_size].tolist()]
            yield torch.stack([x for x, _ in chosen]), torch.stack([y for _, y in chosen])


class Narrow(Step):
    """Puts a smaller, untrained student in the model's place."""


def student_step() -> Step:
    from core.compress import Outcome, handles

    def put(model: nn.Module, step: Any, structure: dict[str, Any]) -> nn.Module:
        torch.manual_seed(3)
        return Net(10)

    @handles(Narrow, put)
    def narrow(model: nn.Module, step: Any, context: Any) -> Outcome:
        return Outcome(put(model, step, {}))

    return Narrow()


def distance(student: nn.Module, teacher: nn.Module) -> float:
    points = torch.randn(256, 6, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return softened_kl(student(points), teacher(points), 1.0).item()


def sharp(kit: Toy) -> nn.Module:
    teacher = kit.model()
    with torch.no_grad():
        teacher.head.weight *= 6
    return teacher


@pytest.mark.parametrize("step", [
    Distill(40, 0.02, 16, alpha=1.0, temperature=2.0),
    Distill(40, 0.02, 16, alpha=0.9, beta=1.0, temperature=2.0, features=("body",)),
])  # fmt: skip
def test_student_moves_towards_the_teacher(step: Distill) -> None:
    kit = Toy()
    teacher = sharp(kit)
    before_teacher = copy.deepcopy(teacher.state_dict())
    (start, _), (small, trace) = (
        compress(teacher, Recipe("r", steps, "", ""), kit) for steps in ((student_step(),), (student_step(), step))
    )
    assert distance(small, teacher) < 0.35 * distance(start, teacher)
    first, last = trace[1].changed[0]["response"]
    assert last < 0.5 * first and "response loss" in trace[1].changed[0]["what"]
    if step.beta:
        assert trace[1].changed[0]["feature"][1] < trace[1].changed[0]["feature"][0]
    assert set(small.state_dict()) == set(Net(10).state_dict())  # no adapter stays
    assert not any(m._forward_hooks for net in (small, teacher) for m in net.modules())
    assert all(torch.equal(v, before_teacher[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())


def test_weights_of_the_parts_decide_what_is_learnt() -> None:
    kit = Toy()
    teacher = sharp(kit)
    task, _ = compress(teacher, Recipe("r", (student_step(), Distill(20, 0.02, 16, alpha=0.0)), "", ""), kit)
    told, _ = compress(teacher, Recipe("r", (student_step(), Distill(20, 0.02, 16, alpha=1.0)), "", ""), kit)
    batch = next(iter(kit.batches(kit.dataset(None, "train"), 64, train=False)))
    assert kit.loss(task, batch) < kit.loss(told, batch) and distance(told, teacher) < distance(task, teacher)


def test_teacher_may_come_from_a_file_and_a_run_resumes(tmp_path: Path) -> None:
    kit = Toy()
    teacher = sharp(kit)
    file = str(tmp_path / "teacher.safetensors")
    save_weights(teacher, Path(file))
    step = Distill(3, 0.02, 16, alpha=1.0, beta=0.5, features=("body=body",), teacher=file)
    recipe = Recipe("r", (student_step(), step), "", "")
    small, trace = compress(kit.model(), recipe, kit, folder=tmp_path / "run")
    plain = Distill(3, 0.02, 16, alpha=1.0, beta=0.5, features=("body",))
    by_original, _ = compress(teacher, Recipe("r", (student_step(), plain), "", ""), kit)
    again, trace2 = compress(kit.model(), recipe, kit, folder=tmp_path / "run", resume=True)
    for key, value in small.state_dict().items():
        assert torch.equal(value, by_original.state_dict()[key]) and torch.equal(value, again.state_dict()[key])
    assert [t.to_json() for t in trace2] == [t.to_json() for t in trace]


def test_bad_arguments_name_the_mend(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Distill.alpha: 2, expected 0 to 1"):
        Distill(1, 0.1, alpha=2)
    with pytest.raises(InputError, match="'logit', expected one of logits"):
        Distill(1, 0.1, outputs="logit")
    with pytest.raises(InputError, match="name layers and give beta"):
        Distill(1, 0.1, features=("body",))
    with pytest.raises(InputError, match="is not a safetensors file"):
        compress(Toy().model(), Recipe("r", (Distill(1, 0.1, teacher=str(tmp_path / "none.pt")),), "", ""), Toy())
    step = Distill(2, 0.1, outputs=("l1", "none"), features=("a=b",), beta=1.0)
    assert Step.from_json(step.to_json()) == step
