"""A Stable Diffusion as one module: text encoder, UNet and VAE, with the tokenizer and the scheduler beside them."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import core  # noqa: F401  diffusers and transformers then know packed folders
from core.export.diffusers_quantizer import save_packed
from core.files import read_object, write_text, writing
from core.kit import InputError
from core.quantization.packed import packed_layers

# The parts that hold weights, in the order in which diffusers' own classes run them, and their classes.
PARTS = {"text_encoder": "CLIPTextModel", "unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
SAMPLING = "sampling.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_COPY = "copy the folder anew"
_ONLY = "expected Stable Diffusion 1.x or 2.x (SD-1.4, 1.5, 2.1, BK-SDM, LCM, Turbo)"


@dataclass(frozen=True)
class Sampling:
    """How many steps a model is sampled with, and with which guidance scale (1: without, one forward a step).

    A model whose time embeddings were precomputed (`times.FixTimes`) is `fixed`: it knows no other number of steps.
    """

    steps: int = 25
    guidance: float = 7.5
    fixed: bool = False

    def check(self, steps: int) -> None:
        """InputError where a model cannot take so many steps."""
        if self.fixed and steps != self.steps:
            raise InputError(
                f"steps: {steps}, but this model's time embeddings were precomputed for {self.steps} steps; "
                f"use --steps {self.steps}, or a variant without such a table"
            )


class Diffusion(nn.Module):
    """A latent text-to-image model of diffusers' classes.

    `text_encoder` (CLIPTextModel), `unet` (UNet2DConditionModel) and `vae` (AutoencoderKL) are its children,
    `tokenizer` (CLIPTokenizer) and `scheduler` plain attributes. `sampling` says how pictures are to be made
    with it; its guidance scale is also told to a UNet that takes one as an input (LCM's `time_cond_proj_dim`).
    """

    def __init__(
        self, text_encoder: Any, unet: Any, vae: Any, tokenizer: Any, scheduler: Any, sampling: Sampling | None = None
    ) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet
        self.vae = vae
        self.tokenizer = tokenizer
        self.scheduler = scheduler
        self.sampling = sampling or Sampling()

    @property
    def pixels(self) -> int:
        """The side of the pictures that it is made for, in pixels."""
        return int(self.unet.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1))

    def forward(
        self, latents: Tensor, timesteps: Tensor, token_ids: Tensor, clean: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The UNet's prediction (N, C, h, w) for noisy latents (N, C, h, w), timesteps (N,) and token ids (N, L).

        With `clean` latents (M, C, h', w'), as a sampler ends with, also the picture (M, 3, H, W) that the VAE makes
        of them: every layer that takes part in generating has then run.
        """
        prediction = self.predict(latents, timesteps, self.encode(token_ids))
        if clean is None:
            return prediction
        return prediction, self.vae.decode(clean / self.vae.config.scaling_factor, return_dict=False)[0]

    def encode(self, token_ids: Tensor) -> Tensor:
        """The text encoder's last hidden states (N, L, D) of token ids (N, L)."""
        return self.text_encoder(token_ids)[0]

    def predict(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """The UNet's prediction (N, C, h, w) for latents, timesteps (N,) and the text's hidden states (N, L, D)."""
        return unet_prediction(self.unet, latents, timesteps, text, self.sampling.guidance)

    def tokens(self, prompts: list[str]) -> Tensor:
        """Token ids (N, L) of prompts, cut and padded to the tokenizer's length as diffusers does."""
        length = self.tokenizer.model_max_length
        found = self.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return found.input_ids

    def save(self, folder: Path) -> None:
        """Write a folder for `load_diffusion`: packed where layers are packed, else as it is; see `save_diffusion`."""
        if not packed_layers(self):
            save_diffusion(self, folder, self.unet.dtype)
            return
        with _no_bars():
            save_packed(self.pipeline(), folder, texts={SAMPLING: json.dumps(asdict(self.sampling)) + "\n"})

    def pipeline(self) -> Any:
        """A diffusers StableDiffusionPipeline that shares these modules, without a safety checker."""
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def unet_prediction(unet: Any, latents: Tensor, timesteps: Tensor, text: Tensor, guidance: float) -> Tensor:
    """A UNet's prediction (N, C, h, w); `guidance` is told to a UNet that takes it as an input, and to no other."""
    width = unet.config.time_cond_proj_dim
    condition = None
    if width is not None:
        condition = guidance_embedding(torch.full((len(latents),), guidance - 1.0), width).to(latents)
    return unet(latents, timesteps, encoder_hidden_states=text, timestep_cond=condition, return_dict=False)[0]


def guidance_embedding(scale: Tensor, width: int) -> Tensor:
    """The sinusoidal embedding (N, width) of guidance scales minus one (N,), as LCM's UNet takes it."""
    half = width // 2
    rates = torch.exp(torch.arange(half) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = 1000.0 * scale[:, None] * rates[None, :]
    found = torch.cat([angles.sin(), angles.cos()], dim=1)
    return nn.functional.pad(found, (0, width % 2))


def load_diffusion(folder_or_id: str | Path, dtype: torch.dtype = torch.float32) -> Diffusion:
    """Load a diffusers folder, or a model of the hub by its id, in eval mode; only a hub id is looked for elsewhere.

    Weights are taken from safetensors files, those of a variant ("fp16") where there are no others. Raises
    InputError in one line for a wrong folder, a missing component, or another architecture.
    """
    folder = _folder(folder_or_id)
    index = _index(folder)
    others = {"scheduler": _scheduler(folder, index), "tokenizer": _tokenizer(folder), "sampling": _sampling(folder)}
    with _no_bars():
        parts = {name: _part(folder, name, dtype) for name in PARTS}
    model = Diffusion(**parts, **others)
    _check_widths(folder, model)
    return model.eval()


def save_diffusion(model: Diffusion, folder: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """Write a diffusers folder with float weights of a dtype, whole or not at all; the model is unchanged.

    A folder that is there is replaced if it is empty or a diffusers pipeline, and refused otherwise. Blocks
    that were removed are noted in the config (see `core.pruning.bypass`). Raises InputError for a folder that
    holds something else, for a packed model and for a full disk.
    """
    folder = Path(folder)
    for name in PARTS:
        if packed := [n for n, _ in getattr(model, name).named_buffers() if n.endswith("weight_packed")]:
            raise InputError(f"{name}.{packed[0]} is packed; write a packed folder instead, or expand the model first")
    with building(folder) as stage:
        for name in PARTS:
            save_part(getattr(model, name), stage / name, dtype)
        save_rest(model.tokenizer, model.scheduler, model.sampling, stage)


def save_part(part: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write one component with weights of a dtype in safetensors, and the names of its removed blocks in its config."""
    from core.pruning.bypass import bypassed

    there = {p.dtype for p in part.parameters()} == {dtype}
    plain = part if there else copy.deepcopy(part).to(dtype)  # no second copy of a full-size UNet
    with _no_bars():
        plain.save_pretrained(folder, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)  # what the folder said from which this part was loaded
    if removed := bypassed(plain):
        config["quantization_config"] = {"quant_method": "fitkit", "layers": {}, "removed": removed}
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_rest(tokenizer: Any, scheduler: Any, sampling: Sampling, folder: Path) -> None:
    """Write tokenizer, scheduler, `model_index.json` and `sampling.json` of a folder beside its components."""
    import diffusers

    tokenizer.save_pretrained(folder / "tokenizer")
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", type(scheduler).__name__],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_text(folder / "model_index.json", json.dumps(index, indent=2) + "\n")
    write_text(folder / SAMPLING, json.dumps(asdict(sampling)) + "\n")


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """A folder beside the wanted one, which takes its place at the end."""
    folder = Path(os.path.abspath(folder))
    if folder.exists() and not (
        folder.is_dir() and (not any(folder.iterdir()) or (folder / "model_index.json").is_file())
    ):
        raise InputError(f"{folder}: exists and is no diffusers folder, so it is not replaced; choose another folder")
    stage, aside = folder.with_name(f".{folder.name}.saving"), folder.with_name(f".{folder.name}.old")
    for left in (stage, aside):
        shutil.rmtree(left, ignore_errors=True)
    try:
        with writing(folder):
            stage.mkdir(parents=True)
            yield stage
            if folder.exists():
                os.replace(folder, aside)
            os.replace(stage, folder)
    finally:
        for left in (stage, aside):
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the bars that transformers and diffusers show while they read and write a file."""
    from diffusers.utils import logging as others
    from transformers.utils import logging

    shown = [library for library in (logging, others) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def _folder(folder_or_id: str | Path) -> Path:
    path = Path(folder_or_id)
    if path.is_dir():
        return path
    if path.is_file():
        raise InputError(
            f"{path}: a single file, expected a diffusers folder; write one with "
            f"StableDiffusionPipeline.from_single_file(file).save_pretrained(folder)"
        )
    if isinstance(folder_or_id, Path) or not _HUB_ID.fullmatch(str(folder_or_id)):
        raise InputError(f"{folder_or_id}: no such folder; give a diffusers folder, or a hub id like owner/name")
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(str(folder_or_id), use_safetensors=True))
    except Exception as error:  # noqa: BLE001  the hub's clients raise types of their own
        why = _line(error)
        raise InputError(
            f"{folder_or_id}: no such folder, and not had from the hub ({why}); give a folder, or go online"
        ) from error


def _index(folder: Path) -> dict[str, Any]:
    path = folder / "model_index.json"
    if not path.is_file():
        raise InputError(
            f"{folder}: model_index.json is missing; give the folder that a diffusers pipeline was saved to"
        )
    index = read_object(path, _COPY)
    kind = index.get("_class_name")
    for name in ("text_encoder_2", "text_encoder_3", "transformer", "prior", "controlnet"):
        if _listed(index, name) or (folder / name).is_dir():
            raise InputError(f"{folder}: a {kind} with a {name}; {_ONLY}")
    for name in (*PARTS, "tokenizer", "scheduler"):
        if not _listed(index, name) or not (folder / name).is_dir():
            raise InputError(f"{folder}: component {name!r} is missing (a {kind}); {_ONLY}, with all its parts")
        found = index[name][1]
        wanted = PARTS.get(name)
        if wanted is not None and found != wanted:
            raise InputError(f"{path}: {name} is a {found}, expected {wanted}; {_ONLY}")
    return index


def _listed(index: dict[str, Any], name: str) -> bool:
    entry = index.get(name)
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None


def _scheduler(folder: Path, index: dict[str, Any]) -> Any:
    import diffusers

    name = str(index["scheduler"][1])
    cls = getattr(diffusers, name, None) if name.isidentifier() else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
        raise InputError(f"{folder / 'model_index.json'}: scheduler {name!r} is none of diffusers' schedulers")
    read_object(folder / "scheduler" / "scheduler_config.json", _COPY)
    return cls.from_pretrained(folder / "scheduler", local_files_only=True)


def _sampling(folder: Path) -> Sampling:
    """What `sampling.json` says; where there is none, the defaults of diffusers."""
    path = folder / SAMPLING
    if not path.exists():
        return Sampling()
    data = read_object(path, _COPY)
    steps, guidance = data.get("steps"), data.get("guidance")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise InputError(f"{path}: steps is {steps!r}, expected a whole number from 1")
    if not isinstance(guidance, (int, float)) or isinstance(guidance, bool) or not 0 <= guidance < 100:
        raise InputError(f"{path}: guidance is {guidance!r}, expected a number from 0 to 100")
    fixed = data.get("fixed", False)
    if not isinstance(fixed, bool):
        raise InputError(f"{path}: fixed is {fixed!r}, expected true or false")
    return Sampling(steps, float(guidance), fixed)


def _tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{folder / 'tokenizer'}: no CLIP tokenizer ({_line(error)}); copy the folder anew") from error


def _part(folder: Path, name: str, dtype: torch.dtype) -> Any:
    import diffusers
    import transformers

    place, kind = folder / name, PARTS[name]
    config = read_object(place / "config.json", _COPY)
    found = config.get("_class_name") or (config.get("architectures") or [kind])[0]
    if found != kind:
        raise InputError(f"{place / 'config.json'}: a {found}, expected {kind}; {_ONLY}")
    cls = getattr(diffusers if hasattr(diffusers, kind) else transformers, kind)
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    options["dtype" if cls.__module__.startswith("transformers") else "torch_dtype"] = dtype
    if variant := _variant(place):
        options["variant"] = variant
    try:
        part, info = cls.from_pretrained(place, **options)
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise InputError(f"{place}: cannot be loaded as a {kind} ({_line(error)}); copy the folder anew") from error
    if missing := sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{place}: tensor {missing[0]!r}{more} missing or of another shape; copy the folder anew")
    return part


def _variant(place: Path) -> str | None:
    """None where there are plain safetensors files, else the variant of those that are there ("fp16")."""
    names = sorted(path.name for path in place.iterdir())
    stems = [n.removesuffix(".index.json").removesuffix(".safetensors") for n in names if ".safetensors" in n]
    if any(re.fullmatch(r"(diffusion_pytorch_)?model(-\d+-of-\d+)?", stem) for stem in stems):
        return None
    for stem in stems:
        if match := re.fullmatch(r"(?:diffusion_pytorch_)?model\.(\w+)(?:-\d+-of-\d+)?", stem):
            return match[1]
    if any(n.endswith((".bin", ".ckpt", ".pt")) for n in names):
        raise InputError(
            f"{place}: weights are pickled (.bin) and are not read, since a pickle can run code; save the pipeline "
            f"again where you trust it: pipeline.save_pretrained(folder, safe_serialization=True)"
        )
    raise InputError(f"{place}: no weights here (*.safetensors); copy the folder anew")


def _check_widths(folder: Path, model: Diffusion) -> None:
    unet, text, vae = model.unet.config, model.text_encoder.config, model.vae.config
    if unet.addition_embed_type is not None:
        raise InputError(f"{folder / 'unet'}: addition_embed_type {unet.addition_embed_type!r}, as SDXL has; {_ONLY}")
    if unet.in_channels != vae.latent_channels:
        raise InputError(
            f"{folder / 'unet'}: takes {unet.in_channels} channels where the VAE gives {vae.latent_channels}, as "
            f"models for inpainting do; expected a text-to-image model"
        )
    dims = unet.cross_attention_dim
    for dim in (dims,) if isinstance(dims, int) else dims:
        if unet.encoder_hid_dim is None and dim != text.hidden_size:
            raise InputError(
                f"{folder / 'unet'}: cross_attention_dim {dim}, but the text encoder gives {text.hidden_size}; "
                f"the two are not of one model"
            )


def _line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
