"""ILT: LwF's distillation of outputs, and the distance of the encoder's features to the previous model's.

Source: Michieli & Zanuttigh 2019, with the settings of MiB's public code (Cermelli et al. 2020), from which the
published ADE20K numbers come: plain distillation on every pixel, mean squared difference of the encoder's output, both
weighted by 100. The original masks its distillation and may freeze the encoder; that is left out there and here.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from cssbench.api import Batch, Method, Section, StepContext
from cssbench.losses.distill import ClassReduction, feature_distance, plain_distillation
from cssbench.models.pixel import require_pixel_output


class ILT(Method):
    """The model's own loss + weight · distillation of per-pixel logits + feature_weight · distance of features."""

    class Config(Section):
        """alpha sharpens the previous model's outputs; class_reduction: "mean" as the public code, "sum" drops 1/K."""

        weight: float = Field(100.0, ge=0, description="of the distillation")
        feature_weight: float = Field(100.0, ge=0, description="of the feature distance")
        alpha: float = Field(1.0, gt=0)
        class_reduction: ClassReduction = "mean"

    plain_base = True
    config: Config

    def start_step(self, ctx: StepContext) -> None:
        require_pixel_output(ctx.model, "ilt")

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
        features = feature_distance(batch.output.encoded, batch.previous.encoded)
        return terms | {
            "distillation": self.config.weight * distillation,
            "features": self.config.feature_weight * features,
        }
