"""How the embedded default is trained: the autoencoder first, then the UNet and the text encoder on its latents."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from core.files import writing
from core.kit import InputError
from core.train import Schedule
from kits.mobile_diffusion.data import scenes
from kits.mobile_diffusion.data.backgrounds import BACKGROUNDS
from kits.mobile_diffusion.data.captions import calibration_prompts, parse
from kits.mobile_diffusion.data.default import samples
from kits.mobile_diffusion.data.scenes import RELATIONS
from kits.mobile_diffusion.data.sprites import COLOURS, SHAPES
from kits.mobile_diffusion.generate import generate
from kits.mobile_diffusion.legs import Look, Ramps, train_legs
from kits.mobile_diffusion.model.default import SAMPLING, make_default, make_vae
from kits.mobile_diffusion.model.pipeline import Diffusion, save_diffusion

Source = Callable[[int, int], tuple[NDArray[np.uint8], list[str]]]
"""Seed and number to pictures (N, H, W, 3) uint8 RGB and their captions; the same for the same seed."""

SQUARED, EDGES = 4.0, 0.5
"""Weights of the squared error and of the edges' absolute error beside the pixels' absolute error.

The absolute error alone leaves small things grey for long: it pulls no harder where a colour is far off.
"""
CHROMA = 2.5
"""Weight of colour beside brightness: a tenth of the pictures' variance, and what tells most things apart."""
KL = 2e-5
"""Weight of the mean divergence of a latent from N(0, 1): enough for smooth latents, far from blurred pictures."""
BLURRED = 0.3
"""Largest noise, in standard deviations of the latents, that the decoder learns to see through: a UNet leaves some."""
TILT = 2.0
"""Power by which noise levels are denser towards pure noise (1: evenly spread)."""
TAUGHT = (*scenes.KINDS, "size", "size", "relation", "two")
"""Kinds of scenes in training: what is learnt last comes more often."""
READ = 0.1
"""Weight of what the text encoder should know beside the error of v."""
DROPPED = 0.1
"""Share of captions that are left out, so that the UNet knows a prediction without a prompt for guidance."""


@dataclass(frozen=True)
class Plan:
    """Sizes and schedules: the legs of the autoencoder's training, of its decoder's alone, and of the UNet's.

    An epoch has `vae_steps` or `steps` steps. `chunk` is the number of pictures that are encoded together (`normal`:
    of those whose latents are set to mean 0 and standard deviation 1); training
    starts on `first` chunks, draws from the newest `window`, and another is made every `renew` epochs. Every `show`
    epochs there is a sheet of samples (0: never).
    """

    vae: tuple[Ramps, ...]
    decoder: tuple[Ramps, ...]
    vae_steps: int
    unet: tuple[Ramps, ...]
    steps: int
    chunk: int = 2048
    normal: int = 512
    first: int = 6
    window: int = 24
    renew: int = 3
    show: int = 6


_VAE = Ramps(epochs=60, batch_size=8, lr=1.2e-3, clip=1.0, up=50, down=800, seed=1)
_UNET = Ramps(epochs=104, batch_size=64, lr=8e-4, weight_decay=0.01, ema=0.999, clip=1.0, up=200, seed=2)

PLANS = {
    "full": Plan(
        vae=(
            _VAE,
            replace(_VAE, epochs=40, lr=4e-4, up=20, down=1600, seed=11),
            replace(_VAE, epochs=48, batch_size=16, lr=8e-4, down=2400, seed=13),
        ),
        decoder=(replace(_VAE, epochs=16, batch_size=16, lr=6e-4, up=20, down=800, seed=12),),
        vae_steps=50,
        unet=(_UNET, replace(_UNET, epochs=22, up=20, down=2200, ema=0.998, seed=7)),
        steps=100,
    ),
    "smoke": Plan(
        vae=(Ramps(epochs=1, batch_size=8, lr=2e-3, clip=1.0, up=2, down=8, seed=1),),
        decoder=(),
        vae_steps=10,
        unet=(
            Ramps(epochs=1, batch_size=16, lr=1e-3, ema=0.9, clip=1.0, up=2, seed=2),
            Ramps(epochs=1, batch_size=16, lr=1e-3, ema=0.9, clip=1.0, up=2, down=8, seed=3),
        ),
        steps=10, chunk=64, normal=64, first=1, window=2, renew=1, show=0,
    ),
}  # fmt: skip


