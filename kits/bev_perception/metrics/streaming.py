"""Streaming accuracy: at any time only that answer counts which is ready, and the world has moved on since its frame.

Source: Li, Wang and Ramanan, "Towards Streaming Perception", ECCV 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from core.kit import InputError
from kits.bev_perception.data.boxes import Boxes

Latency = Callable[[int], float]


@dataclass(frozen=True)
class Frame:
    """One answer of the detector: scene, time of the frame in microseconds, boxes in the global frame."""

    scene: str
    timestamp: int
    boxes: Boxes


@dataclass(frozen=True)
class Answer:
    """When frame number `frame` of a list was begun and when its answer was ready, in seconds of the frames' clock."""

    frame: int
    begun: float
    ready: float


def schedule(times: Sequence[float], latency: Latency) -> list[Answer]:
    """What one busy detector makes of frames that arrive at rising `times` (s) of one scene.

    It takes the newest frame there is when it becomes free, or waits for the next; frames in between are dropped.
    `latency(i)` is how long frame i takes, in seconds. Raises ValueError for times that do not rise, and for a
    latency that is negative or not finite.
    """
    if any(later <= earlier for earlier, later in zip(times, times[1:])):
        raise ValueError("times of the frames must rise")
    answers: list[Answer] = []
    free, last = -np.inf, -1
    while last + 1 < len(times):
        newest = int(np.searchsorted(times, free, side="right")) - 1
        frame = max(newest, last + 1)
        begun = max(free, times[frame])
        seconds = latency(frame)
        if not 0 <= seconds < np.inf:
            raise ValueError(f"latency of frame {frame} is {seconds} s, expected 0 or more")
        answers.append(Answer(frame, float(begun), float(begun + seconds)))
        free, last = begun + seconds, frame
    return answers


def streamed(
    frames: Sequence[Frame],
    latencies: Sequence[float],
    samples: Mapping[str, tuple[str, int]],
    *,
    forecast: bool = False,
) -> dict[str, Boxes]:
    """The newest answer that is ready at the time of each sample, ready for `nds.match`.

    `latencies[i]` are seconds from the begin of frame i to its boxes, `samples` gives scene and time (microseconds) by
    sample token. Nothing is ready at a scene's start: no boxes. With `forecast` the boxes move on at their velocities
    from the frame's time to the sample's. Raises InputError where frames and latencies differ in number.
    """
    if len(frames) != len(latencies):
        raise InputError(f"{len(latencies)} latencies for {len(frames)} frames; give one for each")
    ready: dict[str, list[tuple[int, Frame]]] = {}
    for scene in dict.fromkeys(frame.scene for frame in frames):
        mine = sorted((i for i, f in enumerate(frames) if f.scene == scene), key=lambda i: frames[i].timestamp)
        ready[scene] = _answers([frames[i] for i in mine], [latencies[i] for i in mine])
    found = {}
    for token, (scene, now) in samples.items():
        done = [frame for at, frame in ready.get(scene, []) if at <= now]
        boxes = done[-1].boxes if done else Boxes.none()
        found[token] = boxes.after((now - done[-1].timestamp) * 1e-6) if forecast and done else boxes
    return found


def _answers(frames: Sequence[Frame], latencies: Sequence[float]) -> list[tuple[int, Frame]]:
    """(time when ready in microseconds, frame) of one scene's frames in the order of time."""
    start = frames[0].timestamp
    # Counted from the scene's start: microseconds since 1970, as seconds, would lose digits.
    answers = schedule([(frame.timestamp - start) * 1e-6 for frame in frames], lambda k: latencies[k])
    return [(start + round(answer.ready * 1e6), frames[answer.frame]) for answer in answers]
