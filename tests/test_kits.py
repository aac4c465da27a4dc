"""The contract of every kit: a folder in kits/ is found by itself, and is held to what `core` and the user expect."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.cli import main
from core.compress import compress
from core.export import Artifact, export_kit
from core.export.choices import Choosing
from core.figures import Gate
from core.hardware import estimate, target, targets
from core.kit import InputError, Kit, Recipe, Step, load
from core.report import Report

ROOT = Path(__file__).resolve().parent.parent
NAMES = sorted(path.parent.name for path in (ROOT / "kits").glob("*/__init__.py"))
# One of these as a file, or as a folder once it has outgrown one idea.
PARTS = ("data", "model", "acceptance", "recipes")
SAMPLES = 4


@dataclass(frozen=True)
class ContractUnknown(Step):
    """A step that nothing handles."""


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def kit(name: str) -> Kit:
    return load(name)


@pytest.fixture(scope="module")
def samples(kit: Kit) -> list[Any]:
    """A tiny split of the generated set."""
    split = kit.dataset(None, "train", "smoke")
    return [split[index] for index in range(min(SAMPLES, len(split)))]


@pytest.fixture(scope="module")
def reported(kit: Kit) -> list[Any]:
    """Two samples of those that are reported."""
    return list(islice(kit.dataset(None, kit.report_split(None), "smoke"), 2))


@pytest.fixture(scope="module")
def artifact(kit: Kit, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """What the kit ships, exported for every runtime."""
    models, meta = kit.shipped()
    out = tmp_path_factory.mktemp(kit.name) / "artifact"
    return export_kit(models, kit, kit.default_target, out, meta)


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in a batch or an output, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for key in sorted(value):
            yield from tensors(value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def test_there_are_kits() -> None:
    assert "pcb_inspection" in NAMES


def test_six_files_are_there(name: str) -> None:
    folder = ROOT / "kits" / name
    missing = [part for part in PARTS if not (folder / f"{part}.py").exists() and not (folder / part).is_dir()]
    assert not missing, f"kits/{name}: no {', '.join(missing)}"
    assert (folder / "README.md").exists(), f"kits/{name}: no README.md"


def test_weights_are_safetensors_with_a_card(name: str) -> None:
    folder = ROOT / "kits" / name / "weights"
    found = sorted(folder.rglob("*.safetensors"))
    assert found, f"kits/{name}/weights: no safetensors"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 25_000_000
    # a file by its name, a model that is a folder by that of the folder
    weights = sorted({path.relative_to(folder).parts[0] for path in found})
    files = [path for path in folder.rglob("*") if path.is_file()]
    strange = sorted(p.name for p in files if p.suffix not in (".safetensors", ".json", ".md", ".txt"))
    assert not strange, f"kits/{name}/weights: {strange[0]} is neither safetensors, JSON nor a card"
    cards = " ".join(path.read_text(encoding="utf-8") for path in folder.glob("*.md"))
    unnamed = [file for file in weights if file not in cards]
    assert not unnamed, f"kits/{name}/weights: no card names {unnamed[0]}"
    for word in ("licen", "seed", "data"):
        assert word in cards.lower(), f"kits/{name}/weights: the card does not speak of {word!r}"


def test_names_agree(name: str, kit: Kit) -> None:
    assert kit.name == name
    assert kit.title
    assert kit.default_recipe in kit.recipes
    assert kit.default_target in targets()
    for key, recipe in kit.recipes.items():
        assert recipe.name == key
        assert recipe.steps, f"{key}: no steps"
        assert recipe.cost and recipe.expects, f"{key}: says neither what it costs nor what it gives"


def test_steps_of_every_recipe_are_registered(kit: Kit) -> None:
    model = nn.Identity()
    for recipe in kit.recipes.values():
        stored = json.loads(json.dumps(recipe.to_json()))
        assert tuple(Step.from_json(step) for step in stored["steps"]) == recipe.steps
        # compress refuses the first step without a handler before it runs any: here none but the added one.
        with pytest.raises(InputError, match="no handler for step ContractUnknown"):
            compress(model, Recipe(recipe.name, (*recipe.steps, ContractUnknown()), "", ""), kit)


def test_model_is_whole_and_the_same_each_time(kit: Kit) -> None:
    one, two = kit.model(), kit.model()
    assert not any(module.training for module in one.modules())
    assert one is not two
    states = one.state_dict(), two.state_dict()
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), f"{key}: differs from call to call"
        assert torch.isfinite(value).all() if value.is_floating_point() else True, f"{key}: not finite"


def test_splits_are_disjoint_and_repeatable(kit: Kit) -> None:
    splits = {split: kit.dataset(None, split, "smoke") for split in ("train", "val", "test")}
    assert all(len(split) > 0 for split in splits.values())
    for split, samples in splits.items():
        again = kit.dataset(None, split, "smoke")
        assert len(again) == len(samples)
        if split == "test" and kit.name == "mobile_diffusion":  # prompts, of which no batch is made
            assert list(again) == list(samples)
            continue
        first, same = (next(iter(kit.batches([s[0]], 1, train=False))) for s in (samples, again))
        assert all(map(torch.equal, tensors(kit.inputs(first)), tensors(kit.inputs(same)))), split
    with pytest.raises(InputError, match="nowhere"):
        kit.dataset(None, "nowhere", "smoke")


def test_batches_are_the_same_for_the_same_seed(kit: Kit, samples: list[Any]) -> None:
    def drawn(seed: int) -> list[Tensor]:
        return [
            t for batch in islice(kit.batches(samples, 2, train=True, seed=seed), 2) for t in tensors(kit.inputs(batch))
        ]

    one, same, other = drawn(1), drawn(1), drawn(2)
    assert all(map(torch.equal, one, same))
    assert len(one) != len(other) or not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_loss_and_gradient_are_finite(kit: Kit, samples: list[Any]) -> None:
    model = kit.model().train()
    loss = kit.loss(model, next(iter(kit.batches(samples, 2, train=True, seed=0))))
    assert loss.shape == () and torch.isfinite(loss) and loss.requires_grad
    loss.backward()  # type: ignore[no-untyped-call]
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{key}: no gradient; a weight that the loss does not see"
            assert torch.isfinite(parameter.grad).all(), f"{key}: gradient not finite"
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_a_few_steps_lower_the_loss(kit: Kit, samples: list[Any]) -> None:
    """From random weights: a loss that does not fall on the batch it is trained on teaches nothing."""
    model = kit.model().train()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.reset_parameters()
    batch = next(iter(kit.batches(samples, 2, train=False)))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    values = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = kit.loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < values[0], values


def test_shipped_models_are_those_of_the_kit(kit: Kit) -> None:
    models, meta = kit.shipped()
    assert len(models) == 2 and set(models) <= {"fp32", "int8", "int4"} and "fp32" in models
    assert json.loads(json.dumps(meta)) == meta
    for key, value in kit.model().state_dict().items():
        assert torch.equal(value, models["fp32"].state_dict()[key]), key


def test_export_agrees_with_torch(kit: Kit, artifact: Artifact, samples: list[Any]) -> None:
    """On the graphs' own inputs by every runtime, or on a real sample where the network is one graph of its size."""
    models, _ = kit.shipped()
    cases = {graph.name: tuple(graph.inputs.values()) for graph in kit.exports()}
    real = kit.inputs(next(iter(kit.batches(samples[:1], 1, train=False))))
    if len(cases) == 1 and [t.shape for t in real] == [t.shape for t in next(iter(cases.values()))]:
        cases[next(iter(cases))] = real
    for graph in kit.exports():
        for variant in artifact.variants.values():
            with torch.no_grad(), Choosing() as chosen:
                expected = list(tensors(graph.module(models[variant.precision])(*cases[graph.name])))
            found = list(tensors(artifact.as_module(variant.name, 1, graph.name)(*cases[graph.name])))
            assert len(found) == len(expected)
            for output, want, got in zip(graph.outputs, expected, found, strict=True):
                assert got.shape == want.shape
                # rows in the order of scores, which rounding turns over; export gave torch the runtime's choice, here
                # they are sorted, and as the last of the ranking may be others, 5 dB less are asked of rounded numbers
                ranked = want.ndim == 3 and want.shape[1] in {places.shape[-1] for _, places in chosen.seen}
                if ranked:
                    want, got = want.sort(1).values, got.sort(1).values
                noise = (got - want).norm() / want.norm()
                limit = 1e-3 if variant.precision == "fp32" else 10 ** (-(20 if ranked else 25) / 20)
                assert noise < limit, f"{variant.name}, {output}: relative error {noise:.2g}"


