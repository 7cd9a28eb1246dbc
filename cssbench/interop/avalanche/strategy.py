"""Our methods in a strategy of Avalanche: its loop and its plug-ins around our model, method, optimiser and batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.templates import SupervisedTemplate
from torch import Tensor

from cssbench.api import Batch, Method, Scenario, Segmenter, StepContext
from cssbench.config import OptimConfig, TrainConfig
from cssbench.contract import check_groups, check_output, check_terms
from cssbench.data.step_dataset import BatchStream, make_loader, one_pass
from cssbench.errors import ConfigError
from cssbench.experiment import derive_seed
from cssbench.interop.avalanche.benchmark import StepExperience
from cssbench.interop.avalanche.model import LogitsModel, OwnLoss, as_logits
from cssbench.models.segmenter import SegOutput, freeze_copy
from cssbench.scenario import Step
from cssbench.trainer import make_optimizer, pass_seed, rate_at, use_fused


class CSSStrategy(SupervisedTemplate):
    """Trains a method of ours on the experiences of `to_avalanche`; on the CPU to the same weights as our own loop.

    optim, train: as in a recipe; of `train` batch_size, accumulate and iterations or epochs count. seed: draws what our
    loop draws with it; the benchmark needs the data's part, `seed=data_seed(seed)`. plugins, evaluator: Avalanche's, of
    those that add to the loss, keep a memory, or only look on. One process, full precision, no resuming: for those take
    `cssbench run`, and for its plug-ins `avalanche:EWC` and the like.
    """

    def __init__(
        self,
        *,
        scenario: Scenario,
        model: Segmenter,
        method: Method,
        optim: OptimConfig | None = None,
        train: TrainConfig | None = None,
        seed: int = 0,
        workers: int = 0,
        device: str | torch.device = "cpu",
        plugins: Sequence[Any] | None = None,
        evaluator: Any = None,
    ):
        self.scenario, self.net, self.method = scenario, model, method
        self.optim, self.settings = optim or OptimConfig(), train or TrainConfig(epochs=1)
        _check(self.settings)
        self.seed, self.workers = seed, workers
        self.ctx: Any = None
        self.previous: Segmenter | None = None
        self.images: list[int] = []  # training images of each step so far
        self.output: SegOutput | None = None
        self.old: SegOutput | None = None
        self.names: list[str] = []
        size = self.settings.batch_size // self.settings.accumulate
        super().__init__(
            model=LogitsModel(model),
            optimizer=torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0),  # each step has its own
            criterion=OwnLoss(model),
            train_mb_size=size,
            eval_mb_size=size,
            device=device,
            plugins=plugins,
            evaluator=evaluator or (lambda: EvaluationPlugin(loggers=[_Silent()])),
        )

    # --- a step begins ------------------------------------------------------------------------------------------

    @property
    def step(self) -> Step:
        assert isinstance(self.experience, StepExperience), "train on an experience of to_avalanche"
        return self.experience.step

    @property
    def iterations(self) -> int:
        return self.settings.length(self.step.index, len(self.experience.data))  # type: ignore[union-attr]

    def make_train_dataloader(self, **kwargs: Any) -> None:
        """Our order of batches, without end for our number of iterations."""
        data = self.experience.data  # type: ignore[union-attr]
        order = derive_seed(data_seed(self.seed), self.step.index)
        passes = self.iterations * self.settings.accumulate
        self.dataloader = make_loader(data, BatchStream(len(data), order, self.train_mb_size, passes), self.workers)

    def check_model_and_optimizer(self, **kwargs: Any) -> None:
        """Grow the model, call the method, make the optimiser: once per step, as our loop does."""
        if len(self.net.heads) != self.step.index:
            raise ConfigError(
                f"CSSStrategy trains the steps in order, each once: the next one is {len(self.net.heads)}, not "
                f"{self.step.index}. Make a new strategy and a new model to train again."
            )
        torch.manual_seed(derive_seed(self.seed, "grow", self.step.index))
        self.net.grow(self.step)
        self.net.to(self.device)
        data = self.experience.data  # type: ignore[union-attr]
        self.images.append(len(data))
        torch.manual_seed(derive_seed(self.seed, "train", self.step.index, 0))
        self.ctx = StepContext(
            scenario=self.scenario,
            step=self.step,
            model=self.net,
            previous=self.previous,
            train_loader=make_loader(data, one_pass(len(data), self.train_mb_size), self.workers),
            holdout_loader=None,
            device=self.device,
            images=tuple(self.images),
            class_images=self.experience.class_images,  # type: ignore[union-attr]
            log=lambda name, value: None,
        )
        self.method.start_step(self.ctx)
        groups = check_groups(self.method, self.method.param_groups(self.ctx))
        self.optimizer = make_optimizer(self.optim, groups, self.step.index, use_fused(self.optim, self.settings))
        self.net.train()

    # --- an iteration -------------------------------------------------------------------------------------------

    def training_epoch(self, **kwargs: Any) -> None:
        """All iterations of a step; plug-ins are called once per forward pass, around the update once per iteration."""
        every = self.settings.accumulate
        self.optimizer.zero_grad(set_to_none=True)
        for number, loaded in enumerate(self.dataloader):
            if self._stop_training:
                break
            self.mbatch = loaded
            self.ctx.iteration = min(number // every, self.iterations - 1)
            for group in self.optimizer.param_groups:
                group["lr"] = rate_at(self.optim, group["base_lr"], self.ctx.iteration, self.iterations)
            self._unpack_minibatch()
            self._before_training_iteration(**kwargs)
            self.loss = self._make_empty_loss()
            self._before_forward(**kwargs)
            torch.manual_seed(pass_seed(derive_seed(self.seed, "passes", self.step.index), number))
            self.mb_output = self.forward()
            self._after_forward(**kwargs)
            self.loss += self.criterion()
            self._before_backward(**kwargs)
            (self.loss / every).backward()
            self._after_backward(**kwargs)
            if (number + 1) % every == 0:
                self._update(**kwargs)
            self._after_training_iteration(**kwargs)
        self.ctx.iteration = self.iterations

    def _update(self, **kwargs: Any) -> None:
        self.method.after_backward(self.ctx)
        if self.optim.clip is not None:
            trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            torch.nn.utils.clip_grad_norm_(trained, self.optim.clip)
        self._before_update(**kwargs)
        self.optimizer_step()
        self.method.after_update(self.ctx)
        self._after_update(**kwargs)
        self.optimizer.zero_grad(set_to_none=True)

    def _unpack_minibatch(self) -> None:
        """Batches of our loader, or (images, labels, task labels) of one that a plug-in made."""
        loaded: Any = self.mbatch
        self.names = []
        if isinstance(loaded, dict):
            self.names = list(loaded["names"])
            loaded = [loaded["images"], loaded["labels"], torch.zeros(len(loaded["labels"]), dtype=torch.int64)]
        self.mbatch = [part.to(self.device, non_blocking=True) for part in loaded]

    def forward(self) -> Tensor:
        extra = self.net.training_inputs(self.mb_y) if self.is_training else {}
        self.old = None
        if self.is_training and self.previous is not None and self.method.uses_previous:
            with torch.no_grad():
                self.old = self.previous(self.mb_x)
        self.output = check_output(self.net, self.net(self.mb_x, **extra))
        return as_logits(self.net, self.output)

    def criterion(self) -> Tensor:
        """The method's terms added up; in an evaluation the model's own loss."""
        if self.is_eval:
            return self._criterion(self.mb_output, self.mb_y)  # type: ignore[arg-type]
        assert self.output is not None
        batch = Batch(self.mb_x, self.mb_y, self.output, self.old, self.names)
        return torch.stack(list(check_terms(self.method, self.method.loss(self.ctx, batch)).values())).sum()

    # --- a step ends --------------------------------------------------------------------------------------------

    def _after_training_exp(self, **kwargs: Any) -> None:
        torch.manual_seed(derive_seed(self.seed, "end", self.step.index, 0))
        self.method.end_step(self.ctx)
        self.output = self.old = None
        super()._after_training_exp(**kwargs)
        self.net.zero_grad(set_to_none=True)
        self.previous = freeze_copy(self.net)


class _Silent:
    """A logger that writes nothing; with none at all Avalanche warns."""

    def log_metrics(self, values: Any) -> None:
        """Nothing."""


def data_seed(seed: int) -> int:
    """What our loop draws views of images with in a run of `seed`: the `seed` of `to_avalanche`."""
    return derive_seed(seed, "data")


def _check(settings: TrainConfig) -> None:
    """Raises ConfigError for settings that this loop does not have."""
    if settings.batch_size % settings.accumulate:
        raise ConfigError(
            f"train.batch_size {settings.batch_size} does not divide by {settings.accumulate} accumulated passes."
        )
    if settings.precision != "32-true" or settings.compile or settings.devices != 1:
        raise ConfigError(
            "CSSStrategy trains in one process, in full precision, not compiled. Leave train.precision, train.devices "
            "and train.compile as they are, or use `cssbench run`."
        )
