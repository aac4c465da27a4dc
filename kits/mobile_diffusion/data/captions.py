"""From a caption back to what it asks for, and the prompt files for calibration and evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from core.kit import InputError
from kits.mobile_diffusion.data.scenes import (
    BACKGROUND_WORDS,
    KINDS,
    NUMBERS,
    PLURALS,
    RELATION_WORDS,
    SIZE_WORDS,
    sample_scene,
)
from kits.mobile_diffusion.data.sprites import COLOURS, SHAPES

PROMPTS = Path(__file__).parent / "prompts"
CALIBRATION, EVALUATION = 128, 600  # prompts in each file


@dataclass(frozen=True)
class Group:
    """`count` equal things; `size` is "small", "large" or "" where nothing is said of it."""

    count: int
    shape: str
    colour: str
    size: str = ""


@dataclass(frozen=True)
class Wanted:
    """What a caption asks for; `relation` is that of the first group to the second, "" where nothing is said."""

    groups: tuple[Group, ...]
    relation: str = ""
    background: str = ""

    @property
    def kind(self) -> str:
        """The kind of prompt by its most demanding part."""
        if self.relation:
            return "relation"
        if any(group.size for group in self.groups):
            return "size"
        if any(group.count > 1 for group in self.groups):
            return "count"
        if self.background:
            return "background"
        return "single" if len(self.groups) == 1 else "two"


def parse(prompt: str) -> Wanted:
    """What a caption asks for, such as "a red circle left of two small blue squares on a meadow".

    Raises InputError with the word at which the caption leaves the scenes' language.
    """
    words = prompt.lower().replace(",", " ").strip(" .!").split()
    for opening in (["a", "picture", "of"], ["picture", "of"]):
        if words[: len(opening)] == opening:
            words = words[len(opening) :]
    background, words = _background(words)
    relation, parts = _parts(words)
    groups = tuple(_group(part, prompt) for part in parts)
    return Wanted(groups, relation, background)


def kind_of(prompt: str) -> str:
    """The kind under which a prompt of the evaluation file was made; of any other, the kind of its demands."""
    for kind, prompts in evaluation_prompts().items():
        if prompt in prompts:
            return kind
    return parse(prompt).kind


def calibration_prompts() -> tuple[str, ...]:
    """128 distinct prompts of training compositions, the kinds in turn."""
    rng = np.random.default_rng(20261)
    prompts: dict[str, None] = {}
    while len(prompts) < CALIBRATION:
        prompts[sample_scene(rng, KINDS[len(prompts) % len(KINDS)]).caption] = None
    return tuple(prompts)


@cache
def evaluation_prompts() -> dict[str, tuple[str, ...]]:
    """For each kind 100 distinct prompts, 600 in all, of compositions that training never sees."""
    rng = np.random.default_rng(20262)
    prompts: dict[str, str] = {}
    for kind in KINDS:
        end = len(prompts) + EVALUATION // len(KINDS)
        while len(prompts) < end:
            prompts.setdefault(sample_scene(rng, kind, held_out=True).caption, kind)
    return {kind: tuple(p for p, k in prompts.items() if k == kind) for kind in KINDS}


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one a line; empty lines are passed over.

    Raises InputError where the file is missing, not text, or holds no prompt.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a text file with a prompt a line, or the prompt itself")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8; save it as UTF-8 text, a prompt a line") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"{path}: no prompts in it; write one a line")
    return prompts


def write_prompts(folder: Path = PROMPTS) -> None:
    """Write calibration.txt and evaluation.txt anew, from their seeds."""
    folder.mkdir(parents=True, exist_ok=True)
    evaluation = [prompt for prompts in evaluation_prompts().values() for prompt in prompts]
    for name, prompts in (("calibration.txt", calibration_prompts()), ("evaluation.txt", tuple(evaluation))):
        (folder / name).write_text("\n".join(prompts) + "\n", encoding="utf-8")


def _background(words: list[str]) -> tuple[str, list[str]]:
    """The background named at the end, or "", and the words before it."""
    for background, wordings in BACKGROUND_WORDS.items():
        for wording in wordings:
            ending = wording.split()
            if words[-len(ending) :] == ending:
                return background, words[: -len(ending)]
    return "", words


def _parts(words: list[str]) -> tuple[str, list[list[str]]]:
    """The relation, or "", and the words of each group."""
    wordings = [(wording.split(), relation) for relation, ways in RELATION_WORDS.items() for wording in ways]
    wordings.sort(key=lambda w: -len(w[0]))  # "to the left of" before "left of"
    for wording, relation in wordings:
        for i in range(len(words)):
            if words[i : i + len(wording)] == wording:
                return relation, [words[:i], words[i + len(wording) :]]
    parts: list[list[str]] = [[]]
    for word in words:
        if word in ("and", "with"):
            parts.append([])
        else:
            parts[-1].append(word)
    return "", parts


def _group(words: list[str], prompt: str) -> Group:
    numbers = {"a": 1, "an": 1, **{word: number for number, word in NUMBERS.items()}}
    nouns = {shape: shape for shape in SHAPES} | {plural: shape for shape, plural in PLURALS.items()}
    sizes = {word: size for size, ways in SIZE_WORDS.items() for word in ways}
    rest = list(words)
    count = numbers[rest.pop(0)] if rest and rest[0] in numbers else 1
    size = sizes[rest.pop(0)] if rest and rest[0] in sizes else ""
    if len(rest) == 2 and rest[0] in COLOURS and rest[1] in nouns:
        return Group(count, nouns[rest[1]], rest[0], size)
    found = next((w for w, known in zip(rest, (COLOURS, nouns)) if w not in known), " ".join(rest[2:]) or "the end")
    raise InputError(
        f"prompt {prompt!r}: {found!r} found, expected [number] [size] colour shape, "
        f"with a colour of {', '.join(COLOURS)} and a shape of {', '.join(SHAPES)}"
    )
