"""The detector's memory over time: which history a frame may use, and how the car has moved since.

The order of a frame is `step`, the network, `keep`. What is not kept never happened: after a frame that failed, the
next one's motion counts from the last frame kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.kit import InputError
from kits.bev_perception.model.configs import CAMERAS, Config
from kits.bev_perception.model.detector import CAN_BUS, empty_memory

Vector = Sequence[float] | NDArray[np.float64]


@dataclass(frozen=True)
class Frame:
    """Where and when a frame was taken.

    `can_bus` (18,) is absolute, as BEVFormer's info files have it: position (3, m, global), rotation w x y z (4),
    acceleration (3), rotation rate (3), velocity (3), heading in 0..2 pi, heading in degrees. `timestamp` is in
    seconds, `cameras` says which cameras came (None: all of them).
    """

    scene: str
    timestamp: float
    can_bus: NDArray[np.float64]
    cameras: tuple[bool, ...] | None = None

    @staticmethod
    def from_can_bus(scene: str, timestamp: float, can_bus: Vector, cameras: tuple[bool, ...] | None = None) -> Frame:
        """A frame of the 18 numbers as they are."""
        return Frame(scene, timestamp, np.array(can_bus, dtype=np.float64), cameras)

    @staticmethod
    def from_pose(
        scene: str,
        timestamp: float,
        translation: Vector,
        rotation: Vector,
        *,
        cameras: tuple[bool, ...] | None = None,
        acceleration: Vector = (0.0, 0.0, 0.0),
        rotation_rate: Vector = (0.0, 0.0, 0.0),
        velocity: Vector = (0.0, 0.0, 0.0),
    ) -> Frame:
        """A frame of an ego pose: translation (3, m) and quaternion w x y z (4,) from the car to the world.

        Without a CAN bus the last three are zero, as BEVFormer has them where nuScenes lacks one.
        """
        w, x, y, z = (float(v) for v in rotation)
        heading = math.atan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)) % (2 * math.pi)
        parts = (translation, (w, x, y, z), acceleration, rotation_rate, velocity, (heading, math.degrees(heading)))
        return Frame(scene, timestamp, np.concatenate([np.asarray(p, dtype=np.float64) for p in parts]), cameras)


@dataclass(frozen=True)
class Bounds:
    """What a history must keep to be used.

    `period` is the time between frames in seconds, and only noted where it is exceeded by half; `gap` is the longest
    time in seconds, `speed` (m/s) and `turn` (degrees a second) are more than a car can do, `slack` (m) is what a
    localisation may jump without harm.
    """

    period: float = 0.5
    gap: float = 2.0
    speed: float = 70.0
    turn: float = 120.0
    slack: float = 2.0


@dataclass(frozen=True)
class Step:
    """Inputs of the network for one frame (batch 1), in its order after images and lidar2img.

    `reset` says why there is no history ("" where there is one); `notes` what else a user should know.
    """

    can_bus: Tensor
    prev_bev: Tensor
    has_prev: Tensor
    camera_mask: Tensor
    reset: str
    notes: tuple[str, ...] = ()

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """can_bus (1, 18), prev_bev (1, Q, C), has_prev (1,), camera_mask (1, N)."""
        return self.can_bus, self.prev_bev, self.has_prev, self.camera_mask


@dataclass
class BevState:
    """Owns `prev_bev` from frame to frame of one car.

    A history is dropped, and `Step.reset` says why, where the scene changes, time goes back or leaves a gap, the pose
    jumps, or the memory was not finite. Frames that were dropped within `bounds.gap` do no harm: the motion is counted
    from the last frame kept.
    """

    config: Config
    bounds: Bounds = field(default_factory=Bounds)
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        self._empty = empty_memory(self.config).to(self.device)
        self.reset()

    def reset(self, why: str = "the first frame") -> None:
        """Forget everything; `why` is what the next step says."""
        self._bev: Tensor | None = None
        self._last: Frame | None = None
        self._pending: Frame | None = None
        self._why = why

    def step(self, frame: Frame) -> Step:
        """What the network takes for a frame. Raises InputError for a frame that no network could use.

        Nothing changes until `keep`: after an error the state is what it was.
        """
        mask, notes = self._cameras(frame)
        _check(frame)
        can_bus, last = frame.can_bus.copy(), self._last
        why = self._why if last is None else self._refused(last, frame)
        if last is None or why:
            can_bus[:3], can_bus[17] = 0.0, 0.0
        else:
            can_bus[:3] -= last.can_bus[:3]
            can_bus[17] = self._turn(last, frame)
            gap = frame.timestamp - last.timestamp
            if gap > 1.5 * self.bounds.period:
                notes.append(f"{gap:.2f} s since the last frame: {round(gap / self.bounds.period) - 1} dropped")
        self._pending = frame
        bev = self._empty if why or self._bev is None else self._bev
        return Step(
            torch.from_numpy(can_bus).float()[None].to(self.device),
            bev,
            torch.tensor([0.0 if why else 1.0], device=self.device),
            mask,
            why,
            tuple(notes),
        )

    def keep(self, bev: Tensor) -> None:
        """Take what the network put out for the frame of the last `step` as the memory, (1, Q, C).

        A memory that is not finite is not taken, and the next frame begins anew. Raises InputError for another shape
        and where no step went before.
        """
        if self._pending is None:
            raise InputError("BevState.keep: no frame is waiting for its memory; call step first")
        if bev.shape != self._empty.shape:
            raise InputError(f"BevState.keep: bev is {tuple(bev.shape)} and not {tuple(self._empty.shape)}")
        if not _finite(bev):
            self.reset("the memory of the frame before held NaN or infinity")
            return
        self._bev, self._last, self._pending = bev.detach(), self._pending, None

    def _cameras(self, frame: Frame) -> tuple[Tensor, list[str]]:
        count = self.config.num_cams
        there = frame.cameras if frame.cameras is not None else (True,) * count
        if len(there) != count:
            raise InputError(
                f"frame of scene {frame.scene!r}: {len(there)} cameras are named, the network takes {count}"
            )
        if not any(there):
            raise InputError(f"frame of scene {frame.scene!r}: no camera came; leave the frame out")
        names = CAMERAS if count == len(CAMERAS) else tuple(str(i) for i in range(count))
        notes = [f"camera {name} is missing: what only it sees comes from the history alone" for name, came
                 in zip(names, there) if not came]  # fmt: skip
        return torch.tensor([[float(came) for came in there]], device=self.device), notes

    def _turn(self, last: Frame, frame: Frame) -> float:
        turn = float(frame.can_bus[17] - last.can_bus[17])
        return (turn + 180) % 360 - 180 if self.config.wrap_turn else turn

    def _refused(self, last: Frame, frame: Frame) -> str:
        """Why the history of `last` is of no use for `frame`, or ""."""
        if frame.scene != last.scene:
            return f"scene {frame.scene!r} begins"
        gap = frame.timestamp - last.timestamp
        if gap <= 0:
            return f"time goes from {last.timestamp:.3f} to {frame.timestamp:.3f} s"
        if gap > self.bounds.gap:
            return f"{gap:.2f} s since the last frame, more than {self.bounds.gap:g}"
        way = float(np.linalg.norm(frame.can_bus[:3] - last.can_bus[:3]))
        if way > self.bounds.speed * gap + self.bounds.slack:
            return f"the pose jumps {way:.1f} m in {gap:.2f} s, more than {self.bounds.speed:g} m/s"
        turn = abs((float(frame.can_bus[17] - last.can_bus[17]) + 180) % 360 - 180)
        if turn > self.bounds.turn * gap:
            return f"the pose turns {turn:.1f} degrees in {gap:.2f} s, more than {self.bounds.turn:g} a second"
        return ""


def _finite(bev: Tensor) -> bool:
    """Whether it holds neither NaN nor infinity.

    On the CPU told by NumPy: torch's threads would share the work, and then spin where a runtime's should run.
    """
    if bev.device.type == "cpu":
        return bool(np.isfinite(bev.detach().float().numpy()).all())
    return bool(bev.isfinite().all())


def _check(frame: Frame) -> None:
    if frame.can_bus.shape != (CAN_BUS,):
        raise InputError(f"frame of scene {frame.scene!r}: can_bus has shape {frame.can_bus.shape} and not (18,)")
    if not (np.isfinite(frame.can_bus).all() and math.isfinite(frame.timestamp)):
        raise InputError(f"frame of scene {frame.scene!r}: pose, CAN bus or time is not finite; leave the frame out")
