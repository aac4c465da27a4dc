from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from core.export import mnn
from core.export.mnn import MnnModule, convert, to_mnn
from core.export.parity import ParityError
from core.kit import Graph, InputError

needs_mnn = pytest.mark.skipif(importlib.util.find_spec("MNN") is None, reason="the extra `phone` is not installed")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.conv = nn.Conv2d(16, 64, 3, padding=1, bias=False)
        self.linear = nn.Linear(64, 64)

    def forward(self, ids: Tensor, image: Tensor) -> Tensor:
        x = image + self.embedding(ids).transpose(1, 2).unsqueeze(-1)
        return self.linear(self.conv(x).flatten(2).transpose(1, 2))


def graph() -> Graph:
    ids, image = torch.arange(4).unsqueeze(0), torch.randn(1, 16, 4, 4)
    return Graph("small", {"ids": ids, "image": image}, ("out",))


def as_mnn_rounds(weight: Tensor, bits: int, block: int) -> Tensor:
    """Symmetric rounding with a scale for each block; MNN's least value and scale do somewhat better."""
    rows = weight.flatten(1)
    groups = rows.reshape(len(rows), -1, block)
    top = 2 ** (bits - 1) - 1
    scale = groups.abs().amax(-1, keepdim=True) / top
    return (torch.round(groups / scale).clamp(-top - 1, top) * scale).reshape(weight.shape)


@needs_mnn
def test_float_agrees_and_int4_is_what_rounding_predicts(tmp_path: Path) -> None:
    model = Small().eval()
    g = graph()
    found = to_mnn(model, g, tmp_path, weights=("float", "int8", "int4"), block=16)

    error = found["float"].error["out"]
    assert error.max_abs <= 1e-5 * error.peak
    weights = 64 * 144 + 64 * 64
    assert found["float"].stored == {"float32": {"layers": 2, "weights": weights}}
    assert found["int4"].stored == {"int4": {"layers": 2, "weights": weights}}
    # a convolution and a Linear: 64 x 144 + 64 x 64 weights fall from 4 bytes to a half, and a scale for each 16
    saved = found["float"].bytes - found["int4"].bytes
    assert saved > 0.7 * 4 * weights

    rounded = Small().eval()
    rounded.load_state_dict(model.state_dict())
    with torch.no_grad():
        rounded.linear.weight.copy_(as_mnn_rounds(model.linear.weight, 4, 16))
        rounded.conv.weight.copy_(as_mnn_rounds(model.conv.weight, 4, 16))
        noise = (rounded(*g.inputs.values()) - model(*g.inputs.values())).square().mean()
        signal = model(*g.inputs.values()).square().mean()
    predicted = float(10 * torch.log10(signal / noise))
    assert abs(found["int4"].error["out"].sqnr - predicted) < 3.0, (found["int4"].error, predicted)
    assert found["int8"].error["out"].sqnr > found["int4"].error["out"].sqnr + 15


@needs_mnn
def test_conversion_leaves_the_current_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the converter keeps weights in a file of this name meanwhile, and two conversions at once would mix theirs
    (tmp_path / ".__convert_external_data.bin").mkdir()
    monkeypatch.chdir(tmp_path)
    found = to_mnn(Small().eval(), graph(), Path("out"), weights=("float",))["float"]
    assert found.error["out"].max_abs <= 1e-5 * found.error["out"].peak
    assert {p.name for p in tmp_path.iterdir()} == {".__convert_external_data.bin", "out"}


@needs_mnn
def test_file_runs_again_and_says_what_it_takes(tmp_path: Path) -> None:
    model, g = Small().eval(), graph()
    record = to_mnn(model, g, tmp_path, weights=("float",))["float"].to_json()
    assert record["file"] == "small-float.mnn"
    assert record["bytes"] == (tmp_path / "small-float.mnn").stat().st_size
    assert len(record["sha256"]) == 64
    module = MnnModule(tmp_path / "small-float.mnn", ("ids", "image"), ("out",))
    with torch.no_grad():
        torch.testing.assert_close(module(*g.inputs.values()), model(*g.inputs.values()), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="1 inputs given, the file takes 2: ids, image"):
        module(g.inputs["ids"])


@needs_mnn
def test_parity_beyond_tolerance_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="'out' of MNN disagrees with torch"):
        to_mnn(Small().eval(), graph(), tmp_path, weights=("float",), tolerance=0.0)


@needs_mnn
def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="weights 'nf4'; expected some of float, int8, int4"):
        to_mnn(Small(), graph(), tmp_path, weights=("nf4",))
    with pytest.raises(InputError, match="block 0"):
        to_mnn(Small(), graph(), tmp_path, block=0)
    with pytest.raises(InputError, match="converter refused it: .*Does Not Exist"):
        convert(tmp_path / "none.onnx", tmp_path / "none.mnn")
    with pytest.raises(InputError, match="no such file"):
        MnnModule(tmp_path / "none.mnn", ("x",), ("y",))


def test_converter_bypasses_the_reporting_command() -> None:
    # MNN.tools.mnnconvert reports to its makers and runs `pip install`; what we call must never import it
    assert "MNN.tools" not in mnn.CONVERTER and "import MNN" not in mnn.CONVERTER


def test_without_the_extra_one_line_tells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(_: str) -> str:
        raise ModuleNotFoundError

    monkeypatch.setattr(mnn, "installed", absent)
    with pytest.raises(InputError, match=r"MNN is not installed; pip install 'fitkit\[phone\]'"):
        to_mnn(Small(), graph(), tmp_path)
