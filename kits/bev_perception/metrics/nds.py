"""The nuScenes detection score and its parts, equal to nuscenes-devkit's `detection_cvpr_2019` to rounding.

Written from the definition (Caesar et al., "nuScenes: A multimodal dataset for autonomous driving", CVPR 2020) and
checked against results of nuscenes-devkit 1.2.0. Matching is per sample, so it is done once; scores of a part
of the samples and bootstrap intervals only weigh the same matches anew.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.kit import InputError
from kits.bev_perception.data.boxes import Boxes
from kits.bev_perception.data.classes import CLASSES, LABELS
from kits.bev_perception.data.geometry import Array, inside_box, yaw

THRESHOLDS = (0.5, 1.0, 2.0, 4.0)  # m between the centres seen from above
TP_THRESHOLD = 2.0
RANGES = {
    "car": 50, "truck": 50, "bus": 50, "trailer": 50, "construction_vehicle": 50,
    "pedestrian": 40, "motorcycle": 40, "bicycle": 40, "traffic_cone": 30, "barrier": 30,
}  # fmt: skip
MAX_BOXES = 500  # a sample
MIN_RECALL, MIN_PRECISION = 0.1, 0.1
AP_WEIGHT = 5.0
ERRORS = ("trans_err", "scale_err", "orient_err", "vel_err", "attr_err")
NAMES = dict(zip(ERRORS, ("mATE", "mASE", "mAOE", "mAVE", "mAAE")))
# A cone looks the same from all sides and a barrier stands: these are no errors of theirs.
UNDEFINED = {"traffic_cone": ("orient_err", "vel_err", "attr_err"), "barrier": ("vel_err", "attr_err")}
RECALLS = np.linspace(0, 1, 101)
FIRST = round(100 * MIN_RECALL) + 1  # the first step of RECALLS that counts


@dataclass(frozen=True)
class Truth:
    """What is there in one sample: boxes in the global frame, where the ego vehicle stands (3,), and racks of bicycles.

    `racks` are centres (3,), sizes (3,) and rotations (4,): bicycles and motorcycles in one are not scored.
    """

    boxes: Boxes
    ego: Array
    racks: tuple[tuple[Array, Array, Array], ...] = ()


@dataclass(frozen=True)
class Curve:
    """Precision over recall for one class and threshold, with the mean error of the matches up to each recall.

    Every array is (101,), at recalls 0, 0.01, ..., 1; `confidence` is 0 beyond the greatest recall reached.
    """

    precision: Array
    confidence: Array
    errors: Mapping[str, Array]

    @property
    def ap(self) -> float:
        """The area above 10 % precision and recall, scaled to 0..1."""
        return float(np.mean(np.maximum(self.precision[FIRST:] - MIN_PRECISION, 0))) / (1 - MIN_PRECISION)

    def error(self, name: str) -> float:
        """The mean over all recalls reached from 11 % on; 1 where none is."""
        reached = np.flatnonzero(self.confidence)
        last = int(reached[-1]) if len(reached) else 0
        return float(np.mean(self.errors[name][FIRST : last + 1])) if last >= FIRST else 1.0


NOTHING = Curve(np.zeros(101), np.zeros(101), {name: np.ones(101) for name in ERRORS})


@dataclass(frozen=True)
class Score:
    """Average precisions and errors by class; the summary is over `classes`, which are all ten in the official score.

    `aps[name][threshold]` is in 0..1; `errors[name][error]` in m, 1 - IoU, rad, m/s, 1 - accuracy, NaN where undefined.
    `truths[name]` counts the boxes to be found.
    """

    aps: Mapping[str, Mapping[float, float]]
    errors: Mapping[str, Mapping[str, float]]
    truths: Mapping[str, int]
    classes: tuple[str, ...] = CLASSES

    @property
    def class_aps(self) -> dict[str, float]:
        """The mean over the thresholds, by class."""
        return {name: float(np.mean(list(self.aps[name].values()))) for name in self.classes}

    @property
    def mean_ap(self) -> float:
        """mAP, 0..1."""
        return float(np.mean(list(self.class_aps.values()))) if self.classes else float("nan")

    @property
    def mean_errors(self) -> dict[str, float]:
        """mATE, mASE, mAOE, mAVE and mAAE under the names of ERRORS; 1 where no class of `classes` defines it."""
        found = {}
        for error in ERRORS:
            known = [v for name in self.classes if not np.isnan(v := self.errors[name][error])]
            found[error] = float(np.mean(known)) if known else 1.0
        return found

    @property
    def nds(self) -> float:
        """The nuScenes detection score, 0..1: half mAP, half what the five errors leave of 1."""
        left = sum(max(0.0, 1 - error) for error in self.mean_errors.values())
        return (AP_WEIGHT * self.mean_ap + left) / (AP_WEIGHT + len(ERRORS))

    def over(self, classes: Sequence[str]) -> Score:
        """The same with the summary over some classes alone; that is not the official score."""
        return Score(self.aps, self.errors, self.truths, tuple(classes))

    @property
    def present(self) -> tuple[str, ...]:
        """The classes of which there is anything to find: the others count as missed in the official score."""
        return tuple(name for name in self.classes if self.truths[name])

    def to_json(self) -> dict[str, Any]:
        """The names and layout of the devkit's `metrics_summary.json`; NaN becomes null."""
        errors = {n: {k: None if np.isnan(v) else v for k, v in self.errors[n].items()} for n in self.classes}
        return {
            "label_aps": {n: {str(t): ap for t, ap in self.aps[n].items()} for n in self.classes},
            "mean_dist_aps": self.class_aps,
            "mean_ap": self.mean_ap,
            "label_tp_errors": errors,
            "tp_errors": self.mean_errors,
            "tp_scores": {k: max(0.0, 1 - v) for k, v in self.mean_errors.items()},
            "nd_score": self.nds,
            "truths": {n: self.truths[n] for n in self.classes},
        }


