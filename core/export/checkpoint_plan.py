"""What packing a pipeline folder will do, from its configs and file headers alone: no weight is read, no model made."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from core.files import read_object
from core.kit import InputError
from core.pruning.bypass import bypass
from core.quantization.packing import group_count, row_bytes

FLOAT = 16
BITS = (2, 3, 4, 5, 6, 7, 8, FLOAT)
SHARD_BYTES = 64_000_000
DIFFUSERS = {"UNet2DConditionModel", "AutoencoderKL"}
TRANSFORMERS = {"CLIPTextModel"}
WEIGHTED = {"unet": DIFFUSERS, "vae": DIFFUSERS, "text_encoder": TRANSFORMERS}
PIPELINES = {
    "LatentConsistencyModelPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionPipeline",
}
# In files of older libraries and in no model of today's: a constant, made anew.
CONSTANTS = {"embeddings.position_ids"}


@dataclass(frozen=True)
class Item:
    """One tensor to write: `name` in the model, `key` in `file`, its shape, and N bits (16: kept as FP16)."""

    name: str
    key: str
    file: Path
    shape: tuple[int, ...]
    bits: int
    group_size: int

    @property
    def module(self) -> str:
        """The layer that the tensor belongs to."""
        return self.name.rpartition(".")[0]

    @property
    def row(self) -> int:
        """The weights of one output channel."""
        return math.prod(self.shape[1:])

    @property
    def bytes(self) -> int:
        """The size when written."""
        if self.bits == FLOAT:
            return 2 * math.prod(self.shape)
        return self.shape[0] * (row_bytes(self.row, self.bits) + 2 * group_count(self.row, self.group_size))


@dataclass(frozen=True)
class Component:
    """One model of the pipeline: its folder's name, config, the stem of its weight files, and their contents.

    `removed` names blocks taken out of the architecture, `left_out` tensors of the source that it has no place for.
    """

    name: str
    config: dict[str, Any]
    stem: str
    shards: tuple[tuple[Item, ...], ...]
    removed: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def items(self) -> tuple[Item, ...]:
        """All tensors, in the order they are written."""
        return tuple(item for shard in self.shards for item in shard)

    def layers(self) -> dict[str, dict[str, int]]:
        """The packed layers, {name: {"bits", "group_size"}}."""
        return {i.module: {"bits": i.bits, "group_size": i.group_size} for i in self.items if i.bits != FLOAT}

    def file_name(self, shard: int) -> str:
        """The name of a shard's file, as the libraries look for it."""
        last = len(self.shards)
        return f"{self.stem}.safetensors" if last == 1 else f"{self.stem}-{shard + 1:05d}-of-{last:05d}.safetensors"


def parse_rules(rules: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """("unet.*=4", ...) as (pattern, bits) pairs; raises InputError naming the rule that is malformed."""
    parsed = []
    for rule in rules:
        pattern, sign, bits = rule.rpartition("=")
        if not sign or not pattern or not bits.isdecimal() or int(bits) not in BITS:
            raise InputError(
                f"rule {rule!r}: expected PATTERN=BITS such as 'unet.*=4', bits of 2 to 8, or 16 to keep FP16"
            )
        parsed.append((pattern, int(bits)))
    return tuple(parsed)


def plan_pipeline(
    source: Path, rules: Sequence[str], group_size: int, variant: str | None = None
) -> tuple[dict[str, Any], list[Component]]:
    """The pipeline's index as it will be written, and what becomes of each tensor of each of its models.

    Raises InputError naming the file, tensor or rule where the folder is no such pipeline, a weight is missing
    or of another shape than its architecture's, or a rule fits nothing.
    """
    parsed = parse_rules(rules)
    if group_size < 2:
        raise InputError(f"group_size {group_size}: expected 2 or more weights a scale, such as 64")
    index = _index(source)
    models = [name for name in WEIGHTED if index.get(name, [None])[0] is not None]
    used: set[str] = set()
    plans = [_component(source / name, index[name][1], parsed, group_size, variant, used) for name in models]
    if unused := [rule for rule, (pattern, _) in zip(rules, parsed, strict=True) if pattern not in used]:
        raise InputError(
            f"rule {unused[0]!r} fits no layer of {source} that rules before it leave; mend its pattern or leave it out"
        )
    return index, plans


def _index(source: Path) -> dict[str, Any]:
    """`model_index.json` with the parts that are not needed for pictures taken out."""
    path = source / "model_index.json"
    index = read_object(path, "give the folder of a Stable Diffusion pipeline as diffusers saves it")
    found = index.get("_class_name")
    if found not in PIPELINES:
        raise InputError(f"{path}: _class_name {found!r}; expected one of {', '.join(sorted(PIPELINES))}")
    for name, known in WEIGHTED.items():
        entry = index.get(name)
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] not in known:
            raise InputError(f"{path}: component {name!r} is {entry}; expected {' or '.join(sorted(known))}")
        if not (source / name).is_dir():
            raise InputError(f"{source / name}: missing, though {path} lists it; copy the whole pipeline folder")
    for name in ("safety_checker", "feature_extractor", "image_encoder"):
        if name in index:
            index[name] = [None, None]
    return {**index, "requires_safety_checker": False}


