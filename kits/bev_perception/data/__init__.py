"""The data of the kit: nuScenes-format folders as they are, their checker, and a generated world in that format."""
