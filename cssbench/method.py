"""The hook specification of a CSS method. No behaviour here beyond defaults; see `cssbench.api` for the one import.

Hooks, in order, at every step t (the model has already grown its head for the step's classes):

    start_step(ctx)  ->  param_groups(ctx)  ->  training  ->  end_step(ctx)

Training is, for each optimiser step: loss(ctx, batch), once per forward pass  ->  after_backward(ctx)  ->  the
optimiser's step  ->  after_update(ctx).

After `end_step` the loop saves `state_dict()`, freezes a copy of the model as `ctx.previous` of the next step, and
evaluates. A method never changes the model's structure: growth belongs to the loop, so that resume can replay it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cssbench.config import Section
from cssbench.scenario import Scenario, Step

if TYPE_CHECKING:
    from cssbench.models.segmenter import Segmenter, SegOutput


@dataclass
class Batch:
    """One forward pass. Labels are positions: 0 background, 255 ignored, else what the learner sees at this step."""

    images: Tensor | None  # (B, 3, H, W) float32, normalised for the model; None where stored features are learned from
    labels: Tensor  # (B, H, W) int64
    output: SegOutput
    previous: SegOutput | None = None  # of the model after the last step, no gradient; None at step 0
    names: list[str] = field(default_factory=list)


@dataclass
class StepContext:
    """What a method may know at one step."""

    scenario: Scenario
    step: Step
    model: Segmenter
    previous: Segmenter | None  # the model after the last step: frozen, eval mode; None at step 0
    train_loader: Iterable[dict[str, Any]]  # one augmented pass: {"images", "labels", "names"} on the CPU
    holdout_loader: Iterable[dict[str, Any]] | None  # the step's held-out images, unaugmented; None without holdout
    device: torch.device
    images: tuple[int, ...]  # number of training images of steps 0..t
    class_images: dict[int, int]  # position of each new class -> number of this step's images that show it
    log: Callable[[str, float], None]
    iteration: int = 0  # optimiser steps done in this step


class Method:
    """A continual method. Only `loss` is required.

    `Config` holds the hyper-parameters, the paper's values as defaults; unknown keys are refused. Writing
    `config: Config` below it tells type checkers what `self.config` is.
    `uses_previous = False` spares the forward pass through the previous model.
    `memory`: the most images (with or without labels) of finished steps that the method keeps, in its state; tables
    must say so. 0: it has only the step's own images, the benchmark's rule.
    `plain_base = True` promises that step 0 is plain training: there `loss` is the model's own loss, `param_groups` the
    default, nothing is kept from batch to batch, and `start_step` draws no random number and changes nothing. Then runs
    of such methods may share the trained base step (`cssbench run --shared`). `end_step` may do anything: each run
    calls it itself. A subclass does not inherit the promise.
    """

    class Config(Section):
        """No hyper-parameters."""

    uses_previous: bool = True
    memory: int = 0
    plain_base: bool = False

    def __init__(self, config: Any = None):
        self.config: Any = self.Config() if config is None else config

    def start_step(self, ctx: StepContext) -> None:
        """Before training: initialise the new head, freeze, pass over `ctx.train_loader`."""

    def param_groups(self, ctx: StepContext) -> list[dict[str, Any]]:
        """Optimiser groups: {"params": [...]} and, where wanted, "head": True (learn `optim.head_lr_scale` times
        faster), "lr_scale": float (times whatever the recipe says), "weight_decay": float (instead of the recipe's).

        Default: everything trainable, heads at the head rate, no decay on norms and biases of the encoder
        (`Segmenter.param_groups`).
        """
        return ctx.model.param_groups()

    def loss(self, ctx: StepContext, batch: Batch) -> dict[str, Tensor]:
        """Named scalar terms, already weighted; the trainer adds them up."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(ctx, batch)")

    def after_backward(self, ctx: StepContext) -> None:
        """Before an optimiser step: every trained parameter has its gradient, summed over the forward passes, not yet
        clipped, and times the loss scale where `train.precision` is "16-mixed"."""

    def after_update(self, ctx: StepContext) -> None:
        """After an optimiser step, before its gradients are dropped."""

    def end_step(self, ctx: StepContext) -> None:
        """After training, before the model is saved, copied and evaluated."""

    def state_dict(self) -> dict[str, Any]:
        """What the next step needs beside the model: tensors, numbers, strings, lists and dicts of them.

        Also asked for within a step, when a checkpoint is written: what `loss` changes belongs into it. What
        `start_step` makes need not: a step that is resumed begins with `start_step`, then loads the state.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