def _component(
    folder: Path,
    class_name: str,
    rules: Sequence[tuple[str, int]],
    group_size: int,
    variant: str | None,
    used: set[str],
) -> Component:
    config = read_object(folder / "config.json", "copy the whole pipeline folder")
    quantized = config.pop("quantization_config", None) or {}
    if quantized.get("layers") or quantized and quantized.get("quant_method") != "fitkit":
        raise InputError(f"{folder / 'config.json'}: these weights are quantized already; give the original folder")
    removed = tuple(quantized.get("removed", ()))
    model = bypass(_architecture(folder, class_name, config), removed)
    stem = "model" if class_name in TRANSFORMERS else "diffusion_pytorch_model"
    where = {key: file for file in weight_files(folder, stem, variant) for key in _shapes(file)}
    shapes = {file: _shapes(file) for file in set(where.values())}
    keys = _renamed(model, where)
    weights = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Embedding))}
    items = []
    for name, tensor in model.state_dict().items():
        if name not in keys:
            raise InputError(f"{folder}: tensor {name!r} is in none of its files; copy the whole pipeline folder")
        file, shape = where[keys[name]], tuple(tensor.shape)
        found = shapes[file][keys[name]]
        if found != shape:
            raise InputError(f"{file}: tensor {name!r} has shape {found}, expected {shape} by {folder / 'config.json'}")
        bits = FLOAT
        if name in weights:
            bits = _bits(f"{folder.name}.{name.removesuffix('.weight')}", rules, used)
        items.append(Item(name, keys[name], file, shape, bits, group_size))
    left_out = sorted(key for name, key in keys.items() if name not in model.state_dict() and name not in CONSTANTS)
    return Component(folder.name, config, stem, _shards(items), removed, tuple(left_out))


def _architecture(folder: Path, class_name: str, config: dict[str, Any]) -> nn.Module:
    """The model that a config describes, on the meta device, where tensors have shapes and no memory."""
    try:
        with torch.device("meta"):
            if class_name in TRANSFORMERS:
                made = getattr(import_module("transformers"), class_name)
                model: nn.Module = made(made.config_class.from_dict(config))
            else:
                model = getattr(import_module("diffusers"), class_name).from_config(config)
    except (TypeError, ValueError, KeyError, IndexError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{folder / 'config.json'}: no {class_name} can be made of it ({reason})") from error
    return model


def _renamed(model: nn.Module, keys: Mapping[str, Path]) -> dict[str, str]:
    """{name in the model: key in the file}: both libraries load files whose names are of their older versions."""
    names = {key: key for key in keys}
    fix = getattr(model, "_fix_state_dict_keys_on_load", None)
    if fix is not None:
        fix(names)
        return names
    return {key.removeprefix("text_model."): key for key in names}


def _bits(name: str, rules: Sequence[tuple[str, int]], used: set[str]) -> int:
    """The bits of the first rule that fits a layer; without one it stays FP16."""
    for pattern, bits in rules:
        if fnmatchcase(name, pattern):
            used.add(pattern)
            return bits
    return FLOAT


def _shards(items: Sequence[Item]) -> tuple[tuple[Item, ...], ...]:
    """Files of about `SHARD_BYTES`: what a kill loses is at most one of them."""
    shards: list[list[Item]] = [[]]
    for item in items:
        if shards[-1] and sum(i.bytes for i in shards[-1]) + item.bytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(item)
    return tuple(map(tuple, shards))


def weight_files(folder: Path, stem: str, variant: str | None = None) -> list[Path]:
    """The safetensors files of a component; without `variant` the plain ones, or else FP16's, or the only ones."""
    found: dict[str, Path] = {}
    for form in (r"(?:\.(\w+))?\.safetensors", r"\.safetensors\.index(?:\.(\w+))?\.json"):
        for path in sorted(folder.iterdir()):
            if match := re.fullmatch(re.escape(stem) + form, path.name):
                found[match[1] or ""] = path
    chosen = variant or next((v for v in ("", "fp16", *found) if v in found), "")
    if chosen not in found:
        old = ", ".join(sorted(p.name for p in folder.glob("*.bin")))
        raise InputError(
            f"{folder}: no {stem}{'.' + chosen if chosen else ''}.safetensors there"
            + (f", only {old}; save the pipeline with safe_serialization" if old else "; copy the whole folder")
        )
    path = found[chosen]
    if path.suffix != ".json":
        return [path]
    listed = read_object(path, "copy the whole folder").get("weight_map")
    files = sorted(set(listed.values())) if isinstance(listed, dict) else []
    for name in files:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(f"{path}: file {name!r} of weight_map is refused; expected a .safetensors file beside it")
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: missing, though {path} lists it; copy the whole folder")
    if not files:
        raise InputError(f"{path}: field 'weight_map': expected an object of tensors and their files")
    return [folder / name for name in files]


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    with opened(file) as tensors:
        return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file read piece by piece; raises InputError naming it where it is damaged."""
    try:
        # not mapped into memory: the pages of a mapped file count as this process's memory
        with safe_open(str(file), framework="pt", backend="pread") as tensors:
            yield tensors
    except SafetensorError as error:
        raise InputError(f"{file}: not a whole safetensors file ({error}); copy it again") from error
