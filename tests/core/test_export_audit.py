"""The audit counts every layer with weights once, also where a runtime fuses and renames it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from core.export import export
from core.kit import Graph


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_convolution_that_took_in_its_activation_is_counted_under_its_own_name(tmp_path: Path, runtime: str) -> None:
    """4 x 4 with 4 inputs: ONNX Runtime lays such a weight out anew and names the node after the activation."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 24, 4, 4, bias=False), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 48, 3, 2, 1), nn.ReLU()
    ).eval()
    graph = Graph("net", {"x": torch.rand(1, 4, 64, 64)}, ("y",))
    artifact = export({"fp32": net}, [graph], "this-host", tmp_path / "a", kit="toy", runtimes=[runtime])
    audit = artifact.variant().audit
    assert audit["weighted"] == {"FP32": 2}
    assert [o["layer"] for o in audit["operators"] if o["operator"].startswith("Conv")] == ["0", "3"]
