"""nuScenes-format folders as they are: 13 tables, cameras, LiDAR with sweeps, CAN bus, splits; without the devkit.

The tables are read once and indexed by token; images and points are read when asked for. Everything here
raises InputError that names table, token and mend; `checker.check_folder` finds all faults of a folder at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.files import inside, read_object
from core.kit import InputError
from kits.bev_perception.data.boxes import Boxes
from kits.bev_perception.data.classes import ATTRIBUTE_INDEX, BIKE_RACK, CATEGORIES, LABELS
from kits.bev_perception.data.geometry import Array
from kits.bev_perception.data.recordings import Recording, Sample
from kits.bev_perception.data.tables import (
    TABLES,
    Record,
    count,
    find_version,
    is_numbers,
    number,
    pose,
    read_table,
    text,
    vector,
)

MAX_GAP = 1.5  # s between two annotations of an instance, beyond which they tell no velocity

# The published scenes of validation; train is what else a v1.0-trainval or v1.0-mini folder holds.
VAL_SCENES = (
    (3, 3), (12, 18), (35, 36), (38, 39), (92, 110), (221, 221), (268, 278), (329, 332), (344, 346), (519, 524),
    (552, 565), (625, 627), (629, 630), (632, 638), (770, 771), (775, 775), (777, 778), (780, 784), (794, 800),
    (802, 802), (904, 917), (919, 931), (962, 963), (966, 969), (971, 972), (1059, 1073),
)  # fmt: skip
OFFICIAL_VAL = frozenset(f"scene-{n:04d}" for first, last in VAL_SCENES for n in range(first, last + 1))


@dataclass(frozen=True)
class Annotations:
    """The truth of a sample: `boxes` of the detection classes, and for each its token, instance, category, visibility.

    `visibility` is the level's token, "1" (0-40 %) to "4" (80-100 %), "" where the table has none.
    """

    boxes: Boxes
    tokens: tuple[str, ...]
    instances: tuple[str, ...]
    categories: tuple[str, ...]
    visibility: tuple[str, ...]


@dataclass(frozen=True)
class Scene:
    """A drive: its keyframes in the order of time. `night` and `rain` are read off its description, as is usual."""

    token: str
    name: str
    description: str
    samples: tuple[str, ...]

    @property
    def night(self) -> bool:
        return "night" in self.description.lower()

    @property
    def rain(self) -> bool:
        return "rain" in self.description.lower()


class NuScenes:
    """A nuScenes-format folder: samples, scenes, boxes and files by token.

    `root` holds samples/ and a folder of tables, `version`, which may be left out where there is only one. Raises
    InputError where a table is missing or is not a list of records with tokens.
    """

    def __init__(self, root: Path | str, version: str | None = None) -> None:
        self.root = Path(root)
        self.version = version or find_version(self.root)
        self.tables = {name: read_table(self.root / self.version / f"{name}.json") for name in TABLES}
        self._recordings: dict[str, dict[str, str]] = {}
        for row in self.tables["sample_data"].values():
            if row.get("is_key_frame"):
                channel = self._channel(row)
                self._recordings.setdefault(str(row.get("sample_token")), {})[channel] = row["token"]
        self._annotations: dict[str, list[str]] = {}
        for row in self.tables["sample_annotation"].values():
            self._annotations.setdefault(str(row.get("sample_token")), []).append(row["token"])

    def get(self, table: str, token: str, asked: str = "") -> Record:
        """The record of a token; InputError that names who `asked` for it where there is none."""
        found = self.tables[table].get(token)
        if found is None:
            raise InputError(
                f"{asked or self.version}: token {token!r} is not in {table}.json; mend it or add the record"
            )
        return found

    @cached_property
    def scenes(self) -> dict[str, Scene]:
        """By name, in the order of the table; InputError for a chain of samples that breaks or turns back."""
        found = {}
        for row in self.tables["scene"].values():
            where = f"scene {row['token']!r}"
            tokens: list[str] = []
            token = text(row, "first_sample_token", where)
            while token:
                if token in tokens[-1:] or len(tokens) > len(self.tables["sample"]):
                    raise InputError(f"{where}: its samples turn back at {token!r}; mend 'next' in sample.json")
                tokens.append(token)
                token = text(self.get("sample", token, where), "next", f"sample {token!r}")
            name = text(row, "name", where)
            found[name] = Scene(row["token"], name, str(row.get("description", "")), tuple(tokens))
        return found

    @cached_property
    def splits(self) -> dict[str, tuple[str, ...]]:
        """Names of scenes by split: those of splits.json, "all", and nuScenes' own where scenes are named as there."""
        scenes = tuple(self.scenes)
        found = {"all": scenes}
        prefix = "mini_" if self.version == "v1.0-mini" else ""
        if self.version in ("v1.0-mini", "v1.0-trainval") and all(name.startswith("scene-") for name in scenes):
            found[prefix + "val"] = tuple(n for n in scenes if n in OFFICIAL_VAL)
            found[prefix + "train"] = tuple(n for n in scenes if n not in OFFICIAL_VAL)
        for file in (self.root / "splits.json", self.root / self.version / "splits.json"):
            if file.is_file():
                for name, names in read_object(file, "give lists of scene names by split").items():
                    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
                        raise InputError(f"{file}: split {name!r} is not a list of scene names; mend it")
                    found[name] = tuple(names)
        return found

    def split(self, name: str) -> list[Scene]:
        """The scenes of a split in its order; InputError where the split or a scene of it is not known."""
        if name not in self.splits:
            raise InputError(
                f"{self.root}: no split {name!r}; add it to splits.json or use one of {', '.join(self.splits)}"
            )
        if unknown := [n for n in self.splits[name] if n not in self.scenes]:
            raise InputError(
                f"{self.root}: scene {unknown[0]!r} of split {name!r} is not in scene.json; mend splits.json"
            )
        return [self.scenes[n] for n in self.splits[name]]

    @cached_property
    def _places(self) -> dict[str, tuple[str, int]]:
        return {token: (scene.name, i) for scene in self.scenes.values() for i, token in enumerate(scene.samples)}

    def sample(self, token: str) -> Sample:
        """A keyframe by token."""
        row = self.get("sample", token)
        if token not in self._places:
            raise InputError(f"sample {token!r}: no scene's chain leads to it; mend prev and next in sample.json")
        scene, index = self._places[token]
        channels = self._recordings.get(token, {})
        return Sample(
            token,
            int(number(row, "timestamp", f"sample {token!r}")),
            scene,
            index,
            {channel: self.recording(data) for channel, data in channels.items()},
        )

    def samples(self, scene: Scene) -> Iterator[Sample]:
        """The keyframes of a scene in the order of time."""
        return (self.sample(token) for token in scene.samples)

    def recording(self, token: str) -> Recording:
        """One file of one sensor by its token in sample_data, keyframe or sweep."""
        row = self.get("sample_data", token)
        where = f"sample_data {token!r}"
        mount = self.get("calibrated_sensor", text(row, "calibrated_sensor_token", where), where)
        ego = self.get("ego_pose", text(row, "ego_pose_token", where), where)
        intrinsic = mount.get("camera_intrinsic") or None
        if intrinsic is not None and not (
            isinstance(intrinsic, list) and len(intrinsic) == 3 and all(is_numbers(line, 3) for line in intrinsic)
        ):
            raise InputError(
                f"calibrated_sensor {mount['token']!r}: camera_intrinsic {intrinsic!r} is not 3 x 3 numbers; mend it"
            )
        return Recording(
            token,
            text(row, "sample_token", where),
            self._channel(row),
            inside(self.root, text(row, "filename", where), self.root / self.version / "sample_data.json"),
            int(number(row, "timestamp", where)),
            bool(row.get("is_key_frame")),
            (count(row, "width", where), count(row, "height", where)),
            pose(ego, "ego_pose"),
            pose(mount, "calibrated_sensor"),
            None if intrinsic is None else np.array(intrinsic, dtype=np.float64),
            text(row, "prev", where),
            text(row, "next", where),
        )

    def before(self, recording: Recording) -> Iterator[Recording]:
        """The earlier recordings of the same sensor, newest first: keyframes and the sweeps between them."""
        yield from self._chain(recording, "prev")

    def after(self, recording: Recording) -> Iterator[Recording]:
        """The later recordings of the same sensor in the order of time."""
        yield from self._chain(recording, "next")

    def _chain(self, recording: Recording, way: str) -> Iterator[Recording]:
        seen = {recording.token}
        token = getattr(recording, way)
        while token:
            if token in seen:
                raise InputError(f"sample_data {token!r}: its chain turns back; mend '{way}' in sample_data.json")
            seen.add(token)
            recording = self.recording(token)
            yield recording
            token = getattr(recording, way)

    def merged_points(self, sample: Sample, sweeps: int = 10, *, clear: float = 1.0) -> NDArray[np.float32]:
        """(n, 6) x, y, z, intensity, ring, age: the keyframe's LiDAR and up to `sweeps` - 1 before it in its frame.

        `age` is seconds before the keyframe's sweep. The car's own points, nearer to the sensor than `clear` metres in
        both x and y, are left out, as are those that are not finite.
        """
        home = sample.lidar
        back = sample.pose.inverse
        parts = []
        for i, sweep in enumerate([home, *islice(self.before(home), sweeps - 1)]):
            points = sweep.points()
            points = points[(np.abs(points[:, :2]) >= clear).any(axis=1)]
            if i:
                points[:, :3] = (back @ sweep.ego @ sweep.sensor).apply(points[:, :3])
            age = np.full((len(points), 1), (home.timestamp - sweep.timestamp) * 1e-6, dtype=np.float32)
            parts.append(np.concatenate([points, age], axis=1))
        return np.concatenate(parts)

    def annotations(self, token: str) -> Annotations:
        """The truth of a sample in the global frame, in the order of the table; other categories are left out.

        Velocities are those of the devkit (see `velocity`), and where it knows none those of velocity.json.
        """
        return self._annotated(token, self._given_velocities)

    def truth(self, token: str) -> Boxes:
        """The boxes of a sample in the global frame exactly as the devkit scores them: without velocity.json."""
        return self._annotated(token, {}).boxes

    def _annotated(self, token: str, given: Mapping[str, Any]) -> Annotations:
        self.get("sample", token)
        rows = [self.tables["sample_annotation"][t] for t in self._annotations.get(token, [])]
        kept = [(row, category) for row in rows if (category := self._category(row)) in CATEGORIES]
        columns: list[list[Any]] = [[] for _ in range(8)]
        for row, category in kept:
            where = f"sample_annotation {row['token']!r}"
            velocity = self.velocity(row["token"])
            extra = given.get(row["token"])
            if np.isnan(velocity).any() and extra is not None:
                velocity = np.asarray(extra, dtype=np.float64)
            points = count(row, "num_lidar_pts", where) + count(row, "num_radar_pts", where)
            values = (
                vector(row, "translation", 3, where), vector(row, "size", 3, where), vector(row, "rotation", 4, where),
                velocity[:2], LABELS[CATEGORIES[category]], -1.0, self._attribute(row), points,
            )  # fmt: skip
            for column, value in zip(columns, values):
                column.append(value)
        return Annotations(
            Boxes.of(*columns),
            tuple(row["token"] for row, _ in kept),
            tuple(str(row.get("instance_token", "")) for row, _ in kept),
            tuple(category for _, category in kept),
            tuple(str(row.get("visibility_token", "")) for row, _ in kept),
        )

    def racks(self, token: str) -> tuple[tuple[Array, Array, Array], ...]:
        """Centre, size and rotation of a sample's bicycle racks in the global frame, for the metric."""
        rows = [self.tables["sample_annotation"][t] for t in self._annotations.get(token, [])]
        return tuple(
            (
                vector(row, "translation", 3, row["token"]),
                vector(row, "size", 3, row["token"]),
                vector(row, "rotation", 4, row["token"]),
            )
            for row in rows
            if self._category(row) == BIKE_RACK
        )

    def velocity(self, token: str) -> Array:
        """(3,) m/s of an annotation in the global frame, NaN where it cannot be told.

        From the annotation before to the one after, as the devkit does; at the ends of a track from the one that
        there is. Annotations more than 1.5 s apart (3 s from before to after) tell nothing.
        """
        row = self.get("sample_annotation", token)
        where = f"sample_annotation {token!r}"
        before, after = text(row, "prev", where), text(row, "next", where)
        if not before and not after:
            return np.full(3, np.nan)
        first = self.get("sample_annotation", before, where) if before else row
        last = self.get("sample_annotation", after, where) if after else row
        seconds = self._time(last) - self._time(first)
        if seconds > MAX_GAP * (2 if before and after else 1):
            return np.full(3, np.nan)
        if seconds <= 0:
            raise InputError(f"{where}: its neighbours are {seconds:g} s apart; mend the timestamps in sample.json")
        return (vector(last, "translation", 3, where) - vector(first, "translation", 3, where)) / seconds

    @cached_property
    def _given_velocities(self) -> Mapping[str, Any]:
        for file in (self.root / "velocity.json", self.root / self.version / "velocity.json"):
            if file.is_file():
                found = read_object(file, "give velocities x, y in m/s by annotation token")
                for token, value in found.items():
                    if value is not None and not is_numbers(value, 2):
                        raise InputError(f"{file}: {token!r} is {value!r}, expected x, y in m/s or null; mend it")
                return found
        return {}

    def _channel(self, row: Record) -> str:
        where = f"sample_data {row['token']!r}"
        mount = self.get("calibrated_sensor", text(row, "calibrated_sensor_token", where), where)
        where = f"calibrated_sensor {mount['token']!r}"
        return text(self.get("sensor", text(mount, "sensor_token", where), where), "channel", where)

    def _category(self, row: Record) -> str:
        where = f"sample_annotation {row['token']!r}"
        instance = self.get("instance", text(row, "instance_token", where), where)
        where = f"instance {instance['token']!r}"
        return text(self.get("category", text(instance, "category_token", where), where), "name", where)

    def _attribute(self, row: Record) -> int:
        where = f"sample_annotation {row['token']!r}"
        tokens = row.get("attribute_tokens") or []
        if not isinstance(tokens, list) or not all(isinstance(t, str) for t in tokens):
            raise InputError(f"{where}: attribute_tokens is {tokens!r}, expected a list of tokens; mend it")
        if len(tokens) > 1:
            raise InputError(f"{where}: {len(tokens)} attributes, at most one can be scored; keep one")
        if not tokens:
            return -1
        name = text(self.get("attribute", tokens[0], where), "name", f"attribute {tokens[0]!r}")
        if name not in ATTRIBUTE_INDEX:
            raise InputError(
                f"attribute {tokens[0]!r}: name {name!r} is not one of {', '.join(ATTRIBUTE_INDEX)}; mend it"
            )
        return ATTRIBUTE_INDEX[name]

    def _time(self, row: Record) -> float:
        where = f"sample_annotation {row['token']!r}"
        sample = self.get("sample", text(row, "sample_token", where), where)
        return 1e-6 * number(sample, "timestamp", f"sample {sample['token']!r}")
