"""SegViT-CL: at every later step a new ATM head learns the new classes; encoder and old heads are frozen.

Source: thesis sections 4.2.3 and 4.3.6 (text only; no code was ever published). No replay, no distillation. The scores
of all heads stand side by side and the largest wins.

What the text leaves open, as options: how presence probabilities of separately trained heads are made comparable
(`calibration`). A head of step t is trained on images that all show one of its classes, so it expects them far more
often than a test set shows them, and over-fires on other images: the mechanism of old-class loss.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from cssbench.api import Batch, ConfigError, Method, Section, StepContext
from cssbench.losses.mask import class_presence
from cssbench.models.atm import ATMHead
from cssbench.models.segvit import MaskOutput, SegViT


class SegViTCL(Method):
    """Freeze encoder and old heads (no gradient, eval mode), train the newest head with the model's own loss."""

    class Config(Section):
        """calibration of the presence logits of a finished head; fixed once the step ends, so old scores never move.

        none         as trained.
        prior        per class, add log-odds(n / D) - log-odds(n / D_t): n images of step t show the class, D_t images
                     are in step t, D = D_0 + ... + D_t.
        temperature  one factor per head, fitted to the step's held-out images by likelihood (needs data.holdout).
        """

        calibration: Literal["none", "prior", "temperature"] = "none"
        absent_weight: float | None = Field(
            None, gt=0, description="class weight of 'absent' at steps t > 0; None: the model's own"
        )

    config: Config
    uses_previous = False
    plain_base = True

    def start_step(self, ctx: StepContext) -> None:
        if not isinstance(ctx.model, SegViT):
            raise ConfigError(
                f"Method 'segvit-cl' needs a model with ATM heads, not {type(ctx.model).__name__}. Use model 'segvit'."
            )
        if self.config.calibration != "none" and not ctx.model.trains_classes:
            raise ConfigError(
                f"method.calibration = {self.config.calibration!r} changes presence probabilities, which model.loss = "
                f"'ce' does not train. Set method.calibration = 'none', or model.loss = 'mask'."
            )
        if self.config.absent_weight is not None and ctx.model.ce is not None:
            raise ConfigError("method.absent_weight is of the mask losses. Remove it, or set model.loss = 'mask'.")
        if self.config.calibration == "temperature" and ctx.holdout_loader is None:
            raise ConfigError("method.calibration = 'temperature' needs held-out images: set data.holdout above 0.")
        if ctx.step.index > 0:
            ctx.model.freeze_old(skip_in_training=True)

    def loss(self, ctx: StepContext, batch: Batch) -> dict[str, Tensor]:
        if ctx.step.index == 0 or self.config.absent_weight is None:
            return ctx.model.loss(batch.output, batch.labels)
        assert isinstance(ctx.model, SegViT)
        assert isinstance(batch.output, MaskOutput)
        return ctx.model.loss(batch.output, batch.labels, absent_weight=self.config.absent_weight)

    @torch.no_grad()
    def end_step(self, ctx: StepContext) -> None:
        head = ctx.model.heads[-1]
        assert isinstance(head, ATMHead)
        if self.config.calibration == "prior":
            shift = [prior_shift(ctx.class_images[p], ctx.images[-1], sum(ctx.images)) for p in ctx.step.new_positions]
            head.class_shift.copy_(torch.tensor(shift))
        elif self.config.calibration == "temperature":
            head.class_scale.copy_(fit_scale(*held_out_margins(ctx)))


def prior_shift(shown: int, step_images: int, all_images: int) -> float:
    """log-odds(shown / all_images) - log-odds(shown / step_images); 0 at step 0. Counts are smoothed by one half,
    so that a class in every image of its step stays finite."""

    def log_odds(total: int) -> float:
        return math.log((shown + 0.5) / (total - shown + 0.5))

    return log_odds(all_images) - log_odds(step_images)


def held_out_margins(ctx: StepContext) -> tuple[Tensor, Tensor]:
    """Presence logit (present minus absent) of the newest head on the step's held-out images, and the truth: (n, N)."""
    model = ctx.model.eval()
    margins, present = [], []
    for batch in ctx.holdout_loader or ():
        classes = model(batch["images"].to(ctx.device)).stages[-1][-1].classes.float()
        if classes.shape[-1] == 2:
            margins.append(classes[..., 0] - classes[..., 1])
        else:
            own = classes.diagonal(dim1=1, dim2=2)
            margins.append(own - classes[..., -1])
        present.append(class_presence(batch["labels"].to(ctx.device), ctx.step.new_positions))
    model.train()
    return torch.cat(margins), torch.cat(present)


def fit_scale(margins: Tensor, present: Tensor) -> Tensor:
    """The factor on the margins, 0.05 to 4 on a logarithmic grid, with the smallest binary cross-entropy. Scalar."""
    grid = torch.logspace(math.log10(0.05), math.log10(4.0), 200, device=margins.device)
    truth = present.float()
    losses = torch.stack([F.binary_cross_entropy_with_logits(margins * scale, truth) for scale in grid])
    return grid[losses.argmin()]
