"""The detection score against stored results of nuscenes-devkit 1.2.0 and against what can be worked out by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.kit import InputError
from kits.bev_perception.comparison import beyond
from kits.bev_perception.data.boxes import Boxes
from kits.bev_perception.data.classes import ATTRIBUTE_INDEX, CLASSES, LABELS
from kits.bev_perception.data.geometry import about_z
from kits.bev_perception.data.nuscenes import NuScenes
from kits.bev_perception.metrics.nds import RANGES, UNDEFINED, Score, Truth, match, score
from kits.bev_perception.metrics.results import META, read_results, with_attributes, write_results
from kits.bev_perception.metrics.truth import groups, split_tokens, truth_of
from tests.kits.bev_folders import REAL, perturbed, real_folder, small_folder

FIXTURES = Path(__file__).parent / "fixtures" / "bev"
CASES = json.loads((FIXTURES / "devkit_cases.json").read_text())


def numbers(value: Any) -> Any:
    """JSON's null as NaN."""
    return float("nan") if value is None else value


def box(row: list[Any]) -> dict[str, Any]:
    """A prediction as it stands in a results file, of a compact row of the fixture."""
    names = ("translation", "size", "rotation", "velocity", "detection_score", "detection_name", "attribute_name")
    found = dict(zip(names, row))
    found["velocity"] = [numbers(v) for v in found["velocity"]]
    return found | ({"num_pts": row[7]} if row[7] != -1 else {})


def case(name: str, folder: Path) -> tuple[dict[str, Truth], dict[str, Boxes]]:
    """Truth and predictions of a stored case; the predictions go through a results file."""
    stored = CASES[name]
    truth = {}
    for token, sample in stored["truth"].items():
        c, s, r, v, points, names, attributes = zip(*sample["boxes"])
        velocity = [[numbers(x) for x in pair] for pair in v]
        labels = [LABELS[n] for n in names]
        attribute = [ATTRIBUTE_INDEX.get(a, -1) for a in attributes]
        boxes = Boxes.of(c, s, r, velocity, labels, attributes=attribute, num_pts=points)
        racks = tuple(tuple(np.array(part) for part in rack) for rack in sample["racks"])
        truth[token] = Truth(boxes, np.array(sample["ego"]), racks)  # type: ignore[arg-type]
    results = {t: [box(row) | {"sample_token": t} for row in rows] for t, rows in stored["results"].items()}
    file = folder / "results_nusc.json"
    file.write_text(json.dumps({"meta": META, "results": results}))
    return truth, read_results(file)[0]


def agree(ours: Score, expected: dict[str, Any]) -> None:
    """Every number of the devkit's summary, to 1e-6 as asked and to 1e-9 as found."""
    found = ours.to_json()

    def compare(path: str, a: Any, b: Any) -> None:
        if isinstance(b, dict):
            assert set(a) == set(b), path
            for name in b:
                compare(f"{path}.{name}", a[name], b[name])
        elif b is None:
            assert a is None, path
        else:
            assert a == pytest.approx(b, abs=1e-9), path

    for name, value in expected.items():
        compare(name, found[name], value)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_devkit(name: str, tmp_path: Path) -> None:
    agree(score(*case(name, tmp_path)), CASES[name]["expected"])


@pytest.mark.parametrize(("name", "seed"), [(name, seed) for name in REAL for seed in (1, 2)])
def test_equals_the_devkit_on_real_folders(name: str, seed: int, tmp_path: Path) -> None:
    data = NuScenes(real_folder(name))
    tokens = split_tokens(data, "all")
    file = tmp_path / "results_nusc.json"
    write_results(file, {t: perturbed(data.truth(t), seed + i) for i, t in enumerate(tokens)})
    expected = json.loads((FIXTURES / "devkit_folders.json").read_text())[f"{name}/{seed}"]
    agree(score(truth_of(data, tokens), read_results(file, tokens)[0]), expected)


def test_parts_of_the_samples_are_scored_as_if_alone(tmp_path: Path) -> None:
    truth, said = case("ties", tmp_path)
    part = ["s1", "s4"]
    alone = score({t: truth[t] for t in part}, {t: said[t] for t in said if t in part})
    assert match(truth, said).score(part).to_json() == alone.to_json()
    with pytest.raises(InputError, match="'nowhere'"):
        match(truth, said).score(["nowhere"])


