"""The quantization method "fitkit" for diffusers and transformers: `from_pretrained` of theirs loads a packed folder.

Both libraries look methods up in dictionaries of their own. They are slow to import, so ours is entered when
they are imported and the classes are made then.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache, wraps
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from core.export.packed import MANIFEST, MEND, packing, verify
from core.export.when_imported import when_imported
from core.files import write_text
from core.kit import InputError
from core.pruning.bypass import bypass, bypassed
from core.quantization.packed import empty_packed, packed_layers

METHOD = "fitkit"
PACKED, SCALE = "weight_packed", "weight_scale"
_BUFFERS = (f".{PACKED}", f".{SCALE}", ".low_rank_a", ".low_rank_b")
# What diffusers, and torchao through it, say on import about a format that is not used here.
_NOISE = {
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
    "torch.utils._pytree": "is an Enum subclass and is now natively supported",
}


class Method(StrEnum):
    """The name of the method, as the libraries want it: with a `.value`."""

    FITKIT = METHOD


def enable() -> None:
    """Enter the method into diffusers and transformers, as soon as they are imported or now."""
    for name, text in _NOISE.items():
        logging.getLogger(name).addFilter(_without(text))
    when_imported("diffusers.quantizers.auto", _into_diffusers)
    when_imported("diffusers.pipelines.pipeline_utils", _look_first)
    when_imported("transformers.quantizers.auto", _into_transformers)


def _without(text: str) -> Any:
    return lambda record: text not in record.getMessage()


def _into_diffusers(auto: ModuleType) -> None:
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD], auto.AUTO_QUANTIZER_MAPPING[METHOD] = diffusers_classes()


def _into_transformers(auto: ModuleType) -> None:
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD], auto.AUTO_QUANTIZER_MAPPING[METHOD] = transformers_classes()


def _look_first(pipelines: ModuleType) -> None:
    """Let a pipeline's `from_pretrained` look over a packed folder first: diffusers asks us when a file is open."""
    load = pipelines.DiffusionPipeline.from_pretrained.__func__

    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, **options: Any) -> Any:
        folder = Path(pretrained_model_name_or_path)
        if (folder / MANIFEST).is_file():
            verify(folder, later=_packed_in(folder))
        return load(cls, pretrained_model_name_or_path, **options)

    looking: Any = wraps(load)(from_pretrained)
    pipelines.DiffusionPipeline.from_pretrained = classmethod(looking)


def quantization_config(layers: Mapping[str, Mapping[str, int]], removed: Sequence[str] = ()) -> dict[str, Any]:
    """The "quantization_config" of a component's config.json.

    `layers` is {name: {"bits", "group_size"}} of the packed layers, with "rank" for those that carry a low-rank term;
    `removed` names the blocks taken out of the architecture (see `core.pruning.bypass`).
    """
    config: dict[str, Any] = {"quant_method": METHOD, "layers": {name: dict(record) for name, record in layers.items()}}
    return {**config, "removed": list(removed)} if removed else config


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether a component's config is that of packed weights."""
    found = config.get("quantization_config")
    return isinstance(found, Mapping) and found.get("quant_method") == METHOD and bool(found.get("layers"))


def save_packed(
    pipeline: Any, out: Path | str, about: Mapping[str, Any] | None = None, texts: Mapping[str, str] | None = None
) -> None:
    """Write a diffusers pipeline as the packed folder `out`: its packed layers as they are, all other floats in FP16.

    `about` is JSON for the manifest, `texts` are further files {name: content} at the top. The pipeline is
    unchanged. Raises InputError where a LoRA is loaded, where `out` holds something else, and for a full disk.
    """
    with packing(out, about or {}) as stage, ExitStack() as stack:
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                stack.enter_context(_as_stored(part))
        pipeline.save_pretrained(stage, safe_serialization=True)
        for file in stage.glob("*/config.json"):  # where a part was loaded from is this machine's own
            config = json.loads(file.read_text(encoding="utf-8"))
            if config.pop("_name_or_path", None) is not None:
                write_text(file, json.dumps(config, indent=2) + "\n")
        for name, text in (texts or {}).items():
            write_text(stage / name, text)


