"""The plan of peak memory of a generation: from a folder's configs alone, or from a model that is already loaded."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.hardware.live import LivePeak, live_peak
from core.hardware.memory_plan import PeakPlan, Phase, largest_expansion, resident_bytes, weight_bytes
from core.hardware.pages import give_back, is_weights, mappings
from core.kit import InputError
from core.pruning.bypass import bypass
from core.quantization.folding import replace_module
from core.quantization.packed import empty_packed, expand, packed_layers
from core.quantization.slices import SLICE, in_slices
from kits.mobile_diffusion.generate import Way
from kits.mobile_diffusion.model.pipeline import PARTS, Diffusion

SMALLEST_TILE = 16
"""Latent cells; below it what overlaps is more work than what a tile saves."""
_WORKING_CODE = 75_000_000
"""Bytes of program code that come back into memory in a run after `give_back`; measured on x86-64, torch 2.14."""
_SLACK = 15_000_000
"""Bytes of module objects, threads and small tensors that no trace shows; measured with SD-1.5's classes."""
_TOKENIZER = 9
"""Bytes in memory for a byte of a tokenizer's files; measured with CLIP's 49,408 entries."""


@dataclass(frozen=True)
class _Weights:
    """Bytes of a component: `held` in the process's own memory, `mapped` as pages of its file."""

    held: int
    mapped: int


def plan_generation(
    source: Diffusion | Path,
    *,
    size: tuple[int, int],
    guidance: float,
    batch: int = 1,
    shape: Diffusion | None = None,
) -> Iterator[PeakPlan[Way]]:
    """The ways to generate pictures of (height, width) pixels, `batch` at a time, the fastest first.

    Call it before the weights of `source`, a diffusers folder, are loaded: the process as it is then is the base of the
    plan. Of a model that is loaded only the pages of its files and the activations are counted, the rest is there.
    `shape` is the `skeleton` of the source, where it is at hand.
    """
    shape = shape or skeleton(source)
    packed = any(packed_layers(part) for part in _parts(shape).values())
    if isinstance(source, Diffusion):
        weights, beside, casting = {name: _weights(part) for name, part in _parts(source).items()}, _SLACK, 0
    else:
        weights = {name: _weights(part) for name, part in _parts(shape).items()}
        beside = _SLACK + _TOKENIZER * sum(file.stat().st_size for file in (source / "tokenizer").glob("*"))
        # float weights are cast while the pages of their file are in memory, a part at a time
        floats = [name for name, part in _parts(shape).items() if not packed_layers(part)]
        casting = max((_file_bytes(source / name) for name in floats), default=0)
    _import_what_runs(source)
    lean, base = _bases()
    reached = resident_bytes("VmHWM") or 0
    traces = _Traces(shape, size, batch)
    rows = 2 * batch if guidance > 1 and shape.unet.config.time_cond_proj_dim is None else batch
    can_expand = packed and isinstance(source, Path)
    for way in _ways(rows, size, shape, packed, can_expand):
        loading = Phase("loading", sum(w.held for w in weights.values()), casting)
        running = _expanded(shape, traces, way, rows) if way.expanded else _as_stored(weights, traces, way, rows)
        process = (lean if way.release else base) + beside
        yield PeakPlan(describe(way, packed), way, process, (loading, *running), reached)


def describe(way: Way, packed: bool) -> str:
    """A way in words."""
    words = ["expanded to float" if way.expanded else "packed" if packed else "as loaded"]
    if way.rows is not None:
        words.append(f"UNet {way.rows} row{'' if way.rows == 1 else 's'} at a time")
    if way.tile is not None:
        words.append(f"VAE in tiles of {way.tile}")
    if way.slices is not None:
        words.append("weights in slices")
    if way.release:
        words.append("pages given back between parts")
    return ", ".join(words)


def skeleton(source: Diffusion | Path) -> Diffusion:
    """The same modules on the meta device, packed layers and removed blocks included; the source is unchanged."""
    if isinstance(source, Diffusion):
        parts: dict[str, Any] = {name: _to_meta(getattr(source, name)) for name in PARTS}
    else:
        parts = {name: _from_config(source / name / "config.json", name) for name in PARTS}
    return Diffusion(**parts, tokenizer=None, scheduler=None).eval()


