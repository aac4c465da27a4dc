"""What a run calls the models it compares: by the bits that they really have."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import core
import core.run
from core.compress import Outcome, handles
from core.evaluation.measure import runtime_title
from core.export import Artifact
from core.figures import Measured
from core.kit import Context, Recipe, Step
from core.quantization import Half, Quantize
from core.run import Run, _names, _precision
from tests.core.test_run import MEMORY
from tests.core.toy import KIT, PTQ


def small(*steps: Step) -> nn.Module:
    return core.compress(KIT.model(), Recipe("r", steps, "", ""), KIT)[0]


class Halve(Step):
    """Zeroes half of every kernel: smaller, and still float."""


@handles(Halve)
def halve(model: nn.Module, step: Halve, context: Context) -> Outcome:
    with torch.no_grad():
        for p in model.parameters():
            p.view(-1)[::2] = 0
    return Outcome(model)


WEIGHTS_ONLY = Quantize(samples=4, weight_bits=4, activation_bits=0)


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ((PTQ,), "int8"),
        ((replace(PTQ, keep=("head.*",)),), "int8"),
        ((WEIGHTS_ONLY,), "int4"),
        ((replace(PTQ, weight_bits=4, reduce_range=False),), "w4a8"),
        ((replace(PTQ, weight_bits=4, activation_bits=4, reduce_range=False),), "int4"),
        ((replace(WEIGHTS_ONLY, keep=("head.*",)), replace(WEIGHTS_ONLY, weight_bits=8)), "mixed"),
        ((Halve(),), "fp32-pruned"),
        ((), "fp32-compressed"),
    ],
)
def test_the_compressed_model_is_named_by_its_bits(steps: tuple[Step, ...], name: str) -> None:
    assert _names(KIT.model(), small(*steps)) == {"original": "fp32", "compressed": name}


def test_half_floats_are_named() -> None:
    assert _names(KIT.model().half(), KIT.model().bfloat16()) == {"original": "fp16", "compressed": "bf16"}


def test_estimates_count_integers_where_inputs_are_integers() -> None:
    assert _precision(small(replace(PTQ, weight_bits=4, activation_bits=4, reduce_range=False)))[0]["head.1"] == "int4"
    assert _precision(small(replace(PTQ, weight_bits=4, reduce_range=False)))[0]["head.1"] == "int8"
    layers, bits = _precision(small(WEIGHTS_ONLY))
    assert layers["head.1"] == "fp32" and bits["head.1"] == 4


def test_layers_in_fp16_are_estimated_so() -> None:
    mixed = small(replace(PTQ, keep=("head.*",)), Half(layers=("head.*",)))
    layers, bits = _precision(mixed)
    assert layers["encoder.0"] == "int8" and layers["head.1"] == layers["*"] == "fp16"
    assert bits["head.1"] == 16 and bits["encoder.0"] == 8
    assert _names(KIT.model(), mixed)["compressed"] == "int8", "by the bits of what was quantized"
    assert _names(KIT.model(), small(Half()))["compressed"] == "fp16"
    assert _precision(small(PTQ))[0]["*"] == "int8"


def test_a_run_without_quantization_names_no_integers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = core.run.measure
    monkeypatch.setattr(core.run, "SECONDS", {"smoke": 0.2})
    monkeypatch.setattr(core.run, "measure", lambda artifact, **named: real(artifact, **{**named, "seconds": 0.05}))
    monkeypatch.setattr(sys.modules["core.evaluation.measure"], "_memory", lambda *given: MEMORY)
    report = Run(KIT, Recipe("half", (Halve(),), "", ""), KIT.default_target, None, "smoke", tmp_path)()
    artifact = Artifact.open(tmp_path / "artifact")
    assert list(artifact.variants) == [f"{p}-{r}" for p in ("fp32", "fp32-pruned") for r in ("onnxruntime", "openvino")]
    assert all(v.parity["criterion"].startswith("max |difference| <= 0.0001") for v in artifact.variants.values())
    assert "INT8" not in json.dumps([f.to_json() for f in report.figures])
    accuracy = report.figures.find("accuracy", "compressed", "measured")
    assert accuracy is not None and "FP32-PRUNED" in accuracy.basis.runtime  # type: ignore[union-attr]
    assert report.notes[0] == (
        "Scored on the split 'test': 40 samples, which the kit holds out of training and of every choice it makes."
    )


def test_a_score_of_an_artifact_says_what_ran(tmp_path: Path) -> None:
    art = core.export({"fp32": KIT.model(), "int8": small(PTQ)}, KIT.exports(), "this-host", tmp_path / "a", kit="toy")
    art.describe({"threshold": 7})

    def basis(module: Any, **named: Any) -> tuple[Measured, float]:
        figures = core.evaluate(KIT, module, **named)
        found, threshold = figures.find("accuracy"), figures.find("confident")
        assert found is not None and isinstance(found.basis, Measured) and threshold is not None
        return found.basis, threshold.value

    for variant in ("fp32-onnxruntime", "int8-openvino"):
        found, threshold = basis(art.as_module(variant, threads=1))
        assert found.runtime == runtime_title(art, variant, 1) and found.artifact == art.sha256
        assert threshold == 7, "that of the artifact"
    plain, threshold = basis(KIT.model())
    assert plain.runtime == f"torch {torch.__version__}, Toy" and plain.artifact == "" and threshold == 3
    assert basis(KIT.model(), meta={"threshold": 1})[1] == 1


def test_a_run_whose_kit_cannot_tell_a_score_still_ends_in_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = core.run.measure
    monkeypatch.setattr(core.run, "SECONDS", {"smoke": 0.2})
    monkeypatch.setattr(core.run, "measure", lambda artifact, **named: real(artifact, **{**named, "seconds": 0.05}))
    monkeypatch.setattr(sys.modules["core.evaluation.measure"], "_memory", lambda *given: MEMORY)
    monkeypatch.setattr(type(KIT), "score", lambda *given: {})
    report = Run(KIT, Recipe("ptq", (PTQ,), "", ""), KIT.default_target, None, "smoke", tmp_path)()
    assert report.figures.find("accuracy", "compressed", "measured") is None
    assert report.figures.find("accuracy_loss") is None and report.figures.find("speedup") is not None
    verdicts = {j.gate.name: j.verdict for j in report.judgements}
    assert verdicts["accuracy"] == "UNPROVEN"
    assert {row[4] for row in report.tables[0]["rows"]} == {""}
    again = Run(KIT, Recipe("ptq", (PTQ,), "", ""), KIT.default_target, None, "smoke", tmp_path, resume=True)()
    assert [f.to_json() for f in again.figures] == [f.to_json() for f in report.figures], "nothing is measured twice"
