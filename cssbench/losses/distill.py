"""Distillation from the previous model: outputs (LwF, ILT, MiB, REMINDER), features (ILT) and pooled features (PLOP).

`new` is the current model's tensor, `old` the previous model's; shapes, dtypes, reductions and errors as told on top of
`cssbench.losses.pixel`. No gradient reaches `old`, which may come from `torch.inference_mode`. Nothing here is
multiplied by a method's loss weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cssbench.losses.pixel import Reduction, check_pixels, full_precision, reduce_pixels
from cssbench.scenario import IGNORE

ClassReduction = Literal["mean", "sum"]


# --- outputs: LwF, ILT, MiB ---------------------------------------------------------------------------------------


def plain_distillation(
    new: Tensor,
    old: Tensor,
    alpha: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "valid",
    class_reduction: ClassReduction = "mean",
) -> Tensor:
    """Cross-entropy from the old to the new model over the old outputs: LwF (Li & Hoiem 2016) and ILT's output term.

    Per pixel -(1/K) sum_{c<K} q_c log softmax(new_{<K})_c with q = softmax(alpha old). `class_reduction` "mean" is the
    public code's (hence loss weights of 100); "sum" drops the 1/K.

    new: (B, C, *). old: (B, K, *), K <= C. mask: (B, *) bool, pixels that count, or None = all; in the public code the
    others stay in the denominator (`reduction="all"`). Returns a scalar >= 0, least (entropy of q, over K)
    where the new model agrees with q.
    """
    z, q = _student_and_target(new, old, alpha)
    loss = -(q * z[:, : q.shape[1]].log_softmax(1)).sum(1)
    return _reduce_distillation(loss, q, mask, reduction, class_reduction)


def unbiased_distillation(
    new: Tensor,
    old: Tensor,
    alpha: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "valid",
    class_reduction: ClassReduction = "mean",
) -> Tensor:
    """Distillation in which the old background means "background or any new class": MiB (Cermelli et al. 2020).

    Per pixel -(1/K) [q_0 log(p_0 + sum_{c>=K} p_c) + sum_{1<=c<K} q_c log p_c] with p = softmax(new) over all C outputs
    and q = softmax(alpha old). `alpha` sharpens the old model only. 1/K is the public code's ("mean"); CoMFormer's
    per-pixel port drops it ("sum"), which multiplies the meaning of the loss weight by K.

    Arguments and result as in `plain_distillation`.
    """
    z, q = _student_and_target(new, old, alpha)
    num_old = q.shape[1]
    total = z.logsumexp(1, keepdim=True)
    background = torch.cat([z[:, :1], z[:, num_old:]], 1).logsumexp(1, keepdim=True)
    log_p = torch.cat([background, z[:, 1:num_old]], 1) - total
    return _reduce_distillation(-(q * log_p).sum(1), q, mask, reduction, class_reduction)


def _student_and_target(new: Tensor, old: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Logits of the new model and probabilities of the old one, checked, in full precision."""
    if new.shape[:1] + new.shape[2:] != old.shape[:1] + old.shape[2:] or old.shape[1] > new.shape[1]:
        raise ValueError(
            f"New logits {tuple(new.shape)} and old logits {tuple(old.shape)} do not fit: expected the same shape, but "
            "for the classes, of which the new model must have at least as many."
        )
    return full_precision(new), (alpha * full_precision(old.detach())).softmax(1)


def _reduce_distillation(
    loss: Tensor, q: Tensor, mask: Tensor | None, reduction: Reduction, class_reduction: ClassReduction
) -> Tensor:
    if class_reduction not in ("mean", "sum"):
        raise ValueError(f"Unknown class_reduction {class_reduction!r}; expected 'mean' or 'sum'.")
    mask = torch.ones_like(loss, dtype=torch.bool) if mask is None else mask.bool()
    check_pixels(q, mask, "mask")
    return reduce_pixels(loss, mask, reduction) / (q.shape[1] if class_reduction == "mean" else 1)


# --- features: ILT, PLOP ------------------------------------------------------------------------------------------


