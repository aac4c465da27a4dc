"""Post-training quantization: the step Quantize."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from core.compress import Outcome, Skipped, handles
from core.kit import Context, InputError, Kit, Step, Streamed
from core.quantization.error import weight_sqnr
from core.quantization.modules import QuantConv2d, QuantLayer, quant_layers
from core.quantization.prepare import Plan, Structure, build, calibrate, survey

_BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Quantize(Plan, Step):
    """Quantize weights and activations after training, on samples of the training split.

    `bias_correction` adds to each bias what quantization took from the mean of each output channel
    (Nagel et al. 2019). Layers that are quantized already stay so: a second step with other bits takes
    those that the first one kept, which makes mixed precision.
    """

    bias_correction: bool = True


class CalibrationInputs:
    """The kit's inputs for samples of the training split: tuples of tensors, made anew for each iteration.

    Where a kit is `core.kit.Streamed`, its stream is sent what `model` returns for each tuple while it is iterated.
    """

    def __init__(self, context: Context, samples: int, model: nn.Module) -> None:
        dataset = context.kit.dataset(context.data, "train", context.preset)
        if len(dataset) == 0:
            raise InputError("calibration: the training split holds no samples; give a folder that has some")
        self._kit: Kit = context.kit
        self._model, self._count, self._seed = model, samples, context.seed
        if isinstance(context.kit, Streamed):
            self._samples = list(dataset)
        else:
            chosen = random.Random(context.seed).sample(range(len(dataset)), min(samples, len(dataset)))
            self._samples = [dataset[i] for i in sorted(chosen)]

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        if isinstance(self._kit, Streamed):
            yield from self._stream(self._kit)
            return
        for batch in self._kit.batches(self._samples, _BATCH, train=False):
            yield self._kit.inputs(batch)

    def _stream(self, kit: Streamed) -> Iterator[tuple[Tensor, ...]]:
        """The tuples of the kit's stream, with each output of the model sent back to it."""
        found: list[Any] = []
        handle = self._model.register_forward_hook(lambda module, args, output: found.append(output))
        stream = kit.stream(self._samples, self._count, self._seed)
        try:
            arguments = next(stream, None)
            while arguments is not None:
                found.clear()
                yield arguments
                if not found:
                    raise RuntimeError("calibration: the model was not run on the inputs that its stream gave")
                try:
                    arguments = stream.send(found[-1])
                except StopIteration:
                    return
        finally:
            handle.remove()
            stream.close()


def restore(model: nn.Module, step: Quantize, structure: dict[str, Any]) -> nn.Module:
    """The modules of a finished step again, for weights to be loaded into."""
    return build(model, step, Structure.from_json(structure), biased=step.bias_correction)


@handles(Quantize, restore=restore)
def quantize_model(model: nn.Module, step: Quantize, context: Context) -> Outcome:
    """Fold batch norms, set all quantizers from calibration samples, correct the biases."""
    batches = CalibrationInputs(context, step.samples, model)
    structure, skipped = quantize_layers(model, step, batches, biased=step.bias_correction)
    if step.bias_correction:
        correct_biases(model, batches, structure.layers)
    return Outcome(model, describe(model, step, structure), skipped, structure.to_json())


def quantize_layers(
    model: nn.Module, plan: Plan, batches: Iterable[tuple[Tensor, ...]], *, biased: bool
) -> tuple[Structure, list[Skipped]]:
    """Survey, build and calibrate in place; what was built and what was skipped."""
    model.eval()
    structure, skipped = survey(model, plan, next(iter(batches)))
    build(model, plan, structure, biased=biased)
    if structure.layers:
        calibrate(model, batches, plan.calibration, structure.layers)
    return structure, skipped


def correct_biases(model: nn.Module, batches: Iterable[tuple[Tensor, ...]], layers: Iterable[str]) -> None:
    """Shift each layer's bias so that, on the inputs of the float model, its mean output is the float one, by channel.

    Empirical bias correction (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias
    Correction", appendix D), for every layer in one pass over the batches.
    """
    named = quant_layers(model)
    chosen = [named[name] for name in layers]
    shift: dict[QuantLayer, Tensor] = {}
    count: dict[QuantLayer, int] = {}

    def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, QuantLayer)
        _switch([layer], True)
        lost = output - layer.forward(args[0])
        _switch([layer], False)
        lost = lost.movedim(-3 if isinstance(layer, QuantConv2d) else -1, 0).flatten(1)
        shift[layer] = shift.get(layer, torch.zeros(len(lost), dtype=torch.double)) + lost.double().sum(1).cpu()
        count[layer] = count.get(layer, 0) + lost.shape[1]

    handles_ = [layer.register_forward_hook(hook) for layer in chosen]
    _switch(chosen, False)
    try:
        with torch.no_grad():
            for batch in batches:
                model(*batch)
    finally:
        for handle in handles_:
            handle.remove()
        _switch(chosen, True)
    with torch.no_grad():
        for layer, total in shift.items():
            if layer.bias is None:
                layer.bias = nn.Parameter(torch.zeros(len(total), device=layer.weight.device))
            layer.bias += (total / count[layer]).to(layer.bias)


def describe(model: nn.Module, plan: Plan, structure: Structure) -> list[dict[str, Any]]:
    """The lines of the trace: folded norms, and each quantized layer with its schemes and the SQNR of its weights."""
    changed: list[dict[str, Any]] = [
        {"layer": norm, "what": f"batch norm folded into {layer}"} for layer, norm in structure.folded
    ]
    ratios = weight_sqnr(model)
    inputs = f"input {plan.activation}" if plan.activation else "input float"
    partners = {name: [n for n in names if n != name] for names in structure.shared for name in names}
    for name in structure.layers:
        what = f"weight {plan.weight}; {inputs}"
        if name in partners:
            what += f", its quantizer shared with {', '.join(partners[name])}"
        if name in structure.outputs:
            what += f"; output {plan.activation}"
        line: dict[str, Any] = {"layer": name, "what": what, "weight_bits": plan.weight_bits}
        line["activation_bits"] = plan.activation_bits
        if isfinite(ratios[name]):
            line["weight_sqnr"] = round(ratios[name], 2)
        changed.append(line)
    return changed


def _switch(layers: Iterable[QuantLayer], active: bool) -> None:
    for layer in layers:
        for quantizer in (layer.input_quantizer, layer.weight_quantizer, layer.output_quantizer):
            if quantizer is not None:
                quantizer.active = active
