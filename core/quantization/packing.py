"""Integers of 2 to 8 bits in uint8 rows, and float rows as such integers with one FP16 scale a group.

An integer q in [-2^(bits-1), 2^(bits-1) - 1] is stored as q + 2^(bits-1), and a row is one little-endian stream of
bits: integer i takes the bits i * bits to (i + 1) * bits - 1, so at 4 bits the first of two sits in the low nibble.
A row ends on a byte.

A group's scale has the sign that maps its largest magnitude to -2^(bits-1), the end of the range that reaches
farther: 0.6 dB less noise at 4 bits than a positive scale that has to cover both ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from core.kit import InputError

Rounding = Literal["nearest", "mse"]
_CHUNK = 1 << 18  # elements worked on at a time: what is made on the way stays in the processor's cache
_SHRINK = tuple(1 - 0.03 * step for step in range(14))  # what "mse" tries of a group's largest magnitude


def row_bytes(length: int, bits: int) -> int:
    """Bytes of a row of `length` integers."""
    return -(-length * bits // 8)


def group_count(length: int, group_size: int) -> int:
    """Groups of a row of `length` elements; the last one may be shorter."""
    return -(-length // group_size)


def check_width(bits: int, group_size: int) -> None:
    """Raise InputError unless bits is 2 to 8 and group_size at least 1."""
    if not 2 <= bits <= 8:
        raise InputError(f"bits is {bits}; packed weights take 2 to 8 (16 leaves a layer in FP16)")
    if group_size < 1:
        raise InputError(f"group_size is {group_size}; expected at least 1, such as 64")


def pack(integers: Tensor, bits: int) -> Tensor:
    """Signed integers (rows, length), any integer type -> uint8 (rows, row_bytes)."""
    rows, length = integers.shape
    out = torch.empty(rows, row_bytes(length, bits), dtype=torch.uint8, device=integers.device)
    for part in _row_chunks(rows, length):
        if bits == 8:
            out[part] = (integers[part].to(torch.int8) ^ -128).view(torch.uint8)  # flipping the top bit adds 128
            continue
        codes = (integers[part].to(torch.int8) + 2 ** (bits - 1)).view(torch.uint8)
        if bits == 4:
            out[part] = codes[:, 0::2]
            out[part, : length // 2] |= codes[:, 1::2] << 4
        else:
            # Eight integers fill `bits` whole bytes.
            eights = torch.nn.functional.pad(codes, (0, -length % 8)).reshape(len(codes), -1, 8).long()
            words = (eights << (bits * torch.arange(8, device=codes.device))).sum(2)
            taken = (words[..., None] >> (8 * torch.arange(bits, device=codes.device))) & 255
            out[part] = taken.to(torch.uint8).flatten(1)[:, : out.shape[1]]
    return out


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """uint8 (rows, row_bytes) -> signed int8 integers (rows, length)."""
    out = torch.empty(len(packed), length, dtype=torch.int8, device=packed.device)
    for part in _row_chunks(len(packed), length):
        out[part] = _integers(packed[part], bits, length)
    return out


def quantize_rows(
    rows: Tensor, bits: int, group_size: int, rounding: Rounding = "nearest", layer: str = ""
) -> tuple[Tensor, Tensor]:
    """Float (rows, length) -> uint8 (rows, row_bytes) and FP16 scales (rows, groups).

    "nearest" takes each scale from the largest magnitude of its group; "mse" shrinks it by the factor (1.00, 0.97,
    ... 0.61) that leaves the least squared error. Raises InputError naming the layer where a weight is not finite or
    its scale leaves the range of FP16.
    """
    count, length = rows.shape
    packed = torch.empty(count, row_bytes(length, bits), dtype=torch.uint8, device=rows.device)
    scales = torch.empty(count, group_count(length, group_size), dtype=torch.float16, device=rows.device)
    with one_thread():
        for part in _row_chunks(count, length):
            x = rows[part].detach().float()
            scale = choose_scales(x, bits, group_size, rounding, layer)
            scales[part] = scale
            packed[part] = pack(round_rows(x, scale, bits, group_size), bits)
    return packed, scales


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it torch works on one thread.

    The operations on a chunk take microseconds: on a busy machine each would wait milliseconds for all threads to meet.
    """
    if torch.compiler.is_compiling():
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def choose_scales(
    rows: Tensor,
    bits: int,
    group_size: int,
    rounding: Rounding = "nearest",
    layer: str = "",
    weight: Tensor | None = None,
) -> Tensor:
    """The FP16 scales (rows, groups) of float rows (rows, length), as `quantize_rows` chooses them.

    `weight` (length,) weighs the squared errors of "mse".
    """
    length, reach = rows.shape[1], 2 ** (bits - 1)
    parts = []
    for group in _grouped(rows, group_size):
        low, high = group.amin(2), group.amax(2)
        parts.append(torch.where(high >= -low, high, low) / -reach)
    scale = torch.cat(parts, 1)
    if not bool(torch.isfinite(scale).all()) or not bool(torch.isfinite(scale.half()).all()):
        found = "a weight that is not finite" if not bool(torch.isfinite(rows).all()) else f"{rows.abs().max():.3g}"
        raise InputError(
            f"layer {layer!r}: found {found}, expected magnitudes below {reach * 65504:g}; "
            "mend the checkpoint, or keep the layer in FP16 or wider"
        )
    if rounding == "nearest":
        return scale.half()
    best = torch.full_like(scale, float("inf"))
    chosen = scale.half()
    weights = None if weight is None else _grouped(weight[None], group_size)
    for factor in _SHRINK:
        tried = (scale * factor).half()
        errors = []
        starts = _group_starts(length, group_size)
        for index, (group, (first, last)) in enumerate(zip(_grouped(rows, group_size), starts)):
            s = tried[:, first:last, None].float()
            error = (_rounded(group, s, bits) * s).sub_(group).square_()
            if weights is not None:
                error *= weights[index]
            errors.append(error.sum(2))
        total = torch.cat(errors, 1)
        better = total < best
        best = torch.where(better, total, best)
        chosen = torch.where(better, tried, chosen)
    return chosen


