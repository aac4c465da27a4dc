"""Sizes of the detectors: the three published ones of BEVFormer, and `nano`, which two CPU cores can train."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.files import write_text
from core.kit import InputError

CLASSES = (
    "car", "truck", "construction_vehicle", "bus", "trailer", "barrier", "motorcycle", "bicycle", "pedestrian",
    "traffic_cone",
)  # fmt: skip
"""nuScenes' ten classes in the order of BEVFormer's classifier."""
CAMERAS = (
    "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT",
)  # fmt: skip
"""The cameras in the order in which the network takes them."""


@dataclass(frozen=True)
class Images:
    """What the backbone takes: images of `scale` times their size, padded right and below to (`height`, `width`).

    A pixel is (value - mean) / std with the channels in the order of `channels`, "rgb" or "bgr".
    """

    height: int
    width: int
    scale: float
    channels: str = "rgb"
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Backbone:
    """A ResNet and its FPN.

    `style` "pytorch" strides in a block's 3x3 convolution, "caffe" in its first 1x1. `deformable` makes the 3x3
    convolutions of layer3 and layer4 DCNv2. `out_indices` are the layers (0 to 3) that the FPN takes, `levels` how
    many it gives, the finest first. `frozen_stages` and `norm_frozen` are for training: -1 freezes nothing, 0 the
    stem, 1 the stem and layer1; `norm_frozen` keeps every batch norm's statistics and scales. `blocks` are those of the
    four layers, where they are not as many as `depth` says.
    """

    depth: int = 50
    base_channels: int = 64
    style: str = "pytorch"
    deformable: bool = False
    out_indices: tuple[int, ...] = (3,)
    levels: int = 1
    frozen_stages: int = 1
    norm_frozen: bool = True
    blocks: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class Config:
    """Everything that fixes a detector's layers and what its numbers mean.

    Lengths are metres in the LiDAR's frame (x right, y forward, z up); `pc_range` is x, y, z from and to.
    `rotate_center` (x, y) is the cell about which the history turns, counted from the corner of the grid.
    `cameras_per_query` bounds the cameras that one BEV cell looks into, those that see most of its pillar first;
    None means all of them. `wrap_turn` brings turns into -180..180 degrees, which the published models do not.
    With `proposals` the object queries begin at the best cells of a dense head instead of at learnt places.
    With `pillar_heights` (metres) a pillar is points of these heights in each quarter of its cell, and what samples
    begins at the place itself: a head of spatial attention looks mostly at one quarter, other points are half a cell
    apart.
    With `local_codes` boxes are told along and across the ray to where they are told from, see `local`.
    With `depth_bins` pixels tell their distance in that many bins, and cells take of them what is theirs, see `lift`.
    With `fusion` convolutions over the BEV and the memory, brought to where the car stands, follow the encoder.
    """

    name: str
    images: Images
    backbone: Backbone
    embed_dims: int = 256
    ffn_dims: int = 512
    num_cams: int = 6
    classes: tuple[str, ...] = CLASSES
    bev_h: int = 50
    bev_w: int = 50
    num_query: int = 900
    encoder_layers: int = 3
    decoder_layers: int = 6
    num_feature_levels: int = 4
    heads: int = 8
    temporal_points: int = 4
    spatial_points: int = 8
    points_in_pillar: int = 4
    decoder_points: int = 4
    dropout: float = 0.1
    pc_range: tuple[float, float, float, float, float, float] = (-51.2, -51.2, -5.0, 51.2, 51.2, 3.0)
    post_center_range: tuple[float, float, float, float, float, float] = (-61.2, -61.2, -10.0, 61.2, 61.2, 10.0)
    max_num: int = 300
    rotate_center: tuple[float, float] = (100.0, 100.0)
    cameras_per_query: int | None = None
    wrap_turn: bool = False
    proposals: bool = False
    local_codes: bool = False
    pillar_heights: tuple[float, ...] | None = None
    depth_bins: int = 0
    fusion: bool = False

    @property
    def extent(self) -> tuple[float, float, float]:
        """Lengths of `pc_range` in metres: x, y, z."""
        x0, y0, z0, x1, y1, z1 = self.pc_range
        return x1 - x0, y1 - y0, z1 - z0


_CAFFE = Images(0, 0, 1.0, "bgr", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0))

TINY = Config("tiny", Images(480, 800, 0.5), Backbone())
SMALL = Config(
    "small",
    Images(736, 1280, 0.8, _CAFFE.channels, _CAFFE.mean, _CAFFE.std),
    Backbone(101, style="caffe", deformable=True),
    bev_h=150,
    bev_w=150,
)
BASE = Config(
    "base",
    Images(928, 1600, 1.0, _CAFFE.channels, _CAFFE.mean, _CAFFE.std),
    Backbone(101, style="caffe", deformable=True, out_indices=(1, 2, 3), levels=4),
    bev_h=200,
    bev_w=200,
    encoder_layers=6,
)
NANO = Config(
    "nano",
    Images(160, 288, 0.18),
    Backbone(18, base_channels=32, out_indices=(1, 2, 3), levels=1, frozen_stages=-1, norm_frozen=False),
    embed_dims=64,
    ffn_dims=128,
    bev_h=50,
    bev_w=50,
    num_query=150,
    encoder_layers=2,
    decoder_layers=3,
    num_feature_levels=1,
    heads=4,
    max_num=150,
    dropout=0.0,
    rotate_center=(25.0, 25.0),
    cameras_per_query=1,
    wrap_turn=True,
    proposals=True,
    local_codes=True,
    pillar_heights=(-1.4, -0.4),
    points_in_pillar=8,
    depth_bins=64,
    fusion=True,
)
CONFIGS = {config.name: config for config in (TINY, SMALL, BASE, NANO)}

FILE = "detector.json"
"""The config beside weights of a detector that is none of these."""


def to_json(config: Config) -> dict[str, Any]:
    """As JSON has it."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return found


def from_json(data: Any, where: str) -> Config:
    """Back from `to_json`; InputError that names `where` for what is no config."""
    try:
        fields: dict[str, Any] = {name: _tuples(value) for name, value in data.items()}
        images, backbone = Images(**fields.pop("images")), Backbone(**fields.pop("backbone"))
        return Config(images=images, backbone=backbone, **fields)
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{where}: no config of a detector ({error}); give one that `fitkit search` left") from error


def _tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return {k: _tuples(v) for k, v in value.items()} if isinstance(value, dict) else value


def save_config(config: Config, folder: Path) -> None:
    """Leave it beside weights."""
    write_text(folder / FILE, json.dumps(to_json(config), indent=1) + "\n")


def config_beside(weights: Path) -> Config:
    """The config beside a file of weights, or else that of `nano`; InputError for a file that is none."""
    place = weights.parent / FILE
    if not place.is_file():
        return NANO
    try:
        return from_json(json.loads(place.read_text(encoding="utf-8")), str(place))
    except (OSError, ValueError) as error:
        raise InputError(f"{place}: no JSON ({error}); give a file that `fitkit search` left") from error
