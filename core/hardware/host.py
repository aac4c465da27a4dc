"""What this machine can do: peak FP32 and memory bandwidth, measured in about a second."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

_FLAGS = ("avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm")
# INT8 multiply-accumulates per FP32 one. VNNI and the Arm dot product do four lanes in the place of one.
# AVX2 alone needs three instructions (vpmaddubsw, vpmaddwd, vpaddd) for 32 of them where one FMA does 8.
_INT8_GAIN = {"amx_int8": 32.0, "avx512_vnni": 4.0, "avx_vnni": 4.0, "i8mm": 8.0, "asimddp": 4.0, "avx2": 4 / 3}

_SIDE = 384
_PIECE = 512 << 10


@dataclass(frozen=True)
class Host:
    """This machine: its name, instruction sets, and the `peak` and `memory` fields of a target."""

    name: str
    cores: int
    threads: int
    flags: tuple[str, ...]
    peak: dict[str, Any]
    memory: list[dict[str, Any]]


def measure_host(threads: int | None = None) -> Host:
    """Measure GEMM rate (FLOP/s) and read bandwidth (B/s) with `threads` (default: what torch uses now), once."""
    return _measure(threads or torch.get_num_threads())


@cache
def _measure(threads: int) -> Host:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        gemm = _gemm_rate()
        cache_bytes = last_level_cache()
        ram_rate = _read_rate(min(max(64 << 20, 4 * (cache_bytes or 0)), 512 << 20))
        # A quarter of the cache stays in it even where neighbours share it.
        cache_rate = _read_rate(cache_bytes // 4) if cache_bytes else 0.0
    finally:
        torch.set_num_threads(before)
    name, flags = processor()
    how = f"measured on this host with {threads} threads, torch {torch.__version__}"
    product = f"{how}: best of many {_SIDE} x {_SIDE} x {_SIDE} matrix products"
    peak = {"fp32": {"value": gemm, "unit": "op/s", "source": product}}
    fastest = next((f for f in _INT8_GAIN if f in flags), None)
    if fastest is not None:
        gain = _INT8_GAIN[fastest]
        why = f"derived: {gain:.2f} x the measured fp32 peak, INT8 lanes of {fastest}"
        peak["int8"] = {"value": gain * gemm, "unit": "op/s", "source": why}
    memory = []
    if cache_bytes and cache_rate > ram_rate:
        size = {"value": cache_bytes, "unit": "B", "source": "the operating system's cache description"}
        rate = {"value": cache_rate, "unit": "B/s", "source": f"{how}: reading a quarter of the cache"}
        memory.append(_level("last-level cache", "sram", size, rate))
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    size = {"value": ram, "unit": "B", "source": "the operating system's count of pages"}
    rate = {"value": ram_rate, "unit": "B/s", "source": f"{how}: reading what is larger than the cache"}
    memory.append(_level("RAM", "dram", size, rate))
    cores = os.cpu_count() or 1
    return Host(f"{name}, {cores} cores", cores, threads, flags, peak, memory)


def processor() -> tuple[str, tuple[str, ...]]:
    """The processor's name and those of its instruction sets that matter here."""
    fields: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip().lower(), value.strip())
    words = set((fields.get("flags") or fields.get("features") or "").split())
    name = fields.get("model name") or platform.processor() or platform.machine() or "unknown processor"
    return name, tuple(f for f in _FLAGS if f in words)


def last_level_cache() -> int | None:
    """Bytes of the largest cache of core 0, None where the system does not say."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text(encoding="ascii").strip()
        scale = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KM")) * scale)
    return max(sizes, default=None)


def _gemm_rate() -> float:
    a, b, out = torch.rand(_SIDE, _SIDE), torch.rand(_SIDE, _SIDE), torch.empty(_SIDE, _SIDE)
    return 2.0 * _SIDE**3 / _fastest(lambda _: torch.mm(a, b, out=out), 0.4)


def _read_rate(size: int) -> float:
    """Bytes a second of walking through `size` bytes, piece by piece, into a copy small enough to stay near."""
    piece = min(_PIECE, max(size, 4096))
    source = torch.ones(max(size // piece, 1), piece, dtype=torch.uint8)  # of zeros there would be one page only
    near = torch.empty(piece, dtype=torch.uint8)
    return piece / _fastest(lambda run: near.copy_(source[run % len(source)]), 0.3)


def _fastest(work: Callable[[int], object], budget: float) -> float:
    """Seconds of the fastest of at least 20 runs over about `budget` seconds.

    Each run is shorter than a time slice, so that other programs delay some runs but not the fastest.
    """
    best, runs, started = float("inf"), 0, time.perf_counter()
    while runs < 20 or time.perf_counter() - started < budget:
        begin = time.perf_counter()
        work(runs)
        best = min(best, time.perf_counter() - begin)
        runs += 1
    return best


def _level(name: str, technology: str, size: dict[str, Any], rate: dict[str, Any]) -> dict[str, Any]:
    holds = ["weights", "activations"]
    return {"name": name, "technology": technology, "holds": holds, "bytes": size, "bandwidth": rate}
