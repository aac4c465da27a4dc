"""Packing: the step Pack, which keeps weights as integers of 2 to 8 bits with FP16 scales for groups of a kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core.compress import Outcome, Skipped, handles
from core.kit import Calibrated, Context, InputError, Step, Streamed
from core.progress import progress
from core.quantization.budget import choose_bits
from core.quantization.compensation import Moments, blocks, compensate, mean_error, moment_bytes
from core.quantization.packed import FloatLayer, PackedEmbedding, PackedLayer, empty_packed, pack_module, unpackable
from core.quantization.packing import check_width, group_count, one_thread, row_bytes
from core.quantization.ptq import CalibrationInputs
from core.quantization.sensitivity import FLOAT_BITS, Errors, bit_errors, outputs, read_errors, write_errors

_Places = dict[int, list[tuple[nn.Module, str]]]
MOMENTS_AT_ONCE = 1_000_000_000  # bytes of second moments gathered in one pass over the calibration inputs


@dataclass(frozen=True, kw_only=True)
class Pack(Step):
    """Pack every convolution, linear layer and embedding as integers of `bits` bits, `group_size` to a scale.

    `overrides` are "pattern=bits" (fnmatch on layer names, the first that matches counts; 16 leaves a layer in FP16).
    `rounding` is "nearest", "mse" (scales of least squared error) or "compensated" (GPTQ, on calibration inputs).
    `bias_correction` folds the mean error of each output channel into the bias, where a layer has one. With
    `budget_mb`, in 1e6 bytes for the whole model with everything else in FP16, or `budget_share`, of the bytes of the
    whole model in FP16, each layer without an override gets one of `candidates` by measured sensitivity. Calibration
    takes `samples` of the training split, sensitivity the first batch of `batch_size` of them.
    """

    bits: int = 4
    group_size: int = 64
    overrides: tuple[str, ...] = ()
    rounding: Literal["nearest", "mse", "compensated"] = "mse"
    bias_correction: bool = False
    budget_mb: float | None = None
    budget_share: float | None = None
    candidates: tuple[int, ...] = (4, 8, 16)
    samples: int = 32
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.rounding not in ("nearest", "mse", "compensated"):
            raise InputError(f"Pack.rounding is {self.rounding!r}; known are nearest, mse, compensated")
        for field in ("samples", "batch_size"):
            if getattr(self, field) < 1:
                raise InputError(f"Pack.{field} is {getattr(self, field)}; expected at least 1")
        if self.budget_mb is not None and not (self.budget_mb > 0 and math.isfinite(self.budget_mb)):
            raise InputError(f"Pack.budget_mb is {self.budget_mb}; expected a positive number or none")
        if self.budget_share is not None and not (0 < self.budget_share <= 1 and self.budget_mb is None):
            raise InputError(
                f"Pack.budget_share is {self.budget_share}; expected more than 0 and at most 1, without budget_mb"
            )
        if not self.candidates:
            raise InputError("Pack.candidates is empty; expected widths such as (4, 8, 16)")
        for bits in (self.bits, *self.candidates, *(bits for _, bits in self.patterns)):
            if bits != FLOAT_BITS:
                check_width(bits, self.group_size)

    @property
    def patterns(self) -> list[tuple[str, int]]:
        """The overrides as (pattern, bits)."""
        found = []
        for text in self.overrides:
            pattern, sign, bits = text.rpartition("=")
            if not sign or not pattern or not bits.isdigit():
                raise InputError(f"Pack.overrides: {text!r} is not 'pattern=bits', such as 'conv_in=16'")
            found.append((pattern, int(bits)))
        return found

    @property
    def needs_inputs(self) -> bool:
        """Whether calibration inputs are run through the model."""
        return self.needs_moments or self.budgeted

    @property
    def budgeted(self) -> bool:
        """Whether the bits of each layer are chosen by measured sensitivity."""
        return self.budget_mb is not None or self.budget_share is not None

    @property
    def needs_moments(self) -> bool:
        """Whether moments of each layer's inputs are gathered."""
        return self.rounding == "compensated" or self.bias_correction


def restore(model: nn.Module, step: Pack, structure: dict[str, Any]) -> nn.Module:
    """Empty packed layers again, for weights to be loaded into."""
    places = _places(model)
    for name, record in structure["layers"].items():
        layer = model.get_submodule(name)
        _replace(places, layer, empty_packed(layer, record["bits"], record["group_size"]))
    return model


