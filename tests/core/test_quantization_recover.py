"""The step Recover: what training brings back beside packed layers, what it says, saves and restores."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from core.compress import Outcome, TraceEntry, compress, handles, history, replay
from core.kit import Context, InputError, Recipe, Step
from core.ledger import weight_bytes
from core.quantization import Pack, PackedLinear, Recover, expand, packed_layers
from core.quantization.recover import _adapted, recover
from core.weights import stored
from tests.core.toy import Sample, ToyKit

PACK = Pack(bits=2, group_size=8, rounding="nearest")
RECOVER = Recover(rank=2, epochs=6, lr=2e-2, batch_size=16)
LAYERS = ["encoder.0", "encoder.3", "head.1"]
KIT = ToyKit()


def run(*steps: Step, kit: Any = KIT, **options: Any) -> tuple[nn.Module, list[TraceEntry]]:
    return compress(kit.model(), Recipe("r", steps, "", ""), kit, **options)


@pytest.fixture(scope="module")
def packed() -> nn.Module:
    return run(PACK)[0]


@pytest.fixture(scope="module")
def recovered() -> tuple[nn.Module, TraceEntry]:
    model, trace = run(PACK, RECOVER)
    return model, trace[1]


def images(split: str = "val") -> Tensor:
    return torch.stack([s.image for s in KIT.dataset(None, split)])


@torch.no_grad()
def error(model: nn.Module, split: str = "val") -> float:
    x = images(split)
    y, right = model(x).double(), KIT.model()(x).double()
    return float((y - right).square().sum() / right.square().sum())


def alike(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[k].dtype == second[k].dtype and torch.equal(first[k], second[k]) for k in first
    )


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if "low_rank" not in name}


def test_training_brings_back_what_packing_lost(packed: nn.Module, recovered: tuple[nn.Module, TraceEntry]) -> None:
    model, entry = recovered
    first, *rows = entry.changed
    assert first["error_before"] == pytest.approx(error(packed), rel=1e-4)
    assert first["error_after"] == pytest.approx(error(model), rel=1e-4)
    assert error(model) < 0.3 * error(packed)
    assert error(model, "test") < 0.5 * error(packed, "test"), "on pictures that nothing was chosen by"
    assert f"{first['error_before']:.4g} before, {first['error_after']:.4g} after" in first["what"]
    assert [row["layer"] for row in rows] == LAYERS and entry.skipped == []
    assert {m.rank for m in packed_layers(model).values()} == {2}


def test_nothing_but_the_terms_is_new(packed: nn.Module, recovered: tuple[nn.Module, TraceEntry]) -> None:
    model, entry = recovered
    assert alike(plain_state(model), packed.state_dict())
    assert set(vars(model)) == set(vars(packed)) and [type(m) for m in model.modules()] == [
        type(m) for m in packed.modules()
    ]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in packed.parameters()]
    more = weight_bytes(model) - weight_bytes(packed)
    assert more == 2 * 2 * ((8 + 9) + (8 + 72) + (4 + 128)) == entry.changed[0]["bytes"]
    assert more == sum(row["bytes"] for row in entry.changed[1:])


def test_a_lora_begins_at_zero_and_leaves_no_trace(packed: nn.Module) -> None:
    model, x = copy.deepcopy(packed), images()
    flags = [p.requires_grad for p in model.parameters()]
    with _adapted(model, LAYERS, 3, 0) as terms:
        assert torch.equal(terms(x), packed(x))
        trained = dict(terms.named_parameters())
        assert {name for name, p in model.named_parameters() if p.requires_grad} == {
            f"{layer}.lora_{side}.recover.weight" for layer in LAYERS for side in "AB"
        }
        assert [tuple(p.shape) for p in trained.values()][:2] == [(3, 1, 3, 3), (8, 3, 1, 1)]
        assert all(p.requires_grad for p in trained.values())
    assert set(vars(model)) == set(vars(packed)) and alike(model.state_dict(), packed.state_dict())
    assert [p.requires_grad for p in model.parameters()] == flags
    with pytest.raises(ZeroDivisionError), _adapted(model, LAYERS, 3, 0):
        raise ZeroDivisionError
    assert alike(model.state_dict(), packed.state_dict())


def test_expanded_it_is_plain_and_computes_the_same(recovered: tuple[nn.Module, TraceEntry]) -> None:
    model, x = copy.deepcopy(recovered[0]), images()
    with torch.no_grad():
        expected = model(x)
        plain = expand(model)
        assert not packed_layers(plain) and type(plain.head[1]) is nn.Linear  # type: ignore[index, union-attr]
        torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-5)


def test_restored_models_are_the_same_to_the_byte(recovered: tuple[nn.Module, TraceEntry], tmp_path: Path) -> None:
    model, trace = run(PACK, RECOVER, folder=tmp_path)
    assert alike(model.state_dict(), recovered[0].state_dict()), "the same seed gives the same model"
    again, same = run(PACK, RECOVER, folder=tmp_path, resume=True)
    assert json.dumps([e.to_json() for e in trace]) == json.dumps([e.to_json() for e in same])
    replayed = replay(KIT.model(), history(tmp_path))
    replayed.load_state_dict(model.state_dict(), strict=True)
    assert alike(again.state_dict(), model.state_dict()) and alike(replayed.state_dict(), model.state_dict())


class KilledError(Exception):
    """Stands for a kill in the middle of an epoch."""


class Killed(ToyKit):
    def batches(self, samples: Sequence[Sample], batch_size: int, *, train: bool, seed: int = 0) -> Iterable[Any]:
        for batch in super().batches(samples, batch_size, train=train, seed=seed):
            yield batch
            if train and seed == 3:
                raise KilledError


def test_training_goes_on_after_a_kill(recovered: tuple[nn.Module, TraceEntry], tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        run(PACK, RECOVER, kit=Killed(), folder=tmp_path)
    last = tmp_path / "01-recover.partial" / "recover" / "last.safetensors"
    with safe_open(str(last), framework="pt") as file:
        held = {name.split("/", 1)[1] for name in file.keys() if name.startswith("model/")}  # noqa: SIM118
        assert json.loads(file.metadata()["fitkit"])["epoch"] == 2
    assert held == {f"matrices.{name.replace('.', '/')}/{side}" for name in LAYERS for side in "AB"}
    model, _ = run(PACK, RECOVER, folder=tmp_path, resume=True)
    assert alike(model.state_dict(), recovered[0].state_dict())


def test_training_in_vain_leaves_the_layers_as_they_were(packed: nn.Module, tmp_path: Path) -> None:
    model, trace = run(PACK, Recover(rank=2, epochs=1, lr=1e4, batch_size=64), folder=tmp_path)
    (line,) = trace[1].changed
    assert "in vain, so no low-rank term was kept" in line["what"] and line["error_after"] >= line["error_before"]
    assert alike(model.state_dict(), packed.state_dict())
    again, _ = run(PACK, Recover(rank=2, epochs=1, lr=1e4, batch_size=64), folder=tmp_path, resume=True)
    assert alike(again.state_dict(), packed.state_dict())


def test_a_second_recovery_keeps_the_first(recovered: tuple[nn.Module, TraceEntry], tmp_path: Path) -> None:
    second = Recover(rank=1, epochs=3, lr=1e-2, batch_size=16, layers=("head.*",))
    model, trace = run(PACK, RECOVER, second, folder=tmp_path)
    assert {n: m.rank for n, m in packed_layers(model).items()} == {"encoder.0": 2, "encoder.3": 2, "head.1": 3}
    assert trace[2].changed[0]["error_before"] == pytest.approx(trace[1].changed[0]["error_after"], rel=1e-6)
    assert trace[2].changed[0]["error_after"] < trace[2].changed[0]["error_before"]
    assert [s.why for s in trace[2].skipped] == ["no low-rank term: none of the patterns fits it"] * 2
    head, first = packed_layers(model)["head.1"], packed_layers(recovered[0])["head.1"]
    assert head.low_rank_a is not None and first.low_rank_a is not None
    assert torch.equal(head.low_rank_a[:2], first.low_rank_a)
    again, _ = run(PACK, RECOVER, second, folder=tmp_path, resume=True)
    assert alike(again.state_dict(), model.state_dict())


@dataclass(frozen=True)
class Doubled(Step):
    """Stands for steps that change what the outputs mean."""


@handles(Doubled)
def doubled(model: nn.Module, step: Doubled, context: Context) -> Outcome:
    for value in model.head[1].parameters():  # type: ignore[index, union-attr]
        value.data *= 2
    return Outcome(model)


def test_the_teacher_can_be_the_model_before_it_was_packed(tmp_path: Path) -> None:
    given = Recover(rank=2, epochs=1, lr=1e-3, batch_size=64, teacher="unpacked")
    _, trace = run(Doubled(), PACK, given, folder=tmp_path / "a")
    _, other = run(Doubled(), PACK, Recover(rank=2, epochs=1, lr=1e-3, batch_size=64))
    _, plain = run(PACK, given, folder=tmp_path / "b")
    # packing is the same for twice the weight, and so is its relative error
    assert trace[2].changed[0]["error_before"] == pytest.approx(plain[1].changed[0]["error_before"], rel=1e-3)
    assert other[2].changed[0]["error_before"] > 5 * trace[2].changed[0]["error_before"]
    with pytest.raises(InputError, match="give compress a folder"):
        run(PACK, given)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(32, 16)
        self.wide = nn.Conv1d(16, 16, 1)
        self.first, self.twice = nn.Linear(16, 32), nn.Linear(32, 32)
        self.again = self.twice
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=2)
        self.dilated = nn.Conv2d(32, 32, 3, padding=2, dilation=2)
        self.edges = nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect")
        self.unused = nn.Linear(32, 32)
        self.narrow = nn.Linear(32, 2)

    def forward(self, ids: Tensor) -> dict[str, Any]:
        x = self.again(self.twice(F.silu(self.first(self.words(ids)))))
        x = x.transpose(1, 2).unflatten(2, (4, 4))
        x = self.edges(self.dilated(self.grouped(x)))
        return {"sum": x.sum((2, 3)), "list": [self.narrow(x.mean((2, 3)))], "ids": ids}


class OddKit(ToyKit):
    def model(self, weights: Path | None = None) -> nn.Module:
        torch.manual_seed(2)
        return Odd().eval()

    def dataset(self, data: Path | None, split: str, preset: str = "full") -> Sequence[Any]:
        return torch.randint(0, 32, (24, 16), generator=torch.Generator().manual_seed(len(split))).unbind()

    def batches(self, samples: Sequence[Any], batch_size: int, *, train: bool, seed: int = 0) -> Iterable[Any]:
        for start in range(0, len(samples), batch_size):
            yield torch.stack(list(samples[start : start + batch_size]))

    def inputs(self, batch: Any) -> tuple[Tensor, ...]:
        return (batch,)


def test_every_packed_layer_without_a_term_is_told_with_the_reason() -> None:
    step = Recover(rank=2, epochs=2, lr=1e-2, batch_size=8, samples=16)
    model, trace = run(Pack(bits=3, group_size=16), step, kit=OddKit())
    why = {s.layer: s.why.removeprefix("no low-rank term: ") for s in trace[1].skipped}
    assert why == {
        "words": "it is an embedding",
        "twice": "it stands in several places, or is the model itself",
        "grouped": "it is a convolution in 2 groups",
        "dilated": "peft's convolutions have neither dilation nor a padding other than zeros",
        "edges": "peft's convolutions have neither dilation nor a padding other than zeros",
        "unused": "the kit's inputs do not reach it",
        "narrow": "a term of rank 2 would be no smaller than its weight in FP16",
    }
    line, *rows = trace[1].changed
    assert [row["layer"] for row in rows] == ["first"] and "on 16 samples; error" in line["what"]
    assert line["error_after"] < line["error_before"]
    assert isinstance(model.first, PackedLinear) and model.first.rank == 2


def test_a_model_with_other_outputs_than_its_teacher_is_refused() -> None:
    class Wider(ToyKit):
        def model(self, weights: Path | None = None) -> nn.Module:
            model = super().model(weights)
            model.forward = lambda x, old=model.forward: old(x)[:, :3]  # type: ignore[method-assign, misc]
            return model

    original = Wider().model()
    small, _ = run(PACK)
    with pytest.raises(InputError, match=r"have shapes \[\(16, 4\)\], its teacher's \[\(16, 3\)\]"):
        recover(copy.deepcopy(small), RECOVER, Context(KIT, original))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "Recover.rank is 0"),
        ({"epochs": 0}, "Recover.epochs is 0"),
        ({"batch_size": -1}, "Recover.batch_size is -1"),
        ({"lr": 0.0}, "Recover.lr is 0.0"),
        ({"lr": float("nan")}, "Recover.lr is nan"),
        ({"samples": -1}, "Recover.samples is -1"),
        ({"layers": ()}, "Recover.layers is empty"),
        ({"teacher": "other"}, "Recover.teacher is 'other'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_mistakes_in_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recover(**fields)


def test_mistakes_in_recipes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no layer of this model is packed; put Pack before it"):
        run(RECOVER)
    with pytest.raises(InputError, match=r"pattern 'encodr\.\*' fits no packed layer"):
        run(PACK, Recover(layers=("head.*", "encodr.*")))
    with pytest.raises(InputError, match="no packed layer can get a low-rank term; of 'encoder.0': .* rank 64 would"):
        run(PACK, Recover(rank=64))
    with pytest.raises(InputError, match="'unpacked': no step Pack before it"):
        run(Doubled(), Recover(teacher="unpacked"), folder=tmp_path)


def test_the_step_is_json() -> None:
    step = Recover(rank=4, layers=("a.*", "b"), teacher="unpacked")
    assert Step.from_json(json.loads(json.dumps(step.to_json()))) == step


def test_the_checkpoint_of_a_step_holds_the_terms(tmp_path: Path) -> None:
    model, _ = run(PACK, RECOVER, folder=tmp_path)
    with safe_open(str(tmp_path / "01-recover" / "model.safetensors"), framework="pt") as file:
        assert set(file.keys()) == set(stored(model))
        assert {f"{name}.low_rank_{side}" for name in LAYERS for side in "ab"} <= set(file.keys())
