"""Models that run in torch as they are: each variant is a folder that the model writes and its kit reads again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from core.export.artifact import Artifact, replacing, write_artifact
from core.export.parity import Criterion, ParityError, Reference, described, deviation
from core.hardware.host import processor
from core.kit import Graph, InputError, Kit
from core.quantization.packed import packed_layers

RUNTIME = "torch"
INDEX = "model_index.json"
"""The file of a variant's folder that stands for all of it in the manifest."""


@runtime_checkable
class Saves(Protocol):
    """A model that writes itself into a folder from which its kit's `model(folder)` reads it again."""

    def save(self, folder: Path) -> None:
        """Write the folder, packed layers packed, with a file `model_index.json` at its top."""
        ...


def version() -> str:
    """The version of torch."""
    return str(torch.__version__).split("+")[0]


def export_folders(
    models: Mapping[str, nn.Module],
    graphs: Iterable[Graph],
    target_name: str,
    out: Path | str,
    *,
    kit: Kit,
    meta: Mapping[str, Any] | None = None,
) -> Artifact:
    """Write every model ({precision: model}) as a folder of the artifact `out`, read it back, and compare.

    What is compared are the graphs' outputs on their example inputs: of a folder in FP32 to 1e-4 of the peak, of all
    others by SQNR (25 dB), since what is not packed is stored in FP16. Raises ParityError, and InputError for a model
    that cannot save itself; an older artifact in `out` then stays as it was.
    """
    graphs, out = tuple(graphs), Path(out)
    variants: dict[str, Any] = {}
    shapes: dict[str, Any] = {}
    with replacing(out) as stage:
        for precision, model in models.items():
            if not isinstance(model, Saves):
                raise InputError(f"export: {type(model).__name__} has no method save(folder), which torch folders need")
            model.save(stage / precision)
            again = kit.model(stage / precision)
            criterion = Criterion.of(precision, None)
            parity = {}
            for graph in graphs:
                reference = Reference.of(graph.module(model.eval()), tuple(graph.inputs.values()))
                parity[graph.name] = _compare(f"{precision}-{RUNTIME}", graph, reference, again, criterion)
                shapes[graph.name] = described(graph, reference)
            name = f"{precision}-{RUNTIME}"
            variants[name] = {
                "name": name,
                "precision": precision,
                "runtime": RUNTIME,
                "version": version(),
                "files": {g.name: f"{precision}/{INDEX}" for g in graphs},
                "audit": {"device": processor()[0], **_audit(again)},
                "parity": {"criterion": str(criterion), "tolerance": criterion.limit, "graphs": parity},
            }
        write_artifact(stage, kit=kit.name, target=target_name, meta=meta or {}, graphs=shapes, variants=variants)
    return Artifact.open(out)


def _compare(
    variant: str, graph: Graph, reference: Reference, again: nn.Module, criterion: Criterion
) -> dict[str, Any]:
    """The deviation of the model that was read back, as a parity record."""
    with torch.no_grad():
        found = graph.module(again)(*graph.inputs.values())
    outputs = [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
    apart = {n: deviation(a, b) for n, a, b in zip(graph.outputs, reference.outputs, outputs, strict=True)}
    for name, distance in apart.items():
        if not criterion.holds(distance):
            raise ParityError(
                f"{variant}: graph {graph.name!r} read back from its folder differs at {name!r}: {distance}; "
                f"expected {criterion}"
            )
    text = "; ".join(f"{name}: {distance}" for name, distance in apart.items())
    return {"text": f"read back from its folder, {text}", "outputs": {n: d.to_json() for n, d in apart.items()}}


def _audit(model: nn.Module) -> dict[str, Any]:
    """What the layers with weights hold; torch computes in the input's float type, so nothing runs in integers."""
    packed = packed_layers(model)
    operators = []
    for name, module in model.named_modules():
        if name in packed:
            precision = f"INT{packed[name].bits} weights"
        elif isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            precision = str(module.weight.dtype).removeprefix("torch.").replace("float", "FP")
        else:
            continue
        operators.append({"graph": "", "operator": type(module).__name__, "layer": name, "precision": precision})
    counts = dict(Counter(o["precision"] for o in operators))
    return {"operators": operators, "summary": counts, "weighted": counts, "warnings": []}