def feature_distance(new: Tensor, old: Tensor) -> Tensor:
    """Mean squared difference over all elements: ILT's feature term (Michieli & Zanuttigh 2019).

    new, old: encoder outputs of one shape. Returns a scalar >= 0.
    """
    if new.shape != old.shape:
        raise ValueError(f"Features {tuple(new.shape)} and {tuple(old.shape)} differ in shape.")
    return (full_precision(new) - full_precision(old.detach())).square().mean()


def local_pod(
    new: Tensor, old: Tensor, scales: Sequence[int] = (1, 2, 4), reference: bool = False, normalise: bool = False
) -> Tensor:
    """PLOP's Local POD of one feature map (Douillard et al. 2021).

    Both maps are squared. At scale s a map is cut into s x s cells; each cell gives its mean over the width (one value
    per row) and over the height (one per column); all cells of all scales make the embedding e. The loss is the mean
    over images of |e_new - e_old|_2 (not squared).

    new, old: (B, D, H, W) of one shape. Returns a scalar >= 0; equal maps give 0 with zero gradient.

    `reference=False`: cells follow height and width, and rows and columns left over where s does not divide H or W
    go to the first cells; where s exceeds H or W, cells are single rows or columns.
    `reference=True`: the public code, whose cells are k x k with k = W // s on both axes. The two agree on square maps
    whose side every scale divides. Elsewhere the public code leaves out rows below s·k and columns right of it, skips
    a scale above W, and breaks down on a map too flat to give every cell a row: then ValueError.
    `normalise=True` divides each e by its norm, so that the loss does not depend on the scale of the features (an
    option for transformers, whose factors are not those of ResNet; the public code does not).
    """
    if new.shape != old.shape or new.dim() != 4:
        raise ValueError(f"Maps {tuple(new.shape)} and {tuple(old.shape)}: expected two (B, D, H, W) of one shape.")
    embed = _reference_embedding if reference else _embedding
    e_new, e_old = (torch.cat(list(embed(full_precision(x).square(), scales)), 1) for x in (new, old.detach()))
    if normalise:
        e_new, e_old = F.normalize(e_new), F.normalize(e_old)
    return torch.linalg.vector_norm(e_new - e_old, dim=1).mean()


def _embedding(x: Tensor, scales: Sequence[int]) -> Iterator[Tensor]:
    """The strips of the embedding. All cells in one column of cells have the same columns, so pool them together."""
    for scale in scales:
        for axis in (-1, -2):
            for band in x.tensor_split(scale, dim=axis):
                if band.shape[axis]:
                    yield band.mean(axis).flatten(1)


def _reference_embedding(x: Tensor, scales: Sequence[int]) -> Iterator[Tensor]:
    height, width = x.shape[2:]
    for scale in scales:
        k = width // scale
        if k and (scale - 1) * k >= height:
            raise ValueError(
                f"Local POD of the reference cannot cut a map of {height} x {width} into cells of {k} rows at scale "
                f"{scale}: the last would be empty. Use square images or reference=False."
            )
        for top in range(0, scale * k, k or 1):
            for left in range(0, scale * k, k):
                cell = x[:, :, top : top + k, left : left + k]
                yield cell.mean(3).flatten(1)
                yield cell.mean(2).flatten(1)


def fold_logits(new: Tensor, num_old: int) -> Tensor:
    """Logits (B, C, *) folded to (B, K, *): channel 0 is the sum of the background's and all new classes' logits.

    As PLOP does before it compares output maps by POD; a sum of logits, not of probabilities.
    """
    if not 1 <= num_old <= new.shape[1]:
        raise ValueError(f"num_old is {num_old}; expected 1..{new.shape[1]}, the number of outputs of the model.")
    if num_old == new.shape[1]:
        return new
    z = full_precision(new)
    return torch.cat([z[:, :1] + z[:, num_old:].sum(1, keepdim=True), z[:, 1:num_old]], 1)


