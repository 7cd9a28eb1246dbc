"""What the trainer costs over a bare loop: checks, logging, schedule, hooks, Fabric. Command:

    python bench/loop.py [--device cuda]

Both train SegViT with 20 classes on ViT-S (224 px, batch 2; on a GPU ViT-B, 512 px, batch 4, bf16) for as many
iterations on batches in memory: forward, the model's loss, backward, step. A second row has a model of one convolution,
so that almost nothing is left but the overhead: its milliseconds divided by the iterations are one iteration's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rows import Row
from speed import Run, compare, main
from torch import Tensor, nn

from cssbench.baselines.finetune import FineTune
from cssbench.config import OptimConfig, TrainConfig
from cssbench.engine import make_fabric
from cssbench.logs import StepLog
from cssbench.losses.pixel import cross_entropy
from cssbench.method import StepContext
from cssbench.models.pixel import PixelOutput
from cssbench.models.segmenter import Segmenter, SegOutput
from cssbench.profile import build_model, cut_steps
from cssbench.scenario import Step, from_dict
from cssbench.trainer import fit, make_optimizer, use_fused

OPTIM, CLASSES = OptimConfig(lr=1e-5), 20


class Dot(Segmenter):
    """The least that can learn."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, CLASSES + 1, 1)

    def grow(self, step: Step) -> None: ...

    def forward(self, images: Tensor) -> SegOutput:  # type: ignore[override]
        return PixelOutput((images.shape[-2], images.shape[-1]), low=self.body(images))

    def loss(self, output: Any, labels: Tensor, *, weight: Tensor | None = None) -> dict[str, Tensor]:
        return {"ce": cross_entropy(output.low, labels, "valid")}


def bare(model: Segmenter, batches: list[dict[str, Any]], train: TrainConfig, device: str) -> None:
    optimizer = make_optimizer(OPTIM, model.param_groups(), 0, use_fused(OPTIM, train))
    model.train()
    for loaded in batches:
        images, labels = (loaded[name].to(device, non_blocking=True) for name in ("images", "labels"))
        with torch.autocast(device, torch.bfloat16, enabled=train.precision == "bf16-mixed"):
            terms: dict[str, Tensor] = model.loss(model(images), labels)
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def full(model: Segmenter, batches: list[dict[str, Any]], train: TrainConfig, device: str, folder: Path) -> None:
    scenario = from_dict("joint", {"dataset": "none", "classes": CLASSES, "base": CLASSES})
    with StepLog(folder, 0) as log:
        ctx = StepContext(
            scenario, scenario.steps[0], model, None, [], None, torch.device(device), (len(batches),), {},
            lambda name, value: log(name, value, ctx.iteration),
        )  # fmt: skip
        fit(make_fabric(train), ctx, FineTune(), batches, OPTIM, train, len(batches))


def both(model: Segmenter, side: int, batch: int, number: int, device: str, folder: Path) -> tuple[Run, Run]:
    precision = "32-true" if device == "cpu" else "bf16-mixed"
    settings = {"iterations": number, "batch_size": batch, "accelerator": device, "precision": precision}
    train = TrainConfig.model_validate(settings)
    labels = torch.randint(1, CLASSES + 1, (batch, side // 32, side // 32))
    labels = labels.repeat_interleave(32, 1).repeat_interleave(32, 2)
    loaded = {"images": torch.randn(batch, 3, side, side), "labels": labels, "names": ["image"] * batch}
    return (
        ("bare loop", partial(bare, copy.deepcopy(model), [loaded] * number, train, device)),
        ("cssbench.trainer.fit", partial(full, model, [loaded] * number, train, device, folder)),
    )


def measure(device: str) -> Iterator[Row]:
    small = device == "cpu"
    size, side, batch, number = ("small", 224, 2, 5) if small else ("base", 512, 4, 30)
    model = build_model("segvit", {"backbone": {"name": f"vit_{size}_patch16_384", "image_size": side}}, device)
    for step in cut_steps(None, CLASSES):
        model.grow(step)
    with TemporaryDirectory() as folder:
        runs = both(model, side, batch, number, device, Path(folder))
        claim = f"{number} iterations of SegViT on ViT-{size[0].upper()} {side}, batch {batch}"
        yield compare(claim, "<= 1.03", *runs, device)
        runs = both(Dot().to(device), 32, 1, 200, device, Path(folder))
        yield compare("200 iterations of a model of one convolution", "", *runs, device)


if __name__ == "__main__":
    main(__doc__, measure)
