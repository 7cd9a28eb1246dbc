"""MiB: cross-entropy and distillation that know that background now means something else than before.

Source: Cermelli et al. 2020 and its public code. In a step's labels background holds the old classes, and in the
previous model's outputs it holds the new ones. So the cross-entropy lets "background" be explained by background or any
old class, the distillation lets the previous model's background be explained by background or any new class, and new
classifiers start from the background's.

On ATM heads (our forms; no paper has shown them) the newest head always learns with the model's own loss, old heads
without: that their classes are not labelled is not absence. Beside it
  pixel  both unbiased terms on `MaskOutput.pixel_logits`;
  query  distillation of the old heads' queries. The unbiased forms reduce to this: a query of an old head chooses among
         old classes and "none" only, so P(none) + sum of P(old) is 1 and costs nothing, and there is no new class for
         the previous model's "none" to hide. A background query does hide the new classes, but "background or any new
         class" has no exact probability here: queries of separate heads decide independently, each by itself, with no
         softmax over them. So it is left out, unless `distil_background` says otherwise.
There is no balanced start there: no row of a head stands for background.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from cssbench.api import Batch, ConfigError, Method, Section, StepContext
from cssbench.losses.distill import ClassReduction, unbiased_distillation
from cssbench.losses.mask import mask_distillation, query_distillation
from cssbench.losses.pixel import Reduction, unbiased_cross_entropy
from cssbench.models.pixel import PixelSegmenter, require_pixel_output
from cssbench.models.segvit import MaskOutput, SegViT


class MiB(Method):
    """Step 0: the model's own loss. Later: unbiased cross-entropy + weight · unbiased distillation."""

    class Config(Section):
        """weight is 10 in the public ADE20K recipe; 100 is known from scenarios with many steps (EWF, VOC 15-1).

        alpha              sharpens the previous model's outputs.
        class_reduction    "mean" over the K old outputs (public code); "sum" as CoMFormer's port, weight then ~1/K.
        reduction          of the cross-entropy: "all" pixels in the denominator (public code), or "valid" ones only.
        balanced_init      new classifiers share background's probability evenly with it.
        form               on ATM heads, see above; query_weight, mask_weight: of class outputs and masks in "query".
                           200 is CoMFormer's for a mean over queries, 20 the weight of SegViT's focal loss: guesses.
        distil_background  in "query": distil a background query too, which keeps it on what are new classes now. False:
                           nothing holds that query but what it shares with those of old classes.
        """

        weight: float = Field(10.0, ge=0, description="of the distillation")
        alpha: float = Field(1.0, gt=0)
        class_reduction: ClassReduction = "mean"
        reduction: Reduction = "all"
        balanced_init: bool = True
        form: Literal["pixel", "query"] = "pixel"
        query_weight: float = Field(200.0, ge=0)
        mask_weight: float = Field(20.0, ge=0)
        distil_background: bool = False

    config: Config

    plain_base = True

    def start_step(self, ctx: StepContext) -> None:
        require_pixel_output(ctx.model, "mib")
        if self.config.form == "query" and not isinstance(ctx.model, SegViT):
            raise ConfigError(
                f"method.form = 'query' needs a model with ATM heads ('segvit'), not {type(ctx.model).__name__}. "
                f"Use method.form = 'pixel'."
            )
        if self.config.form == "query" and isinstance(ctx.model, SegViT) and not ctx.model.trains_classes:
            raise ConfigError(
                "method.form = 'query' distils class outputs, which model.loss = 'ce' does not train. Use method.form "
                "= 'pixel', or model.loss = 'mask'."
            )
        if ctx.step.index > 0 and self.config.balanced_init and isinstance(ctx.model, PixelSegmenter):
            ctx.model.init_from_background()

    def loss(self, ctx: StepContext, batch: Batch) -> dict[str, Tensor]:
        if batch.previous is None:
            return ctx.model.loss(batch.output, batch.labels)
        if not isinstance(ctx.model, SegViT):
            return self.pixel_terms(batch.output, batch.previous, batch.labels)
        assert isinstance(batch.output, MaskOutput)
        terms = ctx.model.loss(batch.output, batch.labels, newest_only=True)
        if self.config.form == "query":
            return terms | self.query_terms(batch.output, batch.previous)
        return terms | self.pixel_terms(batch.output, batch.previous, batch.labels)

    def pixel_terms(self, output: Any, previous: Any, labels: Tensor) -> dict[str, Tensor]:
        config, new, old = self.config, output.pixel_logits, previous.pixel_logits
        distillation = unbiased_distillation(new, old, config.alpha, class_reduction=config.class_reduction)
        return {
            "unbiased_ce": unbiased_cross_entropy(new, labels, old.shape[1], config.reduction),
            "distillation": config.weight * distillation,
        }

    def query_terms(self, output: Any, previous: Any) -> dict[str, Tensor]:
        """Mean over the distilled queries of old heads, last stage."""
        left_out = int(output.has_background and not self.config.distil_background)
        total = sum(old.masks.shape[1] for _, old in previous.final) - left_out
        classes, masks = [], []
        for t, ((_, new), (_, old)) in enumerate(
            zip(output.final, previous.final, strict=False)
        ):  # old heads come first
            chosen = slice(left_out if t == 0 else 0, None)  # background is the first query of step 0's head
            share = old.masks[:, chosen].shape[1] / total
            classes.append(share * query_distillation(new.classes[:, chosen], old.classes[:, chosen]))
            masks.append(share * mask_distillation(new.masks[:, chosen], old.masks[:, chosen]))
        return {
            "query_distillation": self.config.query_weight * torch.stack(classes).sum(),
            "mask_distillation": self.config.mask_weight * torch.stack(masks).sum(),
        }
