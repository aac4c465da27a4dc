"""What training takes: scenes as streams of varied frames, so that every frame has the history a drive gives it.

A batch has B lanes; a lane shows one piece of a scene after the other, frame by frame, each varied in one way from its
first frame to its last: mirrored, turned, zoomed, its colours changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from kits.bev_perception.data.geometry import Array
from kits.bev_perception.data.keyframes import Keyframe, in_scenes
from kits.bev_perception.data.recordings import Views
from kits.bev_perception.model.configs import CAMERAS, Config
from kits.bev_perception.model.learner import Batch, View
from kits.bev_perception.model.loss import Truth
from kits.bev_perception.scenes import network_images

MIRRORED = (0, 2, 1, 3, 5, 4)
"""Which camera a mirrored one stands for, in the order of `configs.CAMERAS`."""


@dataclass(frozen=True)
class Variation:
    """How a scene is shown: `mirror` left for right, the grid turned by `turn` radians, pictures `zoom` times as large
    about their middle, brightness and contrast times these.
    """

    mirror: bool = False
    turn: float = 0.0
    zoom: float = 1.0
    brightness: float = 1.0
    contrast: float = 1.0

    @staticmethod
    def drawn(rng: np.random.Generator) -> Variation:
        """One at random."""
        return Variation(
            bool(rng.random() < 0.5),
            float(rng.uniform(-0.35, 0.35)),
            float(rng.uniform(0.94, 1.12)),
            float(rng.uniform(0.8, 1.25)),
            float(rng.uniform(0.8, 1.2)),
        )


AS_IT_IS = Variation()
PIECE = 6
"""Frames of a scene that training shows one after the other: frames that follow each other are much alike."""


@dataclass(frozen=True)
class Shot:
    """One keyframe as a lane shows it; `first` where its history begins."""

    keyframe: Keyframe
    before: Keyframe | None
    variation: Variation


def streams(samples: Sequence[Keyframe], lanes: int, seed: int, *, train: bool) -> Iterator[list[Shot]]:
    """Rows of `lanes` shots: with `train` pieces of at most PIECE frames in any order and varied, else whole scenes as
    they are.

    Every frame is shown once; towards the end lanes that have run out begin anew, so that all rows are full.
    """
    rng = np.random.default_rng(seed)
    scenes: list[Sequence[Keyframe]] = list(in_scenes(samples))
    if train:
        scenes = [piece for scene in scenes for piece in _pieces(scene, rng)]
    order = [int(i) for i in (rng.permutation(len(scenes)) if train else range(len(scenes)))]
    waiting = iter(order)
    left = len(samples)
    shown: list[Iterator[Shot]] = [iter(())] * lanes
    while left > 0:
        row = []
        for lane in range(lanes):
            shot = next(shown[lane], None)
            if shot is None:
                number = next(waiting, None)
                if number is None:
                    number = int(rng.integers(len(scenes)))
                scene, variation = scenes[number], Variation.drawn(rng) if train else AS_IT_IS
                shown[lane] = iter([Shot(k, scene[i - 1] if i else None, variation) for i, k in enumerate(scene)])
                shot = next(shown[lane])
            row.append(shot)
        left -= lanes
        yield row


def _pieces(scene: Sequence[Keyframe], rng: np.random.Generator) -> list[Sequence[Keyframe]]:
    """A scene cut every PIECE frames, from a drawn place on."""
    cuts = [0, *range(int(rng.integers(1, PIECE + 1)), len(scene), PIECE), len(scene)]
    return [scene[a:b] for a, b in zip(cuts, cuts[1:])]


def with_past(samples: Sequence[Keyframe], variations: Sequence[Variation], config: Config, depth: int = 1) -> Batch:
    """Keyframes as one batch, each with the `depth` frames before it, so that they can be in any order.

    Where a scene has begun later, its first frame stands in for what was before, and is forgotten.
    """
    rows: list[list[Shot]] = [[] for _ in range(depth + 1)]
    for sample, variation in zip(samples, variations, strict=True):
        chain = [sample]
        while len(chain) <= depth and (before := chain[-1].before) is not None:
            chain.append(before)
        for age, row in enumerate(rows):
            row.append(
                Shot(chain[min(age, len(chain) - 1)], chain[age + 1] if age + 1 < len(chain) else None, variation)
            )
    collated = [collate(row, config) for row in rows]
    view, truths = collated[0]
    return Batch(view, truths, [past for past, _ in reversed(collated[1:])])


@lru_cache(maxsize=8192)
def _known(keyframe: Keyframe, pc_range: tuple[float, ...]) -> tuple[Truth, Array]:
    """Truth and CAN bus of a keyframe: small, and slow to read."""
    return keyframe.truth(pc_range), keyframe.can_bus(keyframe.sample)


def boxes_of(shots: Sequence[Shot], config: Config) -> list[Truth]:
    """The boxes of shots, mirrored and turned with them."""
    return [_moved(_known(shot.keyframe, config.pc_range)[0], shot.variation, config) for shot in shots]


def collate(shots: Sequence[Shot], config: Config) -> tuple[View, list[Truth]]:
    """A batch of shots as the detector takes it, and its boxes."""
    images, matrices, motions, known, masks = [], [], [], [], []
    for shot in shots:
        _, can_bus = _known(shot.keyframe, config.pc_range)
        before = _known(shot.before, config.pc_range)[1] if shot.before is not None else None
        views, varied = shot.keyframe.views(config.images), shot.variation
        mirror, turn = _flip(varied), _turn(varied)
        seen, matrix = _pictures(views, varied)
        order = MIRRORED if varied.mirror else range(len(CAMERAS))
        images.append(network_images(Views(seen, views.inner, matrix, {}), config)[0, list(order)])
        matrices.append((matrix @ mirror @ turn.T)[list(order)])
        motions.append(_motion(can_bus, before, varied, config))
        known.append(float(before is not None))
        masks.append([float(CAMERAS[i] not in views.missing) for i in order])
    view = View(
        torch.stack(images),
        torch.from_numpy(np.stack(matrices)).float(),
        torch.from_numpy(np.stack(motions)).float(),
        torch.tensor(known),
        torch.tensor(masks),
    )
    return view, boxes_of(shots, config)


def _flip(varied: Variation) -> Array:
    """(4, 4): the LiDAR frame mirrored left for right."""
    return np.diag([-1.0 if varied.mirror else 1.0, 1.0, 1.0, 1.0])


def _turn(varied: Variation) -> Array:
    """(4, 4): points as seen from a frame that is turned counterclockwise by `turn`."""
    sin, cos = np.sin(varied.turn), np.cos(varied.turn)
    found = np.eye(4)
    found[:2, :2] = [[cos, sin], [-sin, cos]]
    return found


def _pictures(views: Views, varied: Variation) -> tuple[NDArray[np.uint8], Array]:
    """Pictures (6, H, W, 3), mirrored and zoomed, and their matrices (6, 4, 4)."""
    seen, matrices = views.images, views.lidar2img.copy()
    for i, (height, width) in enumerate(views.inner):
        move = np.array([[varied.zoom, 0.0, (1 - varied.zoom) * width / 2],
                         [0.0, varied.zoom, (1 - varied.zoom) * height / 2]])  # fmt: skip
        if varied.mirror:
            move[0] = [-move[0, 0], 0.0, width - move[0, 2]]
        full = np.eye(4)
        full[:2, :2], full[:2, 2] = move[:, :2], move[:, 2]
        matrices[i] = full @ matrices[i]
        if varied != AS_IT_IS and width:
            shape = (seen.shape[2], seen.shape[1])
            move = move + [[0, 0, (move[0, 0] - 1) / 2], [0, 0, (move[1, 1] - 1) / 2]]  # pixels' centres are whole here
            picture = cv2.warpAffine(seen[i], move, shape, borderMode=cv2.BORDER_REPLICATE)
            grey = float(picture.mean())
            seen[i] = np.clip(((picture - grey) * varied.contrast + grey) * varied.brightness, 0, 255)
    return seen, matrices


def _motion(can_bus: Array, before: Array | None, varied: Variation, config: Config) -> Array:
    """The 18 numbers as `BevState.step` gives them, of the mirrored and turned world."""
    found = can_bus.copy()
    if before is None:
        found[:3], found[17] = 0.0, 0.0
    else:
        found[:3] -= before[:3]
        turn = found[17] - before[17]
        found[17] = (turn + 180) % 360 - 180 if config.wrap_turn else turn
    if varied.mirror:  # the global frame mirrored at its x axis
        found[[1, 4, 6, 8, 10, 12, 14, 17]] *= -1
        found[16] = (-found[16]) % (2 * np.pi)
    found[16] = (found[16] + varied.turn) % (2 * np.pi)
    return found


def _moved(truth: Truth, varied: Variation, config: Config) -> Truth:
    """Boxes of the mirrored and turned world, those that left the grid left out."""
    boxes = truth.boxes.clone()
    if varied.mirror:
        # the network's yaw is -yaw - pi / 2; mirrored left for right a heading of yaw becomes pi - yaw
        boxes[:, 0] *= -1
        boxes[:, 7] *= -1
        boxes[:, 6] = -boxes[:, 6]
    sin, cos = float(np.sin(varied.turn)), float(np.cos(varied.turn))
    for x, y in ((0, 1), (7, 8)):
        a, b = boxes[:, x].clone(), boxes[:, y].clone()
        boxes[:, x], boxes[:, y] = cos * a + sin * b, cos * b - sin * a
    boxes[:, 6] += varied.turn
    low, high = boxes.new_tensor(config.pc_range[:3]), boxes.new_tensor(config.pc_range[3:])
    inside = ((boxes[:, :3] > low) & (boxes[:, :3] < high)).all(1)
    return Truth(boxes[inside], truth.labels[inside])
