"""Confusion matrices: int64 counts of raw class id x predicted class id, over a whole set."""

from __future__ import annotations

import torch
from torch import Tensor

from cssbench.scenario import IGNORE


def confusion(truth: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """(K+1, K+1) int64: how many pixels of class id `row` were predicted as class id `column`.

    truth, predicted: integer tensors of one shape, values 0..K (0 = void / background), truth also 255 = not counted.
    Raises ValueError when the shapes differ or a value is out of range.
    """
    if truth.shape != predicted.shape:
        raise ValueError(f"truth {tuple(truth.shape)} and prediction {tuple(predicted.shape)} differ in shape")
    side = num_classes + 1
    truth, predicted = truth.flatten().long(), predicted.flatten().long()
    counted = truth != IGNORE
    truth, predicted = truth[counted], predicted[counted]
    if truth.numel() and not (int(truth.min()) >= 0 and int(truth.max()) < side):
        raise ValueError(f"truth holds values outside 0..{num_classes} and {IGNORE}")
    if predicted.numel() and not (int(predicted.min()) >= 0 and int(predicted.max()) < side):
        raise ValueError(f"prediction holds values outside 0..{num_classes}")
    return torch.bincount(truth * side + predicted, minlength=side * side).view(side, side)