@handles(Pack, restore=restore)
def pack_model(model: nn.Module, step: Pack, context: Context) -> Outcome:
    """Choose the bits, then pack layer by layer; each float weight is let go as its packed form is there."""
    model.eval()
    names, skipped = _packable(model)
    batches: Iterable[tuple[Tensor, ...]] = _Inputs(context, step, model) if step.needs_inputs else []
    changed: list[dict[str, Any]] = []
    errors: Errors = {}
    bits = _overridden(step, names)
    if not step.budgeted:
        bits = {name: bits.get(name, step.bits) for name in names}
    else:
        bits, errors, line = _budgeted(model, step, names, bits, batches, context)
        changed.append(line)
    for name in [name for name in names if bits[name] == FLOAT_BITS]:
        why = "chosen under the budget" if name in errors else "by an override"
        skipped.append(Skipped(name, f"stays in FP16: {why}"))
    chosen = {name: width for name, width in bits.items() if width != FLOAT_BITS}
    rows = _pack(model, step, chosen, batches)
    for row in rows:
        if row["layer"] in errors:
            row |= {f"error_{width}": error for width, error in errors[row["layer"]].items()}
    structure = {name: {"bits": width, "group_size": step.group_size} for name, width in chosen.items()}
    return Outcome(model, changed + rows, skipped, {"layers": structure})


class _Inputs(CalibrationInputs):
    """Calibration inputs in batches of the step's size."""

    def __init__(self, context: Context, step: Pack, model: nn.Module) -> None:
        super().__init__(context, step.samples, model)
        self._batch_size = step.batch_size
        self._arguments = self._kit.calibration if isinstance(self._kit, Calibrated) else self._kit.inputs

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        if isinstance(self._kit, Streamed):
            yield from self._stream(self._kit)
            return
        for batch in self._kit.batches(self._samples, self._batch_size, train=False):
            yield self._arguments(batch)


