"""The recipes, each with its cost and what to expect of it."""

from __future__ import annotations

from core.kit import Recipe
from core.pruning import Prune
from core.quantization import QAT, Quantize

_STABLE_ON_AVX2 = True  # 7-bit weights: 8-bit ones saturate where a processor lacks VNNI

PTQ = Quantize(samples=96, calibration="mse", reduce_range=_STABLE_ON_AVX2, quantize_outputs=True)

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("int8", (PTQ,), "a minute", "INT8 without training"),
        Recipe(
            "qat",
            (PTQ, QAT(epochs=6, batch_size=8, lr=1e-4, ema=0.998)),
            "about 5 minutes on two cores for 800 pairs",
            "INT8 trained to be INT8: what the kit ships",
        ),
        Recipe(
            "small",
            (
                Prune(
                    ratio=0.3,
                    of="macs",
                    importance="taylor",
                    keep=("classes", "distances"),
                    finetune_epochs=6,
                    batch_size=8,
                ),
                PTQ,
                QAT(epochs=6, batch_size=8, lr=1e-4, ema=0.998),
            ),
            "not timed yet; fine-tunes and trains, so plan for an hour",
            "30 % fewer multiplications, then INT8",
        ),
    )
}
DEFAULT = "qat"