def everything(samples: int = 3) -> dict[str, Truth]:
    """All ten classes in range, with attributes where the class has any, moving at 2 m/s."""
    attribute = [ATTRIBUTE_INDEX.get(a, -1) for a in with_all_attributes()]
    n = len(CLASSES)
    angle = np.arange(n) * 2 * np.pi / n
    centers = np.stack([20 * np.cos(angle), 20 * np.sin(angle), np.ones(n)], axis=1) + [100, 50, 0]
    truth = {}
    for s in range(samples):
        boxes = Boxes.of(
            centers + [s, 0, 0],
            np.tile([2.0, 4.0, 1.5], (n, 1)),
            about_z(angle),
            np.tile([2.0, 0.0], (n, 1)),
            np.arange(n),
            attributes=attribute,
            num_pts=np.full(n, 5),
        )
        truth[f"sample{s}"] = Truth(boxes, np.array([100.0 + s, 50.0, 0.0]))
    return truth


def with_all_attributes() -> list[str]:
    kinds = {"pedestrian": "pedestrian.standing", "bicycle": "cycle.with_rider", "motorcycle": "cycle.with_rider"}
    return ["" if c in UNDEFINED else kinds.get(c, "vehicle.moving") for c in CLASSES]


def said(truth: dict[str, Truth], **changes: Any) -> dict[str, Boxes]:
    """The truth as prediction, falling scores, with some arrays replaced by functions of the boxes."""
    found = {}
    for token, sample in truth.items():
        boxes = replace(sample.boxes, scores=np.linspace(0.9, 0.5, len(sample.boxes)))
        found[token] = replace(boxes, **{name: change(boxes) for name, change in changes.items()})
    return found


def test_truth_as_prediction_scores_one() -> None:
    found = score(everything(), said(everything()))
    assert found.nds == pytest.approx(1.0, abs=1e-12)
    assert found.mean_ap == pytest.approx(1.0, abs=1e-12)
    assert max(found.mean_errors.values()) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("shift", "ap"), [(0.3, 1.0), (0.8, 0.75), (1.5, 0.5), (3.0, 0.25), (5.0, 0.0)])
def test_a_known_shift_gives_the_known_errors(shift: float, ap: float) -> None:
    truth = everything()
    found = score(truth, said(truth, centers=lambda b: b.centers + [0, shift, 0]))
    assert found.mean_ap == pytest.approx(ap, abs=1e-12)
    assert found.mean_errors["trans_err"] == pytest.approx(shift if shift < 2 else 1.0, abs=1e-9)


def test_known_velocities_turns_sizes_and_attributes() -> None:
    truth = everything()
    found = score(truth, said(truth, velocities=lambda b: b.velocities + [0.3, 0.4]))
    assert found.mean_errors["vel_err"] == pytest.approx(0.5, abs=1e-9)
    assert np.isnan(found.errors["barrier"]["vel_err"])
    assert np.isnan(found.errors["traffic_cone"]["orient_err"])

    found = score(truth, said(truth, rotations=lambda b: about_z(b.yaws + np.pi)))
    assert found.errors["barrier"]["orient_err"] == pytest.approx(0.0, abs=1e-7)
    assert found.errors["car"]["orient_err"] == pytest.approx(np.pi, abs=1e-7)
    assert found.mean_errors["orient_err"] == pytest.approx(np.pi * 8 / 9, abs=1e-6)

    found = score(truth, said(truth, sizes=lambda b: b.sizes * [1, 0.5, 1]))
    assert found.mean_errors["scale_err"] == pytest.approx(0.5, abs=1e-9)

    found = score(truth, said(truth, attributes=lambda b: np.where(b.labels == LABELS["car"], -1, b.attributes)))
    assert found.errors["car"]["attr_err"] == 1.0
    assert found.mean_errors["attr_err"] == pytest.approx(1 / 8, abs=1e-9)


def test_no_predictions_score_zero() -> None:
    truth = everything()
    found = score(truth, {token: Boxes.none() for token in truth})
    assert found.nds == 0.0
    assert found.mean_ap == 0.0
    assert set(found.mean_errors.values()) == {1.0}


