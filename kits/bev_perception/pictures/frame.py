"""The picture of one frame: six cameras in their usual places, the map from above, and what the colours mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import nn

from core.kit import InputError
from kits.bev_perception.data.boxes import Boxes
from kits.bev_perception.data.classes import CLASSES
from kits.bev_perception.data.geometry import Array, Pose, rotation_matrix
from kits.bev_perception.data.keyframes import Keyframe, in_scenes
from kits.bev_perception.data.recordings import Sample
from kits.bev_perception.model.configs import Config
from kits.bev_perception.pictures.cameras import panel
from kits.bev_perception.pictures.overhead import HEIGHTS, overhead, shades
from kits.bev_perception.pictures.paper import (
    BAD,
    DIM,
    INK,
    LINE,
    PALETTE,
    TRUTH,
    WARN,
    Paper,
    Picture,
    fill,
    line,
    outline,
    shortened,
    width_of,
)
from kits.bev_perception.scenes import Seen, config_of, known_truth, watch

THRESHOLD = 0.3
"""Score from which a prediction is drawn where nothing else is said."""
PLACES = (
    ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT"),
    ("CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT"),
)
CAMERA = 480, 270  # px of a camera's panel
EDGE, GAP, HEAD, FOOT = 14, 6, 54, 110
MAP = 2 * CAMERA[1] + GAP + FOOT
WIDTH = EDGE + 3 * CAMERA[0] + 2 * GAP + 10 + MAP + EDGE
HEIGHT = HEAD + MAP + EDGE
REPORT_WIDTH = 1500  # px of a picture in the report
WARM = 5  # frames of a scene that go before a picture in the report, so that the memory is that of a drive


@dataclass
class _Known:
    """What a frame's files tell, and in `doubts` what they do not."""

    sample: Sample | None = None
    sensor: Pose | None = None
    points: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 5), np.float32))
    truth: Boxes = field(default_factory=Boxes.none)
    doubts: list[str] = field(default_factory=list)


def frame_picture(seen: Seen, threshold: float = THRESHOLD, config: Config | None = None) -> Picture:
    """(HEIGHT, WIDTH, 3) RGB of one frame: predictions from `threshold` on, and the truth where there is one.

    `config` bounds the truth to what a detector can know; without it the grid is +-51.2 m. Whatever cannot be read is
    left out and named: a picture is made of every frame.
    """
    reach = config.pc_range if config is not None else (-51.2, -51.2, -5.0, 51.2, 51.2, 3.0)
    known = _known(seen.keyframe, reach)
    said = seen.boxes[seen.boxes.scores >= threshold]
    if known.sample is not None and known.sensor is not None:
        said = said.moved(known.sample.pose.inverse)
    paper = Paper(WIDTH, HEIGHT)
    for row, channels in enumerate(PLACES):
        for column, channel in enumerate(channels):
            place = (EDGE + column * (CAMERA[0] + GAP), HEAD + row * (CAMERA[1] + GAP), *CAMERA)
            picture, matrix = _camera(known, channel)
            name = channel.removeprefix("CAM_").replace("_", " ").lower()
            panel(paper, place, name, picture, matrix, said, known.truth)
    left = WIDTH - EDGE - MAP
    blind = [sight for channel in seen.missing if (sight := _sight(known.sample, channel)) is not None]
    overhead(paper, (left, HEAD, MAP), known.points, known.sensor, said, known.truth, blind)
    _head(paper, seen, left, len(said), len(known.truth))
    notes = [_short(note, known.sample) for note in (*seen.notes, *known.doubts)]
    _foot(paper, notes, said, threshold)
    return paper.finished()


def scene_strip(
    module: nn.Module,
    config: Config | None,
    samples: Sequence[Keyframe],
    threshold: float = THRESHOLD,
    shown: int = 3,
) -> list[dict[str, Any]]:
    """Pictures for the report, {"title", "png"}: a frame of each of some scenes, of every light first.

    A scene is watched from its first frame to the sixth, which is shown, or the last before it.
    """
    config = config_of(module, config)
    by_light: dict[str, list[list[Keyframe]]] = {}
    for run in in_scenes(samples):
        by_light.setdefault(light(run[0]), []).append(run)
    turns = [runs[i] for i in range(max(map(len, by_light.values()), default=0)) for runs in by_light.values()
             if i < len(runs)]  # fmt: skip
    pictures = []
    for run in turns[:shown]:
        seen = list(watch(module, run[: WARM + 1], config))[-1]
        picture = smaller(frame_picture(seen, threshold, config), REPORT_WIDTH)
        place = f"{seen.keyframe.scene}, {light(seen.keyframe)}, frame {seen.keyframe.index + 1}"
        title = f"{place}: solid predictions from {threshold:.3g}, thin green truth"
        pictures.append({"title": title, "png": png(picture)})
    return pictures


def light(keyframe: Keyframe) -> str:
    """ "day" or "night", with rain where the scene's description says so."""
    scene = keyframe.data.scenes[keyframe.scene]
    return ("night" if scene.night else "day") + (", rain" if scene.rain else "")


def smaller(picture: Picture, width: int) -> Picture:
    """The picture at most `width` wide."""
    if picture.shape[1] <= width:
        return picture
    size = (width, round(picture.shape[0] * width / picture.shape[1]))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)


def png(picture: Picture) -> bytes:
    """A picture (H, W, 3) RGB as PNG."""
    return bytes(cv2.imencode(".png", picture[:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 4])[1])


def _known(keyframe: Keyframe, reach: Sequence[float]) -> _Known:
    found = _Known()
    try:
        found.sample = keyframe.sample
        found.sensor = found.sample.lidar.sensor
        found.points = found.sample.lidar.points()
    except InputError as error:
        found.doubts.append(f"the map has no points: {error}")
    try:
        found.truth = known_truth(keyframe, reach)
    except InputError as error:
        found.doubts.append(f"the truth cannot be read: {error}")
    return found


