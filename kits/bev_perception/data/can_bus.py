"""The car's own motion as BEVFormer takes it: from the CAN bus where it was recorded, else from the ego poses."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np

from core.files import inside, read_list
from core.kit import InputError
from kits.bev_perception.data.geometry import Array, rotation_matrix, yaw
from kits.bev_perception.data.nuscenes import NuScenes
from kits.bev_perception.data.recordings import Recording, Sample
from kits.bev_perception.data.tables import MEND, number, vector

GRAVITY = 9.81  # m/s2


class CanBus:
    """The 18 values of every keyframe of a folder; the messages of a scene are read once."""

    def __init__(self, data: NuScenes) -> None:
        self.data = data
        self._read: dict[str, tuple[Array, Array]] = {}

    def __call__(self, sample: Sample) -> Array:
        """(18,): position (3), quaternion w, x, y, z (4), acceleration (3), turn rate (3), velocity (3), heading in
        radians within 0..2 pi, heading in degrees.

        Position and heading are those of the ego pose at the LiDAR's time, absolute: the detector takes differences.
        The others are in the ego frame, from can_bus/<scene>_pose.json; without that file they are worked out from the
        LiDAR's ego poses (looking back in time but at a scene's start), with gravity in the acceleration, as the
        sensor has it. Raises InputError for a message that lacks a field.
        """
        ego = sample.lidar.ego
        heading = float(np.degrees(yaw(ego.rotation))) % 360
        times, messages = self._messages(sample.scene)
        if len(times):
            # The official preparation takes the first message after the sample, where there is one; so does this.
            after = int(np.searchsorted(times, sample.timestamp, side="right"))
            rest = messages[min(after, len(times) - 1)]
        else:
            rest = self._derived(sample.lidar)
        return np.concatenate([ego.translation, ego.rotation, rest, [np.radians(heading), heading]])

    def _messages(self, scene: str) -> tuple[Array, Array]:
        """Times (m,) in microseconds and acceleration, turn rate, velocity (m, 9)."""
        if scene not in self._read:
            folder = self.data.root / "can_bus"
            file = inside(folder, f"{scene}_pose.json", self.data.root / self.data.version / "scene.json")
            rows = read_list(file, MEND) if file.is_file() else []
            times, values = np.zeros(len(rows)), np.zeros((len(rows), 9))
            for i, row in enumerate(rows):
                where = f"{file}, message {i}"
                if not isinstance(row, dict):
                    raise InputError(f"{where} is not an object; mend it")
                times[i] = number(row, "utime", where)
                values[i] = np.concatenate([vector(row, key, 3, where) for key in ("accel", "rotation_rate", "vel")])
            order = np.argsort(times, kind="stable")
            self._read[scene] = times[order], values[order]
        return self._read[scene]

    def _derived(self, lidar: Recording) -> Array:
        """(9,): acceleration, turn rate and velocity in the ego frame of a LiDAR recording."""
        track = [*reversed(_near(lidar, self.data.before(lidar), 2)), lidar]
        track += _near(lidar, self.data.after(lidar), 3 - len(track))
        steps = [(a, b, (b.timestamp - a.timestamp) * 1e-6) for a, b in zip(track, track[1:])]
        into_ego = rotation_matrix(lidar.ego.rotation).T
        accel, rate, velocity = into_ego @ [0, 0, GRAVITY], np.zeros(3), np.zeros(3)
        if steps:
            moves = [(b.ego.translation - a.ego.translation) / seconds for a, b, seconds in steps]
            ours = max((i for i, (_, b, _) in enumerate(steps) if b.timestamp <= lidar.timestamp), default=0)
            a, b, seconds = steps[ours]
            turn = (a.ego.inverse @ b.ego).rotation
            # Half the angle's sine is in x, y, z; the sign of w chooses the short way round.
            length = float(np.linalg.norm(turn[1:]))
            angle = 2 * np.arctan2(length, abs(turn[0]))
            rate = turn[1:] / (length or 1.0) * np.copysign(angle / seconds, turn[0])
            velocity = into_ego @ moves[ours]
            if len(steps) > 1:
                accel = accel + into_ego @ (moves[1] - moves[0]) / ((steps[0][2] + steps[1][2]) / 2)
        return np.concatenate([accel, rate, velocity])


def _near(home: Recording, chain: Iterator[Recording], count: int) -> list[Recording]:
    """Up to `count` recordings of a chain at other times than `home`."""
    return [found for found in islice(chain, count) if found.timestamp != home.timestamp]
