"""From a float model to one with quantizers: which layers, which schemes, in a structure that is plain JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core.compress import Skipped
from core.kit import InputError
from core.quantization.calibration import (
    Histogram,
    Method,
    MinMax,
    check_method,
    choose_range,
    weight_qparams,
)
from core.quantization.folding import find_folds, fold, replace_module
from core.quantization.modules import QuantConv2d, Quantizer, QuantLinear, quant_layers, quantizers
from core.quantization.numerics import choose_qparams
from core.quantization.schemes import Granularity, PerChannel, PerGroup, PerTensor, Scheme
from core.quantization.watching import Seen, watch

_RELU = {"relu", "relu_"}
_OWN_FORWARD = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The fields that the steps Quantize and QAT share: schemes, calibration, and what stays float.

    `activation_bits` 0 quantizes weights only. `group_size` counts elements of the flattened kernel and is
    used with granularity "group". `samples` training samples calibrate the activations. Only layers whose name
    matches a pattern of `layers` (fnmatch: "head.*") and none of `keep` are quantized; the others stay float.
    `quantize_outputs` adds output quantizers, which ONNX Runtime needs to run a convolution in INT8 where no ReLU
    follows; OpenVINO does without.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    weight_granularity: Literal["tensor", "channel", "group"] = "channel"
    group_size: int = 64
    weight_symmetric: bool = True
    activation_symmetric: bool = False
    reduce_range: bool = False
    calibration: Method = "minmax"
    samples: int = 64
    keep: tuple[str, ...] = ()
    layers: tuple[str, ...] = ("*",)
    quantize_outputs: bool = False

    def __post_init__(self) -> None:
        check_method(self.calibration)
        if self.weight_granularity not in ("tensor", "channel", "group"):
            raise InputError(f"weight_granularity is {self.weight_granularity!r}; known are tensor, channel, group")
        if self.samples < 1:
            raise InputError(f"samples is {self.samples}; calibration needs at least 1")
        _ = self.weight, self.activation

    @property
    def weight(self) -> Scheme:
        """The scheme of the weights."""
        granularities: dict[str, Granularity] = {
            "tensor": PerTensor(), "channel": PerChannel(), "group": PerGroup(self.group_size),
        }  # fmt: skip
        granularity = granularities[self.weight_granularity]
        return Scheme(self.weight_bits, self.weight_symmetric, granularity, self.reduce_range)

    @property
    def activation(self) -> Scheme | None:
        """The scheme of the activations, None for weights only."""
        return Scheme(self.activation_bits, self.activation_symmetric) if self.activation_bits else None


@dataclass(frozen=True)
class Structure:
    """What `build` changes in a model.

    `folded` are (layer, batch norm) pairs; `layers` get quantizers; the layers of each tuple in `shared` read the same
    tensor and share its quantizer; those in `outputs` have an output quantizer.
    """

    folded: tuple[tuple[str, str], ...]
    layers: tuple[str, ...]
    shared: tuple[tuple[str, ...], ...]
    outputs: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Lists of names."""
        return {
            "folded": [list(pair) for pair in self.folded],
            "layers": list(self.layers),
            "shared": [list(names) for names in self.shared],
            "outputs": list(self.outputs),
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Structure:
        """Read back `to_json`."""
        return Structure(
            tuple((a, b) for a, b in data["folded"]),
            tuple(data["layers"]),
            tuple(tuple(names) for names in data["shared"]),
            tuple(data["outputs"]),
        )


def survey(model: nn.Module, plan: Plan, inputs: tuple[Tensor, ...]) -> tuple[Structure, list[Skipped]]:
    """What to fold and quantize, and every layer left alone with the reason; runs `model(*inputs)`, changes nothing."""
    folds, skipped = find_folds(model, inputs)
    seen = watch(model, inputs, (nn.Conv2d, nn.Linear))
    modules = dict(model.named_modules())
    kernels = [name for name, m in modules.items() if isinstance(m, nn.Conv2d | nn.Linear)]
    for field, patterns in (("keep", plan.keep), ("layers", () if plan.layers == ("*",) else plan.layers)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in kernels):
                raise InputError(
                    f"{field}: pattern {pattern!r} matches no convolution or linear layer; correct or remove it"
                )
    layers = []
    for name, module in modules.items():
        if name == "" or isinstance(module, Quantizer) or not _has_kernel(module):
            continue
        why = _obstacle(name, module, plan, seen, modules)
        if why is None:
            layers.append(name)
        else:
            skipped.append(Skipped(name, f"stays as it is: {why}"))
    readers: dict[tuple[tuple[int, int], ...], list[str]] = {}
    for name in layers:
        readers.setdefault(tuple(seen[name].inputs), []).append(name)
    shared = tuple(tuple(names) for names in readers.values() if len(names) > 1) if plan.activation else ()
    outputs = tuple(layers) if plan.quantize_outputs and plan.activation else ()
    if outputs:
        after_fold = dict(folds)
        relus = watch(model, inputs, (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.BatchNorm1d))
        outputs = tuple(n for n in outputs if not _only_relu(relus[after_fold.get(n, n)]))
    return Structure(tuple(folds), tuple(layers), shared, outputs), skipped


def build(model: nn.Module, plan: Plan, structure: Structure, *, biased: bool = False) -> nn.Module:
    """Fold and put quantized layers in place, all quantizers still at scale 1; returns the model.

    `biased` gives every layer a bias. InputError names a layer whose kernel the group size does not divide.
    """
    fold(model, list(structure.folded))
    weight, activation = plan.weight, plan.activation
    for name in structure.layers:
        weight.granularity.scale_shape(_layer(model, name).weight.shape, name)
    for name in structure.layers:
        layer = _layer(model, name)
        new: QuantConv2d | QuantLinear
        if isinstance(layer, nn.Conv2d):
            new = QuantConv2d.from_float(layer, weight, activation, name)
        else:
            new = QuantLinear.from_float(layer, weight, activation, name)
        if biased and new.bias is None:
            new.bias = nn.Parameter(new.weight.new_zeros(len(new.weight)))
        if name in structure.outputs and activation is not None:
            new.output_quantizer = Quantizer(activation, per_sample=True).to(new.weight.device)
        replace_module(model, layer, new)
    for first, *others in structure.shared:
        for name in others:
            model.get_submodule(name).input_quantizer = model.get_submodule(first).input_quantizer
    return model


def prepare(model: nn.Module, plan: Plan, inputs: tuple[Tensor, ...]) -> nn.Module:
    """Fold batch norms and put quantizers into a model, in place; `inputs` are its positional arguments.

    The quantizers are off until `calibrate` has set them, so the model still computes what it did.
    """
    structure, _ = survey(model, plan, inputs)
    build(model, plan, structure)
    for quantizer in quantizers(model):
        quantizer.active = False
    return model


def calibrate(
    model: nn.Module, batches: Iterable[tuple[Tensor, ...]], method: Method, layers: Iterable[str] | None = None
) -> None:
    """Set the quantizers of the named layers (default all) from weights and what the batches bring; switch them on.

    `batches` are tuples of positional arguments and are iterated twice unless the method is "minmax".
    The activations are observed with those quantizers off. InputError names a layer that no batch reached.
    """
    chosen = quant_layers(model)
    if layers is not None:
        chosen = {name: chosen[name] for name in layers}
    activations: dict[Quantizer, str] = {}
    for name, layer in chosen.items():
        layer.weight_quantizer.active = False
        for quantizer in (layer.input_quantizer, layer.output_quantizer):
            if quantizer is not None:
                activations.setdefault(quantizer, name)
                quantizer.active = False
    ranges = {q: MinMax() for q in activations}
    if activations:
        _observe(model, batches, ranges)
        for q, name in activations.items():
            if ranges[q].low > ranges[q].high:
                raise InputError(f"layer {name!r}: no calibration batch reached it; put its name into `keep`")
    found = {q: (r.low, r.high) for q, r in ranges.items()}
    if activations and method != "minmax":
        histograms = {q: Histogram(low, high) for q, (low, high) in found.items()}
        _observe(model, batches, histograms)
        found = {q: choose_range(h, method, q.scheme) for q, h in histograms.items()}
    for q, (low, high) in found.items():
        q.assign(*choose_qparams(torch.tensor(low), torch.tensor(high), q.scheme))
    for name, layer in chosen.items():
        quantizer = layer.weight_quantizer
        quantizer.assign(*weight_qparams(layer.weight, quantizer.scheme, method, name))


def _observe(model: nn.Module, batches: Iterable[tuple[Tensor, ...]], observers: Any) -> None:
    """Run the batches through the model in eval mode, with each quantizer's observer looking on."""
    model.eval()
    for quantizer, observer in observers.items():
        quantizer.observer = observer
    try:
        with torch.no_grad():
            for batch in batches:
                model(*batch)
    finally:
        for quantizer in observers:
            quantizer.observer = None


def _has_kernel(module: nn.Module) -> bool:
    """Whether a module owns a parameter with two axes or more, so that leaving it float is worth a line."""
    return any(p.ndim >= 2 for p in module.parameters(recurse=False))


def _obstacle(
    name: str, module: nn.Module, plan: Plan, seen: dict[str, Seen], modules: dict[str, nn.Module]
) -> str | None:
    """Why a layer cannot be quantized, or None."""
    if isinstance(module, QuantConv2d | QuantLinear):
        return "it is quantized already"
    for pattern in plan.keep:
        if fnmatchcase(name, pattern):
            return f"kept float by pattern {pattern!r}"
    if not any(fnmatchcase(name, pattern) for pattern in plan.layers):
        named = ", ".join(map(repr, plan.layers)) if len(plan.layers) <= 4 else f"{len(plan.layers)} patterns"
        return f"not among the layers of the step ({named})"
    if type(module) not in (nn.Conv2d, nn.Linear):
        return f"{type(module).__name__} is neither nn.Conv2d nor nn.Linear"
    parts = name.split(".")
    for end in range(len(parts)):
        if isinstance(modules[".".join(parts[:end])], _OWN_FORWARD):
            return f"{type(modules['.'.join(parts[:end])]).__name__} reads its weights without calling it"
    if name not in seen:
        return "it was not called in the forward that was watched"
    return None


def _only_relu(seen: Seen) -> bool:
    """Whether a layer's output goes into a ReLU and nowhere else."""
    return not seen.returned and len(seen.uses) == 1 and seen.uses[0] in _RELU


def _layer(model: nn.Module, name: str) -> nn.Conv2d | nn.Linear:
    layer = model.get_submodule(name)
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        raise InputError(f"layer {name!r}: is a {type(layer).__name__}, expected nn.Conv2d or nn.Linear")
    return layer
