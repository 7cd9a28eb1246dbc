"""Class prototypes: the mean feature of each class, of one batch and over many (REMINDER, Phan et al. 2022)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cssbench.losses.pixel import full_precision

Weighting = Literal["batch", "pixel"]


def class_means(
    features: Tensor, labels: Tensor, num_classes: int, align_corners: bool = True
) -> tuple[Tensor, Tensor]:
    """Mean over the pixels of each class of the features, upsampled bilinearly to the size of the labels.

    features: (B, D, h, w). labels: (B, H, W) positions; values >= `num_classes` (255) do not count.
    Returns means (C, D), zero for a class without pixels, and pixel counts (C,) int64.

    The upsampled features, D·H·W numbers per image, are never made: upsampling and averaging are both linear, so each
    class's mask is carried down to h x w by the transposed interpolation and multiplied with the features there.
    `align_corners=True` is the public code's; losses on logits use False.
    """
    if features.dim() != 4 or labels.dim() != 3 or len(features) != len(labels):
        raise ValueError(
            f"features {tuple(features.shape)} and labels {tuple(labels.shape)}: expected (B, D, h, w) and (B, H, W)."
        )
    with torch.autocast(features.device.type, enabled=False):
        x = full_precision(features)
        rows = _interpolation(x, x.shape[2], labels.shape[1], align_corners)
        columns = _interpolation(x, x.shape[3], labels.shape[2], align_corners)
        sums = x.new_zeros(num_classes, x.shape[1])
        for feature, label in zip(x, labels.long(), strict=True):
            present = label[label < num_classes].unique()
            masks = (label == present[:, None, None]).to(x.dtype)
            shares = rows @ masks @ columns.mT  # (classes present, h, w)
            sums = sums.index_add(0, present, shares.flatten(1) @ feature.flatten(1).mT)
    counts = torch.bincount(labels[labels < num_classes].long(), minlength=num_classes)
    return sums / counts.clamp(min=1)[:, None], counts


def _interpolation(like: Tensor, size: int, target: int, align_corners: bool) -> Tensor:
    """(size, target): column t holds the weights of the `size` inputs in output t of linear interpolation."""
    identity = torch.eye(size, dtype=like.dtype, device=like.device)
    return F.interpolate(identity[None], target, mode="linear", align_corners=align_corners)[0]


def update_prototypes(
    prototypes: Tensor, seen: Tensor, means: Tensor, counts: Tensor, weighting: Weighting = "batch"
) -> tuple[Tensor, Tensor]:
    """One step of the running mean over batches; start from zeros. Returns new (prototypes, seen).

    prototypes: (C, D). seen: (C,) int64, weight gathered so far. means, counts: of one batch, from `class_means`.
    weighting: "batch" (default, the public code): every batch that shows a class weighs 1, however few its pixels.
    "pixel": a batch weighs its number of pixels, so that the result is the mean over all pixels.
    Classes that the batch does not show keep their prototype. REMINDER refreshes new classes only: the rows of old
    ones are those of the previous step.
    """
    if weighting not in ("batch", "pixel"):
        raise ValueError(f"Unknown weighting {weighting!r}; expected 'batch' or 'pixel'.")
    added = (counts > 0).long() if weighting == "batch" else counts
    seen = seen + added
    share = added.to(prototypes.dtype) / seen.clamp(min=1)
    return prototypes + share[:, None] * (means - prototypes), seen
