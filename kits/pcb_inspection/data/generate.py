"""A generated set of board pairs in the layout of DeepPCB, for trials, tests and machines without the real data."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import cv2
import numpy as np

from core.kit import InputError
from kits.pcb_inspection.data.boards import FAMILIES, Style, draw_board, style
from kits.pcb_inspection.data.deeppcb import Grey, split_groups
from kits.pcb_inspection.data.defects import add_defects

QUALITY = 75  # of JPEG, as in DeepPCB
GROUPS = 7  # in trainval.txt, one family of boards each; as many as DeepPCB has there
SHIFTED = 0.084  # share of pairs 2 to 8 pixels apart in DeepPCB
BENT = 0.012  # share of pairs slightly turned or stretched there


def generate(
    out: Path | str, *, train: int = 24, val: int = 8, holdout: int = 8, test: int = 40, seed: int = 0
) -> Path:
    """Write `out`/PCBData as DeepPCB is published and return it: pairs, annotations, trainval.txt and test.txt.

    The counts are pairs a split (`deeppcb.split`); no board group is in two of them. The same arguments give the
    same bytes. InputError if a count is negative, the training set is empty or `out` already holds data.
    """
    counts = {"train": train, "val": val, "holdout": holdout, "test": test}
    for name, count in counts.items():
        if count < 0 or count > 3000 or (count == 0 and name != "test"):
            raise InputError(f"{name}: {count} pairs, expected {'0' if name == 'test' else '1'} to 3000")
    root = Path(out) / "PCBData"
    if root.exists():
        raise InputError(f"{root} already exists; choose another folder or remove it")
    partial = root.with_name("PCBData.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)

    names = [f"group{number:02d}000" for number in range(1, GROUPS + 1)]
    splits = {name: sorted(groups) for name, groups in split_groups(set(names), root / "trainval.txt").items()}
    splits["test"] = ["group08000", "group09000"]
    lines: dict[str, list[str]] = {"trainval": [], "test": []}
    started, done, said = time.monotonic(), 0, 10.0
    for name, count in counts.items():
        groups = splits[name]
        for index in range(count):
            group = groups[index % len(groups)]
            lines["test" if name == "test" else "trainval"].append(_write(partial, group, index // len(groups), seed))
            done += 1
            if (elapsed := time.monotonic() - started) > said:
                said = elapsed + 5
                print(f"generated {done} of {sum(counts.values())} pairs", file=sys.stderr)
    for list_name, rows in lines.items():
        if rows:
            (partial / f"{list_name}.txt").write_text("".join(f"{row}\n" for row in sorted(rows)))
    partial.rename(root)
    return root


def make_pair(board: Style, rng: np.random.Generator) -> tuple[Grey, Grey, np.ndarray, np.ndarray]:
    """(test, template, boxes, labels) of one board: images (640, 640) uint8 before JPEG, as of `add_defects`."""
    copper = draw_board(board, rng)
    template = rough(copper, rng)
    image, boxes, labels = add_defects(rough(_misplaced(copper, rng), rng), rng)
    return image, template, boxes, labels


def rough(copper: Grey, rng: np.random.Generator) -> Grey:
    """The board (H, W) of 0 and 1 as a camera and a threshold show it: black copper on white, with uneven edges."""
    height, width = copper.shape
    soft = cv2.GaussianBlur(copper.astype(np.float32), (0, 0), 1.4)
    grain = cv2.GaussianBlur(rng.random((height, width), np.float32), (0, 0), 0.9) - 0.5
    uneven = np.asarray(grain * rng.uniform(0.4, 1.3), np.float32)
    return np.asarray(cv2.threshold(soft + uneven, 0.5 + rng.normal(0, 0.03), 255, cv2.THRESH_BINARY_INV)[1], np.uint8)


def _misplaced(copper: Grey, rng: np.random.Generator) -> Grey:
    """The board as the second shot sees it: most within a pixel, some shifted, a few turned or stretched."""
    height, width = copper.shape
    shift = rng.uniform(-0.6, 0.6, 2)
    turn = stretch = 0.0
    kind = rng.random()
    if kind < SHIFTED:
        angle = rng.uniform(0, 2 * np.pi)
        shift = rng.uniform(2, 8) * np.array([np.cos(angle), np.sin(angle)])
    elif kind < SHIFTED + BENT:
        turn, stretch = rng.normal(0, 0.006), rng.normal(0, 0.008)
    c, s = (1 + stretch) * np.cos(turn), np.sin(turn)
    centre = np.array([width / 2, height / 2])
    linear = np.array([[c, -s], [s, 1 / (1 + stretch) * np.cos(turn)]])
    matrix = np.hstack([linear, (centre - linear @ centre + shift)[:, None]])
    moved = cv2.warpAffine(copper * np.uint8(255), matrix, (width, height), borderMode=cv2.BORDER_REPLICATE)
    return (moved > 127).astype(np.uint8)


def _write(root: Path, group: str, index: int, seed: int) -> str:
    """Write one pair and return its list line; its bytes depend on the seed, the group and its number alone."""
    number = group.removeprefix("group")
    families = list(FAMILIES)
    family = families[(int(number) // 1000 - 1) % len(families)]
    board = style(family, np.random.default_rng([seed, int(number)]))
    image, template, boxes, labels = make_pair(board, np.random.default_rng([seed, int(number), index]))
    image_id = f"{int(number) // 1000:02d}{index:06d}"
    folder, notes = root / group / number, root / group / f"{number}_not"
    folder.mkdir(parents=True, exist_ok=True)
    notes.mkdir(exist_ok=True)
    for name, picture in (("test", image), ("temp", template)):
        ok, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
        if not ok:
            raise RuntimeError(f"{image_id}_{name}.jpg could not be encoded")
        (folder / f"{image_id}_{name}.jpg").write_bytes(data.tobytes())
    rows = [
        f"{x1:.0f} {y1:.0f} {x2:.0f} {y2:.0f} {label + 1}\n"
        for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True)
    ]
    (notes / f"{image_id}.txt").write_text("".join(rows))
    return f"{group}/{number}/{image_id}.jpg {group}/{number}_not/{image_id}.txt"