def test_artifact_scores_like_torch(kit: Kit, artifact: Artifact, reported: list[Any]) -> None:
    precise = next(v.name for v in artifact.variants.values() if v.precision == "fp32")
    ours = kit.score(kit.model(), reported, artifact.meta)
    shipped = kit.score(artifact.as_module(precise, 1), reported, artifact.meta)
    assert kit.headline in ours and ours.keys() == shipped.keys()
    for metric, (value, unit) in ours.items():
        assert isinstance(unit, str)
        same = math.isnan(value) and math.isnan(shipped[metric][0])
        assert same or shipped[metric][0] == pytest.approx(value, rel=0.01, abs=0.01), metric


def test_estimates_are_given_for_the_target(kit: Kit) -> None:
    figures = estimate(kit.model(), kit.exports(), target(kit.default_target))
    for wanted in ("size", "macs", "latency_p50", "energy"):
        figure = figures.find(wanted)
        assert figure is not None and figure.value > 0, wanted


def test_gates_are_sound(kit: Kit) -> None:
    assert kit.gates
    assert len({gate.name for gate in kit.gates}) == len(kit.gates), "two gates of one name"
    for gate in kit.gates:
        assert isinstance(gate, Gate)
        assert not gate.device or gate.device in targets(), f"{gate.name}: no target {gate.device!r}"


