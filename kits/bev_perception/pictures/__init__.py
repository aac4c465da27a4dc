"""What a user sees of a frame: six cameras and a map from above with boxes, and films of a scene."""

from kits.bev_perception.pictures.frame import frame_picture, scene_strip

__all__ = ["frame_picture", "scene_strip"]
