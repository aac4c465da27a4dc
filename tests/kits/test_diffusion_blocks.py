"""Removal of blocks: what is identity, what a student keeps of its teacher, and which blocks the steps choose."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from core.compress import compress, history, replay
from core.kit import Context, InputError, Kit, Recipe
from core.pruning.bypass import bypass, bypassed
from core.weights import load_weights, save_weights
from kits.mobile_diffusion import blocks
from kits.mobile_diffusion.blocks import (
    RemoveAttention,
    RemoveBlocks,
    attention_blocks,
    plain_stages,
    predictions,
    relative_error,
    removal_errors,
    remove_attention,
    remove_blocks,
    residual_blocks,
    student_config,
    student_of,
)
from kits.mobile_diffusion.model.architectures import ARCHITECTURES, build
from kits.mobile_diffusion.model.pipeline import Diffusion, load_diffusion, save_diffusion


def batches(samples: Any, batch_size: int, *, train: bool, seed: int = 0) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(len(samples) // batch_size):
        yield {
            "latents": torch.randn(batch_size, 4, 8, 8, generator=generator),
            "timesteps": torch.randint(0, 1000, (batch_size,), generator=generator),
            "token_ids": torch.randint(2, 600, (batch_size, 24), generator=generator),
        }


KIT = cast(Kit, SimpleNamespace(name="toy", dataset=lambda data, split, preset: range(8), batches=batches))


@pytest.fixture
def toy() -> Diffusion:
    return build("toy")


def calibration() -> list[dict[str, Tensor]]:
    return list(batches(range(8), 4, train=False))


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def silence(unet: nn.Module, *names: str) -> None:
    """Let transformer blocks add nothing to what goes through them."""
    for name in names:
        last = cast(nn.Conv2d, unet.get_submodule(f"{name}.proj_out"))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(cast(Tensor, last.bias))


class TestRemoving:
    def test_removing_a_block_that_adds_nothing_changes_nothing(self, toy: Diffusion) -> None:
        silence(toy.unet, "down_blocks.1.attentions.0")
        cast(Any, toy.unet).up_blocks[1].resnets[2].conv2.weight.data.zero_()  # its shortcut is what is left
        expected = predictions(toy, calibration())
        names = ["down_blocks.1.attentions.0", "up_blocks.1.resnets.2", "mid_block.resnets.0"]
        errors = removal_errors(toy, names, calibration(), expected)
        assert errors["down_blocks.1.attentions.0"] == 0
        assert errors["up_blocks.1.resnets.2"] < 1e-12
        assert errors["mid_block.resnets.0"] > 1e-6
        assert bypassed(toy.unet) == []
        assert relative_error(predictions(toy, calibration()), expected) == 0

    def test_relative_error_is_that_of_the_closed_form(self) -> None:
        found, expected = (
            [torch.tensor([1.0, 2.0]), torch.tensor([3.0])],
            [torch.tensor([2.0, 2.0]), torch.tensor([1.0])],
        )
        assert relative_error(found, expected) == pytest.approx((1 + 0 + 4) / (4 + 4 + 1))

    def test_guided_predictions_extrapolate_from_the_empty_caption(self, toy: Diffusion) -> None:
        batch = calibration()[:1]
        empty = toy.tokens([""]).expand(4, -1)
        told, untold = predictions(toy, batch)[0], predictions(toy, [{**batch[0], "token_ids": empty}])[0]
        assert torch.allclose(predictions(toy, batch, 3.0)[0], untold + 3 * (told - untold), atol=1e-6)

    def test_the_toy_has_the_blocks_of_its_config(self, toy: Diffusion) -> None:
        assert len(attention_blocks(toy.unet)) == 2 + 2 + 1 + 3 + 3
        assert len(residual_blocks(toy.unet)) == 2 * 3 + 2 + 3 * 3

    def test_a_stage_without_attention_becomes_a_plain_one(self, toy: Diffusion) -> None:
        names = [f"down_blocks.0.attentions.{j}" for j in range(2)] + ["mid_block.attentions.0"]
        bypass(toy.unet, names)
        expected = predictions(toy, calibration())
        toy.unet = plain_stages(toy.unet)
        assert toy.unet.config.down_block_types[0] == "DownBlock2D"
        assert bypassed(toy.unet) == ["mid_block.attentions.0"]
        assert relative_error(predictions(toy, calibration()), expected) < 1e-12


class TestPatterns:
    @pytest.mark.parametrize(("pattern", "name"), [("base", "bk-base"), ("small", "bk-small"), ("tiny", "bk-tiny")])
    def test_sd_becomes_the_published_student(self, pattern: str, name: str) -> None:
        with torch.device("meta"):
            teacher = UNet2DConditionModel(**ARCHITECTURES["sd-1.5"].unet)
            student = UNet2DConditionModel(**student_config(teacher, pattern))
        assert count(student) / 1e6 == pytest.approx(ARCHITECTURES[name].published, abs=0.06)

    @pytest.mark.parametrize("pattern", ["base", "small", "tiny"])
    def test_the_student_has_the_teachers_weights(self, pattern: str, toy: Diffusion) -> None:
        student, teacher = student_of(toy.unet, pattern), cast(Any, toy.unet)
        ahead = 1 if pattern == "tiny" else 0
        assert torch.equal(
            student.down_blocks[1].resnets[0].conv1.weight, teacher.down_blocks[1].resnets[0].conv1.weight
        )
        last = student.up_blocks[-1].resnets[1].conv1.weight
        assert torch.equal(last, teacher.up_blocks[-1].resnets[2].conv1.weight)
        assert torch.equal(
            student.up_blocks[0].upsamplers[0].conv.weight, teacher.up_blocks[ahead].upsamplers[0].conv.weight
        )
        assert last.data_ptr() != teacher.up_blocks[-1].resnets[2].conv1.weight.data_ptr()
        toy.unet = student
        assert all(p.isfinite().all() for p in predictions(toy, calibration()))

    def test_blocks_removed_before_stay_removed_in_the_student(self, toy: Diffusion) -> None:
        bypass(toy.unet, ["up_blocks.1.attentions.2", "up_blocks.1.attentions.1", "mid_block.attentions.0"])
        student = student_of(toy.unet, "base")
        assert set(bypassed(student)) == {"mid_block.attentions.0", "up_blocks.1.attentions.1"}

    def test_patterns_that_do_not_fit_are_refused(self, toy: Diffusion) -> None:
        with pytest.raises(InputError, match="'base' needs layers_per_block 2, the UNet has 1"):
            student_config(student_of(toy.unet, "base"), "base")
        unet = UNet2DConditionModel(**(ARCHITECTURES["toy"].unet | {"block_out_channels": (16, 16, 32)}))
        with pytest.raises(InputError, match=r"two innermost of one width, the UNet has \[16, 16, 32\]"):
            student_config(unet, "tiny")


class TestSteps:
    def test_attention_that_adds_nothing_goes_first(self, toy: Diffusion) -> None:
        silent = ["down_blocks.0.attentions.1", "mid_block.attentions.0", "up_blocks.2.attentions.0"]
        silence(toy.unet, *silent)
        expected = predictions(toy, calibration())
        original = build("toy")
        outcome = remove_attention(toy, RemoveAttention(3 / 11, batches=2, batch_size=4), Context(KIT, original))
        assert set(outcome.structure["removed"]) == set(silent)
        assert len(attention_blocks(cast(Diffusion, outcome.model).unet)) == 8
        assert relative_error(predictions(toy, calibration()), expected) == 0
        assert "3 of the original's 11 transformer blocks are gone" in outcome.changed[0]["what"]
        assert [s.layer for s in outcome.skipped][0].startswith("unet.") and len(outcome.skipped) == 8

    def test_the_share_counts_what_went_before(self, toy: Diffusion) -> None:
        model = Diffusion(toy.text_encoder, student_of(toy.unet, "base"), toy.vae, toy.tokenizer, toy.scheduler)
        assert len(attention_blocks(model.unet)) == 7
        remove_attention(model, RemoveAttention(0.7, batches=1, batch_size=4), Context(KIT, toy))
        assert len(attention_blocks(model.unet)) == 3  # 8 of 11 are gone

    def test_measured_removal_meets_the_share(self, toy: Diffusion) -> None:
        share, whole = 7 / 13, count(toy.unet)
        outcome = remove_blocks(
            toy, RemoveBlocks(share=share, batches=1, batch_size=4, guidance=1), Context(KIT, build("toy"))
        )
        assert count(toy.unet) <= share * whole
        assert outcome.changed[0]["parameters"] == [whole, count(toy.unet)]
        ranks = [entry["rank"] for entry in outcome.changed[1:]]
        assert ranks == list(range(1, len(ranks) + 1))
        error = relative_error(
            predictions(toy, list(batches(range(8), 4, train=False))[:1]), predictions(build("toy"), calibration()[:1])
        )
        assert outcome.changed[-1]["error"] == pytest.approx(error, rel=1e-4)

    def test_a_large_unet_is_measured_on_few_samples_and_the_trace_says_so(
        self, toy: Diffusion, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[list[int]] = []

        def spied(model: Diffusion, given: blocks.Batches, guidance: float = 1.0) -> list[Tensor]:
            seen.append([len(batch["latents"]) for batch in given])
            return predictions(model, given, guidance)

        monkeypatch.setattr(blocks, "predictions", spied)
        context, step = Context(KIT, toy), RemoveAttention(1 / 11, guidance=1, batches=2, batch_size=4)
        outcome = remove_attention(build("toy"), step, context)
        assert all(sizes == [4, 4] for sizes in seen) and "measured on" not in outcome.changed[0]["what"]
        seen.clear()
        monkeypatch.setattr(blocks, "LARGE", count(toy.unet))
        monkeypatch.setattr(blocks, "LARGE_SAMPLES", 5)
        outcome = remove_attention(build("toy"), step, context)
        assert seen and all(sizes == [4] for sizes in seen)
        assert "measured on 4 samples and not the step's 8, since the UNet is large" in outcome.changed[0]["what"]

    def test_a_share_out_of_reach_says_what_is_in_reach(self, toy: Diffusion) -> None:
        with pytest.raises(InputError, match=r"RemoveBlocks.share: 0.010 is out of reach, expected 0\.\d+ or more"):
            remove_blocks(toy, RemoveBlocks(share=0.01, batches=1, batch_size=4), Context(KIT, toy))

    @pytest.mark.parametrize(
        "steps",
        [
            (RemoveAttention(0.7, batches=1, batch_size=4), RemoveBlocks("base")),
            (RemoveBlocks("tiny"),),
            (RemoveBlocks(share=0.5, batches=1, batch_size=4),),
        ],
        ids=["attention then base", "tiny", "measured"],
    )
    def test_replay_and_folder_give_the_same_model(
        self, steps: tuple[Any, ...], toy: Diffusion, tmp_path: Path
    ) -> None:
        recipe = Recipe("less", steps, "", "")
        small, _ = compress(toy, recipe, KIT, folder=tmp_path / "run")
        expected = predictions(cast(Diffusion, small), calibration())
        save_weights(small, tmp_path / "small.safetensors")
        again = replay(build("toy", 1), history(tmp_path / "run"))
        load_weights(again, tmp_path / "small.safetensors")
        assert relative_error(predictions(cast(Diffusion, again), calibration()), expected) == 0
        resumed, _ = compress(toy, recipe, KIT, folder=tmp_path / "run", resume=True)
        assert relative_error(predictions(cast(Diffusion, resumed), calibration()), expected) == 0
        save_diffusion(cast(Diffusion, small), tmp_path / "folder", torch.float32)
        assert relative_error(predictions(load_diffusion(tmp_path / "folder"), calibration()), expected) == 0
        assert len(attention_blocks(toy.unet)) == 11  # the original is as it was

    @pytest.mark.parametrize(
        "wrong",
        [lambda: RemoveAttention(1.0), lambda: RemoveAttention(guidance=0.5), lambda: RemoveBlocks("half")],
        ids=["share", "guidance", "pattern"],
    )
    def test_wrong_fields_are_refused(self, wrong: Any) -> None:
        with pytest.raises(InputError, match=r"^Remove\w+\.(share|guidance|pattern): .*, expected "):
            wrong()

    def test_another_model_is_refused(self) -> None:
        with pytest.raises(InputError, match="RemoveAttention: is for a Diffusion, not for a Linear"):
            remove_attention(nn.Linear(1, 1), RemoveAttention(), Context(KIT, nn.Linear(1, 1)))
