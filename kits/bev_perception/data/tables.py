"""The tables of a nuScenes-format folder: which there are, where their tokens lead, and reading them with care."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from core.files import read_list
from core.kit import InputError
from kits.bev_perception.data.geometry import Array, Pose

MEND = "a nuScenes folder has all 13 tables, each a list of records, an empty one []"
TABLES = (
    "attribute", "calibrated_sensor", "category", "ego_pose", "instance", "log", "map", "sample",
    "sample_annotation", "sample_data", "scene", "sensor", "visibility",
)  # fmt: skip
# Where a token field leads; fields of lists are read one by one, and "" ends a chain.
REFERENCES = {
    "calibrated_sensor": {"sensor_token": "sensor"},
    "instance": {
        "category_token": "category",
        "first_annotation_token": "sample_annotation",
        "last_annotation_token": "sample_annotation",
    },
    "map": {"log_tokens": "log"},
    "sample": {"scene_token": "scene", "prev": "sample", "next": "sample"},
    "sample_annotation": {
        "sample_token": "sample",
        "instance_token": "instance",
        "attribute_tokens": "attribute",
        "visibility_token": "visibility",
        "prev": "sample_annotation",
        "next": "sample_annotation",
    },
    "sample_data": {
        "sample_token": "sample",
        "ego_pose_token": "ego_pose",
        "calibrated_sensor_token": "calibrated_sensor",
        "prev": "sample_data",
        "next": "sample_data",
    },
    "scene": {"log_token": "log", "first_sample_token": "sample", "last_sample_token": "sample"},
}

Record = Mapping[str, Any]
LARGEST = 1e18  # microseconds since 1970 are near 2e15


def find_version(root: Path) -> str:
    """The name of the one folder of tables in `root`; InputError where there is none, or more than one."""
    found = sorted(p.parent.name for p in root.glob("*/scene.json"))
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"{root}: several folders of tables ({', '.join(found)}); name one as version")
    raise InputError(f"{root}: no folder with scene.json in it; give a folder in nuScenes format (samples/, v1.0-*/)")


def read_table(file: Path) -> dict[str, dict[str, Any]]:
    """The records of a table by token, in the order of the file; InputError where it is not such a table."""
    found: dict[str, dict[str, Any]] = {}
    for place, row in enumerate(read_list(file, MEND)):
        token = row.get("token") if isinstance(row, dict) else None
        if not isinstance(token, str) or not token:
            raise InputError(f"{file}: record {place} has no token; every record needs one")
        if token in found:
            raise InputError(f"{file}: token {token!r} occurs twice; tokens must be unique")
        found[token] = row
    return found


def text(row: Record, name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise InputError(f"{where}: field {name!r} is {value!r}, expected text; mend it")
    return value


def is_number(value: Any) -> bool:
    """Whether a value of a table is a number that arithmetic can bear: no NaN, nothing beyond any time or place."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def is_numbers(value: Any, width: int) -> bool:
    """Whether a value of a table is a list of `width` numbers."""
    return isinstance(value, list) and len(value) == width and all(map(is_number, value))


def number(row: Record, name: str, where: str) -> float:
    value = row.get(name)
    if not is_number(value):
        raise InputError(f"{where}: field {name!r} is {value!r}, expected a number; mend it")
    return cast("float", value)


def count(row: Record, name: str, where: str) -> int:
    """A whole number that may be left out: 0 then."""
    return int(number(row, name, where)) if row.get(name) is not None else 0


def vector(row: Record, name: str, width: int, where: str) -> Array:
    value = row.get(name)
    if not is_numbers(value, width):
        raise InputError(f"{where}: {name} is {value!r}, expected {width} numbers; mend it")
    return np.array(value, dtype=np.float64)


def pose(row: Record, table: str) -> Pose:
    where = f"{table} {row['token']!r}"
    return Pose.of(vector(row, "translation", 3, where).tolist(), vector(row, "rotation", 4, where).tolist())
