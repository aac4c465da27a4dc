"""Captioned scenes of 64x64 pixels: coloured shapes on plain or painted backgrounds, drawn from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from kits.mobile_diffusion.data.backgrounds import BACKGROUNDS, VARIANTS, backdrop
from kits.mobile_diffusion.data.sprites import COLOURS, SHAPES, half_box, sprite

SIZE = 64
KINDS = ("single", "two", "count", "relation", "background", "size")
RELATIONS = ("left of", "right of", "above", "below")
# Radii in pixels. Half a step of AE blur or noise must not turn one size into the next, hence the gaps between them.
RADII = {"small": (7.5,), "": (9.5,), "large": (12.5,)}
LATTICE = 4  # pixels: things stand on multiples of it, so that a model of 8x8 latents meets each thing in four places
# Where things stand, (x, y) in the order of their names, before each moves by up to LOOSE steps of the lattice. Loose,
# but not anywhere: what stands where is then nearly told by the caption, and a small model learns it.
PLACES = {
    1: ((32, 32),),
    2: ((16, 32), (48, 32)),
    3: ((32, 16), (16, 48), (48, 48)),
    4: ((16, 16), (48, 16), (16, 48), (48, 48)),
}
LOOSE = {1: 2, 2: 1, 3: 1, 4: 1}
GAP = 3  # pixels between two things' boxes, so that a blurred pair does not melt into one
MARGIN = 1  # pixels between a thing's box and the picture's edge
_SALT = "fitkit scenes 1"

_ARTICLE = {colour: "an" if colour[0] in "aeiou" else "a" for colour in COLOURS}
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
PLURALS = {shape: "crosses" if shape == "cross" else shape + "s" for shape in SHAPES}
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
BACKGROUND_WORDS = {
    "white": ("on a white background", "on white"),
    "black": ("on a black background", "on black"),
    "grey": ("on a grey background", "on grey"),
    "meadow": ("on a meadow", "in a meadow"),
    "sea": ("at the sea", "by the sea"),
    "night sky": ("in the night sky", "at night"),
    "sunset": ("at sunset", "in front of a sunset"),
}


@dataclass(frozen=True)
class Thing:
    """One object: shape, colour, size ("small", "" or "large"), centre (x, y) and radius in pixels."""

    shape: str
    colour: str
    size: str = ""
    centre: tuple[int, int] = (SIZE // 2, SIZE // 2)
    radius: float = 9.0


@dataclass(frozen=True)
class Scene:
    """What a picture shows and how it is called; `relation` is that of the first thing to the second, or ""."""

    background: str
    things: tuple[Thing, ...]
    relation: str
    kind: str
    caption: str
    variant: int = 0


@dataclass(frozen=True)
class _Plan:
    """A composition before places and words: what the held-out rule judges."""

    kind: str
    background: str
    named: bool  # whether the caption names the background
    count: int
    looks: tuple[tuple[str, str, str], ...]  # (size, colour, shape), one a group of equal things
    relation: str


def sample_scene(rng: np.random.Generator, kind: str | None = None, held_out: bool = False) -> Scene:
    """A scene of a kind (None: any), of a training composition or of one that training never sees.

    Raises ValueError where the kind is not one of KINDS.
    """
    kind = KINDS[int(rng.integers(len(KINDS)))] if kind is None else kind
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not known; known are {', '.join(KINDS)}")
    while True:
        plan = _plan(rng, kind)
        keys = _keys(plan)
        # Held out means that what the kind asks about is new; for training, that nothing at all in the picture is.
        if held_out and not any(_is_held_out(key) for key in keys if key.startswith(_MAIN_KEY[kind])):
            continue
        if not held_out and any(_is_held_out(key) for key in keys):
            continue
        if things := _place(rng, plan):
            caption = _caption(rng, plan)
            return Scene(plan.background, things, plan.relation, kind, caption, int(rng.integers(VARIANTS)))


def draw(scene: Scene) -> NDArray[np.uint8]:
    """The picture of a scene, uint8 RGB (64, 64, 3)."""
    canvas = backdrop(scene.background, scene.variant).copy()
    for thing in sorted(scene.things, key=lambda t: t.centre[1]):  # shadows fall down, so the lower one is on top
        keep, paint, reach = sprite(thing.shape, thing.colour, thing.radius)
        x, y = thing.centre
        x0, y0, x1, y1 = max(x - reach, 0), max(y - reach, 0), min(x + reach, SIZE), min(y + reach, SIZE)
        inside = (slice(y0 - y + reach, y1 - y + reach), slice(x0 - x + reach, x1 - x + reach))
        area = canvas[y0:y1, x0:x1]
        area *= keep[inside]
        area += paint[inside]
    return (canvas + 0.5).astype(np.uint8)


def batch(
    seed: int, n: int, held_out: bool = False, kinds: Sequence[str] = KINDS
) -> tuple[NDArray[np.uint8], list[str]]:
    """`n` pictures, uint8 (n, 64, 64, 3), and their captions; the same for the same seed. Kinds may be repeated."""
    rng = np.random.default_rng(seed)
    images, captions = np.empty((n, SIZE, SIZE, 3), np.uint8), []
    for i in range(n):
        scene = sample_scene(rng, kinds[int(rng.integers(len(kinds)))], held_out)
        images[i] = draw(scene)
        captions.append(scene.caption)
    return images, captions


def vocabulary() -> tuple[str, ...]:
    """Every word that a caption may hold, sorted."""
    endings = [*BACKGROUND_WORDS.values(), *RELATION_WORDS.values(), *SIZE_WORDS.values()]
    words = {word for wordings in endings for wording in wordings for word in wording.split()}
    words |= {*COLOURS, *SHAPES, *PLURALS.values(), *NUMBERS.values(), *"a an and with picture of".split()}
    return tuple(sorted(words))


# The composition that a kind of scene asks about.
_MAIN_KEY = {
    "single": "single",
    "two": "pair",
    "count": "count",
    "relation": "relation",
    "background": "background",
    "size": "size",
}
_CONTEXTS = (
    "single",
    "count|2",
    "count|3",
    "count|4",
    "size|small",
    "size|large",
    *(f"background|{background}" for background in BACKGROUNDS),
)


@cache
def _is_held_out(key: str) -> bool:
    """Whether training never sees a composition: one of five, so spread that no single attribute goes missing.

    Looks in a context (alone, three of them, on a meadow, small) are held out along diagonals of the table of
    colours and shapes, so that each colour loses at most one shape; pairs and relations, of which there are
    hundreds, by hash.
    """
    context, *looks = key.split("|")
    if context in ("pair", "relation"):
        return int.from_bytes(blake2b(f"{_SALT}|{key}".encode(), digest_size=4).digest()) % 5 == 0
    colour, shape = looks[-1].split(" ")
    return (COLOURS.index(colour) + 2 * SHAPES.index(shape) + _CONTEXTS.index("|".join(key.split("|")[:-1]))) % 5 == 0


def _keys(plan: _Plan) -> list[str]:
    """The compositions in a plan, one string each; left and right of, above and below, are one relation each."""
    looks = [f"{colour} {shape}" for _, colour, shape in plan.looks]
    keys = [f"background|{plan.background}|{look}" for look in looks]
    keys += [f"size|{size}|{look}" for (size, _, _), look in zip(plan.looks, looks) if size]
    if plan.count > 1:
        keys.append(f"count|{plan.count}|{looks[0]}")
    elif len(looks) == 1:
        keys.append(f"single|{looks[0]}")
    if len(looks) == 2:
        keys.append("pair|" + "|".join(sorted(looks)))
    if plan.relation:
        turned = plan.relation in ("right of", "below")
        axis = "left of" if plan.relation in ("left of", "right of") else "above"
        keys.append(f"relation|{axis}|" + "|".join(reversed(looks) if turned else looks))
    return keys


def _plan(rng: np.random.Generator, kind: str) -> _Plan:
    """A composition of a kind, drawn without regard to the held-out rule."""
    draws = rng.random(12)
    groups, count, relation, size_odds = 1, 1, "", 0.15
    if kind == "two" or (kind in ("background", "size") and draws[0] < 0.4):
        groups = 2
    if kind == "count" or (kind == "size" and groups == 1 and draws[0] < 0.65):
        count = 2 + int(draws[1] * 3)
    if kind == "relation":
        groups, relation = 2, RELATIONS[int(draws[1] * 4)]
    if kind == "single":
        size_odds = 0.0
    if kind == "size":
        size_odds = 1.0
    sizes = ("small",) if count > 2 else ("small", "large")  # three large ones leave no room
    looks = []
    for i in range(groups):
        d = draws[2 + 4 * i :]
        size = sizes[int(d[1] * len(sizes))] if d[0] < size_odds else ""
        looks.append((size, COLOURS[int(d[2] * len(COLOURS))], SHAPES[int(d[3] * len(SHAPES))]))
    if groups == 2 and looks[0][1:] == looks[1][1:]:
        return _plan(rng, kind)  # two equal things are a count
    background = BACKGROUNDS[int(draws[10] * len(BACKGROUNDS))]
    return _Plan(kind, background, kind == "background" or draws[11] < 0.4, count, tuple(looks), relation)


def _place(rng: np.random.Generator, plan: _Plan) -> tuple[Thing, ...]:
    """The plan's things in their places, moved a little; none where they do not fit in any of a few trials."""
    radii = [RADII[size][int(rng.random() * len(RADII[size]))] for size, _, _ in plan.looks]
    looks = [(look, radius) for look, radius in zip(plan.looks, radii) for _ in range(plan.count)]
    boxes = [half_box(shape, radius) for (_, _, shape), radius in looks]
    places = _arranged(plan.relation, len(looks))
    loose = LOOSE[len(looks)]
    for _ in range(12):
        moves = rng.integers(-loose, loose + 1, size=(len(looks), 2)) * LATTICE
        centres = [(x + int(dx), y + int(dy)) for (x, y), (dx, dy) in zip(places, moves)]
        if _fits(centres, boxes):
            return tuple(Thing(s, c, size, at, r) for ((size, c, s), r), at in zip(looks, centres))
    return ()


