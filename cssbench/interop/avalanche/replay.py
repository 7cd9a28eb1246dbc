"""`avalanche:Replay`: images of finished steps, picked and kept by Avalanche's storage policies, learned from again."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from avalanche.training import plugins
from avalanche.training.storage_policy import ExperienceBalancedBuffer, ReservoirSamplingBuffer
from pydantic import Field, PositiveInt
from torch import Tensor

from cssbench.config import Section
from cssbench.data.transforms import TrainTransform
from cssbench.interop.avalanche.benchmark import from_items
from cssbench.interop.avalanche.methods import PluginMethod, StrategyView, step_data
from cssbench.interop.views import Scenes
from cssbench.method import Batch, StepContext


class Replay(PluginMethod):
    """Experience replay: each batch is joined by images of the memory, with the labels that their step's learner saw.

    The mean loss over both is taken, as if they were one batch. Deviations from Avalanche's loop: memory images go
    through a forward pass of their own, in full precision; which of them come is drawn anew for every pass, not in
    epochs. The memory keeps images as stored, so that they are augmented anew; tables declare its size.
    """

    class Config(Section):
        """mem_size: images of all finished steps together. batch_size_mem: of them in each pass; None: as many as of
        the step. storage: "experience", equal shares for the steps; "reservoir", every image with the same chance."""

        mem_size: PositiveInt = 200
        batch_size_mem: PositiveInt | None = None
        storage: Literal["experience", "reservoir"] = Field("experience", description="a storage policy of Avalanche")

    plugin_class = plugins.ReplayPlugin
    plain_base = True

    def __init__(self, config: Any = None):
        super().__init__(config)
        self.memory: int = self.config.mem_size
        self.parts: list[Scenes] = []  # what each of `buffers` holds
        self.transform: TrainTransform | None = None  # within a step
        self.passes = 0  # forward passes of this iteration so far

    def make_plugin(self) -> Any:
        size = self.config.mem_size
        kind: Any = ExperienceBalancedBuffer if self.config.storage == "experience" else ReservoirSamplingBuffer
        return self.plugin_class(mem_size=size, storage_policy=kind(size))

    @property
    def buffers(self) -> list[Any]:
        """The reservoirs: one per finished step, or one for all."""
        policy = self.plugin.storage_policy
        return list(policy.buffer_groups.values()) if self.config.storage == "experience" else [policy]

    def start_step(self, ctx: StepContext) -> None:
        """The plug-in's `before_training_exp` would make a loader of step and memory; batches come from the loop."""
        self.strategy = StrategyView(ctx)
        self.transform = step_data(ctx).transform

    def loss(self, ctx: StepContext, batch: Batch) -> dict[str, Tensor]:
        terms = ctx.model.loss(batch.output, batch.labels)
        if not any(map(len, self.parts)):
            return terms
        images, labels = self._draw(ctx, self.config.batch_size_mem or len(batch.labels))
        again = ctx.model.loss(ctx.model(images, **ctx.model.training_inputs(labels)), labels)
        share = len(batch.labels) / (len(batch.labels) + len(labels))
        own = {name: share * term for name, term in terms.items()}
        return own | {f"memory_{name}": (1 - share) * term for name, term in again.items()}

    def _draw(self, ctx: StepContext, count: int) -> tuple[Tensor, Tensor]:
        """(count, 3, S, S) and (count, S, S): what comes depends on step, iteration and pass alone."""
        assert self.strategy is not None, "start_step comes first"
        assert self.transform is not None
        self.passes = self.passes + 1 if self.strategy.iteration == ctx.iteration else 0
        self.strategy.iteration = ctx.iteration
        rng = np.random.default_rng([ctx.step.index, ctx.iteration, self.passes])
        scenes = [(part, index) for part in self.parts for index in range(len(part))]
        picked = rng.choice(len(scenes), count, replace=count > len(scenes))
        items = [part.draw(index, self.transform, rng) for part, index in (scenes[i] for i in picked)]
        images, labels = (torch.stack([item[k] for item in items]).to(ctx.device) for k in (0, 1))
        return images, labels

    def after_backward(self, ctx: StepContext) -> None:
        """No callback of the plug-in."""

    def after_update(self, ctx: StepContext) -> None:
        """No callback of the plug-in."""

    def end_step(self, ctx: StepContext) -> None:
        """The storage policy picks from the step's images and the memory; those are then kept themselves, and the
        step's data set is let go."""
        assert self.strategy is not None
        self.plugin.storage_policy.post_adapt(self.strategy, self.strategy.experience)  # the plug-in calls it so
        view, first = self.strategy.view, sum(ctx.images[: ctx.step.index])
        known = {n: part[i][:2] for part in self.parts for i, n in enumerate(part.numbers)}
        self.parts = []
        for buffer in self.buffers:
            numbers = [int(n) for n in getattr(buffer.buffer, "scene", ())]
            found = [known[n] if n in known else view.scene(n - first) for n in numbers]
            self._fill(buffer, [image for image, _ in found], [label for _, label in found], numbers)
        self.strategy = self.transform = None

    def _fill(self, buffer: Any, images: list[Tensor], labels: list[Tensor], numbers: list[int]) -> None:
        self.parts.append(Scenes(images, labels, numbers))
        if numbers:
            buffer.buffer = from_items(self.parts[-1], numbers)

    def state_dict(self) -> dict[str, Any]:
        return {
            "images": [image for part in self.parts for image in part.images],
            "labels": [label for part in self.parts for label in part.labels],
            "numbers": [part.numbers for part in self.parts],
            "sizes": [buffer.max_size for buffer in self.buffers] if self.parts else [],
            "weights": [buffer._buffer_weights for buffer in self.buffers] if self.parts else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.plugin, self.parts = self.make_plugin(), []
        policy = self.plugin.storage_policy
        if self.config.storage == "experience":
            policy.buffer_groups = {t: ReservoirSamplingBuffer(size) for t, size in enumerate(state["sizes"])}
            policy._num_exps = len(state["sizes"])
        start = 0
        for buffer, numbers, weights in zip(self.buffers, state["numbers"], state["weights"], strict=False):
            stop = start + len(numbers)
            self._fill(buffer, state["images"][start:stop], state["labels"][start:stop], list(numbers))
            buffer._buffer_weights, start = weights, stop
