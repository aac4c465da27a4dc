"""What the detector is worth: the nuScenes detection score, sudden obstacles, and the time an answer takes."""
