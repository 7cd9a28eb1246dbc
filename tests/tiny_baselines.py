"""One step of a baseline on two tiny scenes: models, labels, and the context after `start_step`."""

from __future__ import annotations

from typing import Any

import torch

from cssbench import registry
from cssbench.api import Batch, Method, Segmenter, StepContext
from cssbench.models.segmenter import freeze_copy
from cssbench.scenario import IGNORE, Scenario

BACKBONE = {"name": "vit_tiny_patch16_224", "image_size": 32, "patch": 8, "width": 32, "depth": 2, "heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "vit-linear": {"backbone": BACKBONE | {"layers": [1, 2], "drop_path": 0.0}},
    "deeplabv3": {"backbone": {"name": "resnet10t"}, "width": 16, "dilations": [1, 2]},
    "segvit": {
        "backbone": BACKBONE | {"layers": [1, 2], "drop_path": 0.0},
        "head": {"width": 16, "heads": 2, "layers": 1, "init_std": 0.1},
    },
}
SCENARIO = Scenario("tiny", "synthetic", ((1, 2, 3), (4, 5)))


def make_method(name: str, **options: Any) -> Method:
    cls = registry.load("methods", name)
    return cls(cls.Config(**options))


def make_model(name: str = "vit-linear", **options: Any) -> Segmenter:
    torch.manual_seed(0)
    cls = registry.load("models", name)
    model = cls(cls.Config(**MODELS[name], **options))
    model.grow(SCENARIO.steps[0])
    return model


def scenes(labels: torch.Tensor, seed: int = 0) -> dict[str, Any]:
    images = torch.randn(len(labels), 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return {"images": images, "labels": labels, "names": ["scene"] * len(labels)}


def mixed(seed: int = 0) -> torch.Tensor:
    """(2, 32, 32) labels of step 1: background left, class 4 in the middle, class 5 right, an ignored corner."""
    labels = torch.zeros(2, 32, 32, dtype=torch.int64)
    labels[:, :, 12:20], labels[:, :, 20:], labels[:, :4, :4] = 4, 5, IGNORE
    return labels.roll(seed, 2)


def context(step: int, model: Segmenter, previous: Segmenter | None, loader: list[dict[str, Any]]) -> StepContext:
    return StepContext(
        scenario=SCENARIO,
        step=SCENARIO.steps[step],
        model=model,
        previous=previous,
        train_loader=loader,
        holdout_loader=None,
        device=torch.device("cpu"),
        images=(4,) * (step + 1),
        class_images={},
        log=lambda name, value: None,
    )


def second_step(method: Method, model_name: str = "vit-linear", **options: Any) -> StepContext:
    """The context of step 1 after `start_step`; step 0 ended without training."""
    model = make_model(model_name, **options)
    method.start_step(first := context(0, model, None, [scenes(mixed() % 4)]))
    method.end_step(first)
    previous = freeze_copy(model)
    model.grow(SCENARIO.steps[1])
    ctx = context(1, model, previous, [scenes(mixed()), scenes(mixed(3), 1)])
    method.start_step(ctx)
    model.eval()  # no dropout: the tests compare
    return ctx


def batch_of(ctx: StepContext, labels: torch.Tensor, half: bool = False) -> Batch:
    images = scenes(labels)["images"]
    assert ctx.previous is not None
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        with torch.no_grad():
            previous = ctx.previous(images)
        return Batch(images, labels, ctx.model(images), previous)


LABELS = {
    "mixed": mixed(),
    "nothing but ignored": torch.full((2, 32, 32), IGNORE),
    "nothing but background": torch.zeros(2, 32, 32, dtype=torch.int64),
    "one new class": torch.full((2, 32, 32), 4),
}