@dataclass(frozen=True)
class Found:
    """The predictions of one class, best first, and what each met at one threshold.

    `scores` (p,), `samples` (p,) index of the sample, `hit` (p,) bool; `errors[name]` (hits,) of the hits alone,
    NaN where the truth does not say. `truths` (samples,) counts what was to be found in each sample.
    """

    scores: Array
    samples: NDArray[np.int64]
    hit: NDArray[np.bool_]
    errors: Mapping[str, Array]
    truths: NDArray[np.int64]


@dataclass(frozen=True)
class Matches:
    """All matches of a set of samples; `score` weighs them into a Score."""

    samples: tuple[str, ...]
    found: Mapping[tuple[str, float], Found] = field(repr=False)

    def score(self, samples: Collection[str] | None = None) -> Score:
        """The score of all samples, or of some, such as those by night.

        Raises InputError for a token that was not matched.
        """
        if samples is None:
            return self._weighed(np.ones(len(self.samples), dtype=np.int64))
        if unknown := sorted(set(samples) - set(self.samples)):
            raise InputError(f"sample {unknown[0]!r}: not among the {len(self.samples)} that were scored")
        chosen = set(samples)
        return self._weighed(np.array([token in chosen for token in self.samples], dtype=np.int64))

    def interval(
        self, groups: Mapping[str, str], *, confidence: float = 0.95, resamples: int = 200, seed: int = 0
    ) -> dict[str, tuple[float, float]]:
        """Percentile bootstrap intervals of "nds" and "mean_ap", drawing whole groups, mostly scenes, with replacement.

        `groups` gives the group of each sample token; samples that it leaves out are left out. Raises ValueError with
        fewer than two groups. Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993).
        """
        names = sorted({groups[token] for token in self.samples if token in groups})
        if len(names) < 2:
            raise ValueError(f"{len(names)} group(s) of samples, expected at least 2 to draw from")
        place = {name: index for index, name in enumerate(names)}
        at = np.array([place[groups[token]] if token in groups else -1 for token in self.samples])
        draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), resamples)
        scores = [self._weighed(np.where(at >= 0, draw[at], 0)) for draw in draws]
        tails = [(1 - confidence) / 2, (1 + confidence) / 2]
        found = {"nds": [s.nds for s in scores], "mean_ap": [s.mean_ap for s in scores]}
        return {name: tuple(float(v) for v in np.quantile(values, tails)) for name, values in found.items()}  # type: ignore[misc]

    def _weighed(self, times: NDArray[np.int64]) -> Score:
        curves = {key: curve(found, times) for key, found in self.found.items()}
        aps = {name: {t: curves[name, t].ap for t in THRESHOLDS} for name in CLASSES}
        errors = {
            name: {
                error: float("nan") if error in UNDEFINED.get(name, ()) else curves[name, TP_THRESHOLD].error(error)
                for error in ERRORS
            }
            for name in CLASSES
        }
        truths = {name: int(self.found[name, TP_THRESHOLD].truths @ times) for name in CLASSES}
        return Score(aps, errors, truths)


