"""Rows of the thirteen nuScenes tables, with tokens that follow from what they name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from kits.bev_perception.data.world.actors import KEYFRAME_TICKS, TICK, Actor, Scene
from kits.bev_perception.data.world.rig import CAMERAS, LIDAR, intrinsic_matrix, unit_quaternion

Row = dict[str, Any]

TABLES = (
    "attribute", "calibrated_sensor", "category", "ego_pose", "instance", "log", "map", "sample",
    "sample_annotation", "sample_data", "scene", "sensor", "visibility",
)  # fmt: skip
CHANNELS = (*CAMERAS, "LIDAR_TOP")
CATEGORIES = {
    "car": "vehicle.car",
    "truck": "vehicle.truck",
    "bus": "vehicle.bus.rigid",
    "trailer": "vehicle.trailer",
    "construction_vehicle": "vehicle.construction",
    "pedestrian": "human.pedestrian.adult",
    "child": "human.pedestrian.child",
    "motorcycle": "vehicle.motorcycle",
    "bicycle": "vehicle.bicycle",
    "traffic_cone": "movable_object.trafficcone",
    "barrier": "movable_object.barrier",
}
ATTRIBUTES = (
    "vehicle.moving", "vehicle.stopped", "vehicle.parked", "cycle.with_rider", "cycle.without_rider",
    "pedestrian.moving", "pedestrian.standing", "pedestrian.sitting_lying_down",
)  # fmt: skip
VISIBILITY = (("1", "v0-40"), ("2", "v40-60"), ("3", "v60-80"), ("4", "v80-100"))
EPOCH = 1_600_000_000_000_000
"""Microseconds of the first scene's start; scenes follow every minute."""
LOGFILE = "fitkit-world"


def token(*parts: object) -> str:
    """The md5 sum of what a row stands for, as 32 hex digits."""
    return hashlib.md5("/".join(map(str, parts)).encode(), usedforsecurity=False).hexdigest()


def timestamp(number: int, tick: int) -> int:
    """Microseconds of a tick of scene `number`."""
    return EPOCH + number * 60_000_000 + round(tick * TICK * 1e6)


def visibility_level(share: float) -> str:
    """The nuScenes visibility token of a share of visible pixels."""
    return "1" if share < 0.4 else "2" if share < 0.6 else "3" if share < 0.8 else "4"


def quaternion(yaw: float) -> list[float]:
    """w, x, y, z of a turn about the vertical."""
    return [float(np.cos(yaw / 2)), 0.0, 0.0, float(np.sin(yaw / 2))]


def fixed_rows(world: str, size: tuple[int, int], mask: str) -> dict[str, list[Row]]:
    """Rows that do not depend on scenes: kinds, sensors with their calibration, log and map."""
    rows: dict[str, list[Row]] = {name: [] for name in TABLES}
    rows["category"] = [
        {"token": token("category", n), "name": n, "description": ""} for n in dict.fromkeys(CATEGORIES.values())
    ]
    rows["attribute"] = [{"token": token("attribute", n), "name": n, "description": ""} for n in ATTRIBUTES]
    rows["visibility"] = [{"token": t, "level": level, "description": ""} for t, level in VISIBILITY]
    for channel in CHANNELS:
        mount = CAMERAS.get(channel, LIDAR)
        camera = channel in CAMERAS
        rows["sensor"].append(
            {"token": token("sensor", channel), "channel": channel, "modality": "camera" if camera else "lidar"}
        )
        rows["calibrated_sensor"].append(
            {
                "token": token(world, "calibrated_sensor", channel),
                "sensor_token": token("sensor", channel),
                "translation": list(mount.translation),
                "rotation": list(unit_quaternion(mount)),
                "camera_intrinsic": intrinsic_matrix(mount, size).tolist() if camera else [],
            }
        )
    log = token(world, "log")
    rows["log"].append(
        {
            "token": log,
            "logfile": LOGFILE,
            "vehicle": "generated",
            "date_captured": "2020-09-13",
            "location": "generated-town",
        }
    )
    rows["map"].append(
        {"token": token(world, "map"), "category": "semantic_prior", "filename": mask, "log_tokens": [log]}
    )
    return rows


def category_of(actor: Actor) -> str:
    """The nuScenes category's name."""
    return CATEGORIES["child" if actor.kind == "pedestrian" and actor.size[2] < 1.4 else actor.kind]


