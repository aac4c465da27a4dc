"""Which object query learns which box: the cheapest assignment (Carion 2020), with the costs of BEVFormer.

Letters: O object queries, K classes, G boxes of a sample.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

CLASS_COST = 2.0
BOX_COST = 0.25
ALPHA, GAMMA = 0.25, 2.0
"""Of the focal loss and cost (Lin 2017)."""


def cost(cls_scores: Tensor, bbox_preds: Tensor, labels: Tensor, codes: Tensor) -> Tensor:
    """Costs (O, G) of logits (O, K) and codes (O, 10) for boxes with labels (G,) and codes (G, 10).

    Focal cost of the class, and the L1 distance of the code without the velocity.
    """
    p, eps = cls_scores.sigmoid(), 1e-12
    positive = -ALPHA * (1 - p).pow(GAMMA) * (p + eps).log()
    negative = -(1 - ALPHA) * p.pow(GAMMA) * (1 - p + eps).log()
    distance = torch.cdist(bbox_preds[:, :8], codes[:, :8], p=1)
    return CLASS_COST * (positive - negative)[:, labels] + BOX_COST * distance


@torch.no_grad()
def match(cls_scores: Tensor, bbox_preds: Tensor, labels: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The queries (n,) and the boxes (n,) that they learn, n = min(O, G), with the least cost in all."""
    prices = cost(cls_scores.float(), bbox_preds.float(), labels, codes)
    # a prediction that is not finite is nobody's first choice
    rows, columns = linear_sum_assignment(prices.nan_to_num(1e6, 1e6, -1e6).cpu().numpy())
    device = labels.device
    return torch.as_tensor(rows, device=device), torch.as_tensor(columns, device=device)
