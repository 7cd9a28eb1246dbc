"""Fine-tuning: train everything on each step's labels, do nothing against forgetting. The lower bound."""

from __future__ import annotations

from torch import Tensor

from cssbench.api import Batch, Method, StepContext


class FineTune(Method):
    """The model's own supervised loss on the labels of the step; old classes are trained as background."""

    uses_previous = False
    plain_base = True

    def loss(self, ctx: StepContext, batch: Batch) -> dict[str, Tensor]:
        return ctx.model.loss(batch.output, batch.labels)
