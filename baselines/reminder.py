"""REMINDER: PLOP, and distillation of old outputs on the pixels of new classes, as far as the classes are alike.

Source: Phan et al. 2022, from formulas (its code is GPL and was not read for this file). After each step the mean
embedding of every new class is kept as its prototype; at later steps the cosine between a new class's mean in the batch
and each old prototype says how much of that old output to distil where the new class is (`class_similarity`).
Everything else is PLOP's, see `baselines/plop.py`; the public recipe differs from PLOP's in epochs and batch too. Users
report no effect of the new term on ADE20K 100-10 (issue 4 of the public repository).
Guards where the public code yields NaN: a batch without new-class pixels, a class without pixels, an image without
background.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from cssbench.api import Batch, Method, Section, StepContext
from cssbench.losses.distill import class_similarity, pod_loss, weighted_distillation
from cssbench.losses.prototypes import Weighting, class_means
from cssbench.losses.pseudo import FLOOR, Arithmetic, adaptive_factor, pseudo_labels
from cssbench.models.passes import class_prototypes, uncertainty_thresholds
from cssbench.models.pixel import PixelSegmenter, require_pixel_output
from cssbench.models.segvit import SegViT


class Reminder(Method):
    """PLOP's terms + weight · class-similarity weighted distillation. State: the prototypes."""

    class Config(Section):
        """weight, delta, temperature  of the weighted distillation; similarities below delta/K count as 0.
        weighting                      of batches in a prototype: "batch" each alike (public code), or by "pixel".
        The rest as in PLOP.
        """

        weight: float = Field(0.5, ge=0)
        delta: float = Field(1.0, ge=0)
        temperature: float = Field(3.0, gt=0)
        weighting: Weighting = "batch"
        pod_factor: float = Field(1e-3, ge=0)
        pod_output_factor: float = Field(1e-5, ge=0)
        pod_scales: list[PositiveInt] = Field([1, 2, 4], min_length=1)
        pod_reference: bool = False
        pod_normalise: bool = False
        arithmetic: Arithmetic = "reference"
        threshold: float = Field(FLOOR, ge=0)
        adaptive: bool = True
        without_background: float = Field(0.0, ge=0, le=1)
        balanced_init: bool = True

    plain_base = True
    config: Config
    thresholds: Tensor | None = None  # (K,) of this step
    prototypes: Tensor | None = None  # (classes of finished steps with background, D)

    def start_step(self, ctx: StepContext) -> None:
        require_pixel_output(ctx.model, "reminder")
        if ctx.previous is None:
            return
        if self.config.balanced_init and isinstance(ctx.model, PixelSegmenter):
            ctx.model.init_from_background()
        old, seen = 1 + len(ctx.step.old), 1 + len(ctx.step.seen)
        self.thresholds = uncertainty_thresholds(
            ctx.previous, ctx.train_loader, ctx.device, old, seen, self.config.arithmetic, self.config.threshold
        )

    def loss(self, ctx: StepContext, batch: Batch) -> dict[str, Tensor]:
        if batch.previous is None:
            return ctx.model.loss(batch.output, batch.labels)
        config, old = self.config, batch.previous.pixel_logits
        num_old, num_classes = old.shape[1], batch.output.pixel_logits.shape[1]
        labels = pseudo_labels(batch.labels, old, self.thresholds, num_classes, config.arithmetic)
        weight = adaptive_factor(batch.labels, labels, num_old, config.without_background) if config.adaptive else None
        # A rejected pixel is no label; ATM heads would take it for a negative of every mask.
        left_out = {"ignore_mode": "masked"} if isinstance(ctx.model, SegViT) else {}
        terms = ctx.model.loss(batch.output, labels, weight=weight, **left_out)
        new_maps, old_maps = batch.output.pod_maps(num_old), batch.previous.pod_maps(num_old)
        factors = [config.pod_factor] * (len(old_maps) - 1) + [config.pod_output_factor]
        options = (config.pod_scales, config.pod_reference, config.pod_normalise)
        pod = pod_loss(new_maps, old_maps, factors, num_classes, num_classes - num_old, *options)
        return terms | {"pod": pod, "similar": self.weighted_term(batch, labels)}

    def weighted_term(self, batch: Batch, labels: Tensor) -> Tensor:
        """CSW-KD, a scalar. labels: (B, H, W) after pseudo-labelling."""
        assert batch.previous is not None
        assert self.prototypes is not None
        new, old = batch.output.pixel_logits, batch.previous.pixel_logits
        means, _ = class_means(batch.output.embedding.detach(), labels, new.shape[1])
        similarity = class_similarity(means[old.shape[1] :], self.prototypes.to(means), self.config.delta)
        return self.config.weight * weighted_distillation(new, old, labels, similarity, self.config.temperature)

    def end_step(self, ctx: StepContext) -> None:
        """Prototypes of the new classes (at step 0 of background too); those of old ones are never refreshed."""
        fresh = class_prototypes(ctx.model, ctx.train_loader, ctx.device, 1 + len(ctx.step.seen), self.config.weighting)
        old = self.prototypes
        self.prototypes = fresh if old is None else torch.cat([old, fresh[len(old) :]])

    def state_dict(self) -> dict[str, Any]:
        return {} if self.prototypes is None else {"prototypes": self.prototypes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.prototypes = state.get("prototypes")
