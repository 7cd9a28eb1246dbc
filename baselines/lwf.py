"""LwF: cross-entropy, and the previous model's outputs as soft targets of the old outputs.

Source: Li & Hoiem 2016, in the form of the public code of MiB (Cermelli et al. 2020): distillation on every pixel, mean
over pixels and over the K old outputs; hence the weight of 100. Old classes are trained as background by the
cross-entropy, which is what MiB mends.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from cssbench.api import Batch, Method, Section, StepContext
from cssbench.losses.distill import ClassReduction, plain_distillation
from cssbench.models.pixel import require_pixel_output


class LwF(Method):
    """The model's own loss + weight · distillation of per-pixel logits."""

    class Config(Section):
        """alpha sharpens the previous model's outputs; class_reduction: "mean" as the public code, "sum" drops 1/K."""

        weight: float = Field(100.0, ge=0, description="of the distillation")
        alpha: float = Field(1.0, gt=0)
        class_reduction: ClassReduction = "mean"

    plain_base = True
    config: Config

    def start_step(self, ctx: StepContext) -> None:
        require_pixel_output(ctx.model, "lwf")

    def loss(self, ctx: StepContext, batch: Batch) -> dict[str, Tensor]:
        terms = ctx.model.loss(batch.output, batch.labels)
        if batch.previous is None:
            return terms
        distillation = plain_distillation(
            batch.output.pixel_logits,
            batch.previous.pixel_logits,
            self.config.alpha,
            class_reduction=self.config.class_reduction,
        )
        return terms | {"distillation": self.config.weight * distillation}
