"""What the trainer costs over a bare loop: checks, logging, schedule, hooks, Fabric. Command:

    python bench/loop.py [--device cuda]

Both train SegViT on ViT-S (224 px, batch 2; on a GPU ViT-B, 512 px, batch 4, bf16) for as many iterations on batches in
memory: zero the gradient, forward, the model's loss, backward, step.
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
from speed import compare, main
from torch import Tensor

from cssbench.baselines.finetune import FineTune
from cssbench.config import OptimConfig, TrainConfig
from cssbench.logs import StepLog
from cssbench.method import StepContext
from cssbench.models.segmenter import Segmenter
from cssbench.profile import build_model, cut_steps
from cssbench.scenario import from_dict
from cssbench.trainer import fit, make_fabric, make_optimizer, use_fused

OPTIM = OptimConfig(lr=1e-5)


def bare(model: Segmenter, batches: list[dict[str, Any]], train: TrainConfig, device: str) -> None:
    optimizer = make_optimizer(OPTIM, model.param_groups(), 0, use_fused(OPTIM, train, torch.device(device)))
    model.train()
    for loaded in batches:
        images, labels = (loaded[name].to(device, non_blocking=True) for name in ("images", "labels"))
        with torch.autocast(device, torch.bfloat16, enabled=train.precision == "bf16-mixed"):
            terms: dict[str, Tensor] = model.loss(model(images), labels)
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def full(model: Segmenter, batches: list[dict[str, Any]], train: TrainConfig, device: str, folder: Path) -> None:
    scenario = from_dict("joint", {"dataset": "none", "classes": 150, "base": 150})
    with StepLog(folder, 0) as log:
        ctx = StepContext(
            scenario, scenario.steps[0], model, None, [], None, torch.device(device), (len(batches),), {},
            lambda name, value: log(name, value, ctx.iteration),
        )  # fmt: skip
        fit(make_fabric(train), ctx, FineTune(), batches, OPTIM, train, len(batches))


def measure(device: str) -> Iterator[Row]:
    small = device == "cpu"
    size, side, batch, number = ("small", 224, 2, 4) if small else ("base", 512, 4, 30)
    options = {"backbone": {"name": f"vit_{size}_patch16_384", "image_size": side}}
    model = build_model("segvit", options, device)
    for step in cut_steps(None, 150):
        model.grow(step)
    precision = "32-true" if small else "bf16-mixed"
    settings = {"iterations": number, "batch_size": batch, "accelerator": device, "precision": precision}
    train = TrainConfig.model_validate(settings)
    labels = torch.randint(1, 151, (batch, side // 32, side // 32)).repeat_interleave(32, 1).repeat_interleave(32, 2)
    loaded = {"images": torch.randn(batch, 3, side, side), "labels": labels, "names": ["image"] * batch}
    with TemporaryDirectory() as folder:
        runs = (
            ("bare loop", partial(bare, copy.deepcopy(model), [loaded] * number, train, device)),
            ("cssbench.trainer.fit", partial(full, model, [loaded] * number, train, device, Path(folder))),
        )
        claim = f"{number} iterations of SegViT on ViT-{size[0].upper()} {side}, batch {batch}"
        yield compare(claim, "<= 1.03", *runs, device, repeats=7)


if __name__ == "__main__":
    main(__doc__, measure)
