"""Detection metrics and intervals against torchvision, literal loops, closed forms and cases worked on paper."""

import math
import time

import numpy as np
import pytest
import torch
import torchvision
from scipy.stats import binom

from core.evaluation.detection import (
    COCO_THRESHOLDS,
    average_precision,
    box_iou,
    match,
    match_classes,
    mean_average_precision,
    overlapping,
    suppress,
)
from core.evaluation.intervals import clopper_pearson, group_bootstrap, paired_gain
from core.kit import InputError


def random_boxes(rng, n, spread=200.0):
    corner = rng.uniform(0, spread, (n, 2))
    return np.hstack([corner, corner + rng.uniform(10, 60, (n, 2))])


def random_set(seed, images=12, classes=4):
    """Truths, and predictions that are shifted truths, duplicates, wrong classes and noise."""
    rng = np.random.default_rng(seed)
    predictions, truths = {}, {}
    for i in range(images):
        count = int(rng.integers(0, 8))
        boxes, labels = random_boxes(rng, count), rng.integers(0, classes, count)
        near = np.repeat(boxes, 3, axis=0) + rng.normal(0, 6, (3 * count, 4))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        kinds = np.where(rng.random(3 * count) < 0.8, np.repeat(labels, 3), rng.integers(0, classes, 3 * count))
        noise = random_boxes(rng, 5)
        rows = np.vstack([near, noise])
        scores, all_kinds = rng.random(len(rows)), np.concatenate([kinds, rng.integers(0, classes, 5)])
        predictions[f"i{i}"] = np.column_stack([rows, scores, all_kinds])
        truths[f"i{i}"] = (boxes, labels)
    return predictions, truths


# Overlap and suppression


def test_iou_on_paper():
    iou = box_iou(np.array([[0, 0, 10, 10]]), np.array([[5, 0, 15, 10], [0, 0, 10, 10], [10, 0, 20, 10], [3, 3, 3, 3]]))
    assert iou[0] == pytest.approx([1 / 3, 1, 0, 0])


def test_iou_as_torchvision():
    rng = np.random.default_rng(0)
    a, b = random_boxes(rng, 40), random_boxes(rng, 30)
    assert np.allclose(box_iou(a, b), torchvision.ops.box_iou(torch.from_numpy(a), torch.from_numpy(b)).numpy())


@pytest.mark.parametrize("spread", [1000.0, 200.0, 20.0], ids=["sparse", "crowded", "heap"])
@pytest.mark.parametrize("threshold", [0.1, 0.45, 0.7])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 300])
def test_suppression_as_torchvision(n, threshold, spread):
    rng = np.random.default_rng(n)
    boxes, scores = random_boxes(rng, n, spread).astype(np.float32), rng.random(n).astype(np.float32)
    expected = torchvision.ops.nms(torch.from_numpy(boxes), torch.from_numpy(scores), threshold).numpy()
    assert suppress(boxes, scores, threshold).tolist() == expected.tolist()
    assert suppress(boxes, scores, threshold, limit=5).tolist() == expected[:5].tolist()


@pytest.mark.parametrize("spread", [20000.0, 2000.0, 200.0], ids=["sparse", "crowded", "heap"])
def test_suppression_of_many_boxes_as_torchvision(spread):
    rng = np.random.default_rng(1)
    boxes, scores = random_boxes(rng, 3000, spread).astype(np.float32), rng.random(3000).astype(np.float32)
    boxes -= spread / 2  # a side of an image is no place to begin counting
    expected = torchvision.ops.nms(torch.from_numpy(boxes), torch.from_numpy(scores), 0.4).numpy()
    assert suppress(boxes, scores, 0.4).tolist() == expected.tolist()
    assert suppress(boxes, scores, 0.4, limit=50).tolist() == expected[:50].tolist()


@pytest.mark.parametrize("spread", [5000.0, 300.0])
@pytest.mark.parametrize("n", [0, 1, 400])
def test_pairs_that_share_an_area(n, spread):
    boxes = random_boxes(np.random.default_rng(n), n, spread) - 100
    one, other = overlapping(boxes)
    found = set(zip(one.tolist(), other.tolist(), strict=True))
    width, height = (
        np.minimum(boxes[:, None, i + 2], boxes[:, i + 2]) - np.maximum(boxes[:, None, i], boxes[:, i]) for i in (0, 1)
    )
    assert len(found) == len(one), "each once"
    assert found == set(zip(*(np.triu((width > 0) & (height > 0), 1).nonzero()), strict=True))
    assert overlapping(boxes, 0) is None or not found


def test_a_scan_of_60_000_detections_is_suppressed_in_no_time():
    rng = np.random.default_rng(0)
    boxes, scores = random_boxes(rng, 60_000, 16_384.0).astype(np.float32), rng.random(60_000)
    start = time.thread_time()
    kept = suppress(boxes, scores, 0.4)
    assert len(kept) > 40_000
    assert time.thread_time() - start < 3, "0.2 s on an idle core; every box with every other takes 12 s"


