"""Plug-ins of Avalanche as methods: `avalanche:EWC` and the like, in our own loop, on any model and scenario.

A plug-in sees a `StepView` of our loop in the place of a strategy. It is called where Avalanche would call it, with the
model as a `LogitsModel` and the model's own loss as the criterion; what it adds to the loss is the term "penalty". Its
options are those of its constructor; its state (importances, copies of weights) is saved with the run.

Deviations from Avalanche's own loop: one pass of importances sees each image once, in its first augmented view; epochs
do not exist (a step is one); `before_forward` is called after the forward pass.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from avalanche.training import plugins
from avalanche.training.plugins.clock import Clock
from pydantic import Field
from torch import Tensor

from cssbench.config import Section
from cssbench.data.step_dataset import StepDataset
from cssbench.errors import ConfigError, UnknownNameError
from cssbench.interop.avalanche.benchmark import StepExperience, numbered
from cssbench.interop.avalanche.model import LogitsModel, OwnLoss, as_logits
from cssbench.interop.avalanche.state import load_plugin_state, move_params, plugin_state
from cssbench.interop.views import StepView
from cssbench.method import Batch, Method, StepContext
from cssbench.models.pixel import require_pixel_output
from cssbench.models.segmenter import SegOutput

# Why plug-ins that one might ask for cannot work here, as Avalanche 0.6 has them.
REFUSED = {
    "AGEM": "reads its memory by loaders of its own, whose place within a step no checkpoint can hold",
    "GEM": "solves a quadratic program over memories that it indexes by the one class of an image",
    "GDumb": "balances its memory by the one class of an image; a label map shows several",
    "MIR": "picks from a memory by the loss of each image, and balances it by the one class of an image",
    "GSS_greedy": "compares gradients of single images and stores them with one class each",
    "CoPE": "keeps a prototype per class of an image vector, not of pixels",
    "CWRStar": "rewires the last fully connected layer of a classifier; a segmentation head is convolutional and grows",
    "BiC": "corrects the bias of one vector of logits per image",
    "GenerativeReplay": "needs a generator of images with one class each",
    "LFL": "needs models with `get_features`, and replaces the model within a step",
    "FeatureDistillation": "needs a model that keeps its features; use the methods ilt or plop",
    "FromScratchTraining": "resets the model at every step: give a run of one step, the oracle, instead",
    "RAR": "perturbs single images of a memory that it balances by the one class of an image",
}


class StrategyView:
    """What a plug-in may read of our loop, under the names that a strategy of Avalanche has for it."""

    def __init__(self, ctx: StepContext):
        self.ctx = ctx
        self.model, self._criterion = LogitsModel(ctx.model), OwnLoss(ctx.model)
        self.optimizer = self  # plug-ins ask it for `zero_grad` alone
        self.device, self.is_training, self.is_eval = ctx.device, True, False
        self.train_epochs, self.plugins = 1, []  # type: ignore[var-annotated]
        data = step_data(ctx)
        self.view = StepView(data, fixed=True)
        first = sum(ctx.images[: ctx.step.index])
        self.experience = StepExperience(numbered(self.view, first), ctx.step, data)
        self.adapted_dataset = self.experience.dataset
        self.train_mb_size = self.eval_mb_size = len(next(iter(ctx.train_loader.batch_sampler)))  # type: ignore
        self.clock = Clock()
        self.clock.train_exp_counter = ctx.step.index
        self.iteration = -1  # of the optimiser step in hand
        self.mbatch: list[Any] = []
        self.output: SegOutput | None = None
        self.loss = torch.zeros(1, device=ctx.device)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.ctx.model.zero_grad(set_to_none)

    @property
    def mb_x(self) -> Tensor:
        return self.mbatch[0]  # type: ignore[no-any-return]

    @property
    def mb_y(self) -> Tensor:
        return self.mbatch[1]  # type: ignore[no-any-return]

    @property
    def mb_task_id(self) -> Tensor:
        return self.mbatch[2]  # type: ignore[no-any-return]

    @property
    def mb_output(self) -> Tensor:
        assert self.output is not None
        return as_logits(self.ctx.model, self.output)


def step_data(ctx: StepContext) -> StepDataset:
    """The images of the step behind `ctx.train_loader`."""
    data = getattr(ctx.train_loader, "dataset", None)
    assert isinstance(data, StepDataset), "the task loop gives every step a loader of a StepDataset"
    return data


class PluginMethod(Method):
    """The model's own loss + what the plug-in adds to it."""

    uses_previous = False
    plugin_class: ClassVar[Any]
    on_cpu: ClassVar[bool] = False  # whether the plug-in keeps its tensors on the CPU itself

    def __init__(self, config: Any = None):
        super().__init__(config)
        self.plugin: Any = self.make_plugin()
        self.strategy: StrategyView | None = None  # within a step

    def make_plugin(self) -> Any:
        return self.plugin_class(**self.config.model_dump())

    def call(self, *callbacks: str) -> None:
        """Callbacks of the plug-in, with its tensors where the model is."""
        assert self.strategy is not None, "start_step comes first"
        if not self.on_cpu:
            move_params(self.plugin, self.strategy.device)
        for callback in callbacks:
            getattr(self.plugin, callback)(self.strategy)

    def start_step(self, ctx: StepContext) -> None:
        self.strategy = StrategyView(ctx)
        self.call("before_training", "before_train_dataset_adaptation", "after_train_dataset_adaptation")
        self.call("before_training_exp", "before_training_epoch")

    def loss(self, ctx: StepContext, batch: Batch) -> dict[str, Tensor]:
        view = self.strategy
        assert view is not None, "start_step comes first"
        terms = ctx.model.loss(batch.output, batch.labels)
        view.mbatch = [batch.images, batch.labels, torch.zeros(len(batch.labels), dtype=torch.int64)]
        view.output = batch.output
        if view.iteration != ctx.iteration:
            view.iteration = view.clock.train_exp_iterations = view.clock.train_iterations = ctx.iteration
            training = ctx.model.training
            self.call("before_training_iteration")
            view.zero_grad()  # as Avalanche does, after a plug-in that made gradients of its own
            ctx.model.train(training)
        self.call("before_forward", "after_forward")
        penalty = self.penalty(view, torch.stack(list(terms.values())).sum())
        view.output, view.mbatch = None, []
        return terms if penalty is None else terms | {"penalty": penalty}

    def penalty(self, view: StrategyView, loss: Tensor) -> Tensor | None:
        """What `before_backward` adds to `loss`; None where it leaves it alone."""
        tiny = torch.finfo(loss.dtype).tiny  # a loss of 0 is none to MAS; any other stays what it is
        start = (loss + tiny).reshape(1)
        view.loss, version = start, start._version
        self.call("before_backward")
        changed = view.loss is not start or start._version != version
        found = view.loss.sum() - loss if changed else None
        view.loss = torch.zeros(1, device=loss.device)
        return found

    def after_backward(self, ctx: StepContext) -> None:
        self.call("after_backward", "before_update")

    def after_update(self, ctx: StepContext) -> None:
        self.call("after_update", "after_training_iteration")

    def end_step(self, ctx: StepContext) -> None:
        self.call("after_training_epoch", "after_training_exp", "after_training")
        ctx.model.zero_grad(set_to_none=True)
        ctx.model.train()
        self.strategy = None

    def state_dict(self) -> dict[str, Any]:
        return plugin_state(self.plugin)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_plugin_state(self.plugin, state)