def _camera(known: _Known, channel: str) -> tuple[Picture | str, Array | None]:
    """A camera's picture or why there is none, and its matrix where there is one."""
    if known.sample is None:
        return "the frame has no records", None
    try:
        if channel not in known.sample.recordings:
            return f"no {channel} keyframe in the tables", None
        picture = known.sample.recordings[channel].image()
    except InputError as error:
        return _short(str(error), known.sample), None
    try:
        return picture, known.sample.lidar2img(channel)
    except InputError:
        return picture, None


def _short(words: str, sample: Sample | None) -> str:
    """Words about a file without its token and path, for which a picture has no room."""
    for recording in sample.recordings.values() if sample is not None else ():
        words = words.replace(f"sample_data {recording.token!r}: {recording.path} ", "its file ")
    return words


def _sight(sample: Sample | None, channel: str) -> tuple[float, float, float, float] | None:
    """Where a camera stands and looks in the LiDAR's frame: x, y, heading and half its angle; None where not known."""
    found = sample.recordings.get(channel) if sample is not None else None
    if sample is None or found is None or found.intrinsic is None or "LIDAR_TOP" not in sample.recordings:
        return None
    camera = sample.pose.inverse @ found.ego @ found.sensor
    x, y, _ = rotation_matrix(camera.rotation) @ [0, 0, 1]
    half = float(np.arctan2(found.size[0] / 2, abs(found.intrinsic[0, 0]) or 1.0))
    return float(camera.translation[0]), float(camera.translation[1]), float(np.arctan2(y, x)), half


def _head(paper: Paper, seen: Seen, left: int, said: int, true: int) -> None:
    keyframe = seen.keyframe
    scene = keyframe.data.scenes[keyframe.scene]
    times = keyframe.data.tables["sample"]
    x = EDGE + paper.text(EDGE, 36, keyframe.scene, 24) + 14
    tone = light(keyframe)
    wide = round(width_of(tone, 15)) + 18
    paper.plate(round(x), 18, wide, 24, (70, 84, 140) if scene.night else (226, 176, 70), 0.9)
    paper.text(x + 9, 35, tone, 15, INK if scene.night else (24, 22, 14))
    x += wide + 16
    stamps = [times[token].get("timestamp") for token in (scene.samples[0], keyframe.token)]
    numbers = [float(s) for s in stamps if isinstance(s, int | float)]
    when = f"{(numbers[1] - numbers[0]) * 1e-6:.1f} s" if len(numbers) == 2 else "time not known"
    x += paper.text(x, 35, f"{when}    frame {keyframe.index + 1} of {len(scene.samples)}", 16) + 22
    paper.text(x, 35, shortened(scene.description, 14, left - 20 - x), 14, DIM)
    count = "left out: not seen by the detector" if seen.left_out else f"predictions  {said}"
    x = left + paper.text(left, 35, count, 16, BAD if seen.left_out else INK) + 22
    paper.text(x, 35, f"truth  {true}" if true else "no truth", 16, TRUTH if true else DIM)
    if not seen.left_out:
        paper.text(WIDTH - EDGE, 35, f"{seen.seconds * 1e3:.0f} ms from files to boxes", 14, DIM, "rs")


def _foot(paper: Paper, notes: Sequence[str], said: Boxes, threshold: float) -> None:
    top, right = HEAD + 2 * CAMERA[1] + GAP + 10, EDGE + 3 * CAMERA[0] + 2 * GAP
    counts = np.bincount(said.labels, minlength=len(CLASSES))
    x = float(EDGE)
    for name, colour, count in zip(CLASSES, PALETTE, counts):
        chip = np.array([[x, top + 4], [x + 15, top + 4], [x + 15, top + 17], [x, top + 17]])
        fill(paper.pixels, chip, colour, 0.35 if count else 0.12)
        outline(paper.pixels, chip, colour if count else LINE, 2 if count else 1)
        x += 22 + paper.text(x + 22, top + 16, name.replace("_", " "), 14, INK if count else DIM) + 6
        x += (paper.text(x, top + 16, str(count), 14, colour) if count else 0) + 16
    y = top + 43
    cell = np.array([[EDGE, y - 12], [EDGE + 26, y - 12], [EDGE + 26, y + 1], [EDGE, y + 1]], np.float64)
    outline(paper.pixels, cell, TRUTH)
    x = EDGE + 34 + paper.text(EDGE + 34, y, "truth", 14) + 24
    words = f"predictions from {threshold:.3g}: solid, front face filled; on the map a line points ahead"
    x += paper.text(x, y, words, 14) + 24
    tint = shades(np.linspace(*HEIGHTS, 120)).round().astype(np.uint8)
    paper.area(round(x), y - 11, 120, 11)[:] = tint
    paper.text(x + 128, y, f"LiDAR, {HEIGHTS[0]:g} to {HEIGHTS[1]:g} m above ground", 14)
    room = 2
    for i, note in enumerate(notes[:room]):
        last = f"   (and {len(notes) - room} more)" if i == room - 1 and len(notes) > room else ""
        y += 26
        line(paper.pixels, np.array([EDGE + 3.0, y - 12.0]), np.array([EDGE + 3.0, y + 2.0]), WARN, 3)
        paper.text(EDGE + 14, y, shortened(note, 14, right - EDGE - 20 - width_of(last, 14)) + last, 14, WARN)
    if not notes:
        paper.text(EDGE, y + 26, "no notes: all cameras and the memory are there", 14, DIM)