@pytest.mark.slow
def test_every_recipe_runs(kit: Kit, tmp_path: Path) -> None:
    """Each recipe on the smoke preset: whole, traced step by step, and restored from checkpoints to the same bytes."""
    for recipe in kit.recipes.values():
        small, trace = compress(kit.model(), recipe, kit, preset="smoke", folder=tmp_path / recipe.name)
        assert [entry.step for entry in trace] == list(recipe.steps)
        assert any(entry.changed for entry in trace), f"{recipe.name}: no step changed anything"
        again, _ = compress(kit.model(), recipe, kit, preset="smoke", folder=tmp_path / recipe.name, resume=True)
        assert small.state_dict().keys() == again.state_dict().keys()
        for key, value in small.state_dict().items():
            assert torch.equal(value, again.state_dict()[key]), f"{recipe.name}: {key} is not restored"
            assert not value.is_floating_point() or torch.isfinite(value).all(), f"{recipe.name}: {key} is not finite"
        batch = next(iter(kit.batches([kit.dataset(None, "val", "smoke")[0]], 1, train=False)))
        assert torch.isfinite(kit.loss(small, batch)), recipe.name


@pytest.fixture(scope="module")
def finished(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `fitkit run` leaves with its defaults and the smoke preset, in a process of its own."""
    out = tmp_path_factory.mktemp(name) / "run"
    script = "import sys; from core.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", script, "run", name, "--preset", "smoke", "--out", str(out)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (out / "report.json").exists(), ran.stderr
    assert ran.returncode == int(Report.load(out).failed), f"exit status and gates disagree\n{ran.stderr}"
    return out


@pytest.mark.slow
def test_run_leaves_report_and_artifact(finished: Path, kit: Kit) -> None:
    data = json.loads((finished / "report.json").read_text())
    assert data["kit"] == kit.name
    assert data["recipe"]["name"] == kit.default_recipe
    assert data["target"] == kit.default_target
    done = [entry["step"] for entry in data["trace"]]
    count = len(data["recipe"]["steps"])
    assert done[:count] == data["recipe"]["steps"]
    # then what the audit of each exported variant found
    assert [step["step"] for step in done[count:]] == ["Export"] * len(done[count:])
    assert [step["variant"] for step in done[count:]] == list(Artifact.open(finished / "artifact").variants)
    assert "<html" in (finished / "report.html").read_text(encoding="utf-8")
    assert Artifact.open(finished / "artifact").variants


@pytest.mark.slow
def test_every_gate_names_a_figure_that_is_produced(finished: Path, kit: Kit) -> None:
    data = json.loads((finished / "report.json").read_text())
    produced = {(figure["name"], figure["stage"]) for figure in data["figures"]}
    missing = [gate.figure for gate in kit.gates if (gate.figure, gate.stage) not in produced]
    missing = [figure for figure in missing if not figure.startswith("sd15_")]  # of a full run alone
    assert not missing, f"no run produces {', '.join(missing)}; produced: {sorted(produced)}"
    assert [gate["name"] for gate in data["gates"]] == [gate.name for gate in kit.gates]


def inputs_of(sample: Any) -> list[str]:
    """The INPUTs of `fitkit predict` for a sample: its text, or the files that it names, in the order of its fields."""
    if isinstance(text := getattr(sample, "text", None), str):
        return [text]
    files = [str(value) for value in vars(sample).values() if isinstance(value, Path)]
    assert files, f"{type(sample).__name__} names no file that predict could be given"
    return files


def test_predict_writes_its_files(
    name: str, kit: Kit, artifact: Artifact, samples: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = ["predict", name, *inputs_of(samples[0]), "--artifact", str(artifact.folder), "--out", str(out)]
    assert main(given) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert str(out) in said, "the summary does not say where the results are"
    written = [path for path in out.rglob("*") if path.is_file()]
    assert {path.suffix for path in written} >= {".json", ".png"}, written
    for path in written:
        assert path.stat().st_size > 0, path
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))


def test_evaluate_writes_predictions_and_metrics(
    kit: Kit, artifact: Artifact, reported: list[Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    metrics = kit.evaluate(artifact.as_module(threads=1), reported, artifact.meta, out)
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    written = [p.name for p in (out / "predictions").iterdir() if p.name != "prompts.json"]
    # a file a sample, or the one that the devkit of the data wants
    assert len(written) == 2 or written == ["results_nusc.json"]


@pytest.mark.parametrize(
    "arguments",
    [
        "predict KIT no/such/input --artifact ARTIFACT",
        "predict KIT broken.png broken.png --artifact ARTIFACT",
        "predict KIT empty --artifact ARTIFACT",
        "predict KIT --artifact ARTIFACT",
        "evaluate KIT --data no/such/data --artifact ARTIFACT",
        "evaluate KIT --data empty --artifact ARTIFACT",
        "run KIT --data no/such/data",
        "run KIT --data empty --preset smoke --out out",
        "run KIT --recipe no_such_recipe",
        "run KIT --target no_such_target --out out",
        "run KIT --preset no_such_preset",
        "bench KIT --artifact no/such/artifact",
        "bench KIT --threads 0 --artifact ARTIFACT",
    ],
)
def test_bad_input_is_refused_in_one_line(
    name: str, artifact: Artifact, arguments: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nthen nothing")
    (tmp_path / "empty").mkdir()
    words = {"KIT": name, "ARTIFACT": str(artifact.folder)}
    given = [words.get(word, word) for word in arguments.split()]
    assert main(given) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("fitkit: ")]
    assert errors == lines[-1:], "\n".join(lines)
    for wrong in ("no/such", "broken.png", "empty", "no_such"):
        assert wrong not in arguments or wrong in errors[0], f"does not name {wrong}: {errors[0]}"
