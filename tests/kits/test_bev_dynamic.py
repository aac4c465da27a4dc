"""The dynamic path: a frame that looks like a surprise is looked at again, within a bound."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kits.bev_perception.dynamic import KEPT, Dynamic, Policy, Watch, freeze_alarm
from kits.bev_perception.model.boxes import encode
from tests.kits.bev_models import MICRO

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Says(nn.Module):
    """A detector that says boxes of a class at (x, y) with a score, and counts its calls."""

    def __init__(
        self, score: float = 0.01, place: tuple[float, float] = (0.0, 15.0), count: int = 1, what: str = "car"
    ) -> None:
        super().__init__()
        self.score, self.place, self.count, self.calls = score, place, count, 0
        self.label = MICRO.classes.index(what)

    def forward(self, images: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.calls += 1
        scores = torch.full((1, MICRO.num_query, 10), -9.0)
        scores[0, : self.count, self.label] = torch.logit(torch.tensor(self.score))
        box = torch.tensor([[*self.place, -1.0, 1.9, 4.5, 1.6, 0.0, 0.0, 0.0]])
        codes = encode(box).expand(1, MICRO.num_query, 10).clone()
        return scores, codes, torch.zeros(1, 120, 32)


def frame(images: Tensor | None = None, first: bool = False, driven: float = 0.0) -> Inputs:
    can_bus = torch.zeros(1, 18)
    can_bus[0, 1] = driven
    pictures = images if images is not None else torch.zeros(1, 6, 3, 64, 96)
    matrices, memory = torch.eye(4).expand(1, 6, 4, 4), torch.zeros(1, 120, 32)
    return pictures, matrices, can_bus, memory, torch.tensor([0.0 if first else 1.0]), torch.ones(1, 6)


def test_a_quiet_street_is_seen_by_the_small_one_alone() -> None:
    small, large = Says(0.01), Says(0.9)
    path = Dynamic(small, large, MICRO)
    for index in range(6):
        path(*frame(first=index == 0))
    assert (small.calls, large.calls, path.watch.share) == (6, 0, 0.0)


def test_something_new_on_the_way_is_looked_at_again() -> None:
    small, large = Says(0.01), Says(0.9)
    path = Dynamic(small, large, MICRO, Policy(alarm=0.4, change=0.0, doubt=0.0))
    path(*frame(first=True))
    path(*frame())
    small.score = 0.6
    scores, _, _ = path(*frame())
    assert list(path.watch.again) == [False, False, True]
    assert float(scores.sigmoid().max()) == pytest.approx(0.9, abs=1e-4), "of one thing the surer answer counts"
    assert int((scores.sigmoid().amax(-1) > 0.05).sum()) == 1, "and once"
    path(*frame(driven=0.5))
    assert not path.watch.again[-1], "what was there before, and has come nearer as the car drove on, is no news"


def answers(small: Says, large: Says) -> tuple[list[tuple[float, float, int]], Tensor]:
    """(score, x, class) of what is said with 0.05 or more of a frame that is looked at again, and the memory."""
    scores, codes, memory = Dynamic(small, large, MICRO, Policy(alarm=0.0))(*frame(first=True))
    best, labels = scores[0].sigmoid().max(-1)
    said = [(float(s), float(x), int(c)) for s, x, c in zip(best, codes[0, :, 0], labels) if s > 0.05]
    return sorted((round(s, 3), round(x, 3), c) for s, x, c in said), memory


def test_of_a_second_look_both_answers_count_and_of_one_thing_the_surer() -> None:
    car, truck = (MICRO.classes.index(name) for name in ("car", "truck"))
    assert answers(Says(0.4), Says(0.7, (1.9, 15.0)))[0] == [(0.7, 1.9, car)]
    assert answers(Says(0.7), Says(0.4, (1.9, 15.0)))[0] == [(0.7, 0.0, car)]
    assert answers(Says(0.7), Says(0.7))[0] == [(0.7, 0.0, car)], "as sure: once"
    assert answers(Says(0.7), Says(0.4, (2.1, 15.0)))[0] == [(0.4, 2.1, car), (0.7, 0.0, car)], "two things"
    assert answers(Says(0.7), Says(0.4, what="truck"))[0] == [(0.4, 0.0, truck), (0.7, 0.0, car)], "of two classes"
    assert answers(Says(0.04), Says(0.4, (9.0, 15.0)))[0] == [(0.4, 9.0, car)]
    assert answers(Says(0.4), Says(0.04, (9.0, 15.0)))[0] == [(0.4, 0.0, car)], "what only the small one saw stays"


def test_the_memory_stays_the_small_ones() -> None:
    class Remembers(Says):
        def forward(self, images: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            scores, codes, memory = super().forward(images, *rest)
            return scores, codes, memory + self.score

    assert torch.equal(answers(Remembers(0.4), Remembers(0.7))[1], torch.full((1, 120, 32), 0.4))


def test_something_beside_the_way_is_none_of_its_business() -> None:
    small, large = Says(0.01, (30.0, 15.0)), Says(0.9)
    path = Dynamic(small, large, MICRO, Policy(alarm=0.4, change=0.0))
    path(*frame(first=True))
    small.score = 0.5
    path(*frame())
    assert large.calls == 0


def test_doubts_about_what_moves_add_up() -> None:
    def alarms(**said: object) -> list[float]:
        path = Dynamic(Says(**said), Says(), MICRO, Policy(change=0.0, novelty=0.0))  # type: ignore[arg-type]
        path(*frame(first=True))
        return list(path.watch.alarms)

    assert alarms(score=0.5) == pytest.approx([1.0])
    assert alarms(score=0.5, count=3, what="pedestrian") == pytest.approx([3.0])
    assert alarms(score=0.9, count=3) == pytest.approx([3 * 4 * 0.9 * 0.1], abs=1e-4), "what is sure is no doubt"
    assert alarms(score=0.5, count=3, what="traffic_cone") == [0.0], "a cone does not dart out"
    assert alarms(score=0.5, place=(4.5, 15.0)) == [0.0], "beside the way"
    assert alarms(score=0.5, place=(0.0, 21.0)) == [0.0], "too far off to be sudden"


def test_a_block_that_changes_while_the_others_do_not_raises_the_alarm() -> None:
    torch.manual_seed(0)
    path = Dynamic(Says(), Says(), MICRO, Policy(alarm=0.6, novelty=0.0, doubt=0.0))
    street = torch.randn(1, 6, 3, 64, 96) * 0.01
    path(*frame(street, first=True))
    drifted = street + torch.randn_like(street) * 0.2
    path(*frame(drifted))
    sudden = drifted + torch.randn_like(street) * 0.2
    sudden[0, 0, :, 30:50, 40:56] += 2.0
    path(*frame(sudden))
    assert list(path.watch.again) == [False, False, True]
    assert path.watch.cues[2][0] > 3 * path.watch.cues[1][0]


def test_the_budget_bounds_what_a_wild_street_costs() -> None:
    small, large = Says(0.5), Says(0.9)
    policy = Policy(alarm=0.0, share=0.25, burst=2.0)
    path = Dynamic(small, large, MICRO, policy)
    frames = 40
    for index in range(frames):
        path(*frame(first=index == 0))
    assert small.calls == frames
    assert large.calls <= policy.burst + policy.share * frames
    assert large.calls >= policy.share * frames, "what was earned is spent where every frame alarms"


def test_a_new_scene_forgets_the_last_one() -> None:
    small = Says(0.01)
    path = Dynamic(small, Says(), MICRO, Policy(alarm=0.4, doubt=0.0))
    path(*frame(first=True))
    small.score = 0.6
    path(*frame(first=True))
    assert list(path.watch.again) == [False, False]


def test_a_drive_of_days_keeps_its_share_and_not_every_frame() -> None:
    watch = Watch()
    for index in range(3 * KEPT):
        watch.note(0.1, (0.0, 0.0, 0.1), index % 4 == 0)
    assert (len(watch.alarms), len(watch.cues), len(watch.again)) == (KEPT, KEPT, KEPT)
    assert watch.share == 0.25 and watch.frames == 3 * KEPT


def test_the_frozen_alarm_is_one_that_few_frames_reach() -> None:
    alarms = [i / 100 for i in range(100)]
    alarm = freeze_alarm(alarms, share=0.25)
    assert sum(a >= alarm for a in alarms) == 25
    assert freeze_alarm([0.5] * 8) == 0.5, "where all frames are alike the budget decides"
    with pytest.raises(ValueError, match="watch some validation frames"):
        freeze_alarm([])