@pytest.mark.parametrize("name", CLASSES)
def test_only_what_is_in_range_counts(name: str) -> None:
    def at(distance: float) -> int:
        boxes = Boxes.of([[distance, 0, 0]], [[1, 1, 1]], [[1, 0, 0, 0]], [[0, 0]], [LABELS[name]], num_pts=[1])
        return score({"s": Truth(boxes, np.zeros(3))}, {"s": Boxes.none()}).truths[name]

    assert at(RANGES[name] - 1e-6) == 1
    assert at(RANGES[name]) == 0


def test_bicycles_in_racks_and_boxes_without_points_are_left_out() -> None:
    rack = (np.array([10.0, 0, 0]), np.array([2.0, 4.0, 2.0]), about_z(np.pi / 2))
    # Turned by 90 degrees the rack reaches 1 m along x and 2 m along y.
    centers = [[10, 1.9, 0], [10, 2.1, 0], [11.1, 0, 0], [10, 0, 0], [9, 9, 0]]
    labels = [LABELS[n] for n in ("bicycle", "bicycle", "motorcycle", "car", "bicycle")]
    boxes = Boxes.of(centers, np.ones((5, 3)), about_z(np.zeros(5)), np.zeros((5, 2)), labels, num_pts=[1, 1, 1, 1, 0])
    truths = score({"s": Truth(boxes, np.zeros(3), (rack,))}, {"s": Boxes.none()}).truths
    assert (truths["bicycle"], truths["motorcycle"], truths["car"]) == (1, 1, 1)


def test_only_classes_that_are_there(tmp_path: Path) -> None:
    truth, predictions = case("few_classes", tmp_path)
    found = score(truth, predictions)
    assert set(found.present) == {"car", "barrier", "bicycle"}
    part = found.over(found.present)
    assert part.mean_ap == pytest.approx(found.mean_ap * 10 / 3)
    assert part.to_json()["nd_score"] == part.nds > found.nds


def test_interval_holds_the_score_and_narrows_when_all_groups_agree(tmp_path: Path) -> None:
    truth, predictions = case("ties", tmp_path)
    matches = match(truth, predictions)
    low, high = matches.interval({token: token for token in truth}, resamples=50)["nds"]
    assert low < matches.score().nds < high
    same = everything(4)
    low, high = match(same, said(same)).interval({token: token for token in same}, resamples=20)["mean_ap"]
    assert (low, high) == pytest.approx((1.0, 1.0))
    with pytest.raises(ValueError, match="at least 2"):
        matches.interval(dict.fromkeys(truth, "one"))


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda p: p.pop("sample1"), "sample 'sample1' is missing"),
        (lambda p: p.update(other=Boxes.none()), "'other' is not in the split"),
        (lambda p: p.update(sample1=Boxes.join([p["sample1"]] * 51)), "holds 510 boxes"),
        (lambda p: p.update(sample1=replace(p["sample1"], scores=np.full(10, np.nan))), "scores .* not finite"),
        (lambda p: p.update(sample1=replace(p["sample1"], centers=np.full((10, 3), np.inf))), "centers .* not finite"),
        (lambda p: p.update(sample1=replace(p["sample1"], sizes=np.zeros((10, 3)))), "size .* not above 0"),
    ],
)
def test_predictions_that_cannot_be_scored_are_refused(spoil: Any, why: str) -> None:
    truth = everything()
    predictions = said(truth)
    spoil(predictions)
    with pytest.raises(InputError, match=why):
        score(truth, predictions)


