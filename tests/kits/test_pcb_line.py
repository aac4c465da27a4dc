"""A line's view: what is done to boards, the same board again, the log of verdicts, and the alarm on pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from core.kit import InputError
from kits.pcb_inspection import KIT, drift, line
from kits.pcb_inspection.audit import BEGINNING, AuditLog, hash_of, sealed, verify
from kits.pcb_inspection.data.deeppcb import Pair
from kits.pcb_inspection.drift import STATISTICS, WINDOW, DriftAlarm, statistics
from kits.pcb_inspection.model.pair import Registration
from kits.pcb_inspection.predict import read_serials

NONE = np.zeros((0, 4), np.float32)


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return list(KIT.dataset(None, "test", "smoke"))[:4]


@pytest.fixture(scope="module")
def threshold() -> float:
    return float(KIT.shipped()[1]["threshold"])


def square(side: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """White with a black square of 40 px, and its box."""
    image = np.full((side, side), 255, np.uint8)
    image[60:100, 120:160] = 0
    return image, np.array([[120, 60, 160, 100]], np.float32)


@pytest.mark.parametrize(
    "given", [{"dx": 7, "dy": -4}, {"turn": 1.0}, {"scale": 1.05}, {"dx": 3, "turn": -1.0, "scale": 0.97}]
)
def test_boxes_go_where_the_copper_goes(given: dict[str, float]) -> None:
    image, boxes = square()
    seen, template, placed = line.moved(image, image, boxes, **given)
    assert template is image and placed.shape == (1, 4)
    rows, columns = np.nonzero(seen < 128)
    real = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert placed[0] == pytest.approx(real, abs=1.5)


def test_etching_grows_and_shrinks_copper_and_a_corner_goes() -> None:
    image, boxes = square()
    black = [int((line.etched(image, image, boxes, level=v)[0] == 0).sum()) for v in (96, 128, 160)]
    assert black[0] < 1600 < black[2] and black[0] < black[1] < black[2]
    dark = np.zeros_like(image)
    for corner, (y, x) in enumerate(((0, 0), (0, -1), (-1, -1), (-1, 0))):
        _, torn, _ = line.torn(image, dark, boxes, corner=corner)
        assert torn[y, x] == 255 and (torn == 255).sum() == line.CORNER**2
    assert (dark == 0).all(), "the template itself stays"


def test_the_shipped_detector_stands_small_changes(pairs: list[Pair], threshold: float) -> None:
    found = line.stress(KIT.model(), pairs, threshold)
    assert list(found) == list(line.changes(0))
    assert all(stood.boards == 4 and stood.defects == sum(len(p.boxes) for p in pairs) for stood in found.values())
    assert found["as it is"].recall_any >= 85
    assert found["moved by 5 px"].recall_any >= found["as it is"].recall_any - 10
    for stood in found.values():
        assert 0 <= stood.recall_right <= stood.recall_any <= 100 and stood.false_calls >= 0


class Always(torch.nn.Module):
    """Calls one defect of class 0 in the middle of every tile, or none."""

    def __init__(self, calls: bool) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = torch.full((1, 6, 80, 80), -20.0)
        if self.calls:
            logits[0, 0, 40, 40] = 5.0
        return logits, torch.zeros(1, 4, 80, 80)


@pytest.mark.parametrize("calls", [True, False])
def test_a_detector_that_always_says_the_same_agrees_and_is_wrong_half_of_the_time(
    pairs: list[Pair], calls: bool
) -> None:
    found = line.repeat(Always(calls), pairs[:2], 0.5, shots=3)
    assert (found.boards, found.shots, found.agreement, found.steady) == (2, 3, 100.0, 0.0)
    assert (found.false_reject, found.false_accept) == ((100.0, 0.0) if calls else (0.0, 100.0))
    low, high = found.false_reject_interval
    assert (low > 50 and high == 100) if calls else (low == 0 and high < 50)  # six shots of each kind


def test_jitter_is_small_and_seeded(pairs: list[Pair]) -> None:
    test, _ = pairs[0].load()
    shots = [line.jittered(test, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert np.array_equal(shots[0], shots[1]) and not np.array_equal(shots[0], shots[2])
    assert set(np.unique(shots[0])) == {0, 255} and np.mean(shots[0] != test) < 0.15


def test_both_studies_are_tables(pairs: list[Pair], threshold: float) -> None:
    stood = line.stress(Always(False), pairs[:1], threshold)
    first, second = line.tables(stood, line.repeat(Always(False), pairs[:1], threshold, 2))
    assert len(first["rows"]) == 11 and first["rows"][0][1:3] == [0.0, 0.0]
    assert len(second["rows"][0]) == len(second["columns"]) and "100.0 (" in second["rows"][0][4]
    json.dumps([first, second])


def test_a_log_is_a_chain_and_goes_on(tmp_path: Path) -> None:
    place = tmp_path / "logs" / "audit.jsonl"
    assert verify(place) == (0, BEGINNING)
    first = AuditLog(place)
    hashes = [first.add({"serial": f"S{i}", "verdict": "accept"}) for i in range(3)]
    assert verify(place) == (3, hashes[-1]) and len(set(hashes)) == 3
    again = AuditLog(place)
    assert (again.count, again.last) == (3, hashes[-1])
    entries = [json.loads(text) for text in place.read_text().splitlines()]
    assert [e["number"] for e in entries] == [1, 2, 3] and entries[1]["previous"] == hashes[0]


@pytest.mark.parametrize("harm", ["changed", "taken out", "put between", "swapped", "cut", "resealed", "binary"])
def test_what_was_tampered_with_is_found_at_its_line(tmp_path: Path, harm: str) -> None:
    place = tmp_path / "audit.jsonl"
    log = AuditLog(place)
    for i in range(5):
        log.add({"serial": f"S{i}", "verdict": "reject"})
    lines = place.read_text().splitlines()
    at = 3
    if harm == "changed":
        lines[2] = lines[2].replace("reject", "accept")
    elif harm == "taken out":
        del lines[2]
    elif harm == "put between":
        lines.insert(2, lines[1])
    elif harm == "swapped":
        lines[2], lines[3] = lines[3], lines[2]
    elif harm == "cut":
        lines[2] = lines[2][:20]
    elif harm == "resealed":  # an entry changed with a hash that fits it: the next one gives it away
        entry = json.loads(lines[2])
        changed = {k: v for k, v in entry.items() if k not in ("hash", "previous")} | {"verdict": "accept"}
        lines[2], at = json.dumps(sealed(changed, entry["previous"])), 4
    else:
        place.write_bytes(b"\xff\xfe\x00")
    if harm != "binary":
        place.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match="no audit log" if harm == "binary" else f"audit.jsonl:{at}: does not follow"):
        AuditLog(place)


def test_a_files_hash_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert hash_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_serials_are_read_and_what_is_wrong_is_named(tmp_path: Path) -> None:
    place = tmp_path / "serials.csv"
    place.write_text("image,serial,shift\nb,SN 2,early\na,SN1,late\n")
    assert read_serials(place, ["a", "b"]) == {"a": "SN1", "b": "SN 2"}
    for text, says in (
        ("image,serial\na,\n", ":2: expected the columns"),
        ("name,number\na,1\n", ":2: expected the columns"),
        ("image,serial\na,1\nc,2\n", ":3: no image 'c' among the 2 inputs"),
        ("image,serial\na,1\na,2\n", ":3: a second serial for image 'a'"),
        ("image,serial\na,1\n", "no serial for image 'b'"),
    ):
        place.write_text(text)
        with pytest.raises(InputError, match=says):
            read_serials(place, ["a", "b"])
    with pytest.raises(InputError, match="cannot be read as CSV"):
        read_serials(tmp_path / "none.csv", ["a"])


def test_an_alarm_is_silent_on_boards_like_the_reference_and_names_what_moved() -> None:
    known = {name: [1.0, 0.1] for name in STATISTICS}
    rng = np.random.default_rng(0)
    alarm, said = DriftAlarm(known), []
    for _ in range(200):
        said += alarm.look({name: 1.0 + float(rng.normal(0, 0.1)) for name in STATISTICS})
    assert said == []
    for number in range(WINDOW):
        said = alarm.look({name: 1.0 + (name == "level") * 0.4 for name in STATISTICS})
        assert number < 6 or said
    assert len(said) == 1 and "grey level" in said[0] and "light and exposure" in said[0]
    with pytest.raises(InputError, match="freeze it anew"):
        DriftAlarm({"copper": [1.0, 0.1]})


def test_statistics_tell_blur_and_etching_apart(pairs: list[Pair]) -> None:
    test, template = pairs[0].load()
    still = Registration(3, -4, 0.01, False)
    plain = statistics(test, template, still)
    assert plain["shift"] == 5 and plain["residual"] == 0.01 and plain["greys"] < 0.01
    soft = statistics(line.blurred(test, template, NONE, sigma=2.0)[0], template, still)
    assert soft["greys"] > plain["greys"] + 0.05
    thick = statistics(line.etched(test, template, NONE, level=200)[0], template, still)
    assert thick["copper"] > plain["copper"] + 0.005
    known = drift.reference(pairs)
    assert set(known) == set(STATISTICS) and all(deviation > 0 for _, deviation in known.values())