def _packable(model: nn.Module) -> tuple[list[str], list[Skipped]]:
    """The layers that can be packed, and every other owner of a kernel with the reason."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    names, skipped = [], []
    for name, module in model.named_modules():
        kernels = [p for p in module.parameters(recurse=False) if p.ndim >= 2]
        if not kernels and not isinstance(module, PackedLayer):
            continue
        why = unpackable(module)
        if name == "":
            why = why or "it is the model itself, with no parent to hold its packed form"
        others = [n for p in kernels for n in owners[id(p)] if n != name]
        if why is None and others:
            why = f"it shares its weight with {others[0]!r}"
        if why is None:
            names.append(name)
        else:
            skipped.append(Skipped(name, f"stays as it is: {why}"))
    return names, skipped


def _overridden(step: Pack, names: list[str]) -> dict[str, int]:
    for pattern, _ in step.patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(f"Pack.overrides: pattern {pattern!r} matches no layer to pack; correct or remove it")
    matches = {name: [b for pattern, b in step.patterns if fnmatchcase(name, pattern)] for name in names}
    return {name: found[0] for name, found in matches.items() if found}


def _budgeted(
    model: nn.Module,
    step: Pack,
    names: list[str],
    fixed: dict[str, int],
    batches: Iterable[tuple[Tensor, ...]],
    context: Context,
) -> tuple[dict[str, int], Errors, dict[str, Any]]:
    """Bits for all layers, the measured errors of those that had a choice, and the line of the trace."""
    free = [name for name in names if name not in fixed]
    weights = {name: model.get_parameter(f"{name}.weight") for name in names}
    sizes = {
        name: {bits: packed_bytes(weights[name], bits, step.group_size) for bits in step.candidates} for name in free
    }
    rest = float16_bytes(model) - sum(2 * weights[name].numel() for name in names)
    rest += sum(packed_bytes(weights[name], bits, step.group_size) for name, bits in fixed.items())
    least = rest + sum(min(row.values()) for row in sizes.values())
    budget, limit = _limit(model, step)
    if least > limit:
        raise InputError(
            f"Pack.{budget}, but the least size within reach is {least / 1e6:.3f} MB "
            f"({rest / 1e6:.3f} MB of it without a choice); raise it, or add a smaller width to candidates"
        )
    errors = _measured(model, step, free, batches, context)
    chosen = choose_bits(sizes, errors, limit - rest)
    total = rest + sum(sizes[name][bits] for name, bits in chosen.items())
    counts = {bits: sum(b == bits for b in chosen.values()) for bits in step.candidates}
    what = ", ".join(f"{count} layers at {bits} bit" for bits, count in counts.items() if count)
    line = {
        "layer": "",
        "what": f"bits by sensitivity under {limit / 1e6:.4g} MB: {what}; {total / 1e6:.3f} MB in all",
        "bytes": total,
        "predicted_error": sum(errors[name][bits] for name, bits in chosen.items()),
    }
    return {**chosen, **fixed}, errors, line


def _limit(model: nn.Module, step: Pack) -> tuple[str, int]:
    """The budget as it was given, and its bytes."""
    if step.budget_mb is not None:
        return f"budget_mb is {step.budget_mb:g}", int(step.budget_mb * 1e6)
    assert step.budget_share is not None
    whole = float16_bytes(model)
    return f"budget_share is {step.budget_share:g} of {whole / 1e6:.3f} MB in FP16", int(step.budget_share * whole)


def _measured(
    model: nn.Module, step: Pack, names: list[str], batches: Iterable[tuple[Tensor, ...]], context: Context
) -> Errors:
    """Sensitivities, each layer's kept in the step's folder as soon as it is there, so that a kill loses only one."""
    path = context.folder / "sensitivity.json" if context.folder is not None else None
    first = next(iter(batches))
    probe = [float(y.double().square().sum()) for y in outputs(model, first)]
    key = {"step": asdict(step), "seed": context.seed, "preset": context.preset, "probe": probe}
    done = read_errors(path, key) if path is not None and context.resume else {}
    gathered: Errors = dict(done)
    with progress("sensitivity", len(names)) as bar:

        def keep(name: str, row: dict[int, float]) -> None:
            gathered[name] = row
            if path is not None and name not in done:
                write_errors(path, key, gathered)
            bar.advance(name)

        rounding: Literal["nearest", "mse"] = "nearest" if step.rounding == "nearest" else "mse"
        return bit_errors(model, names, step.candidates, step.group_size, [first], rounding, done=done, on_layer=keep)


def _pack(
    model: nn.Module, step: Pack, bits: Mapping[str, int], batches: Iterable[tuple[Tensor, ...]]
) -> list[dict[str, Any]]:
    """Replace the layers in place; the lines of the trace in the model's order."""
    places = _places(model)
    rows: dict[str, dict[str, Any]] = {}
    with progress("packing", len(bits)) as bar:
        for names in _rounds(model, step, list(bits), batches):
            moments = _gather(model, step, names, batches) if step.needs_moments else {}
            for name in names:
                rows[name] = _pack_layer(model, step, name, bits[name], moments.pop(name, None), places)
                bar.advance(name)
    return [rows[name] for name in bits]


def _pack_layer(
    model: nn.Module, step: Pack, name: str, bits: int, moments: Moments | None, places: _Places
) -> dict[str, Any]:
    """Replace one layer; its line of the trace."""
    layer = model.get_submodule(name)
    assert isinstance(layer, FloatLayer)
    new, how = _packed(layer, step, name, bits, moments)
    weight, length, size = layer.weight.detach(), layer.weight[0].numel(), step.group_size
    with one_thread():
        lost = new.dequantized(torch.float32).neg_().add_(weight)
        signal, noise = float(torch.linalg.vector_norm(weight.float())), float(torch.linalg.vector_norm(lost))
    if step.bias_correction and moments is not None and moments.count:
        if isinstance(new, PackedEmbedding) or new.bias is None:
            how += "; no bias to correct"
        else:
            shift = mean_error(lost, moments).to(new.bias)
            new.bias = nn.Parameter(new.bias.detach() + shift, requires_grad=new.bias.requires_grad)
            how += "; bias corrected"
    last = f", the last of {length % size}" if length % size else ""
    groups = f"one group of {length}" if length < size else f"groups of {size}{last}"
    row: dict[str, Any] = {"layer": name, "what": f"weight {bits} bit in {groups}, FP16 scales; {how}"}
    row |= {"bits": bits, "group_size": size, "bytes_before": weight.nbytes, "bytes_after": new.weight_bytes}
    if signal and noise:
        row["weight_sqnr"] = round(20 * math.log10(signal / noise), 2)
    _replace(places, layer, new)
    return row


