"""A BEVFormer small enough for tests: two decoder layers, 10 x 12 cells, pictures of 96 x 64 pixels."""

from __future__ import annotations

from dataclasses import replace

from kits.bev_perception.model.configs import NANO

MICRO = replace(
    NANO,
    name="micro",
    images=replace(NANO.images, height=64, width=96),
    backbone=replace(NANO.backbone, base_channels=8),
    embed_dims=32,
    ffn_dims=64,
    bev_h=10,
    bev_w=12,
    rotate_center=(6.0, 5.0),
    num_query=16,
    decoder_layers=2,
    max_num=16,
    proposals=False,
    depth_bins=0,
    fusion=False,
)
