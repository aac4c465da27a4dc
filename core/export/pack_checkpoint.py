"""Pack a pipeline folder of any size layer by layer: no float model is made, and a kill loses one file at most."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from core.compress import file_hash
from core.export.artifact import need_room
from core.export.checkpoint_plan import FLOAT, Component, Item, opened, plan_pipeline
from core.export.diffusers_quantizer import PACKED, SCALE, quantization_config
from core.export.packed import packing, unfinished
from core.files import replaced, write_text
from core.kit import InputError
from core.progress import progress
from core.quantization.packing import Rounding, quantize_rows

RULES = ("unet.conv_in=16", "unet.conv_out=16", "unet.*=4", "text_encoder.*=4", "vae.encoder.*=4", "vae.*=8")
ROUNDINGS = ("nearest", "mse")
JOURNAL = ".progress.json"
COPIED = {
    "scheduler": ("scheduler_config.json",),
    "tokenizer": (
        "added_tokens.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ),
}


@dataclass(frozen=True)
class Packing:
    """What was packed: bytes by component before and after, seconds, layers by bits, and source tensors not used."""

    folder: Path
    source_bytes: dict[str, int]
    packed_bytes: dict[str, int]
    layers: dict[int, int]
    left_out: tuple[str, ...]
    seconds: float


def pack_checkpoint(
    source: Path | str,
    out: Path | str,
    rules: Sequence[str] = RULES,
    *,
    group_size: int = 64,
    rounding: Rounding = "nearest",
    variant: str | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> Packing:
    """Pack a folder of safetensors (FP16 or FP32, also in shards) into the packed folder `out`, tensor by tensor.

    `rules` are "PATTERN=BITS" over "component.layer" ("unet.*=4"); the first that fits a Linear, convolution or
    embedding decides, 16 bits keep it, and what no rule fits stays in FP16, as do norms and biases. With
    `rounding` "mse" each group's scale is the one of least squared error. `variant` names files such as
    "fp16"; `resume` goes on with what a killed run left. Raises InputError for a folder, file, tensor or rule
    that does not fit, and for a full disk; an older packed folder then stays as it was.
    """
    source, out, started = Path(source), Path(out), time.monotonic()
    if rounding not in ROUNDINGS:
        raise InputError(f"rounding {rounding!r}: expected one of {', '.join(ROUNDINGS)}")
    index, components = plan_pipeline(source, rules, group_size, variant)
    settings: dict[str, Any] = {"rules": list(rules), "group_size": group_size, "rounding": rounding}
    origin = {**settings, "files": _files(components)}
    about = {**settings, "made_by": "pack_checkpoint", **_notes(components)}
    if not resume:
        shutil.rmtree(unfinished(out.absolute()), ignore_errors=True)
    with packing(out, about, keep=True) as stage:
        journal = _Journal(stage / JOURNAL, origin)
        items = [item for component in components for item in component.items]
        need_room(stage, sum(item.bytes for item in items) - journal.bytes())
        with progress("packing", sum(map(_work, items)), quiet=quiet) as bar:
            for component in components:
                _pack(component, stage, rounding, journal, bar.advance)
        _copy(source, stage, index)
        journal.path.unlink()
    return Packing(
        out,
        {c.name: sum(f.stat().st_size for f in {i.file for i in c.items}) for c in components},
        {c.name: sum(f.stat().st_size for f in (out / c.name).iterdir()) for c in components},
        dict(sorted(Counter(item["bits"] for c in components for item in c.layers().values()).items())),
        tuple(f"{c.name}.{key}" for c in components for key in c.left_out),
        round(time.monotonic() - started, 1),
    )


class _Journal:
    """The finished files of a run and their hashes; a run that began otherwise cannot be gone on with."""

    def __init__(self, path: Path, origin: dict[str, Any]) -> None:
        self.path, self._origin, self._done = path, origin, dict[str, str]()
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if other := [key for key, value in origin.items() if found["origin"].get(key) != value]:
                raise InputError(
                    f"{path.parent}: began with other {other[0]} than this run; leave out resume, or use another folder"
                )
            self._done = found["done"]

    def bytes(self) -> int:
        """What is on the disk already."""
        files = (self.path.parent / name for name in self._done)
        return sum(file.stat().st_size for file in files if file.is_file())

    def has(self, file: Path) -> bool:
        """Whether a file is finished and has the bytes it had then."""
        known = self._done.get(self._name(file))
        return known is not None and file.is_file() and file_hash(file) == known

    def add(self, file: Path) -> None:
        """Note a finished file."""
        self._done[self._name(file)] = file_hash(file)
        write_text(self.path, json.dumps({"origin": self._origin, "done": self._done}))

    def _name(self, file: Path) -> str:
        return file.relative_to(self.path.parent).as_posix()


def _pack(
    component: Component, stage: Path, rounding: Rounding, journal: _Journal, advance: Callable[[str, int], None]
) -> None:
    """Write a component's files and its config."""
    folder = stage / component.name
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(component.shards):
        name = component.file_name(number)
        if journal.has(folder / name):
            advance(f"{component.name}: kept {name}", sum(map(_work, shard)))
        else:
            tensors: dict[str, Tensor] = {}
            with _reading() as read:
                for item in shard:
                    tensors.update(_tensors(item, read(item), rounding))
                    advance(f"{component.name}.{item.module}", _work(item))
            with replaced(folder / name) as fresh:
                save_file(tensors, str(fresh), metadata={"format": "pt"})
            journal.add(folder / name)
        weight_map.update({target: name for item in shard for target in _targets(item)})
    if len(component.shards) > 1:
        size = sum(item.bytes for item in component.items)
        listing = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / f"{component.stem}.safetensors.index.json", listing)
    layers = component.layers()
    config = dict(component.config)
    if layers or component.removed:
        config["quantization_config"] = quantization_config(layers, component.removed)
    if component.name == "text_encoder":  # transformers would take the float type from here, diffusers FP32
        config = {**{k: v for k, v in config.items() if k != "torch_dtype"}, "dtype": "float32"}
    _write_json(folder / "config.json", config)


