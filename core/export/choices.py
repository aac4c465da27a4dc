"""Where a network chooses: the best k of many, which a small change of the scores may choose otherwise.

Two runs that round differently then give their results in another order, or of other candidates with equal scores,
and no difference of outputs says whether they agree. Parity of rounded models is therefore told in two parts: the
scores of what was chosen must agree, and so must everything else when torch is given the runtime's choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from core.export.layers import Layers


@dataclass(frozen=True)
class Choice:
    """What one TopK put out: the scores, best first, and their places."""

    layer: str
    values: Tensor
    indices: Tensor


class Choosing(TorchFunctionMode):
    """Inside it `topk` is watched (`seen`: its own results) and gives the places in `given` instead, in their order."""

    def __init__(self, given: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self._given = list(given)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") != "topk":
            return found
        number = len(self.seen)
        self.seen.append((found[0].detach().clone(), found[1].detach().clone()))
        if number >= len(self._given):
            return found
        places = self._given[number]
        if places.shape != found[1].shape:
            raise RuntimeError(f"topk {number} gives places {tuple(found[1].shape)}, the runtime {tuple(places.shape)}")
        dim = args[2] if len(args) > 2 else (kwargs or {}).get("dim", -1)
        scores: Tensor = args[0]
        return torch.return_types.topk((scores.gather(dim, places), places))


def top_k(model: Any) -> list[Any]:
    """The TopK nodes of an `onnx.ModelProto`, in the order of execution, every output of them named."""
    nodes = [node for node in model.graph.node if node.op_type == "TopK"]
    for number, node in enumerate(nodes):
        for place, what in enumerate(("values", "indices")):
            if not node.output[place]:
                node.output[place] = f"top_k_{number}_{what}"
    return nodes


def choices(model: Any, layers: Layers, inputs: Sequence[Tensor], runtime: str, work: Path) -> list[Choice]:
    """What every TopK chooses in a runtime: a copy of the model with these as further outputs is run in `work`.

    The copy is written as the model itself is: OpenVINO rounds otherwise in an ONNX file than in the IR it makes of it.
    """
    import onnx

    from core.export import openvino
    from core.export.artifact import load_module
    from core.export.onnx import save_onnx

    nodes = top_k(model)
    if not nodes:
        return []
    already = len(model.graph.output)
    path = work / "choices.onnx"
    here = {o.name for o in model.graph.output}
    wanted = [name for node in nodes for name in node.output[:2] if name not in here]
    model.graph.output.extend([onnx.ValueInfoProto(name=name) for name in wanted])
    try:
        save_onnx(model, path, check=False)
        names = [o.name for o in model.graph.output]
    finally:
        del model.graph.output[already:]
    if runtime == "openvino":
        openvino.save_ir(path, path.with_suffix(".xml"))
        path = path.with_suffix(".xml")
    found = dict(zip(names, load_module(runtime, path, None, as_tuple=True)(*inputs), strict=True))
    for left in work.glob("choices.*"):
        left.unlink()
    return [Choice(layers.layer(n), found[n.output[0]], found[n.output[1]].long()) for n in nodes]