class SceneRows:
    """Collects the rows of one scene in one light."""

    def __init__(self, world: str, number: int, name: str, description: str, scene: Scene) -> None:
        self.world, self.number, self.name, self.scene = world, number, name, scene
        self.rows: dict[str, list[Row]] = {t: [] for t in TABLES}
        self.keyframes = list(range(0, scene.ticks, KEYFRAME_TICKS))
        samples = [token(world, name, "sample", k) for k in self.keyframes]
        self.samples = samples
        self.token = token(world, name)
        for i, (tick, own) in enumerate(zip(self.keyframes, samples)):
            self.rows["sample"].append(
                {
                    "token": own,
                    "timestamp": timestamp(number, tick),
                    "prev": samples[i - 1] if i else "",
                    "next": samples[i + 1] if i + 1 < len(samples) else "",
                    "scene_token": self.token,
                }
            )
        self.rows["scene"].append(
            {
                "token": self.token,
                "log_token": token(world, "log"),
                "nbr_samples": len(samples),
                "first_sample_token": samples[0],
                "last_sample_token": samples[-1],
                "name": name,
                "description": description,
            }
        )
        self._last: dict[str, Row] = {}
        self._boxes: dict[int, list[Row]] = {}

    def instance(self, actor: int) -> str:
        """The token of an actor in this scene."""
        return token(self.world, self.name, "instance", actor)

    def filename(self, channel: str, tick: int) -> str:
        """Where a sensor's file of a tick lies below the folder."""
        folder = "sweeps" if tick % KEYFRAME_TICKS else "samples"
        ending = "pcd.bin" if channel == "LIDAR_TOP" else "jpg"
        return f"{folder}/{channel}/{self.name}__{channel}__{timestamp(self.number, tick)}.{ending}"

    def record(self, channel: str, tick: int, size: tuple[int, int]) -> str:
        """Add the sample_data and ego_pose of a sensor at a tick; ticks of a sensor come in order. Returns the file."""
        own = token(self.world, self.name, channel, tick)
        x, y, yaw = self.scene.ego[tick]
        stamp = timestamp(self.number, tick)
        self.rows["ego_pose"].append(
            {"token": own, "timestamp": stamp, "rotation": quaternion(yaw), "translation": [float(x), float(y), 0.0]}
        )
        before = self._last.get(channel)
        row = {
            "token": own,
            # between keyframes: the sample that follows
            "sample_token": self.samples[min(-(-tick // KEYFRAME_TICKS), len(self.samples) - 1)],
            "ego_pose_token": own,
            "calibrated_sensor_token": token(self.world, "calibrated_sensor", channel),
            "timestamp": stamp,
            "fileformat": "pcd" if channel == "LIDAR_TOP" else "jpg",
            "is_key_frame": tick % KEYFRAME_TICKS == 0,
            "height": 0 if channel == "LIDAR_TOP" else size[1],
            "width": 0 if channel == "LIDAR_TOP" else size[0],
            "filename": self.filename(channel, tick),
            "prev": before["token"] if before else "",
            "next": "",
        }
        if before:
            before["next"] = own
        self._last[channel] = row
        self.rows["sample_data"].append(row)
        return str(row["filename"])

    def annotate(self, tick: int, actor: int) -> str:
        """Add the box of an actor at a keyframe, its visibility and points left open; keyframes come in order."""
        who = self.scene.actors[actor]
        x, y, yaw = who.track[tick]
        own = token(self.world, self.name, "annotation", actor, tick)
        earlier = self._boxes.setdefault(actor, [])
        attribute = who.attribute(float(who.speeds()[tick]))
        row = {
            "token": own,
            "sample_token": self.samples[tick // KEYFRAME_TICKS],
            "instance_token": self.instance(actor),
            "visibility_token": "1",
            "attribute_tokens": [token("attribute", attribute)] if attribute else [],
            "translation": [round(float(x), 4), round(float(y), 4), round(float(who.size[2]) / 2, 4)],
            "size": [round(float(v), 3) for v in who.size],
            "rotation": quaternion(yaw),
            "prev": earlier[-1]["token"] if earlier else "",
            "next": "",
            "num_lidar_pts": 0,
            "num_radar_pts": 0,
        }
        if earlier:
            earlier[-1]["next"] = own
        earlier.append(row)
        self.rows["sample_annotation"].append(row)
        return own

    def finish(self) -> dict[str, list[Row]]:
        """All rows, with the instances of the boxes that were added."""
        for actor, boxes in self._boxes.items():
            self.rows["instance"].append(
                {
                    "token": self.instance(actor),
                    "category_token": token("category", category_of(self.scene.actors[actor])),
                    "nbr_annotations": len(boxes),
                    "first_annotation_token": boxes[0]["token"],
                    "last_annotation_token": boxes[-1]["token"],
                }
            )
        return self.rows

    def can_bus(self) -> list[Row]:
        """Messages as in nuScenes' CAN bus `pose`: motion of ego in its own frame at every tick."""
        ego = self.scene.ego
        velocity = np.gradient(ego[:, :2], TICK, axis=0) if len(ego) > 1 else np.zeros((len(ego), 2))
        turn = np.gradient(np.unwrap(ego[:, 2]), TICK) if len(ego) > 1 else np.zeros(len(ego))
        ahead = (velocity * np.stack([np.cos(ego[:, 2]), np.sin(ego[:, 2])], -1)).sum(1)
        gain = np.gradient(ahead, TICK) if len(ego) > 1 else np.zeros(len(ego))
        return [
            {
                "utime": timestamp(self.number, t),
                "pos": [float(ego[t, 0]), float(ego[t, 1]), 0.0],
                "orientation": quaternion(float(ego[t, 2])),
                "vel": [float(ahead[t]), 0.0, 0.0],
                "accel": [float(gain[t]), float(ahead[t] * turn[t]), 9.81],
                "rotation_rate": [0.0, 0.0, float(turn[t])],
            }
            for t in range(len(ego))
        ]


def write_tables(folder: Path, rows: dict[str, list[Row]]) -> None:
    """One JSON file a table, one field a line as in nuScenes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TABLES:
        (folder / f"{name}.json").write_text(json.dumps(rows[name], indent=0) + "\n", encoding="utf-8")