def round_rows(rows: Tensor, scale: Tensor, bits: int, group_size: int) -> Tensor:
    """The nearest integers, int8 (rows, length), of float rows for FP16 scales (rows, groups)."""
    starts = _group_starts(rows.shape[1], group_size)
    return torch.cat(
        [
            _rounded(group, scale[:, first:last, None].float(), bits).to(torch.int8).flatten(1)
            for group, (first, last) in zip(_grouped(rows, group_size), starts)
        ],
        1,
    )


def dequantize_rows(
    packed: Tensor, scale: Tensor, bits: int, group_size: int, length: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """uint8 (rows, row_bytes) and FP16 scales (rows, groups) -> integers times scales, (rows, length) of `dtype`.

    Exact in float32; float16 and bfloat16 are the float32 values rounded.
    """
    out = torch.empty(len(packed), length, dtype=dtype, device=packed.device)
    # The product of an integer and an FP16 scale is exact in float32; bfloat16 would round the scale first.
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    starts = _group_starts(length, group_size)
    with one_thread():
        for part in _row_chunks(len(packed), length):
            integers, scales = _integers(packed[part], bits, length), scale[part].to(wide)
            views = zip(_grouped(integers, group_size), _grouped(out[part], group_size), starts)
            for group, made, (first, last) in views:
                made.copy_(group.to(wide).mul_(scales[:, first:last, None]))
    return out


def _integers(packed: Tensor, bits: int, length: int) -> Tensor:
    """The signed integers, int8 (rows, length), of a few packed rows."""
    if bits == 8:
        return packed.view(torch.int8) ^ -128  # flipping the top bit subtracts 128
    if bits == 4:
        pairs = packed.to(torch.int16)
        pairs |= pairs << 4
        pairs &= 0x0F0F
        nibbles = pairs.view(torch.int8)[:, :length]
    else:
        eights = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits)).reshape(len(packed), -1, bits).long()
        words = (eights << (8 * torch.arange(bits, device=packed.device))).sum(2)
        codes = (words[..., None] >> (bits * torch.arange(8, device=packed.device))) & (2**bits - 1)
        nibbles = codes.to(torch.int8).flatten(1)[:, :length]
    return nibbles - 2 ** (bits - 1)


def _rounded(group: Tensor, scale: Tensor, bits: int) -> Tensor:
    """group / scale to the nearest integer in range; 0 where the scale is 0."""
    inverse = torch.where(scale == 0, 0, 1 / scale)
    return (group * inverse).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _grouped(rows: Tensor, group_size: int) -> list[Tensor]:
    """Views (rows, groups, size) of the whole groups and, where one is left over, of the shorter last one."""
    length = rows.shape[1]
    whole = length // group_size * group_size
    views = []
    if whole:
        views.append(rows[:, :whole].unflatten(1, (-1, group_size)))
    if whole < length:
        views.append(rows[:, whole:].unsqueeze(1))
    return views


def _group_starts(length: int, group_size: int) -> list[tuple[int, int]]:
    """The range of scales that belongs to each view of `_grouped`."""
    whole = length // group_size
    ranges = [(0, whole)] if whole else []
    return [*ranges, (whole, whole + 1)] if length % group_size else ranges


def _row_chunks(rows: int, length: int) -> Iterator[slice]:
    # A traced graph (torch.export, torch.compile) would unroll the chunks.
    step = rows if torch.compiler.is_compiling() else max(1, _CHUNK // max(length, 1))
    for start in range(0, rows, max(step, 1)):
        yield slice(start, start + step)
