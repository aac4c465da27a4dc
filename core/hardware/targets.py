"""Devices as data: peak operations, memories and power, every number with its unit and its source."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from core.kit import InputError

BITS: Mapping[str, int] = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "int4": 4}
"""Bits of each data type a layer may have."""

WIDER: Mapping[str, tuple[str, ...]] = {
    "int4": ("int8", "fp16", "bf16", "fp32"),
    "int8": ("fp16", "bf16", "fp32"),
    "fp16": ("fp32",),
    "bf16": ("fp32",),
    "fp32": (),
}
"""What a runtime falls back to, first choice first, where a device lacks a data type."""

_HOST = "this-host"
_TECHNOLOGIES = ("sram", "dram", "flash")
_HOLDS = ("weights", "activations")


@dataclass(frozen=True)
class Number:
    """A positive number with its unit and, in words, where it comes from."""

    value: float
    unit: str
    source: str


@dataclass(frozen=True)
class MemoryLevel:
    """A memory of a device: capacity in bytes, bandwidth in B/s, and what a runtime keeps in it."""

    name: str
    technology: str
    holds: tuple[str, ...]
    bytes: Number
    bandwidth: Number


@dataclass(frozen=True)
class Target:
    """A device.

    `peak` is operations per second by data type (a multiply-accumulate is two), `memory` lists levels
    from the nearest to the farthest, `power` has "rated" and "static" watts (static: drawn while it
    runs besides arithmetic and data movement), `process` is the node in nm, `efficiency` the share of
    the peak that dense layers reach, `latency_band` the relative error of a latency estimated so, and
    `macs_per_instruction` how many multiply-accumulates one instruction issues.
    """

    name: str
    title: str
    device_class: str
    peak: Mapping[str, Number]
    memory: tuple[MemoryLevel, ...]
    power: Mapping[str, Number]
    process: Number
    efficiency: Number
    latency_band: Number
    macs_per_instruction: Number
    sparsity: tuple[str, ...] = ()
    missing_operators: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The data types the device computes in."""
        return tuple(self.peak)

    def runs_as(self, dtype: str) -> str | None:
        """The data type that `dtype` really runs in here: itself, a wider one, or None where nothing fits."""
        return next((d for d in (dtype, *WIDER[dtype]) if d in self.peak), None)

    def level_for(self, content: str, size: float) -> MemoryLevel:
        """The nearest level that keeps "weights" or "activations" of `size` bytes, or else the largest one."""
        holders = [m for m in self.memory if content in m.holds]
        return next((m for m in holders if m.bytes.value >= size), max(holders, key=lambda m: m.bytes.value))


def target(name: str) -> Target:
    """The device of that name, or of a user's JSON file with the same fields as one entry of `targets.json`.

    Raises InputError for an unknown name and for any field that is unknown, missing, not positive or
    without a source.
    """
    if name in (known := targets()):
        return known[name]
    if not name.endswith(".json"):
        raise InputError(f"no target {name!r}; known are {', '.join(known)}, or give the path of a JSON file")
    path = Path(name)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"target {name}: cannot be read ({error.strerror}); check the path") from error
    except ValueError as error:
        raise InputError(f"target {name}: not JSON ({error}); correct it there") from error
    return parse(path.stem, data)


def targets() -> Mapping[str, Target]:
    """All devices that ship with the library, by name; `this-host` is measured when it is first looked at."""
    text = files("core.hardware").joinpath("targets.json").read_text(encoding="utf-8")
    return _Targets(json.loads(text))


class _Targets(Mapping[str, Target]):
    """Names are free; a value is validated (and the host measured) only when it is asked for."""

    def __init__(self, entries: Mapping[str, Any]) -> None:
        self._entries = entries

    def __getitem__(self, name: str) -> Target:
        if name != _HOST:
            return parse(name, self._entries[name])
        from core.hardware.host import measure_host  # the only entry whose numbers are not in the file

        host = measure_host()
        measured = {"peak": host.peak, "memory": host.memory}
        found = parse(name, {**self._entries[name], **measured})
        return replace(found, title=host.name, notes=(f"instruction sets: {', '.join(host.flags) or 'unknown'}",))

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


_REQUIRED = ("title", "device_class", "peak", "memory", "power", "process", "efficiency", "latency_band",
             "macs_per_instruction")  # fmt: skip
_OPTIONAL = ("sparsity", "missing_operators", "notes")


