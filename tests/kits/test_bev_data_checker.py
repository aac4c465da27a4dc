"""Every kind of fault, put into a sound small folder, is found with table, token and mend; real folders are sound."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import pytest

from core.kit import InputError
from kits.bev_perception.data.can_bus import CanBus
from kits.bev_perception.data.checker import check_folder
from kits.bev_perception.data.classes import CAMERAS
from kits.bev_perception.data.geometry import quaternion, rotation_matrix
from kits.bev_perception.data.nuscenes import NuScenes
from tests.kits.bev_folders import REAL, Tables, make_tables, real_folder, small_folder, token

SCENE, SAMPLE, BOX = token("scene", 0), token("sample", 0, 1), token("box0", 0, 1)
FRONT, LIDAR_1 = token("CAM_FRONT", 0, 1), token("LIDAR_TOP", 0, 2)


def row(tables: Tables, table: str, name: str) -> dict:  # type: ignore[type-arg]
    return next(r for r in tables[table] if r["token"] == name)


def put(table: str, name: str, **fields: object) -> Callable[[Tables], None]:
    return lambda tables: row(tables, table, name).update(fields)


def each(table: str, change: Callable[[dict], object]) -> Callable[[Tables], None]:  # type: ignore[type-arg]
    def spoil(tables: Tables) -> None:
        for record in tables[table]:
            change(record)

    return spoil


def cameras(turn: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tables], None]:
    def spoil(tables: Tables) -> None:
        for channel in CAMERAS:
            record = row(tables, "calibrated_sensor", token("mount", channel))
            record["rotation"] = quaternion(turn(rotation_matrix(record["rotation"]))).tolist()

    return spoil


def mirror(turn: np.ndarray) -> np.ndarray:
    """As if y pointed right: the camera's own x axis is mirrored with it, so that a rotation remains."""
    return np.diag([1.0, -1, 1]) @ turn @ np.diag([-1.0, 1, 1])


def xyzw(record: dict) -> None:  # type: ignore[type-arg]
    record["rotation"] = [*record["rotation"][1:], record["rotation"][0]]


def exchange(a: str, b: str) -> Callable[[Tables], None]:
    def spoil(tables: Tables) -> None:
        one, other = row(tables, "sensor", token("sensor", a)), row(tables, "sensor", token("sensor", b))
        one["channel"], other["channel"] = b, a

    return spoil


def drop(table: str, test: Callable[[dict], bool]) -> Callable[[Tables], None]:  # type: ignore[type-arg]
    def spoil(tables: Tables) -> None:
        tables[table][:] = [r for r in tables[table] if not test(r)]

    return spoil


def every_box(**fields: object) -> Callable[[Tables], None]:
    return each("sample_annotation", lambda r: r.update(fields))


