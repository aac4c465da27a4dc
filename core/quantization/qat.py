"""Quantization-aware training: the step QAT."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import Any

from torch import nn

from core.compress import Outcome, Skipped, handles
from core.kit import Context, InputError, Step
from core.quantization.modules import quantizers
from core.quantization.prepare import Plan, Structure, build
from core.quantization.ptq import CalibrationInputs, describe, quantize_layers
from core.train import Schedule, fit


@dataclass(frozen=True, kw_only=True)
class QAT(Plan, Step):
    """Train weights and step sizes with quantization simulated (LSQ, Esser et al. 2020), batch norms folded.

    A model that is quantized already is trained as it is, and the scheme fields are not read; any other is first
    quantized and calibrated by them.
    """

    epochs: int = 5
    batch_size: int = 16
    lr: float = 1e-4
    weight_decay: float = 0.0
    ema: float = 0.0
    clip: float = 1.0


def restore(model: nn.Module, step: QAT, structure: dict[str, Any]) -> nn.Module:
    """The modules of a finished step again, for weights to be loaded into."""
    return build(model, step, Structure.from_json(structure)) if structure else model


@handles(QAT, restore=restore)
def train_quantized(model: nn.Module, step: QAT, context: Context) -> Outcome:
    """Quantize where that is still to do, then train on the kit's loss over the training split."""
    changed: list[dict[str, Any]] = []
    skipped: list[Skipped] = []
    structure: dict[str, Any] = {}
    if next(quantizers(model), None) is None:
        inputs = CalibrationInputs(context, step.samples, model)
        built, skipped = quantize_layers(model, step, inputs, biased=False)
        changed, structure = describe(model, step, built), built.to_json()
    samples = context.kit.dataset(context.data, "train", context.preset)
    if len(samples) == 0:
        raise InputError("QAT: the training split holds no samples; give a folder that has some")
    trained = list(quantizers(model))
    for quantizer in trained:
        quantizer.learn()

    def batches(epoch: int) -> Iterable[Any]:
        seed = context.seed * 1_000_003 + epoch
        return context.kit.batches(samples, step.batch_size, train=True, seed=seed)

    schedule = Schedule(
        epochs=step.epochs,
        batch_size=step.batch_size,
        lr=step.lr,
        weight_decay=step.weight_decay,
        ema=step.ema,
        clip=step.clip,
        seed=context.seed,
    )
    result = fit(
        model,
        batches,
        context.kit.loss,
        schedule,
        steps_per_epoch=ceil(len(samples) / step.batch_size),
        folder=context.folder,
        resume=context.resume,
        label="qat",
    )
    model = result.model.eval()
    for quantizer in quantizers(model):
        quantizer.settle()
    what = f"{len(trained)} quantizers and all weights trained for {step.epochs} epochs"
    changed.append({"layer": "", "what": what, "epochs": step.epochs, "history": result.history})
    return Outcome(model, changed, skipped, structure)
