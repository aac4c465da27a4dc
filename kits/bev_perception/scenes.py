"""A detector on keyframes in the order of time: pictures in, boxes of the world out, its memory kept, its doubts told.

The detector is any module that is called as `BEVFormer.forward` is, a network in torch or an artifact's.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from core.kit import InputError
from kits.bev_perception.data.boxes import Boxes
from kits.bev_perception.data.classes import CAMERAS
from kits.bev_perception.data.keyframes import Keyframe, in_scenes, to_global
from kits.bev_perception.data.recordings import Views
from kits.bev_perception.metrics.results import with_attributes
from kits.bev_perception.model.boxes import Detections, detections
from kits.bev_perception.model.configs import Config
from kits.bev_perception.model.state import BevState

RUN = 8
"""Keyframes that follow each other where a few are to stand for many, as in calibration."""


@dataclass(frozen=True)
class Seen:
    """What the detector made of one keyframe.

    `detections` are in the LiDAR's frame with the network's yaw, `boxes` the same in the global frame with attributes,
    both in the order of the score. `notes` say what went wrong, `missing` why a camera is missing by channel;
    `seconds` are from the files to the boxes. With `left_out` the detector never saw the frame: it has no boxes.
    """

    keyframe: Keyframe
    detections: Detections
    boxes: Boxes
    notes: tuple[str, ...]
    missing: Mapping[str, str]
    seconds: float
    left_out: bool = False


def config_of(module: nn.Module, config: Config | None = None) -> Config:
    """The config given, else the module's own; InputError where there is neither."""
    found = config if config is not None else getattr(module, "config", None)
    if not isinstance(found, Config):
        raise InputError(f"{type(module).__name__}: has no config of a detector; give one, such as configs.NANO")
    return found


def watch(module: nn.Module, samples: Sequence[Keyframe], config: Config | None = None) -> Iterator[Seen]:
    """What the detector makes of the keyframes, in their order.

    Each run of keyframes that follow each other in a scene has a memory of its own. A frame that lacks some cameras is
    seen without them; one that lacks all of them, its pose or its records is left out with a note. Neither touches the
    memory.
    """
    config = config_of(module, config)
    weight = next(module.parameters(), None)
    device = torch.device("cpu") if weight is None else weight.device
    for run in in_scenes(samples):
        state, begun = BevState(config, device=device), False
        for keyframe in run:
            with _evaluating(module):
                seen = _look(module, keyframe, config, state, begun)
            begun |= not seen.left_out
            yield seen


def recorded(
    samples: Sequence[Keyframe], count: int, seed: int, config: Config
) -> Generator[tuple[Tensor, ...], tuple[Tensor, ...], None]:
    """The detector's inputs for `count` keyframes, or as many as there are, in runs of `RUN` from drawn places.

    What the detector returned for them is to be sent back: its memory is that of the next frame.
    """
    rng, runs = np.random.default_rng(seed), in_scenes(samples)
    for _ in range(-(-min(count, len(samples)) // RUN)):
        run = runs[int(rng.integers(len(runs)))]
        first = int(rng.integers(max(1, len(run) - RUN + 1)))
        state = BevState(config)
        for keyframe in run[first : first + RUN]:
            views = keyframe.views(config.images)
            step = state.step(keyframe.frame(views))
            found = yield network_images(views, config), torch.from_numpy(views.lidar2img).float()[None], *step.inputs
            state.keep(found[2])


def predictions(seen: Iterable[Seen]) -> dict[str, Boxes]:
    """Boxes by sample token, as `metrics.nds.score` and `metrics.results.write_results` take them."""
    return {each.keyframe.token: each.boxes for each in seen}


def network_images(views: Views, config: Config) -> Tensor:
    """(1, 6, 3, H, W): normalised, the channels in the order of the config."""
    images = config.images
    if images.channels == "bgr":
        views = replace(views, images=views.images[..., ::-1])
    return torch.from_numpy(views.normalised(images.mean, images.std))[None]


def _look(module: nn.Module, keyframe: Keyframe, config: Config, state: BevState, begun: bool) -> Seen:
    started = time.perf_counter()
    try:
        sample = keyframe.sample
        views = sample.views((config.images.height, config.images.width))
        notes = [f"camera {channel} is missing: {why}" for channel, why in views.missing.items()]
        if len(views.missing) == len(CAMERAS):
            return _left_out(keyframe, ["no camera came: the frame is left out", *notes], views.missing, started)
        step = state.step(keyframe.frame(views))
    except InputError as error:
        return _left_out(keyframe, [f"the frame is left out: {error}"], {}, started)
    if step.reset and begun:
        notes.append(f"the memory begins anew: {step.reset}")
    notes += [note for note in step.notes if not note.startswith("camera ")]
    images = network_images(views, config).to(state.device)
    lidar2img = torch.from_numpy(views.lidar2img).float()[None].to(state.device)
    with torch.no_grad():
        cls_scores, bbox_preds, bev = module(images, lidar2img, *step.inputs)
    state.keep(bev)
    found, dropped = _finite(cls_scores[0].float().cpu(), bbox_preds[0].float().cpu(), config)
    if dropped:
        notes.append(f"{dropped} boxes of the network were not finite and are left out")
    boxes = with_attributes(to_global(found.boxes, found.scores, found.labels, sample))
    return Seen(keyframe, found, boxes, tuple(notes), dict(views.missing), time.perf_counter() - started)


def _left_out(keyframe: Keyframe, notes: list[str], missing: Mapping[str, str], started: float) -> Seen:
    nothing = Detections(torch.zeros(0, 9), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    seconds = time.perf_counter() - started
    return Seen(keyframe, nothing, Boxes.none(), tuple(notes), dict(missing), seconds, left_out=True)


def _finite(cls_scores: Tensor, bbox_preds: Tensor, config: Config) -> tuple[Detections, int]:
    """The detections of logits (O, K) and codes (O, 10) that a results file can hold, and how many it cannot."""
    whole = cls_scores.isfinite().all(1) & bbox_preds.isfinite().all(1)
    found = detections(cls_scores[whole], bbox_preds[whole], config)
    sound = found.boxes.isfinite().all(1) & (found.boxes[:, 3:6] > 0).all(1)
    dropped = int((~whole).sum()) + int((~sound).sum())
    return Detections(found.boxes[sound], found.scores[sound], found.labels[sound]), dropped


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """The module in eval mode, and then every part of it as it was."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def known_truth(keyframe: Keyframe, pc_range: Sequence[float]) -> Boxes:
    """The boxes that a detector can know, in the LiDAR's frame: see `Keyframe.truth`."""
    found = keyframe.data.annotations(keyframe.token).boxes
    found = found[found.num_pts != 0].moved(keyframe.sample.pose.inverse)
    low, high = np.array(pc_range[:3]), np.array(pc_range[3:])
    return found[np.flatnonzero(((found.centers > low) & (found.centers < high)).all(axis=1))]
