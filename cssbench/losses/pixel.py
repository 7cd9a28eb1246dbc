"""Per-pixel cross-entropies.

Shapes, here and in the other modules of `cssbench.losses`: B images, C model outputs (0 = background), K = outputs of
the previous model (background included), N = C - K new classes, * = any trailing dimensions: (H, W) for pixels, (Q,)
for queries. Labels are positions 0..C-1, or 255 = ignored. Losses of half-precision inputs are computed and returned
in float32; other dtypes are kept. Functions raise ValueError on shapes or options that do not fit; a label in C..254
raises the IndexError or RuntimeError of torch (on CUDA an assertion on the device).

Reduction of a per-pixel loss, everywhere:

- "valid" (default): sum over the pixels that count / their number. 0, with zero gradient, where none counts.
- "all": the same sum / number of all pixels B·H·W. What the public trainers of MiB, PLOP and their descendants do:
  an ignored pixel contributes nothing but stays in the denominator. The two agree where nothing is ignored.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cssbench.scenario import IGNORE

Reduction = Literal["valid", "all"]


def cross_entropy(
    logits: Tensor, labels: Tensor, reduction: Reduction = "valid", weight: Tensor | None = None
) -> Tensor:
    """Softmax cross-entropy; 255 is ignored.

    logits: (B, C, *). labels: (B, *) integers. weight: (B,), one factor per image, or None; it scales the summands and
    never the denominator (PLOP's adaptive factor). Returns a scalar >= 0 (for weights >= 0).
    """
    check_pixels(logits, labels, "labels")
    loss = F.cross_entropy(full_precision(logits), labels.long(), ignore_index=IGNORE, reduction="none")
    return reduce_pixels(loss, labels != IGNORE, reduction, weight)


def unbiased_cross_entropy(
    logits: Tensor, labels: Tensor, num_old: int, reduction: Reduction = "valid", weight: Tensor | None = None
) -> Tensor:
    """Cross-entropy in which background means "background or any old class": MiB (Cermelli et al. 2020).

    A label y < K costs -log sum_{c<K} p_c, a label y >= K costs -log p_y, where p = softmax(logits) and K = `num_old`
    counts background. K of 0 or 1 (step 0, nothing learned before) is the plain cross-entropy.

    Shapes, `weight` and result as in `cross_entropy`. Labels of old classes, should there be any, count as background,
    like the 0 that takes their place in a learner's labels.
    """
    check_pixels(logits, labels, "labels")
    if not 0 <= num_old <= logits.shape[1]:
        raise ValueError(f"num_old is {num_old}; expected 0..{logits.shape[1]}, the number of outputs of the model.")
    if num_old <= 1:
        return cross_entropy(logits, labels, reduction, weight)
    z = full_precision(logits)
    valid = labels != IGNORE
    index = labels.long().masked_fill(~valid, 0)
    own = z.gather(1, index.unsqueeze(1)).squeeze(1)
    background = z[:, :num_old].logsumexp(1)
    loss = z.logsumexp(1) - torch.where(index < num_old, background, own)
    return reduce_pixels(loss, valid, reduction, weight)


def full_precision(x: Tensor) -> Tensor:
    """x in float32 if it is in half precision, else x."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def check_pixels(logits: Tensor, pixels: Tensor, name: str) -> None:
    """Raise ValueError unless logits is (B, C, *) and pixels, called `name` in the message, is (B, *)."""
    expected = (logits.shape[0], *logits.shape[2:])
    if tuple(pixels.shape) != expected:
        raise ValueError(
            f"{name} have the shape {tuple(pixels.shape)}; expected {expected} beside logits of {tuple(logits.shape)}. "
            "Resize the logits to the labels first."
        )


def reduce_pixels(loss: Tensor, valid: Tensor, reduction: Reduction, weight: Tensor | None = None) -> Tensor:
    """Scalar of a per-pixel loss (B, *), of which only the pixels in `valid` (B, *) bool count. Module docstring."""
    if reduction not in ("valid", "all"):
        raise ValueError(f"Unknown reduction {reduction!r}; expected 'valid' or 'all'.")
    loss = loss.masked_fill(~valid, 0)
    if weight is not None:
        if weight.shape != loss.shape[:1]:
            raise ValueError(f"weight has the shape {tuple(weight.shape)}; expected one per image, ({len(loss)},).")
        loss = loss * weight.to(loss).reshape(-1, *(1,) * (loss.dim() - 1))
    if reduction == "all":
        return loss.sum() / max(1, loss.numel())
    return loss.sum() / valid.sum().clamp(min=1)


def own_labels(labels: Tensor, positions: range, other: int) -> Tensor:
    """Labels as the outputs of one head see them: its own positions as 0, 1, ..., 255 as it is, all else as `other`.

    labels: integers, any shape. positions: those of the head, in the order of its outputs. Returns int64.
    """
    labels = labels.long()
    own = (labels >= positions.start) & (labels < positions.stop)
    return torch.where(own, labels - positions.start, torch.where(labels == IGNORE, IGNORE, other))