def _file_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _from_config(path: Path, name: str) -> Any:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    if not path.is_file():
        raise InputError(f"{path}: missing; give a diffusers folder with text_encoder, unet and vae")
    config = json.loads(path.read_text(encoding="utf-8"))
    ours = config.pop("quantization_config", {})
    with torch.device("meta"):
        if name == "text_encoder":
            part: Any = CLIPTextModel(CLIPTextConfig(**config))
        else:
            part = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[name].from_config(config)
    bypass(part, ours.get("removed", ()))
    for layer, record in ours.get("layers", {}).items():
        module = part.get_submodule(layer)
        replace_module(part, module, empty_packed(module, record["bits"], record["group_size"], record.get("rank", 0)))
    return part


def _to_meta(part: nn.Module) -> nn.Module:
    """A copy without data: the copy finds every tensor already copied, to its like on the meta device."""
    like: dict[int, Any] = {}
    for tensor in (*part.parameters(), *part.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        like[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(part, like)


def _parts(model: Diffusion) -> dict[str, nn.Module]:
    return {name: getattr(model, name) for name in PARTS}


def _weights(part: nn.Module) -> _Weights:
    """Packed buffers stay pages of their file; what is float is cast to FP32 while it is loaded.

    Of a part that is loaded, what is not pages of a file is in memory already and counts as nothing.
    """
    layers = packed_layers(part).values()
    if next(part.parameters()).is_meta:
        mapped = sum(layer.weight_bytes for layer in layers)
        return _Weights(weight_bytes(part) - mapped, mapped)
    files = [(m.start, m.end) for m in mappings() if is_weights(m)]
    buffers = [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
    shown = (b.nbytes for b in buffers if any(start <= b.data_ptr() < end for start, end in files))
    return _Weights(0, sum(shown))


def _import_what_runs(source: Diffusion | Path) -> None:
    """Import now what a run imports later, so that it is in the base: libraries take more memory than a small model."""
    import diffusers
    from diffusers import StableDiffusionPipeline  # noqa: F401
    from transformers import CLIPTokenizer  # noqa: F401

    if isinstance(source, Path) and (source / "model_index.json").is_file():
        index = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
        getattr(diffusers, str(index.get("scheduler", ["", ""])[1]), None)


def _bases() -> tuple[int, int]:
    """Bytes of this process in a run without its weights' pages: where pages are given back, and where not."""
    base = resident_bytes() or 0
    given = give_back()
    shown = sum(m.resident for m in mappings() if is_weights(m))
    return base - given + _WORKING_CODE - shown, base - shown


def _ways(rows: int, size: tuple[int, int], shape: Diffusion, packed: bool, can_expand: bool) -> Iterator[Way]:
    factor = 2 ** (len(shape.vae.config.block_out_channels) - 1)
    side = max(size) // factor
    tiles: list[int | None] = [None]
    while side // 2 >= SMALLEST_TILE:
        side //= 2
        tiles.append(side)
    row_counts: list[int | None] = [None]
    while rows > 1:
        rows = -(-rows // 2)
        row_counts.append(rows)
    for expanded in (True, False) if can_expand else (False,):
        slices = SLICE if packed and not expanded else None
        # slices, tiles and pages that come back cost little time, fewer rows some
        for release in (False, True):
            for tile in tiles:
                yield Way(tile=tile, slices=slices if release else None, release=release, expanded=expanded)
        for row_count in row_counts[1:]:
            for tile in tiles:
                yield Way(rows=row_count, tile=tile, slices=slices, release=True, expanded=expanded)


class _Traces:
    """The activations of every part, traced once for each number of rows or side of a tile."""

    def __init__(self, shape: Diffusion, size: tuple[int, int], batch: int) -> None:
        self._shape, self._size, self._batch = shape, size, batch
        self._floats: Diffusion | None = None
        self._known: dict[tuple[Any, ...], LivePeak] = {}

    def _model(self, expanded: bool) -> Diffusion:
        if not expanded:
            return self._shape
        if self._floats is None:
            self._floats = expanded_skeleton(self._shape)
        return self._floats

    def all(self, way: Way, rows: int) -> dict[str, LivePeak]:
        """The peak of every part, in the order in which they run, with so many rows in a batch."""
        return {"text_encoder": self.text(way), "unet": self.unet(way.rows or rows, way), "vae": self.vae(way)}

    def text(self, way: Way) -> LivePeak:
        encoder: Any = self._model(way.expanded).text_encoder
        ids = torch.zeros(self._batch, encoder.config.max_position_embeddings, dtype=torch.long, device="meta")
        return self._trace(("text",), encoder, lambda: encoder(ids), way)

    def unet(self, rows: int, way: Way) -> LivePeak:
        model = self._model(way.expanded)
        unet: Any = model.unet
        height, width = (side // self._factor for side in self._size)
        config = unet.config
        dims = config.encoder_hid_dim or config.cross_attention_dim
        length = model.text_encoder.config.max_position_embeddings
        text = _meta(rows, length, dims if isinstance(dims, int) else dims[0])
        guided = config.time_cond_proj_dim
        condition = None if guided is None else _meta(rows, guided)
        latents, time = _meta(rows, config.in_channels, height, width), _meta(rows)

        def run() -> Any:
            return unet(latents, time, encoder_hidden_states=text, timestep_cond=condition, return_dict=False)

        return self._trace(("unet", rows), unet, run, way)

    def vae(self, way: Way) -> LivePeak:
        vae: Any = self._model(way.expanded).vae
        tile = way.tile
        height, width = (side // self._factor for side in self._size)
        latents = _meta(1, vae.config.latent_channels, min(height, tile or height), min(width, tile or width))
        peak = self._trace(("vae", tile), vae, lambda: vae.decode(latents, return_dict=False), way)
        whole = 4 * 3 * self._size[0] * self._size[1]  # tiles, rows of tiles, and the picture
        return replace(peak, bytes=peak.bytes + 3 * whole) if tile else peak

    def _trace(self, key: tuple[Any, ...], part: nn.Module, run: Any, way: Way) -> LivePeak:
        """`key` but for the slices, which are told apart only where a layer is large enough to be cut."""
        cut = way.slices if way.slices is not None and largest_expansion(part)[0] > way.slices else None
        key = (*key, cut, way.expanded)
        if key not in self._known:
            with nullcontext() if cut is None else in_slices(part, cut):
                self._known[key] = live_peak(part, run)
        return self._known[key]

    @property
    def _factor(self) -> int:
        return 2 ** (len(self._shape.vae.config.block_out_channels) - 1)


def expanded_skeleton(shape: Diffusion) -> Diffusion:
    """A copy of a skeleton with float layers in place of the packed ones."""
    parts: dict[str, Any] = {name: expand(_to_meta(part)) for name, part in _parts(shape).items()}
    return Diffusion(**parts, tokenizer=None, scheduler=None)


def _as_stored(weights: dict[str, _Weights], traces: _Traces, way: Way, rows: int) -> Iterator[Phase]:
    held = sum(w.held for w in weights.values())
    touched = 0
    for name, peak in traces.all(way, rows).items():
        # a part's pages come into memory as it runs, and stay unless they are given back
        touched = weights[name].mapped + (0 if way.release else touched)
        yield Phase(name, held + touched, peak.bytes, f"{name}.{peak.at}")


def _expanded(shape: Diffusion, traces: _Traces, way: Way, rows: int) -> Iterator[Phase]:
    floats = sum(weight_bytes(part) for part in _parts(expanded_skeleton(shape)).values())
    stored = sum(_weights(part).mapped for part in _parts(shape).values())
    yield Phase("expanding", floats + stored, 0)
    for name, peak in traces.all(way, rows).items():
        yield Phase(name, floats, peak.bytes, f"{name}.{peak.at}")


def _meta(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")
