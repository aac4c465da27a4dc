"""DeepPCB's official matching of detections and defects, which knows no class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from core.evaluation.detection import Bools, Floats, Ints, Predictions, Truths, box_iou, check, detections_of
from kits.pcb_inspection.data.deeppcb import CLASSES

OFFICIAL_IOU = 0.33
"""A detection counts above this overlap (not at it)."""


@dataclass(frozen=True)
class Matching:
    """All detections and all defects of a set under DeepPCB's official, class-blind matching.

    Because a defect takes the most confident detection that is free, what is below a threshold never
    changes what is above it: one matching serves every threshold.
    """

    scores: Floats  # (n,) confidence of each detection
    classes: Ints  # (n,) its class
    owner: Ints  # (n,) the defect that took it, or -1
    right: Bools  # (n,) taken by a defect of its own class
    boxes: Floats  # (m, 4) defects, pixels
    labels: Ints  # (m,)
    images: tuple[str, ...]  # (m,) image id of each defect
    taken: Ints  # (m,) the detection that each defect took, or -1

    def at(self, threshold: float) -> tuple[Bools, Bools, Bools]:
        """(detections submitted (n,), defects found as any class (m,), as their own class (m,)) at a threshold."""
        submitted = self.scores >= threshold
        found, right = np.zeros(len(self.taken), bool), np.zeros(len(self.taken), bool)
        has = self.taken >= 0
        found[has] = submitted[self.taken[has]]
        right[has] = found[has] & self.right[self.taken[has]]
        return submitted, found, right


def match_official(predictions: Predictions, truths: Truths) -> Matching:
    """DeepPCB's matching: in each image the defects, in file order, each take the most confident free
    detection with IoU > 0.33, whatever its class; a detection of the wrong class is used up and not correct.

    IoU is taken on the coordinates as given: the published script cuts them to whole pixels. Source: the
    evaluation of the DeepPCB repository, after that of ICDAR 2015. Raises InputError as `check` does.
    """
    check(predictions, truths, len(CLASSES))
    rows, owner, taken = [np.zeros((0, 6))], [np.zeros(0, np.intp)], [np.zeros(0, np.intp)]
    boxes, labels, images = [np.zeros((0, 4))], [np.zeros(0, np.intp)], []
    detections = defects = 0
    for image, (true_boxes, true_labels) in truths.items():
        mine, count = detections_of(predictions, image), len(true_labels)
        near = box_iou(true_boxes, mine[:, :4]) > OFFICIAL_IOU
        mine_owner, mine_taken = np.full(len(mine), -1, np.intp), np.full(count, -1, np.intp)
        for defect in np.flatnonzero(near.any(axis=1)):
            candidates = near[defect] & (mine_owner < 0)
            first = int(candidates.argmax())  # the rows are in falling confidence
            if candidates[first]:
                mine_owner[first], mine_taken[defect] = defects + defect, detections + first
        rows.append(mine)
        owner.append(mine_owner)
        taken.append(mine_taken)
        boxes.append(np.asarray(true_boxes, dtype=np.float64).reshape(-1, 4))
        labels.append(np.asarray(true_labels, dtype=np.intp))
        images += [image] * count
        detections, defects = detections + len(mine), defects + count
    found, owners, kinds = np.concatenate(rows), np.concatenate(owner), np.concatenate(labels)
    classes = found[:, 5].astype(np.intp)
    right = np.zeros(len(found), dtype=bool)
    right[owners >= 0] = classes[owners >= 0] == kinds[owners[owners >= 0]]
    return Matching(
        found[:, 4], classes, owners, right, np.concatenate(boxes), kinds, tuple(images), np.concatenate(taken)
    )


def sweep(matching: Matching) -> tuple[Floats, Floats]:
    """(distinct confidences, falling; official F in %) when that one is the last kept."""
    order = np.argsort(-matching.scores, kind="stable")
    scores = matching.scores[order]
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True)) if len(scores) else np.zeros(0, np.intp)
    defects = max(len(matching.labels), 1)
    correct = np.cumsum(matching.right[order])[last]
    return scores[last], 200.0 * correct / (last + 1 + defects)
