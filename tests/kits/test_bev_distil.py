"""The step that follows the original: what it trains, what it leaves at zero, and how many frames it shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import bev_whole
from core.compress import compress, replay
from core.distillation import softened_kl
from core.kit import InputError, Recipe
from core.pruning import Sparsify, check_pattern, sparse_utilization
from kits.bev_perception.data.default import SETS
from kits.bev_perception.data.keyframes import Keyframe, in_scenes, keyframes
from kits.bev_perception.data.nuscenes import NuScenes
from kits.bev_perception.data.world import generate_world
from kits.bev_perception.distil import FollowOriginal, answers_apart
from kits.bev_perception.model.configs import NANO
from kits.bev_perception.model.detector import BEVFormer, Predictions, example_inputs
from kits.bev_perception.model.loss import BOX_WEIGHT
from kits.bev_perception.recipes import DENSE, RECIPES, THIN
from kits.bev_perception.together import trained
from kits.bev_perception.training import shown
from tests.kits.bev_models import MICRO
from tests.kits.test_bev_lidar import Data

WEIGHTS = Path(__file__).parents[2] / "benchmarks" / "weights"
CONFIG = replace(MICRO, proposals=True, fusion=True, depth_bins=8)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Keyframe]:
    root = tmp_path_factory.mktemp("world") / "set"
    generate_world(root, 2, 4, samples=3, size=(96, 54), paired="none", supersample=1, workers=1, lidar_sweeps=False,
                   quiet=True)  # fmt: skip
    data = NuScenes(root)
    return keyframes(data, data.split("all"))


def followed(samples: list[Keyframe], *steps: Any, folder: Path | None = None) -> tuple[torch.nn.Module, Any]:
    torch.manual_seed(0)
    kit: Any = Data(samples)
    kit.name = "bev"
    return compress(BEVFormer(CONFIG).eval(), Recipe("r", steps, "", ""), kit, folder=folder)


def test_zeros_of_the_pattern_stay_and_everything_else_learns(samples: list[Keyframe]) -> None:
    sparse, _ = followed(samples, Sparsify())
    small, trace = followed(samples, Sparsify(), FollowOriginal(epochs=1, lr=1e-3, hold_zeros=True, ema=0.5))
    before = dict(sparse.named_parameters())
    thin = [n for n, p in before.items() if p.ndim >= 2 and p.any() and check_pattern(p, 2, 4)]
    assert len(thin) > 30 and "img_backbone.layer1.0.conv1.weight" in thin
    for name, weight in small.named_parameters():
        if name in thin:
            assert torch.equal(weight[before[name] == 0], torch.zeros(int((before[name] == 0).sum()))), name
    moved = [n for n in thin if not torch.equal(before[n], small.get_parameter(n))]
    assert len(moved) > 0.9 * len(thin)
    assert f"{len(thin)} weights stayed 2:4 sparse" in trace[-1].changed[0]["what"]


def test_without_it_the_zeros_fill_in_again(samples: list[Keyframe]) -> None:
    small, _ = followed(samples, Sparsify(), FollowOriginal(epochs=1, lr=1e-3, ema=0.5))
    assert not check_pattern(small.get_parameter("img_backbone.layer1.0.conv1.weight"), 2, 4)


def test_some_zeros_may_fill_in_again_while_others_stay(samples: list[Keyframe]) -> None:
    free = ("pts_bbox_head.transformer.*",)
    steps = (Sparsify(), FollowOriginal(epochs=1, lr=1e-3, hold_zeros=True, free=free, ema=0.5))
    small, _ = followed(samples, *steps)
    assert check_pattern(small.get_parameter("img_backbone.layer1.0.conv1.weight"), 2, 4)
    name = "pts_bbox_head.transformer.encoder.layers.0.ffns.0.layers.1.weight"
    assert not check_pattern(small.get_parameter(name), 2, 4)


def test_what_stays_dense_in_the_whole_stack_leaves_the_gate_its_share() -> None:
    about = json.loads((WEIGHTS / "bev_whole.json").read_text(encoding="utf-8"))
    pruned = replay(BEVFormer(NANO), [s for s in about["steps"] if s["step"]["step"] != "DepthStem"]).eval()
    with torch.no_grad():
        for parameter in pruned.parameters():  # some begin at zero, which is a pattern as well
            parameter.normal_()
    model, _ = compress(pruned, Recipe("r", THIN, "", ""), Data([]))  # type: ignore[arg-type]
    for pattern in DENSE:
        assert any(fnmatchcase(name, pattern) for name, _ in model.named_parameters()), pattern
    share = sparse_utilization(model, tuple(example_inputs(NANO).values())).share
    assert share == pytest.approx(0.85, abs=0.005)


def test_a_share_shows_fewer_frames(samples: list[Keyframe]) -> None:
    _, trace = followed(samples, FollowOriginal(epochs=1, lr=1e-3, share=0.5))
    assert "trained on 4 frames" in trace[0].changed[0]["what"], "3 of 6 frames, two lanes side by side"


def test_more_scenes_are_trained_on_and_never_judged_by(
    monkeypatch: pytest.MonkeyPatch, samples: list[Keyframe]
) -> None:
    small = {"size": (96, 54), "samples": 3, "lidar_sweeps": False, "supersample": 1, "workers": 1, "quiet": True}
    monkeypatch.setattr(bev_whole, "LARGE", small)
    more = bev_whole.more_scenes(2)
    assert [k.token for k in bev_whole.more_scenes(2)] == [k.token for k in more], "made once"
    assert len(in_scenes(more)) == 2 and not {k.token for k in more} & {k.token for k in samples}
    monkeypatch.setattr(bev_whole.BevPerception, "dataset", lambda kit, data, split, preset="full": samples)
    kit = bev_whole.Wider()
    kit.more = more
    assert list(kit.dataset(None, "train")) == [*samples, *more]
    for split in ("val", "test"):
        assert list(kit.dataset(None, split)) == samples
    assert bev_whole.SEED not in {arguments["seed"] for sets in SETS.values() for arguments in sets.values()}


def test_following_the_distances_keeps_them_near_the_originals(samples: list[Keyframe]) -> None:
    torch.manual_seed(0)
    original = BEVFormer(CONFIG).eval()
    features = torch.randn(1, CONFIG.num_cams, CONFIG.embed_dims, 4, 8)
    lidar2img = example_inputs(CONFIG)["lidar2img"]

    def told(model: Any) -> torch.Tensor:
        found: torch.Tensor = model.pts_bbox_head.distances(features, lidar2img, (32, 64))
        return found.detach()

    free, held = (followed(samples, FollowOriginal(epochs=2, lr=1e-2, far=far))[0] for far in (0.0, 50.0))
    apart = [float(softened_kl(told(model), told(original), 1.0, dim=2)) for model in (free, held)]
    assert 0 < apart[1] < 0.5 * apart[0]


def test_what_trains_along_is_handed_on_from_step_to_step(samples: list[Keyframe], tmp_path: Path) -> None:
    steps = [FollowOriginal(epochs=1, lr=1e-3, seed=seed) for seed in range(2)]
    followed(samples, *steps, folder=tmp_path)
    heads = [load_file(p) for p in sorted(tmp_path.glob("*.heads/heads.safetensors"))]
    assert len(heads) == 2 and {n.split(".")[0] for n in heads[0]} == {"denoiser", "pixels"}
    name = "pixels.layers.0.weight"
    moved, size = (heads[1][name] - heads[0][name]).norm(), heads[0][name].norm()
    assert 0 < moved < 0.3 * size, "begun anew they would have nothing in common"
    followed(samples, steps[0], folder=tmp_path)
    assert len(list(tmp_path.glob("*.heads"))) == 1, "a new run begins with those of no other"


def test_nights_are_shown_as_often_as_asked_for(samples: list[Keyframe]) -> None:
    by_night = {k.token for k in samples if k.data.scenes[k.scene].night}
    assert 0 < len(by_night) < len(samples)
    batches, steps = shown(samples, 1, 1.0, 0, nights=3)
    count = Counter(shot.keyframe.token for (shot,) in batches(0))
    assert steps == sum(count.values()) == 2 * len(by_night) + len(samples)
    assert {token: n for token, n in count.items() if n != 1} == dict.fromkeys(by_night, 3)
    with pytest.raises(InputError, match="nights: 0, expected 1 or more"):
        FollowOriginal(epochs=1, nights=0)


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(InputError, match="share"):
        FollowOriginal(epochs=1, share=share)


def test_zeros_cannot_be_held_where_there_are_none(samples: list[Keyframe]) -> None:
    with pytest.raises(InputError, match="put Sparsify before it"):
        followed(samples, FollowOriginal(epochs=1, hold_zeros=True))


def test_each_process_follows_scenes_of_its_own(samples: list[Keyframe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    batches, steps = shown(samples, 1, 1.0, 0)
    rows = list(batches(0))
    assert len(rows) == steps == 6 and all(len(row) == 1 for row in rows)
    mine = [[shot for (shot,) in rows[process::2]] for process in range(2)]
    assert {s.keyframe.scene for s in mine[0]}.isdisjoint({s.keyframe.scene for s in mine[1]})
    for lane in mine:
        assert lane[0].before is None
        for last, now in zip(lane, lane[1:]):
            assert now.before in (None, last.keyframe), "a memory of its own frames, not of the other process's"


def test_the_trainings_of_a_recipe_are_its_steps_up_to_the_last_one() -> None:
    whole = RECIPES["whole"]
    steps = trained(whole).steps
    assert isinstance(steps[-1], FollowOriginal) and steps == whole.steps[: len(steps)]
    assert not any(isinstance(step, FollowOriginal) for step in whole.steps[len(steps) :])
    with pytest.raises(InputError, match="'mixed' trains nothing; use fitkit run bev_perception --recipe mixed"):
        trained(RECIPES["mixed"])


@pytest.mark.slow
def test_two_processes_leave_the_steps_of_a_recipe_and_resume_them(tmp_path: Path) -> None:
    """The shipped detector on the smallest set: what a run of the same recipe goes on from."""
    words = ["--nproc_per_node", "2", "-m", "kits.bev_perception.together", "--recipe", "sparse", "--preset", "smoke",
             "--out", str(tmp_path)]  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words]
    env = os.environ | {"ACCELERATE_USE_CPU": "true"}
    ran = subprocess.run(launch, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    steps = sorted(file.parent.name for file in (tmp_path / "steps").glob("*/step.json"))
    assert steps == ["00-depthstem", "01-sparsify", "02-followoriginal"] and not (tmp_path / "steps.1").exists()
    record = tmp_path / "steps" / steps[-1] / "step.json"
    told = json.loads(record.read_text())["trace"]["changed"][0]["what"]
    assert "trained on 12 frames" in told and "stayed 2:4 sparse" in told
    written = record.stat().st_mtime_ns
    again = subprocess.run([*launch, "--resume"], env=env, capture_output=True, text=True)
    assert again.returncode == 0 and record.stat().st_mtime_ns == written, "a finished step is not done again"
    weights = load_file(tmp_path / "steps" / steps[-1] / "model.safetensors")
    assert check_pattern(weights["img_backbone.layer1.0.conv1.weight"], 2, 4)


def test_answers_are_apart_by_what_is_sure() -> None:
    torch.manual_seed(0)
    logits, boxes = torch.full((2, 1, 3, 4), -9.0), torch.zeros(2, 1, 3, 10)
    logits[:, :, 0, 1] = 9.0  # of three queries one sees something
    weights = torch.ones(10)
    theirs = Predictions(logits, boxes)
    assert float(answers_apart(theirs, theirs, weights)) == pytest.approx(0, abs=1e-5)
    moved, elsewhere = boxes.clone(), boxes.clone()
    moved[:, :, 0, 0], elsewhere[:, :, 1, 0] = 2.0, 2.0
    seen = float(answers_apart(Predictions(logits, moved), theirs, weights))
    assert seen == pytest.approx(2 * 2.0 * BOX_WEIGHT, rel=1e-2), "two layers, two metres"
    assert float(answers_apart(Predictions(logits, elsewhere), theirs, weights)) < 0.01 * seen
    assert float(answers_apart(Predictions(-logits, boxes), theirs, weights)) > 10


def test_answers_to_the_originals_queries_are_learnt(samples: list[Keyframe]) -> None:
    torch.manual_seed(0)
    original = BEVFormer(CONFIG).eval()
    head = original.pts_bbox_head
    bev = torch.randn(1, CONFIG.bev_h * CONFIG.bev_w, CONFIG.embed_dims)
    queries = head.queries(bev)

    def apart(model: Any) -> float:
        with torch.no_grad():
            theirs, ours = head.decode(bev, queries), model.pts_bbox_head.decode(bev, queries)
            return float(answers_apart(ours, theirs, head.code_weights))

    free, held = (followed(samples, FollowOriginal(epochs=2, lr=1e-2, answers=a))[0] for a in (0.0, 5.0))
    assert 0 < apart(held) < 0.7 * apart(free)
