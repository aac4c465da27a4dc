"""The model card: what it tells, also of a model that calls nothing."""

from __future__ import annotations

import json
from pathlib import Path

from core.compress import file_hash
from kits.pcb_inspection.card import write_card

ABOUT = {
    "data": "the kit's generated set", "deeppcb": False, "device": "this-host", "seed": 3, "seconds": 90,
    "pairs": {"train": 8, "val": 2, "holdout": 4}, "groups": {"val": ["group1"], "holdout": ["group2", "group3"]},
    "parameters": 1234, "command": "fitkit train pcb_inspection --preset smoke",
}  # fmt: skip


def test_a_rate_over_nothing_is_a_dash(tmp_path: Path) -> None:
    for name in ("fp32", "int8"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode())
    scores = {"fp32-openvino": {"map33": 12.345, "precision": 50.0}, "int8-openvino": {"map33": 0.0, "precision": None}}
    write_card(tmp_path, [], {"threshold": 0.25, "alien": 1}, scores, ABOUT)
    lines = (tmp_path / "README.md").read_text(encoding="utf-8").splitlines()
    assert "| metric | fp32-openvino | int8-openvino |" in lines
    assert "| mean AP per class at IoU 0.33 [%] | 12.35 | 0.00 |" in lines
    assert "| precision [%] | 50.00 | - |" in lines
    assert any("4 pairs (group2, group3) held out of every choice" in line for line in lines)
    card = json.loads((tmp_path / "card.json").read_text(encoding="utf-8"))
    assert card["threshold"] == 0.25 and "alien" not in card and card["scores"]["int8-openvino"]["precision"] is None
    assert card["sha256"]["int8.safetensors"] == file_hash(tmp_path / "int8.safetensors")