def test_results_file_round_trip(tmp_path: Path) -> None:
    truth = everything()
    predictions = said(truth, velocities=lambda b: np.where(b.labels[:, None] == 0, np.nan, b.velocities))
    write_results(tmp_path / "r.json", predictions, META | {"use_lidar": True})
    found, meta = read_results(tmp_path / "r.json")
    assert meta["use_lidar"] is True
    assert list(found) == list(predictions)
    for token in found:
        for name in ("centers", "sizes", "rotations", "velocities", "labels", "scores", "attributes"):
            np.testing.assert_array_equal(getattr(found[token], name), getattr(predictions[token], name))
    assert list(read_results(tmp_path / "r.json", ["sample2", "sample0"])[0]) == ["sample2", "sample0"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"translation": [1, 2]}, "translation is .1, 2., expected 3 numbers"),
        ({"size": [1, -2, 1]}, "size .* not above 0"),
        ({"rotation": [0, 0, 0, 0]}, "rotation is zero"),
        ({"rotation": [1, 0, 0, "x"]}, "rotation is .* expected 4 numbers"),
        ({"velocity": None}, "velocity is None"),
        ({"detection_name": "tram"}, "detection_name 'tram' is not one of"),
        ({"detection_name": ["car"]}, "detection_name .* is not one of"),
        ({"attribute_name": "asleep"}, "attribute_name 'asleep'"),
        ({"detection_score": "high"}, "detection_score is 'high'"),
        ({"detection_score": float("nan")}, "scores .* not finite"),
        ({"sample_token": "sample2"}, "is not that of its list"),
        ({"num_pts": float("inf")}, "num_pts"),
        ({"size": [10**400, 1, 1]}, "size is .* expected 3 numbers"),
    ],
)
def test_faulty_results_are_refused_by_sample_box_and_field(change: Any, why: str, tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    write_results(file, said(everything()))
    content = json.loads(file.read_text())
    content["results"]["sample1"][3].update(change)
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=why) as error:
        read_results(file)
    assert "sample 'sample1', box 3" in str(error.value)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("[]", "not a JSON object"),
        ("{", "not JSON"),
        ('{"results": {}}', "'meta' is missing"),
        (json.dumps({"meta": META}), "'results' is missing"),
        (json.dumps({"meta": META, "results": []}), "'results' is list"),
        (json.dumps({"meta": {"use_camera": 1}, "results": {}}), "'use_camera' is 1"),
        (json.dumps({"meta": META, "results": {"a": {}}}), "sample 'a' is dict"),
    ],
)
def test_faulty_results_files_are_refused(content: str, why: str, tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_text(content)
    with pytest.raises(InputError, match=why):
        read_results(file)


def test_likely_attributes_follow_class_speed_and_the_height_of_cycles() -> None:
    names = ("car", "car", "bus", "bicycle", "bicycle", "motorcycle", "pedestrian", "barrier", "truck")
    boxes = Boxes.of(
        np.zeros((9, 3)),
        [[1, 1, 1.8 if n == "motorcycle" else 1] for n in names],
        about_z(np.zeros(9)),
        [[1, 0], [0.1, 0], [0, 0], [0, 3], [0, 0], [0, 0], [0, 0], [2, 0], [5, 5]],
        [LABELS[n] for n in names],
        attributes=[-1] * 8 + [ATTRIBUTE_INDEX["vehicle.parked"]],
    )
    expected = (
        "vehicle.moving", "vehicle.parked", "vehicle.stopped", "cycle.with_rider", "cycle.without_rider",
        "cycle.with_rider", "pedestrian.standing", "",
    )  # fmt: skip
    indices = [ATTRIBUTE_INDEX.get(name, -1) for name in expected] + [ATTRIBUTE_INDEX["vehicle.parked"]]
    assert with_attributes(boxes).attributes.tolist() == indices


def test_a_folder_through_results_file_and_groups(tmp_path: Path) -> None:
    data = NuScenes(small_folder(tmp_path / "data", scenes=2))
    tokens = split_tokens(data, "all")
    write_results(tmp_path / "r.json", {t: replace(data.truth(t), scores=np.full(5, 0.5)) for t in tokens})
    matches = match(truth_of(data, tokens), read_results(tmp_path / "r.json", tokens)[0])
    found = matches.score()
    assert found.over(found.present).nds == pytest.approx(1.0, abs=1e-9)
    parts = groups(data, tokens)
    assert {name: len(chosen) for name, chosen in parts.items()} == {"day": 4, "night": 4}
    assert matches.score(parts["night"]).truths["car"] == 8


def test_what_is_lost_by_night_beyond_what_is_lost_by_day() -> None:
    assert beyond(1.0, 1.5) == 0.5 and beyond(1.5, 1.0) == -0.5
    assert beyond(-0.2, -0.1) == 0.0, "both have gained"
    assert beyond(-0.2, 0.3) == 0.3 and beyond(0.3, -0.2) == -0.3
    assert math.isnan(beyond(1.0, float("nan")))
