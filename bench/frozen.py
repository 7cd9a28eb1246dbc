"""What an iteration costs after step 0, where the encoder is frozen: live, and from stored features. Command:

    python bench/frozen.py [--device cuda] [--csv FILE]

SegViT-CL with ViT-B/16 at 512 px, batch 2: a base-step iteration (encoder and a head of 100 classes learn) against an
iteration of step 1 (a head of 10 learns). All go through the trainer's own forward pass and the recipe's optimiser; the
one from stored features reads its files too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from speed import Row, compare, main
from torch import Tensor

from cssbench import registry
from cssbench.config import OptimConfig, TrainConfig
from cssbench.engine import make_fabric
from cssbench.features import FeatureStore, key_of
from cssbench.frozen import EncodedBatches
from cssbench.method import Method, StepContext
from cssbench.models.segmenter import Segmenter
from cssbench.profile import build_model, cut_steps
from cssbench.scenario import Scenario, Step
from cssbench.trainer import FiniteCheck, LossPass, forward, make_optimizer, use_fused

SIZE, BATCH = 512, 2
OPTIONS = {"backbone": {"name": "vit_base_patch16_384", "image_size": SIZE}}


@dataclass
class Learner:
    """A model at one step, and its iteration, in the trainer's parts and order."""

    fabric: Any
    ctx: StepContext
    method: Method
    module: Any
    optimizer: Any

    def iteration(self, batch: dict[str, Any]) -> None:
        total, check = self.forward(batch)
        self.fabric.backward(total)
        self.step(check)

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, FiniteCheck]:
        """The loss, and whether it is finite."""
        self.ctx.model.train()
        terms = forward(self.fabric, self.module, batch, TrainConfig(iterations=1))
        total = torch.stack(list(terms.values())).sum()
        return total, FiniteCheck(total, terms, batch["names"])

    def step(self, check: FiniteCheck) -> None:
        """The optimiser's."""
        check.answer(self.ctx, self.method)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def learner(fabric: Any, steps: tuple[Step, ...], number: int, options: dict[str, Any] | None = None) -> Learner:
    """SegViT-CL at step `number`. options: of the model; None: the ones above."""
    model: Segmenter = build_model("segvit", options or OPTIONS, "cpu")
    for step in steps[: number + 1]:
        model.grow(step)
    model.to(fabric.device)
    method = registry.load("methods", "segvit-cl")()
    groups = tuple(step.new for step in steps)
    ctx = StepContext(
        Scenario("bench", "none", groups=groups), steps[number], model, None, [], None, fabric.device, (2,), {}, print
    )
    method.start_step(ctx)
    train = TrainConfig(iterations=1)
    fused = use_fused(OptimConfig(), train)
    optimizer = make_optimizer(OptimConfig(), method.param_groups(ctx), number, fused)
    module, optimizer = fabric.setup(LossPass(fabric, ctx, method, train), optimizer)
    return Learner(fabric, ctx, method, module, optimizer)


def batch(step: Step) -> dict[str, Any]:
    """Two random images with patches of four of the step's classes."""
    labels = torch.zeros(BATCH, SIZE, SIZE, dtype=torch.int64)
    for number, position in enumerate(list(step.new_positions)[:4]):
        labels[:, 128 * number : 128 * number + 100, 50:300] = position
    images = torch.randn(BATCH, 3, SIZE, SIZE)
    return {"images": images, "labels": labels, "names": ["a", "b"]}


def from_files(made: Learner, live: dict[str, Any], folder: Path) -> Callable[[], None]:
    """An iteration that reads the features of `live` from files, as `frozen.training_batches` does."""
    store = FeatureStore(folder, "bench", 10.0)
    items = [
        {"images": image, "labels": label, "names": name, "key": key_of(name)}
        for image, label, name in zip(live["images"], live["labels"], live["names"], strict=True)
    ]

    def once(items: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        return iter(EncodedBatches([items], made.ctx.model, store, made.fabric, torch.bfloat16, BATCH))

    next(once([dict(item) for item in items]))  # encodes and writes

    def run() -> None:
        read = [
            {"features": store.read(item["key"]), "labels": item["labels"], "names": item["names"]} for item in items
        ]
        made.iteration(next(once(read)))

    return run


def measure(device: str) -> Iterator[Row]:
    fabric = make_fabric(TrainConfig(iterations=1, accelerator=device))  # type: ignore[arg-type]
    steps = cut_steps("100-10", 150)
    base, later = learner(fabric, steps, 0), learner(fabric, steps, 1)
    first, second = batch(steps[0]), batch(steps[1])
    full = "base step: encoder and head learn", lambda: base.iteration(first)
    what = "iteration of step 1, ViT-B/16 512, batch 2"
    yield compare(f"{what}: frozen encoder", "<= 0.37", full,
                  ("frozen encoder, run live", lambda: later.iteration(second)), device, repeats=5)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = from_files(later, second, Path(folder))
        yield compare(f"{what}: stored features", "<= 0.10", full, ("features read from files", run), device, repeats=5)


if __name__ == "__main__":
    main(__doc__, measure)
