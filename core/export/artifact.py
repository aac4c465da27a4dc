"""The artifact: exported files, a manifest with their hashes, and a way to run them as modules."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn

from core.compress import file_hash
from core.figures import today
from core.files import inside, write_text
from core.kit import InputError

MANIFEST = "manifest.json"
FORMAT = 1
COMPANIONS = {".xml": ".bin", ".onnx": ".onnx.data"}


@dataclass(frozen=True)
class Variant:
    """One precision on one runtime: a file per graph, what ran in which precision, and how it agrees with torch.

    `name` is "<precision>-<runtime>"; `version` the runtime's version at export; `files` maps a graph's
    name to a path relative to the artifact; `audit` and `parity` are those of `core.export.audit` and
    `core.export.parity`.
    """

    name: str
    precision: str
    runtime: str
    version: str
    files: dict[str, str]
    audit: dict[str, Any]
    parity: dict[str, Any]


@dataclass(frozen=True)
class Origin:
    """Where a module of `Artifact.as_module` comes from; it has this as its attribute `origin`."""

    artifact: Artifact
    variant: str
    threads: int | None


def origin_of(module: nn.Module) -> Origin | None:
    """Where a module of `Artifact.as_module` comes from, None of any other."""
    found: Any = getattr(module, "origin", None)
    return found if isinstance(found, Origin) else None


class Artifact:
    """An opened artifact; make one with `export`, read one with `Artifact.open`."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.variants = {name: Variant(**record) for name, record in manifest["variants"].items()}

    @staticmethod
    def open(folder: Path | str) -> Artifact:
        """Read and verify an artifact; raises InputError naming the file that is missing, changed or outside."""
        folder = Path(folder)
        recover(folder)
        path = folder / MANIFEST
        if not path.is_file():
            raise InputError(f"{folder}: no artifact here ({MANIFEST} is missing); export one, or give its folder")
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path}: not JSON ({error}); export the artifact again") from error
        _check_form(path, manifest)
        for name, record in manifest["files"].items():
            file = inside(folder, name, path)
            if not file.is_file():
                raise InputError(f"{file}: missing, though {path} lists it; export the artifact again")
            if file.stat().st_size != record["bytes"] or file_hash(file) != record["sha256"]:
                raise InputError(f"{file}: its bytes differ from the sha256 in {path}; export the artifact again")
        return Artifact(folder, manifest)

    @property
    def chosen(self) -> str:
        """The name of the variant that runs when none is named."""
        return str(self.manifest["chosen"])

    @property
    def meta(self) -> dict[str, Any]:
        """The kit's own JSON, such as a threshold."""
        meta: dict[str, Any] = self.manifest["meta"]
        return meta

    @property
    def graphs(self) -> dict[str, Any]:
        """By graph: "inputs" and "outputs" ({"name", "dtype", "shape"}; a text in a shape is a free axis), "tuple"."""
        graphs: dict[str, Any] = self.manifest["graphs"]
        return graphs

    @property
    def sha256(self) -> str:
        """The hash of all files and their names; choosing another variant does not change it."""
        return hashlib.sha256(json.dumps(self.manifest["files"], sort_keys=True).encode()).hexdigest()

    def variant(self, name: str | None = None) -> Variant:
        """The variant of that name, or the chosen one; raises InputError for an unknown name."""
        found = self.variants.get(self.chosen if name is None else name)
        if found is None:
            raise InputError(f"{self.folder}: no variant {name!r}; it holds {', '.join(sorted(self.variants))}")
        return found

    def choose(self, name: str) -> None:
        """Make a variant the one that runs by default, here and in the manifest."""
        self.manifest["chosen"] = self.variant(name).name
        write_manifest(self.folder, self.manifest)

    def describe(self, meta: dict[str, Any]) -> None:
        """Replace the kit's own JSON, here and in the manifest."""
        self.manifest["meta"] = dict(meta)
        write_manifest(self.folder, self.manifest)

    def size_bytes(self, variant: str | None = None) -> int:
        """The size of one variant's files, in bytes."""
        listed = self.manifest["files"]
        return sum(listed[path]["bytes"] for path in companions(listed, self.variant(variant).files.values()))

    def as_module(self, variant: str | None = None, threads: int | None = None, graph: str | None = None) -> nn.Module:
        """A module that runs one graph in its runtime: tensors in, a tensor or a tuple out, as the torch model.

        `threads` pins the runtime's threads (None: the runtime's own choice). Without `graph`, an artifact of
        several graphs gives an `nn.ModuleDict` of them by name, which answers to `module.encoder` as well.
        Its attribute `origin` says where it comes from.
        """
        chosen = self.variant(variant)
        module = self._module(chosen, threads, graph)
        module.origin = Origin(self, chosen.name, threads)  # type: ignore[assignment]
        return module

    def _module(self, chosen: Variant, threads: int | None, graph: str | None) -> nn.Module:
        if graph is None and len(chosen.files) > 1 and chosen.runtime != "torch":
            return nn.ModuleDict({name: self._module(chosen, threads, name) for name in chosen.files})
        name = next(iter(chosen.files)) if graph is None else graph
        if name not in chosen.files:
            raise InputError(f"{self.folder}: name one of its graphs: {', '.join(chosen.files)} (asked for {graph!r})")
        path, as_tuple = self.folder / chosen.files[name], bool(self.graphs[name]["tuple"])
        if chosen.runtime == "torch":
            return self._torch(path.parent, threads, "" if graph is None else self.graphs[name]["part"])
        return load_module(chosen.runtime, path, threads, as_tuple)

    def _torch(self, folder: Path, threads: int | None, part: str) -> nn.Module:
        """The model of a folder, or a part of it, read by the kit that wrote it."""
        from core.kit import load

        if threads is not None:
            torch.set_num_threads(threads)
        return load(str(self.manifest["kit"])).model(folder).get_submodule(part)

    def folder_of(self, variant: str | None = None) -> Path | None:
        """The folder of a variant that runs in torch, None of any other."""
        v = self.variant(variant)
        return (self.folder / next(iter(v.files.values()))).parent if v.runtime == "torch" else None

    def trace_notes(self) -> list[dict[str, Any]]:
        """Notes for a report: {"variant", "layer" ("" for all), "note"} on real precision, warnings and parity."""
        notes = []
        for v in self.variants.values():
            counts = ", ".join(f"{n} {p}" for p, n in v.audit["weighted"].items()) or "none"
            notes.append({"variant": v.name, "layer": "", "note": f"layers with weights ran as: {counts}"})
            notes += [{"variant": v.name, "layer": w["layer"], "note": w["why"]} for w in v.audit["warnings"]]
            for graph, record in v.parity["graphs"].items():
                notes.append({"variant": v.name, "layer": "", "note": f"graph {graph}: {record['text']}"})
        return notes


