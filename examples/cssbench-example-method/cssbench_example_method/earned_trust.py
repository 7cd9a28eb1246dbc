"""Earned trust: an old class is pseudo-labelled above the confidence at which it was mostly right when it was taught.

An illustration of the plug-in interface, without a paper and without published numbers. PLOP also relabels background
by the previous model, but takes its thresholds from the new step's images, where the old classes have no labels. Here
they come from the end of the step that taught the class, where they have.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from cssbench.api import IGNORE, Batch, ConfigError, Method, Section, StepContext
from cssbench.losses.pseudo import entropy_histogram

BINS = 100


class EarnedTrust(Method):
    """The model's own loss on labels in which background gives way to the old classes that the previous model sees."""

    class Config(Section):
        """Lower precision: more pseudo-labels, and more of them wrong."""

        precision: float = Field(0.9, gt=0, le=1, description="share of right predictions that earns trust")

    def __init__(self, config: Any = None):
        super().__init__(config)
        self.thresholds = torch.zeros(1)  # (positions seen,): least confidence to be believed; 0 is background

    def start_step(self, ctx: StepContext) -> None:
        if not ctx.model.pixel_output:
            raise ConfigError(f"Method 'earned-trust' needs a model with pixel_logits, not {type(ctx.model).__name__}.")

    def loss(self, ctx: StepContext, batch: Batch) -> dict[str, Tensor]:
        labels = batch.labels
        if batch.previous is not None:
            labels = self.relabel(labels, batch.previous.pixel_logits)
        return ctx.model.loss(batch.output, labels)

    def relabel(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Labels (B, H, W), where background that the previous model's logits (B, K, H, W) claim for an old class is
        that class if the claim is trusted, else ignored."""
        confidence, predicted = logits.softmax(1).max(1)
        claimed = (labels == 0) & (predicted > 0)
        trusted = confidence >= self.thresholds.to(confidence)[predicted]
        return torch.where(claimed, predicted.masked_fill(~trusted, IGNORE), labels)

    @torch.no_grad()
    def end_step(self, ctx: StepContext) -> None:
        """Measure the new classes while their labels are there, on held-out images where the recipe keeps some."""
        ctx.model.eval()
        counts: Any = 0  # (2, positions seen, BINS): right and all predictions, by class and confidence
        for batch in ctx.train_loader if ctx.holdout_loader is None else ctx.holdout_loader:
            logits = ctx.model(batch["images"].to(ctx.device)).pixel_logits
            labels = batch["labels"].to(ctx.device)
            confidence, predicted = logits.softmax(1).max(1)
            masks = (predicted == labels, labels != IGNORE)
            counts += torch.stack([entropy_histogram(confidence, predicted, logits.shape[1], m, BINS) for m in masks])
        right, total = counts.cpu()
        earned = earned_thresholds(right, total, self.config.precision)
        self.thresholds = torch.cat([self.thresholds, earned[ctx.step.new_positions.start :]])

    def state_dict(self) -> dict[str, Any]:
        return {"thresholds": self.thresholds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.thresholds = state["thresholds"]


def earned_thresholds(right: Tensor, total: Tensor, precision: float) -> Tensor:
    """Counts (C, bins) by confidence -> (C,): the least confidence from which on `precision` of all were right; 2,
    never reached, where there is none."""
    right, total = (counts.flip(1).cumsum(1).flip(1) for counts in (right, total))
    enough = (total > 0) & (right >= precision * total)
    return torch.where(enough.any(1), enough.int().argmax(1) / right.shape[1], 2.0)