@contextmanager
def _as_stored(model: Any) -> Iterator[None]:
    """Within it `save_pretrained` of a diffusers or transformers model writes its packed form."""
    layers = {name: layer.layout for name, layer in packed_layers(model).items()}
    if adapted := [name for name, _ in model.named_modules() if name.endswith(".base_layer")]:
        raise InputError(f"layer {adapted[0]}: a LoRA is loaded on it; call unload_lora_weights() before saving")
    of_diffusers = hasattr(model, "register_to_config")
    config_class, quantizer_class = diffusers_classes() if of_diffusers else transformers_classes()
    config = config_class.from_dict(quantization_config(layers, bypassed(model)))
    before = getattr(model, "hf_quantizer", None), model._internal_dict if of_diffusers else copy.copy(model.config)
    model.hf_quantizer = quantizer_class(config)
    if of_diffusers:
        model.register_to_config(quantization_config=config)
    else:
        model.config.quantization_config = config
    try:
        yield
    finally:
        model.hf_quantizer = before[0]
        if before[0] is None:
            del model.hf_quantizer
        if of_diffusers:
            model._internal_dict = before[1]
        else:
            model.config = before[1]


def _check_layers(layers: Any, removed: Any) -> None:
    """Refuse layers that are not {name: {"bits": 2 to 8, "group_size": positive}}, ranks and removed that are none."""
    if not isinstance(removed, list) or not all(isinstance(name, str) for name in removed):
        raise InputError(f"quantization_config: field 'removed': expected a list of names, found {removed}; {MEND}")
    if not isinstance(layers, dict):
        raise InputError(f"quantization_config: field 'layers': expected an object; {MEND}")
    for name, record in layers.items():
        bits, group = (record.get("bits"), record.get("group_size")) if isinstance(record, dict) else (None, None)
        if type(bits) is not int or not 2 <= bits <= 8 or type(group) is not int or group < 1:
            raise InputError(
                f"quantization_config: layer {name!r}: expected bits of 2 to 8 and a positive group_size, "
                f"found {record}; {MEND}"
            )
        rank = record.get("rank", 1)
        if type(rank) is not int or rank < 1:
            raise InputError(f"quantization_config: layer {name!r}: rank is {rank!r}, expected 1 or more; {MEND}")


def _check_files(files: Sequence[str] | None, layers: Mapping[str, Any]) -> None:
    """Verify the folder that holds a component's weight files, and that its manifest lists each of them."""
    if not files:
        raise InputError(f"packed weights come from a folder with its {MANIFEST}; load them from there")
    component = Path(files[0]).parent
    folder = component if (component / MANIFEST).is_file() else component.parent
    if not layers and not (folder / MANIFEST).is_file():
        return  # a float folder that tells of removed blocks only
    # the other packed components are hashed when they are loaded, so that nothing is hashed twice
    listed = verify(folder, later=_packed_in(folder) - {component.name})["files"]
    for file in map(Path, files):
        if file.relative_to(folder).as_posix() not in listed:
            raise InputError(f"{file}: not listed in {folder / MANIFEST}, so it is not trusted; {MEND}")


def _packed_in(folder: Path) -> set[str]:
    """The packed components of a folder."""
    return {path.parent.name for path in folder.glob("*/config.json") if is_packed(_read(path))}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); {MEND}") from error
    return found if isinstance(found, dict) else {}


def _make_room(model: nn.Module, layers: Mapping[str, Mapping[str, int]], removed: Sequence[str]) -> None:
    """Take out removed blocks, and put empty packed layers in place of float ones, which hold no memory yet."""
    bypass(model, removed)
    modules = dict(model.named_modules())
    for name, record in layers.items():
        if name not in modules:
            raise InputError(f"quantization_config: layer {name!r} is not in {type(model).__name__}; {MEND}")
        parent, _, child = name.rpartition(".")
        rank = record.get("rank", 0)
        setattr(modules[parent], child, empty_packed(modules[name], record["bits"], record["group_size"], rank))


