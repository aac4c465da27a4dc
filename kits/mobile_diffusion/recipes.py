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
"""Without calibration: first and last layers stay FP16, the autoencoder and the time embedding are INT8."""
UNSEEN = ("vae.encoder.*=8",)
"""No picture is encoded in generating, so no sensitivity is measured of it."""
TIMES = ("unet.time_embedding.*=16", "*.time_emb_proj=16")
"""The table of `FixTimes`: a few numbers a channel, not worth a scale."""

INT4 = Pack(
    bits=4, group_size=64, overrides=UNSEEN, budget_share=0.31, rounding="compensated", bias_correction=True,
    samples=128, batch_size=32,
)  # fmt: skip
INT4_TABLE = Pack(
    bits=4, group_size=64, overrides=(*TIMES, *UNSEEN), budget_share=0.33, rounding="compensated",
    bias_correction=True, samples=128, batch_size=32,
)  # fmt: skip
NEAREST = Pack(bits=4, group_size=64, overrides=KEPT, rounding="nearest")
FEWER_ATTENTION = RemoveAttention(share=0.7)
STUDENT = RemoveBlocks(pattern="measured")

READY = "shipped"
DEFAULT = "int4"
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(READY, (TakeShipped(),), "seconds", "the student that ships with the default model, made by `whole`"),
        Recipe(
            "int4", (INT4,), "a minute or two for the default model; for SD-1.5 hours, so int4-nearest there",
            "INT4 weights, convolutions included; 8 and 16 bits where measured sensitivity asks for them",
        ),
        Recipe("int4-nearest", (NEAREST,), "seconds, for SD-1.5 as well", "INT4 without calibration"),
        Recipe(
            "int4-recovered",
            (NEAREST, Recover(rank=8, epochs=3, lr=1e-3, batch_size=32, samples=2048, layers=("unet.*",))),
            "some 4 minutes on two cores",
            "INT4 without calibration, then low-rank terms beside the weights, trained against the original",
        ),
        Recipe(
            "attention",
            (FEWER_ATTENTION, DistilStudent(epochs=2, lr=5e-4)),
            "some 8 minutes on two cores",
            "70 % of the transformer layers gone, distilled",
        ),
        Recipe(
            "student",
            (STUDENT, DistilStudent(epochs=2, lr=5e-4)),
            "some 10 minutes on two cores",
            "7/13 of the UNet, distilled",
        ),
        Recipe(
            "steps", (DistilSteps(epochs=2, lr=3e-4, substeps=2), FixTimes()), "some 20 minutes on two cores",
            "4 steps with one forward each",
        ),
        Recipe(
            "whole",
            (
                FEWER_ATTENTION, STUDENT, DistilStudent(epochs=2, lr=8e-4),
                DistilSteps(epochs=8, lr=8e-4, substeps=2), FixTimes(), INT4_TABLE,
            ),
            "about 50 minutes on two cores",
            "everything: fewer blocks, 4 steps, INT4",
        ),
    )
}  # fmt: skip