def train_default(out: Path, preset: str, resume: bool, data: Path | None = None) -> Diffusion:
    """Train the default model on generated scenes, or on a folder of captioned pictures, and save it in FP16.

    Leaves the diffusers folder `out`/model and all checkpoints in `out`/training. A file `out`/training/next ends the
    leg of the training that runs, after its current epoch. Raises InputError for an unknown preset.
    """
    if preset not in PLANS:
        raise InputError(f"preset {preset!r} is not known; known are {', '.join(PLANS)}")
    return train(PLANS[preset], taught if data is None else folder_source(data), out, resume)


def taught(seed: int, n: int) -> tuple[NDArray[np.uint8], list[str]]:
    """Generated scenes of training compositions, in the shares of TAUGHT."""
    return scenes.batch(seed, n, kinds=TAUGHT)


def folder_source(data: Path) -> Source:
    """Pictures drawn at random, with replacement, from the training split of a folder (see `data.default.samples`)."""
    chosen = samples(data, "train", "full", scenes.SIZE)

    def source(seed: int, n: int) -> tuple[NDArray[np.uint8], list[str]]:
        drawn = [chosen[int(i)] for i in np.random.default_rng(seed).integers(len(chosen), size=n)]
        return np.stack([pair.picture() for pair in drawn]), [pair.text for pair in drawn]

    return source


def train(plan: Plan, source: Source, out: Path, resume: bool) -> Diffusion:
    """The trainings of a plan, one after the other; see `train_default`."""
    folder = out / "training"
    vae = train_vae(source, plan, folder, resume)
    model = make_default(folder / "tokenizer", plan.unet[0].seed)
    train_decoder(vae, source, plan, folder, resume)
    latents = Latents(source, vae, model, plan, folder / "latents", resume)
    train_unet(model, latents, plan, vae, folder, resume)
    save_diffusion(model.eval(), out / "model", torch.float16)
    return model


def _pictures(source: Source, plan: Plan, folder: Path) -> tuple[Callable[[int, Ramps], Iterator[Tensor]], Look]:
    def batches(epoch: int, leg: Ramps) -> Iterator[Tensor]:
        for step in range(plan.vae_steps):
            yield to_pixels(source((leg.seed * 1_000 + epoch) * 100_000 + step, leg.batch_size)[0])

    def look(epoch: int, model: nn.Module) -> None:
        if plan.show and epoch % plan.show == 0:
            show_reconstructions(model, source, folder / "reconstructions.png")

    return batches, look


def train_decoder(vae: Any, source: Source, plan: Plan, folder: Path, resume: bool) -> None:
    """Train the decoder on: pictures get sharper while the latents, and so the UNet's work, stay what they are."""
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)
    batches, look = _pictures(source, plan, folder)
    train_legs(vae, plan.decoder, plan.vae_steps, folder / "decoder", batches, decoding_loss, look, resume)
    vae.requires_grad_(True)


