"""Mask-classification losses of ATM heads: class presence, focal and dice terms, with fixed class-query matching.

Source: SegViT (Zhang et al. 2022), section 3.3; SegViTv2 / thesis section 4.2.1. Query i stands for class i; only the
masks of classes that occur in an image are supervised. Losses of half-precision inputs are computed and returned in
float32. Shapes: B images, N classes (queries), h x w mask grid, H x W label map, M = number of (image, present class)
pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cssbench.losses.pixel import full_precision
from cssbench.scenario import IGNORE

IgnoreMode = Literal["negative", "masked"]


def class_presence(labels: Tensor, positions: range) -> Tensor:
    """(B, N) bool: does label `positions[n]` occur in labels[b]?  labels: (B, H, W) int64."""
    counts = torch.zeros(len(labels), 256, device=labels.device)
    counts.scatter_add_(1, labels.flatten(1), torch.ones_like(labels.flatten(1), dtype=counts.dtype))
    return counts[:, positions.start : positions.stop] > 0


def presence_loss(classes: Tensor, present: Tensor, absent_weight: float = 0.1) -> Tensor:
    """Weighted cross-entropy over all B*N queries; scalar.

    classes: (B, N, 2), index 0 = present, 1 = absent (v2); or (B, N, N+1), index i = "query i shows class i",
    index N = no object (v1). present: (B, N) bool. Absent targets weigh `absent_weight`, and the mean divides by the
    sum of the weights of the targets, not by B*N (PyTorch's weighted mean, as in the public code). SegViT uses 0.1.
    """
    num_queries, num_outputs = classes.shape[1:]
    hit = torch.arange(num_queries, device=classes.device)
    if num_outputs != num_queries + 1:  # v2; with one class the two forms agree
        hit = torch.zeros_like(hit)
    target = torch.where(present, hit, num_outputs - 1)
    logits = full_precision(classes).flatten(0, 1)
    weight = logits.new_ones(num_outputs)
    weight[-1] = absent_weight
    return F.cross_entropy(logits, target.flatten(), weight=weight)


def query_distillation(new: Tensor, old: Tensor) -> Tensor:
    """Cross-entropy from the old to the new class outputs of each query, mean over queries; scalar, no gradient to old.

    new, old: (B, N, O) logits of the same queries.
    """
    target = full_precision(old.detach()).softmax(-1)
    return -(target * full_precision(new).log_softmax(-1)).sum(-1).mean()


def mask_distillation(new: Tensor, old: Tensor) -> Tensor:
    """Binary cross-entropy from the old to the new mask probabilities, mean over queries and cells; scalar.

    new, old: (B, N, h, w) logits of the same queries. No gradient to old.
    """
    return F.binary_cross_entropy_with_logits(full_precision(new), full_precision(old.detach()).sigmoid())


def focal_loss(
    logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0, valid: Tensor | None = None
) -> Tensor:
    """(M,): binary focal loss of each mask, mean over its pixels. Lin et al. 2017, eq. 5.

    logits, targets: (M, P) with targets in {0, 1}; valid: (M, P) bool, pixels to count (None: all). A mask without a
    valid pixel gives 0.
    """
    bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    hit = torch.exp(-bce)  # probability given to the true value
    balance = alpha * targets + (1 - alpha) * (1 - targets)
    return _mean_over_pixels(balance * (1 - hit) ** gamma * bce, valid)


def dice_loss(logits: Tensor, targets: Tensor, valid: Tensor | None = None) -> Tensor:
    """(M,): 1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1) of each mask. Milletari et al. 2016, smoothed by 1.

    Shapes as in `focal_loss`.
    """
    probability = logits.sigmoid()
    if valid is not None:
        probability, targets = probability * valid, targets * valid
    overlap = (probability * targets).sum(1)
    return 1 - (2 * overlap + 1) / (probability.sum(1) + targets.sum(1) + 1)


def _mean_over_pixels(values: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return values.mean(1)
    return (values * valid).sum(1) / valid.sum(1).clamp(min=1)


def mask_losses(
    masks: Tensor,
    labels: Tensor,
    present: Tensor,
    positions: range,
    num_masks: Tensor | float,
    ignore_mode: IgnoreMode = "negative",
) -> tuple[Tensor, Tensor]:
    """(focal, dice), each summed over the M supervised masks and divided by `num_masks`; zeros with M = 0.

    masks: (B, N, h, w) logits, upsampled here to the label size (bilinear, align_corners False).
    num_masks: M, averaged over processes by the caller, at least 1.
    ignore_mode: what label 255 means. `negative` (default, the public code): those pixels are negatives of every mask,
    as every other label that is not the class. `masked`: they are left out.
    """
    image, query = present.nonzero(as_tuple=True)
    chosen = full_precision(masks[image, query, None])
    if len(image) == 0:
        nothing = chosen.sum()  # of nothing: 0, but keeps the graph, so that backward works on every process
        return nothing, nothing
    logits = F.interpolate(chosen, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    truth = labels[image].flatten(1)
    targets = (truth == (query + positions.start)[:, None]).to(logits.dtype)
    valid = (truth != IGNORE) if ignore_mode == "masked" else None
    logits = logits.flatten(1)
    return (
        focal_loss(logits, targets, valid=valid).sum() / num_masks,
        dice_loss(logits, targets, valid=valid).sum() / num_masks,
    )


_over_processes: ContextVar[bool] = ContextVar("over_processes", default=False)


@contextmanager
def masks_counted_over_processes(enabled: bool) -> Iterator[None]:
    """Inside, mask losses are divided by the mean number of masks over the processes, as in the public code; else by
    that of the pass in hand: then an optimiser step is the same on any number of processes (`train.mask_count`)."""
    token = _over_processes.set(enabled)
    try:
        yield
    finally:
        _over_processes.reset(token)


def mean_over_processes(value: Tensor) -> Tensor:
    """`value`, averaged over the processes of a run where `masks_counted_over_processes` asks for it."""
    if _over_processes.get():
        value = value.clone()
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value
