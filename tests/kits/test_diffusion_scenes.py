"""Scenes of the diffusion kit: drawn as captioned, held-out compositions kept apart, read back from their captions."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPTokenizer

from core.kit import InputError
from kits.mobile_diffusion.data import captions, scenes
from kits.mobile_diffusion.data.backgrounds import BACKGROUNDS, VARIANTS, backdrop
from kits.mobile_diffusion.data.captions import Group, Wanted, parse
from kits.mobile_diffusion.data.scenes import GAP, KINDS, SIZE, Scene, Thing, draw, sample_scene
from kits.mobile_diffusion.data.sprites import AREAS, COLOURS, PALETTE, SHAPES, cover, half_box
from kits.mobile_diffusion.data.tokenizer import MAX_LENGTH, make_tokenizer


@pytest.fixture(scope="module")
def drawn() -> list[tuple[Scene, bool]]:
    """1,200 scenes, 100 of each kind from training and 100 held out."""
    rng = np.random.default_rng(11)
    return [(sample_scene(rng, kind, out), out) for out in (False, True) for kind in KINDS for _ in range(100)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_things_stay_inside_and_apart(drawn: list[tuple[Scene, bool]]) -> None:
    for scene, _ in drawn:
        boxes = [(*thing.centre, *half_box(thing.shape, thing.radius)) for thing in scene.things]
        assert all(x - w >= 0 and y - h >= 0 and x + w <= SIZE and y + h <= SIZE for x, y, w, h in boxes), scene
        for (x, y, w, h), (a, b, c, d) in combinations(boxes, 2):
            assert max(abs(x - a) - w - c, abs(y - b) - h - d) >= GAP, scene


def test_a_relation_is_plain_to_see(drawn: list[tuple[Scene, bool]]) -> None:
    seen = set()
    for scene, _ in drawn:
        if scene.relation:
            (x, y), (a, b) = (thing.centre for thing in scene.things)
            right, down = a - x, b - y
            along = {"left of": right, "right of": -right, "above": down, "below": -down}[scene.relation]
            assert along >= 20 and min(abs(right), abs(down)) <= along / 3 + 1, scene
            seen.add(scene.relation)
    assert seen == set(scenes.RELATIONS)


def test_a_caption_says_what_is_drawn(drawn: list[tuple[Scene, bool]]) -> None:
    for scene, _ in drawn:
        wanted = parse(scene.caption)
        things = [(g.shape, g.colour, g.size) for g in wanted.groups for _ in range(g.count)]
        assert things == [(t.shape, t.colour, t.size) for t in scene.things], scene
        assert wanted.relation == scene.relation
        assert wanted.background in ("", scene.background)
        if scene.kind == "background":
            assert wanted.background
        if scene.kind in ("count", "relation"):
            assert wanted.kind in (scene.kind, "size")


def test_training_never_sees_a_held_out_caption(drawn: list[tuple[Scene, bool]]) -> None:
    rng = np.random.default_rng(3)
    trained = {sample_scene(rng).caption for _ in range(4000)}
    assert not trained & {scene.caption for scene, out in drawn if out}
    assert not trained & set(captions.read_prompts(captions.PROMPTS / "evaluation.txt"))


def test_training_sees_every_attribute_in_every_kind() -> None:
    rng = np.random.default_rng(5)
    for kind in KINDS:
        things = [(scene, thing) for scene in (sample_scene(rng, kind) for _ in range(300)) for thing in scene.things]
        assert {t.shape for _, t in things} == set(SHAPES)
        assert {t.colour for _, t in things} == set(COLOURS)
        assert {s.background for s, _ in things} == set(BACKGROUNDS)


@pytest.mark.parametrize("context", scenes._CONTEXTS)
def test_a_fifth_of_the_looks_is_held_out_in_each_context(context: str) -> None:
    table = np.array([[scenes._is_held_out(f"{context}|{c} {s}") for s in SHAPES] for c in COLOURS])
    assert 6 <= table.sum() <= 7  # of 32
    assert table.sum(1).max() == 1 and table.sum(0).max() == 2  # a colour loses one shape at most


def test_a_fifth_of_the_pairs_is_held_out() -> None:
    looks = sorted(f"{c} {s}" for c in COLOURS for s in SHAPES)
    out = [scenes._is_held_out(f"pair|{a}|{b}") for a, b in combinations(looks, 2)]
    assert len(out) == 496 and np.mean(out) == pytest.approx(0.2, abs=0.04)


def test_turned_relations_are_one_composition() -> None:
    looks = (("", "red", "circle"), ("", "blue", "square"))
    plans = [
        scenes._Plan("relation", "grey", False, 1, pair, relation)
        for pair, relation in ((looks, "left of"), (looks[::-1], "right of"))
    ]
    assert sorted(scenes._keys(plans[0])) == sorted(scenes._keys(plans[1]))


def test_the_same_seed_gives_the_same_pictures() -> None:
    images, texts = scenes.batch(7, 8)
    again, texts_again = scenes.batch(7, 8)
    assert images.shape == (8, 64, 64, 3) and images.dtype == np.uint8
    assert np.array_equal(images, again) and texts == texts_again
    assert texts != scenes.batch(8, 8)[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_covers_its_area(shape: str) -> None:
    for radius in (6.0, 9.0, 13.0):
        filled = cover(shape, radius, SIZE // 2)
        assert filled.sum() == pytest.approx(AREAS[shape] * radius**2, rel=0.02)
        ys, xs = np.nonzero(filled > 0.5)
        width, height = half_box(shape, radius)
        assert np.ptp(xs) + 1 == pytest.approx(2 * width, abs=1.5) and np.ptp(ys) + 1 == pytest.approx(
            2 * height, abs=2
        )


def test_the_middle_of_a_thing_has_its_colour_and_the_rest_is_ground() -> None:
    for colour in COLOURS:
        picture = draw(Scene("white", (Thing("circle", colour, "large", (20, 30), 12.0),), "", "single", ""))
        assert np.abs(picture[28:33, 18:23].mean((0, 1)) - PALETTE[colour]).max() < 6
        assert np.array_equal(picture[:, 44:], (backdrop("white", 0)[:, 44:] + 0.5).astype(np.uint8))


def test_grounds_keep_clear_of_the_palette() -> None:
    palette = np.array([PALETTE[colour] for colour in COLOURS], float)
    for name in BACKGROUNDS:
        for variant in range(0, VARIANTS, 4):
            painted = backdrop(name, variant).reshape(-1, 1, 3)
            assert np.linalg.norm(painted - palette, axis=2).min() > 50, (name, variant)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind 'many' is not known; known are single, two, count"):
        sample_scene(np.random.default_rng(0), "many")


def test_parse_reads_wordings_no_scene_has() -> None:
    assert parse("Two red circles, and a blue square.") == Wanted(
        (Group(2, "circle", "red"), Group(1, "square", "blue"))
    )
    assert parse("green cross on black") == Wanted((Group(1, "cross", "green"),), background="black")
    wanted = parse("a large red circle to the left of three little blue squares in a meadow")
    groups = (Group(1, "circle", "red", "large"), Group(3, "square", "blue", "small"))
    assert wanted == Wanted(groups, "left of", "meadow") and wanted.kind == "relation"


@pytest.mark.parametrize(
    ("prompt", "found"),
    [("a cat", "'cat'"), ("", "'the end'"), ("a red", "'the end'"), ("a red circle on mars", "'on mars'")],
)
def test_other_prompts_are_refused_by_word(prompt: str, found: str) -> None:
    with pytest.raises(InputError, match=f"prompt '{prompt}': {found} found, expected .* a colour of red"):
        parse(prompt)


def test_prompt_files_are_those_of_their_seeds(tmp_path: Path) -> None:
    captions.write_prompts(tmp_path)
    for name, count in (("calibration.txt", 128), ("evaluation.txt", 600)):
        assert (tmp_path / name).read_text() == (captions.PROMPTS / name).read_text()
        prompts = captions.read_prompts(captions.PROMPTS / name)
        assert len(set(prompts)) == len(prompts) == count
        assert all(parse(prompt).groups for prompt in prompts)
    kinds = captions.evaluation_prompts()
    assert [len(kinds[kind]) for kind in KINDS] == [100] * 6
    assert captions.kind_of(kinds["single"][3]) == "single"
    assert captions.kind_of("two red circles and a blue square") == "count"  # of no file: by its demands


def test_prompt_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"a red circle\xe9")
    for name, why in (
        ("none.txt", "no such file"),
        ("empty.txt", "no prompts in it"),
        ("latin.txt", "byte 12 is not UTF"),
    ):
        with pytest.raises(InputError, match=why):
            captions.read_prompts(tmp_path / name)


def test_words_are_single_tokens_and_captions_fit(tokenizer: CLIPTokenizer, drawn: list[tuple[Scene, bool]]) -> None:
    words = scenes.vocabulary()
    assert len(words) <= 80
    assert all(len(tokenizer(word).input_ids) == 3 for word in words)  # start, word, end
    for scene, _ in drawn:
        ids = tokenizer(scene.caption).input_ids
        assert len(ids) == len(scene.caption.split()) + 2 <= 22
        assert set(scene.caption.split()) <= set(words)


def test_other_words_fall_back_to_letters(tokenizer: CLIPTokenizer) -> None:
    text = "a Zebra, ünïcode 猫!"
    ids = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in ids[:-1]
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.lower().replace(" ", "")
    assert tokenizer("").input_ids == [tokenizer.bos_token_id, tokenizer.eos_token_id]


def test_prompts_are_cut_and_filled_to_24(tokenizer: CLIPTokenizer) -> None:
    short, long = tokenizer(["a red circle", "red " * 90], padding="max_length", truncation=True).input_ids
    assert len(short) == len(long) == MAX_LENGTH == tokenizer.model_max_length
    assert set(short[5:]) == {tokenizer.pad_token_id} and long[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id == len(tokenizer) - 1  # CLIPTextModel's pooling looks for the highest token
