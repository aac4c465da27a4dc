"""A generated world in the nuScenes format: towns with traffic, rendered cameras and LiDAR, by day, night and rain."""

from kits.bev_perception.data.world.generate import generate_world
from kits.bev_perception.data.world.light import LIGHTS

__all__ = ["LIGHTS", "generate_world"]