def score(truth: Mapping[str, Truth], predictions: Mapping[str, Boxes]) -> Score:
    """The official score of predictions (global frame) by sample token; raises InputError as `match` does."""
    return match(truth, predictions).score()


def match(truth: Mapping[str, Truth], predictions: Mapping[str, Boxes]) -> Matches:
    """Meet every prediction, best first, with the nearest truth of its class that is not yet taken.

    Both are filtered as the devkit does: by the class's range around the ego vehicle, boxes without any point in them,
    bicycles in racks. Among equal scores the later one comes first, in the order of `predictions`. Raises InputError
    where the two have not the same samples, or a prediction is not `sound`.
    """
    if missing := [token for token in truth if token not in predictions]:
        raise InputError(
            f"predictions: sample {missing[0]!r} is missing ({len(missing)} in all); give it an empty list"
        )
    if more := [token for token in predictions if token not in truth]:
        raise InputError(f"predictions: sample {more[0]!r} is not in the split ({len(more)} in all); leave it out")
    for token, boxes in predictions.items():
        sound(f"predictions: sample {token!r}", boxes)
    tokens = tuple(predictions)
    real = [_scored(truth[token].boxes, truth[token]) for token in tokens]
    said = [_scored(predictions[token], truth[token]) for token in tokens]
    everything = Boxes.join(said)
    where = np.repeat(np.arange(len(tokens)), [len(boxes) for boxes in said])
    found = {}
    for name in CLASSES:
        label = LABELS[name]
        ours = np.flatnonzero(everything.labels == label)
        order = ours[np.lexsort((ours, everything.scores[ours]))[::-1]]
        targets = [boxes[boxes.labels == label] for boxes in real]
        for threshold in THRESHOLDS:
            found[name, threshold] = _meet(name, everything[order], where[order], targets, threshold)
    return Matches(tokens, found)


def sound(where: str, boxes: Boxes) -> None:
    """Raise InputError, beginning with `where`, for predictions that cannot be scored: too many, or not finite."""
    if len(boxes) > MAX_BOXES:
        raise InputError(f"{where} holds {len(boxes)} boxes, at most {MAX_BOXES} are scored; keep the best")
    for name in ("centers", "sizes", "rotations", "scores"):
        values = getattr(boxes, name)
        values = values[:, None] if values.ndim == 1 else values
        if len(bad := np.flatnonzero(~np.isfinite(values).all(axis=1))):
            raise InputError(
                f"{where}, box {bad[0]}: {name} {values[bad[0]].tolist()} are not finite; leave the box out"
            )
    if len(bad := np.flatnonzero((boxes.sizes <= 0).any(axis=1))):
        raise InputError(
            f"{where}, box {bad[0]}: size {boxes.sizes[bad[0]].tolist()} is not above 0; leave the box out"
        )


