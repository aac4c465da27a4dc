"""Kits whose models run in torch: folders in the artifact, read back and compared, and run through `fitkit run`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import core.run
from core.compress import compress
from core.evaluation.measure import peak_memory, runtime_title
from core.export import Artifact, ParityError, export_kit
from core.kit import InputError
from core.quantization import packed_layers
from core.report import Report
from core.run import Run
from tests.core import torch_kit
from tests.core.torch_kit import KIT
from tests.core.toy import KIT as TOY
from tests.core.toy import Toy


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    small, _ = compress(KIT.model(), KIT.recipes["int4"], KIT)
    models = {"fp32": KIT.model(), "int4": small}
    return export_kit(models, KIT, "this-host", tmp_path_factory.mktemp("folder") / "artifact", {"threshold": 3})


def test_every_variant_is_a_folder_that_gives_the_same_model(artifact: Artifact) -> None:
    assert set(artifact.variants) == {"fp32-torch", "int4-torch"} and artifact.chosen == "int4-torch"
    small, _ = compress(KIT.model(), KIT.recipes["int4"], KIT)
    image = TOY.dataset(None, "test")[0].image[None]
    with torch.no_grad():
        assert torch.equal(artifact.as_module()(image), small(image))
        assert torch.equal(artifact.as_module("fp32-torch")(image), KIT.model()(image))
    assert sorted(packed_layers(artifact.as_module())) == ["encoder.0", "encoder.3", "head.1"]
    assert artifact.folder_of() == artifact.folder / "int4"
    assert runtime_title(artifact, None, 2) == f"PyTorch {torch.__version__.split('+')[0]} INT4, 2 threads"


def test_the_size_is_that_of_all_files_of_the_folder(artifact: Artifact) -> None:
    for precision in ("fp32", "int4"):
        files = [p for p in (artifact.folder / precision).rglob("*") if p.is_file()]
        assert len(files) == 2
        assert artifact.size_bytes(f"{precision}-torch") == sum(p.stat().st_size for p in files)


def test_the_audit_tells_what_the_weights_are(artifact: Artifact) -> None:
    assert artifact.variant("int4-torch").audit["weighted"] == {"INT4 weights": 2, "INT8 weights": 1}
    assert artifact.variant("fp32-torch").audit["weighted"] == {"FP32": 3}


def test_a_model_that_comes_back_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch_kit.TorchKit.model

    def lossy(kit: torch_kit.TorchKit, weights: Path | None = None) -> torch.nn.Module:
        net = real(kit, weights)
        if weights is not None:
            net.head[1].bias.data[0] += 10.0  # type: ignore[index, union-attr, operator]
        return net

    monkeypatch.setattr(torch_kit.TorchKit, "model", lossy)
    with pytest.raises(ParityError, match=r"fp32-torch: graph 'net' read back from its folder differs at 'scores'"):
        export_kit({"fp32": real(KIT)}, KIT, "this-host", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_model_that_cannot_save_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Toy has no method save\(folder\)"):
        export_kit({"fp32": Toy()}, KIT, "this-host", tmp_path / "a")


def test_a_changed_byte_is_refused(artifact: Artifact) -> None:
    path = artifact.folder / "int4" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match=r"int4/model\.safetensors: its bytes differ"):
        Artifact.open(artifact.folder)
    path.write_bytes(whole)


def test_memory_is_weighed_in_a_process_of_its_own(artifact: Artifact) -> None:
    assert 50 < peak_memory(artifact.folder, "int4-torch", 1) < 4000


def test_a_run_ends_in_a_judged_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core.run, "SECONDS", {"smoke": 0.2})
    real = core.run.measure
    monkeypatch.setattr(core.run, "measure", lambda artifact, **named: real(artifact, **{**named, "seconds": 0.05}))
    weighed = {"peak": 120.0, "before": 100.0}
    monkeypatch.setattr(sys.modules["core.evaluation.measure"], "_memory", lambda *given: weighed)
    Run(KIT, KIT.recipes["int4"], KIT.default_target, None, "smoke", tmp_path / "out")()
    report = Report.load(tmp_path / "out")
    alike = report.figures.find("alike", kind="measured")
    assert alike is not None and alike.value >= 90
    accuracy = report.figures.find("accuracy", kind="measured")
    assert accuracy is not None and "INT4" in accuracy.basis.runtime  # type: ignore[union-attr]
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    rows = {row["layer"]: row for row in stored["layers"]}
    # 8 outputs of 9 weights in 4 bits; the error of packed weights stands where simulated layers show theirs
    assert rows["encoder.0"]["bytes"] == -(-rows["encoder.0"]["parameters"] * 4 // 8)
    assert 10 < rows["encoder.0"]["sqnr_db"] < 40 < rows["head.1"]["sqnr_db"]
    assert [t["title"] for t in stored["tables"]] == ["Side by side on this machine", "Alike"]
