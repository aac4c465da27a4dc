"""Streaming accuracy and the recall of sudden obstacles, on cases that can be followed by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from core.kit import InputError
from kits.bev_perception.data.boxes import Boxes
from kits.bev_perception.data.geometry import about_z
from kits.bev_perception.data.nuscenes import NuScenes
from kits.bev_perception.metrics.events import Event, Track, sudden_recall
from kits.bev_perception.metrics.nds import match
from kits.bev_perception.metrics.streaming import Answer, Frame, schedule, streamed
from kits.bev_perception.metrics.truth import groups, read_events, split_tokens, tracks, truth_of
from tests.kits.bev_folders import START, small_folder, token


def one(x: float, y: float = 0.0, *, label: int = 0, score: float = 0.5, velocity: float = 0.0) -> Boxes:
    return Boxes.of([[x, y, 0]], [[2, 4, 1.5]], about_z([0.0]), [[velocity, 0]], [label], [score])


def test_a_slow_detector_drops_frames_and_takes_the_newest() -> None:
    times = [0.0, 0.1, 0.2, 0.3, 0.4, 1.0]
    found = schedule(times, lambda i: 0.25)
    # Begins 0, is free at 0.25 and takes 0.2, is free at 0.5 and takes 0.4, waits for 1.0.
    assert [a.frame for a in found] == [0, 2, 4, 5]
    np.testing.assert_allclose([a.begun for a in found], [0, 0.25, 0.5, 1.0])
    np.testing.assert_allclose([a.ready for a in found], [0.25, 0.5, 0.75, 1.25])
    fast = schedule(times, lambda i: 0.0)
    assert fast == [Answer(i, t, t) for i, t in enumerate(times)]
    assert schedule([], lambda i: 1.0) == []
    with pytest.raises(ValueError, match="must rise"):
        schedule([0.0, 0.0], lambda i: 0.1)
    with pytest.raises(ValueError, match="latency of frame 0"):
        schedule([0.0], lambda i: -0.1)


def test_the_newest_answer_that_is_ready_counts() -> None:
    frames = [Frame("a", START + i * 100_000, one(float(i), velocity=10.0)) for i in range(6)]
    samples = {f"s{i}": ("a", START + i * 100_000) for i in range(6)}
    at_once = streamed(frames, [0.0] * 6, samples)
    assert [at_once[f"s{i}"].centers[0, 0] for i in range(6)] == [0, 1, 2, 3, 4, 5]
    late = streamed(frames, [0.1] * 6, samples)
    assert len(late["s0"]) == 0
    assert [late[f"s{i}"].centers[0, 0] for i in range(1, 6)] == [0, 1, 2, 3, 4]
    # 150 ms: frames 0, 1, 3, 4 are taken and ready at 150, 300, 450, 600 ms.
    slow = streamed(frames, [0.15] * 6, samples)
    assert [slow[f"s{i}"].centers[0, 0] if len(slow[f"s{i}"]) else None for i in range(6)] == [None, None, 0, 1, 1, 3]
    ahead = streamed(frames, [0.15] * 6, samples, forecast=True)
    assert [ahead[f"s{i}"].centers[0, 0] for i in range(2, 6)] == pytest.approx([2, 3, 4, 5])
    assert len(streamed(frames, [0.1] * 6, {"x": ("other", START)})["x"]) == 0
    with pytest.raises(InputError, match="5 latencies for 6 frames"):
        streamed(frames, [0.1] * 5, samples)


def test_streaming_costs_what_moves_and_a_forecast_wins_it_back(tmp_path: Path) -> None:
    data = NuScenes(small_folder(tmp_path))
    tokens = split_tokens(data, "all")
    truth = truth_of(data, tokens)
    said = [replace(data.truth(t), scores=np.full(5, 0.5)) for t in tokens]
    frames = [Frame("small-0", data.sample(t).timestamp, boxes) for t, boxes in zip(tokens, said)]
    samples = {t: ("small-0", data.sample(t).timestamp) for t in tokens}

    def score(latency: float, forecast: bool = False) -> dict[str, float]:
        found = match(truth, streamed(frames, [latency] * 4, samples, forecast=forecast)).score(tokens[1:])
        return {
            "ate": found.errors["truck"]["trans_err"],
            "ap": found.aps["truck"][4.0],
            "cone": found.aps["traffic_cone"][0.5],
        }

    assert score(0.0)["ate"] == pytest.approx(0.0)
    late = score(0.3)
    # The truck does 4 m/s and the answer is half a second old: 2 m, which is not below the 2 m of a match.
    assert late["ate"] == 1.0
    assert late["ap"] == pytest.approx(1.0)
    assert late["cone"] == pytest.approx(1.0)
    assert score(0.3, forecast=True)["ate"] == pytest.approx(0.0, abs=1e-6)


TRACK = {"i": Track(0, np.array([START, START + 1_000_000.0]), np.array([[10.0, 0, 0], [20.0, 0, 0]]))}
EVENT = Event("a", "i", START + 200_000)


def frames(*boxes: tuple[int, Boxes], scene: str = "a") -> list[Frame]:
    return [Frame(scene, START + ms * 1000, b) for ms, b in boxes]


@pytest.mark.parametrize(
    ("seen", "delay"),
    [
        (frames((200, one(12.0))), 0.0),
        (frames((200, one(90.0)), (500, one(15.0))), 0.3),
        (frames((700, one(17.0)), (300, one(13.0))), 0.1),
        (frames((701, one(17.0))), None),  # too late
        (frames((100, one(11.0))), None),  # before it appears
        (frames((500, one(15.0, 2.0))), None),  # 2 m aside
        (frames((500, one(15.0, 1.99))), 0.3),
        (frames((500, one(15.0, label=8))), None),  # another class
        (frames((500, one(15.0, score=0.2))), None),  # not sure enough
        (frames((500, one(15.0)), scene="b"), None),
        ([], None),
    ],
)
def test_found_in_time_at_the_place_and_in_its_class(seen: list[Frame], delay: float | None) -> None:
    found = sudden_recall([EVENT], TRACK, seen, min_score=0.3)
    assert found.delays == (pytest.approx(delay),)
    assert found.recall == (delay is not None)


def test_latency_counts_and_unseen_events_are_missed() -> None:
    seen = frames((500, one(15.0)))
    assert sudden_recall([EVENT], TRACK, seen, min_score=0.3, latency=lambda f: 0.19).delays == (pytest.approx(0.49),)
    late = sudden_recall([EVENT], TRACK, seen, min_score=0.3, latency=lambda f: 0.21)
    assert (late.found, late.unseen) == (0, 1)
    assert sudden_recall([EVENT], TRACK, frames((500, one(90.0))), min_score=0.3).unseen == 0


def test_recall_over_events_with_its_exact_interval() -> None:
    gone = Event("a", "i", START + 2_000_000)
    found = sudden_recall([EVENT] * 3 + [gone], TRACK, frames((500, one(15.0))), min_score=0.3)
    assert (found.found, found.unseen, found.recall) == (3, 1, 0.75)
    assert found.interval == pytest.approx((0.19412, 0.99369), abs=1e-5)  # Clopper-Pearson for 3 of 4
    none = sudden_recall([], TRACK, [], min_score=0.3)
    assert np.isnan(none.recall)
    assert none.interval == (0.0, 1.0)
    with pytest.raises(InputError, match="'j' has no boxes"):
        sudden_recall([Event("a", "j", START)], TRACK, [], min_score=0.3)


def test_tracks_and_event_frames_of_a_folder(tmp_path: Path) -> None:
    data = NuScenes(small_folder(tmp_path, scenes=2))
    tokens = split_tokens(data, "all")
    walker = token("instance", 0, 2)
    event = Event("small-0", walker, START + 500_000)
    track = tracks(data, [walker], tokens)[walker]
    np.testing.assert_allclose(track.at(START + 250_000), [9.0, 3.75, 0.9], atol=1e-9)
    assert track.at(START - 1) is None
    seen = [Frame("small-0", data.sample(t).timestamp, replace(data.truth(t), scores=np.ones(5))) for t in tokens[:4]]
    assert sudden_recall([event], {walker: track}, seen, min_score=0.5).recall == 1.0
    assert groups(data, tokens, [event], after=0.5)["event"] == set(tokens[1:3])


def test_events_are_read_and_refused_when_they_lead_nowhere(tmp_path: Path) -> None:
    data = NuScenes(small_folder(tmp_path))
    assert read_events(data) == []
    event = {"scene_token": token("scene", 0), "instance_token": token("instance", 0, 2), "timestamp": START}
    file = tmp_path / "v1.0-test/events.json"
    file.write_text(json.dumps([event | {"kind": "dart-out"}]))
    assert read_events(data) == [Event("small-0", token("instance", 0, 2), START)]
    for change, why in (
        ({"instance_token": "gone"}, "event 0: token 'gone' is not in instance.json"),
        ({"timestamp": None}, "event 0: field 'timestamp' is None"),
    ):
        file.write_text(json.dumps([event | change]))
        with pytest.raises(InputError, match=why):
            read_events(data)
