"""Recall of sudden obstacles: is the thing that cut in or darted out found within half a second?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from core.evaluation.intervals import clopper_pearson
from core.kit import InputError
from kits.bev_perception.data.geometry import Array
from kits.bev_perception.metrics.streaming import Frame

WITHIN = 0.5  # s
RADIUS = 2.0  # m, the distance at which nuScenes scores errors


@dataclass(frozen=True)
class Event:
    """A sudden obstacle: its scene, the token of its instance, and when it appears, in microseconds."""

    scene: str
    instance: str
    timestamp: int


@dataclass(frozen=True)
class Track:
    """Where one instance is: label into CLASSES, times (n,) microseconds rising, centres (n, 3) in the global frame."""

    label: int
    times: Array
    centers: Array

    def at(self, timestamp: int) -> Array | None:
        """The centre (3,), straight between two annotations; None before the first and after the last."""
        if not self.times[0] <= timestamp <= self.times[-1]:
            return None
        # Counted from the first, so that no digits are lost.
        when = self.times - self.times[0]
        return np.array([np.interp(timestamp - self.times[0], when, column) for column in self.centers.T])


@dataclass(frozen=True)
class SuddenRecall:
    """How many events were found in time; `delays[i]` is the i-th event's time to its answer in s, None if missed.

    `interval` is the exact 95 % interval of the recall (Clopper and Pearson); no events give NaN and (0, 1).
    `unseen` counts the events in whose time no answer could have come: they are among the missed.
    """

    delays: tuple[float | None, ...]
    unseen: int
    interval: tuple[float, float]

    @property
    def found(self) -> int:
        """Events found in time."""
        return sum(delay is not None for delay in self.delays)

    @property
    def recall(self) -> float:
        """The share found in time, 0..1."""
        return self.found / len(self.delays) if self.delays else float("nan")


def sudden_recall(
    events: Sequence[Event],
    tracks: Mapping[str, Track],
    frames: Sequence[Frame],
    *,
    min_score: float,
    within: float = WITHIN,
    radius: float = RADIUS,
    latency: Callable[[Frame], float] = lambda frame: 0.0,
) -> SuddenRecall:
    """An event is found when an answer that is ready within `within` seconds of it holds the obstacle.

    Only frames from the event on count. A box counts if it has the obstacle's class, `min_score` or more, and its
    centre within `radius` metres of the obstacle seen from above, at the frame's own time. `latency` is the time in
    seconds from frame to answer. `tracks` is by instance. Raises InputError for an event without a track.
    """
    delays: list[float | None] = []
    unseen = 0
    for event in events:
        track = tracks.get(event.instance)
        if track is None:
            raise InputError(
                f"event in scene {event.scene}: instance {event.instance!r} has no boxes; mend the event list"
            )
        delay, possible = None, False
        for frame in frames:
            ready = (frame.timestamp - event.timestamp) * 1e-6 + latency(frame)
            if frame.scene != event.scene or frame.timestamp < event.timestamp or ready > within:
                continue
            center = track.at(frame.timestamp)
            if center is None:
                continue
            possible = True
            near = np.hypot(*(frame.boxes.centers[:, :2] - center[:2]).T) < radius
            if (near & (frame.boxes.labels == track.label) & (frame.boxes.scores >= min_score)).any():
                delay = ready if delay is None else min(delay, ready)
        delays.append(delay)
        unseen += not possible
    found = sum(delay is not None for delay in delays)
    return SuddenRecall(tuple(delays), unseen, clopper_pearson(found, len(events)))
