"""Recovery: the step Recover, which trains a low-rank term beside each packed layer until it makes good what was lost.

A LoRA of peft (Hu et al., "LoRA", 2021) learns the outputs of the uncompressed model while the packed weights stay as
they are, in the manner of QLoRA (Dettmers et al., 2023). Its matrices then move into the layers, in FP16.
"""

from __future__ import annotations

import copy
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from core.compress import Outcome, Skipped, handles, history, replay
from core.kit import Context, InputError, Step
from core.quantization.packed import PackedConv2d, PackedLayer, PackedLinear, no_low_rank, packed_layers
from core.train import Schedule, fit
from core.weights import load_weights

CHECKED = 128
"""Samples of the validation split on which the error is told."""
_ADAPTER = "recover"
_Inputs = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Recover(Step):
    """Train a low-rank term of `rank` for each packed layer whose name fits one of `layers`, by distillation.

    The loss is the squared error of the model's outputs, relative to the teacher's mean square, on `samples` of the
    training split (0: all). `teacher` is the "original", or the model as it was before it was "unpacked", read from the
    checkpoints of the run: for recipes whose earlier steps change what the outputs mean. A term costs 2 * rank *
    (outputs + kernel) bytes a layer. Where training does not lower the error on the validation split, nothing is kept.
    """

    rank: int = 8
    epochs: int = 4
    lr: float = 1e-3
    batch_size: int = 8
    layers: tuple[str, ...] = ("*",)
    samples: int = 0
    teacher: Literal["original", "unpacked"] = "original"

    def __post_init__(self) -> None:
        for field in ("rank", "epochs", "batch_size"):
            if getattr(self, field) < 1:
                raise InputError(f"Recover.{field} is {getattr(self, field)}; expected at least 1")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise InputError(f"Recover.lr is {self.lr}; expected a positive number such as 0.001")
        if self.samples < 0:
            raise InputError(f"Recover.samples is {self.samples}; expected 0 (all) or more")
        if not self.layers:
            raise InputError('Recover.layers is empty; expected patterns such as ("unet.*",)')
        if self.teacher not in ("original", "unpacked"):
            raise InputError(f"Recover.teacher is {self.teacher!r}; known are original, unpacked")


def restore(model: nn.Module, step: Recover, structure: dict[str, Any]) -> nn.Module:
    """Empty low-rank terms again, for values to be loaded into."""
    for name, rank in structure["layers"].items():
        layer = model.get_submodule(name)
        assert isinstance(layer, PackedLayer)
        layer.hold_low_rank(rank)
    return model


@handles(Recover, restore=restore)
def recover(model: nn.Module, step: Recover, context: Context) -> Outcome:
    """Train the terms and move them into the layers; everything else in the model stays to the byte."""
    model.eval()
    kit, teacher = context.kit, _teacher(step, context)
    samples = _samples(context, step)
    checked = kit.dataset(context.data, "val", context.preset)
    checked = [checked[i] for i in range(min(CHECKED, len(checked)))]
    first = next(iter(kit.batches(samples, step.batch_size, train=False)), None)
    if first is None or not checked:
        raise InputError("Recover: the training or the validation split holds no samples; give a folder that has some")
    names, skipped = _chosen(model, step, kit.inputs(first))
    layers = packed_layers(model)
    with _at_work(model, teacher) as device:
        validation = _Validation([kit.inputs(b) for b in kit.batches(checked, step.batch_size, train=False)], device)
        validation.ask(teacher)
        before = validation.error(model)
        with _adapted(model, names, step.rank, context.seed) as terms:
            trained = fit(
                terms,
                lambda epoch: kit.batches(samples, step.batch_size, train=True, seed=context.seed + epoch),
                lambda net, batch: _loss(net, teacher, kit.inputs(batch)),
                Schedule(step.epochs, step.batch_size, step.lr, seed=context.seed),
                steps_per_epoch=math.ceil(len(samples) / step.batch_size),
                folder=context.folder / "recover" if context.folder is not None else None,
                resume=context.resume,
                evaluate=lambda net: -validation.error(net),
                label="recover",
            ).model
            assert isinstance(trained, _Terms)
            found = {name: trained.halves(name) for name in names}
        held = {name: (layers[name].low_rank_a, layers[name].low_rank_b) for name in names}
        for name, (a, b) in found.items():
            layers[name].add_low_rank(a.flatten(1), b.flatten(1))
        after = validation.error(model)
        told = f"error of the outputs {before:.4g} before, {after:.4g} after, on {len(checked)} samples of validation"
        line: dict[str, Any] = {"layer": "", "error_before": before, "error_after": after}
        if not after < before:
            for name, (old_a, old_b) in held.items():
                layers[name].low_rank_a, layers[name].low_rank_b = old_a, old_b
            what = f"trained for {step.epochs} epochs in vain, so no low-rank term was kept: {told}"
            return Outcome(model, [{**line, "what": what}], skipped, {"layers": {}})
    rows: list[dict[str, Any]] = [
        {
            "layer": name,
            "what": f"low-rank term of rank {step.rank} in FP16 beside the packed weight",
            "bytes": 2 * step.rank * (layers[name].weight_shape[0] + layers[name].weight_shape[1:].numel()),
        }
        for name in names
    ]
    what = f"low-rank terms for {len(names)} layers, trained for {step.epochs} epochs on {len(samples)} samples; {told}"
    line |= {"what": what, "bytes": sum(row["bytes"] for row in rows)}
    return Outcome(model, [line, *rows], skipped, {"layers": {name: layers[name].rank for name in names}})


