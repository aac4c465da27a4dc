"""A check of a nuScenes-format folder before anything is made of it: tables, chains, times, conventions and files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from core.files import inside
from core.kit import InputError
from core.progress import progress
from kits.bev_perception.data.classes import CAMERAS, LIDAR
from kits.bev_perception.data.conventions import Finding, box_doubts, mount_doubts, pose_doubts, view_doubts
from kits.bev_perception.data.nuscenes import NuScenes
from kits.bev_perception.data.recordings import Recording, Sample, read_image, read_points
from kits.bev_perception.data.tables import REFERENCES, TABLES, find_version, is_number, is_numbers, read_table

SHOWN = 10  # findings of one kind; the last says how many more there are
VECTORS = {
    "ego_pose": {"translation": 3, "rotation": 4},
    "calibrated_sensor": {"translation": 3, "rotation": 4},
    "sample_annotation": {"translation": 3, "size": 3, "rotation": 4},
}
TEXTS = {
    "sample_data": ("filename",),
    "scene": ("name",),
    "sensor": ("channel",),
    "category": ("name",),
    "attribute": ("name",),
}
TIMED = ("ego_pose", "sample", "sample_data")
CHAINS = ("sample", "sample_data", "sample_annotation")
STEP = (0.05, 5.0)  # s between keyframes; times in another unit than microseconds are far off
LATE, FAR_OFF = 0.15, 0.5  # s between a camera and the LiDAR of its sample
DARK = 8  # of 255, the brightest that all but a thousandth of a black image's pixels are
ORDER = {"error": 0, "warning": 1}


def check_folder(root: Path | str, version: str | None = None, *, files: int = 400) -> list[Finding]:
    """All faults of a folder, errors first; [] where nothing is wrong.

    Boxes and points are held against each other in at most `files` samples, and at most `files` images and LiDAR sweeps
    are opened, evenly spread; of the others only the existence is checked. Of one kind ten are listed and the rest
    counted. Where the tables themselves are broken only that is told. Raises InputError where there are no tables.
    """
    root = Path(root)
    check = _Check(root, version or find_version(root))
    if check.tables.keys() == set(TABLES):
        check.records()
        check.chains()
        check.scenes()
        try:
            check.loaded(NuScenes(root, check.version), files)
        except InputError as error:
            if not check.findings:
                check.add("error", "", "", *_halves(error))
    return sorted(check.shortened(), key=lambda finding: ORDER[finding.severity])


class _Check:
    def __init__(self, root: Path, version: str) -> None:
        self.root, self.version = root, version
        self.findings: list[Finding] = []
        self.tables: dict[str, dict[str, dict[str, Any]]] = {}
        for name in TABLES:
            try:
                self.tables[name] = read_table(root / version / f"{name}.json")
            except InputError as error:
                self.add("error", name, "", *_halves(error))

    def add(self, severity: Literal["error", "warning"], table: str, token: str, what: str, mend: str) -> None:
        self.findings.append(Finding(severity, table, token, what, mend))

    def shortened(self) -> Iterator[Finding]:
        """The first findings of each kind, the last of them with the number of the others."""
        counts = Counter((f.severity, f.table, f.mend) for f in self.findings)
        seen: Counter[tuple[str, str, str]] = Counter()
        for found in self.findings:
            kind = (found.severity, found.table, found.mend)
            seen[kind] += 1
            if seen[kind] == SHOWN and counts[kind] > SHOWN:
                more = f"{found.what} (and {counts[kind] - SHOWN} more like it)"
                yield Finding(found.severity, found.table, found.token, more, found.mend)
            elif seen[kind] <= SHOWN:
                yield found

    def records(self) -> None:
        """Fields that are missing or of another kind, and tokens that lead nowhere."""
        for table, rows in self.tables.items():
            for token, row in rows.items():
                for what in self._faults(table, row):
                    self.add("error", table, token, what, "mend the field")
                for field, target in REFERENCES.get(table, {}).items():
                    value = row.get(field)
                    ends = field in ("prev", "next") or (table, field) == ("sample_annotation", "visibility_token")
                    for to in value if isinstance(value, list) else [value]:
                        if not isinstance(to, str) or (to not in self.tables[target] and not (ends and to == "")):
                            what = f"{field} {to!r} is not in {target}.json"
                            self.add("error", table, token, what, "mend the token or add the record it leads to")

    def _faults(self, table: str, row: dict[str, Any]) -> Iterator[str]:
        for field, width in VECTORS.get(table, {}).items():
            value: Any = row.get(field)
            if not is_numbers(value, width):
                yield f"{field} is {value!r}, expected {width} numbers"
            elif field == "rotation" and abs(np.linalg.norm(value) - 1) > 1e-3:
                yield f"rotation has length {np.linalg.norm(value):.4g}, expected a quaternion w, x, y, z of length 1"
            elif field == "size" and min(value) <= 0:
                yield f"size is {value}, expected width, length, height above 0"
        if table in TIMED and not is_number(row.get("timestamp")):
            yield f"timestamp is {row.get('timestamp')!r}, expected microseconds"
        for field in TEXTS.get(table, ()):
            if not isinstance(row.get(field), str) or not row[field]:
                yield f"{field} is {row.get(field)!r}, expected text"

    def chains(self) -> None:
        """prev and next that do not answer each other; times that do not rise along a chain."""
        rising = "let timestamps rise along the chain"
        for table in CHAINS:
            if table == "sample_annotation" and any(f.mend == rising for f in self.findings):
                continue  # boxes have the times of their samples
            rows = self.tables[table]
            for token, row in rows.items():
                after = rows.get(str(row.get("next")))
                if after is None:
                    continue
                if after.get("prev") != token:
                    what = f"next {row['next']!r} has prev {after.get('prev')!r}"
                    self.add("error", table, token, what, "let prev and next answer each other")
                now, then = self._time(table, row), self._time(table, after)
                if now is not None and then is not None and then <= now:
                    what = f"its next is {(then - now) * 1e-6:g} s after it, expected later"
                    self.add("error", table, token, what, rising)

    def _time(self, table: str, row: dict[str, Any]) -> float | None:
        if table == "sample_annotation":
            row = self.tables["sample"].get(str(row.get("sample_token")), {})
        value = row.get("timestamp")
        return value if is_number(value) else None

    def scenes(self) -> None:
        """Empty scenes, chains of another length than told, samples without scene or boxes, keyframes that lack."""
        boxes = Counter(str(row.get("sample_token")) for row in self.tables["sample_annotation"].values())
        reached: set[str] = set()
        if not self.tables["scene"]:
            self.add("error", "scene", "", "there is no scene", "add scenes, or give another folder")
        for token, row in self.tables["scene"].items():
            chain: list[str] = []
            at = row.get("first_sample_token")
            while isinstance(at, str) and at in self.tables["sample"] and at not in reached:
                chain.append(at)
                reached.add(at)
                at = self.tables["sample"][at].get("next")
            if not chain:
                self.add("error", "scene", token, "the scene is empty", "give it samples or drop it")
                continue
            if row.get("nbr_samples") != len(chain) or row.get("last_sample_token") != chain[-1]:
                what = f"its chain has {len(chain)} samples to {chain[-1]!r}, the table says {row.get('nbr_samples')}"
                mend = "mend nbr_samples and last_sample_token, or the chain in sample.json"
                self.add("error", "scene", token, f"{what} to {row.get('last_sample_token')!r}", mend)
            times = [self._time("sample", self.tables["sample"][t]) for t in chain]
            for t, a, b in zip(chain, times, times[1:]):
                if a is not None and b is not None and b > a and not STEP[0] <= (b - a) * 1e-6 <= STEP[1]:
                    what = f"the next keyframe is {(b - a) * 1e-6:g} s away"
                    self.add("error", "sample", t, what, "give microseconds, or split the scene at the gap")
        for token in self.tables["sample"]:
            if token not in reached:
                what = "no scene's chain leads to it"
                self.add("error", "sample", token, what, "mend prev and next, or drop the sample")
            if not boxes[token]:
                mend = "annotate it, or know that every detection in it counts as false"
                self.add("warning", "sample", token, "it has no boxes", mend)

    def loaded(self, data: NuScenes, files: int) -> None:
        """What needs poses and files: conventions, times of the sensors, and the recordings themselves."""
        self.findings.extend(mount_doubts(data))
        self.findings.extend(pose_doubts(data))
        self.findings.extend(box_doubts(data))
        channels = {str(row.get("channel")) for row in self.tables["sensor"].values()}
        for channel in (*CAMERAS, LIDAR):
            if channel not in channels:
                mend = f"name the cameras {', '.join(CAMERAS)} and the LiDAR {LIDAR}"
                self.add("error", "sensor", "", f"there is no channel {channel}", mend)
        samples = [sample for token in data.tables["sample"] if (sample := _sample(data, token)) is not None]
        for sample in samples:
            for channel in (*CAMERAS, LIDAR):
                if channel in channels and channel not in sample.recordings:
                    self.add(
                        "error", "sample", sample.token, f"it has no {channel} keyframe", "add it to sample_data.json"
                    )
            self._sensor_times(sample)
        self.findings.extend(view_doubts(data, _spread(samples, files)))
        self._files(data, files)

    def _sensor_times(self, sample: Sample) -> None:
        if LIDAR not in sample.recordings:
            return
        lidar = sample.lidar
        away = abs(sample.timestamp - lidar.timestamp) * 1e-6
        if away > LATE:
            what = f"{away:.3g} s from the timestamp of its sample"
            self.add("warning", "sample_data", lidar.token, what, "let the sample have the time of its LiDAR sweep")
        for channel in CAMERAS:
            if channel in sample.recordings:
                camera = sample.recordings[channel]
                away = abs(camera.timestamp - lidar.timestamp) * 1e-6
                if away > LATE:
                    what = f"{channel} is {away:.3g} s from the LiDAR of its sample"
                    severity: Literal["error", "warning"] = "error" if away > FAR_OFF else "warning"
                    self.add(severity, "sample_data", camera.token, what, "pair recordings of the same moment")

    def _files(self, data: NuScenes, limit: int) -> None:
        there: dict[bool, list[Recording]] = {True: [], False: []}
        for token, row in data.tables["sample_data"].items():
            try:
                path = inside(self.root, str(row.get("filename")), self.root / self.version / "sample_data.json")
                recording = data.recording(token)
            except InputError as error:
                if not any(f.token == token for f in self.findings):
                    self.add("error", "sample_data", token, *_halves(error))
                continue
            if recording.channel not in (*CAMERAS, LIDAR):
                continue
            if not path.is_file():
                what = f"{recording.channel} file {row['filename']} is missing"
                self.add("error", "sample_data", token, what, "add the file, or drop the record")
            else:
                there[recording.channel == LIDAR].append(recording)
        chosen = [*_spread(there[False], limit), *_spread(there[True], limit)]
        with progress("check files", len(chosen)) as bar:
            for recording in chosen:
                (self._lidar if recording.channel == LIDAR else self._camera)(recording)
                bar.advance(recording.channel)

    def _camera(self, recording: Recording) -> None:
        try:
            image = read_image(recording.path, recording.size, recording.token)
        except InputError as error:
            self.add("error", "sample_data", recording.token, *_halves(error))
            return
        mend = "know that the detector sees nothing in it, or drop the sample"
        if np.quantile(image[::4, ::4], 0.999) < DARK:
            self.add("warning", "sample_data", recording.token, f"the {recording.channel} image is black", mend)
        elif image[::4, ::4].std() < 1:
            self.add("warning", "sample_data", recording.token, f"the {recording.channel} image is of one colour", mend)

    def _lidar(self, recording: Recording) -> None:
        try:
            points = read_points(recording.path, recording.token)
        except InputError as error:
            self.add("error", "sample_data", recording.token, *_halves(error))
            return
        if bad := int((~np.isfinite(points).all(axis=1)).sum()):
            what = f"{bad} of {len(points)} points are not finite"
            self.add("error", "sample_data", recording.token, what, "leave these points out of the file")


def _sample(data: NuScenes, token: str) -> Sample | None:
    """A sample, or None where its records have faults that were found before."""
    try:
        return data.sample(token)
    except InputError:
        return None


def _spread(items: list[Any], limit: int) -> list[Any]:
    """At most `limit` of the items, evenly spread."""
    if len(items) <= limit:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, limit).round().astype(int)]


def _halves(error: InputError) -> tuple[str, str]:
    """What is wrong and what would mend it, of an error's one line."""
    what, _, mend = str(error).rpartition("; ")
    return (what, mend) if what else (mend, "mend it")
