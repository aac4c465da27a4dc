"""The LiDAR teacher and the step in which the cameras learn from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core.compress import compress
from core.kit import InputError, Recipe
from core.train import Schedule
from core.weights import save_weights
from kits.bev_perception.data.keyframes import Keyframe, keyframes
from kits.bev_perception.data.nuscenes import NuScenes
from kits.bev_perception.data.streams import Shot, Variation
from kits.bev_perception.data.world import generate_world
from kits.bev_perception.lidar import LearnFromLidar, cloud, foreground, observed_by_lidar, train_teacher
from kits.bev_perception.model.detector import BEVFormer
from kits.bev_perception.model.loss import Truth
from kits.bev_perception.model.teacher import LidarTeacher
from kits.bev_perception.training import learner_of
from tests.kits.test_bev_training import PROPOSING, boxes_at


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Keyframe]:
    root = tmp_path_factory.mktemp("world") / "set"
    generate_world(root, 1, 4, samples=3, size=(96, 54), supersample=1, workers=1, lidar_sweeps=False, quiet=True)
    data = NuScenes(root)
    return keyframes(data, data.split("all"))


def test_points_lie_in_their_boxes_however_the_scene_is_shown(samples: list[Keyframe]) -> None:
    from kits.bev_perception.data.streams import boxes_of

    def within(variation: Variation) -> list[int]:
        shot = Shot(samples[0], None, variation)
        points, (truth,) = cloud(shot), boxes_of([shot], PROPOSING)
        counts = []
        for x, y, z, w, length, h, yaw, *_ in truth.boxes.tolist():
            # the network's yaw is -yaw - pi / 2: sin and cos of the heading itself
            heading = torch.tensor(-yaw - torch.pi / 2)
            dx, dy = points[:, 0] - x, points[:, 1] - y
            along, across = heading.cos() * dx + heading.sin() * dy, heading.cos() * dy - heading.sin() * dx
            hit = (along.abs() < length / 2) & (across.abs() < w / 2) & ((points[:, 2] - z).abs() < h / 2)
            counts.append(int(hit.sum()))
        return counts

    plain = within(Variation())
    assert sum(plain) > 20
    assert within(Variation(mirror=True)) == plain
    turned = within(Variation(turn=0.05))
    assert abs(sum(turned) - sum(plain)) <= 0.02 * sum(plain) + 2


def test_a_pillar_holds_the_points_that_fall_into_it() -> None:
    torch.manual_seed(0)
    teacher = LidarTeacher(PROPOSING).eval()
    nothing = teacher.pillars([torch.zeros(0, 4)])
    # one thing at the right, another ahead: the BEV changes there
    car = torch.tensor([[30.0, 0.5, -1.0, 20.0]]).repeat(50, 1)
    with torch.no_grad():
        changed = (teacher.pillars([car]) - nothing)[0].norm(dim=1).view(PROPOSING.bev_h, PROPOSING.bev_w)
    row, column = divmod(int(changed.argmax()), PROPOSING.bev_w)
    assert abs((column + 0.5) / PROPOSING.bev_w * 102.4 - 51.2 - 30.0) < 2 * 102.4 / PROPOSING.bev_w
    assert abs((row + 0.5) / PROPOSING.bev_h * 102.4 - 51.2 - 0.5) < 2 * 102.4 / PROPOSING.bev_h


def test_all_of_the_teacher_learns() -> None:
    torch.manual_seed(0)
    teacher, truth = LidarTeacher(PROPOSING), boxes_at((10.0, 20.0), (-33.0, 4.4))
    cloud_ = torch.cat([truth.boxes[:, :3].repeat(40, 1) + torch.rand(80, 3), torch.rand(80, 1) * 255], 1)
    optimizer = torch.optim.AdamW(teacher.parameters(), 2e-3)
    values = []
    for _ in range(25):
        loss = teacher.loss([cloud_], [truth])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.6 * values[0]
    silent = [n for n, p in teacher.named_parameters() if p.requires_grad and p.grad is None]
    assert not silent, silent


def test_foreground_is_where_something_stands() -> None:
    weight = foreground([boxes_at((10.0, 20.0)), Truth(torch.zeros(0, 9), torch.zeros(0, dtype=torch.long))], PROPOSING)
    assert weight.shape == (2, 1, PROPOSING.bev_h, PROPOSING.bev_w)
    row, column = divmod(int(weight[0, 0].argmax()), PROPOSING.bev_w)
    assert (column, row) == (int((10 + 51.2) / 102.4 * PROPOSING.bev_w), int((20 + 51.2) / 102.4 * PROPOSING.bev_h))
    assert float(weight[0].max()) == 1.0 and float(weight[1].max()) == 0.0


class Data:
    """As much of a kit as the step asks for."""

    def __init__(self, samples: list[Keyframe]) -> None:
        self.samples = samples

    def dataset(self, data: Path | None, split: str, preset: str = "full") -> list[Keyframe]:
        return self.samples


def test_cameras_learn_from_a_teacher_and_stay_what_they_are(samples: list[Keyframe], tmp_path: Path) -> None:
    schedule = Schedule(epochs=1, batch_size=2, lr=1e-3, ema=0.5)
    teacher = train_teacher(samples, schedule, tmp_path / "teacher", False, config=PROPOSING).model
    save_weights(teacher, tmp_path / "teacher.safetensors")
    assert isinstance(teacher, LidarTeacher)
    assert set(observed_by_lidar(teacher, samples)) == {sample.token for sample in samples}
    torch.manual_seed(0)
    net, kit = BEVFormer(PROPOSING).eval(), Data(samples)
    made: dict[float, dict[str, Tensor]] = {}
    for weight in (0.0, 1.0):
        step = LearnFromLidar(str(tmp_path / "teacher.safetensors"), epochs=1, lr=1e-3, weight=weight)
        learnt, trace = compress(net, Recipe("r", (step,), "", ""), kit)  # type: ignore[arg-type]
        made[weight] = learnt.state_dict()
        assert made[weight].keys() == net.state_dict().keys()
        assert "loss" in trace[0].changed[0]["what"]
    moved = [name for name in made[1.0] if not torch.equal(made[0.0][name], made[1.0][name])]
    assert "img_backbone.conv1.weight" in moved
    torch.manual_seed(1)
    heads = learner_of(net, samples).heads()
    save_weights(heads, tmp_path / "heads.safetensors")
    by_heads = []
    for name in ("", "", str(tmp_path / "heads.safetensors")):
        torch.manual_seed(2)
        step = LearnFromLidar("", epochs=1, lr=1e-3, weight=0.0, heads=name)
        by_heads.append(compress(net, Recipe("r", (step,), "", ""), kit)[0].state_dict())  # type: ignore[arg-type]
    moved = [[n for n in s if not torch.equal(s[n], by_heads[0][n])] for s in by_heads[1:]]
    assert not moved[0] and "img_backbone.conv1.weight" in moved[1]
    gone = LearnFromLidar("", weight=0.0, heads="gone.safetensors")
    with pytest.raises(InputError, match=r"heads: 'gone\.safetensors'"):
        compress(net, Recipe("r", (gone,), "", ""), kit)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "teacher", "said"),
    [(None, "gone.safetensors", "gone.safetensors"), (torch.nn.Linear(2, 2), "gone.safetensors", "Linear")],
)
def test_what_cannot_learn_is_refused(samples: list[Keyframe], model: Any, teacher: str, said: str) -> None:
    net = BEVFormer(PROPOSING) if model is None else model
    with pytest.raises(InputError, match=said):
        compress(net, Recipe("r", (LearnFromLidar(teacher),), "", ""), Data(samples))  # type: ignore[arg-type]
