"""One traced run of a model: multiply-accumulates, traffic and lifetimes of its tensors, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from core.kit import InputError

Matrix = (nn.modules.conv._ConvNd, nn.Linear)
"""Layers with one weight matrix; subclasses, such as quantized wrappers, count as the layer they wrap."""

WHOLE = "model"
"""The name of the only layer of a model that is itself one layer."""

# Layers that are looked at as a whole even where they own submodules (a wrapper's quantizers, an output projection).
_WHOLE = (*Matrix, nn.MultiheadAttention, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RNNBase)
_aten = torch.ops.aten


@dataclass(frozen=True)
class LayerProfile:
    """One run of one layer.

    `kind` is the torch class ("Conv2d") or, for arithmetic outside a layer, the operator ("matmul").
    `input_elements` counts the activations read, `weight_elements` the weights read. `fused` is true
    for element-wise work on one tensor, which runtimes do while the layer before it writes. A layer
    that runs twice is listed twice; `groups` are those of a convolution.
    """

    name: str
    kind: str
    parameters: int
    weight_elements: int
    macs: int
    output_shape: tuple[int, ...]
    input_elements: int
    output_elements: int
    channels: tuple[int, int] | None = None
    groups: int = 1
    fused: bool = False


@dataclass
class Buffer:
    """A block of activations: live from step `born` to step `dies`; `itemsize` is None for real numbers."""

    producer: str
    elements: int
    itemsize: int | None
    born: int
    dies: int
    alias: int | None = None


@dataclass(frozen=True)
class Run:
    """All that a traced run showed: the layers, and the buffers over the steps named in `steps`."""

    layers: list[LayerProfile]
    buffers: list[Buffer]
    steps: list[str]


def profile(model: nn.Module, inputs: Sequence[Tensor]) -> list[LayerProfile]:
    """The layers of `model` in the order they run for `inputs` (positional), arithmetic outside layers included.

    The multiply-accumulates of all entries add up to half of what torch's `FlopCounterMode` counts, plus
    the operators it has no formula for (CPU flash attention, matrix-vector products, recurrent layers).
    """
    return trace(model, inputs).layers


_Key = tuple[int, tuple[tuple[tuple[int, ...], torch.dtype], ...]]
_REMEMBERED: ContextVar[dict[_Key, tuple[nn.Module, Run]] | None] = ContextVar("remembered", default=None)


@contextmanager
def remembered() -> Iterator[None]:
    """Within it a model is run once for inputs of the same shapes, however often it is looked at.

    For models that do not change meanwhile: a run of one that is large takes minutes.
    """
    token = _REMEMBERED.set({})
    try:
        yield
    finally:
        _REMEMBERED.reset(token)


def trace(model: nn.Module, inputs: Sequence[Tensor]) -> Run:
    """Run `model` once in eval mode without gradients and return what happened; the model is left as it was."""
    known = _REMEMBERED.get()
    key = (id(model), tuple((tuple(t.shape), t.dtype) for t in inputs))
    if known is not None and key in known:
        return known[key][1]
    tracer = _Tracer(model, inputs)
    with _quiet(model), tracer.watching(model), tracer:
        outputs = model(*inputs)
    found = tracer.finish(outputs)
    if known is not None:
        known[key] = model, found  # with the model, so that its identity is not used again
    return found


@dataclass
class _Op:
    """A non-view operator: identities of the activation storages it reads and of those it makes."""

    name: str
    reads: dict[int, int]
    makes: list[tuple[int, Tensor | None]]
    macs: int
    pointwise: bool
    shape: tuple[int, ...]


@dataclass
class _Frame:
    """A module that is running."""

    name: str
    module: nn.Module
    whole: bool
    ops: list[_Op] = field(default_factory=list)


class _Tracer(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and keeping the compiler away would import it, which takes seconds."""
        return False

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.run = Run([], [], [])
        self._stack: list[_Frame] = []
        self._counts: dict[tuple[str, str], int] = {}
        self._buffer_of: dict[int, int] = {}  # storage identity -> index into run.buffers
        self._refs: list[StorageWeakRef] = []  # holding these keeps identities from being used again
        self._known: dict[int, int] = {}  # storages of activations -> elements
        self._constant = {self._id(t) for t in (*model.parameters(), *model.buffers())}
        self.run.steps.append("input")
        self._given = set()
        for tensor in inputs:
            self._given.add(self._make("input", tensor, 0))

    def _id(self, tensor: Tensor) -> int:
        ref = StorageWeakRef(tensor.untyped_storage())
        self._refs.append(ref)
        return int(ref.cdata)

    def _make(self, producer: str, tensor: Tensor, step: int) -> int:
        key = self._id(tensor)
        if key not in self._buffer_of:
            itemsize = None if tensor.is_floating_point() else tensor.element_size()
            elements = tensor.untyped_storage().nbytes() // tensor.element_size()
            self._buffer_of[key] = len(self.run.buffers)
            self.run.buffers.append(Buffer(producer, elements, itemsize, step, step))
            self._known[key] = elements
        return key

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Hooks that tell which module runs, on every module that is not inside a layer seen as a whole."""
        hooks = []
        for name, module, whole in _outer_modules(model):
            hooks.append(module.register_forward_pre_hook(self._enter(name, whole)))
            hooks.append(module.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, name: str, whole: bool) -> Callable[[nn.Module, Any], None]:
        return lambda module, _: self._stack.append(_Frame(name, module, whole))

    def _leave(self, module: nn.Module, _: Any, output: Any) -> None:
        frame = self._stack.pop()
        if frame.whole:
            self._layer(frame, _tensors(output))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        results = _tensors(out)
        if func.is_view or not results:
            return out
        reads: dict[int, int] = {}
        for tensor in _tensors((args, kwargs)):
            key = self._id(tensor)
            if key not in self._constant:
                reads[key] = max(reads.get(key, 0), tensor.numel())
        fresh = [(self._id(t), t) for t in results]
        moved_only = not func._schema.is_mutable and all(k in reads for k, _ in fresh)  # a view by another name
        if moved_only or not self._stack or all(k in self._constant for k, _ in fresh):
            return out
        frame = self._stack[-1]
        makes: list[tuple[int, Tensor | None]] = [(k, t) for k, t in fresh if t.numel() and k not in self._constant]
        name = str(func._overloadpacket).removeprefix("aten.").strip("_")
        op = _Op(
            name, reads, makes, operator_macs(func, args, kwargs, out), _is_pointwise(func), tuple(results[0].shape)
        )
        if frame.whole:
            # Only the shapes of what stays inside a layer matter, unless it turns out to be worth expanding.
            frame.ops.append(op)
        else:
            self._functional(op, frame.name)
        return out

    def _functional(self, op: _Op, path: str) -> None:
        """Arithmetic outside a layer becomes an entry of its own, named after its module and its operator."""
        count = self._counts[path, op.name] = self._counts.get((path, op.name), 0) + 1
        name = ".".join(p for p in (path, op.name if count == 1 else f"{op.name}_{count}") if p)
        read = sum(op.reads[k] for k in op.reads if k in self._known)
        written = sum(t.numel() for _, t in op.makes if t is not None)
        sources = [k for k in op.reads if k in self._known]
        self._step(name, op)
        if sources and op.makes:
            fused = op.pointwise and len(sources) == 1
            kind = {"mm": "matmul", "bmm": "matmul", "addmm": "matmul", "baddbmm": "matmul"}.get(op.name, op.name)
            self.run.layers.append(LayerProfile(name, kind, 0, 0, op.macs, op.shape, read, written, fused=fused))

    def _layer(self, frame: _Frame, outputs: list[Tensor]) -> None:
        """A whole layer: one step, or the steps inside it where it is more than one operator on a device."""
        module = frame.module
        reads: dict[int, int] = {}
        for op in frame.ops:
            for key in (k for k in op.reads if k in self._known):
                reads[key] = max(reads.get(key, 0), op.reads[key])
        fresh = {self._id(t): t for t in outputs}
        made = [(k, t) for k, t in fresh.items() if k not in self._known and k not in self._constant]
        # What reads no activation prepares weights or room; it does not hinder working in place.
        pointwise = all(op.pointwise for op in frame.ops if op.reads)
        macs = sum(op.macs for op in frame.ops)
        if not reads and not made:
            return  # nothing but views: dropout in eval mode, identity, flatten
        shape = tuple(outputs[0].shape) if outputs else ()
        loose = _torch_class(module) is None and not pointwise  # a user's own function with room of its own
        if sum(op.macs > 0 for op in frame.ops) > 1 or loose:
            for op in frame.ops:
                self._step(frame.name, op)
        else:
            self._step(frame.name, _Op(frame.name, reads, list(made), macs, pointwise, shape))
        weights = _weight_elements(module)
        channels = _channels(module)
        self.run.layers.append(
            LayerProfile(
                frame.name,
                _torch_class(module) or type(module).__name__,
                sum(shape.numel() for shape in _own_shapes(module)),
                weights,
                macs,
                shape,
                sum(reads.values()),
                sum(t.numel() for t in outputs),
                channels,
                int(getattr(module, "groups", 1)) if isinstance(module, nn.modules.conv._ConvNd) else 1,
                pointwise and len(reads) == 1,
            )
        )

    def _step(self, name: str, op: _Op) -> None:
        step = len(self.run.steps)
        self.run.steps.append(name)
        for key in op.reads:
            if key in self._buffer_of:
                self.run.buffers[self._buffer_of[key]].dies = step
        for key, tensor in op.makes:
            known = key in self._buffer_of
            if tensor is not None:
                self._make(name, tensor, step)
            if known:
                self.run.buffers[self._buffer_of[key]].dies = step
        op.makes = [(k, None) for k, _ in op.makes]  # let the tensors go: a large model must not be kept whole
        if op.pointwise:
            self._share(op, step)

    def _share(self, op: _Op, step: int) -> None:
        """Remember that element-wise work may write over its input; whether it may is known when the run ends."""
        for key, _ in op.makes:
            made = self.run.buffers[self._buffer_of[key]]
            if made.born != step or made.alias is not None:
                continue
            for source in (k for k in op.reads if k in self._buffer_of and k not in self._given):
                index = self._buffer_of[source]
                if index != self._buffer_of[key] and self.run.buffers[index].elements == made.elements:
                    made.alias = index
                    break

    def finish(self, outputs: Any) -> Run:
        last = len(self.run.steps)
        for tensor in _tensors(outputs):
            if (key := self._id(tensor)) in self._buffer_of:
                self.run.buffers[self._buffer_of[key]].dies = last
        for made in self.run.buffers:
            if made.dies == made.born and made.born > 0:
                made.elements = 0  # nobody reads it (the indices of a max pooling): a runtime does not keep it
            if made.alias is not None and self.run.buffers[made.alias].dies > made.born:
                made.alias = None  # the input is read again later, or is an output
        self.run.steps.append("output")
        return self.run


def _tensors(nested: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples, dicts and dataclasses."""
    found = []
    for leaf in tree_leaves(nested):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found += _tensors([getattr(leaf, f.name) for f in fields(leaf)])
    return found


