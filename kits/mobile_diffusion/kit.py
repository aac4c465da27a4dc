"""The kit: Stable Diffusion in INT4, convolutions included: fewer blocks, fewer steps, packed weights."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.compress import compress
from core.evaluation.measure import device
from core.figures import Figure, Figures, Measured
from core.kit import Graph, InputError, Kit, Recipe
from kits.mobile_diffusion import predict as drawing
from kits.mobile_diffusion import shipped
from kits.mobile_diffusion.acceptance import GATES, align, pictures, steps_of
from kits.mobile_diffusion.batches import Batches
from kits.mobile_diffusion.comparison import compare, evaluate, judged, side_by_side
from kits.mobile_diffusion.data.default import samples
from kits.mobile_diffusion.generate import generate
from kits.mobile_diffusion.model.pipeline import Diffusion, load_diffusion
from kits.mobile_diffusion.recipes import DEFAULT, READY, RECIPES

LARGE = 50_000_000
"""Parameters of a UNet from which a picture takes minutes here, so that only a few prompts are drawn."""
DECODED = 16
"""Latents a side that are decoded for calibration."""
LARGE_PROMPTS = {"smoke": 1, "full": 4}
TRIAL_STEPS = 4
"""Steps of a large model's picture in the preset "smoke"."""


class MobileDiffusion:
    """A text-to-image model for a phone: packed, and where it was distilled, with fewer blocks and steps.

    Its default recipe takes the student that ships for the model that ships; any other model is packed.
    """

    name = "mobile_diffusion"
    title = "Mobile diffusion: INT4 Stable Diffusion, convolutions included"
    default_target = "snapdragon-8-gen-2"
    headline = "alignment"
    rate_hz = 1.0
    gates = GATES
    runtimes: tuple[str, ...] = ("torch",)

    def __init__(self, original: Diffusion | None = None, default_recipe: str | None = None) -> None:
        self._original = original
        self.recipes: Mapping[str, Recipe] = {k: r for k, r in RECIPES.items() if k != READY or shipped.is_there()}
        self.default_recipe = default_recipe or (READY if shipped.is_there() else DEFAULT)
        self._batches: Batches | None = None

    def of(self, model: nn.Module) -> Kit:
        """The kit with batches, graphs and comparisons of this model."""
        chosen = READY if shipped.is_default(model) else DEFAULT
        return MobileDiffusion(_diffusion(model), chosen)

    def model(self, weights: Path | None = None) -> nn.Module:
        """The shipped model, that of a diffusers folder (packed or not), of what `train` left, or of a hub id."""
        folder = weights or shipped.DEFAULT
        if (folder / "model" / "model_index.json").is_file():
            folder = folder / "model"
        model = load_diffusion(folder if folder.exists() else str(folder))  # a hub id is no folder
        model.vae.requires_grad_(False)  # batches are latents, so no loss sees it
        return model

    def shipped(self) -> tuple[dict[str, nn.Module], dict[str, Any]]:
        """The model as trained, and the packed student of it, or where none ships, the model itself packed."""
        if shipped.is_there():
            return {"fp32": self._model, "int4": load_diffusion(shipped.WHOLE)}, {}
        return {"fp32": self._model, "int4": compress(self._model, RECIPES["int4-nearest"], self)[0]}, {}

    def dataset(self, data: Path | None, split: str, preset: str = "full") -> Sequence[Any]:
        """Captioned pictures to train on, prompts with seeds to choose by and to report."""
        found = samples(data, split, preset, self._model.pixels)
        if split == "test" and sum(p.numel() for p in self._model.unet.parameters()) > LARGE:
            steps = TRIAL_STEPS if preset == "smoke" else None
            return [replace(p, steps=steps) for p in found[: LARGE_PROMPTS[preset]]]
        return found

    def batches(
        self, samples: Sequence[Any], batch_size: int, *, train: bool, seed: int = 0
    ) -> Iterable[dict[str, Any]]:
        """Noisy latents of the model's own autoencoder; see `batches.Batches`."""
        if self._batches is None:
            self._batches = Batches(self._model)
        return self._batches(samples, batch_size, train=train, seed=seed)

    def inputs(self, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        """Noisy latents (N, C, h, w), timesteps (N,), token ids (N, L)."""
        return batch["latents"], batch["timesteps"], batch["token_ids"]

    def calibration(self, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        """The inputs, and clean latents (M, C, h', w') for the decoder: of a quarter of the batch, the middle of each.

        Decoding a picture of Stable Diffusion's size whole would take longer than all else.
        """
        clean = batch["clean"]
        rows = clean[: -(-len(clean) // 4)]
        top, left = ((side - min(side, DECODED)) // 2 for side in rows.shape[2:])
        return *self.inputs(batch), rows[:, :, top : top + DECODED, left : left + DECODED]

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """The mean squared error of the prediction."""
        return nn.functional.mse_loss(model(*self.inputs(batch)), batch["target"])

    def exports(self) -> tuple[Graph, ...]:
        """The three networks of a picture, for one row of a batch."""
        model = self._model
        unet, side = model.unet.config, model.unet.config.sample_size
        draws = torch.Generator().manual_seed(0)
        latents = torch.randn(1, unet.in_channels, side, side, generator=draws)
        text = torch.randn(1, model.tokenizer.model_max_length, unet.cross_attention_dim, generator=draws)
        ids = model.tokens(["a red circle"])
        return (
            Graph("text_encoder", {"token_ids": ids}, ("states", "pooled"), part="text_encoder"),
            Graph(
                "unet",
                {"latents": latents, "timesteps": torch.tensor([500]), "states": text},
                ("prediction",),
                part="unet",
            ),
            Graph("decoder", {"latents": latents}, ("pixels",), part="vae.decoder"),
        )

    def report_split(self, data: Path | None) -> str:
        """Held-out compositions, or a tenth of a folder's pictures."""
        return "test"

    def freeze(self, module: nn.Module, data: Path | None, preset: str) -> dict[str, Any]:
        """Steps and guidance come with the model; nothing is chosen here."""
        return {}

    def score(self, module: nn.Module, samples: Sequence[Any], meta: Mapping[str, Any]) -> dict[str, tuple[float, str]]:
        """Alignment with the prompts, as a whole, by demand and by kind of prompt."""
        model = _diffusion(module)
        if not judged(model, samples):
            return {}
        values: dict[str, tuple[float, str]] = align(samples, pictures(model, samples))["values"]
        return values

    def evaluate(self, module: nn.Module, samples: Sequence[Any], meta: Mapping[str, Any], out: Path) -> dict[str, Any]:
        """Alignment with intervals; leaves the pictures in `predictions/` and `metrics.json` in `out`."""
        return evaluate(_diffusion(module), samples, out)

    def train(self, data: Path | None, preset: str, out: Path, resume: bool, teacher: Path | None = None) -> Figures:
        """Train autoencoder, text encoder and UNet from random weights; leaves a diffusers folder in `out`/model."""
        if teacher is not None:
            raise InputError("--teacher: this kit distils by recipe: fitkit run mobile_diffusion --recipe student")
        from kits.mobile_diffusion.training import train_default

        model = train_default(out, preset, resume, data)
        found = self.dataset(data, "test", preset)
        if not judged(model, found):
            return Figures()
        basis = Measured(device(), f"PyTorch {torch.__version__.split('+')[0]} FP32", len(found), note="split test")
        values = align(found, pictures(model, found))["values"]
        return Figures(Figure(name, value, unit, basis, "original") for name, (value, unit) in values.items())

    def check(self, inputs: Sequence[str]) -> None:
        """Prompts, or text files of prompts."""
        drawing.check(inputs)

    def predict(
        self, module: nn.Module | Path, inputs: Sequence[str], meta: Mapping[str, Any], out: Path, options: Any
    ) -> str:
        """A PNG for each prompt, results.json and, with an original, a contact sheet."""
        return drawing.predict(module if isinstance(module, Path) else _diffusion(module), inputs, meta, out, options)

    def arguments(self, command: str, parser: argparse.ArgumentParser) -> None:
        """The options of `predict`."""
        if command == "predict":
            drawing.add_arguments(parser)

    def pipeline(self, module: nn.Module, samples: Sequence[Any]) -> Callable[[], Any]:
        """A picture of the next prompt, from the prompt to pixels, in the model's own steps (see `steps_of`)."""
        model, prompts = _diffusion(module), cycle(samples)
        steps = steps_of(model, samples)

        def draw() -> Any:
            prompt = next(prompts)
            guidance = model.sampling.guidance
            return generate(model, [prompt.text], seeds=prompt.seed, steps=steps, guidance=guidance, watch=False)

        return draw

    def baselines(self, samples: Sequence[Any], threads: int) -> dict[str, Callable[[], Any]]:
        """None: other tools are compared by bytes and error, in `benchmarks/diffusion_tools.py`."""
        return {}

    def compare(
        self, original: nn.Module, compressed: nn.Module, samples: Sequence[Any], artifact: Any, preset: str, out: Path
    ) -> tuple[Figures, list[dict[str, Any]]]:
        """Fidelity to the original with the same seeds, speed and bytes against it, and what a phone would take.

        With the preset "full", SD-1.5's architecture in full size as well.
        """
        found, tables = compare(self, _diffusion(original), _diffusion(compressed), samples, artifact, preset)
        if preset == "full":
            from kits.mobile_diffusion.full_size import full_size

            more, extra = full_size(out / "full_size")
            found, tables = found | more, [*tables, *extra]
        return found, tables

    def pictures(self, module: nn.Module, samples: Sequence[Any], meta: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Pictures of the original and of the compressed model side by side, a prompt of every kind."""
        return side_by_side(self._model, _diffusion(module), samples)

    @property
    def _model(self) -> Diffusion:
        """The model that this kit is of; the shipped one where none was named."""
        if self._original is None:
            self._original = _diffusion(self.model())
        return self._original


def _diffusion(module: nn.Module) -> Diffusion:
    if not isinstance(module, Diffusion):
        raise InputError(f"a {type(module).__name__}, expected a Diffusion of kits.mobile_diffusion")
    return module
