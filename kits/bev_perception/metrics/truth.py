"""What the metrics need of a nuScenes-format folder: truth of a split, groups of samples, tracks."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from core.files import read_list
from core.kit import InputError
from kits.bev_perception.data.nuscenes import NuScenes
from kits.bev_perception.data.tables import MEND, number, text
from kits.bev_perception.metrics.events import Event, Track
from kits.bev_perception.metrics.nds import Truth


def split_tokens(data: NuScenes, split: str) -> list[str]:
    """The sample tokens of a split in the order of sample.json, as the devkit has them."""
    scenes = {scene.name for scene in data.split(split)}
    place = {token: name for name in scenes for token in data.scenes[name].samples}
    return [token for token in data.tables["sample"] if token in place]


def truth_of(data: NuScenes, tokens: Sequence[str]) -> dict[str, Truth]:
    """The truth as the devkit loads it; the ego vehicle stands where it was at the LiDAR's time."""
    return {
        token: Truth(data.truth(token), data.sample(token).lidar.ego.translation, data.racks(token)) for token in tokens
    }


def read_events(data: NuScenes) -> list[Event]:
    """The sudden obstacles of events.json beside the tables, in its order; [] where there is no such file.

    Each has a scene_token, an instance_token and a timestamp in microseconds. Raises InputError for one that lacks a
    field or leads nowhere.
    """
    file = data.root / data.version / "events.json"
    found = []
    for place, row in enumerate(read_list(file, MEND) if file.is_file() else []):
        where = f"{file}, event {place}"
        if not isinstance(row, dict):
            raise InputError(f"{where} is not an object; mend it")
        scene = data.get("scene", text(row, "scene_token", where), where)
        instance = data.get("instance", text(row, "instance_token", where), where)
        found.append(Event(str(scene["name"]), instance["token"], int(number(row, "timestamp", where))))
    return found


def groups(
    data: NuScenes, tokens: Collection[str], events: Sequence[Event] = (), after: float = 2.0
) -> dict[str, set[str]]:
    """Sample tokens of "day", "night", "rain" and "event" (up to `after` s from an event), the empty ones left out."""
    found: dict[str, set[str]] = {"day": set(), "night": set(), "rain": set(), "event": set()}
    for scene in data.scenes.values():
        mine = {token for token in scene.samples if token in tokens}
        found["night" if scene.night else "day"] |= mine
        found["rain"] |= mine if scene.rain else set()
        for event in events:
            if event.scene == scene.name:
                end = event.timestamp + after * 1e6
                found["event"] |= {t for t in mine if event.timestamp <= data.get("sample", t)["timestamp"] <= end}
    return {name: chosen for name, chosen in found.items() if chosen}


def tracks(data: NuScenes, instances: Collection[str], tokens: Sequence[str]) -> dict[str, Track]:
    """Where the instances are in the given samples, by instance."""
    seen: dict[str, list[tuple[int, int, list[float]]]] = {}
    for token in tokens:
        time = int(data.get("sample", token)["timestamp"])
        found = data.annotations(token)
        for i, instance in enumerate(found.instances):
            if instance in instances:
                row = (time, int(found.boxes.labels[i]), found.boxes.centers[i].tolist())
                seen.setdefault(instance, []).append(row)
    return {
        instance: Track(rows[0][1], np.array([r[0] for r in rows], np.float64), np.array([r[2] for r in rows]))
        for instance, rows in ((name, sorted(rows)) for name, rows in seen.items())
    }