@contextmanager
def _reading() -> Iterator[Callable[[Item], Tensor]]:
    """A function that reads an item's tensor, with each file opened once."""
    with ExitStack() as stack:
        files: dict[Path, Any] = {}

        def read(item: Item) -> Tensor:
            if item.file not in files:
                files[item.file] = stack.enter_context(opened(item.file))
            tensor: Tensor = files[item.file].get_tensor(item.key)
            if not torch.isfinite(tensor).all():
                raise InputError(f"{item.file}: tensor {item.key!r} holds NaN or Inf; it cannot be packed")
            return tensor

        yield read


def _tensors(item: Item, weight: Tensor, rounding: Rounding) -> dict[str, Tensor]:
    """What is written for an item: packed integers and their scales, or the values in FP16."""
    if item.bits == FLOAT:
        half = weight.to(torch.float16)
        if not torch.isfinite(half).all():
            raise InputError(f"{item.file}: tensor {item.key!r} holds values beyond FP16's 65504; it cannot be kept")
        return {item.name: half.contiguous()}
    packed, scale = quantize_rows(weight.flatten(1), item.bits, item.group_size, rounding, item.module)
    return dict(zip(_targets(item), (packed, scale), strict=True))


def _targets(item: Item) -> tuple[str, ...]:
    return (item.name,) if item.bits == FLOAT else (f"{item.module}.{PACKED}", f"{item.module}.{SCALE}")


def _work(item: Item) -> int:
    """Thousands of weights, in which the progress counts."""
    return 1 + item.row * item.shape[0] // 1000


def _copy(source: Path, stage: Path, index: dict[str, Any]) -> None:
    """Copy the tokenizer's and the scheduler's files of known kinds, and write the pipeline's index."""
    for folder, names in COPIED.items():
        present = [name for name in names if (source / folder / name).is_file()]
        if not present:
            raise InputError(f"{source / folder}: none of {', '.join(names)} there; copy the whole pipeline folder")
        (stage / folder).mkdir(exist_ok=True)
        for name in present:
            shutil.copyfile(source / folder / name, stage / folder / name)
    _write_json(stage / "model_index.json", index)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def _files(components: Sequence[Component]) -> dict[str, list[int]]:
    """Size and time of each source file, by which a resumed run knows that they are the same."""
    files = sorted({item.file for component in components for item in component.items})
    return {f"{f.parent.name}/{f.name}": [f.stat().st_size, f.stat().st_mtime_ns] for f in files}


def _notes(components: Sequence[Component]) -> dict[str, Any]:
    """For the manifest: layers whose last group is shorter, and tensors of the source that no model uses."""
    packed = [(c.name, item) for c in components for item in c.items if item.bits != FLOAT]
    short = [f"{name}.{item.module}" for name, item in packed if item.row % item.group_size]
    return {"shorter_last_group": short, "left_out": [f"{c.name}.{key}" for c in components for key in c.left_out]}