def pod_loss(
    new_maps: Sequence[Tensor],
    old_maps: Sequence[Tensor],
    factors: Sequence[float],
    num_classes: int,
    num_new: int,
    scales: Sequence[int] = (1, 2, 4),
    reference: bool = False,
    normalise: bool = False,
) -> Tensor:
    """PLOP's distillation loss: sqrt(C/N) · mean over maps of factor · `local_pod`.

    new_maps, old_maps: (B, D_l, H_l, W_l) each, in one order. A new map with more channels than the old one holds
    logits and is folded (`fold_logits`). factors: one per map; on ADE20K 1e-3 for features and 1e-5 for logits.
    num_classes: C, all outputs with background. num_new: N, classes of this step. Rest as in `local_pod`.
    """
    if not len(new_maps) == len(old_maps) == len(factors) > 0:
        raise ValueError(
            f"POD got {len(new_maps)} new maps, {len(old_maps)} old maps and {len(factors)} factors; expected as many "
            "of each, at least one."
        )
    if not 1 <= num_new <= num_classes:
        raise ValueError(f"num_new is {num_new}; expected 1..{num_classes} (num_classes).")
    terms = [
        factor * local_pod(fold_logits(new, min(old.shape[1], new.shape[1])), old, scales, reference, normalise)
        for new, old, factor in zip(new_maps, old_maps, factors, strict=True)
    ]
    return math.sqrt(num_classes / num_new) * torch.stack(terms).mean()


# --- class similarity: REMINDER -----------------------------------------------------------------------------------


def class_similarity(new_means: Tensor, old_prototypes: Tensor, delta: float = 1.0) -> Tensor:
    """How much of each old class to distil on the pixels of each new class: REMINDER (Phan et al. 2022).

    r = softmax over old classes of cos(mean of new class, prototype of old class); entries below delta/K become 0 and
    the rest is not renormalised. A zero vector (class without pixels) has cosine 0 with everything.

    new_means: (N, D), means of the new classes' features in this batch. old_prototypes: (K, D), background first.
    Returns (N, K), each in [0, 1], without gradient.
    """
    if new_means.dim() != 2 or old_prototypes.dim() != 2 or new_means.shape[1] != old_prototypes.shape[1]:
        raise ValueError(
            f"Means {tuple(new_means.shape)} and prototypes {tuple(old_prototypes.shape)}: expected (N, D) and (K, D)."
        )
    new_means, old_prototypes = (full_precision(x.detach()) for x in (new_means, old_prototypes))
    cosine = F.cosine_similarity(new_means[:, None], old_prototypes[None], dim=-1)
    r = cosine.softmax(1)
    return r.masked_fill(r < delta / r.shape[1], 0)


def weighted_distillation(
    new: Tensor, old: Tensor, labels: Tensor, similarity: Tensor, temperature: float = 3.0, epsilon: float = 1e-7
) -> Tensor:
    """Distillation on the pixels of new classes, weighted by class similarity: REMINDER's CSW-KD.

    T²/n · sum over the n pixels with K <= y < 255 of sum_{c<K} -(softmax(old/T)_c r_{y,c} + epsilon) log
    softmax(new_{<K}/T)_c. Pixels of old classes, background or 255 get none, and stay out of n. With n = 0 the result
    is 0 with zero gradient (the public code divides 0 by 0).

    new: (B, C, *). old: (B, K, *). labels: (B, *); in REMINDER after pseudo-labelling. similarity: (N, K) from
    `class_similarity`, row i for the class at position K + i. Returns a scalar >= 0.
    """
    check_pixels(new, labels, "labels")
    check_pixels(old, labels, "labels")
    num_old = old.shape[1]
    if tuple(similarity.shape) != (new.shape[1] - num_old, num_old):
        raise ValueError(
            f"similarity has the shape {tuple(similarity.shape)}; expected "
            f"({new.shape[1] - num_old}, {num_old}): new classes x old outputs."
        )
    chosen = (labels >= num_old) & (labels != IGNORE)
    z, target = (full_precision(x.movedim(1, -1)[chosen])[:, :num_old] / temperature for x in (new, old.detach()))
    r = similarity.detach().to(z)[labels[chosen].long() - num_old]
    loss = -((target.softmax(1) * r + epsilon) * z.log_softmax(1)).sum()
    return temperature**2 * loss / max(1, len(z))
