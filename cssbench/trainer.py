"""Training of one step: forward (and the previous model's), the method's loss, backward, one optimiser step.

Devices, processes and mixed precision are Lightning Fabric's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from cssbench.config import OptimConfig, TrainConfig
from cssbench.contract import check_groups, check_output, check_terms
from cssbench.errors import ConfigError, NonFiniteLossError
from cssbench.method import Batch, Method, StepContext


def make_fabric(config: TrainConfig) -> Fabric:
    """Fabric for the recipe's accelerator, number of devices and precision; under torchrun it joins the others."""
    fabric = Fabric(accelerator=config.accelerator, devices=config.devices, precision=config.precision)
    fabric.launch()
    return fabric


def micro_batch(config: TrainConfig, world: int) -> int:
    """Images per forward pass and process, so that the effective batch is `batch_size` whatever `world`.

    Raises ConfigError when it does not divide.
    """
    parts = config.accumulate * world
    if config.batch_size % parts:
        raise ConfigError(
            f"train.batch_size {config.batch_size} does not divide by {config.accumulate} accumulated passes x {world} "
            f"processes. Choose a multiple of {parts}."
        )
    return config.batch_size // parts


def make_optimizer(config: OptimConfig, groups: list[dict[str, Any]], step: int) -> torch.optim.Optimizer:
    """AdamW or Nesterov SGD; every group keeps its base rate as "base_lr"."""
    rate = config.lr if step == 0 or config.later_lr is None else config.later_lr
    ready = []
    for group in groups:
        lr = rate * group.get("lr_scale", 1.0) * (config.head_lr_scale if group.get("head") else 1.0)
        decay = group.get("weight_decay", config.weight_decay)
        ready.append({"params": group["params"], "lr": lr, "base_lr": lr, "weight_decay": decay})
    if config.name == "sgd":
        return torch.optim.SGD(ready, momentum=config.momentum, nesterov=config.momentum > 0)
    return torch.optim.AdamW(ready, betas=config.betas)


def rate_at(config: OptimConfig, base: float, iteration: int, total: int) -> float:
    """Poly schedule with linear warm-up: [(base - min) (1 - i/T)^p + min] * [1 - (1 - i/W)(1 - r)] for i < W."""
    lr = (base - config.min_lr) * (1 - iteration / total) ** config.power + config.min_lr
    if iteration < config.warmup:
        lr *= 1 - (1 - iteration / config.warmup) * (1 - config.warmup_ratio)
    return lr


def fit(
    fabric: Fabric,
    ctx: StepContext,
    method: Method,
    batches: Iterable[dict[str, Any]],
    optim: OptimConfig,
    train: TrainConfig,
    iterations: int,
    on_iteration: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Train one step for `iterations` optimiser steps; returns the means of the loss terms over the last tenth.

    batches: an endless or long enough stream of micro-batches, `train.accumulate` of them per optimiser step.
    Raises NonFiniteLossError, naming the images of the batch; PluginError where the method breaks its interface.
    """
    optimizer = make_optimizer(optim, check_groups(method, method.param_groups(ctx)), ctx.step.index)
    module, optimizer = fabric.setup(ctx.model, optimizer)
    ctx.model.train()
    stream = iter(batches)
    tail: dict[str, list[Tensor]] = {}
    for iteration in range(iterations):
        ctx.iteration = iteration
        for group in optimizer.param_groups:
            group["lr"] = rate_at(optim, group["base_lr"], iteration, iterations)
        terms: dict[str, Tensor] = {}
        for micro in range(train.accumulate):
            with fabric.no_backward_sync(module, enabled=micro < train.accumulate - 1):
                found = forward(fabric, ctx, module, method, next(stream))
                fabric.backward(torch.stack(list(found.values())).sum() / train.accumulate)
            for name, value in found.items():  # a pass may lack a term that another has
                terms[name] = terms.get(name, 0) + value.detach() / train.accumulate
        if optim.clip is not None:
            fabric.clip_gradients(module, optimizer, max_norm=optim.clip, error_if_nonfinite=False)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if iteration >= iterations - max(1, iterations // 10):
            for name, value in terms.items():
                tail.setdefault(name, []).append(value)
        if iteration % train.log_every == 0 or iteration == iterations - 1:
            _log(ctx, terms | {"lr": optimizer.param_groups[0]["lr"]})
        on_iteration()
    ctx.iteration = iterations
    return {name: float(torch.stack(values).mean()) for name, values in tail.items()}


def _log(ctx: StepContext, values: dict[str, Any]) -> None:
    for name, value in values.items():
        ctx.log(name, float(value))


def forward(fabric: Fabric, ctx: StepContext, module: Any, method: Method, loaded: dict[str, Any]) -> dict[str, Tensor]:
    """One forward pass (and the previous model's, without gradients): the method's loss terms, checked.

    The previous model runs under `no_grad`, in the eval mode that `freeze_copy` gave it. Not under `inference_mode`: a
    loss such as (new * old).sum() saves `old` for its backward pass, which torch refuses for an inference tensor.
    """
    images = loaded["images"]  # or, from `frozen.EncodedBatches`, on the device already, what the encoder made of them
    if isinstance(images, Tensor):
        images = images.to(fabric.device, non_blocking=True)
    labels = loaded["labels"].to(fabric.device, non_blocking=True)
    previous = None
    if ctx.previous is not None and method.uses_previous:
        with torch.no_grad(), fabric.autocast():
            previous = ctx.previous(images)
    output = check_output(ctx.model, module(images, **ctx.model.training_inputs(labels)))
    seen = images if isinstance(images, Tensor) else None
    terms = check_terms(method, method.loss(ctx, Batch(seen, labels, output, previous, list(loaded["names"]))))
    if not torch.isfinite(sum(terms.values())):  # type: ignore[arg-type]
        values = ", ".join(f"{key} = {float(value.detach()):g}" for key, value in terms.items())
        raise NonFiniteLossError(
            f"The loss of {type(method).__name__} is not finite at step {ctx.step.index} ({values}). The batch held "
            f"the images {', '.join(loaded['names'])}. Lower optim.lr, set optim.clip, or look at these images."
        )
    return terms
