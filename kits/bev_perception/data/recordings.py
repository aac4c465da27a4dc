"""What the sensors recorded: one file, all files of a keyframe, and the six images as the network takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from core.kit import InputError
from kits.bev_perception.data.classes import CAMERAS, LIDAR
from kits.bev_perception.data.geometry import Array, Fit, Pose, pinhole

POINT = 5  # float32 a LiDAR point: x, y, z, intensity, ring


@dataclass(frozen=True)
class Recording:
    """One file of one sensor, a row of sample_data: when it was taken, from where, and the file itself.

    `ego` takes the ego frame at this time to the global frame, `sensor` the sensor's frame to the ego frame;
    `timestamp` is in microseconds, `size` (width, height) as the table says, `intrinsic` (3, 3) of a camera.
    """

    token: str
    sample: str
    channel: str
    path: Path
    timestamp: int
    key: bool
    size: tuple[int, int]
    ego: Pose
    sensor: Pose
    intrinsic: Array | None
    prev: str
    next: str

    def image(self) -> NDArray[np.uint8]:
        """(H, W, 3) RGB; InputError where the file is missing, cut off, or not of the size in the table."""
        return read_image(self.path, self.size, self.token)

    def points(self) -> NDArray[np.float32]:
        """(n, 5) x, y, z, intensity, ring in the sensor's frame; points that are not finite are left out."""
        points = read_points(self.path, self.token)
        return points[np.isfinite(points).all(axis=1)]


@dataclass(frozen=True)
class Sample:
    """A keyframe: its recordings by channel, and its place in its scene. `timestamp` is in microseconds."""

    token: str
    timestamp: int
    scene: str
    index: int
    recordings: Mapping[str, Recording] = field(repr=False)

    @property
    def lidar(self) -> Recording:
        """The LiDAR sweep, whose frame is the detector's; InputError where the table has none."""
        if LIDAR not in self.recordings:
            raise InputError(
                f"sample_data: sample {self.token!r} has no {LIDAR} keyframe; add the record or drop the sample"
            )
        return self.recordings[LIDAR]

    @property
    def pose(self) -> Pose:
        """From the LiDAR frame to the global frame."""
        return self.lidar.ego @ self.lidar.sensor

    def lidar2img(self, channel: str, size: tuple[int, int] | None = None) -> Array:
        """(4, 4): a point of the LiDAR frame to u*d, v*d, d of a camera's image, as `geometry.project` takes it.

        The motion of the car between the two times is in it. `size` (height, width) is that of an image that was
        scaled and padded by `Fit`; None keeps the camera's own.
        """
        camera = self._camera(channel)
        assert camera.intrinsic is not None  # a camera has one, `_camera` sees to it
        k = camera.intrinsic if size is None else Fit(camera.size, size).intrinsic(camera.intrinsic)
        return pinhole(k) @ ((camera.ego @ camera.sensor).inverse @ self.pose).matrix

    def views(self, size: tuple[int, int]) -> Views:
        """All six cameras for the network; one that cannot be read is black and named in `missing`."""
        images = np.zeros((len(CAMERAS), *size, 3), dtype=np.uint8)
        inner = np.zeros((len(CAMERAS), 2), dtype=np.int64)
        matrices = np.zeros((len(CAMERAS), 4, 4))
        missing: dict[str, str] = {}
        for i, channel in enumerate(CAMERAS):
            try:
                matrices[i] = self.lidar2img(channel, size)
                image = self._camera(channel).image()
            except InputError as error:
                missing[channel] = str(error)
                continue
            width, height = Fit((image.shape[1], image.shape[0]), size).scaled
            # below half the size two pixels of each side are too few: what lies between would be left out
            how = cv2.INTER_LINEAR if 2 * width >= image.shape[1] else cv2.INTER_AREA
            images[i, :height, :width] = cv2.resize(image, (width, height), interpolation=how)
            inner[i] = height, width
        return Views(images, inner, matrices, missing)

    def _camera(self, channel: str) -> Recording:
        found = self.recordings.get(channel)
        if found is None:
            raise InputError(
                f"sample_data: sample {self.token!r} has no {channel} keyframe; add the record or the camera"
            )
        if found.intrinsic is None or found.size[0] < 1 or found.size[1] < 1:
            raise InputError(
                f"sample_data {found.token!r}: {channel} has no camera_intrinsic or no width and height; add them"
            )
        return found


@dataclass(frozen=True)
class Views:
    """What six cameras see: `images` (6, H, W, 3) uint8 RGB in the order of CAMERAS, `lidar2img` (6, 4, 4).

    `inner[i]` (height, width) is the part of image i that is picture, at the upper left; the rest is padding.
    `missing` says by channel why an image is black. A camera without calibration has a lidar2img of zeros, which sees
    nothing.
    """

    images: NDArray[np.uint8]
    inner: NDArray[np.int64]
    lidar2img: Array
    missing: Mapping[str, str]

    def whole(self) -> Views:
        """These views, or InputError with the first camera that is missing."""
        for why in self.missing.values():
            raise InputError(why)
        return self

    def normalised(self, mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
        """(6, 3, H, W): (RGB - mean) / std; padding and missing cameras are 0 after it, as in BEVFormer."""
        scaled = (self.images.astype(np.float32) - np.array(mean, np.float32)) / np.array(std, np.float32)
        for image, (height, width) in zip(scaled, self.inner):
            image[height:] = 0
            image[:, width:] = 0
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def read_image(path: Path, size: tuple[int, int], token: str) -> NDArray[np.uint8]:
    """(H, W, 3) RGB of (width, height) `size`; InputError that names the sample_data `token`."""
    where = f"sample_data {token!r}: {path}"
    data = _bytes(path, where)
    # OpenCV fills up what a cut file lacks with grey and only warns: look for the end mark first.
    if data[:2] == b"\xff\xd8" and b"\xff\xd9" not in data[-4096:]:
        raise InputError(f"{where} is cut off ({len(data)} bytes); copy it again")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        image = None
    if image is None:
        raise InputError(f"{where} is not a readable image ({len(data)} bytes); copy it again")
    if (image.shape[1], image.shape[0]) != size:
        raise InputError(
            f"{where} is {image.shape[1]} x {image.shape[0]}, the table says {size[0]} x {size[1]}; "
            "mend width and height, and the intrinsics with them"
        )
    return np.asarray(image, np.uint8)


def read_points(path: Path, token: str) -> NDArray[np.float32]:
    """(n, 5) x, y, z, intensity, ring as they are in the file; InputError that names the sample_data `token`."""
    where = f"sample_data {token!r}: {path}"
    data = _bytes(path, where)
    if not data or len(data) % (4 * POINT):
        raise InputError(f"{where} holds {len(data)} bytes, expected points of {4 * POINT} bytes; copy it again")
    return np.frombuffer(data, dtype="<f4").reshape(-1, POINT).astype(np.float32)


def _bytes(path: Path, where: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{where} cannot be read ({error.strerror}); add the file or drop the record") from error