def _packed(layer: FloatLayer, step: Pack, name: str, bits: int, moments: Moments | None) -> tuple[PackedLayer, str]:
    """The packed layer, and how its weight was rounded."""
    size = step.group_size
    if step.rounding != "compensated":
        how = "nearest" if step.rounding == "nearest" else "least squared error"
        return pack_module(layer, bits, size, step.rounding, name=name), how
    why = "it is an embedding" if moments is None else "no calibration input reached it"
    if moments is not None and moments.count:
        try:
            # By falling input is better for linear layers, whose inputs differ much in size, and worse for patches.
            order = isinstance(layer, nn.Linear)
            integers, scale = compensate(layer.weight, moments, bits, act_order=order, layer=name)
        except ArithmeticError as error:
            why = str(error)
        else:
            parts = len(blocks(layer.weight[0].numel(), size))
            how = f"compensated in {parts} blocks" if parts > 1 else "compensated"
            return pack_module(layer, bits, size, name=name, integers=integers, scale=scale), how
    return pack_module(layer, bits, size, "mse", name=name), f"not compensated, since {why}: least squared error"


def _rounds(
    model: nn.Module, step: Pack, names: list[str], batches: Iterable[tuple[Tensor, ...]]
) -> Iterator[list[str]]:
    """The layers to pack after one pass over the calibration inputs: all at once, or as many as the moments allow.

    In the order in which the model calls them, so that a later round sees the errors of the earlier ones.
    """
    if step.rounding != "compensated":
        yield names
        return
    called: dict[str, None] = {}

    def see(name: str) -> Callable[..., None]:
        return lambda module, args: called.setdefault(name)

    with _hooked(model, {name: see(name) for name in names}), torch.no_grad():
        model(*next(iter(batches)))
    together: list[str] = []
    taken = 0
    for name in [*called, *(name for name in names if name not in called)]:
        layer = model.get_submodule(name)
        more = 0 if isinstance(layer, nn.Embedding) else moment_bytes(layer, step.group_size)  # type: ignore[arg-type]
        if together and taken + more > MOMENTS_AT_ONCE:
            yield together
            together, taken = [], 0
        together.append(name)
        taken += more
    yield together


def _gather(
    model: nn.Module, step: Pack, names: Iterable[str], batches: Iterable[tuple[Tensor, ...]]
) -> dict[str, Moments]:
    """The moments of the inputs of these layers, those of embeddings left out."""
    moments: dict[str, Moments] = {}
    for name in names:
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Linear | nn.Conv2d):
            moments[name] = Moments(layer, step.group_size, step.rounding == "compensated")

    def see(name: str) -> Callable[..., None]:
        return lambda module, args: moments[name](args[0])

    with _hooked(model, {name: see(name) for name in moments}), torch.no_grad():
        for batch in batches:
            model(*batch)
    return moments


@contextmanager
def _hooked(model: nn.Module, hooks: Mapping[str, Callable[..., None]]) -> Iterator[None]:
    handles_ = [model.get_submodule(name).register_forward_pre_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles_:
            handle.remove()


def packed_bytes(weight: Tensor, bits: int, group_size: int) -> int:
    """Bytes of a weight (out, ...) packed at `bits`, with its scales; 16 means FP16."""
    if bits == FLOAT_BITS:
        return 2 * weight.numel()
    length = weight[0].numel()
    return weight.shape[0] * (row_bytes(length, bits) + 2 * group_count(length, group_size))


def float16_bytes(model: nn.Module) -> int:
    """Bytes of everything that a model's file holds, floats in FP16, a shared tensor once."""
    held = {id(value): value for value in model.state_dict(keep_vars=True).values()}
    return sum(2 * v.numel() if v.is_floating_point() else v.nbytes for v in held.values())


def _places(model: nn.Module) -> _Places:
    """Where each module stands in the tree: {id: [(parent, name)]}."""
    places: _Places = {}
    for parent in model.modules():
        for child, module in parent._modules.items():
            if module is not None:
                places.setdefault(id(module), []).append((parent, child))
    return places


def _replace(places: _Places, old: nn.Module, new: nn.Module) -> None:
    for parent, child in places.pop(id(old)):
        setattr(parent, child, new)
