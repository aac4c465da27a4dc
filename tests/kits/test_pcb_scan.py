"""A whole scan in a process of its own: what it counts and finds, and what it says when it cannot."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from core.export import Artifact
from core.kit import InputError
from core.shipped import shipped_artifact
from kits.pcb_inspection import KIT, scan
from kits.pcb_inspection.data.scan import laid_out
from kits.pcb_inspection.model.inspector import inspect

SIDE = 1500


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return shipped_artifact(KIT)


def test_a_scan_apart_finds_what_it_finds_here(artifact: Artifact) -> None:
    pairs = KIT.dataset(None, "test", "smoke")[:6]
    took = scan.panel(artifact, "int8-openvino", 2, pairs, SIDE)
    test, template, _ = laid_out(pairs, SIDE)
    here = inspect(artifact.as_module("int8-openvino", 1), test, template).detections
    assert took.tiles == 9 and took.seconds > 0
    assert took.detections == int((here[:, 4] >= artifact.meta["threshold"]).sum()) > 0
    assert 100 < took.peak < 2000, "MB of a process with torch and OpenVINO in it"
    gated = scan.scanned(artifact, "int8-openvino", 2, template, template, gated=True)
    assert gated.detections == 0 and gated.tiles == 9


def test_a_scan_that_cannot_be_written_says_where(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "imwrite", lambda *_: False)
    board = np.full((700, 700), 255, np.uint8)
    with pytest.raises(InputError, match=r"test\.png: a scan could not be written there; free some space"):
        scan.scanned(artifact, "int8-openvino", 2, board, board)


def test_a_process_that_fails_is_told_by_its_last_words(artifact: Artifact) -> None:
    board = np.full((700, 700), 255, np.uint8)
    with pytest.raises(InputError, match=r"a scan of 700 x 700 px: .*nothing-like-it"):
        scan.scanned(artifact, "nothing-like-it", 2, board, board)


def test_a_panel_is_of_the_size_that_the_gate_names() -> None:
    (gate,) = (g for g in KIT.gates if g.figure == "scan_seconds")
    assert gate.name == f"scan of {scan.SIDE:,} x {scan.SIDE:,} px" and gate.bound == "<= 8"
