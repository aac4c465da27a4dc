"""The devkit's `results_nusc.json`: predictions in the global frame by sample token, written and read with care."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core.files import read_object, write_text
from core.kit import InputError
from kits.bev_perception.data.boxes import Boxes
from kits.bev_perception.data.classes import ATTRIBUTE_INDEX, ATTRIBUTES, CLASSES, LABELS, likely_attribute
from kits.bev_perception.metrics.nds import sound

META = {"use_camera": True, "use_lidar": False, "use_radar": False, "use_map": False, "use_external": False}
WIDTHS = {"translation": 3, "size": 3, "rotation": 4, "velocity": 2}
MEND = "give the results_nusc.json of a detector: meta and results"


def with_attributes(boxes: Boxes) -> Boxes:
    """Boxes without an attribute given the likely one, see `likely_attribute`."""
    filled = [
        int(have) if have >= 0 else ATTRIBUTE_INDEX.get(likely_attribute(CLASSES[label], (vx, vy), height), -1)
        for have, label, (vx, vy), height in zip(
            boxes.attributes, boxes.labels, np.nan_to_num(boxes.velocities), boxes.sizes[:, 2]
        )
    ]
    return Boxes.of(
        boxes.centers, boxes.sizes, boxes.rotations, boxes.velocities, boxes.labels, boxes.scores, filled, boxes.num_pts
    )


def write_results(path: Path, predictions: Mapping[str, Boxes], meta: Mapping[str, bool] | None = None) -> None:
    """Write predictions (global frame) in the order they have; `meta` says which inputs were used (META: cameras).

    A velocity that is not known is written as NaN, which the devkit reads and strict JSON readers do not. Raises
    InputError where the devkit would refuse the file.
    """
    said = dict(META if meta is None else meta)
    _check_meta(path, said)
    results = {}
    for token, boxes in predictions.items():
        sound(f"{path}: sample {token!r}", boxes)
        results[token] = [
            {
                "sample_token": token,
                "translation": boxes.centers[i].tolist(),
                "size": boxes.sizes[i].tolist(),
                "rotation": boxes.rotations[i].tolist(),
                "velocity": boxes.velocities[i].tolist(),
                "detection_name": CLASSES[boxes.labels[i]],
                "detection_score": float(boxes.scores[i]),
                "attribute_name": ATTRIBUTES[boxes.attributes[i]] if boxes.attributes[i] >= 0 else "",
            }
            for i in range(len(boxes))
        ]
    write_text(path, json.dumps({"meta": said, "results": results}))


def read_results(path: Path, samples: Sequence[str] | None = None) -> tuple[dict[str, Boxes], dict[str, Any]]:
    """(predictions by sample token, meta) of a file in the devkit's format, in the order of the file.

    With `samples`, those alone and in their order, as the devkit takes a split of `splits.json`; the order
    decides between equal scores. Raises InputError that names sample, box and field of what is wrong.
    """
    found = read_object(path, MEND)
    meta, results = found.get("meta"), found.get("results")
    if not isinstance(meta, dict):
        raise InputError(
            f"{path}: field 'meta' is {_kind(meta)}, expected an object such as {json.dumps(META)}; add it"
        )
    if not isinstance(results, dict):
        raise InputError(
            f"{path}: field 'results' is {_kind(results)}, expected lists of boxes by sample token; add it"
        )
    _check_meta(path, meta)
    tokens = list(results) if samples is None else list(samples)
    if missing := [token for token in tokens if token not in results]:
        raise InputError(f"{path}: sample {missing[0]!r} is missing ({len(missing)} in all); give it an empty list")
    return {token: _boxes(path, token, results[token]) for token in tokens}, meta


def _boxes(path: Path, token: str, records: Any) -> Boxes:
    where = f"{path}: sample {token!r}"
    if not isinstance(records, list):
        raise InputError(f"{where} is {_kind(records)}, expected a list of boxes; mend it")
    rows = [_row(f"{where}, box {i}", token, record) for i, record in enumerate(records)]
    boxes = Boxes.of(*zip(*rows)) if rows else Boxes.none()
    sound(where, boxes)
    if len(bad := np.flatnonzero(~boxes.rotations.any(axis=1))):
        raise InputError(f"{where}, box {bad[0]}: rotation is zero, expected a quaternion w, x, y, z; mend it")
    return boxes


def _row(where: str, token: str, record: Any) -> tuple[Any, ...]:
    if not isinstance(record, dict):
        raise InputError(f"{where} is {_kind(record)}, expected an object; mend it")
    if record.get("sample_token") != token:
        raise InputError(f"{where}: sample_token {record.get('sample_token')!r} is not that of its list; mend it")
    values = []
    for name, width in WIDTHS.items():
        value = record.get(name)
        if not isinstance(value, list) or len(value) != width or not all(_number(v) for v in value):
            raise InputError(f"{where}: {name} is {value!r}, expected {width} numbers; mend it")
        values.append([float(v) for v in value])
    label, attribute = record.get("detection_name"), record.get("attribute_name")
    if not isinstance(label, str) or label not in LABELS:
        raise InputError(f"{where}: detection_name {label!r} is not one of {', '.join(CLASSES)}; mend it")
    if not isinstance(attribute, str) or (attribute and attribute not in ATTRIBUTE_INDEX):
        raise InputError(f'{where}: attribute_name {attribute!r} is not "" or one of {", ".join(ATTRIBUTES)}; mend it')
    score, points = record.get("detection_score", -1.0), record.get("num_pts", -1)
    for name, number in (("detection_score", score), ("num_pts", points)):
        if not _number(number):
            raise InputError(f"{where}: {name} is {number!r}, expected a number; mend it")
    if not np.isfinite(points):
        raise InputError(f"{where}: num_pts is {points!r}, expected a whole number; mend it")
    return *values, LABELS[label], float(score), ATTRIBUTE_INDEX.get(attribute, -1), int(points)


def _check_meta(path: Path, meta: Mapping[str, Any]) -> None:
    for name in META:
        if not isinstance(meta.get(name), bool):
            raise InputError(f"{path}: meta field {name!r} is {meta.get(name)!r}, expected true or false; add it")


def _number(value: Any) -> bool:
    # A whole number of any length is JSON, but no float.
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)


def _kind(value: Any) -> str:
    return "missing" if value is None else type(value).__name__
