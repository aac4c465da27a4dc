"""The recipes, each with its cost and what to expect of it."""

from __future__ import annotations

from core.kit import Recipe
from core.quantization import Pack, Recover
from kits.mobile_diffusion.blocks import RemoveAttention, RemoveBlocks
from kits.mobile_diffusion.distil import DistilSteps, DistilStudent
from kits.mobile_diffusion.shipped import TakeShipped
from kits.mobile_diffusion.times import FixTimes

KEPT = (
    "unet.conv_in=16", "unet.conv_out=16", "unet.time_embedding.*=8",
    "vae.encoder.*=8", "vae.decoder.*=8", "vae.*=16", "*.position_embedding=16",
)  # fmt: skip
"""First and last layers stay FP16, the autoencoder and the time embedding are INT8."""
TIMES = ("unet.time_embedding.*=16", "*.time_emb_proj=16")
"""The table of `FixTimes`: a few numbers a channel, not worth a scale."""

INT4 = Pack(
    bits=4, group_size=64, overrides=KEPT, rounding="compensated", bias_correction=True, samples=128, batch_size=32
)
INT4_TABLE = Pack(
    bits=4, group_size=64, overrides=(*TIMES, *KEPT), rounding="compensated", bias_correction=True, samples=128,
    batch_size=32,
)  # fmt: skip
NEAREST = Pack(bits=4, group_size=64, overrides=KEPT, rounding="nearest")
FEWER_ATTENTION = RemoveAttention(share=0.7)
STUDENT = RemoveBlocks(pattern="measured")
FEWER_STEPS = DistilSteps(epochs=6, lr=5e-4, steps=4, substeps=4)

READY = "shipped"
DEFAULT = "int4"
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(READY, (TakeShipped(),), "seconds", "the student that ships with the default model, made by `whole`"),
        Recipe("int4", (INT4,), "about ten seconds for the default model", "INT4 weights, convolutions included"),
        Recipe("int4-nearest", (NEAREST,), "seconds, for SD-1.5 as well", "INT4 without calibration"),
        Recipe(
            "int4-recovered",
            (INT4, Recover(rank=8, epochs=3, lr=1e-3, batch_size=32, samples=2048, layers=("unet.*",))),
            "not timed yet",
            "INT4 with low-rank terms beside the weights, trained against the original",
        ),
        Recipe(
            "attention",
            (FEWER_ATTENTION, DistilStudent(epochs=4, lr=5e-4)),
            "not timed yet",
            "70 % of the transformer layers gone, distilled",
        ),
        Recipe("student", (STUDENT, DistilStudent(epochs=4, lr=5e-4)), "not timed yet", "7/13 of the UNet, distilled"),
        Recipe("steps", (FEWER_STEPS, FixTimes()), "not timed yet", "4 steps with one forward each"),
        Recipe(
            "whole",
            (
                FEWER_ATTENTION, STUDENT, DistilStudent(epochs=3, lr=5e-4), FEWER_STEPS, FixTimes(), INT4_TABLE,
            ),
            "not timed yet",
            "everything: fewer blocks, 4 steps, INT4",
        ),
    )
}  # fmt: skip
