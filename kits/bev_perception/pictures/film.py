"""Films of a scene from its pictures: an animated GIF of one palette and a bounded size, and an MP4."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from core.files import replaced
from core.kit import InputError
from kits.bev_perception.pictures.frame import smaller
from kits.bev_perception.pictures.paper import BAD, DIM, GROUND, INK, LINE, PALETTE, PANEL, TRUTH, WARN, Picture

KEPT = (GROUND, PANEL, LINE, DIM, INK, WARN, BAD, TRUTH, *PALETTE)  # colours that a palette of photographs would lose
WIDTHS = (1200, 1000, 840, 700, 560)  # px, tried in turn
BYTES_A_FRAME = 300_000  # a film of twenty frames stays below 6 MB
CODECS = ("mp4v", "vp09")  # of pip's OpenCV; the second is a browser's, and takes six times as long
FILM_WIDTH = 1600  # px of an MP4


def write_gif(path: Path, pictures: Sequence[Path], seconds: float) -> int:
    """An animated GIF of pictures, each shown `seconds`; returns its width in pixels.

    As wide as leaves it below BYTES_A_FRAME for each frame, at least WIDTHS[-1]. Raises InputError where there is no
    picture.
    """
    if not pictures:
        raise InputError(f"{path}: no picture to make a film of; give at least one frame")
    for width in WIDTHS:
        palette = _palette(pictures, width)
        small = (Image.fromarray(smaller(read(p), width)) for p in pictures)
        frames = (image.quantize(palette=palette, dither=Image.Dither.NONE) for image in small)
        with replaced(path) as fresh:
            next(frames).save(
                fresh, format="GIF", save_all=True, append_images=frames, duration=round(seconds * 1e3), loop=0,
                optimize=False,
            )  # fmt: skip
        if path.stat().st_size <= BYTES_A_FRAME * len(pictures):
            break
    return width


def write_mp4(path: Path, pictures: Sequence[Path], seconds: float) -> bool:
    """An MP4 of pictures, each shown `seconds`; False, and no file, where OpenCV on this machine writes none."""
    for codec in CODECS:
        if _encoded(path, pictures, 1 / seconds, codec):
            return True
    return False


def read(path: Path) -> Picture:
    """A picture as (H, W, 3) RGB."""
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def _palette(pictures: Sequence[Path], width: int) -> Image.Image:
    """256 colours for all pictures: KEPT, and those that some of them have most of."""
    chosen = [pictures[i] for i in sorted({0, len(pictures) // 3, 2 * len(pictures) // 3, len(pictures) - 1})]
    sheet = np.concatenate([smaller(read(p), width // 2) for p in chosen])
    found = Image.fromarray(sheet).quantize(256 - len(KEPT), method=Image.Quantize.MEDIANCUT)
    colours = (found.getpalette() or [])[: 3 * (256 - len(KEPT))]
    palette = Image.new("P", (1, 1))
    palette.putpalette([*[v for colour in KEPT for v in colour], *colours])
    return palette


def _frames(pictures: Sequence[Path]) -> Iterator[Picture]:
    for path in pictures:
        picture = smaller(read(path), FILM_WIDTH)
        height, width = (side - side % 2 for side in picture.shape[:2])  # codecs want even sides
        yield np.ascontiguousarray(picture[:height, :width, ::-1])


def _encoded(path: Path, pictures: Sequence[Path], rate: float, codec: str) -> bool:
    """Whether OpenCV wrote every frame in a codec."""
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    fresh = path.with_name(f"{path.stem}.new.mp4")  # OpenCV tells the container by the name
    try:
        first = next(_frames(pictures))
        size = (first.shape[1], first.shape[0])
        writer = cv2.VideoWriter(str(fresh), cv2.VideoWriter.fourcc(*codec), rate, size)
        opened = writer.isOpened()
        for frame in _frames(pictures) if opened else ():
            writer.write(frame)
        writer.release()
    finally:
        cv2.utils.logging.setLogLevel(level)
    if not opened or not fresh.is_file() or not fresh.stat().st_size:
        fresh.unlink(missing_ok=True)
        return False
    fresh.replace(path)
    return True