def to_pixels(images: NDArray[np.uint8]) -> Tensor:
    """Pictures (N, H, W, 3) uint8 as float (N, 3, H, W) in -1..1, as the autoencoder takes them."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1.0


def reconstruction_loss(vae: Any, pixels: Tensor) -> Tensor:
    """Error of what comes back (see `picture_loss`) and a little KL, for pixels (N, 3, H, W) in -1..1."""
    with low_precision(pixels):
        seen = vae.encode(pixels).latent_dist
        drawn = vae.decode(seen.sample()).sample
    divergence = 0.5 * (seen.mean.float().square() + seen.logvar.float().exp() - 1.0 - seen.logvar.float()).mean()
    return picture_loss(drawn, pixels) + KL * divergence


def decoding_loss(vae: Any, pixels: Tensor) -> Tensor:
    """Error of what the decoder makes of latents with up to BLURRED noise, for pixels (N, 3, H, W) in -1..1."""
    with low_precision(pixels):
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.mean
        noise = BLURRED * torch.rand(len(pixels), 1, 1, 1, device=pixels.device) * torch.randn_like(latents)
        drawn = vae.decode(latents + noise).sample
    return picture_loss(drawn, pixels)


def picture_loss(drawn: Tensor, pixels: Tensor) -> Tensor:
    """Absolute and squared error of pixels (N, 3, H, W) in -1..1 and absolute error of their edges."""
    error = coloured(drawn.float() - pixels)
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + SQUARED * error.square().mean() + EDGES * edges


def coloured(pixels: Tensor) -> Tensor:
    """RGB (N, 3, H, W) as brightness and the three channels' differences from it, those weighted by CHROMA."""
    brightness = pixels.mean(1, keepdim=True)
    return torch.cat([brightness, CHROMA * (pixels - brightness)], dim=1)


def low_precision(like: Tensor) -> torch.autocast:
    """Autocast to BF16 on the device of a tensor: a third less time a step where AVX-512 has it."""
    return torch.autocast(like.device.type, torch.bfloat16)


def train_vae(source: Source, plan: Plan, folder: Path, resume: bool) -> Any:
    """Train the autoencoder; its latents come out with mean 0 and standard deviation 1, so `scaling_factor` is 1."""
    torch.manual_seed(plan.vae[0].seed)
    vae = make_vae()

    batches, look = _pictures(source, plan, folder)
    train_legs(vae, plan.vae, plan.vae_steps, folder / "vae", batches, reconstruction_loss, look, resume)
    normalise(vae, to_pixels(source(plan.vae[0].seed * 7_919, plan.normal)[0]))
    return vae


@torch.no_grad()
def show_reconstructions(vae: Any, source: Source, path: Path) -> None:
    """Write a sheet of pictures and, below each, what the autoencoder makes of it."""
    from PIL import Image

    images = source(7, 24)[0]
    drawn = vae.decode(vae.encode(to_pixels(images)).latent_dist.mean).sample
    both = np.stack([images, to_images(drawn)])
    rows = both.reshape(2, 2, 12, *images.shape[1:]).transpose(1, 0, 3, 2, 4, 5)
    Image.fromarray(rows.reshape(-1, 12 * images.shape[2], 3)).save(path)


def to_images(pixels: Tensor) -> NDArray[np.uint8]:
    """Pixels (N, 3, H, W) in -1..1 as pictures (N, H, W, 3) uint8."""
    scaled = (pixels.float().clamp(-1, 1) + 1.0) * 127.5
    return np.ascontiguousarray(scaled.round().byte().permute(0, 2, 3, 1).cpu().numpy())


@torch.no_grad()
def normalise(vae: Any, pixels: Tensor) -> None:
    """Fold each latent channel's mean and standard deviation over pixels (N, 3, H, W) into the 1x1 convolutions.

    Pictures are decoded as before. One `scaling_factor` would leave the channels as unlike as they are.
    """
    means = torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(64)])
    mean, std = means.mean((0, 2, 3)), means.std((0, 2, 3))
    inward, outward, n = vae.quant_conv, vae.post_quant_conv, len(mean)
    inward.weight[:n] /= std[:, None, None, None]
    inward.bias[:n] = (inward.bias[:n] - mean) / std
    inward.bias[n:] -= 2 * std.log()  # the logarithm of a variance
    outward.bias += outward.weight[:, :, 0, 0] @ mean
    outward.weight *= std[None, :, None, None]


