"""What a user sees of a frame: six cameras and a map from above with boxes, and films of a scene."""
