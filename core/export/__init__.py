"""`export`: write a model for the runtimes, and prove in which precision it runs and that it agrees with torch."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from core.export import onnx, openvino
from core.export.artifact import Artifact, Variant, load_module, replacing, write_artifact
from core.export.audit import audit_file, merge
from core.export.choices import choices
from core.export.folder import RUNTIME, export_folders
from core.export.layers import Layers
from core.export.parity import Criterion, ParityError, Reference, check, compare_layers, described
from core.export.reshape import reshaped
from core.export.trace import Export, audit_trace
from core.hardware.host import processor
from core.kit import Graph, InputError, Kit
from core.quantization import Quantizer, half_layers, halve_weights, pack_weights, quant_layers, weights_alone

__all__ = ["Artifact", "Export", "ParityError", "Variant", "audit_trace", "export", "export_kit", "reshaped"]

RUNTIMES = ("onnxruntime", "openvino")


def export(
    models: Mapping[str, nn.Module],
    graphs: Iterable[Graph],
    target_name: str,
    out: Path | str,
    *,
    kit: str,
    runtimes: Sequence[str] = RUNTIMES,
    meta: Mapping[str, Any] | None = None,
    tolerance: Mapping[str, float] | None = None,
) -> Artifact:
    """Export every model ({precision: model}) for every runtime into the artifact `out`, and open it.

    Each file is audited (the precision of every operator, read from the compiled model) and compared
    with torch on the graphs' example inputs; a quantized model is compared with torch's simulation of
    it, a halved one with FP16 weights and FP32 sums, which is what its file holds. `tolerance` overrides
    by precision: for fp32 the largest difference relative to max(1, peak) (default 1e-4), for all others
    the least SQNR in dB (default 25). The last precision on the last runtime is chosen until
    `Artifact.choose` says otherwise. Raises ParityError naming the first layer that drifts, and
    InputError for names that do not fit; in both cases and in a crash an older artifact in `out` stays
    as it was.
    """
    graphs, out = tuple(graphs), Path(out)
    _check_names(models, graphs, runtimes)
    variants: dict[str, Any] = {}
    shapes: dict[str, Any] = {}
    with replacing(out) as stage:
        for precision, model in models.items():
            (stage / precision).mkdir()
            criterion = Criterion.of(precision, tolerance)
            collected: dict[str, list[dict[str, Any]]] = {r: [] for r in runtimes}
            parities: dict[str, dict[str, Any]] = {r: {} for r in runtimes}
            for graph in graphs:
                with _evaluating(graph.module(model)) as part:
                    about, results = _export_graph(part, graph, stage / precision, precision, runtimes, criterion)
                shapes[graph.name] = about
                for runtime, (audited, parity) in results.items():
                    collected[runtime].append(audited)
                    parities[runtime][graph.name] = parity
            for runtime in runtimes:
                name = f"{precision}-{runtime}"
                variants[name] = {
                    "name": name,
                    "precision": precision,
                    "runtime": runtime,
                    "version": _VERSIONS[runtime](),
                    "files": {g.name: f"{precision}/{g.name}{_SUFFIXES[runtime]}" for g in graphs},
                    "audit": {"device": processor()[0], **merge(collected[runtime])},
                    "parity": {"criterion": str(criterion), "tolerance": criterion.limit, "graphs": parities[runtime]},
                }
        write_artifact(stage, kit=kit, target=target_name, meta=meta or {}, graphs=shapes, variants=variants)
    return Artifact.open(out)


def export_kit(
    models: Mapping[str, nn.Module], kit: Kit, target_name: str, out: Path | str, meta: Mapping[str, Any] | None = None
) -> Artifact:
    """Export models ({precision: model}) for the runtimes of their kit; see `export` and `export_folders`."""
    if kit.runtimes == (RUNTIME,):
        return export_folders(models, kit.exports(), target_name, out, kit=kit, meta=meta)
    return export(models, kit.exports(), target_name, out, kit=kit.name, runtimes=kit.runtimes, meta=meta)


_SUFFIXES = {"onnxruntime": ".onnx", "openvino": ".xml"}
_VERSIONS = {"onnxruntime": onnx.version, "openvino": openvino.version}


def _export_graph(
    part: nn.Module, graph: Graph, folder: Path, precision: str, runtimes: Sequence[str], criterion: Criterion
) -> tuple[dict[str, Any], dict[str, tuple[dict[str, Any], dict[str, Any]]]]:
    """Write one graph for all runtimes; its description, and (audit, parity) by runtime."""
    inputs = tuple(graph.inputs.values())
    reference = _reference(part, inputs)
    model = onnx.to_onnx(part, graph)
    if simulated := quant_layers(part):
        pack_weights(model)
    if half := half_layers(part):
        halve_weights(model)
    # a quantizer's value is told under the name of the layer it belongs to
    layers = Layers(model, [n for n, m in part.named_modules() if not isinstance(m, Quantizer)], graph.part)
    quantized = {layers.full(n) for n, q in simulated.items() if q.input_quantizer is not None}
    work = folder / f".{graph.name}"
    work.mkdir()
    source = folder / f"{graph.name}.onnx"
    onnx.save_onnx(model, source)
    results = {}
    for runtime in runtimes:
        path = source.with_suffix(_SUFFIXES[runtime])
        if runtime == "openvino":
            openvino.save_ir(source, path)
        found = load_module(runtime, path, None, as_tuple=True)(*inputs)
        chosen = [] if criterion.relative else choices(model, layers, inputs, runtime, work)
        same = _reference(part, inputs, [c.indices for c in chosen]) if chosen else reference
        layerwise = compare_layers(same, model, layers, inputs, runtime, work, criterion)
        parity = check(f"{precision}-{runtime}", graph.name, graph.outputs, same, found, layerwise, criterion, chosen)
        results[runtime] = (
            audit_file(runtime, path, layers, graph.name, precision, quantized, {layers.full(n) for n in half}),
            parity,
        )
    shutil.rmtree(work)
    if "onnxruntime" not in runtimes:
        for left in (source, source.with_suffix(".onnx.data")):
            left.unlink(missing_ok=True)
    return described(graph, reference), results


def _reference(part: nn.Module, inputs: Sequence[Tensor], given: Sequence[Tensor] = ()) -> Reference:
    """What torch computes with what the exported file holds."""
    with weights_alone(part):
        return Reference.of(part, inputs, given)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[nn.Module]:
    """The module in eval mode, with the modes of all its submodules put back afterwards."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield module
    finally:
        for m, training in modes.items():
            m.training = training


def _check_names(models: Mapping[str, nn.Module], graphs: Sequence[Graph], runtimes: Sequence[str]) -> None:
    for what, names in (
        ("models", list(models)),
        ("graphs", [g.name for g in graphs]),
        ("runtimes", list(runtimes)),
    ):
        if not names:
            raise InputError(f"export: no {what} given; name at least one")
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"export: {what} name {name!r} twice; names must differ")
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
                raise InputError(f"export: {name!r} of {what} becomes a file name; use letters, digits, '_', '-', '.'")
    if unknown := sorted(set(runtimes) - set(RUNTIMES)):
        raise InputError(f"export: runtime {unknown[0]!r} is not known; known are {', '.join(RUNTIMES)}")
