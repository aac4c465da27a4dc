"""The dynamic path: a small detector watches, and a frame that looks like a surprise is looked at again by a large one.

Cheap cues decide, from what is there anyway: how much the pictures have changed where the car will drive, boxes on its
way that are new, and above all how many things that move may be there without its being sure. A budget bounds the share
of frames that are looked at twice, so that the mean cost is known beforehand and the worst frame costs one small and
one large pass. Of such a frame both answers count, of one thing that both see the surer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kits.bev_perception.model import boxes
from kits.bev_perception.model.configs import Config

GRID = (10, 18)
"""Blocks of a picture whose change is looked at, rows first."""


@dataclass(frozen=True)
class Policy:
    """When to look again.

    A frame's alarm is the sum of three cues: `change`, `novelty` (0 to 1 each) and `doubt` (1 for each box that is as
    likely to be there as not) are their weights. From `alarm` on the frame is looked at again, while the budget lasts:
    `share` frames are earned a frame, `burst` at most are saved up. `ahead` (m) and `aside` (m) bound the way before
    the car. Cues, way and `burst` were chosen by the 33 sudden obstacles of the generated training scenes.
    """

    alarm: float = 5.0
    change: float = 1.0
    novelty: float = 1.0
    doubt: float = 1.0
    share: float = 0.25
    burst: float = 4.0
    ahead: float = 20.0
    aside: float = 4.0
    near: float = 3.0
    """Metres within which a box is the one of the frame before."""
    same: float = 2.0
    """Metres within which boxes of a class, one of each detector, are one thing: where nuScenes scores errors."""


STANDING = ("barrier", "traffic_cone")
"""Classes that come from nowhere only where something else has moved."""
SAID = 0.05
"""The score from which a box is looked at."""
KEPT = 1000
"""Frames whose cues are kept: a car drives for days."""


@dataclass
class Watch:
    """What happened: how many frames came and were looked at again, and of the last `KEPT` ones the cues."""

    frames: int = 0
    twice: int = 0
    alarms: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    cues: deque[tuple[float, float, float]] = field(default_factory=lambda: deque(maxlen=KEPT))
    again: deque[bool] = field(default_factory=lambda: deque(maxlen=KEPT))

    @property
    def share(self) -> float:
        """The share of frames that were looked at again, 0 to 1."""
        return self.twice / self.frames if self.frames else 0.0

    def note(self, alarm: float, cues: tuple[float, float, float], again: bool) -> None:
        """One more frame."""
        self.frames, self.twice = self.frames + 1, self.twice + again
        self.alarms.append(alarm)
        self.cues.append(cues)
        self.again.append(again)


def freeze_alarm(alarms: Sequence[float], share: float = Policy.share) -> float:
    """The alarm that only the `share` of frames with the highest ones reaches: a lower one has spent its budget on
    everyday frames when a surprise comes.

    `alarms` are those of validation frames (`Watch.alarms`: of the last `KEPT`). Raises ValueError without any.
    """
    if not alarms:
        raise ValueError("no alarm to freeze one by; watch some validation frames first")
    return float(np.quantile(np.asarray(alarms), 1 - share, method="higher"))


class Dynamic(nn.Module):
    """Called as `BEVFormer.forward` for one frame after the other; `small` and `large` share the form of the memory.

    A frame without history begins a new scene: then there is nothing to compare with, and it is seen as it comes. The
    memory stays the small one's: a second look changes later alarms only by what is then no longer new.
    """

    def __init__(self, small: nn.Module, large: nn.Module, config: Config, policy: Policy | None = None) -> None:
        super().__init__()
        self.small, self.large, self.config = small, large, config
        self.policy = policy or Policy()
        self.watch = Watch()
        self._standing = [config.classes.index(name) for name in STANDING if name in config.classes]
        self._saved = self.policy.burst
        self._blocks: Tensor | None = None
        self._seen: Tensor | None = None

    def forward(
        self,
        images: Tensor,
        lidar2img: Tensor,
        can_bus: Tensor,
        prev_bev: Tensor,
        has_prev: Tensor,
        camera_mask: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if float(has_prev[0]) < 0.5:
            self._blocks, self._seen, self._saved = None, None, self.policy.burst
        inputs = (images, lidar2img, can_bus, prev_bev, has_prev, camera_mask)
        found: tuple[Tensor, Tensor, Tensor] = self.small(*inputs)
        cues = self._change(images, camera_mask), *self._way(found, can_bus)
        policy = self.policy
        alarm = policy.change * cues[0] + policy.novelty * cues[1] + policy.doubt * cues[2]
        self._saved = min(policy.burst, self._saved + policy.share)
        again = alarm >= policy.alarm and self._saved >= 1
        if again:
            self._saved -= 1
            found = *self._both(found, self.large(*inputs)), found[2]
            self._way(found, can_bus, keep_only=True)
        self.watch.note(alarm, cues, again)
        return found

    def _both(
        self, small: tuple[Tensor, Tensor, Tensor], large: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Logits (1, O', K) and codes (1, O', 10) of what either says, of one thing that both say the surer."""
        logits, codes = zip(*((found[0][0], found[1][0]) for found in (small, large)))
        here, there = (boxes.decode(code)[:, :2] for code in codes)
        (ours, our_labels), (theirs, their_labels) = (each.sigmoid().max(-1) for each in logits)
        one = (torch.cdist(here, there) < self.policy.same) & (our_labels[:, None] == their_labels)
        kept = (ours > SAID) & ~(one & (theirs >= ours[:, None])).any(1)
        left = ~one[kept].any(0)
        both = (torch.cat((a[kept], b[left]))[None] for a, b in (logits, codes))
        return next(both), next(both)

    def _change(self, images: Tensor, camera_mask: Tensor) -> float:
        """How much more one block of the front picture has changed than the others, 0 (none) to 1."""
        blocks = F.adaptive_avg_pool2d(images[0].mean(1, keepdim=True), GRID)[:, 0] * camera_mask[0][:, None, None]
        before, self._blocks = self._blocks, blocks
        if before is None:
            return 0.0
        # a car that drives changes all blocks; what jumps into the way changes few of them a lot
        moved = (blocks - before)[0, GRID[0] // 3 :].abs().flatten()
        usual = moved.median().clamp(min=1e-3)
        return float(((moved.topk(3).values.mean() / usual) / 20).clamp(0, 1))

    def _way(
        self, found: tuple[Tensor, Tensor, Tensor], can_bus: Tensor, *, keep_only: bool = False
    ) -> tuple[float, float]:
        """(novelty, doubt): the surest box on the way that was not there before, and how much may be moving there."""
        said = boxes.detections(found[0][0], found[1][0], self.config)
        x, y = said.boxes[:, 0], said.boxes[:, 1]
        way = (y > 0) & (y < self.policy.ahead) & (x.abs() < self.policy.aside) & (said.scores > SAID)
        # where the car has driven on, what stands still has come nearer
        here = said.boxes[:, :2] + torch.stack((can_bus.new_zeros(()), can_bus[0, :2].norm()))
        before, self._seen = self._seen, said.boxes[said.scores > SAID][:, :2]
        if keep_only or not bool(way.any()):
            return 0.0, 0.0
        scores = said.scores[way]
        moving = (said.labels[way, None] != said.labels.new_tensor(self._standing)).all(1)
        doubt = float((4 * scores * (1 - scores))[moving].sum())
        if before is None:
            return 0.0, doubt
        apart = torch.cdist(here[way], before).amin(1) if len(before) else scores.new_full(scores.shape, torch.inf)
        new = apart > self.policy.near
        return (float(scores[new].max()) if bool(new.any()) else 0.0), doubt