class EWC(PluginMethod):
    """Elastic Weight Consolidation (Kirkpatrick et al. 2017): Fisher information as importance, per batch as Avalanche
    takes it (the square of a batch's mean gradient)."""

    class Config(Section):
        """mode "separate": weights and importances of every step are kept, each with its own penalty; "online": one
        penalty, old importances times `decay_factor`. Avalanche has no default of `ewc_lambda`; ours is a guess."""

        ewc_lambda: float = Field(1e4, ge=0)
        mode: str = Field("separate", pattern="^(separate|online)$")
        decay_factor: float | None = Field(None, ge=0, le=1, description="online only")
        keep_importance_data: bool = False

    plugin_class = plugins.EWCPlugin
    plain_base = True

    def make_plugin(self) -> Any:
        if (self.config.mode == "online") != (self.config.decay_factor is not None):
            raise ConfigError(
                "avalanche:EWC takes method.decay_factor with method.mode = 'online', and only then: it says what is "
                "kept of old importances."
            )
        return super().make_plugin()


class SI(PluginMethod):
    """Synaptic Intelligence (Zenke et al. 2017): importance from the path of each weight while it is learned."""

    class Config(Section):
        """excluded_parameters: patterns of names, which begin with "net."."""

        si_lambda: float | list[float] = Field(1.0, description="a list: of each step, the last one repeats")
        eps: float = Field(1e-7, gt=0)
        excluded_parameters: list[str] = Field(default_factory=list)

    plugin_class = plugins.SynapticIntelligencePlugin
    on_cpu = True

    def after_update(self, ctx: StepContext) -> None:
        """The plug-in reads every gradient; a parameter that the loss did not reach has one of 0."""
        for parameter in ctx.model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        super().after_update(ctx)


