"""The ten detection classes, their attributes and ranges, and the cameras, in the order the network knows them."""

from __future__ import annotations

import math

# The order of the official BEVFormer checkpoints, so that a label is the index of a class score.
CLASSES = (
    "car", "truck", "construction_vehicle", "bus", "trailer",
    "barrier", "motorcycle", "bicycle", "pedestrian", "traffic_cone",
)  # fmt: skip
LABELS = {name: label for label, name in enumerate(CLASSES)}

ATTRIBUTES = (
    "pedestrian.moving", "pedestrian.sitting_lying_down", "pedestrian.standing",
    "cycle.with_rider", "cycle.without_rider",
    "vehicle.moving", "vehicle.parked", "vehicle.stopped",
)  # fmt: skip
ATTRIBUTE_INDEX = {name: index for index, name in enumerate(ATTRIBUTES)}

# nuScenes categories that are detected; the others (strollers, wheelchairs, animals, debris) are not scored.
CATEGORIES = {
    "movable_object.barrier": "barrier",
    "movable_object.trafficcone": "traffic_cone",
    "human.pedestrian.adult": "pedestrian",
    "human.pedestrian.child": "pedestrian",
    "human.pedestrian.construction_worker": "pedestrian",
    "human.pedestrian.police_officer": "pedestrian",
    "vehicle.bicycle": "bicycle",
    "vehicle.bus.bendy": "bus",
    "vehicle.bus.rigid": "bus",
    "vehicle.car": "car",
    "vehicle.construction": "construction_vehicle",
    "vehicle.motorcycle": "motorcycle",
    "vehicle.trailer": "trailer",
    "vehicle.truck": "truck",
}
BIKE_RACK = "static_object.bicycle_rack"

# The order in which BEVFormer stacks the images, with the bearing of each on nuScenes' car: degrees to the left of
# straight on, in the ego frame.
CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")
BEARINGS = dict(zip(CAMERAS, (0.0, -55.0, 55.0, 180.0, 109.0, -109.0)))
LIDAR = "LIDAR_TOP"

VEHICLES = ("car", "truck", "construction_vehicle", "bus", "trailer")
CYCLES = ("motorcycle", "bicycle")
STILL = 0.2  # m/s, below which a thing is taken to stand
RIDDEN = 1.5  # m, above which a cycle is taken to have a rider, who is a part of its box in nuScenes


def likely_attribute(name: str, velocity: tuple[float, float], height: float = 0.0) -> str:
    """The attribute of a detection that has none of its own, from its class, speed and height; "" where it has none.

    A BEV detector predicts no attributes, and mAAE is scored on these. The rule of mmdetection3d and BEVFormer but for
    the height: they take a cycle that stands to have no rider.
    """
    moving = math.hypot(*velocity) > STILL
    if name in VEHICLES:
        standing = "vehicle.stopped" if name == "bus" else "vehicle.parked"
        return "vehicle.moving" if moving else standing
    if name in CYCLES:
        return "cycle.with_rider" if moving or height > RIDDEN else "cycle.without_rider"
    if name == "pedestrian":
        return "pedestrian.moving" if moving else "pedestrian.standing"
    return ""
