"""The generated world: its tables, its geometry against its pictures and LiDAR, its lights and its events."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from core.kit import InputError
from kits.bev_perception.data.world import generate_world
from kits.bev_perception.data.world.actors import Actor, Scene
from kits.bev_perception.data.world.generate import _plan
from kits.bev_perception.data.world.lidar import sweep
from kits.bev_perception.data.world.raster import Stage, draw, visible_shares
from kits.bev_perception.data.world.rig import CAMERAS, LIDAR, rotation_matrix, view
from kits.bev_perception.data.world.shapes import MATTE, Model
from kits.bev_perception.data.world.tables import TABLES
from kits.bev_perception.data.world.town import Dressing, build_town

SIZE = (160, 90)
SAMPLES = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world") / "w"
    return generate_world(
        out, 2, 5, samples=SAMPLES, size=SIZE, event_share=1.0, val_share=0.0, supersample=1, workers=1, quiet=True
    )


@pytest.fixture(scope="module")
def tables(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {n: json.loads((folder / "v1.0-mini" / f"{n}.json").read_text()) for n in (*TABLES, "splits", "events")}


def by_token(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {r["token"]: r for r in rows}


def test_every_token_resolves(tables: dict[str, list[dict[str, Any]]]) -> None:
    index = {n: by_token(tables[n]) for n in TABLES}
    for name in TABLES:
        assert tables[name], f"{name} is empty"
        assert len(index[name]) == len(tables[name]), f"{name} holds a token twice"
        for row in tables[name]:
            for key, value in row.items():
                if key in ("prev", "next"):
                    if value:
                        back = index[name][value]["next" if key == "prev" else "prev"]
                        assert back == row["token"]
                elif key.endswith("_token") or key.endswith("_tokens"):
                    table = key.removesuffix("s").removesuffix("_token")
                    table = {"first_sample": "sample", "last_sample": "sample"}.get(table, table)
                    table = {"first_annotation": "sample_annotation", "last_annotation": "sample_annotation"}.get(
                        table, table
                    )
                    for one in value if isinstance(value, list) else [value]:
                        assert one in index[table], f"{name}.{key}: {one} is not in {table}"


def test_scenes_are_whole(folder: Path, tables: dict[str, list[dict[str, Any]]]) -> None:
    samples = by_token(tables["sample"])
    for scene in tables["scene"]:
        token, times = scene["first_sample_token"], []
        while token:
            times.append(samples[token]["timestamp"])
            last, token = token, samples[token]["next"]
        assert last == scene["last_sample_token"] and len(times) == scene["nbr_samples"] == SAMPLES
        assert set(np.diff(times)) == {500_000}
    for sample in tables["sample"]:
        keys = [d for d in tables["sample_data"] if d["sample_token"] == sample["token"] and d["is_key_frame"]]
        assert len(keys) == 7 and {d["timestamp"] for d in keys} == {sample["timestamp"]}
    sweeps = [d for d in tables["sample_data"] if not d["is_key_frame"]]
    assert len(sweeps) == 2 * 4 * (SAMPLES - 1)
    for data in tables["sample_data"]:
        assert (folder / data["filename"]).stat().st_size > 0
        late = samples[data["sample_token"]]["timestamp"] - data["timestamp"]
        assert 0 <= late < 500_000, "a sweep belongs to the sample that follows"
        if data["fileformat"] == "jpg":
            assert cv2.imread(str(folder / data["filename"])).shape == (data["height"], data["width"], 3)
    mask = cv2.imread(str(folder / tables["map"][0]["filename"]), cv2.IMREAD_GRAYSCALE)
    height = mask.shape[0]
    for pose in tables["ego_pose"][::50]:
        x, y, _ = pose["translation"]
        assert mask[height - 1 - int(y / 0.1), int(x / 0.1)] == 255, "ego left the road"


def test_val_holds_whole_pairs() -> None:
    plans = _plan("w", 10, 0, 20, SIZE, ("day", "night"), "val", 0.4, 0.3)
    assert [len(p.scenes) for p in plans] == [1] * 6 + [2, 2]
    assert [light for p in plans for _, _, light in p.scenes] == ["day", "night"] * 5
    assert sum(p.event is not None for p in plans) == 2 or sum(p.event is not None for p in plans) == 3
    assert len({p.seed for p in plans}) == len(plans)


def test_splits_and_lights(tables: dict[str, list[dict[str, Any]]]) -> None:
    first, second = tables["scene"]
    assert first["description"].startswith("Day,") and second["description"].startswith("Night,")
    splits: Any = tables["splits"]
    assert splits == {"all": ["scene-0001", "scene-0002"], "train": ["scene-0001", "scene-0002"], "val": []}


def test_boxes_move_as_their_velocity_says(tables: dict[str, list[dict[str, Any]]]) -> None:
    boxes, samples = by_token(tables["sample_annotation"]), by_token(tables["sample"])
    attributes = {r["token"]: r["name"] for r in tables["attribute"]}
    moving = still = 0
    for box in boxes.values():
        if not box["next"] or not box["attribute_tokens"]:
            continue
        after = boxes[box["next"]]
        seconds = (samples[after["sample_token"]]["timestamp"] - samples[box["sample_token"]]["timestamp"]) / 1e6
        way = np.hypot(*(np.subtract(after["translation"], box["translation"])[:2]))
        name = attributes[box["attribute_tokens"][0]]
        assert way / seconds < 14.0
        if name in ("vehicle.parked", "pedestrian.standing") and after["attribute_tokens"] == box["attribute_tokens"]:
            still += 1
            assert way < 0.06 * seconds / 0.5 + 0.06
        moving += name == "vehicle.moving" and way > 0.5
    assert moving > 10 and still > 10


def pose(row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    return rotation_matrix(row["rotation"]), np.asarray(row["translation"])


def points_inside(tables: dict[str, list[dict[str, Any]]], folder: Path, sample: str) -> dict[str, tuple[int, int]]:
    """Stored count and points within 1 cm of each box of a sample, recomputed from the file and the tables alone."""
    poses, sensors = by_token(tables["ego_pose"]), by_token(tables["calibrated_sensor"])
    data = next(
        d
        for d in tables["sample_data"]
        if d["sample_token"] == sample and d["is_key_frame"] and d["fileformat"] == "pcd"
    )
    cloud = np.fromfile(folder / data["filename"], np.float32).reshape(-1, 5)
    assert np.isfinite(cloud).all() and cloud[:, 4].min() >= 0 and cloud[:, 4].max() <= 31
    R, t = pose(sensors[data["calibrated_sensor_token"]])
    E, e = pose(poses[data["ego_pose_token"]])
    world = (cloud[:, :3] @ R.T + t) @ E.T + e
    counts = {}
    for box in tables["sample_annotation"]:
        if box["sample_token"] == sample:
            B, b = pose(box)
            local = (world - b) @ B
            w, length, h = box["size"]
            inside = (np.abs(local) <= np.array([length, w, h]) / 2 + 0.01).all(1) & (local[:, 2] > -h / 2 + 0.01)
            counts[box["token"]] = (box["num_lidar_pts"], int(inside.sum()))
    return counts


def test_lidar_points_are_counted_and_lie_in_their_box(folder: Path, tables: dict[str, list[dict[str, Any]]]) -> None:
    seen = 0
    for k in (0, SAMPLES // 2, SAMPLES - 1):
        for stored, found in points_inside(tables, folder, tables["sample"][k]["token"]).values():
            # every point stored for a box lies in it; a neighbour's point in it is possible and rare
            assert stored <= found <= 1.02 * stored + 3
            seen += stored > 5
    assert seen > 10


def test_day_and_night_share_everything_but_light(folder: Path, tables: dict[str, list[dict[str, Any]]]) -> None:
    day, night = ([s for s in tables["sample"] if s["scene_token"] == scene["token"]] for scene in tables["scene"])

    def boxes(sample: dict[str, Any]) -> list[Any]:
        keys = ("translation", "size", "rotation", "num_lidar_pts", "visibility_token", "attribute_tokens")
        return [[b[k] for k in keys] for b in tables["sample_annotation"] if b["sample_token"] == sample["token"]]

    poses = by_token(tables["ego_pose"])
    means: list[tuple[float, float]] = []
    for a, b in zip(day, night):
        assert boxes(a) == boxes(b)
        one, two = (
            {
                d["filename"].split("/")[1]: d
                for d in tables["sample_data"]
                if d["sample_token"] == s["token"] and d["is_key_frame"]
            }
            for s in (a, b)
        )
        for channel, data in one.items():
            other = two[channel]
            assert poses[data["ego_pose_token"]]["translation"] == poses[other["ego_pose_token"]]["translation"]
            if channel == "LIDAR_TOP":
                assert (folder / data["filename"]).read_bytes() == (folder / other["filename"]).read_bytes()
            else:
                bright, dark = (cv2.imread(str(folder / d["filename"])).mean() for d in (data, other))
                assert dark < bright
                means.append((float(bright), float(dark)))
    bright, dark = np.mean(means, 0)
    assert dark < 0.65 * bright


def test_event_appears_at_its_time(tables: dict[str, list[dict[str, Any]]]) -> None:
    events: Any = tables["events"]
    samples, instances = by_token(tables["sample"]), {r["token"] for r in tables["instance"]}
    assert len(events) == 2
    for event in events:
        assert event["kind"] in ("cut-in", "dart-out") and event["instance_token"] in instances
        levels = {
            samples[b["sample_token"]]["timestamp"]: int(b["visibility_token"])
            for b in tables["sample_annotation"]
            if b["instance_token"] == event["instance_token"]
        }
        before = [v for t, v in levels.items() if t < event["timestamp"]]
        after = [v for t, v in sorted(levels.items()) if t >= event["timestamp"]]
        assert before and set(before) == {1}, "hidden before its time"
        assert after[0] >= 2, "seen at the first keyframe after"


def digest(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_same_seed_same_bytes_in_any_number_of_processes(tmp_path: Path) -> None:
    def make(name: str, seed: int, workers: int) -> dict[str, str]:
        out = generate_world(
            tmp_path / name, 2, seed, samples=2, size=(96, 54), paired="none", event_share=0.0, supersample=1,
            workers=workers, quiet=True,
        )  # fmt: skip
        return digest(out)

    once = make("a", 1, 1)
    assert once == make("b", 1, 2)
    clouds = [v for k, v in once.items() if k.endswith(".bin")]
    assert len(set(clouds)) == len(clouds) == 2 * 6, "two geometries, six turns of the LiDAR each"


def test_arguments_that_make_no_world(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="light 'dusk' is not known"):
        generate_world(tmp_path, lights=("dusk",))
    with pytest.raises(InputError, match="between 32 and 1600"):
        generate_world(tmp_path, size=(16, 9))
    with pytest.raises(InputError, match="at least 1 scene"):
        generate_world(tmp_path, scenes=0)
    (tmp_path / "v1.0-mini").mkdir()
    (tmp_path / "v1.0-mini" / "scene.json").write_text("[]")
    with pytest.raises(InputError, match="already holds"):
        generate_world(tmp_path)


def cuboid(size: np.ndarray) -> np.ndarray:
    """Faces (6, 8, 3) of a box on the ground, corners counter-clockwise from outside."""
    w, length, h = size
    corners = np.array([[x, y, z] for x in (-length / 2, length / 2) for y in (-w / 2, w / 2) for z in (0.0, h)])
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = np.array([[corners[k] for k in q] + [corners[q[-1]]] * 4 for q in quads])
    for face in faces:
        normal = np.cross(face[1] - face[0], face[2] - face[1])
        assert normal @ (face[:4].mean(0) - [0, 0, h / 2]) > 0
    return faces


def bare(actors: list[Actor], ego: tuple[float, float, float]) -> Stage:
    nothing = Dressing(
        (-90.0, -90.0, 90.0, 90.0), np.zeros((0, 5)), np.zeros(0, int), *(np.zeros((0, n)) for n in (4, 3, 4))
    )
    return Stage(Scene((0,), build_town(0), nothing, actors, np.array([ego]), [], None))


def block(x: float, y: float, yaw: float, size: tuple[float, float, float] = (1.9, 4.5, 1.6)) -> Actor:
    dims = np.array(size)
    red, parts = np.tile([0.0, 0.0, 255.0], (6, 1)), np.zeros(6, int)
    model = Model([cuboid(dims)], red, np.full(6, MATTE), parts, np.zeros((0, 6)), np.zeros((0, 4)))
    return Actor("car", dims, model, np.array([[x, y, yaw]]))


@pytest.mark.parametrize("channel", list(CAMERAS))
def test_a_box_is_drawn_where_its_corners_project(channel: str) -> None:
    """The outline of a lone cuboid agrees within a pixel with its corners put through the tables' numbers."""
    ego = (12.0, -7.0, 0.6)
    E = rotation_matrix([np.cos(0.3), 0, 0, np.sin(0.3)])
    mount, cam = CAMERAS[channel], view(channel, (800, 450))
    forward = E @ rotation_matrix(mount.rotation) @ [0, 0, 1]
    for distance, side, yaw in ((9.0, 1.0, 0.3), (16.0, -2.0, 2.0), (38.0, 3.0, -1.1)):
        at = np.array(ego[:2]) + forward[:2] * distance + np.array([-forward[1], forward[0]]) * side
        actor = block(float(at[0]), float(at[1]), yaw)
        stage = bare([actor], ego)
        drawing = draw(stage, stage.frame(0), cam, cam, 1)
        rows, columns = np.nonzero(drawing.ids)
        w, length, h = actor.size
        corners = np.array([[x, y, z] for x in (-length / 2, length / 2) for y in (-w / 2, w / 2) for z in (0, h)])
        turn = rotation_matrix([np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)])
        world = corners @ turn.T + [*at, 0]
        in_ego = (world - [ego[0], ego[1], 0]) @ E
        in_camera = (in_ego - mount.translation) @ rotation_matrix(mount.rotation)
        pixels = in_camera @ cam.K.T
        u, v = pixels[:, 0] / pixels[:, 2], pixels[:, 1] / pixels[:, 2]
        for found, wanted, last in (
            (columns.min(), u.min(), 800), (columns.max() + 1, u.max(), 800),
            (rows.min(), v.min(), 450), (rows.max() + 1, v.max(), 450),
        ):  # fmt: skip
            assert abs(found - np.clip(wanted, 0, last)) <= 1.0
        depth = drawing.depth[drawing.ids > 0]
        assert in_camera[:, 2].min() - 0.01 <= depth.min() and depth.max() <= in_camera[:, 2].max() + 0.01