def load_module(runtime: str, path: Path, threads: int | None, as_tuple: bool) -> nn.Module:
    """The module that runs a file in a runtime ("onnxruntime" or "openvino")."""
    if runtime == "onnxruntime":
        from core.export.onnx import OnnxModule

        return OnnxModule(path, threads, as_tuple=as_tuple)
    if runtime == "openvino":
        from core.export.openvino import OpenVINOModule

        return OpenVINOModule(path, threads, as_tuple=as_tuple)
    raise InputError(f"runtime {runtime!r} is not known; known are onnxruntime, openvino")


def companions(present: Mapping[str, Any], paths: Any) -> list[str]:
    """The given paths, each once, and the files that go with them, of those that are present."""
    found = []
    for path in dict.fromkeys(paths):
        found.append(path)
        pure = PurePosixPath(path)
        if pure.suffix in COMPANIONS:
            mate = pure.with_suffix(COMPANIONS[pure.suffix]).as_posix()
            found += [mate] if mate in present else []
        if pure.suffix == ".json":  # the index of a folder stands for all of it
            found += [name for name in present if name.startswith(f"{pure.parent}/") and name != path]
    return found


def _check_form(path: Path, manifest: Any) -> None:
    """Refuse a manifest whose fields are missing or of another kind, with the field named."""

    def refuse(field: str, expected: str) -> InputError:
        return InputError(f"{path}: field {field}: expected {expected}; export the artifact again")

    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise refuse("'format'", str(FORMAT))
    for key in ("files", "graphs", "variants", "meta"):
        if not isinstance(manifest.get(key), dict):
            raise refuse(repr(key), "an object")
    for name, record in manifest["files"].items():
        if not isinstance(record, dict) or not {"bytes", "sha256"} <= record.keys():
            raise refuse(f"files[{name!r}]", "an object with bytes and sha256")
    wanted = {f.name for f in fields(Variant)}
    for name, record in manifest["variants"].items():
        if not isinstance(record, dict) or set(record) != wanted or not isinstance(record["files"], dict):
            raise refuse(f"variants[{name!r}]", f"an object with {', '.join(sorted(wanted))}")
        for graph, file in record["files"].items():
            if file not in manifest["files"] or "tuple" not in manifest["graphs"].get(graph, {}):
                raise refuse(f"variants[{name!r}].files[{graph!r}]", "a graph and a file that the manifest lists")
    if manifest.get("chosen") not in manifest["variants"]:
        raise refuse("'chosen'", "the name of a variant")


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write `manifest.json` whole or not at all; raises InputError naming it where the disk is full."""
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False) + "\n")


def write_artifact(
    stage: Path,
    *,
    kit: str,
    target: str,
    meta: Mapping[str, Any],
    graphs: Mapping[str, Any],
    variants: Mapping[str, Any],
) -> None:
    """Write the manifest of all files that are in `stage` now; the last of the variants is chosen."""
    manifest = {
        "format": FORMAT,
        "kit": kit,
        "target": target,
        "created": today(),
        "chosen": list(variants)[-1],
        "meta": dict(meta),
        "graphs": dict(graphs),
        "variants": dict(variants),
        "files": list_files(stage),
    }
    write_manifest(stage, manifest)


def list_files(folder: Path) -> dict[str, dict[str, Any]]:
    """{relative path: {"bytes", "sha256"}} of every file below a folder."""
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": file_hash(p)} for p in found}


def _beside(out: Path, suffix: str) -> Path:
    return out.with_name(f".{out.name}.{suffix}")


def recover(out: Path) -> None:
    """Put back the old artifact when a kill fell between moving it aside and moving the new one in."""
    if not out.exists() and _beside(out, "old").exists():
        os.replace(_beside(out, "old"), out)


def need_room(path: Path, wanted: int) -> None:
    """Raise InputError when the disk of `path` has less than `wanted` bytes left."""
    free = shutil.disk_usage(path.parent).free
    if free < wanted:
        raise InputError(
            f"{path}: no room on its disk: {wanted / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free; "
            "free some space or choose another folder"
        )


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A folder beside `out` to build in, moved to `out` at the end; a failure or a kill leaves the old artifact.

    A folder cannot be exchanged in one portable call, so the old one is moved aside first and `recover`
    puts it back where a kill fell between the two moves. Raises InputError when `out` holds something
    else than an artifact, or when the disk is full.
    """
    out = Path(os.path.abspath(out))
    recover(out)
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST).is_file())):
        raise InputError(f"{out}: exists and is not an artifact, so it is not replaced; choose another folder")
    stage, aside = _beside(out, "new"), _beside(out, "old")
    shutil.rmtree(stage, ignore_errors=True)
    try:
        stage.mkdir(parents=True)
        yield stage
        shutil.rmtree(aside, ignore_errors=True)
        if out.exists():
            os.replace(out, aside)
        os.replace(stage, out)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        file = _newest(stage) if error.filename is None else Path(os.fsdecode(error.filename))
        free = shutil.disk_usage(out.parent).free
        raise InputError(
            f"{file}: the disk is full ({free / 1e6:.1f} MB free); free some space or choose another folder than {out}"
        ) from error
    finally:
        recover(out)
        shutil.rmtree(stage, ignore_errors=True)


def _newest(stage: Path) -> Path:
    """The file that was being written: an error of a write names none."""
    files = [p for p in stage.rglob("*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_mtime_ns, default=stage)
