"""N:M sparsity: of every m weights along the input channels only n are other than zero; the step `Sparsify`.

Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, whose tool (ASP) lays the pattern along the
input channels of linear layers and convolutions alike.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from core.compress import Outcome, Skipped, handles
from core.figures import Estimated, Figure
from core.hardware.profile import operator_macs
from core.hardware.targets import Target
from core.kit import Context, Graph, InputError, Step
from core.pruning.surgery import is_depthwise
from core.train import Schedule, fit

_CONV = nn.modules.conv._ConvNd


@dataclass(frozen=True)
class Sparsify(Step):
    """Zero all but the `n` largest of every `m` weights along the input channels of linear layers and Conv2d.

    `layers` and `skip` are name patterns (fnmatch): a layer that matches one of `layers` and none of `skip` is taken,
    unless its input channels are no multiple of `m` or it is depthwise. `importance` is "magnitude". With `epochs` the
    network is trained on the kit's loss while the zeros stay zeros. A later step that trains the weights freely
    (Distill, QAT, Prune with `finetune_epochs`) fills the zeros in again; Quantize keeps them.
    """

    n: int = 2
    m: int = 4
    layers: tuple[str, ...] = ("*",)
    skip: tuple[str, ...] = ()
    epochs: int = 0
    lr: float = 1e-4
    batch_size: int = 8
    importance: Literal["magnitude"] = "magnitude"

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise InputError(f"Sparsify.n: {self.n} of m {self.m}, expected 1 or more and less than m")
        if self.importance != "magnitude":
            raise InputError(f"Sparsify.importance: {self.importance!r}, expected 'magnitude'")
        for name, good, expected in (
            ("epochs", self.epochs >= 0, "0 or more"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
            ("lr", self.lr > 0, "more than 0"),
        ):
            if not good:
                raise InputError(f"Sparsify.{name}: {getattr(self, name)}, expected {expected}")


def nm_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """Where the n largest magnitudes of every m neighbours along axis 1 are: bool of weight's shape [out, in, ...].

    Of equal ones the first stay. Raises InputError where axis 1 is no multiple of m.
    """
    _divisible(weight, m)
    rows = weight.detach().abs().movedim(1, -1)
    blocks = rows.reshape(*rows.shape[:-1], -1, m)
    best = torch.argsort(blocks, dim=-1, descending=True, stable=True)[..., :n]
    mask = torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, best, True)
    return mask.reshape(rows.shape).movedim(-1, 1)


def check_pattern(weight: Tensor, n: int, m: int) -> bool:
    """Whether every m neighbours along axis 1 of a weight [out, in, ...] hold n numbers other than zero at the most.

    False where axis 1 is no multiple of m.
    """
    if weight.ndim < 2 or weight.shape[1] % m:
        return False
    rows = (weight.detach() != 0).movedim(1, -1)
    return bool((rows.reshape(-1, m).sum(1) <= n).all())


def _divisible(weight: Tensor, m: int) -> None:
    if weight.ndim < 2 or weight.shape[1] % m:
        raise InputError(f"weight of shape {tuple(weight.shape)}: axis 1 is no multiple of {m}; skip this layer")


@dataclass(frozen=True)
class _Weight:
    """The weight matrix of a layer: its name for patterns and the trace, where it is kept, and what hinders it."""

    layer: str
    owner: nn.Module
    attribute: str
    obstacle: str = ""

    @property
    def tensor(self) -> nn.Parameter:
        found = getattr(self.owner, self.attribute)
        assert isinstance(found, nn.Parameter)
        return found


def _weights(model: nn.Module, m: int) -> Iterator[_Weight]:
    """Every weight that a matrix product reads, a shared one under its first name alone."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        found: list[tuple[str, str, str]] = []
        if isinstance(module, nn.MultiheadAttention):
            inside = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
            found = [(f"{name}.{a}", a, "") for a in inside if getattr(module, a) is not None]
        elif isinstance(module, (_CONV, nn.Linear)):
            why = ""
            if is_depthwise(module):
                why = "depthwise: each sum runs over one input channel"
            elif not isinstance(module, (nn.Conv2d, nn.Linear)):
                why = f"{type(module).__name__}: no sparse kernels for it"
            found = [(name, "weight", why)]
        for label, attribute, why in found:
            tensor = getattr(module, attribute)
            if not isinstance(tensor, nn.Parameter) or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if not why and tensor.shape[1] % m:
                why = f"{tensor.shape[1]} input channels: not a multiple of {m}"
            yield _Weight(label, module, attribute, why)