class _Terms(nn.Module):
    """The matrices that are trained, apart from the model that uses them.

    So a checkpoint holds nothing else, and the model stays in eval mode, as whose outputs the teacher's are learnt.
    """

    def __init__(self, model: nn.Module, adapters: dict[str, Any]) -> None:
        super().__init__()
        self._unowned = (model,)
        self.matrices = nn.ParameterDict()
        for name, adapter in adapters.items():
            for side, matrix in (("A", adapter.lora_A), ("B", adapter.lora_B)):
                self.matrices[_key(name, side)] = matrix[_ADAPTER].weight

    def forward(self, *inputs: Tensor) -> Any:
        return self._unowned[0](*inputs)

    def halves(self, name: str) -> tuple[Tensor, Tensor]:
        """A and B of a layer, copied."""
        return self.matrices[_key(name, "A")].detach().clone(), self.matrices[_key(name, "B")].detach().clone()


def _key(name: str, side: str) -> str:
    return f"{name}.{side}".replace(".", "/")


class _Validation:
    """The error of a model's outputs on batches of inputs, against those of the teacher, which is asked once."""

    def __init__(self, batches: Sequence[_Inputs], device: torch.device) -> None:
        self._batches = [tuple(x.to(device) for x in batch) for batch in batches]
        self._told: list[list[Tensor]] = []

    @torch.no_grad()
    def ask(self, teacher: nn.Module) -> None:
        self._told = [_floats(teacher(*batch)) for batch in self._batches]

    @torch.no_grad()
    def error(self, model: nn.Module) -> float:
        """The squared error over the teacher's sum of squares, the mean of all outputs."""
        sums: dict[int, list[float]] = {}
        for batch, told in zip(self._batches, self._told, strict=True):
            for index, (y, right) in enumerate(_pairs(model(*batch), told)):
                off, whole = (float(t.double().square().sum()) for t in (y - right, right))
                row = sums.setdefault(index, [0.0, 0.0])
                row[0], row[1] = row[0] + off, row[1] + whole
        return sum(off / max(whole, 1e-30) for off, whole in sums.values()) / len(sums)


def _loss(net: nn.Module, teacher: nn.Module, inputs: _Inputs) -> Tensor:
    with torch.no_grad():
        told = _floats(teacher(*inputs))
    terms = [
        (y - right).square().mean() / right.square().mean().clamp_min(1e-30) for y, right in _pairs(net(*inputs), told)
    ]
    return torch.stack(terms).mean()


def _floats(result: Any) -> list[Tensor]:
    return [
        leaf.float() for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]


