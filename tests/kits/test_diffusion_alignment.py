"""The judge of alignment: agrees with what was drawn, damaged pictures included, and rejects what was not asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from core.kit import InputError
from kits.mobile_diffusion.alignment import find_background, find_things, judge_image, judge_things, summary
from kits.mobile_diffusion.data.backgrounds import BACKGROUNDS, VARIANTS, backdrop
from kits.mobile_diffusion.data.captions import Wanted, parse
from kits.mobile_diffusion.data.scenes import KINDS, RELATIONS, Scene, Thing, draw, sample_scene
from kits.mobile_diffusion.data.sprites import COLOURS, SHAPES

Image = NDArray[np.uint8]
EACH = 20  # scenes of each kind, and again as many held out


def blurred(image: Image, rng: np.random.Generator) -> Image:
    return cv2.GaussianBlur(image, (0, 0), 0.8)


def compressed(image: Image, rng: np.random.Generator) -> Image:
    _, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
    return np.ascontiguousarray(cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1])


def noisy(image: Image, rng: np.random.Generator) -> Image:
    return np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)


def tinted(image: Image, rng: np.random.Generator) -> Image:
    return np.clip(blurred(image, rng) * rng.uniform(0.94, 1.06, 3) + rng.uniform(-5, 5, 3), 0, 255).astype(np.uint8)


def coarse(image: Image, rng: np.random.Generator) -> Image:
    """Half the detail gone, as after a lossy autoencoder."""
    return cv2.resize(
        cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA), (64, 64), interpolation=cv2.INTER_CUBIC
    )


def enlarged(image: Image, rng: np.random.Generator) -> Image:
    return cv2.resize(image, (160, 160), interpolation=cv2.INTER_CUBIC)


DAMAGES = (blurred, compressed, noisy, tinted, coarse, enlarged)


def wrong(wanted: Wanted, rng: np.random.Generator) -> dict[str, Wanted]:
    """For each demand the same wish but for that demand."""

    def other(values: tuple[object, ...], value: object) -> object:
        rest = [v for v in values if v != value]
        return rest[int(rng.integers(len(rest)))]

    first, *others = wanted.groups
    wishes = {
        "objects": replace(first, shape=other(SHAPES, first.shape)),
        "colours": replace(first, colour=other(COLOURS, first.colour)),
        "counts": replace(first, count=other((1, 2, 3, 4), first.count)),
    }
    if first.size:
        wishes["size"] = replace(first, size=other(("small", "large"), first.size))
    out = {demand: replace(wanted, groups=(group, *others)) for demand, group in wishes.items()}
    if wanted.relation:
        out["relation"] = replace(wanted, relation=other(RELATIONS, wanted.relation))
    out["background"] = replace(wanted, background=other(BACKGROUNDS, wanted.background))
    # A wish whose groups became equal asks for two of a thing and is another matter.
    return {d: w for d, w in out.items() if len({(g.shape, g.colour) for g in w.groups}) == len(w.groups)}


@pytest.mark.parametrize("damage", [None, *DAMAGES], ids=lambda d: d.__name__ if d else "as drawn")
def test_the_judge_agrees_with_what_was_drawn(damage: Callable[[Image, np.random.Generator], Image] | None) -> None:
    rng = np.random.default_rng(17)
    right, rejected, asked = 0, 0, 0
    cases = [(kind, out) for kind in KINDS for out in (False, True) for _ in range(EACH)]
    for kind, out in cases:
        scene = sample_scene(rng, kind, out)
        image = damage(draw(scene), rng) if damage else draw(scene)
        wanted = replace(parse(scene.caption), background=scene.background)
        found, background = find_things(image), find_background(image)
        right += judge_things(found, background, wanted)["all"]
        for demand, wish in wrong(wanted, rng).items():
            verdict = judge_things(found, background, wish)
            rejected += not verdict[demand] and not verdict["all"]
            asked += 1
    assert right / len(cases) >= 0.99, f"{right} of {len(cases)} drawn scenes accepted"
    assert rejected / asked >= 0.99, f"{rejected} of {asked} wrong wishes rejected"


def test_verdicts_name_the_demands_that_are_made() -> None:
    things = (Thing("circle", "red", "", (16, 32), 9.0), Thing("square", "blue", "large", (46, 32), 12.0))
    image = draw(Scene("meadow", things, "left of", "relation", ""))
    met = judge_image(image, parse("a red circle left of a large blue square on a meadow"))
    assert met == dict.fromkeys(("objects", "colours", "counts", "relation", "background", "size", "all"), True)
    assert judge_image(image, parse("a red circle and a blue square")) == dict.fromkeys(
        ("objects", "colours", "counts", "all"), True
    )
    # Something that was not asked for spoils the count alone.
    assert judge_image(image, parse("a red circle")) == {
        "objects": True,
        "colours": True,
        "counts": False,
        "all": False,
    }
    swapped = judge_image(image, parse("a blue circle left of a red square at sunset"))
    assert swapped == {
        "objects": True,
        "colours": False,
        "counts": False,
        "relation": False,
        "background": False,
        "all": False,
    }


def test_things_are_found_where_they_are() -> None:
    things = (Thing("triangle", "yellow", "large", (20, 40), 12.0), Thing("cross", "cyan", "small", (48, 14), 6.5))
    found = find_things(draw(Scene("sea", things, "", "two", "")))
    assert [(f.shape, f.colour, f.size) for f in found] == [("triangle", "yellow", "large"), ("cross", "cyan", "small")]
    for thing, seen in zip(things, found):
        assert seen.centre == pytest.approx(thing.centre, abs=1)
        assert seen.radius == pytest.approx(thing.radius, abs=0.7)


def test_things_that_touch_are_two_by_colour() -> None:
    things = (Thing("circle", "green", "", (22, 32), 9.0), Thing("circle", "orange", "", (40, 32), 9.0))
    found = find_things(draw(Scene("grey", things, "", "two", "")))
    assert sorted((f.shape, f.colour) for f in found) == [("circle", "green"), ("circle", "orange")]


def outline(name: str, radius: int = 10) -> Image:
    image = np.full((512, 512, 3), 250, np.uint8)
    r, middle, red = radius * 8, (256, 256), (216, 30, 40)
    if name == "bar":
        cv2.rectangle(image, (256 - 2 * r, 256 - r // 3), (256 + 2 * r, 256 + r // 3), red, -1)
    elif name == "ring":
        cv2.circle(image, middle, r, red, r // 3)
    elif name == "half":
        cv2.ellipse(image, middle, (int(1.4 * r), int(1.4 * r)), 0, 0, 180, red, -1)
    else:  # two circles run into one
        for x in (-0.8, 0.8):
            cv2.circle(image, (256 + int(x * r), 256), r, red, -1)
    return cv2.resize(image, (64, 64), interpolation=cv2.INTER_AREA)


@pytest.mark.parametrize("name", ["bar", "ring", "half", "twins"])
def test_what_is_no_shape_has_none(name: str) -> None:
    assert [(f.shape, f.colour) for f in find_things(outline(name))] == [("", "red")]


def test_every_ground_is_told_from_the_others() -> None:
    for name in BACKGROUNDS:
        for variant in range(0, VARIANTS, 4):
            painted = backdrop(name, variant).astype(np.uint8)
            assert find_background(painted) == name
            assert find_things(painted) == []


def test_noise_and_plain_colour_are_nothing() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for image in (noise, np.full((64, 64, 3), (216, 30, 40), np.uint8), np.zeros((64, 64, 3), np.uint8)):
        assert not judge_image(image, parse("a red circle on a white background"))["all"]
    assert find_background(noise) == ""


def test_other_arrays_are_refused() -> None:
    for bad in (np.zeros((64, 64, 3), np.float32), np.zeros((64, 48, 3), np.uint8), np.zeros((64, 64), np.uint8)):
        with pytest.raises(InputError, match="expected uint8 RGB"):
            judge_image(bad, parse("a red circle"))


def test_summary_counts_demands_and_kinds_with_exact_intervals() -> None:
    verdicts = [{"objects": True, "relation": False, "all": False}, {"objects": True, "all": True}]
    rates = summary(verdicts * 5, ["relation", "single"] * 5)
    assert {name: (rate.met, rate.asked) for name, rate in rates.items()} == {
        "objects": (10, 10),
        "relation": (0, 5),
        "all": (5, 10),
        "kind/relation": (0, 5),
        "kind/single": (5, 5),
    }
    assert rates["all"].value == 0.5
    # Clopper and Pearson for 5 of 10, and the closed form (alpha / 2) ** (1 / n) for 10 of 10.
    assert rates["all"].interval == pytest.approx((0.1871, 0.8129), abs=1e-4)
    assert rates["objects"].interval == pytest.approx((0.025**0.1, 1.0))
