"""The recipes, each with its cost and what to expect of it."""

from __future__ import annotations

from core.kit import Recipe
from core.quantization import Pack
from kits.mobile_diffusion.blocks import RemoveAttention, RemoveBlocks
from kits.mobile_diffusion.distil import DistilSteps, DistilStudent

KEPT = (
    "unet.conv_in=16", "unet.conv_out=16", "unet.time_embedding.*=8",
    "vae.encoder.*=8", "vae.decoder.*=8", "vae.*=16", "*.position_embedding=16",
)  # fmt: skip
"""First and last layers stay FP16, the autoencoder and the time embedding are INT8."""

INT4 = Pack(
    bits=4, group_size=64, overrides=KEPT, rounding="compensated", bias_correction=True, samples=128, batch_size=32
)
NEAREST = Pack(bits=4, group_size=64, overrides=KEPT, rounding="nearest")
FEWER_ATTENTION = RemoveAttention(share=0.7)
STUDENT = RemoveBlocks(pattern="measured")

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("int4", (INT4,), "about two minutes for the default model", "INT4 weights, convolutions included"),
        Recipe("int4-nearest", (NEAREST,), "seconds; under three minutes for SD-1.5", "INT4 without calibration"),
        Recipe(
            "attention",
            (FEWER_ATTENTION, DistilStudent(epochs=4, lr=3e-4)),
            "not timed yet",
            "70 % of the transformer layers gone, distilled",
        ),
        Recipe("student", (STUDENT, DistilStudent(epochs=8, lr=3e-4)), "not timed yet", "7/13 of the UNet, distilled"),
        Recipe("steps", (DistilSteps(epochs=8, lr=2e-4),), "not timed yet", "4 steps with one forward each"),
        Recipe(
            "whole",
            (FEWER_ATTENTION, STUDENT, DistilStudent(epochs=8, lr=3e-4), DistilSteps(epochs=8, lr=2e-4), INT4),
            "not timed yet",
            "everything: fewer blocks, 4 steps, INT4",
        ),
    )
}
DEFAULT = "int4"
