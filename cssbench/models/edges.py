"""Which tokens show an edge: the head that predicts it, its ground truth and its loss (edged query down-sampling, EQD).

Source: thesis section 4.2.2, equations 4.6 and 4.7 (text only; no code was published). How edge pixels are extracted
is not said. The printed loss takes the logarithm of the thresholded mask, which has no gradient: here it is the
cross-entropy of the softmax.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt
from torch import Tensor, nn

from cssbench.config import Section
from cssbench.losses.pixel import full_precision
from cssbench.scenario import IGNORE

EdgeRule = Literal["distinct", "inside", "across"]


class EdgeConfig(Section):
    """Options of EQD.

    select  which tokens stay in training, beside the grid. "predicted": those of the edge head, as written. "truth":
            those of the label map (teacher forcing), at step 0, where the head learns. In evaluation always predicted.
    """

    select: Literal["predicted", "truth"] = "predicted"
    layer: NonNegativeInt = Field(
        0, description="0-based block whose input the head reads, up to down_layer; thesis: 0, the embedded patches"
    )
    threshold: float = Field(0.7, ge=0, lt=1, description="tau: a token is kept if P(edge) is above it")
    truth: EdgeRule = Field("distinct", description="which patches are edges: see edge_truth")
    weight: float = Field(1.0, ge=0, description="of the edge loss; not stated in the thesis")


class EdgeHead(nn.Module):
    """MLP C -> C -> C/2 -> 2 with ReLU: tokens (B, L, C) -> logits (B, L, 2), index 1 = edge."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width // 2), nn.ReLU(), nn.Linear(width // 2, 2)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.mlp(tokens)


def predicted_edges(logits: Tensor, threshold: float) -> Tensor:
    """(B, L, 2) -> (B, L) bool: P(edge) > threshold."""
    return full_precision(logits).softmax(-1)[..., 1] > threshold


def edge_truth(labels: Tensor, patch: int, rule: EdgeRule = "distinct") -> Tensor:
    """(B, L) bool: does the patch show an edge?  labels: (B, H, W) integers, H and W multiples of `patch`.

    distinct  two or more labels occur in the patch (thesis: "tokens containing multiple categories").
    inside    two 4-neighbours in the patch differ.
    across    a pixel of the patch differs from a 4-neighbour in the image, which may lie in the next patch.
    255 is no label: a pixel of it never makes an edge. Nor does the border of the image.
    """
    if rule == "distinct":
        x = labels.float()[:, None]
        void = x == IGNORE
        largest = F.max_pool2d(x.masked_fill(void, -1.0), patch)
        smallest = -F.max_pool2d(-x.masked_fill(void, IGNORE + 1.0), patch)
        return (largest > smallest).flatten(1)
    edge = torch.zeros_like(labels, dtype=torch.bool)
    for dim in (1, 2):
        size = labels.shape[dim]
        first, second = labels.narrow(dim, 0, size - 1), labels.narrow(dim, 1, size - 1)
        differs = (first != second) & (first != IGNORE) & (second != IGNORE)
        if rule == "inside":
            shape = [1, 1, 1]
            shape[dim] = size - 1
            within = torch.arange(1, size, device=labels.device) % patch != 0
            differs = differs & within.view(shape)
        edge.narrow(dim, 0, size - 1).logical_or_(differs)
        edge.narrow(dim, 1, size - 1).logical_or_(differs)
    return (F.max_pool2d(edge.float()[:, None], patch) > 0).flatten(1)


def edge_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy of logits (B, L, 2) against truth (B, L) bool, mean over tokens; scalar."""
    return F.cross_entropy(full_precision(logits).flatten(0, 1), truth.flatten().long())
