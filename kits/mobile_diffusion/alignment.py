"""Does a picture show what its prompt asks for? Decided by image processing, in the manner of GenEval.

Things are found as patches of a palette colour, their outlines by unmixing each pixel into the thing's colour and the
ground's, their shapes by the template that overlaps best. No learned judge takes part. Source of the manner: Ghosh et
al., GenEval, arXiv:2310.11513.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from core.evaluation.intervals import clopper_pearson
from core.kit import InputError
from kits.mobile_diffusion.data.backgrounds import BACKGROUNDS, VARIANTS, backdrop
from kits.mobile_diffusion.data.captions import Group, Wanted
from kits.mobile_diffusion.data.scenes import RADII, SIZE
from kits.mobile_diffusion.data.sprites import AREAS, COLOURS, PALETTE, SHAPES, cover

DEMANDS = ("objects", "colours", "counts", "relation", "background", "size", "all")
MIN_CORE = 9  # pixels of one colour, edges worn off, that make a thing; the smallest drawn thing has 20
MIN_AREA = 40.0  # square pixels with edges; the smallest drawn thing has 76
MIN_LIKENESS = 0.93  # Dice's coefficient with the best template, drawn things reach 0.97; below, a thing has no shape
MAX_BACKGROUND_ERROR = 30.0  # RMS levels from the nearest ground's mean painting; beyond, it is none of them
BESIDE = 4.0  # pixels by which one thing's centre must lie beyond the other's
_SMALL = (max(RADII["small"]) + min(RADII[""])) / 2
_LARGE = (max(RADII[""]) + min(RADII["large"])) / 2

Mask = NDArray[np.bool_]
Picture = NDArray[np.float32]


@dataclass(frozen=True)
class Found:
    """A thing in a picture: shape ("" where none fits), colour, centre (x, y) and radius in pixels of 64."""

    shape: str
    colour: str
    centre: tuple[float, float]
    radius: float

    @property
    def size(self) -> str:
        """ "small", "large" or "" between the two."""
        return "small" if self.radius < _SMALL else "large" if self.radius > _LARGE else ""


@dataclass(frozen=True)
class Rate:
    """How many of how many were met, with the exact 95 % interval of the rate, (low, high) in 0..1."""

    met: int
    asked: int

    @property
    def value(self) -> float:
        """The share met, in 0..1; of none asked, 0."""
        return self.met / self.asked if self.asked else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Clopper and Pearson's interval."""
        return clopper_pearson(self.met, self.asked)


def judge_image(image: NDArray[np.uint8], wanted: Wanted) -> dict[str, bool]:
    """Which demands a picture meets: those of DEMANDS that `wanted` makes, and "all".

    `image` is uint8 RGB (side, side, 3); sides other than 64 are resized. "objects": every shape asked for is there;
    "colours": in its colour; "counts": as often as asked, and nothing else beside. Raises InputError for other arrays.
    """
    return judge_things(find_things(image), find_background(image) if wanted.background else "", wanted)


def judge_things(found: Sequence[Found], background: str, wanted: Wanted) -> dict[str, bool]:
    """As `judge_image`, for a picture whose things and ground have been found already."""
    verdict = {
        "objects": _enough(found, wanted.groups, colours=False),
        "colours": _enough(found, wanted.groups, colours=True),
        "counts": _exact(found, wanted.groups),
    }
    if wanted.relation:
        verdict["relation"] = _related(found, wanted)
    if wanted.background:
        verdict["background"] = background == wanted.background
    if any(group.size for group in wanted.groups):
        verdict["size"] = _sized(found, wanted.groups)
    return {**verdict, "all": all(verdict.values())}


def summary(verdicts: Sequence[Mapping[str, bool]], kinds: Sequence[str] | None = None) -> dict[str, Rate]:
    """The rate of each demand over the pictures that make it; with `kinds`, one a picture, "all" of each kind too.

    Keys are those of DEMANDS and "kind/<kind>". Raises ValueError where the lengths differ.
    """
    rates = {d: _rate(v[d] for v in verdicts if d in v) for d in DEMANDS}
    if kinds is not None:
        pairs = list(zip(kinds, verdicts, strict=True))
        for kind in dict.fromkeys(kinds):
            rates[f"kind/{kind}"] = _rate(v["all"] for k, v in pairs if k == kind)
    return {name: rate for name, rate in rates.items() if rate.asked}


def find_things(image: NDArray[np.uint8]) -> list[Found]:
    """The coloured things of a picture, uint8 RGB (side, side, 3), the largest first."""
    pixels = _pixels(image)
    smooth = cv2.GaussianBlur(pixels, (0, 0), 0.6).astype(np.float32)
    classes = _classes(pixels)
    ground = _ground(smooth, classes < len(COLOURS))
    cores = sorted(_cores(classes), key=lambda core: -int(core[1].sum()))
    taken = np.zeros((SIZE, SIZE), bool)
    found = []
    for colour, core in cores:
        # The blurred rim of a thing may look like another colour; what lies on a thing already found is its rim.
        rest = core & ~taken
        if rest.sum() < max(MIN_CORE, 0.6 * core.sum()):
            continue
        share, outline = _share(smooth, ground, core, taken)
        if outline.sum() < MIN_AREA:
            continue
        taken |= _grown(outline, 3)
        found.append(_described(share, COLOURS[colour]))
    return found