def _outer_modules(model: nn.Module) -> list[tuple[str, nn.Module, bool]]:
    """(name, module, whole) of every module that is not inside a whole one."""
    found: list[tuple[str, nn.Module, bool]] = []

    def walk(name: str, module: nn.Module) -> None:
        children = dict(module.named_children())
        whole = isinstance(module, _WHOLE) or not children
        found.append((name or (WHOLE if whole else ""), module, whole))
        if not whole:
            for child, sub in children.items():
                walk(f"{name}.{child}" if name else child, sub)

    walk("", model)
    # A module under two names runs under the first one; hooking it twice would enter it twice.
    unique: dict[int, tuple[str, nn.Module, bool]] = {}
    for entry in found:
        unique.setdefault(id(entry[1]), entry)
    return list(unique.values())


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and no fused transformer kernels (they hide their matrix products)."""
    modes = [(m, m.training) for m in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes:
            module.training = mode


def operator_macs(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Multiply-accumulates of one call of an operator, as a dispatch mode sees it; 0 where there are none."""
    from torch.utils.flop_counter import flop_registry  # brings triton, 70 MB that running an artifact has no use for

    packet = func._overloadpacket
    if packet in flop_registry:
        flops: int = flop_registry[packet](*args, **kwargs, out_val=out)
        return flops // 2
    if packet == _aten._scaled_dot_product_flash_attention_for_cpu:
        query, key, value = (t.shape for t in args[:3])
        return math.prod(query[:-2]) * query[-2] * key[-2] * (query[-1] + value[-1])
    if packet == _aten.mv:
        return int(args[0].numel())
    if packet == _aten.addmv:
        return int(args[1].numel())
    if packet in (_aten.dot, _aten.vdot):
        return int(args[0].numel())
    if packet == _aten.mkldnn_rnn_layer:
        # Both weight matrices meet every time step of every sequence; the sequence is (time, batch, features).
        return int(math.prod(args[0].shape[:2]) * (args[1].numel() + args[2].numel()))
    return 0