@handles(Sparsify)
def sparsify(model: nn.Module, step: Sparsify, context: Context) -> Outcome:
    """Zero the smaller weights of each layer, and train the others if asked to; the modules stay what they are."""
    weights = list(_weights(model, step.m))
    for field, patterns in (("layers", step.layers), ("skip", step.skip)):
        for pattern in patterns:
            if not any(fnmatchcase(w.layer, pattern) for w in weights):
                raise InputError(f"Sparsify.{field}: {pattern!r} matches no layer; named like {_last(weights)}")
    chosen: list[_Weight] = []
    changed: list[dict[str, Any]] = []
    skipped: list[Skipped] = []
    for weight in weights:
        why = _reason(weight, step)
        if why:
            skipped.append(Skipped(weight.layer, why))
            continue
        chosen.append(weight)
    if not chosen:
        first = f"; first reason: {skipped[0].layer}: {skipped[0].why}" if skipped else ""
        raise InputError(f"Sparsify: no layer of {context.kit.name} can take {step.n}:{step.m}{first}")
    masks = [nm_mask(w.tensor, step.n, step.m) for w in chosen]
    for weight, mask in zip(chosen, masks, strict=True):
        size = weight.tensor.detach().abs().double()
        kept = float((size * mask).sum() / size.sum()) if size.sum() > 0 else 1.0
        changed.append({
            "layer": weight.layer,
            "what": f"{step.n}:{step.m} along {weight.tensor.shape[1]} inputs; {kept:.1%} of the magnitude kept",
            "kept_weights": step.n / step.m, "kept_magnitude": round(kept, 6),
        })  # fmt: skip
    _apply(chosen, masks)
    if step.epochs:
        model, losses = _recover(model, step, context, chosen, masks)
        what = f"trained for {step.epochs} epochs under the fixed masks; loss {losses[0]:.4g} -> {losses[-1]:.4g}"
        changed.append({"layer": "(model)", "what": what, "losses": losses})
    broken = [w.layer for w in chosen if not check_pattern(w.tensor, step.n, step.m)]
    if broken:
        raise RuntimeError(f"Sparsify: {broken[0]} does not hold {step.n}:{step.m}")
    return Outcome(model, changed, skipped)


def _reason(weight: _Weight, step: Sparsify) -> str:
    if not any(fnmatchcase(weight.layer, pattern) for pattern in step.layers):
        return "not among the patterns of layers"
    for pattern in step.skip:
        if fnmatchcase(weight.layer, pattern):
            return f"excluded by the pattern {pattern!r}"
    return weight.obstacle


def _last(weights: Sequence[_Weight]) -> str:
    return repr(weights[-1].layer) if weights else "nothing: the model has no matrix products"


@torch.no_grad()
def _apply(weights: Sequence[_Weight], masks: Sequence[Tensor]) -> None:
    for weight, mask in zip(weights, masks, strict=True):
        tensor = weight.tensor
        tensor.masked_fill_(~mask.to(tensor.device), 0)


def _recover(
    model: nn.Module, step: Sparsify, context: Context, weights: Sequence[_Weight], masks: Sequence[Tensor]
) -> tuple[nn.Module, list[float]]:
    """Train; before each batch what the optimizer moved away from zero goes back, so every loss is the sparse one's."""
    kit = context.kit
    samples = kit.dataset(context.data, "train", context.preset)

    def batches(epoch: int) -> Iterable[Any]:
        return kit.batches(samples, step.batch_size, train=True, seed=context.seed + epoch)

    def loss(net: nn.Module, batch: Any) -> Tensor:
        _apply(weights, masks)
        return kit.loss(net, batch)

    folder: Path | None = context.folder / "sparsify" if context.folder is not None else None
    trained = fit(
        model, batches, loss, Schedule(step.epochs, step.batch_size, step.lr, seed=context.seed),
        steps_per_epoch=math.ceil(len(samples) / step.batch_size), folder=folder, resume=context.resume,
        label=f"train under {step.n}:{step.m}",
    )  # fmt: skip
    _apply(weights, masks)
    return trained.model, [round(entry["loss"], 6) for entry in trained.history]


@dataclass(frozen=True)
class Product:
    """The matrix products with one weight ("" for those of activations with activations) and their cost."""

    weight: str
    operator: str
    macs: int
    sparse: bool