def find_background(image: NDArray[np.uint8]) -> str:
    """The ground of a picture, one of BACKGROUNDS, or "" where it looks like none of them."""
    pixels = _pixels(image)
    things = (_classes(pixels) < len(COLOURS)).astype(np.uint8)
    free = cv2.dilate(cv2.erode(things, np.ones((2, 2), np.uint8)), np.ones((9, 9), np.uint8)) == 0
    if free.sum() < SIZE:
        return ""
    errors = np.sqrt(((pixels[free] - _mean_backdrops()[:, free]) ** 2).mean((1, 2)))
    best = int(errors.argmin())
    return BACKGROUNDS[best] if errors[best] <= MAX_BACKGROUND_ERROR else ""


def _pixels(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.shape[0] != image.shape[1]:
        raise InputError(
            f"picture of {image.dtype} {image.shape}, expected uint8 RGB (side, side, 3); crop it to a square first"
        )
    if image.shape[0] == SIZE:
        return image
    way = cv2.INTER_AREA if image.shape[0] > SIZE else cv2.INTER_CUBIC
    return cv2.resize(image, (SIZE, SIZE), interpolation=way).astype(np.uint8)


@cache
def _table() -> NDArray[np.uint8]:
    """The class of every colour in 5 bits a channel, (32, 32, 32): a palette colour's number, or 255 for a ground."""
    samples: list[NDArray[np.floating]] = []
    labels: list[NDArray[np.int64]] = []
    for number, colour in enumerate(COLOURS):
        for light in (0.72, 0.86, 0.93, 1.0, 1.07, 1.14):
            samples.append(np.clip(np.array(PALETTE[colour]) * light, 0, 255)[None])
            labels.append(np.array([number]))
    for name in BACKGROUNDS:
        painted = np.concatenate(
            [backdrop(name, variant)[::2, ::2].reshape(-1, 3) for variant in range(0, VARIANTS, 4)]
        )
        for shade in (1.0, 0.85, 0.72):
            binned = np.unique((painted * shade / 8).astype(np.int64), axis=0) * 8.0 + 4
            samples.append(binned)
            labels.append(np.full(len(binned), 255))
    axis = np.arange(32) * 8.0 + 4
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    _, nearest = cKDTree(_lab(np.concatenate(samples))).query(_lab(grid))
    return np.concatenate(labels)[nearest].astype(np.uint8).reshape(32, 32, 32)


def _lab(rgb: NDArray[np.floating]) -> NDArray[np.float32]:
    return cv2.cvtColor((rgb / 255).astype(np.float32)[None], cv2.COLOR_RGB2LAB)[0].astype(np.float32)


def _classes(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The class of every pixel, (64, 64); a median first, so that noise does not make single wrong pixels."""
    bins = cv2.medianBlur(pixels, 3).astype(np.uint8) >> 3
    return _table()[bins[..., 0], bins[..., 1], bins[..., 2]]


def _cores(classes: NDArray[np.uint8]) -> list[tuple[int, Mask]]:
    """Connected patches of each palette colour with rims of up to two pixels worn off, as (colour's number, mask)."""
    cores = []
    for number in np.unique(classes[classes < len(COLOURS)]):
        worn = cv2.morphologyEx((classes == number).astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
        count, labels = cv2.connectedComponents(worn, connectivity=4)
        masks = [labels == label for label in range(1, count)]
        cores += [(int(number), mask) for mask in masks if mask.sum() >= MIN_CORE]
    return cores


def _ground(smooth: Picture, things: Mask) -> Picture:
    """What the picture would show without its things: the ground around each, spread over it."""
    free = cv2.dilate(things.astype(np.uint8), np.ones((5, 5), np.uint8)) == 0
    weight = free.astype(np.float32)
    near = cv2.GaussianBlur(weight, (0, 0), 5)[..., None]
    spread = cv2.GaussianBlur(smooth * weight[..., None], (0, 0), 5)
    everywhere = smooth[free].mean(0) if free.any() else smooth.mean((0, 1))
    filled = (spread + 1e-3 * everywhere) / (near + 1e-3)
    return filled.astype(np.float32)


def _share(smooth: Picture, ground: Picture, core: Mask, taken: Mask) -> tuple[Picture, Mask]:
    """How much of each pixel is the core's thing, in 0..1, and where it is more than half and hangs together."""
    span = np.median(smooth[core], axis=0) - ground
    reach = np.sqrt((span**2).sum(-1)) + 1e-3
    offset = smooth - ground
    share = (offset * span).sum(-1) / reach**2
    aside = np.sqrt(((offset - share[..., None] * span) ** 2).sum(-1))
    # A rim lies on the line from the ground's colour to the thing's; a shadow or a neighbour lies beside it.
    share = np.clip(share, 0, 1) * np.clip(1.5 - 1.5 * (aside / (0.45 * reach + 8)) ** 2, 0, 1)
    share[taken] = 0
    _, labels = cv2.connectedComponents((share > 0.5).astype(np.uint8), connectivity=4)
    kept = np.unique(labels[core])
    outline = np.isin(labels, kept[kept > 0])
    return np.where(_grown(outline, 5), share, 0).astype(np.float32), outline


def _grown(mask: Mask, side: int) -> Mask:
    return cv2.dilate(mask.astype(np.uint8), np.ones((side, side), np.uint8)).astype(bool)


def _described(share: Picture, colour: str) -> Found:
    """The shape whose template, at the share's area, is most like it, with centre and radius."""
    area = float(share.sum())
    rows, columns, steps = share.sum(1), share.sum(0), np.arange(SIZE) + 0.5
    # Templates are compared about the centre of mass: the box's centre jumps with a single stray pixel.
    x, y = float(columns @ steps) / area, float(rows @ steps) / area
    shift = np.array([[1, 0, SIZE / 2 - x], [0, 1, SIZE / 2 - y]], np.float32)
    centred = cv2.warpAffine(share, shift, (SIZE, SIZE)).ravel()
    likeness = {}
    for shape in SHAPES:
        templates = _templates(shape, _half_step(np.sqrt(area / AREAS[shape])))
        # Dice's coefficient for shares: 1 where equal, 0 where nothing is in common.
        likeness[shape] = float((2 * templates @ centred / ((templates**2).sum(1) + centred @ centred)).max())
    best = max(likeness, key=lambda shape: likeness[shape])
    radius = float(np.sqrt(area / AREAS[best]))
    shape = best if likeness[best] >= MIN_LIKENESS else ""
    # A triangle's box has its centre a third of its half height above the centre of mass.
    return Found(shape, colour, (x, y - radius / 3 if best == "triangle" else y), radius)


def _half_step(radius: float) -> float:
    return float(np.clip(round(2 * radius) / 2, 2, 26))


@cache
def _templates(shape: str, radius: float) -> Picture:
    """A shape's shares at three radii and three blurs, its centre of mass in the middle, float32 (9, 64 * 64)."""
    templates = []
    for scale in (0.96, 1.0, 1.04):
        sharp = cover(shape, radius * scale, SIZE // 2)
        rows = sharp.sum(1)
        low = float((rows * (np.arange(SIZE) + 0.5)).sum() / rows.sum()) - SIZE / 2
        centred = cv2.warpAffine(sharp, np.array([[1, 0, 0], [0, 1, -low]], np.float32), (SIZE, SIZE))
        templates += [cv2.GaussianBlur(centred, (0, 0), sigma).ravel() for sigma in (0.6, 1.0, 1.5)]
    return np.stack(templates).astype(np.float32)


@cache
def _mean_backdrops() -> Picture:
    """The mean painting of every ground, float32 (grounds, 64, 64, 3)."""
    means = [np.mean([backdrop(name, variant) for variant in range(VARIANTS)], axis=0) for name in BACKGROUNDS]
    return np.stack(means).astype(np.float32)


def _enough(found: Sequence[Found], groups: Sequence[Group], colours: bool) -> bool:
    """Whether each group's shape (and colour) is found, in as many things as there are such groups."""
    have = Counter((t.shape, t.colour if colours else "") for t in found)
    need = Counter((g.shape, g.colour if colours else "") for g in groups)
    return need <= have


def _exact(found: Sequence[Found], groups: Sequence[Group]) -> bool:
    have = Counter((thing.shape, thing.colour) for thing in found)
    need: Counter[tuple[str, str]] = Counter()
    for group in groups:
        need[group.shape, group.colour] += group.count
    return have == need


def _matches(found: Sequence[Found], group: Group) -> list[Found]:
    return [thing for thing in found if (thing.shape, thing.colour) == (group.shape, group.colour)]


def _related(found: Sequence[Found], wanted: Wanted) -> bool:
    """Whether every thing of the first group stands to every one of the second as asked, and no other way more so."""
    firsts, seconds = (_matches(found, group) for group in wanted.groups[:2])
    if not firsts or not seconds:
        return False
    axis = 0 if wanted.relation in ("left of", "right of") else 1
    sign = 1 if wanted.relation in ("left of", "above") else -1
    for first in firsts:
        for second in seconds:
            along = sign * (second.centre[axis] - first.centre[axis])
            across = abs(second.centre[1 - axis] - first.centre[1 - axis])
            if along < BESIDE or across > along:
                return False
    return True


def _sized(found: Sequence[Found], groups: Sequence[Group]) -> bool:
    """Whether everything of a sized group is there and of its size."""
    for group in groups:
        things = _matches(found, group)
        if group.size and (not things or any(thing.size != group.size for thing in things)):
            return False
    return True


def _rate(outcomes: Iterable[bool]) -> Rate:
    met = list(outcomes)
    return Rate(sum(met), len(met))