class MAS(PluginMethod):
    """Memory Aware Synapses (Aljundi et al. 2018): importance from the gradient of the logits' squared length."""

    class Config(Section):
        """alpha: share of old importances that is kept."""

        lambda_reg: float = Field(1.0, ge=0)
        alpha: float = Field(0.5, ge=0, le=1)

    plugin_class = plugins.MASPlugin
    plain_base = True


class RWalk(PluginMethod):
    """Riemannian Walk (Chaudhry et al. 2018). A second forward and backward pass in every iteration."""

    class Config(Section):
        """delta_t: iterations between updates of the scores; no step may be shorter."""

        ewc_lambda: float = Field(0.1, ge=0)
        ewc_alpha: float = Field(0.9, ge=0, le=1)
        delta_t: int = Field(10, ge=1)

    plugin_class = plugins.RWalkPlugin

    def end_step(self, ctx: StepContext) -> None:
        """Raises ConfigError where no score was made, of which the plug-in would divide by the largest."""
        if ctx.iteration < self.config.delta_t:
            raise ConfigError(
                f"avalanche:RWalk makes scores every method.delta_t = {self.config.delta_t} iterations, and step "
                f"{ctx.step.index} had {ctx.iteration}. Set method.delta_t to at most that."
            )
        super().end_step(ctx)


class LwF(PluginMethod):
    """Learning without Forgetting (Li & Hoiem 2016), as Avalanche computes it, on the old outputs of every pixel.

    The plug-in takes one row of logits per sample, a copy of its own of the old model, and the classes from the
    data set's targets. Here a pixel is a sample, the old model is the loop's, and old classes are the scenario's with
    background. `lwf` is the form that segmentation papers compare with.
    """

    class Config(Section):
        """alpha: weight of the distillation, a list: of each step. temperature: of both softmaxes."""

        alpha: float | list[float] = 1.0
        temperature: float = Field(2.0, gt=0)

    plugin_class = plugins.LwFPlugin
    uses_previous = True
    plain_base = True

    def start_step(self, ctx: StepContext) -> None:
        require_pixel_output(ctx.model, "avalanche:LwF")
        alpha = self.config.alpha
        if isinstance(alpha, list) and len(alpha) < len(ctx.scenario.steps):
            raise ConfigError(
                f"avalanche:LwF: method.alpha lists {len(alpha)} values, the scenario has {len(ctx.scenario.steps)} "
                f"steps. Give one number, or one per step."
            )

    def loss(self, ctx: StepContext, batch: Batch) -> dict[str, Tensor]:
        terms = ctx.model.loss(batch.output, batch.labels)
        old = batch.previous
        if old is None:
            return terms
        distilling = self.plugin.lwf
        distilling.prev_model = lambda images: rows(old.pixel_logits)
        distilling.prev_classes_by_task = {0: set(range(1 + len(ctx.step.old)))}
        distilling.expcount = ctx.step.index
        penalty = distilling(batch.images, rows(batch.output.pixel_logits), ctx.model)
        distilling.prev_model = None
        return terms | {"penalty": penalty}

    def end_step(self, ctx: StepContext) -> None:
        """The plug-in would copy the model, which the loop does."""

    def after_backward(self, ctx: StepContext) -> None:
        """No callback of the plug-in."""

    def after_update(self, ctx: StepContext) -> None:
        """No callback of the plug-in."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is none."""


def rows(logits: Tensor) -> Tensor:
    """(B, C, H, W) -> (B H W, C)."""
    return logits.movedim(1, -1).flatten(0, -2)


def method_class(member: str) -> type[Method]:
    """The method `avalanche:<member>`. Raises UnknownNameError, ConfigError where it is known not to work."""
    from cssbench.interop.avalanche.replay import Replay

    known: dict[str, type[Method]] = {cls.__name__: cls for cls in (EWC, SI, MAS, RWalk, LwF, Replay)}
    if member in known:
        return known[member]
    if member.removesuffix("Plugin") in REFUSED:
        raise ConfigError(
            f"avalanche:{member} cannot run on segmentation: it {REFUSED[member.removesuffix('Plugin')]}. "
            f"These can: {', '.join(f'avalanche:{name}' for name in known)}."
        )
    raise UnknownNameError("method", f"avalanche:{member}", [f"avalanche:{name}" for name in known])
