"""What the exporter found, as entries of the trace: the precision that each layer really runs in."""

from __future__ import annotations

from dataclasses import dataclass

from core.compress import Skipped, TraceEntry
from core.export.artifact import Artifact
from core.kit import Step


@dataclass(frozen=True)
class Export(Step):
    """One variant of an artifact, written and read back; `export` does it, no recipe lists it."""

    variant: str


def audit_trace(artifact: Artifact) -> list[TraceEntry]:
    """An entry a variant: the precision of every operator in the compiled model, and what ran float instead."""
    entries = []
    for v in artifact.variants.values():
        changed = [
            {"layer": o["layer"], "what": f"runs in {o['precision']} as {o['operator']}"}
            for o in v.audit["operators"]
            if o["precision"] != "conversion"
        ]
        skipped = [Skipped(w["layer"], w["why"]) for w in v.audit["warnings"]]
        entries.append(TraceEntry(Export(v.name), changed, skipped, 0.0))
    return entries