def test_what_stands_in_front_hides_what_is_behind() -> None:
    """A person-sized box beside a bus-sized one: painted by depth, not by the distance of centres."""
    bus = block(20.0, -3.0, 0.0, (2.9, 11.0, 3.4))
    before, behind = block(17.0, -1.0, 0.0, (0.6, 0.6, 1.7)), block(34.0, -3.0, 0.0, (1.9, 4.5, 1.6))
    stage = bare([bus, before, behind], (0.0, 0.0, 0.0))
    shares = visible_shares(stage, stage.frame(0), [view("CAM_FRONT", (400, 225))])
    assert shares[1] == 1.0 and shares[2] < 0.2 and 0.5 < shares[0] < 1.0


def test_lidar_measures_the_distance_to_a_box() -> None:
    """Ranges to a lone cuboid straight ahead agree with its near face to the noise and the inset of surfaces."""
    actor = block(15.0, 0.0, 0.0)
    actor.model.boxes = np.array([[0.0, 0.0, 0.8, 2.25, 0.95, 0.8]])
    cloud, owner = sweep(bare([actor], (0.0, 0.0, 0.0)), 0)
    points = cloud[:, :3] @ rotation_matrix(LIDAR.rotation).T + LIDAR.translation
    hit = points[owner == 0]
    assert len(hit) > 15
    face = hit[hit[:, 2] < 1.5]
    assert np.abs(face[:, 0] - 12.775).max() < 0.05
    assert np.abs(hit[:, 1]).max() < 0.95 + 0.01
    road = points[owner == -1]
    assert len(road) > 1000 and np.abs(road[:, 2]).max() < 0.03
    # the lowest beam, 30.67 degrees down from 1.84 m, give or take the mount's tilt of 1.4 degrees
    nearest = np.hypot(*(road[:, :2] - LIDAR.translation[:2]).T).min()
    assert 1.84 / np.tan(np.radians(32.1)) - 0.05 < nearest < 1.84 / np.tan(np.radians(29.2))
