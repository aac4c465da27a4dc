"""Goes on with the training of what recipe `whole` made of the shipped detector, and makes it ready for `shipped`.

    python benchmarks/bev_whole.py --out DIR [--weights DIR] [--epochs 4] [--lr 5e-4] [--share 1] [--nights 1]
        [--more 0] [--seed 0]

Setup: the pruned, 2:4 sparse detector in --weights (bev_whole.safetensors, .json, bev_whole_heads.safetensors;
default: those beside this file) is trained on towards the original along the generated training scenes and --more
others of the same generator, 17 to 25 minutes for 2,200 frames on one core, a --share of the scenes an epoch, those by
night --nights times as often; then its precisions are chosen and calibrated. Leaves the three files anew,
`whole.safetensors` and `whole.json` in DIR/weights; prints NDS and mAP on the validation frames, in torch. Killed, it
goes on from the last epoch when it is started again. With `--epochs 0` it only makes the INT8 files.
DIR/weights/whole.* beside the kit's weights are recipe `shipped`. With a process a core it takes less time:

    python -m torch.distributed.run --nproc_per_node 2 benchmarks/bev_whole.py --out DIR ...
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import torch
from accelerate import Accelerator

from core.compress import compress, history, replay
from core.files import read_object, write_text
from core.kit import Context, Recipe
from core.weights import load_weights, save_weights, state_hash
from kits.bev_perception import shipped
from kits.bev_perception.acceptance import observed, verdict
from kits.bev_perception.data.default import LARGE, kept_world
from kits.bev_perception.data.keyframes import Keyframe, keyframes
from kits.bev_perception.data.nuscenes import NuScenes
from kits.bev_perception.distil import FollowOriginal, follow
from kits.bev_perception.kit import BevPerception
from kits.bev_perception.model.configs import NANO
from kits.bev_perception.recipes import DENSE, MIXED
from kits.bev_perception.training import HEADS

NAME = "bev_whole"
SEED = 2000
"""Of the town and streets of --more scenes: no other split's."""
WORK = "01-followoriginal.partial"


def more_scenes(count: int) -> Sequence[Keyframe]:
    """Training scenes beside the default ones, half of them by night, every second one with a sudden obstacle.

    Made once, a frame in a fifth to half a second on two cores, and kept in the cache.
    """
    how = {**LARGE, "scenes": count, "seed": SEED, "paired": "none", "event_share": 0.5}
    data = NuScenes(kept_world(f"bev_perception-more-{count}", how))
    return keyframes(data, data.split("all"))


class Wider(BevPerception):
    """The kit with `more` scenes among those that it trains on."""

    more: Sequence[Keyframe] = ()

    def dataset(self, data: Path | None, split: str, preset: str = "full") -> Sequence[Keyframe]:
        """The kit's own samples; those of "train" and then `more`."""
        found = super().dataset(data, split, preset)
        return [*found, *self.more] if split == "train" else found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--weights", type=Path, default=Path(__file__).parent / "weights")
    options.add_argument("--epochs", type=int, default=4)
    options.add_argument("--lr", type=float, default=5e-4)
    options.add_argument("--share", type=float, default=1.0)
    options.add_argument("--nights", type=int, default=1)
    options.add_argument("--more", type=int, default=0)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--preset", choices=("smoke", "full"), default="full")
    given = options.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    alone = Accelerator()
    rank = alone.process_index
    kit = BevPerception()
    original = kit.model()
    about = read_object(given.weights / f"{NAME}.json", "take it from the repository")
    model = replay(kit.model(), about["steps"])
    source = given.weights / f"{NAME}.safetensors"
    load_weights(model, source)
    out = given.out
    if rank:  # trains along, and leaves nothing
        out = Path(tempfile.mkdtemp())
        if (given.out / WORK).is_dir():
            shutil.copytree(given.out / WORK, out / WORK)
    made = out / "weights"
    made.mkdir(parents=True, exist_ok=True)
    heads = made / f"{NAME}_heads.safetensors"
    shutil.copy(given.weights / heads.name, heads)
    if given.epochs:
        wider = Wider(original)  # type: ignore[arg-type]
        if given.more:
            if alone.is_main_process:
                more_scenes(given.more)
            alone.wait_for_everyone()
            wider.more = more_scenes(given.more)
        work = out / WORK
        before = out / "00-before.heads"
        work.mkdir(exist_ok=True)
        before.mkdir(exist_ok=True)
        shutil.copy(heads, before / HEADS)
        step = FollowOriginal(
            given.epochs, given.lr, answers=1.0, ema=0.998, share=given.share, nights=given.nights, hold_zeros=True,
            free=DENSE, seed=given.seed,
        )  # fmt: skip
        alone.wait_for_everyone()
        done = follow(model, step, Context(wider, original, None, given.preset, work, True, 0))
        if rank:
            shutil.rmtree(out)
            return
        source = made / source.name
        save_weights(done.model.half(), source)
        model = replay(kit.model(), about["steps"])
        load_weights(model, source)
        shutil.copy(work.with_suffix(".heads") / HEADS, heads)
        about["steps"].append({"step": step.to_json(), "structure": done.structure})
        about["changed"] += shipped.told([{"step": step.to_json(), "changed": done.changed}])
    else:
        shutil.copy(source, made)
    model.eval()
    write_text(made / f"{NAME}.json", json.dumps(about, indent=1) + "\n")
    frames = kit.dataset(None, "val", given.preset)
    scored = verdict(frames, observed(model, frames, NANO, "validating"), 0.3).figures()
    print(f"NDS {scored['nds'][0]:.2f}, mAP {scored['map'][0]:.2f} on {len(frames)} validation frames, in torch")
    folder = out / "mixed"
    recipe = Recipe("mixed", (MIXED,), "", "")
    small, trace = compress(model, recipe, kit.of(original), preset=given.preset, folder=folder, resume=True)
    rows: list[dict[str, Any]] = [*about["changed"], *shipped.told([trace[0].to_json()])]
    shipped.write(small, state_hash(original), [*about["steps"], *history(folder)], rows, made)


if __name__ == "__main__":
    main()