def parse(name: str, data: Any) -> Target:
    """A validated Target from its JSON object; InputError names the target and the field."""
    _keys(name, "the target", data, _REQUIRED, _OPTIONAL)
    _keys(name, "peak", data["peak"], (), tuple(BITS))
    if not data["peak"]:
        raise InputError(f"target {name}: field peak: empty, expected at least one of {', '.join(BITS)}")
    _keys(name, "power", data["power"], ("rated", "static"), ())
    found = Target(
        name=name,
        title=_text(name, "title", data["title"]),
        device_class=_text(name, "device_class", data["device_class"]),
        peak={d: _number(name, f"peak.{d}", n, "op/s") for d, n in data["peak"].items()},
        memory=_memory(name, data["memory"]),
        power={k: _number(name, f"power.{k}", n, "W") for k, n in data["power"].items()},
        process=_number(name, "process", data["process"], "nm"),
        efficiency=_number(name, "efficiency", data["efficiency"], "share of peak"),
        latency_band=_number(name, "latency_band", data["latency_band"], "relative"),
        macs_per_instruction=_number(name, "macs_per_instruction", data["macs_per_instruction"], "MAC"),
        sparsity=_texts(name, "sparsity", data.get("sparsity", [])),
        missing_operators=_texts(name, "missing_operators", data.get("missing_operators", [])),
        notes=_texts(name, "notes", data.get("notes", [])),
    )
    if found.efficiency.value > 1:
        raise InputError(f"target {name}: field efficiency: found {found.efficiency.value}, expected at most 1")
    for content in _HOLDS:
        if not any(content in m.holds for m in found.memory):
            raise InputError(f"target {name}: field memory: no level holds {content}; name it in the holds of one")
    return found


def _memory(name: str, data: Any) -> tuple[MemoryLevel, ...]:
    if not isinstance(data, list) or not data:
        raise InputError(f"target {name}: field memory: found {data!r:.40}, expected a list of levels")
    levels = []
    for index, item in enumerate(data):
        field = f"memory[{index}]"
        _keys(name, field, item, ("name", "technology", "holds", "bytes", "bandwidth"), ())
        holds = _texts(name, f"{field}.holds", item["holds"])
        if not holds or set(holds) - set(_HOLDS):
            raise InputError(f"target {name}: field {field}.holds: found {list(holds)}, expected some of {_HOLDS}")
        if item["technology"] not in _TECHNOLOGIES:
            found = item["technology"]
            raise InputError(f"target {name}: field {field}.technology: {found!r}, expected one of {_TECHNOLOGIES}")
        levels.append(
            MemoryLevel(
                _text(name, f"{field}.name", item["name"]),
                item["technology"],
                holds,
                _number(name, f"{field}.bytes", item["bytes"], "B"),
                _number(name, f"{field}.bandwidth", item["bandwidth"], "B/s"),
            )
        )
    return tuple(levels)


def _keys(name: str, field: str, data: Any, required: tuple[str, ...], optional: tuple[str, ...]) -> None:
    if not isinstance(data, dict):
        raise InputError(f"target {name}: {field}: found {type(data).__name__}, expected a JSON object")
    if unknown := sorted(set(data) - set(required) - set(optional)):
        known = ", ".join((*required, *optional))
        raise InputError(f"target {name}: {field}: unknown field {unknown[0]!r}; its fields are {known}")
    if missing := [k for k in required if k not in data]:
        raise InputError(f"target {name}: {field}: field {missing[0]!r} is missing; add it with its source")


def _number(name: str, field: str, data: Any, unit: str) -> Number:
    _keys(name, field, data, ("value", "unit", "source"), ())
    value = data["value"]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise InputError(f"target {name}: field {field}.value: found {value!r}, expected a positive number")
    if data["unit"] != unit:
        raise InputError(f"target {name}: field {field}.unit: found {data['unit']!r}, expected {unit!r}")
    return Number(float(value), unit, _text(name, f"{field}.source", data["source"]))


def _text(name: str, field: str, data: Any) -> str:
    if not isinstance(data, str) or not data.strip():
        raise InputError(f"target {name}: field {field}: found {data!r}, expected text")
    return data


def _texts(name: str, field: str, data: Any) -> tuple[str, ...]:
    if not isinstance(data, list | tuple):
        raise InputError(f"target {name}: field {field}: found {data!r:.40}, expected a list of texts")
    return tuple(_text(name, f"{field}[{i}]", item) for i, item in enumerate(data))
