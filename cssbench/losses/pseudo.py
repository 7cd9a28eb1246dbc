"""PLOP's pseudo-labels: background pixels take the previous model's class where it is certain enough.

Douillard et al. 2021. Before training, one pass fills a histogram of the previous model's uncertainty u
per predicted class, over the background pixels; each class's threshold is the median:

    histogram = sum(entropy_histogram(normalised_entropy(logits, C), logits.argmax(1), K, labels == 0) for batch ...)
    tau = thresholds(histogram)

In training, `pseudo_labels` relabels each batch and `adaptive_factor` weighs each image's cross-entropy.

`arithmetic` chooses how u and the median are computed:

- "reference" (default): the public code, which the published numbers come from. u is a *mean* over classes divided by
  log K and by log C, so u <= 1/(K log C); and the loop for the median advances by the index of a bin instead of its
  count. For K >= 51 on ADE20K all mass falls in the first of 100 bins, every threshold is 0.005, and every background
  pixel is accepted: PLOP there is plain argmax pseudo-labelling.
- "paper": u = entropy / log K in [0, 1] and the true median, which rejects about half of the pixels.

Shapes, dtypes and errors as told on top of `cssbench.losses.pixel`. Nothing is changed in place.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from cssbench.losses.pixel import check_pixels, full_precision
from cssbench.scenario import IGNORE

Arithmetic = Literal["reference", "paper"]
BINS = 100
FLOOR = 1e-3


def normalised_entropy(logits: Tensor, num_classes: int, arithmetic: Arithmetic = "reference") -> Tensor:
    """Uncertainty u of the previous model at each pixel.

    logits: (B, K, *) of the previous model. num_classes: C, outputs of the *current* model (reference only).
    Returns (B, *), no gradient. With q = softmax(logits):
    "reference": -(1/K) sum_c q_c log(q_c + 1e-8) / (log K log C), in [-1e-8, 1/(K log C)].
    "paper": -sum_c q_c log q_c / log K, in [0, 1].
    K = 1 gives 0 (a single class is certain; the public code divides by log 1).
    """
    _check_arithmetic(arithmetic)
    num_old = logits.shape[1]
    if num_classes < num_old:
        raise ValueError(f"num_classes is {num_classes}, but the previous model alone has {num_old} outputs.")
    z = full_precision(logits.detach())
    if num_old == 1:
        return torch.zeros_like(z[:, 0])
    if arithmetic == "paper":
        log_q = z.log_softmax(1)
        return -(log_q.exp() * log_q).sum(1) / math.log(num_old)
    q = z.softmax(1)
    return -(q * (q + 1e-8).log()).mean(1) / (math.log(num_old) * math.log(num_classes))


def entropy_histogram(
    entropy: Tensor, classes: Tensor, num_old: int, mask: Tensor | None = None, bins: int = BINS
) -> Tensor:
    """Counts of u per predicted class in equal bins over [0, 1]: add them up over batches.

    entropy: u, any shape. classes: predicted classes 0..K-1, same shape. mask: bool, same shape: pixels to count, for
    PLOP those of label 0; None = all. Values outside [0, 1] fall in the outer bins. Returns (K, bins) int64.
    """
    if entropy.shape != classes.shape or (mask is not None and mask.shape != classes.shape):
        raise ValueError(f"entropy {tuple(entropy.shape)}, classes {tuple(classes.shape)} and mask differ in shape.")
    if mask is not None:
        entropy, classes = entropy[mask], classes[mask]
    cell = (entropy * bins).long().clamp(0, bins - 1)
    return torch.bincount((classes * bins + cell).flatten(), minlength=num_old * bins).reshape(num_old, bins)


def thresholds(histograms: Tensor, arithmetic: Arithmetic = "reference", floor: float = FLOOR) -> Tensor:
    """Threshold of each class: the median of its u, but at least `floor`; `floor` for classes never predicted.

    histograms: (K, bins) counts. Returns (K,) float64; +inf (accept everything) can occur with "reference".

    "paper": linear interpolation in the bin in which the cumulative count passes half.
    "reference": the public loop, see `_reference_median`. Where it yields NaN we use `floor`.
    """
    _check_arithmetic(arithmetic)
    if histograms.dim() != 2:
        raise ValueError(f"histograms have the shape {tuple(histograms.shape)}; expected (classes, bins).")
    median = _reference_median if arithmetic == "reference" else _median
    values = [median(counts) if sum(counts) > 0 else floor for counts in histograms.tolist()]
    values = [value if value > floor else floor for value in values]  # NaN > floor is false
    return torch.tensor(values, dtype=torch.float64, device=histograms.device)


def _median(counts: list[float]) -> float:
    half, below = sum(counts) / 2, 0.0
    for index, count in enumerate(counts):
        if count and below + count >= half:
            return (index + (half - below) / count) / len(counts)
        below += count
    raise AssertionError("unreachable: some bin holds the median")


def _reference_median(counts: list[float]) -> float:
    """PLOP's loop. It advances `passed` by the index of each bin where a median would advance it by its count.

    So the first bin that holds about half of the mass wins. If none does, the last bin's border is taken with
    `passed` = 0 + 1 + ... + 98 = 4851; dividing by that bin, usually empty, gives +inf for a class of more than 9702
    pixels and -inf for a rarer one. Two more oddities are kept: the index is int(i / 100 · 100), so i = 29 looks at
    bin 28, and the sum is of floats. 0/0 gives NaN.
    """
    bins, half = len(counts), sum(counts) / 2
    passed = border = count = 0.0
    for index in range(bins):
        border = index / bins
        count = counts[int(border * bins)]
        if passed <= half <= passed + count or index == bins - 1:
            break
        passed += border * bins
    rest = half - passed
    if count == 0:
        return math.copysign(math.inf, rest) if rest else math.nan
    return border + rest / count / bins


def pseudo_labels(
    labels: Tensor,
    teacher_logits: Tensor,
    thresholds: Tensor | None,
    num_classes: int,
    arithmetic: Arithmetic = "reference",
) -> Tensor:
    """Labels of the new classes, completed by the previous model's: a new tensor.

    A pixel labelled y < K (background; K = outputs of the previous model) becomes the previous model's argmax, which
    may be 0, where u < threshold of that class, else 255. New classes and 255 stay.

    labels: (B, *) integers. teacher_logits: (B, K, *). thresholds: (K,), or None to accept every pixel.
    num_classes, arithmetic: as in `normalised_entropy`; the same arithmetic as in `thresholds`.
    Returns (B, *) of the dtype of `labels`.
    """
    check_pixels(teacher_logits, labels, "labels")
    num_old = teacher_logits.shape[1]
    predicted = teacher_logits.argmax(1)
    if thresholds is not None:
        if tuple(thresholds.shape) != (num_old,):
            raise ValueError(f"thresholds have the shape {tuple(thresholds.shape)}; expected ({num_old},).")
        uncertainty = normalised_entropy(teacher_logits, num_classes, arithmetic)
        rejected = ~(uncertainty < thresholds.to(uncertainty)[predicted])
        predicted = predicted.masked_fill(rejected, IGNORE)
    return torch.where(labels < num_old, predicted.to(labels.dtype), labels)


def adaptive_factor(
    labels: Tensor, relabelled: Tensor, num_old: int, without_background: float = 0.0, epsilon: float = 1e-6
) -> Tensor:
    """PLOP's weight of each image's cross-entropy: accepted background pixels / (background pixels + epsilon).

    labels: (B, *) before, relabelled: (B, *) after `pseudo_labels`. Returns (B,) float64 in [0, 1].
    An image without background gets `without_background`: 0, the default and the public code of PLOP, drops its new
    classes from the loss too; 1 keeps them. (REMINDER's code has no epsilon and yields NaN there.)
    """
    if labels.shape != relabelled.shape:
        raise ValueError(f"labels {tuple(labels.shape)} and relabelled {tuple(relabelled.shape)} differ in shape.")
    background = labels < num_old
    accepted = (background & (relabelled != IGNORE)).flatten(1).sum(1).double()
    total = background.flatten(1).sum(1).double()
    return (accepted / (total + epsilon)).masked_fill(total == 0, without_background)


def _check_arithmetic(arithmetic: str) -> None:
    if arithmetic not in ("reference", "paper"):
        raise ValueError(f"Unknown arithmetic {arithmetic!r}; expected 'reference' or 'paper'.")