def test_suppression_spares_what_only_a_suppressed_box_overlaps():
    chain = np.array([[0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10]])  # neighbours overlap by 6/14, ends by 2/18
    assert suppress(chain, np.array([0.9, 0.8, 0.7]), 0.4).tolist() == [0, 2]
    assert suppress(chain, np.array([0.8, 0.9, 0.7]), 0.4).tolist() == [1]
    assert suppress(np.repeat(chain[:1], 3, axis=0), np.full(3, 0.5), 0.4).tolist() == [0]


def test_suppression_of_nothing():
    assert suppress(np.zeros((0, 4)), np.zeros(0), 0.5).tolist() == []


def test_suppression_of_300_boxes_is_fast():
    rng = np.random.default_rng(0)
    boxes, scores = random_boxes(rng, 300, 300.0).astype(np.float32), rng.random(300).astype(np.float32)
    best = math.inf
    for _ in range(50):
        start = time.thread_time()
        suppress(boxes, scores, 0.5)
        best = min(best, time.thread_time() - start)
    assert best < 2.5e-3, f"{best * 1e3:.2f} ms; about 0.3 ms on an idle core, a whole matrix at once takes 1 ms"


# Matching


def test_matching_takes_the_best_free_truth_at_each_threshold():
    iou = np.array([[0.6, 0.8], [0.55, 0.9], [0.7, 0.1]])
    assert match(iou, [0.5, 0.75]).tolist() == [[1, 0, -1], [1, -1, -1]]


# Average precision


@pytest.mark.parametrize(
    ("hits", "positives", "none", "all_point", "coco"),
    [
        ([1, 1], 2, 1.0, 1.0, 1.0),
        ([1, 0, 1], 3, 5 / 9, 5 / 9, 56 / 101),  # 34 recalls at 1, 33 at 2/3, 34 never reached
        ([0, 1, 1], 2, 7 / 12, 2 / 3, 2 / 3),  # precision 0, 1/2, 2/3
        ([1, 0], 1, 1.0, 1.0, 1.0),  # a false call behind the last truth costs nothing
        ([0, 0], 4, 0.0, 0.0, 0.0),
        ([], 4, 0.0, 0.0, 0.0),
    ],
)
def test_average_precision_on_paper(hits, positives, none, all_point, coco):
    order = np.random.default_rng(0).permutation(len(hits))
    scores, shuffled = np.linspace(0.9, 0.1, len(hits))[order], np.array(hits, dtype=bool)[order]
    assert average_precision(scores, shuffled, positives, "none") == pytest.approx(none)
    assert average_precision(scores, shuffled, positives, "all-point") == pytest.approx(all_point)
    assert average_precision(scores, shuffled, positives, "coco") == pytest.approx(coco)


def test_average_precision_without_truths_is_not_a_number():
    assert math.isnan(average_precision(np.array([0.5]), np.array([False]), 0, "coco"))


def literal_map(predictions, truths, classes, thresholds):
    """COCO's rules in plain loops, one class, one overlap, one recall at a time."""
    values = []
    for threshold in thresholds:
        for c in range(classes):
            ranked, positives = [], 0
            for image, (boxes, labels) in truths.items():
                wanted = [b for b, k in zip(boxes, labels, strict=True) if k == c]
                positives += len(wanted)
                free = [True] * len(wanted)
                for row in sorted((r for r in predictions[image] if r[5] == c), key=lambda r: -r[4]):
                    best, at = threshold, None
                    for j, box in enumerate(wanted):
                        overlap = torchvision.ops.box_iou(torch.tensor(row[None, :4]), torch.tensor(box[None]))[0, 0]
                        if free[j] and overlap >= best:
                            best, at = float(overlap), j
                    if at is not None:
                        free[at] = False
                    ranked.append((row[4], at is not None))
            if not positives:
                continue
            ranked.sort(key=lambda pair: -pair[0])
            points, correct = [], 0
            for n, (_, hit) in enumerate(ranked, 1):
                correct += hit
                points.append((correct / positives, correct / n))
            samples = [max((p for r, p in points if r >= i / 100), default=0.0) for i in range(101)]
            values.append(sum(samples) / 101)
    return sum(values) / len(values)


@pytest.mark.parametrize("seed", [0, 1])
def test_map_as_literal_loops(seed):
    predictions, truths = random_set(seed, images=6)
    expected = literal_map(predictions, truths, 4, (0.5, 0.75))
    assert mean_average_precision(predictions, truths, 4, (0.5, 0.75)) == pytest.approx(expected)


