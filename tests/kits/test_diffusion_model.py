"""The one module of a Stable Diffusion: what it loads and refuses, what it writes, and the published architectures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
from diffusers.pipelines.latent_consistency_models import LatentConsistencyModelPipeline
from safetensors.torch import load_file, save_file

from core.kit import InputError
from core.pruning.bypass import bypass
from kits.mobile_diffusion.model.architectures import ARCHITECTURES, build, build_folder, parameters
from kits.mobile_diffusion.model.pipeline import (
    Diffusion,
    Sampling,
    guidance_embedding,
    load_diffusion,
    save_diffusion,
)

LATENTS, TIMES = torch.linspace(-2, 2, 512).reshape(2, 4, 8, 8), torch.tensor([1, 900])


@pytest.fixture(scope="module")
def toy() -> Diffusion:
    return build("toy")


@pytest.fixture(scope="module")
def saved(toy: Diffusion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "model"
    save_diffusion(toy, folder, torch.float32)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved model that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@torch.no_grad()
def prediction(model: Diffusion) -> torch.Tensor:
    return model(LATENTS, TIMES, model.tokens(["a red circle", "two blue squares"]))


class TestDiffusion:
    def test_forward_is_the_unet_on_the_encoded_text(self, toy: Diffusion) -> None:
        ids = toy.tokens(["a red circle", "two blue squares"])
        assert ids.shape == (2, 24)
        with torch.no_grad():
            text = toy.text_encoder(ids).last_hidden_state
            wanted = toy.unet(LATENTS, TIMES, encoder_hidden_states=text).sample
        assert torch.equal(prediction(toy), wanted)
        assert list(dict(toy.named_children())) == ["text_encoder", "unet", "vae"]

    def test_pipeline_shares_the_modules_and_makes_a_picture(self, toy: Diffusion) -> None:
        pipeline = toy.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline.unet is toy.unet and pipeline.safety_checker is None
        generator = torch.Generator().manual_seed(1)
        image = pipeline("a red circle", num_inference_steps=2, output_type="np", generator=generator).images
        assert image.shape == (1, 64, 64, 3) and image.std() > 0

    def test_guidance_is_embedded_as_in_diffusers(self) -> None:
        scales = torch.tensor([0.0, 6.5])
        wanted = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, scales, 32)
        assert torch.allclose(guidance_embedding(scales, 32), wanted, atol=1e-3)  # angles of 6,500 rad in float32

    def test_a_unet_that_takes_the_guidance_is_told_it(self, toy: Diffusion) -> None:
        from diffusers import UNet2DConditionModel

        unet = UNet2DConditionModel(**ARCHITECTURES["toy"].unet, time_cond_proj_dim=16)
        model = Diffusion(toy.text_encoder, unet, toy.vae, toy.tokenizer, toy.scheduler, Sampling(4, 8.5)).eval()
        first = prediction(model)
        model.sampling = Sampling(4, 1.0)
        assert not torch.allclose(first, prediction(model))


class TestSaveAndLoad:
    def test_round_trip_is_exact(self, toy: Diffusion, saved: Path) -> None:
        again = load_diffusion(saved)
        assert torch.equal(prediction(again), prediction(toy))
        assert isinstance(again.scheduler, DDIMScheduler) and again.scheduler.config.prediction_type == "v_prediction"
        assert not again.training

    def test_half_precision_halves_the_bytes_and_leaves_the_model(self, toy: Diffusion, tmp_path: Path) -> None:
        save_diffusion(toy, tmp_path / "half")
        weights = load_file(tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors")
        assert {w.dtype for w in weights.values()} == {torch.float16}
        assert toy.unet.dtype == torch.float32
        assert load_diffusion(tmp_path / "half", torch.float16).unet.dtype == torch.float16

    def test_the_same_model_gives_the_same_bytes(self, toy: Diffusion, saved: Path, tmp_path: Path) -> None:
        save_diffusion(toy, tmp_path / "again", torch.float32)
        files = sorted(p.relative_to(saved) for p in saved.rglob("*") if p.is_file())
        assert files == sorted(
            p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file()
        )
        assert all((saved / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)

    def test_diffusers_loads_what_was_saved(self, toy: Diffusion, saved: Path) -> None:
        pipeline = StableDiffusionPipeline.from_pretrained(saved, local_files_only=True)
        text = pipeline.text_encoder(toy.tokens(["a red circle", "two blue squares"]))[0]
        found = pipeline.unet(LATENTS, TIMES, encoder_hidden_states=text).sample
        assert torch.equal(found, prediction(toy))

    def test_sampling_is_kept(self, toy: Diffusion, tmp_path: Path) -> None:
        model = Diffusion(toy.text_encoder, toy.unet, toy.vae, toy.tokenizer, toy.scheduler, Sampling(4, 1.0))
        save_diffusion(model, tmp_path / "few")
        assert load_diffusion(tmp_path / "few").sampling == Sampling(4, 1.0)

    def test_removed_blocks_stay_removed(self, tmp_path: Path) -> None:
        model = build("toy")
        names = ["down_blocks.0.attentions.1", "down_blocks.1.resnets.0", "up_blocks.1.resnets.2"]
        bypass(model.unet, names)  # the second keeps a shortcut, since its channels change
        save_diffusion(model, tmp_path / "less", torch.float32)
        assert torch.equal(prediction(load_diffusion(tmp_path / "less")), prediction(model))
        pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "less", local_files_only=True)
        assert sum(p.numel() for p in pipeline.unet.parameters()) == sum(p.numel() for p in model.unet.parameters())

    def test_files_of_a_variant_are_found(self, folder: Path, toy: Diffusion) -> None:
        for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
            (folder / f"{name}.safetensors").rename(folder / f"{name}.fp16.safetensors")
        assert torch.equal(prediction(load_diffusion(folder)), prediction(toy))

    def test_text_encoders_of_older_transformers_load(self, folder: Path, toy: Diffusion) -> None:
        path = folder / "text_encoder" / "model.safetensors"
        tensors = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(path).items()}
        tensors["text_model.embeddings.position_ids"] = torch.arange(24)[None]
        save_file(tensors, path, metadata={"format": "pt"})
        assert torch.equal(prediction(load_diffusion(folder)), prediction(toy))

    def test_other_schedulers_load(self, folder: Path) -> None:
        PNDMScheduler(steps_offset=1, skip_prk_steps=True).save_pretrained(folder / "scheduler")
        edit(folder / "model_index.json", scheduler=["diffusers", "PNDMScheduler"])
        assert isinstance(load_diffusion(folder).scheduler, PNDMScheduler)

    def test_a_folder_of_something_else_is_not_replaced(self, toy: Diffusion, tmp_path: Path) -> None:
        (tmp_path / "letter.txt").write_text("dear")
        with pytest.raises(InputError, match="is no diffusers folder, so it is not replaced"):
            save_diffusion(toy, tmp_path)
        assert (tmp_path / "letter.txt").read_text() == "dear"

    def test_a_diffusers_folder_is_replaced_whole(self, folder: Path, toy: Diffusion) -> None:
        (folder / "unet" / "stale.safetensors").write_bytes(b"")
        save_diffusion(toy, folder, torch.float32)
        assert not (folder / "unet" / "stale.safetensors").exists()
        assert [p.name for p in folder.parent.iterdir()] == ["model"]


def no_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def second_text_encoder(folder: Path) -> None:
    edit(folder / "model_index.json", text_encoder_2=["transformers", "CLIPTextModelWithProjection"])


def transformer(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    del index["unet"]
    index |= {"transformer": ["diffusers", "FluxTransformer2DModel"], "_class_name": "FluxPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))


def no_vae(folder: Path) -> None:
    shutil.rmtree(folder / "vae")


def null_tokenizer(folder: Path) -> None:
    edit(folder / "model_index.json", tokenizer=[None, None])


def pickled(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))


def no_weights(folder: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()


def torn(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def tensor_missing(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["conv_out.bias"]
    save_file(tensors, path, metadata={"format": "pt"})


def text_tensor_missing(folder: Path) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    del tensors[sorted(tensors)[0]]
    save_file(tensors, path, metadata={"format": "pt"})


def other_unet(folder: Path) -> None:
    edit(folder / "unet" / "config.json", _class_name="UNet3DConditionModel")


def inpainting(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_in.weight"] = torch.zeros(16, 9, 3, 3)
    save_file(tensors, path, metadata={"format": "pt"})
    edit(folder / "unet" / "config.json", in_channels=9)


def broken_json(folder: Path) -> None:
    (folder / "unet" / "config.json").write_text("{")


def foreign_scheduler(folder: Path) -> None:
    edit(folder / "model_index.json", scheduler=["os", "system"])


def zero_steps(folder: Path) -> None:
    (folder / "sampling.json").write_text('{"steps": 0, "guidance": 1}')


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (no_index, r"model_index.json is missing"),
        (second_text_encoder, r"a StableDiffusionPipeline with a text_encoder_2; expected Stable Diffusion"),
        (transformer, r"a FluxPipeline with a transformer; expected Stable Diffusion"),
        (no_vae, r"component 'vae' is missing"),
        (null_tokenizer, r"component 'tokenizer' is missing"),
        (pickled, r"unet: weights are pickled \(\.bin\).*safe_serialization=True"),
        (no_weights, r"vae: no weights here"),
        (torn, r"unet: cannot be loaded"),
        (tensor_missing, r"unet: tensor 'conv_out.bias' missing"),
        (text_tensor_missing, r"text_encoder: tensor 'embeddings.position_embedding.weight' missing"),
        (other_unet, r"a UNet3DConditionModel, expected UNet2DConditionModel"),
        (inpainting, r"takes 9 channels where the VAE gives 4"),
        (broken_json, r"config.json: not JSON"),
        (foreign_scheduler, r"scheduler 'system' is none of diffusers' schedulers"),
        (zero_steps, r"sampling.json: steps is 0"),
    ],
)
def test_wrong_folders_are_refused_in_one_line(damage: Callable[[Path], None], says: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(InputError, match=says) as caught:
        load_diffusion(folder)
    assert "\n" not in str(caught.value)


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        load_diffusion(tmp_path / "none")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="a single file, expected a diffusers folder.*from_single_file"):
        load_diffusion(tmp_path / "model.safetensors")


class TestArchitectures:
    @pytest.mark.parametrize("name", [n for n, a in ARCHITECTURES.items() if a.published])
    def test_unets_have_the_published_number_of_parameters(self, name: str) -> None:
        assert parameters(name)["unet"] / 1e6 == pytest.approx(ARCHITECTURES[name].published, abs=0.06)

    def test_text_encoders_and_vae_have_the_published_numbers(self) -> None:
        # CLIP ViT-L/14's text model; OpenCLIP ViT-H's without its last layer; the autoencoder of SD-1
        assert parameters("sd-1.5")["text_encoder"] == 123_060_480
        assert parameters("sd-2.1")["text_encoder"] == 340_387_840
        assert parameters("sd-1.5")["vae"] == 83_653_863

    def test_the_same_seed_gives_the_same_weights_in_every_dtype(self) -> None:
        first, other = build("toy", 3), build("toy", 3, torch.float16)
        states = first.state_dict(), other.state_dict()
        assert all(torch.equal(states[0][k].half(), states[1][k]) for k in states[0])
        assert not torch.equal(build("toy", 4).unet.conv_in.weight, first.unet.conv_in.weight)

    def test_build_folder_is_build_on_disk(self, tmp_path: Path) -> None:
        build_folder("toy", tmp_path / "toy", seed=3)
        wanted = build("toy", 3, torch.float16).state_dict()
        found = load_diffusion(tmp_path / "toy", torch.float16).state_dict()
        assert all(torch.equal(found[k], wanted[k]) for k in wanted) and set(found) == set(wanted)

    def test_unknown_names_are_refused(self) -> None:
        with pytest.raises(InputError, match="architecture 'sdxl' is not known; known are sd-1.5"):
            build("sdxl")
