"""The step Pack: what it packs, says, saves and restores, and how it keeps to a number of bytes."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.nn import functional as F

from core.compress import TraceEntry, compress, history, replay
from core.kit import InputError, Recipe, Step
from core.quantization import Pack, packed_layers
from core.quantization import pack as module


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 24)
        self.conv_in = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.deep = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 16, 1, bias=False))
        self.text = nn.Linear(24, 16)
        self.up = nn.ConvTranspose2d(16, 16, 2, 2)
        self.tied, self.again = nn.Linear(16, 16), nn.Linear(16, 16)
        self.again.weight = self.tied.weight
        self.unused = nn.Linear(16, 8)
        self.conv_out = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor, ids: Tensor) -> dict[str, Tensor]:
        x = F.silu(self.norm(self.conv_in(x)))
        x = self.deep(x) + self.again(self.tied(self.text(self.words(ids)).mean(1)))[..., None, None]
        return {"sample": self.conv_out(self.up(x))}


class Kit:
    """Smooth images and a few numbers of words; the network is random."""

    name = title = default_recipe = default_target = "toy"
    recipes: dict[str, Recipe] = {}
    gates = ()

    def model(self, weights: Path | None = None) -> nn.Module:
        torch.manual_seed(1)
        return Net().eval()

    def dataset(self, data: Path | None, split: str, preset: str = "full") -> Sequence[Any]:
        noise = torch.Generator().manual_seed(7)
        images = F.avg_pool2d(torch.randn(24, 3, 12, 12, generator=noise), 5, 1) + 0.3
        return list(zip(images, torch.randint(0, 10, (24, 4), generator=noise)))

    def batches(self, samples: Sequence[Any], batch_size: int, *, train: bool, seed: int = 0) -> Iterable[Any]:
        for i in range(0, len(samples), batch_size):
            xs, ids = zip(*samples[i : i + batch_size])
            yield torch.stack(xs), torch.stack(ids)

    def inputs(self, batch: Any) -> tuple[Tensor, ...]:
        return tuple(batch)


KIT = Kit()
LAYERS = ["words", "conv_in", "deep.0", "deep.2", "text", "unused", "conv_out"]


def run(step: Step, folder: Path | None = None, resume: bool = False) -> tuple[nn.Module, TraceEntry]:
    model, trace = compress(KIT.model(), Recipe("r", (step,), "", ""), KIT, folder=folder, resume=resume)  # type: ignore[arg-type]
    return model, trace[0]


def distance(model: nn.Module, *, mean: bool = False) -> float:
    """The relative squared error of the output, or the size of its mean over images and pixels, by channel."""
    x, ids = next(iter(KIT.batches(KIT.dataset(None, "train"), 24, train=False)))
    with torch.no_grad():
        y, expected = model(x, ids)["sample"], KIT.model()(x, ids)["sample"]
    off = y - expected
    return float(off.mean((0, 2, 3)).abs().sum()) if mean else float(off.square().sum() / expected.square().sum())


def lines(entry: TraceEntry) -> dict[str, dict[str, Any]]:
    return {line["layer"]: line for line in entry.changed}


def test_everything_with_a_kernel_is_packed_or_told() -> None:
    model, entry = run(Pack(overrides=("conv_in=16", "conv_*=8")))
    assert {name: m.bits for name, m in packed_layers(model).items()} == {
        "words": 4, "deep.0": 4, "deep.2": 4, "text": 4, "unused": 4, "conv_out": 8,
    }  # fmt: skip
    why = {s.layer: s.why for s in entry.skipped}
    assert why == {
        "up": "stays as it is: ConvTranspose2d is none of nn.Linear, nn.Conv2d, nn.Embedding",
        "tied": "stays as it is: it shares its weight with 'again'",
        "again": "stays as it is: it shares its weight with 'tied'",
        "conv_in": "stays in FP16: by an override",
    }
    deep = lines(entry)["deep.0"]
    assert deep["what"] == "weight 4 bit in groups of 64, the last of 16, FP16 scales; least squared error"
    assert (deep["bits"], deep["group_size"]) == (4, 64)
    assert (deep["bytes_before"], deep["bytes_after"]) == (4 * 16 * 144, 16 * (72 + 2 * 3))
    assert "one group of 24" in lines(entry)["text"]["what"]
    assert 19 < deep["weight_sqnr"] < 26 and lines(entry)["conv_out"]["weight_sqnr"] > 44
    assert distance(model) < 0.02


def test_weights_lose_6_db_a_bit() -> None:
    ratios = [lines(run(Pack(bits=b))[1])["deep.0"]["weight_sqnr"] for b in (8, 6, 4)]
    assert 10 < ratios[0] - ratios[1] < 14 and 10 < ratios[1] - ratios[2] < 14


def test_compensation_and_bias_correction_bring_the_output_nearer() -> None:
    plain, _ = run(Pack(bits=3, rounding="nearest"))
    compensated, entry = run(Pack(bits=3, rounding="compensated"))
    assert distance(compensated) < 0.7 * distance(plain)
    what = {name: line["what"].split("; ", 1)[1] for name, line in lines(entry).items()}
    assert what["deep.0"] == "compensated"
    assert what["words"] == "not compensated, since it is an embedding: least squared error"
    assert what["unused"] == "not compensated, since no calibration input reached it: least squared error"
    corrected, entry = run(Pack(bits=3, rounding="nearest", bias_correction=True))
    assert distance(corrected, mean=True) < 0.5 * distance(plain, mean=True)
    what = {name: line["what"] for name, line in lines(entry).items()}
    assert what["deep.0"].endswith("nearest; bias corrected") and what["deep.2"].endswith("no bias to correct")


def test_moments_are_gathered_in_rounds_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = run(Pack(bits=3, rounding="compensated"))
    gathered: list[list[str]] = []
    plain = module._gather

    def watched(model: nn.Module, step: Pack, names: list[str], batches: Any) -> Any:
        gathered.append(list(names))
        return plain(model, step, names, batches)

    monkeypatch.setattr(module, "_gather", watched)
    monkeypatch.setattr(module, "MOMENTS_AT_ONCE", 4 * (27**2 + 144**2))
    parts, _ = run(Pack(bits=3, rounding="compensated"))
    assert gathered == [["conv_in", "deep.0"], ["deep.2", "words", "text"], ["conv_out", "unused"]]
    assert distance(parts) < 1.3 * distance(whole)


def test_a_budget_is_kept_and_spent_where_it_matters() -> None:
    sizes = {bits: float16_file(run(Pack(bits=bits))[0]) for bits in (4, 8)}
    budget = (sizes[4] + sizes[8]) / 2e6
    model, entry = run(Pack(budget_mb=budget, overrides=("words=8",)))
    first = entry.changed[0]
    assert first["layer"] == "" and f"under {budget:g} MB" in first["what"]
    assert first["bytes"] <= budget * 1e6 and 0.9 * budget * 1e6 < first["bytes"]
    assert float16_file(model) == first["bytes"], "FP16 for all that is not packed"
    bits = {name: m.bits for name, m in packed_layers(model).items()}
    assert bits["words"] == 8 and bits["unused"] == 4 and set(bits.values()) == {4, 8}
    told = lines(entry)["deep.0"]
    assert told["error_16"] == 0 < told["error_8"] < told["error_4"]
    # Errors of single layers add up to about what the whole loses.
    without_words, _ = run(Pack(overrides=(*(f"{n}={bits.get(n, 16)}" for n in LAYERS[1:]), "words=16")))
    assert 0.3 < distance(without_words) / first["predicted_error"] < 3
    assert distance(model) < distance(run(Pack())[0])


def test_a_share_of_the_bytes_is_a_budget() -> None:
    whole = float16_file(KIT.model())
    _, by_share = run(Pack(budget_share=0.6, overrides=("words=8",)))
    _, by_bytes = run(Pack(budget_mb=0.6 * whole / 1e6, overrides=("words=8",)))
    assert by_share.changed == by_bytes.changed and by_share.changed[0]["bytes"] <= 0.6 * whole
    with pytest.raises(InputError, match=f"budget_share is 0.01 of {whole / 1e6:.3f} MB in FP16, but the least size"):
        run(Pack(budget_share=0.01))


class Reaching(Kit):
    """A kit whose calibration runs a layer that its loss does not see."""

    def model(self, weights: Path | None = None) -> nn.Module:
        torch.manual_seed(1)
        return WithUnused().eval()

    def calibration(self, batch: Any) -> tuple[Tensor, ...]:
        return *self.inputs(batch), torch.ones(2, 16)


class WithUnused(Net):
    def forward(self, x: Tensor, ids: Tensor, more: Tensor | None = None) -> dict[str, Tensor]:
        found = super().forward(x, ids)
        return found if more is None else {**found, "more": self.unused(more)}


def test_layers_that_only_calibration_reaches_are_measured() -> None:
    step, kit = Pack(budget_mb=0.012, rounding="compensated", candidates=(4, 8)), Reaching()
    _, trace = compress(kit.model(), Recipe("r", (step,), "", ""), kit)  # type: ignore[arg-type]
    told = lines(trace[0])["unused"]
    assert told["error_4"] > told["error_8"] > 0 and told["what"].endswith("compensated")
    assert lines(run(step)[1])["unused"]["error_4"] == 0


def float16_file(model: nn.Module) -> int:
    """Bytes of the tensors in a safetensors file of the model in FP16."""
    model = copy.deepcopy(model).half()
    held = {value.data_ptr(): value.nbytes for value in model.state_dict().values()}
    return sum(held.values())


def test_a_budget_out_of_reach_states_the_least_size() -> None:
    least = float16_file(run(Pack())[0]) / 1e6
    with pytest.raises(InputError, match=f"Pack.budget_mb is 0.001, but the least size within reach is {least:.3f} MB"):
        run(Pack(budget_mb=0.001))


@pytest.mark.parametrize(
    "step",
    [
        Pack(overrides=("conv_in=16", "text=5")),
        Pack(rounding="compensated", bias_correction=True),
        Pack(budget_mb=0.012),
    ],
    ids=["plain", "compensated", "budget"],
)
def test_restored_models_are_the_same_to_the_byte(step: Pack, tmp_path: Path) -> None:
    first, entry = run(step, tmp_path)
    again, same = run(step, tmp_path, resume=True)
    assert json.dumps(entry.to_json()) == json.dumps(same.to_json())
    replayed = replay(KIT.model(), history(tmp_path))
    replayed.load_state_dict(first.state_dict(), strict=True)
    for other in (again, replayed):
        a, b = first.state_dict(), other.state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    for name, model in (("a", first), ("b", again)):
        save_model(model, str(tmp_path / f"{name}.safetensors"))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_sensitivity_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Pack(budget_mb=0.012)
    monkeypatch.setattr(module, "choose_bits", stop)
    with pytest.raises(KeyboardInterrupt):
        run(step, tmp_path)
    monkeypatch.undo()
    measured: list[str] = []
    monkeypatch.setattr(module, "write_errors", lambda path, key, errors: measured.append(list(errors)[-1]))
    _, entry = run(step, tmp_path, resume=True)
    assert measured == [], "every sensitivity was there already"
    assert all(line["error_4"] > 0 for line in entry.changed[1:] if line["layer"] != "unused")


def stop(*args: Any) -> None:
    raise KeyboardInterrupt


def test_packing_twice_takes_only_what_is_left() -> None:
    recipe = Recipe("r", (Pack(overrides=("conv_in=16",)), Pack(bits=8)), "", "")
    model, trace = compress(KIT.model(), recipe, KIT)  # type: ignore[arg-type]
    assert packed_layers(model)["conv_in"].bits == 8 and packed_layers(model)["text"].bits == 4
    assert "it is packed already" in {s.layer: s.why for s in trace[1].skipped}["text"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 9}, "bits is 9"),
        ({"group_size": 0}, "group_size is 0"),
        ({"overrides": ("conv",)}, "'conv' is not 'pattern=bits'"),
        ({"overrides": ("conv=1",)}, "bits is 1"),
        ({"candidates": ()}, "candidates is empty"),
        ({"rounding": "up"}, "rounding is 'up'"),
        ({"samples": 0}, "samples is 0"),
        ({"budget_mb": -1.0}, "budget_mb is -1.0"),
        ({"budget_share": 1.5}, "budget_share is 1.5"),
        ({"budget_share": 0.5, "budget_mb": 1.0}, "without budget_mb"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_mistakes_in_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Pack(**fields)


def test_an_override_that_matches_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="pattern 'convin' matches no layer"):
        run(Pack(overrides=("convin=16",)))


def test_the_step_is_json() -> None:
    step = Pack(overrides=("a.*=8",), budget_mb=1.5, candidates=(3, 4))
    assert Step.from_json(json.loads(json.dumps(step.to_json()))) == step
