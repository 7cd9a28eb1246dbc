"""A model of ours as Avalanche wants one: a module that puts out a tensor of logits, and a criterion on it."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.models import DynamicModule
from torch import Tensor, nn

from cssbench.models.segmenter import Segmenter, SegOutput
from cssbench.scenario import IGNORE, Scenario


def as_logits(model: Segmenter, output: SegOutput) -> Tensor:
    """(B, C, H, W) logits that carry the whole output as `segmentation`, for `OwnLoss`.

    Channels are positions; channel 0 is background, unless the model has none.
    """
    logits = output.pixel_logits if model.pixel_output else output.logits
    logits = logits.view_as(logits)  # another object: the output keeps the first one, and a circle would keep both
    logits.segmentation = output  # type: ignore[attr-defined]
    return logits


class LogitsModel(nn.Module):
    """`net` with tensors for outputs (`as_logits`). Parameters have the prefix "net."."""

    def __init__(self, net: Segmenter):
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return as_logits(self.net, self.net(images))


class GrowingModel(LogitsModel, DynamicModule):
    """`LogitsModel` that Avalanche's strategies grow: before they train an experience, up to that step."""

    def __init__(self, net: Segmenter, scenario: Scenario):
        super().__init__(net)
        self.scenario = scenario

    def adaptation(self, experience: Any) -> None:
        """In training only: a model is evaluated with the outputs that it has."""
        if self.training:
            for step in self.scenario.steps[len(self.net.heads) : experience.current_experience + 1]:
                self.net.grow(step)


class OwnLoss:
    """The model's own loss as a criterion: of what a `LogitsModel` put out, and labels (B, H, W) of positions.

    Labels of classes that the model has not learned yet, which an evaluation shows, are ignored.
    """

    def __init__(self, net: Segmenter):
        self.net = net

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        known = logits.shape[1] + (not self.net.pixel_output and not self.net.has_background)
        labels = labels.masked_fill(labels >= known, IGNORE)
        terms = self.net.loss(logits.segmentation, labels)  # type: ignore[attr-defined]
        return torch.stack(list(terms.values())).sum()