def curve(found: Found, times: NDArray[np.int64]) -> Curve:
    """The curve of one class and threshold, each sample counted `times` (samples,) times."""
    weight = times[found.samples]
    total = int(found.truths @ times)
    hits_weight = weight[found.hit]
    if total == 0 or not hits_weight.any():
        return NOTHING
    hit, scores = np.repeat(found.hit, weight), np.repeat(found.scores, weight)
    right = np.cumsum(hit).astype(np.float64)
    precision, recall = right / np.arange(1, len(hit) + 1), right / total
    confidence = np.interp(RECALLS, recall, scores, right=0)
    # The errors are known by confidence, so they are read at the confidence of each recall; interp wants it rising.
    at = np.repeat(found.scores[found.hit], hits_weight)[::-1]
    errors = {
        name: np.interp(confidence[::-1], at, _running_mean(np.repeat(values, hits_weight))[::-1])[::-1]
        for name, values in found.errors.items()
    }
    return Curve(np.interp(RECALLS, recall, precision, right=0), confidence, errors)


def _running_mean(values: Array) -> Array:
    """The mean of all values so far that are numbers: 0 before the first, 1 throughout where there is none."""
    known = ~np.isnan(values)
    if not known.any():
        return np.ones(len(values))
    count = np.cumsum(known)
    return np.nancumsum(values) / np.maximum(count, 1)


def _scored(boxes: Boxes, truth: Truth) -> Boxes:
    """The boxes that the score counts."""
    limits = np.array([RANGES[name] for name in CLASSES], dtype=np.float64)
    dx, dy = (boxes.centers[:, :2] - truth.ego[:2]).T
    boxes = boxes[(np.sqrt(dx * dx + dy * dy) < limits[boxes.labels]) & (boxes.num_pts != 0)]
    if not truth.racks:
        return boxes
    cycles = np.isin(boxes.labels, [LABELS["bicycle"], LABELS["motorcycle"]])
    parked = np.any([inside_box(boxes.centers, *rack) for rack in truth.racks], axis=0)
    return boxes[~(cycles & parked)]


def _meet(name: str, said: Boxes, where: NDArray[np.int64], targets: Sequence[Boxes], threshold: float) -> Found:
    taken = [np.zeros(len(boxes), dtype=bool) for boxes in targets]
    hit = np.zeros(len(said), dtype=bool)
    partner = np.full(len(said), -1)
    for row in range(len(said)):
        sample = where[row]
        if not len(targets[sample]):
            continue
        dx, dy = (targets[sample].centers[:, :2] - said.centers[row, :2]).T
        distance = np.where(taken[sample], np.inf, np.sqrt(dx * dx + dy * dy))
        nearest = int(np.argmin(distance))
        if distance[nearest] < threshold:
            taken[sample][nearest] = hit[row] = True
            partner[row] = nearest
    counts = np.array([len(boxes) for boxes in targets], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64) if len(counts) else counts
    met = Boxes.join(list(targets))[starts[where[hit]] + partner[hit]]
    return Found(said.scores, where, hit, _errors(name, met, said[hit]), counts)


def _errors(name: str, real: Boxes, said: Boxes) -> dict[str, Array]:
    """The five errors of pairs, each (pairs,)."""
    both = np.minimum(real.sizes, said.sizes).prod(axis=1)
    overlap = both / (real.sizes.prod(axis=1) + said.sizes.prod(axis=1) - both)
    period = np.pi if name == "barrier" else 2 * np.pi
    turn = (yaw(real.rotations) - yaw(said.rotations) + period / 2) % period - period / 2
    return {
        "trans_err": np.linalg.norm(said.centers[:, :2] - real.centers[:, :2], axis=1),
        "scale_err": 1 - overlap,
        "orient_err": np.abs(turn),
        "vel_err": np.linalg.norm(said.velocities - real.velocities, axis=1),
        "attr_err": np.where(real.attributes < 0, np.nan, (real.attributes != said.attributes).astype(np.float64)),
    }
