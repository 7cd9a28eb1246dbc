"""Our scores as a metric of Avalanche, and our loggers as one of its loggers."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.evaluation.metric_definitions import PluginMetric
from avalanche.evaluation.metric_results import MetricValue
from avalanche.logging import BaseLogger

from cssbench.errors import ConfigError
from cssbench.evaluate import EvaluateConfig
from cssbench.logs import RunLog
from cssbench.metrics.confusion import confusion
from cssbench.models.segmenter import Segmenter
from cssbench.predict import Predictor
from cssbench.protocol import get
from cssbench.scenario import IGNORE, Scenario


class MeanIoU(PluginMetric[dict[str, float]]):
    """mIoU of base, incremental and all classes so far in [0, 1], over a test experience of `to_avalanche`.

    protocol: one that reads the geometry `crop`, which those experiences show. The names are "base/<protocol>/step<t>",
    "incremental/..." and "all/...". Raises ConfigError for a protocol that reads full images.
    """

    def __init__(
        self, scenario: Scenario, model: Segmenter, protocol: str = "plop@1", background_threshold: float | None = None
    ):
        super().__init__()
        self.scenario, self.protocol = scenario, get(protocol)
        if self.protocol.geometry != "crop":
            raise ConfigError(
                f"The protocol {protocol} reads full images, and the experiences of to_avalanche are centre crops. "
                f"Choose one that reads crops, for instance 'plop@1' or 'mib@1'; `cssbench list protocols`."
            )
        default = EvaluateConfig().background_threshold
        self.predictor = Predictor(model, scenario, default if background_threshold is None else background_threshold)
        self.step = 0
        self.ids = torch.full((256,), IGNORE)  # position -> class id
        self.ids[: 1 + scenario.num_classes] = torch.tensor([0, *scenario.order])
        self.reset()

    def reset(self) -> None:
        side = 1 + self.scenario.num_classes_max
        self.matrix = torch.zeros(side, side, dtype=torch.int64)

    def result(self) -> dict[str, float]:
        """Raw counts are in `matrix`, class id x predicted class id."""
        found = self.protocol.scores(self.matrix.numpy(), self.scenario.groups, self.step)
        return {name: value for name in ("base", "incremental", "all") if (value := found[name]) is not None}

    def before_eval_exp(self, strategy: Any) -> None:
        self.reset()
        self.step = strategy.experience.current_experience

    @torch.no_grad()
    def after_eval_iteration(self, strategy: Any) -> None:
        """Images are scored with the outputs that the model has: of steps 0..t, or of fewer."""
        output = strategy.mb_output.segmentation
        outputs = output.scores.shape[1] - self.predictor.has_background
        learned = next(step.index for step in self.scenario.steps if len(step.seen) == outputs)
        for scores, positions in zip(output.scores.float(), strategy.mb_y, strict=True):
            predicted = self.predictor([scores], [learned])[learned][self.protocol.rule]
            truth = self.ids.to(positions.device)[positions]
            self.matrix += confusion(truth, predicted, self.scenario.num_classes_max).cpu()

    def after_eval_exp(self, strategy: Any) -> list[MetricValue]:
        place = f"{self.protocol.id}/step{self.step}"
        at = strategy.clock.train_iterations
        return [MetricValue(self, f"{name}/{place}", value, at) for name, value in self.result().items()]

    def __str__(self) -> str:
        return f"mIoU/{self.protocol.id}"


class RunLogger(BaseLogger):
    """Numbers that Avalanche logs, passed on to loggers of ours (`cssbench.logs.RunLog`)."""

    def __init__(self, log: RunLog):
        super().__init__()
        self.log = log

    def log_single_metric(self, name: str, value: Any, x_plot: int) -> None:
        if isinstance(value, int | float):
            self.log.tell("scalar", name, float(value), 0, x_plot)