def _pairs(result: Any, told: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    ours = _floats(result)
    if not ours or [y.shape for y in ours] != [right.shape for right in told]:
        shapes = [[tuple(y.shape) for y in ys] for ys in (ours, told)]
        raise InputError(
            f"Recover: the model's outputs have shapes {shapes[0]}, its teacher's {shapes[1]}; where earlier steps "
            "change the outputs, set teacher to 'unpacked'"
        )
    return list(zip(ours, told, strict=True))


def _samples(context: Context, step: Recover) -> Sequence[Any]:
    samples = context.kit.dataset(context.data, "train", context.preset)
    if not step.samples or step.samples >= len(samples):
        return samples
    chosen = random.Random(context.seed).sample(range(len(samples)), step.samples)
    return [samples[i] for i in sorted(chosen)]


def _teacher(step: Recover, context: Context) -> nn.Module:
    """The original, or a copy of it as the steps before the first Pack of this run left it."""
    if step.teacher == "original":
        return context.original
    if context.folder is None:
        raise InputError(
            "Recover.teacher 'unpacked' is read from the checkpoints of the run; give compress a folder for them"
        )
    run, here = context.folder.parent, context.folder.name
    places = [path.parent for path in sorted(run.glob("*/step.json")) if path.parent.name < here]
    steps = history(run)[: len(places)]
    count = next((i for i, record in enumerate(steps) if record["step"]["step"] == "Pack"), None)
    if count is None:
        raise InputError("Recover.teacher 'unpacked': no step Pack before it in this recipe; put Pack first")
    if count == 0:
        return context.original
    teacher = replay(copy.deepcopy(context.original), steps[:count])
    load_weights(teacher, places[count - 1] / "model.safetensors")
    return teacher


def _chosen(model: nn.Module, step: Recover, inputs: _Inputs) -> tuple[list[str], list[Skipped]]:
    """The packed layers that get a term, and all others with the reason."""
    layers = packed_layers(model)
    if not layers:
        raise InputError("Recover: no layer of this model is packed; put Pack before it in the recipe")
    for pattern in step.layers:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise InputError(f"Recover.layers: pattern {pattern!r} fits no packed layer; correct or remove it")
    reached = _reached(model, layers, inputs)
    uses = Counter(id(child) for module in model.modules() for child in module._modules.values())
    names, skipped = [], []
    for name, layer in layers.items():
        if not any(fnmatchcase(name, pattern) for pattern in step.layers):
            why: str | None = "none of the patterns fits it"
        elif name not in reached:
            why = "the kit's inputs do not reach it"
        elif uses[id(layer)] != 1:
            why = "it stands in several places, or is the model itself"
        else:
            why = _unfit(layer, step.rank)
        if why is None:
            names.append(name)
        else:
            skipped.append(Skipped(name, f"no low-rank term: {why}"))
    if not names:
        raise InputError(f"Recover: no packed layer can get a low-rank term; of {skipped[0].layer!r}: {skipped[0].why}")
    return names, skipped


def _unfit(layer: PackedLayer, rank: int) -> str | None:
    """Why a layer gets no term of a rank, or None."""
    if (why := no_low_rank(layer)) is not None:
        return why
    if isinstance(layer, PackedConv2d) and (layer.padding_mode != "zeros" or set(layer.dilation) != {1}):
        return "peft's convolutions have neither dilation nor a padding other than zeros"
    rows, length = layer.weight_shape[0], layer.weight_shape[1:].numel()
    if rank * (rows + length) >= rows * length:
        return f"a term of rank {rank} would be no smaller than its weight in FP16"
    return None


@torch.no_grad()
def _reached(model: nn.Module, layers: dict[str, PackedLayer], inputs: _Inputs) -> set[str]:
    """The layers that a forward calls."""
    found: set[str] = set()
    hooks = [layer.register_forward_pre_hook(lambda *_, n=name: found.add(n)) for name, layer in layers.items()]
    try:
        model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@contextmanager
def _at_work(model: nn.Module, teacher: nn.Module) -> Iterator[torch.device]:
    """Model and teacher in eval mode on the device that trains; the teacher's modes and device are put back after."""
    from accelerate import PartialState

    device: torch.device = PartialState().device
    tensors: Iterable[Tensor] = (*teacher.parameters(), *teacher.buffers())
    home = next(iter(tensors)).device
    modes = {module: module.training for module in teacher.modules()}
    model.to(device)
    teacher.eval().to(device)
    try:
        yield device
    finally:
        teacher.to(home)
        for module, training in modes.items():
            module.training = training


@contextmanager
def _adapted(model: nn.Module, names: Sequence[str], rank: int, seed: int) -> Iterator[_Terms]:
    """Within it peft's LoRA, zero at the start, is on the layers and nothing else trains; after it all is as before."""
    from peft import LoraConfig, inject_adapter_in_model

    frozen = [(p, p.requires_grad) for p in model.parameters()]
    exactly = "|".join(re.escape(name) for name in names)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=exactly, lora_dropout=0.0)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model, _ADAPTER)
        adapters: dict[str, Any] = {name: model.get_submodule(name) for name in names}
        assert all(isinstance(adapter.base_layer, PackedLinear | PackedConv2d) for adapter in adapters.values())
        yield _Terms(model, adapters)
    finally:
        for name in names:
            parent, _, child = name.rpartition(".")
            layer = model.get_submodule(name)
            setattr(model.get_submodule(parent), child, getattr(layer, "base_layer", layer))
        if hasattr(model, "peft_config"):
            del model.peft_config
        for parameter, trains in frozen:
            parameter.requires_grad_(trains)