MOUNT = token("mount", "CAM_FRONT")
# spoil, severity, table, token (None: any), what
FAULTS = {
    "quaternion length": (put("ego_pose", FRONT, rotation=[1, 1, 0, 0]), "error", "ego_pose", FRONT, "length 1.414"),
    "rotation with NaN": (put("ego_pose", FRONT, rotation=[1, None, 0, 0]), "error", "ego_pose", FRONT, "4 numbers"),
    "ego poses x, y, z, w": (each("ego_pose", xyzw), "error", "ego_pose", "", "read as x, y, z, w it does not"),
    "boxes x, y, z, w": (each("sample_annotation", xyzw), "error", "sample_annotation", "", "x, y, z, w they do not"),
    "mounts x, y, z, w": (each("calibrated_sensor", xyzw), "error", "calibrated_sensor", None, "x, y, z, w they do"),
    "poses lie down": (
        each("ego_pose", lambda r: r.update(rotation=[0.70710678, 0.70710678, 0, 0])),
        "error",
        "ego_pose",
        None,
        "do not stand upright",
    ),
    "one box lies down": (
        put("sample_annotation", BOX, rotation=[0.70710678, 0.70710678, 0, 0]),
        "warning",
        "sample_annotation",
        BOX,
        "does not stand upright",
    ),
    "left-handed ego frame": (cameras(mirror), "error", "calibrated_sensor", None, "mirrored they do"),
    "mount inverted": (cameras(np.transpose), "error", "calibrated_sensor", None, "turned the other way they do"),
    "mount without the camera's axes": (
        cameras(lambda t: t @ np.array([[0.0, -1, 0], [0, 0, -1], [1, 0, 0]])),
        "error",
        "calibrated_sensor",
        None,
        "with x, y, z as forward, left, up they do",
    ),
    "two cameras exchanged": (
        exchange("CAM_FRONT_LEFT", "CAM_FRONT_RIGHT"),
        "error",
        "calibrated_sensor",
        token("mount", "CAM_FRONT_LEFT"),
        "CAM_FRONT_RIGHT looks where CAM_FRONT_LEFT should",
    ),
    "a mount in millimetres": (
        put("calibrated_sensor", MOUNT, translation=[1700, 0, 1500]),
        "error",
        "calibrated_sensor",
        MOUNT,
        "is mounted at",
    ),
    "LiDAR x forward": (
        put("calibrated_sensor", token("mount", "LIDAR_TOP"), rotation=[1, 0, 0, 0]),
        "warning",
        "calibrated_sensor",
        token("mount", "LIDAR_TOP"),
        "y axis of LIDAR_TOP does not look forward",
    ),
    "intrinsics of half the size": (
        put("calibrated_sensor", MOUNT, camera_intrinsic=[[125, 0, 80], [0, 125, 45], [0, 0, 1]]),
        "error",
        "calibrated_sensor",
        MOUNT,
        "principal point 80, 45",
    ),
    "principal point aside": (
        put("calibrated_sensor", MOUNT, camera_intrinsic=[[250, 0, 110], [0, 250, 90], [0, 0, 1]]),
        "warning",
        "calibrated_sensor",
        MOUNT,
        "principal point 110, 90",
    ),
    "focal length in millimetres": (
        put("calibrated_sensor", MOUNT, camera_intrinsic=[[5.5, 0, 160], [0, 5.5, 90], [0, 0, 1]]),
        "error",
        "calibrated_sensor",
        MOUNT,
        "focal lengths 5.5, 5.5",
    ),
    "negative focal length": (
        put("calibrated_sensor", MOUNT, camera_intrinsic=[[-250, 0, 160], [0, 250, 90], [0, 0, 1]]),
        "error",
        "calibrated_sensor",
        MOUNT,
        "not above 0",
    ),
    "no intrinsics": (
        put("calibrated_sensor", MOUNT, camera_intrinsic=[]),
        "error",
        "calibrated_sensor",
        MOUNT,
        "camera_intrinsic of CAM_FRONT is []",
    ),
    "camera of another name": (
        put("sensor", token("sensor", "CAM_BACK"), channel="CAM_REAR"),
        "error",
        "sensor",
        "",
        "no channel CAM_BACK",
    ),
    "a camera without a keyframe": (
        put("sample_data", FRONT, is_key_frame=False),
        "error",
        "sample",
        SAMPLE,
        "no CAM_FRONT keyframe",
    ),
    "time runs back": (put("sample", SAMPLE, timestamp=1), "error", "sample", token("sample", 0, 0), "expected later"),
    "seconds for microseconds": (
        each("sample", lambda r: r.update(timestamp=r["timestamp"] // 1000)),
        "error",
        "sample",
        token("sample", 0, 0),
        "next keyframe is 0.0005 s away",
    ),
    "a camera that is late": (
        lambda t: row(t, "sample_data", FRONT).update(timestamp=row(t, "sample_data", FRONT)["timestamp"] - 200_000),
        "warning",
        "sample_data",
        FRONT,
        "CAM_FRONT is 0.22 s from the LiDAR",
    ),
    "a camera of another moment": (
        lambda t: row(t, "sample_data", FRONT).update(timestamp=row(t, "sample_data", FRONT)["timestamp"] + 600_000),
        "error",
        "sample_data",
        FRONT,
        "CAM_FRONT is 0.58 s from the LiDAR",
    ),
    "a box that no camera sees": (
        lambda t: row(t, "sample_annotation", BOX)["translation"].__setitem__(2, 80.0),
        "warning",
        "sample_annotation",
        BOX,
        "projects outside every camera",
    ),
    "all boxes out of sight": (
        each("sample_annotation", lambda r: r["translation"].__setitem__(2, 80.0)),
        "error",
        "calibrated_sensor",
        "",
        "20 of 20 boxes within 50 m project outside every camera",
    ),
    "points beside the boxes": (
        put("calibrated_sensor", token("mount", "LIDAR_TOP"), translation=[5, 5, 1.8]),
        "error",
        "calibrated_sensor",
        "",
        "hold none",
    ),
    "sizes as length, width": (
        each("sample_annotation", lambda r: r.update(size=[r["size"][1], r["size"][0], r["size"][2]])),
        "error",
        "sample_annotation",
        "",
        "times as wide as long",
    ),
    "boxes that look aside": (
        every_box(rotation=[0.70710678, 0, 0, 0.70710678]),
        "error",
        "sample_annotation",
        "",
        "drive 90 degrees aside",
    ),
    "a flat box": (put("sample_annotation", BOX, size=[1, 0, 1]), "error", "sample_annotation", BOX, "above 0"),
    "a dangling sensor": (
        put("calibrated_sensor", MOUNT, sensor_token="gone"),
        "error",
        "calibrated_sensor",
        MOUNT,
        "sensor_token 'gone' is not in sensor.json",
    ),
    "a dangling attribute": (
        put("sample_annotation", BOX, attribute_tokens=["gone"]),
        "error",
        "sample_annotation",
        BOX,
        "attribute_tokens 'gone' is not in attribute.json",
    ),
    "a dangling ego pose": (
        drop("ego_pose", lambda r: r["token"] == FRONT),
        "error",
        "sample_data",
        FRONT,
        "is not in ego_pose.json",
    ),
    "a broken chain": (put("sample", SAMPLE, prev=""), "error", "sample", token("sample", 0, 0), "has prev ''"),
    "an empty scene": (put("scene", SCENE, first_sample_token=""), "error", "scene", SCENE, "is empty"),
    "a wrong count": (put("scene", SCENE, nbr_samples=9), "error", "scene", SCENE, "the table says 9"),
    "a sample of no scene": (
        put("sample", SAMPLE, next=""),
        "error",
        "sample",
        token("sample", 0, 2),
        "no scene's chain leads to it",
    ),
    "no scenes": (lambda t: t["scene"].clear(), "error", "scene", "", "there is no scene"),
    "a sample without boxes": (
        lambda t: [
            drop("sample_annotation", lambda r: r["sample_token"] == SAMPLE)(t),
            each("sample_annotation", lambda r: r.update(prev="", next=""))(t),
        ],
        "warning",
        "sample",
        SAMPLE,
        "it has no boxes",
    ),
    "a path that climbs": (
        put("sample_data", FRONT, filename="../../etc/passwd"),
        "error",
        "sample_data",
        FRONT,
        "is refused",
    ),
    "a missing file": (
        put("sample_data", FRONT, filename="samples/CAM_FRONT/none.jpg"),
        "error",
        "sample_data",
        FRONT,
        "none.jpg is missing",
    ),
    "an image of another size": (
        put("sample_data", FRONT, width=640, height=360),
        "error",
        "sample_data",
        FRONT,
        "is 320 x 180, the table says 640 x 360",
    ),
    "a token twice": (
        lambda t: t["sample"].append(dict(t["sample"][0])),
        "error",
        "sample",
        "",
        "occurs twice",
    ),
}


def test_a_sound_folder_has_no_finding(tmp_path: Path) -> None:
    assert check_folder(small_folder(tmp_path, scenes=2)) == []


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str, tmp_path: Path) -> None:
    spoil, severity, table, where, what = FAULTS[name]
    found = check_folder(small_folder(tmp_path, spoil))
    hits = [f for f in found if what in f.what]
    assert hits, "\n".join(map(str, found))
    assert {(f.severity, f.table) for f in hits} == {(severity, table)}
    assert where is None or where in {f.token for f in hits}
    assert all(f.mend for f in hits)


FILES: dict[str, tuple[str, Callable[[Path], object], str, str]] = {
    "cut off image": (FRONT, lambda f: f.write_bytes(f.read_bytes()[:3000]), "error", "is cut off"),
    "not an image": (FRONT, lambda f: f.write_bytes(b"text" * 100), "error", "is not a readable image"),
    "black image": (FRONT, lambda f: cv2.imwrite(str(f), np.zeros((180, 320, 3), np.uint8)), "warning", "is black"),
    "grey image": (
        FRONT,
        lambda f: cv2.imwrite(str(f), np.full((180, 320, 3), 99, np.uint8)),
        "warning",
        "is of one colour",
    ),
    "cut off points": (LIDAR_1, lambda f: f.write_bytes(f.read_bytes()[:-7]), "error", "expected points of 20 bytes"),
    "no points": (LIDAR_1, lambda f: f.write_bytes(b""), "error", "holds 0 bytes"),
    "points with NaN": (
        LIDAR_1,
        lambda f: np.full((4, 5), np.nan, "<f4").tofile(f),
        "error",
        "4 of 4 points are not finite",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_faulty_file_is_found(name: str, tmp_path: Path) -> None:
    where, spoil, severity, what = FILES[name]
    root = small_folder(tmp_path)
    record = next(r for r in json.loads((root / "v1.0-test/sample_data.json").read_text()) if r["token"] == where)
    spoil(root / record["filename"])
    hits = [f for f in check_folder(root) if what in f.what]
    assert [(f.severity, f.table, f.token) for f in hits] == [(severity, "sample_data", where)]


def test_mirrored_points_are_told_as_such(tmp_path: Path) -> None:
    root = small_folder(tmp_path)
    for file in (root / "samples/LIDAR_TOP").glob("*.bin"):
        points = np.fromfile(file, "<f4").reshape(-1, 5)
        points[:, 0] *= -1
        points.tofile(file)
    found = [f for f in check_folder(root) if "hold none" in f.what]
    assert len(found) == 1
    assert "of mirrored points only 0" in found[0].what


@pytest.mark.parametrize("table", ["sample", "log", "visibility"])
def test_broken_tables_are_told(table: str, tmp_path: Path) -> None:
    root = small_folder(tmp_path)
    file = root / f"v1.0-test/{table}.json"
    for content, what in (("{}", "not a list"), ("[1]", "record 0 has no token"), ("[", "not JSON")):
        file.write_text(content)
        assert [(f.severity, f.table) for f in check_folder(root) if what in f.what] == [("error", table)]
    file.unlink()
    assert [f.table for f in check_folder(root) if "missing" in f.what] == [table]


@pytest.mark.parametrize("table", [*make_tables(), "velocity"])
def test_no_value_of_any_field_ends_in_anything_but_a_finding_or_an_input_error(table: str, tmp_path: Path) -> None:
    root = small_folder(tmp_path, samples=2)
    if table == "velocity":
        (root / "velocity.json").write_text(json.dumps({token("box0", 0, 0): ["x", None]}))
        with pytest.raises(InputError, match=r"velocity.json: .* expected x, y"):
            NuScenes(root).annotations(token("sample", 0, 0))
        return
    file = root / f"v1.0-test/{table}.json"
    rows = json.loads(file.read_text())
    for field in rows[0]:
        for value in (None, [["x"]], "x", 10**400):
            file.write_text(json.dumps([rows[0] | {field: value}, *rows[1:]]))
            check_folder(root, files=2)
            with suppress(InputError):
                data = NuScenes(root)
                sample = data.sample(next(iter(data.scenes.values())).samples[0])
                sample.views((24, 40))
                data.annotations(sample.token)
                CanBus(data)(sample)


def test_many_findings_of_a_kind_are_counted(tmp_path: Path) -> None:
    found = check_folder(small_folder(tmp_path, every_box(attribute_tokens=["gone"])))
    assert len(found) == 10
    assert "and 10 more like it" in found[-1].what


def test_a_folder_without_tables_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder with scene.json"):
        check_folder(tmp_path)
    (small_folder(tmp_path) / "v2.0-test").mkdir()
    (tmp_path / "v2.0-test/scene.json").write_text("[]")
    with pytest.raises(InputError, match="several folders"):
        check_folder(tmp_path)


@pytest.mark.parametrize("name", REAL)
def test_real_folders_have_no_error(name: str) -> None:
    found = check_folder(real_folder(name), files=24)
    assert not found, "\n".join(map(str, found))


@pytest.mark.parametrize(
    ("table", "what"),
    [
        ("ego_pose", "x, y, z, w"),
        ("sample_annotation", "x, y, z, w"),
        ("calibrated_sensor", "x, y, z, w"),
    ],
)
def test_a_real_folder_with_another_order_of_quaternions(table: str, what: str, tmp_path: Path) -> None:
    source = real_folder("pandaset_002")
    for entry in source.iterdir():
        if entry.name != "v1.0-mini":
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "v1.0-mini").mkdir()
    for file in (source / "v1.0-mini").iterdir():
        rows = json.loads(file.read_text())
        if file.stem == table:
            for record in rows:
                xyzw(record)
        (tmp_path / "v1.0-mini" / file.name).write_text(json.dumps(rows))
    found = check_folder(tmp_path, files=2)
    assert any(f.severity == "error" and f.table == table and what in f.what for f in found)
