"""nuScenes-format folders for tests: a small one that is written here, and the real ones beside the code.

The small one is a flat road: one scene of keyframes 0.5 s apart with a sweep between them, a car that drives on,
two others, a pedestrian and a cone, six grey cameras and a LiDAR whose points lie on the ground and on the boxes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from kits.bev_perception.data.boxes import Boxes
from kits.bev_perception.data.classes import BEARINGS, CAMERAS
from kits.bev_perception.data.geometry import Pose, about_z, multiply, quaternion

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
REAL = ("nuscenes_keyframe", "pandaset_002")
START = 1_700_000_000_000_000
WIDTH, HEIGHT, FOCAL = 320, 180, 250.0
SPEED, LIFT = 4.0, 1.8
# Category, attribute, centre in the global frame at the start, size, velocity.
THINGS = (
    ("vehicle.car", "vehicle.moving", (18.0, 3.0, 0.8), (1.9, 4.5, 1.6), (5.0, 0.0)),
    ("vehicle.car", "vehicle.parked", (12.0, -6.0, 0.8), (1.9, 4.5, 1.6), (0.0, 0.0)),
    ("human.pedestrian.adult", "pedestrian.moving", (9.0, 4.0, 0.9), (0.7, 0.7, 1.8), (0.0, -1.0)),
    ("movable_object.trafficcone", "", (-9.0, 2.0, 0.5), (0.4, 0.4, 1.0), (0.0, 0.0)),
    ("vehicle.truck", "vehicle.moving", (-20.0, 1.0, 1.5), (2.5, 8.0, 3.0), (4.0, 0.0)),
)

Tables = dict[str, list[dict[str, Any]]]


def real_folder(name: str) -> Path:
    """A real folder, or a skip that says what is absent."""
    if not (DATA / name).is_dir():
        pytest.skip(f"../shared/data/{name} is not beside the code")
    return DATA / name


def token(*parts: object) -> str:
    return hashlib.md5("/".join(map(str, parts)).encode(), usedforsecurity=False).hexdigest()


def make_tables(samples: int = 4, scenes: int = 1) -> Tables:
    """The 13 tables; sample_data holds a LiDAR sweep half way between keyframes."""
    t: Tables = {
        "attribute": [
            {"token": token("attribute", n), "name": n, "description": ""}
            for n in ("vehicle.moving", "vehicle.parked", "pedestrian.moving")
        ],
        "category": [{"token": token("category", n), "name": n, "description": ""} for n in {c[0] for c in THINGS}],
        "visibility": [{"token": "4", "level": "v80-100", "description": ""}],
        "log": [{"token": token("log"), "logfile": "", "vehicle": "", "date_captured": "", "location": ""}],
        "map": [{"token": token("map"), "category": "", "filename": "maps/m.png", "log_tokens": [token("log")]}],
        "sensor": [
            {"token": token("sensor", c), "channel": c, "modality": "camera" if c in CAMERAS else "lidar"}
            for c in (*CAMERAS, "LIDAR_TOP")
        ],
        "calibrated_sensor": [],
        "ego_pose": [],
        "instance": [],
        "sample": [],
        "sample_annotation": [],
        "sample_data": [],
        "scene": [],
    }
    t["category"].sort(key=lambda row: row["name"])
    ahead = quaternion([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])  # a camera that looks along the ego frame's x
    for channel in (*CAMERAS, "LIDAR_TOP"):
        camera = channel in CAMERAS
        turn = multiply(about_z(np.radians(BEARINGS[channel])), ahead) if camera else about_z(-np.pi / 2)
        t["calibrated_sensor"].append(
            {
                "token": token("mount", channel),
                "sensor_token": token("sensor", channel),
                "translation": [0.0, 0.0, 1.5 if camera else LIFT],
                "rotation": turn.tolist(),
                "camera_intrinsic": [[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]] if camera else [],
            }
        )
    for s in range(scenes):
        _scene(t, s, samples)
    return t


def _scene(t: Tables, s: int, samples: int) -> None:
    def chained(kind: str, i: int, last: int) -> dict[str, str]:
        return {
            "token": token(kind, s, i),
            "prev": token(kind, s, i - 1) if i else "",
            "next": token(kind, s, i + 1) if i < last else "",
        }

    begin = START + s * 60_000_000
    t["scene"].append(
        {
            "token": token("scene", s),
            "log_token": token("log"),
            "nbr_samples": samples,
            "first_sample_token": token("sample", s, 0),
            "last_sample_token": token("sample", s, samples - 1),
            "name": f"small-{s}",
            "description": "a road by night" if s % 2 else "a road by day",
        }
    )
    for i in range(samples):
        time = begin + i * 500_000
        t["sample"].append({**chained("sample", i, samples - 1), "timestamp": time, "scene_token": token("scene", s)})
        for channel in CAMERAS:
            row = chained(channel, i, samples - 1)
            name = f"samples/{channel}/{s}_{i}.jpg"
            t["sample_data"].append(_data(row, s, i, channel, time - 20_000, name, True))
            t["ego_pose"].append(_ego(row["token"], begin, time - 20_000))
        for half in range(2 if i < samples - 1 else 1):
            row = chained("LIDAR_TOP", 2 * i + half, 2 * samples - 2)
            name = f"{'sweeps' if half else 'samples'}/LIDAR_TOP/{s}_{2 * i + half}.pcd.bin"
            t["sample_data"].append(_data(row, s, i, "LIDAR_TOP", time + half * 250_000, name, not half))
            t["ego_pose"].append(_ego(row["token"], begin, time + half * 250_000))
        for k, (_, attribute, center, size, velocity) in enumerate(THINGS):
            x, y = np.array(center[:2]) + np.array(velocity) * i * 0.5
            heading = np.arctan2(velocity[1], velocity[0])
            t["sample_annotation"].append(
                {
                    **chained(f"box{k}", i, samples - 1),
                    "sample_token": token("sample", s, i),
                    "instance_token": token("instance", s, k),
                    "visibility_token": "4",
                    "attribute_tokens": [token("attribute", attribute)] if attribute else [],
                    "translation": [float(x), float(y), center[2]],
                    "size": list(size),
                    "rotation": about_z(heading).tolist(),
                    "num_lidar_pts": 8,
                    "num_radar_pts": 0,
                }
            )
    for k, thing in enumerate(THINGS):
        t["instance"].append(
            {
                "token": token("instance", s, k),
                "category_token": token("category", thing[0]),
                "nbr_annotations": samples,
                "first_annotation_token": token(f"box{k}", s, 0),
                "last_annotation_token": token(f"box{k}", s, samples - 1),
            }
        )


def _data(row: dict[str, str], s: int, i: int, channel: str, time: int, name: str, key: bool) -> dict[str, Any]:
    camera = channel in CAMERAS
    return {
        **row,
        "sample_token": token("sample", s, i),
        "ego_pose_token": row["token"],
        "calibrated_sensor_token": token("mount", channel),
        "timestamp": time,
        "fileformat": "jpg" if camera else "pcd",
        "is_key_frame": key,
        "height": HEIGHT if camera else 0,
        "width": WIDTH if camera else 0,
        "filename": name,
    }


def _ego(name: str, begin: int, time: int) -> dict[str, Any]:
    along = SPEED * (time - begin) * 1e-6
    return {"token": name, "timestamp": time, "translation": [along, 0.0, 0.0], "rotation": [1.0, 0.0, 0.0, 0.0]}


def write_folder(root: Path, tables: Tables, version: str = "v1.0-test") -> Path:
    """Tables, images and points; LiDAR points are the ground and eight within each box of the sample."""
    (root / version).mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        (root / version / f"{name}.json").write_text(json.dumps(rows))
    g = np.random.default_rng(0)
    poses = {row["token"]: row for row in tables["ego_pose"]}
    for row in tables["sample_data"]:
        file = root / row["filename"]
        file.parent.mkdir(parents=True, exist_ok=True)
        if row["width"]:
            grey = g.integers(60, 190, (HEIGHT // 4, WIDTH // 4, 3), dtype=np.uint8)
            cv2.imwrite(str(file), cv2.resize(grey, (WIDTH, HEIGHT)))
            continue
        ground = np.concatenate([g.uniform(-40, 40, (400, 2)), np.zeros((400, 1))], axis=1)
        pose = poses[row["ego_pose_token"]]
        lidar = Pose.of(pose["translation"], pose["rotation"]) @ Pose.of([0, 0, LIFT], about_z(-np.pi / 2).tolist())
        boxes = [b for b in tables["sample_annotation"] if b["sample_token"] == row["sample_token"]]
        parts = [lidar.inverse.apply(ground + [*pose["translation"][:2], 0])]
        for box in boxes:
            w, l, h = box["size"]  # noqa: E741
            inside = g.uniform(-0.45, 0.45, (8, 3)) * [l, w, h]
            parts.append(lidar.inverse.apply(Pose.of(box["translation"], box["rotation"]).apply(inside)))
        xyz = np.concatenate(parts)
        rest = np.stack([g.uniform(0, 255, len(xyz)), np.arange(len(xyz)) % 32], axis=1)
        np.concatenate([xyz, rest], axis=1).astype("<f4").tofile(file)
    return root


def small_folder(root: Path, mend: Callable[[Tables], None] = lambda tables: None, **sizes: int) -> Path:
    """A sound small folder, or one whose tables `mend` has spoiled first."""
    tables = make_tables(**sizes)
    sound = {name: [dict(row) for row in rows] for name, rows in tables.items()}
    write_folder(root, sound)
    mend(tables)
    for name, rows in tables.items():
        (root / "v1.0-test" / f"{name}.json").write_text(json.dumps(rows))
    return root


def perturbed(boxes: Boxes, seed: int) -> Boxes:
    """Predictions made of the truth: moved, turned, scaled, scored, some doubled and some left out.

    Sines stand for random numbers: they are the same in every version of NumPy. Everything is rounded, so that a
    results file tells all there is.
    """
    n = len(boxes)
    wave = np.sin(np.outer(np.arange(1, n + 1) * 12.9898 + seed * 78.233, np.arange(1, 12)) * 43.7585)
    centers = boxes.centers + wave[:, :3] * [1.2, 1.2, 0.2]
    yaws = boxes.yaws + wave[:, 3] * 0.5
    moved = Boxes.of(
        np.round(centers, 4),
        np.round(boxes.sizes * (1 + wave[:, 4:7] * 0.2), 4),
        np.round(about_z(yaws), 6),
        np.round(np.nan_to_num(boxes.velocities) + wave[:, 7:9], 4),
        np.where(wave[:, 9] > 0.9, (boxes.labels + 1) % 10, boxes.labels),
        np.round(0.5 + wave[:, 10] * 0.5, 2),
        np.where(wave[:, 8] > 0.5, -1, boxes.attributes),
    )
    kept = moved[wave[:, 6] > -0.8]
    double = moved[wave[:, 5] > 0.8]
    return Boxes.join([kept, replace(double, scores=np.round(double.scores * 0.6, 2))])