def _check_loaded(model: nn.Module) -> nn.Module:
    """Refuse a model of which the files left something empty; the libraries would only warn."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if empty := [name for name, tensor in tensors if tensor.is_meta]:
        raise InputError(f"{type(model).__name__}: tensor {empty[0]!r} is in no file of the packed folder; {MEND}")
    return model


def _halved(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.to(torch.float16) if t.is_floating_point() else t for n, t in state.items()}


def _config_class(base: Any) -> Any:
    """The config of packed weights on the mixin of one of the two libraries."""

    @dataclass
    class FitkitConfig(base):  # type: ignore[misc]
        quant_method: Any = Method.FITKIT
        layers: dict[str, dict[str, int]] = field(default_factory=dict)
        removed: list[str] = field(default_factory=list)

        def __post_init__(self) -> None:
            self.quant_method = Method.FITKIT
            _check_layers(self.layers, self.removed)

        def to_dict(self) -> dict[str, Any]:
            return quantization_config(self.layers, self.removed)

    return FitkitConfig


@cache
def diffusers_classes() -> tuple[Any, Any]:
    """The config and the quantizer of diffusers."""
    quantizer_base: Any = import_module("diffusers.quantizers.base").DiffusersQuantizer
    config = _config_class(import_module("diffusers.quantizers.quantization_config").QuantizationConfigMixin)

    class FitkitQuantizer(quantizer_base):  # type: ignore[misc]
        is_serializable, is_trainable = True, True

        def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
            _check_files(checkpoint_files, self.quantization_config.layers)
            return loaded_keys

        def _process_model_before_weight_loading(self, model: nn.Module, **rest: Any) -> None:
            _make_room(model, self.quantization_config.layers, self.quantization_config.removed)

        def _process_model_after_weight_loading(self, model: nn.Module, **rest: Any) -> nn.Module:
            return _check_loaded(model)

        def check_if_quantized_param(
            self, model: nn.Module, param_value: Tensor, param_name: str, *rest: Any, **more: Any
        ) -> bool:
            return param_name.endswith(_BUFFERS)

        def check_quantized_param_shape(self, param_name: str, current: Tensor, loaded: Tensor) -> bool:
            if current.shape != loaded.shape:
                raise InputError(
                    f"tensor {param_name!r}: shape {tuple(loaded.shape)}, expected {tuple(current.shape)}; {MEND}"
                )
            return True

        def create_quantized_param(
            self, model: nn.Module, param: Tensor, name: str, device: Any, state: Any, *rest: Any, **more: Any
        ) -> None:
            # as it is in the file: diffusers has cast `param` to the dtype asked for, and scales stay FP16
            owner, _, buffer = name.rpartition(".")
            model.get_submodule(owner).register_buffer(buffer, state[name].to(device))

        def get_state_dict_and_metadata(
            self, state_dict: dict[str, Tensor], safe_serialization: bool = False
        ) -> tuple[dict[str, Tensor], dict[str, Any]]:
            return _halved(state_dict), {}

    return config, FitkitQuantizer


@cache
def transformers_classes() -> tuple[Any, Any]:
    """The config and the quantizer of transformers."""
    quantizer_base: Any = import_module("transformers.quantizers.base").HfQuantizer
    config = _config_class(import_module("transformers.utils.quantization_config").QuantizationConfigMixin)

    class FitkitQuantizer(quantizer_base):  # type: ignore[misc]
        is_trainable = True

        def is_serializable(self) -> bool:
            return True

        def _process_model_before_weight_loading(
            self, model: nn.Module, checkpoint_files: list[str] | None = None, **rest: Any
        ) -> None:
            _check_files(checkpoint_files, self.quantization_config.layers)
            _make_room(model, self.quantization_config.layers, self.quantization_config.removed)

        def _process_model_after_weight_loading(self, model: nn.Module, **rest: Any) -> nn.Module:
            return _check_loaded(model)

        def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
            return _halved(model.state_dict()), {}

    return config, FitkitQuantizer