def _is_pointwise(func: Any) -> bool:
    packet = func._overloadpacket
    name = str(packet)
    return torch.Tag.pointwise in func.tags or packet == _aten.native_batch_norm or "quantize" in name


def _torch_class(module: nn.Module) -> str | None:
    """The torch layer that a module is or extends, so that a quantized Conv2d is a Conv2d; None for others."""
    for cls in type(module).__mro__:
        if cls.__module__.startswith("torch.nn.modules") and not cls.__name__.startswith("_") and cls is not nn.Module:
            return cls.__name__
    return None


def _own_parameters(module: nn.Module) -> list[Tensor]:
    if isinstance(module, Matrix):
        packed = getattr(module, "weight_shape", None)  # whose weight would be expanded to be seen
        weight = torch.empty(packed, device="meta") if packed is not None else module.weight
        return [t for t in (weight, module.bias) if t is not None]
    return list(module.parameters())


def _weight_elements(module: nn.Module) -> int:
    return sum(shape.numel() for shape in _own_shapes(module) if len(shape) >= 2)


def _own_shapes(module: nn.Module) -> list[torch.Size]:
    """The shapes of `_own_parameters`, without expanding a weight that is packed."""
    packed = getattr(module, "weight_shape", None)
    if not isinstance(module, Matrix) or packed is None:
        return [p.shape for p in _own_parameters(module)]
    return [packed] if module.bias is None else [packed, module.bias.shape]


def _channels(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.in_channels, module.out_channels
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return None


def parameters_of(model: nn.Module) -> list[tuple[str, Tensor, bool]]:
    """(layer, tensor, is a weight matrix) of every parameter, each once.

    Of a convolution or linear layer only `weight` and `bias` count: what else a wrapper holds belongs to its
    quantizers. Raises InputError for a parameter that is not materialized yet.
    """
    found: list[tuple[str, Tensor, bool]] = []
    seen: set[int] = set()
    for name, module, whole in _outer_modules(model):
        tensors = _own_parameters(module) if whole else list(module.parameters(recurse=False))
        for tensor in tensors:
            if isinstance(tensor, nn.parameter.UninitializedParameter):
                raise InputError(f"layer {name}: its parameters have no shape yet; run the model once first")
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found.append((name, tensor, tensor.dim() >= 2))
    return found
