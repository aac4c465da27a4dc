"""The toy kit as one whose models run in torch: they save themselves into a folder, packed layers packed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from core.export.artifact import origin_of
from core.figures import Figure, Figures, Measured
from core.kit import Recipe
from core.quantization import Pack, empty_packed, packed_layers
from core.weights import load_weights, save_weights
from tests.core.toy import KIT as TOY
from tests.core.toy import Toy, ToyKit


class FolderToy(Toy):
    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        save_weights(self, folder / "model.safetensors")
        packed = {name: [layer.bits, layer.group_size] for name, layer in packed_layers(self).items()}
        (folder / "model_index.json").write_text(json.dumps(packed))


class TorchKit(ToyKit):
    name = "tests.core.torch_kit"
    runtimes: tuple[str, ...] = ("torch",)
    recipes: Mapping[str, Recipe] = {
        "int4": Recipe("int4", (Pack(bits=4, group_size=8, overrides=("head.*=8",)),), "a moment", "INT4")
    }
    default_recipe = "int4"

    def model(self, weights: Path | None = None) -> nn.Module:
        net = FolderToy()
        if weights is None:
            net.load_state_dict(TOY.model().state_dict())
            return net.eval()
        for name, (bits, group_size) in json.loads((weights / "model_index.json").read_text()).items():
            parent, _, child = name.rpartition(".")
            layer = net.get_submodule(name)
            setattr(net.get_submodule(parent), child, empty_packed(layer, bits, group_size))
        load_weights(net, weights / "model.safetensors")
        return net.eval()

    def compare(
        self, original: nn.Module, compressed: nn.Module, samples: Sequence[Any], artifact: Any, preset: str, out: Path
    ) -> tuple[Figures, list[dict[str, Any]]]:
        origin = origin_of(compressed)
        assert origin is not None and origin.variant == "int4-torch"
        alike = sum(self.tell(original, s) == self.tell(compressed, s) for s in samples)
        basis = Measured("this-host: toy", "torch", len(samples))
        table = {"title": "Alike", "columns": ["alike", "of"], "rows": [[alike, len(samples)]]}
        return Figures([Figure("alike", 100 * alike / len(samples), "%", basis)]), [table]


KIT = TorchKit()
