"""ATM heads under plain per-pixel cross-entropy instead of class, focal and dice losses: a softmax per head.

Source: Zhang et al. 2022, Table 4 (thesis Table 4.4): "ATM, CE loss" 47.0 against 49.6 with the mask losses, on one tap
(the 49.6 is that of layer [12] in the next table). Neither text says which logits are meant. They speak of class and
mask that are no longer predicted apart, so by default the similarity maps themselves are class logits; the alternative
is the score that the mask losses lead to, P sigmoid(M).

A softmax per head, and not one over all heads, for the reason that each head has its own class and mask losses: a head
that is frozen keeps its outputs bit-equal whatever is added. What is not of a head is one more output of it.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from cssbench.config import Section
from cssbench.losses.pixel import Reduction, cross_entropy, full_precision, own_labels
from cssbench.models.atm import ATMHead, MaskPrediction
from cssbench.scenario import IGNORE


class CrossEntropyConfig(Section):
    """What a head's softmax is over.

    logits      "masks": logit of class c is M[c]; the score is the softmax, the class output stays untrained.
                "scores": log of the head's score (v2: P[c] sigmoid(M[c])), which stays the score.
    background  pixels that show no class of the head: "output", one more output that stands for them, of logit 0
                (masks) or log(1 - largest score) (scores); or "ignored", left out, as where every pixel has a class: a
                head of one class is refused then. Background's own query, where there is one, is that output in step
                0's head.
    """

    logits: Literal["masks", "scores"] = "masks"
    background: Literal["output", "ignored"] = "output"
    reduction: Reduction = Field("all", description="denominator: all pixels (as mmsegmentation), or valid ones only")


def head_logits(
    head: ATMHead, prediction: MaskPrediction, size: tuple[int, int], config: CrossEntropyConfig, own_background: bool
) -> Tensor:
    """(B, N, H, W), what a head's softmax is over; with the output for all that is not of the head, (B, N + 1, H, W),
    that one last. own_background: the head has background's query, and no further output."""
    if config.logits == "masks":
        masks = full_precision(prediction.masks)
        classes = F.interpolate(masks, size=size, mode="bilinear", align_corners=False)
        other = torch.zeros_like(classes[:, :1])
    else:
        scores = head.scores(prediction, size)
        classes = scores.clamp(min=1e-6).log()
        other = (1 - scores.amax(1, keepdim=True)).clamp(min=1e-6).log()
    return classes if own_background or config.background == "ignored" else torch.cat([classes, other], dim=1)


def head_scores(
    head: ATMHead, prediction: MaskPrediction, size: tuple[int, int], config: CrossEntropyConfig, own_background: bool
) -> Tensor:
    """(B, N, H, W) in [0, 1]: probability of each class among the head's outputs ("masks"), or the head's own score."""
    if config.logits == "scores":
        return head.scores(prediction, size)
    return head_logits(head, prediction, size, config, own_background).softmax(1)[:, : head.num_classes]


def head_loss(
    head: ATMHead,
    prediction: MaskPrediction,
    labels: Tensor,
    positions: range,
    config: CrossEntropyConfig,
    weight: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of one prediction of a head; scalar. labels: (B, H, W) positions, 255 left out. weight: (B,).

    The class output stays in the graph with weight 0: processes that train together expect a gradient of every
    parameter.
    """
    own_background = positions.start == 0
    logits = head_logits(head, prediction, (labels.shape[-2], labels.shape[-1]), config, own_background)
    other = head.num_classes if config.background == "output" else IGNORE
    targets = own_labels(labels, positions, 0 if own_background else other)
    return cross_entropy(logits, targets, config.reduction, weight) + 0 * full_precision(prediction.classes).sum()
