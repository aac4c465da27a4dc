"""The recipes, each with its cost and what to expect of it."""

from __future__ import annotations

from core.kit import Recipe
from core.pruning import Prune, Sparsify
from core.quantization import MixedPrecision
from kits.bev_perception.distil import FollowOriginal
from kits.bev_perception.prune import prune_steps
from kits.bev_perception.shipped import TakeWhole
from kits.bev_perception.stem import DepthStem

CNN = (
    "img_backbone.*", "img_neck.*", "pts_bbox_head.distances.*", "pts_bbox_head.fusion.*",
    "pts_bbox_head.proposals.conv*",
)  # fmt: skip
"""Every convolution but the dense head's last ones."""
TRANSFORMER = ("pts_bbox_head.*",)

MIXED = MixedPrecision(
    layers=CNN, half=TRANSFORMER, judged=("bev",), budget=1e-3, probes=2,
    samples=64, calibration="mse", reduce_range=True,
)  # fmt: skip
"""INT8 for the CNN, FP16 for the transformer as the field does; layers that lose too much are raised, and listed.

Judged by the BEV: boxes come in the order of their scores, which the least change turns over. 7-bit weights: 8-bit
ones saturate where a processor lacks VNNI. OpenVINO needs no output quantizers for INT8.
"""

LEAST = Prune(0.6, importance="taylor", allocation="global", batches=16, batch_size=2)
"""The channels that the loss misses least, wherever they are: a layer of small pictures gives more than a wide one."""
RATIOS = (0.615, 0.81, 0.64, 0.6, 0.33)
"""Of `prune_steps`: together 60 %, shared as one ranking of `nano`'s channels over all of these parts would, but for
the fourth, which such a ranking takes nearly whole."""
FOLLOWED = tuple(
    step
    for index, prune in enumerate(prune_steps(RATIOS, like=LEAST))
    for step in (prune, FollowOriginal(epochs=1, lr=4e-4, share=0.2, seed=index))
)
"""Backbone, feed-forward, values, regression, the other heads: a distillation after each."""
LONGER = FollowOriginal(epochs=2, lr=5e-4)
DENSE = (
    "pts_bbox_head.transformer.*", "pts_bbox_head.cls_branches.*", "pts_bbox_head.reg_branches.*",
    "pts_bbox_head.proposals.classify*", "pts_bbox_head.proposals.regress*", "pts_bbox_head.proposals.content*",
    "pts_bbox_head.proposals.position*", "pts_bbox_head.distances.layers.[24]*",
    "img_backbone.layer[34].*", "img_neck.lateral_convs.*",
)  # fmt: skip
"""What keeps all of its weights once channels are gone: there 15 % of the multiplications, of an unpruned one more."""
SPARSE = (DepthStem(), Sparsify())
"""The stem rewritten so that it can, the smaller half of the weights gone."""
THIN = (DepthStem(), Sparsify(skip=DENSE))
"""The same of a pruned network, whose small layers are let be."""
AROUND = FollowOriginal(epochs=9, lr=6e-4, answers=1.0, ema=0.998, hold_zeros=True)
"""One long distillation around the zeros: training in two legs learns twice what it forgets between."""

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "mixed",
            (MIXED,),
            "the sensitivity of every layer, then calibration on 64 frames along their scenes: minutes",
            "INT8 in the backbone and its neck, the transformer in FP16, what cannot bear it raised",
        ),
        Recipe(
            "pruned", (*FOLLOWED, LONGER), "half an hour of training on two cores, as a part of `whole`",
            "60 % of the prunable channels gone, distilled; too short a training to keep the score",
        ),
        Recipe(
            "sparse",
            (*SPARSE, FollowOriginal(epochs=1, lr=2e-4, hold_zeros=True)),
            "ten minutes of training on two cores, as a part of `whole`",
            "2:4 zeros in every matrix product that can",
        ),
        Recipe(
            "whole", (*FOLLOWED, *THIN, AROUND, MIXED), "two hours of training on two cores",
            "pruned, 2:4, INT8 in the backbone, FP16 in the transformer; the one that ships saw more streets besides",
        ),
        Recipe(
            "shipped",
            (TakeWhole(),),
            "seconds",
            "what `whole` made of the shipped detector, ready; measured anew",
        ),
    )
}  # fmt: skip
DEFAULT, READY = "mixed", "shipped"
