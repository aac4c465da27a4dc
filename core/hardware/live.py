"""The most bytes of tensors alive at once while a model runs, found by running it on the meta device: no data, no time.

Unlike `core.hardware.memory`, which packs the activations of an exported graph into an arena, this follows torch's own
eager execution: what its operators allocate, what the code keeps alive, and what convolutions copy on the way.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from core.kit import InputError

_aten = torch.ops.aten
_CONVOLUTIONS = (_aten.convolution.default, _aten._convolution.default)


@dataclass(frozen=True)
class LivePeak:
    """The most bytes alive at once, weights and inputs not counted, and the layer that ran then."""

    bytes: int
    at: str


def live_peak(model: nn.Module, run: Callable[[], Any]) -> LivePeak:
    """The peak of live bytes while `run()` works with `model`, both on the meta device.

    Counted are all tensors made on the way, temporaries of packed layers included, and the copies in its own layout
    that oneDNN makes of a convolution's input, weight and output. Attention is counted as torch's fused kernel runs
    it on a CPU, without the matrix of scores. Raises InputError for a model that is not on "meta".
    """
    tensors = [*model.parameters(), *model.buffers()]
    if real := next((t for t in tensors if t.device.type != "meta"), None):
        raise InputError(f"live_peak: a model on {real.device}; expected one on the meta device, which holds no data")
    tracker = _Tracker({_key(t) for t in tensors})
    with torch.no_grad(), _naming(model, tracker), _FusedAttention(), tracker:
        run()
    return LivePeak(tracker.peak, tracker.at)


class _Tracker(TorchDispatchMode):
    """Adds the storages that operators make, and takes them away when the last tensor on them is gone."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.at = ""
        self.layers: list[str] = []
        self._known = known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # a tensor made before the run began is not of the run; its storage stays alive through the run's caller
        self._known.update(_key(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor))
        output = func(*args, **kwargs)
        for value in tree_leaves(output):
            if isinstance(value, Tensor):
                self._hold(value)
        self._note(_workspace(args) if func in _CONVOLUTIONS else 0)
        return output

    def _hold(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.live += size
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def _note(self, beside: int) -> None:
        if self.live + beside > self.peak:
            self.peak, self.at = self.live + beside, self.layers[-1] if self.layers else ""


def _workspace(args: Any) -> int:
    """Bytes that oneDNN adds while a convolution runs: input and weight in its own layout; a 1x1 kernel needs neither.

    Measured on x86-64 with torch 2.14: the peak beside what was there is input + weight + output, to within 2 %.
    """
    if args[1].shape[2:].numel() == 1:
        return 0
    return sum(tensor.numel() * tensor.element_size() for tensor in args[:2])


class _FusedAttention(TorchFunctionMode):
    """Replaces attention by its result: on the meta device torch would make the matrix of scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, _, value = (*args, *kwargs.values())[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **kwargs)


@contextmanager
def _naming(model: nn.Module, tracker: _Tracker) -> Iterator[None]:
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda _, __, n=name: tracker.layers.append(n)))
        handles.append(module.register_forward_hook(lambda *_: tracker.layers.pop() and None))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _key(value: Tensor) -> int:
    return value.untyped_storage()._cdata
