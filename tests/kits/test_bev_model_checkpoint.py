"""Published weights: every wrapper that they come in, and a clear word where they do not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from core.kit import InputError
from kits.bev_perception.model.checkpoint import load_checkpoint
from kits.bev_perception.model.configs import NANO
from kits.bev_perception.model.detector import BEVFormer

CONFIG = replace(
    NANO, backbone=replace(NANO.backbone, base_channels=4), embed_dims=16, ffn_dims=16, bev_h=4, bev_w=4, num_query=5
)
State = dict[str, Tensor]


def state_of(seed: int) -> State:
    torch.manual_seed(seed)
    return {k: v.clone() for k, v in BEVFormer(CONFIG).state_dict().items()}


def as_torch(state: object) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        torch.save(state, folder / "w.pth")
        return folder / "w.pth"

    return write


def as_safetensors(state: State) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        save_file(state, folder / "w.safetensors")
        return folder / "w.safetensors"

    return write


def prefixed(state: State) -> State:
    return {f"module.{k}": v for k, v in state.items()}


@pytest.mark.parametrize(
    "form",
    [
        lambda s: as_safetensors(s),
        lambda s: as_safetensors(prefixed(s)),
        lambda s: as_torch(s),
        lambda s: as_torch({"meta": {"epoch": 24, "CLASSES": ("car",)}, "state_dict": s}),
        lambda s: as_torch({"state_dict": prefixed(s)}),
        lambda s: as_torch({k: v.half() if v.is_floating_point() else v for k, v in s.items()}),
    ],
    ids=["safetensors", "safetensors-module", "torch", "torch-wrapped", "torch-wrapped-module", "torch-fp16"],
)
def test_every_form_loads(form: Callable[[State], Callable[[Path], Path]], tmp_path: Path) -> None:
    wanted, model = state_of(1), BEVFormer(CONFIG)
    load_checkpoint(model, form(wanted)(tmp_path))
    assert not model.training
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-3, atol=1e-4)


def without(state: State, *names: str) -> State:
    return {k: v for k, v in state.items() if k not in names}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda s: without(s, "img_backbone.conv1.weight", "pts_bbox_head.code_weights"),
            r"not weights of BEVFormer 'nano': 2 missing \(pts_bbox_head.code_weights, img_backbone.conv1.weight\)",
        ),
        (lambda s: s | {"teacher.w": torch.ones(1)}, r"1 unknown \(teacher.w\)"),
        (
            lambda s: s | {"img_backbone.conv1.weight": torch.ones(8, 3, 7, 7)},
            r"1 of another shape \(img_backbone.conv1.weight \(8, 3, 7, 7\) instead of \(4, 3, 7, 7\)\)",
        ),
        (
            lambda s: s | {"img_neck.fpn_convs.0.conv.bias": torch.full((16,), torch.nan)},
            r"1 not finite \(img_neck.fpn_convs.0.conv.bias\)",
        ),
        (lambda s: {f"x.{k}": v for k, v in s.items()}, r"missing \(.* and \d+ more\); \d+ unknown \("),
    ],
    ids=["missing", "unknown", "shape", "nan", "prefix"],
)
@pytest.mark.parametrize("form", [as_safetensors, as_torch])
def test_what_does_not_fit_is_named_and_changes_nothing(
    change: Callable[[State], State], why: str, form: Callable[[State], Callable[[Path], Path]], tmp_path: Path
) -> None:
    model = BEVFormer(CONFIG)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    path = form(change(state_of(1)))(tmp_path)
    with pytest.raises(InputError, match=why) as error:
        load_checkpoint(model, path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Evil:
    """Would call a function where a pickle of it is loaded without care."""

    def __reduce__(self) -> tuple[object, ...]:
        return print, ("EVIL",)


@pytest.mark.parametrize("held", [{"state_dict": {"w": Evil()}}, nn.Linear(2, 2)], ids=["call", "module"])
def test_nothing_but_tensors_is_read(held: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = as_torch(held)(tmp_path)
    with pytest.raises(InputError, match=r"w.pth: torch cannot read weights alone from it .* as safetensors"):
        load_checkpoint(BEVFormer(CONFIG), path)
    assert "EVIL" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "torch cannot read weights alone"),
        (b"\x10\0\0\0\0\0\0\0{torn", "not a whole safetensors file"),
        (b"PK\x03\x04torn", "torch cannot read weights alone"),
    ],
)
def test_a_torn_file(content: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(InputError, match=why):
        load_checkpoint(BEVFormer(CONFIG), tmp_path / "w")
    with pytest.raises(InputError, match="no such file"):
        load_checkpoint(BEVFormer(CONFIG), tmp_path / "none")


@pytest.mark.parametrize("held", [[1, 2], {}, {"state_dict": 3}, {"epoch": 3, "w": torch.ones(1)}])
def test_a_file_of_something_else(held: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give a state_dict, alone or as"):
        load_checkpoint(BEVFormer(CONFIG), as_torch(held)(tmp_path))
