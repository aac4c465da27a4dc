"""The recipes, each with its cost and what to expect of it."""

from __future__ import annotations

from core.kit import Recipe
from core.quantization import Quantize

TRANSFORMER = ("pts_bbox_head.*",)
"""What stays float: attention, geometry, norms and heads, as the field does."""

CNN_INT8 = Quantize(
    samples=64, calibration="mse", reduce_range=True, quantize_outputs=True, keep=TRANSFORMER
)  # fmt: skip
"""7-bit weights: 8-bit ones saturate where a processor lacks VNNI."""

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("mixed", (CNN_INT8,), "a minute", "INT8 in the backbone and its neck, the transformer float"),
    )
}
DEFAULT = "mixed"