class Latents:
    """Chunks of encoded pictures and token ids, each made once, from its own seed, and kept in a file."""

    def __init__(self, source: Source, vae: Any, model: Diffusion, plan: Plan, folder: Path, resume: bool) -> None:
        self._source, self._vae, self._plan, self._folder = source, vae, plan, folder
        self._tokens = model.tokens
        self._chunks: dict[int, tuple[Tensor, Tensor]] = {}
        if not resume:
            for old in folder.glob("*.safetensors"):
                old.unlink()

    def batches(self, epoch: int, schedule: Schedule) -> Iterator[tuple[Tensor, Tensor]]:
        """An epoch's batches: latents (N, C, h, w) and token ids (N, L), drawn from the newest chunks."""
        newest = self._plan.first + epoch // self._plan.renew
        used = range(max(0, newest - self._plan.window), newest)
        self._chunks = {index: self._chunks.get(index) or self._chunk(index) for index in used}
        latents, ids = (torch.cat(parts) for parts in zip(*self._chunks.values(), strict=True))
        generator = torch.Generator().manual_seed(schedule.seed * 100_003 + epoch)
        while True:
            for picked in torch.randperm(len(latents), generator=generator).split(schedule.batch_size):
                if len(picked) == schedule.batch_size:
                    yield latents[picked].float(), ids[picked]

    @torch.no_grad()
    def _chunk(self, index: int) -> tuple[Tensor, Tensor]:
        path = self._folder / f"{index:05d}.safetensors"
        if not path.exists():
            images, captions = self._source(10_000_019 + index, self._plan.chunk)
            parts = []
            for part in to_pixels(images).split(64):
                with low_precision(part):
                    parts.append(self._vae.encode(part).latent_dist.mean.half())
            fresh = path.with_suffix(f".{os.getpid()}")  # several processes may make the same chunk
            path.parent.mkdir(parents=True, exist_ok=True)
            with writing(path):
                save_file({"latents": torch.cat(parts), "ids": self._tokens(captions)}, str(fresh))
                os.replace(fresh, path)
        found = load_file(path)
        return found["latents"], found["ids"]


def train_unet(model: Diffusion, latents: Latents, plan: Plan, vae: Any, folder: Path, resume: bool) -> None:
    """Train UNet and text encoder in place on the latents of `vae`; the model's own VAE has no part in it."""

    def look(epoch: int, average: nn.Module) -> None:
        if plan.show and epoch % plan.show == 0:
            show(average, vae, folder / "samples" / f"{epoch:04d}.png")

    model.vae = nn.Identity()  # not trained here, and in no checkpoint of the UNet
    with plain_attention(model):
        train_legs(model, plan.unet, plan.steps, folder / "unet", latents.batches, NoiseLoss(model), look, resume)
    model.vae = vae


@contextmanager
def plain_attention(model: Diffusion) -> Iterator[None]:
    """Attention as two products and a softmax: 0.7 against 1.3 s of one core a step of 64.

    For 64 places and 24 words the backward pass of torch's fused attention takes longer than all convolutions.
    """
    from diffusers.models.attention_processor import AttnProcessor

    before, text = model.unet.attn_processors, model.text_encoder.config._attn_implementation
    model.unet.set_attn_processor(AttnProcessor())
    model.text_encoder.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.unet.set_attn_processor(before)
        model.text_encoder.set_attn_implementation(text)


