"""Recovery of a packed text-to-image model: terms for the layers that predict, saved, read back and drawn with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core.compress import TraceEntry, compress
from core.kit import Recipe
from core.quantization import Pack, Recover, expand, packed_layers
from kits.mobile_diffusion.kit import MobileDiffusion
from kits.mobile_diffusion.memory import skeleton
from kits.mobile_diffusion.model.architectures import build
from kits.mobile_diffusion.model.pipeline import Diffusion, load_diffusion

STEPS = (
    Pack(bits=2, group_size=32, overrides=("unet.conv_in=16", "vae.*=8"), rounding="nearest"),
    Recover(rank=4, epochs=3, lr=3e-3, batch_size=8, layers=("unet.*", "vae.decoder.conv_out")),
)


class Toy(MobileDiffusion):
    """The kit with noise for latents."""

    def dataset(self, data: Path | None, split: str, preset: str = "full") -> Sequence[Any]:
        return range(1000 * len(split), 1000 * len(split) + 24)

    def batches(self, samples: Sequence[Any], batch_size: int, *, train: bool, seed: int = 0) -> Iterable[Any]:
        for start in range(0, len(samples), batch_size):
            draws = torch.Generator().manual_seed(samples[start] + 7919 * seed)
            yield {
                "latents": torch.randn(batch_size, 4, 8, 8, generator=draws),
                "timesteps": torch.randint(0, 1000, (batch_size,), generator=draws),
                "token_ids": torch.randint(2, 600, (batch_size, 24), generator=draws),
            }


@pytest.fixture(scope="module")
def recovered() -> tuple[Diffusion, TraceEntry]:
    original = build("toy")
    model, trace = compress(original, Recipe("r", STEPS, "", ""), Toy(original))
    assert isinstance(model, Diffusion)
    return model, trace[1]


@torch.no_grad()
def prediction(model: Any) -> Tensor:
    (batch,) = Toy().batches([5], 4, train=False)
    return model(*Toy().inputs(batch))


def test_the_prediction_comes_nearer_and_the_autoencoder_is_told_apart(recovered: tuple[Diffusion, TraceEntry]) -> None:
    model, entry = recovered
    line = entry.changed[0]
    assert line["error_after"] < 0.9 * line["error_before"]
    ranks = {name: layer.rank for name, layer in packed_layers(model).items()}
    assert ranks["unet.conv_out"] in (0, 4) and ranks["unet.mid_block.resnets.0.conv1"] == 4
    assert not any(rank for name, rank in ranks.items() if not name.startswith("unet."))
    why = {s.layer: s.why for s in entry.skipped}
    assert why["vae.decoder.conv_out"] == "no low-rank term: the kit's inputs do not reach it"


def test_saved_and_read_back_it_predicts_the_same(recovered: tuple[Diffusion, TraceEntry], tmp_path: Path) -> None:
    model, _ = recovered
    model.save(tmp_path / "out")
    again = load_diffusion(tmp_path / "out")
    assert {n: m.layout for n, m in packed_layers(again).items()} == {
        n: m.layout for n, m in packed_layers(model).items()
    }
    torch.testing.assert_close(prediction(again), prediction(model), rtol=2e-3, atol=2e-3)  # norms in FP16
    again.save(tmp_path / "more")
    for path in (tmp_path / "out").rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "more" / path.relative_to(tmp_path / "out")).read_bytes()
    layers = json.loads((tmp_path / "out/unet/config.json").read_text())["quantization_config"]["layers"]
    assert layers["mid_block.resnets.0.conv1"] == {"bits": 2, "group_size": 32, "rank": 4}
    shape = skeleton(tmp_path / "out")
    held = [{n: (m.layout, m.weight_bytes) for n, m in packed_layers(m).items()} for m in (shape, again)]
    assert held[0] == held[1], "the memory plan counts the terms"
    expected = prediction(again)
    torch.testing.assert_close(prediction(expand(again)), expected, rtol=1e-3, atol=1e-4)