def test_map_of_a_box_at_known_overlap():
    truths = {"a": (np.array([[0.0, 0, 100, 100]]), np.array([0]))}
    predictions = {"a": np.array([[0.0, 0, 100, 72, 0.9, 0]])}  # IoU 0.72: passes 0.50 to 0.70, 5 of 10
    assert mean_average_precision(predictions, truths, 2) == pytest.approx(0.5)
    assert COCO_THRESHOLDS == (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


def test_duplicates_are_false_and_classes_without_truths_do_not_count():
    box = [0.0, 0, 10, 10]
    truths = {"a": (np.array([box, [50, 50, 60, 60]]), np.array([0, 0]))}
    predictions = {"a": np.array([[*box, 0.9, 0], [*box, 0.8, 0], [50, 50, 60, 60, 0.7, 0], [*box, 0.6, 2]])}
    table = match_classes(predictions, truths, 3, [0.5]).average_precisions("all-point")
    assert table[0, 0] == pytest.approx((1 + 2 / 3) / 2)
    assert np.isnan(table[0, 1:]).all()


def test_empty_predictions_and_empty_truths():
    truths = {"a": (np.array([[0.0, 0, 10, 10]]), np.array([1]))}
    assert mean_average_precision({}, truths, 2) == 0
    assert mean_average_precision({"a": np.zeros((0, 6))}, truths, 2) == 0
    nothing = {"a": (np.zeros((0, 4)), np.zeros(0, int))}
    assert math.isnan(mean_average_precision({"a": np.array([[0, 0, 1, 1, 0.5, 0]])}, nothing, 2))
    assert math.isnan(mean_average_precision({}, {}, 2))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.zeros((2, 5)), "image 'a'.*expected"),
        (np.array([[0, 0, 1, math.nan, 0.5, 0]]), "image 'a'.*not a finite"),
        (np.array([[0, 9, 1, 8, 0.5, 0]]), "image 'a': box 0, 9, 1, 8 is turned around"),
        (np.array([[0, 0, 1, 1, 0.5, 7]]), "image 'a': label 7, expected 0 to 2"),
    ],
)
def test_bad_predictions_are_refused(rows, message):
    truths = {"a": (np.array([[0.0, 0, 10, 10]]), np.array([1]))}
    with pytest.raises(InputError, match=message):
        match_classes({"a": rows}, truths, 3)


def test_bad_sets_are_refused():
    truths = {"a": (np.array([[0.0, 0, 10, 10]]), np.array([1]))}
    with pytest.raises(InputError, match="image 'b'"):
        match_classes({"b": np.zeros((0, 6))}, truths, 3)
    with pytest.raises(InputError, match="1 boxes, but labels"):
        match_classes({}, {"a": (truths["a"][0], np.array([1, 2]))}, 3)


# Intervals


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 100, 0, 0.0362), (10, 10, 0.6915, 1), (5, 10, 0.1871, 0.8129), (1, 10, 0.0025, 0.4450), (0, 0, 0, 1)],
)
def test_clopper_pearson_as_published_tables(successes, trials, low, high):
    assert clopper_pearson(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_clopper_pearson_leaves_each_tail_its_share():
    low, high = clopper_pearson(37, 41, confidence=0.9)
    assert binom.sf(36, 41, low) == pytest.approx(0.05)
    assert binom.cdf(37, 41, high) == pytest.approx(0.05)


def test_clopper_pearson_refuses_the_impossible():
    with pytest.raises(ValueError, match="11 successes of 10 trials"):
        clopper_pearson(11, 10)


def test_bootstrap_of_two_opposite_groups():
    assert group_bootstrap([10, 0], [10, 10]) == (0.0, 1.0)  # 0, 1/2 and 1 with chances 1/4, 1/2, 1/4


def test_bootstrap_of_single_trials_is_near_the_normal_interval():
    hits = np.repeat([1, 0], [320, 80])
    low, high = group_bootstrap(hits, np.ones(400), resamples=4000)
    half = 1.96 * math.sqrt(0.8 * 0.2 / 400)
    assert (low, high) == pytest.approx((0.8 - half, 0.8 + half), abs=0.005)


def test_bootstrap_is_wider_where_groups_differ_and_needs_two():
    alike, apart = group_bootstrap([9] * 10, [10] * 10), group_bootstrap([10] * 9 + [0], [10] * 10)
    assert alike == (0.9, 0.9)
    assert apart[1] - apart[0] > 0.2
    with pytest.raises(ValueError, match="1 groups with trials"):
        group_bootstrap([3, 0], [4, 0])


def test_gain_by_seeds_is_students() -> None:
    """By a table of Student's t: 4.3027 for two degrees of freedom at 97.5 %."""
    mean, low, high = paired_gain([1.0, 2.0, 6.0])
    assert mean == pytest.approx(3.0)
    half = 4.30265 * math.sqrt(7.0) / math.sqrt(3)
    assert (low, high) == pytest.approx((3 - half, 3 + half), abs=1e-3)
    with pytest.raises(ValueError, match="at least 2"):
        paired_gain([1.0])