class NoiseLoss:
    """The mean squared error of v (Salimans & Ho, arXiv:2202.00512), and a little of what the text encoder should know.

    Noise levels are spread over a batch, denser towards pure noise, where it is settled what stands where. The second
    part asks the text encoder's state at a caption's end for what the caption says (`Reading`).
    """

    def __init__(self, model: Diffusion) -> None:
        from accelerate import PartialState

        self._kept = model.scheduler.alphas_cumprod
        self._empty = model.tokens([""])
        self._process = PartialState().process_index
        self._reading = Reading(model)

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of latents (N, C, h, w) and token ids (N, L), a scalar."""
        latents, ids = batch
        n, device = len(latents), latents.device
        steps = len(self._kept)
        spread = (torch.arange(n, device=device) + torch.rand(n, device=device)) / n
        timesteps = ((1 - (1 - spread) ** TILT) * steps).long().clamp_max(steps - 1)
        kept = self._kept.to(device)[timesteps][:, None, None, None]
        # the processes of one training draw the same numbers; rolled, they meet other noise levels
        noise = torch.randn_like(latents).roll(self._process * n // 2, dims=0)
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        velocity = kept.sqrt() * noise - (1 - kept).sqrt() * latents
        dropped = torch.rand(n, 1, device=device) < DROPPED
        ids = torch.where(dropped, self._empty.to(device), ids)
        with low_precision(latents), self._reading:
            found = model(noisy, timesteps, ids)
        return functional.mse_loss(found.float(), velocity) + READ * self._reading.loss(ids)


class Reading:
    """How well a caption's demands can be read off the text encoder's last state at its end.

    The reader is a fixed random matrix, so that the encoder learns to be read. Learnt from the pictures' error
    alone, order and number come late: they move few pixels. Captions of another language than the scenes' are left out.
    """

    FIELDS = ((5, 3, len(COLOURS), len(SHAPES)) * 2) + (len(RELATIONS) + 1, len(BACKGROUNDS) + 1)
    """Answers to each question: of two groups number, size, colour and shape; the relation; the ground."""

    def __init__(self, model: Diffusion) -> None:
        draws = torch.Generator().manual_seed(0)
        width = model.text_encoder.config.hidden_size
        self._matrix = torch.randn(sum(self.FIELDS), width, generator=draws) * 3 / width**0.5
        self._encoder, self._tokenizer = model.text_encoder, model.tokenizer
        self._known: dict[bytes, Tensor] = {}
        self._states = torch.empty(0)

    def __enter__(self) -> None:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self._states = output[0]

        self._handle = self._encoder.register_forward_hook(keep)

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def loss(self, ids: Tensor) -> Tensor:
        """The mean cross entropy over all questions for the token ids (N, L) that the encoder has just seen."""
        ends = (ids == self._tokenizer.eos_token_id).int().argmax(1)
        states = self._states[torch.arange(len(ids), device=ids.device), ends].float()
        wanted = torch.stack([self.answers(row) for row in ids.cpu()]).to(ids.device)
        if not bool((wanted >= 0).any()):
            return states.sum() * 0
        parts = (states @ self._matrix.to(ids.device).T).split(self.FIELDS, dim=1)
        errors = [functional.cross_entropy(p, w, ignore_index=-1) for p, w in zip(parts, wanted.T) if (w >= 0).any()]
        return torch.stack(errors).mean()

    def answers(self, ids: Tensor) -> Tensor:
        """What token ids (L,) ask for, a class for each question; -1 where a caption does not say so or is not read."""
        key = ids.numpy().tobytes()
        if key not in self._known:
            self._known[key] = torch.tensor(self._answer(self._tokenizer.decode(ids, skip_special_tokens=True)))
        return self._known[key]

    def _answer(self, caption: str) -> list[int]:
        try:
            wanted = parse(caption)
        except InputError:
            return [-1] * len(self.FIELDS)
        found: list[int] = []
        for group in (*wanted.groups[:2], None)[:2]:
            if group is None:
                found += [0, -1, -1, -1]
            else:
                size = ("", "small", "large").index(group.size)
                found += [group.count, size, COLOURS.index(group.colour), SHAPES.index(group.shape)]
        relation, ground = ("", *RELATIONS).index(wanted.relation), ("", *BACKGROUNDS).index(wanted.background)
        return [*found, relation, ground]


def show(model: Any, vae: Any, path: Path, number: int = 64) -> None:
    """Write a sheet of pictures of the calibration prompts."""
    from PIL import Image

    whole = Diffusion(model.text_encoder, model.unet, vae, model.tokenizer, model.scheduler)
    prompts = calibration_prompts()[:number]
    guidance = SAMPLING.guidance
    pictures = generate(whole, prompts, seeds=range(number), steps=20, guidance=guidance, batch=32, watch=False)
    rows = np.stack(pictures).reshape(number // 16, 16, *pictures[0].shape).transpose(0, 2, 1, 3, 4)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rows.reshape(-1, 16 * pictures[0].shape[1], 3)).save(path)
