"""Passes over a step's training images that a method makes before or after training: thresholds and prototypes.

`loader` yields {"images": (B, 3, H, W), "labels": (B, H, W) positions} on the CPU, as `StepContext.train_loader`. Every
process of a distributed run makes the whole pass and gets the same result.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from cssbench.losses.prototypes import Weighting, class_means, update_prototypes
from cssbench.losses.pseudo import BINS, FLOOR, Arithmetic, entropy_histogram, normalised_entropy, thresholds
from cssbench.models.segmenter import Segmenter


@torch.inference_mode()
def uncertainty_thresholds(
    previous: Segmenter,
    loader: Iterable[dict[str, Any]],
    device: torch.device,
    num_old: int,
    num_classes: int,
    arithmetic: Arithmetic = "reference",
    floor: float = FLOOR,
) -> Tensor:
    """PLOP's threshold of each old class, (K,) float64 on the CPU: the previous model's median uncertainty where it
    predicts the class, over background pixels (label 0). See `cssbench.losses.pseudo`.

    num_old, num_classes: K and C, background included.
    """
    histogram = torch.zeros(num_old, BINS, dtype=torch.int64, device=device)
    for batch in loader:
        logits = previous(batch["images"].to(device)).pixel_logits
        uncertainty = normalised_entropy(logits, num_classes, arithmetic)
        background = batch["labels"].to(device) == 0
        histogram += entropy_histogram(uncertainty, logits.argmax(1), num_old, background)
    return thresholds(histogram.cpu(), arithmetic, floor)


@torch.no_grad()
def class_prototypes(
    model: Segmenter,
    loader: Iterable[dict[str, Any]],
    device: torch.device,
    num_classes: int,
    weighting: Weighting = "batch",
) -> Tensor:
    """Mean embedding of each label 0..C-1, (C, D) on the CPU, zero for one that never shows; the model in eval mode."""
    was_training = model.training
    model.eval()
    prototypes: Tensor | None = None
    seen = torch.zeros(num_classes, dtype=torch.int64, device=device)
    for batch in loader:
        embedding = model(batch["images"].to(device)).embedding
        means, counts = class_means(embedding, batch["labels"].to(device), num_classes)
        prototypes = torch.zeros_like(means) if prototypes is None else prototypes
        prototypes, seen = update_prototypes(prototypes, seen, means, counts, weighting)
    model.train(was_training)
    assert prototypes is not None, "a step has at least one training image"
    return prototypes.cpu()
