"""A linear model of a few pixels and the training of one of its steps, for tests of the trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cssbench.config import OptimConfig, TrainConfig
from cssbench.engine import make_fabric
from cssbench.method import Batch, Method, StepContext
from cssbench.models.segmenter import Segmenter, SegOutput
from cssbench.scenario import Step, from_dict
from cssbench.trainer import fit

torch.set_num_threads(1)
SCENE = from_dict("toy", {"dataset": "toy", "classes": 3, "base": 2, "increment": 1})


@dataclass
class LinearOutput(SegOutput):
    ready: Tensor | None = None

    @cached_property
    def scores(self) -> Tensor:
        assert self.ready is not None
        return self.ready


class Shift(nn.Module):
    """An embedding: no weight decay by its name, not by its number of dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(4, 1, 1))


class Linear(Segmenter):
    """Per pixel: a linear encoder, a linear head per step."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.shift = Shift()
        self.seen_types: list[torch.dtype] = []
        self.modes: list[tuple[bool, bool]] = []  # of each forward pass: training, gradients

    def grow(self, step: Step) -> None:
        self.heads.append(nn.Conv2d(4, len(step.new) + (step.index == 0), 1))

    def forward(self, images: Tensor) -> LinearOutput:
        hidden = self.first(images)
        self.seen_types.append(hidden.dtype)
        self.modes.append((self.training, torch.is_grad_enabled()))
        hidden = hidden.relu() + self.shift.offset
        ready = torch.cat([head(hidden) for head in self.heads], dim=1)
        return LinearOutput((images.shape[-2], images.shape[-1]), [hidden], ready)

    def loss(self, output: LinearOutput, labels: Tensor) -> dict[str, Tensor]:
        return {"ce": F.cross_entropy(output.scores, labels, ignore_index=255)}

    def no_decay_names(self) -> set[str]:
        return {"shift.offset"}


class Plain(Method):
    def loss(self, ctx: StepContext, batch: Batch) -> dict[str, Tensor]:
        return ctx.model.loss(batch.output, batch.labels)


def model_of(step: int) -> Linear:
    torch.manual_seed(0)
    model = Linear()
    for grown in SCENE.steps[: step + 1]:
        model.grow(grown)
    return model


def context(
    step: int = 0, previous: Segmenter | None = None, log: Callable[..., None] = lambda *_: None
) -> StepContext:
    return StepContext(
        scenario=SCENE,
        step=SCENE.steps[step],
        model=model_of(step),
        previous=previous,
        train_loader=[],
        holdout_loader=None,
        device=torch.device("cpu"),
        images=(8,),
        class_images={1: 4, 2: 4},
        log=log,
    )


def images_of(number: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(8, 3, 5, 4, generator=generator)
    labels = torch.randint(0, 3, (8, 5, 4), generator=generator)
    return {"images": images, "labels": labels, "names": [f"image-{number}-{i}" for i in range(8)]}


def split(batch: dict[str, Any], parts: int) -> list[dict[str, Any]]:
    size = 8 // parts
    return [{key: value[i : i + size] for key, value in batch.items()} for i in range(0, 8, size)]


def train(
    ctx: StepContext,
    method: Method | None = None,
    batches: list[dict[str, Any]] | None = None,
    iterations: int = 3,
    optim: dict[str, Any] | None = None,
    **changes: Any,
) -> dict[str, float]:
    config = TrainConfig(**{"iterations": iterations, "batch_size": 8, "accelerator": "cpu"} | changes)
    if batches is None:
        batches = [part for i in range(iterations) for part in split(images_of(i), config.accumulate)]
    settings = OptimConfig(**{"lr": 0.1, "name": "sgd", "momentum": 0.0, "weight_decay": 0.0} | (optim or {}))
    return fit(make_fabric(config), ctx, method or Plain(), batches, settings, config, iterations)


def weights(ctx: StepContext) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in ctx.model.state_dict().items()}