def _arranged(relation: str, count: int) -> tuple[tuple[int, int], ...]:
    """The places of so many things, turned so that the first two are in the relation."""
    places = PLACES[count]
    if relation in ("above", "below"):
        places = tuple((y, x) for x, y in places)
    return places[::-1] if relation in ("right of", "below") else places


def _fits(centres: Sequence[tuple[int, int]], boxes: Sequence[tuple[float, float]]) -> bool:
    """Whether boxes (half width, half height) are MARGIN inside the picture and GAP apart from one another."""
    for i, ((x, y), (w, h)) in enumerate(zip(centres, boxes)):
        if min(x - w, y - h, SIZE - x - w, SIZE - y - h) < MARGIN:
            return False
        for (a, b), (c, d) in zip(centres[:i], boxes):
            if max(abs(x - a) - w - c, abs(y - b) - h - d) < GAP:
                return False
    return True


def _caption(rng: np.random.Generator, plan: _Plan) -> str:
    u = rng.random(8).tolist()
    names = []
    for i, (size, colour, shape) in enumerate(plan.looks):
        words = [_pick(SIZE_WORDS[size], u[i])] if size else []
        words += [colour, PLURALS[shape] if plan.count > 1 else shape]
        alone = plan.count == 1 and (len(plan.looks) == 2 or u[6] > 0.1)
        article = ("a" if size else _ARTICLE[colour]) if alone else NUMBERS[plan.count]
        names.append(" ".join([article, *words]))
    if plan.relation:
        body = f"{names[0]} {_pick(RELATION_WORDS[plan.relation], u[2])} {names[1]}"
    else:
        body = f" {'and' if u[3] < 0.7 else 'with'} ".join(names)
    opening = "a picture of " if u[4] < 0.2 else ""
    ending = f" {_pick(BACKGROUND_WORDS[plan.background], u[5])}" if plan.named else ""
    return opening + body + ending


def _pick(words: tuple[str, ...], u: float) -> str:
    """The first, usual wording three times of five, else one of the others."""
    return words[0] if u < 0.6 else words[1 + int((u - 0.6) / 0.4 * (len(words) - 1))]