@dataclass(frozen=True)
class Utilization:
    """The matrix products of a run, and which of them have weights that hold the pattern n:m.

    Linear layers, convolutions and products of activations (attention) count. `left_out` counts the calls of sampling
    operators (grid_sample), whose interpolation is arithmetic but no matrix product.
    """

    n: int
    m: int
    products: tuple[Product, ...]
    left_out: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all matrix products."""
        return sum(p.macs for p in self.products)

    @property
    def share(self) -> float:
        """The share of them that runs under the pattern, 0 to 1."""
        return sum(p.macs for p in self.products if p.sparse) / self.macs if self.macs else 0.0


def sparse_utilization(
    model: nn.Module, what: Sequence[Tensor] | Sequence[Graph], n: int = 2, m: int = 4
) -> Utilization:
    """Count the matrix products of a forward pass on example inputs, or on those of every graph, in eval mode.

    The pattern is looked for in the very tensor that each product multiplies with, so a quantized model is judged by
    its quantized weights. Only the counting of torch's own operators and of deformable convolutions is known.
    """
    runs: list[tuple[nn.Module, tuple[Tensor, ...]]] = []
    loose: list[Tensor] = []
    for item in what:
        if isinstance(item, Graph):
            runs.append((item.module(model), tuple(item.inputs.values())))
        else:
            loose.append(item)
    if loose:
        runs.append((model, tuple(loose)))
    if not runs:
        raise InputError("sparse_utilization: neither inputs nor graphs given; give those of the kit's exports()")
    watch = _Products(model, n, m)
    for module, inputs in runs:
        with _quiet(module), watch:
            module(*inputs)
    merged: dict[tuple[str, str, bool], int] = {}
    for p in watch.products:
        key = p.weight, p.operator, p.sparse
        merged[key] = merged.get(key, 0) + p.macs
    return Utilization(n, m, tuple(Product(w, o, macs, s) for (w, o, s), macs in merged.items()), watch.left_out)


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients and without the fused kernels of attention, which hide their products."""
    modes = [(module, module.training) for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes:
            module.training = training


class _Products(TorchDispatchMode):
    """Notes every matrix product, and which operands come from weights alone."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and keeping the compiler away would import it, which takes seconds."""
        return False

    def __init__(self, model: nn.Module, n: int, m: int) -> None:
        super().__init__()
        self._n, self._m = n, m
        self.products: list[Product] = []
        self.left_out = 0
        # identity of a storage -> the weight it comes from; holding the tensors keeps identities from being used again
        self._names: dict[int, str] = {}
        self._held: list[Tensor] = []
        for name, tensor in (*model.named_buffers(remove_duplicate=False), *model.named_parameters()):
            self._know(tensor, name)

    def _know(self, tensor: Tensor, name: str) -> None:
        self._names[_identity(tensor)] = name
        self._held.append(tensor)

    def _name(self, tensor: Any) -> str | None:
        return self._names.get(_identity(tensor)) if isinstance(tensor, Tensor) else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operator = str(func._overloadpacket).rpartition(".")[2]
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        names = [self._name(t) for t in given]
        self.left_out += "grid_sampler" in operator
        if operator == "deform_conv2d":
            macs = made[0].numel() * math.prod(args[1].shape[1:])
        else:
            macs = operator_macs(func, args, kwargs, out)
        if macs:  # what a product gives is an activation, be it of constants
            self._note(operator, args, macs)
        elif given and all(name is not None for name in names):
            for tensor in made:
                if self._name(tensor) is None:
                    self._know(tensor, next(n for n in names if n is not None))
        elif not func.is_view:
            for tensor in made:  # activations written into a constant's place
                self._names.pop(_identity(tensor), None)
        return out

    def _note(self, operator: str, args: Any, macs: int) -> None:
        weight, seen = self._weight(operator, args)
        name = self._name(weight) or ""
        sparse = seen is not None and name != "" and check_pattern(seen, self._n, self._m)
        self.products.append(Product(name, operator, macs, sparse))

    def _weight(self, operator: str, args: Any) -> tuple[Tensor | None, Tensor | None]:
        """The weight of a product, and its view as [out, in, ...]; None where it has none, or in no such layout."""
        if operator == "deform_conv2d":
            return args[1], args[1]
        if "convolution" in operator:
            return args[1], None if len(args) > 6 and args[6] else args[1]
        first, second = args[1:3] if operator in ("addmm", "baddbmm") else args[:2]
        if self._name(second) is not None and second.ndim >= 2:
            turned = second.transpose(-1, -2)
            return second, turned.reshape(-1, turned.shape[-1])
        if self._name(first) is not None and first.ndim >= 2:
            return first, first.reshape(-1, first.shape[-1])
        return None, None


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def sparse_speedup(found: Utilization, target: Target) -> Figure:
    """An estimate: how many times as fast a target takes the matrix products as it would take them dense.

    Products under the pattern take n/m of their time where the target states the pattern, by Amdahl's law; 1 where it
    does not. Traffic and everything that is no matrix product are left out, so the whole network gains less.
    """
    pattern = f"{found.n}:{found.m}"
    stated = pattern in target.sparsity
    value = 1 / (1 - found.share * (1 - found.n / found.m)) if stated else 1.0
    says = f"{target.title} states {pattern}" if stated else f"{target.title} states no {pattern}: nothing is gained"
    return Figure(
        "sparse_speedup", value, "x",
        Estimated(
            "Amdahl's law over the multiply-accumulates of matrix products",
            (says, f"{found.share:.1%} of them run under the pattern, at {found.m / found.n:g} times the dense peak",
             "bounded by arithmetic alone: no traffic, no other operators, kernels for every shape"),
        ),
    )  # fmt: skip


def count_by_kind(found: Utilization) -> Counter[str]:
    """Multiply-accumulates under the pattern ("sparse"), with dense weights ("dense") and of activations alone."""
    counts: Counter[str] = Counter()
    for product in found.products:
        kind = "activations" if not product.weight else "sparse" if product.sparse else "dense"
        counts[kind] += product.macs
    return counts
