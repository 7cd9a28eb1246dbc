"""Training of one step: forward (and the previous model's), the method's loss, backward, one optimiser step.

Devices, processes and mixed precision are Lightning Fabric's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from cssbench.compiling import compiled
from cssbench.config import OptimConfig, TrainConfig
from cssbench.contract import check_groups, check_output, check_terms
from cssbench.engine import average_statistics, is_sharded, load_whole_state, mean_terms, sharded, touched, whole_state
from cssbench.errors import ConfigError, NonFiniteLossError
from cssbench.losses.mask import masks_counted_over_processes
from cssbench.method import Batch, Method, StepContext
from cssbench.models.segmenter import Segmenter
from cssbench.sync_batchnorm import synchronised

if TYPE_CHECKING:
    from cssbench.step_checkpoint import StepCheckpoints


SPREAD = 0x9E3779B97F4A7C15  # odd, so that no two passes have the same seed


def pass_seed(seed: int, number: int) -> int:
    """What is drawn in a forward pass is drawn with this, by its number in the step over all processes."""
    return (seed + number * SPREAD) % 2**63


def use_fused(optim: OptimConfig, train: TrainConfig) -> bool:
    """`optim.fused`, decided. Raises ConfigError where it is asked for with clipping in float16: a fused step takes the
    loss scale out by itself, too late to clip."""
    unscales = train.precision == "16-mixed" and optim.clip is not None
    if optim.fused and unscales:
        raise ConfigError(
            "optim.fused = true cannot clip gradients with train.precision = '16-mixed'. Leave optim.fused out, set "
            "optim.clip = 'none', or train.precision = 'bf16-mixed'."
        )
    return not unscales if optim.fused is None else optim.fused


def make_optimizer(
    config: OptimConfig, groups: list[dict[str, Any]], step: int, fused: bool = False
) -> torch.optim.Optimizer:
    """AdamW or Nesterov SGD; every group keeps its base rate as "base_lr"."""
    rate = config.lr if step == 0 or config.later_lr is None else config.later_lr
    ready = []
    for group in groups:
        lr = rate * group.get("lr_scale", 1.0) * (config.head_lr_scale if group.get("head") else 1.0)
        decay = group.get("weight_decay", config.weight_decay)
        ready.append({"params": group["params"], "lr": lr, "base_lr": lr, "weight_decay": decay})
    if config.name == "sgd":
        nesterov = config.momentum > 0
        return torch.optim.SGD(ready, momentum=config.momentum, nesterov=nesterov, fused=fused or None)
    return torch.optim.AdamW(ready, betas=config.betas, fused=fused or None)


def rate_at(config: OptimConfig, base: float, iteration: int, total: int) -> float:
    """Poly schedule with linear warm-up: [(base - min) (1 - i/T)^p + min] * [1 - (1 - i/W)(1 - r)] for i < W."""
    lr = (base - config.min_lr) * (1 - iteration / total) ** config.power + config.min_lr
    if iteration < config.warmup:
        lr *= 1 - (1 - iteration / config.warmup) * (1 - config.warmup_ratio)
    return lr


@dataclass
class Training:
    """What changes while a step trains. tail: the loss terms of the last tenth."""

    fabric: Fabric
    ctx: StepContext
    method: Method
    optimizer: torch.optim.Optimizer
    tail: dict[str, list[Tensor]] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """All of it as data, on the first process. Every process calls it."""
        mine = rng_state(self.fabric.device)
        model, optimizer = whole_state(self.ctx.model, self.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "precision": self.fabric.strategy.precision.state_dict(),
            "method": self.method.state_dict(),
            "tail": self.tail,
            "rng": [self.fabric.broadcast(mine, rank) for rank in range(self.fabric.world_size)],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """After the method's `start_step`, which makes what is in no state. With another number of processes random
        numbers go on as they are."""
        load_whole_state(self.ctx.model, self.optimizer, state["model"], state["optimizer"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        self.method.load_state_dict(state["method"])
        self.tail = {name: [v.to(self.fabric.device) for v in values] for name, values in state["tail"].items()}
        if len(state["rng"]) == self.fabric.world_size:
            set_rng_state(state["rng"][self.fabric.global_rank], self.fabric.device)


def rng_state(device: torch.device) -> dict[str, Any]:
    """The global random generators of this process, as data: torch's of the CPU and of `device`, numpy's, Python's."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    found = {
        "torch": torch.get_rng_state(),
        "numpy": [str(kind), torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],  # type: ignore
        "python": random.getstate(),
    }
    return found | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Undo of `rng_state`; a generator that is not in `state` stays as it is."""
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def fit(
    fabric: Fabric,
    ctx: StepContext,
    method: Method,
    batches: Iterable[dict[str, Any]],
    optim: OptimConfig,
    train: TrainConfig,
    iterations: int,
    on_iteration: Callable[[], None] = lambda: None,
    checkpoints: StepCheckpoints | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Train one step for `iterations` optimiser steps; returns the means of the loss terms over the last tenth.

    seed: what is drawn in a forward pass (dropout and its like) depends on it and on the number of the pass alone, not
    on which process makes it.
    batches: an endless or long enough stream of micro-batches, `train.accumulate` of them per optimiser step, from the
    iteration on with which `checkpoints` go on.
    Raises Interrupted after a signal to stop; NonFiniteLossError, naming the images of the batch; PluginError where the
    method breaks its interface.
    """
    with ExitStack() as stack:
        stack.enter_context(sharded(fabric, ctx, train))
        models = [ctx.model, ctx.previous if method.uses_previous else None]
        stack.enter_context(channels_last(models, train.channels_last))
        stack.enter_context(compiled(models, train.compile))
        stack.enter_context(masks_counted_over_processes(train.mask_count == "processes" and fabric.world_size > 1))
        stack.enter_context(synchronised(ctx.model, train.sync_batchnorm and fabric.world_size > 1))
        loss = _fit(fabric, ctx, method, batches, optim, train, iterations, on_iteration, checkpoints, seed)
        average_statistics(fabric, ctx.model)
        return loss


def _fit(
    fabric: Fabric,
    ctx: StepContext,
    method: Method,
    batches: Iterable[dict[str, Any]],
    optim: OptimConfig,
    train: TrainConfig,
    iterations: int,
    on_iteration: Callable[[], None],
    checkpoints: StepCheckpoints | None,
    seed: int,
) -> dict[str, float]:
    groups, fused = check_groups(method, method.param_groups(ctx)), use_fused(optim, train)
    training = Training(fabric, ctx, method, make_optimizer(optim, groups, ctx.step.index, fused))
    module, optimizer = fabric.setup(LossPass(fabric, ctx, method, train), training.optimizer)
    ctx.model.train()
    accumulates = not is_sharded(ctx.model)  # sharded gradients are added up as shares, pass by pass
    stream = iter(batches)
    for iteration in range(checkpoints.restore(training) if checkpoints else 0, iterations):
        ctx.iteration = iteration
        for group in training.optimizer.param_groups:
            group["lr"] = rate_at(optim, group["base_lr"], iteration, iterations)
        terms, checks = _passes(training, module, accumulates, stream, train, seed)
        for check in checks:
            check.answer(ctx, method)
        method.after_backward(ctx)
        if optim.clip is not None:
            fabric.clip_gradients(module, optimizer, max_norm=optim.clip, error_if_nonfinite=False)
        optimizer.step()
        method.after_update(ctx)
        optimizer.zero_grad(set_to_none=True)
        at_end = iteration >= iterations - max(1, iterations // 10)
        logged = iteration % train.log_every == 0 or iteration == iterations - 1
        if at_end or logged:
            terms = mean_terms(fabric, terms)
        if at_end:
            for name, value in terms.items():
                training.tail.setdefault(name, []).append(value)
        if logged:
            _log(ctx, terms, training.optimizer.param_groups[0]["lr"])
        on_iteration()
        if checkpoints:
            checkpoints.after(iteration + 1, iterations, training)
    ctx.iteration = iterations
    if checkpoints:
        checkpoints.end(iterations, training)
    return {name: float(torch.stack(values).mean()) for name, values in training.tail.items()}


def _passes(
    training: Training,
    module: Any,
    accumulates: bool,
    stream: Iterator[dict[str, Any]],
    train: TrainConfig,
    seed: int,
) -> tuple[dict[str, Tensor], list[FiniteCheck]]:
    """The forward and backward passes of one optimiser step: means of the loss terms, and whether they are finite.

    accumulates: gradients are exchanged once, after the last pass.
    """
    fabric, iteration = training.fabric, training.ctx.iteration
    terms: dict[str, Tensor] = {}
    checks = []
    for micro in range(train.accumulate):
        with fabric.no_backward_sync(module, enabled=accumulates and micro < train.accumulate - 1):
            loaded = next(stream)
            turn = (iteration * train.accumulate + micro) * fabric.world_size + fabric.global_rank
            torch.manual_seed(pass_seed(seed, turn))
            found = forward(fabric, module, loaded, train)
            total = torch.stack(list(found.values())).sum() / train.accumulate
            checks.append(FiniteCheck(total, found, loaded["names"]))
            fabric.backward(total)
        for name, value in found.items():  # a pass may lack a term that another has
            terms[name] = terms.get(name, 0) + value.detach() / train.accumulate
    return terms, checks


def _log(ctx: StepContext, terms: dict[str, Tensor], rate: float) -> None:
    """The terms, fetched from the device at once, and the rate."""
    for name, value in zip(terms, torch.stack(list(terms.values())).tolist(), strict=True):
        ctx.log(name, value)
    ctx.log("lr", rate)


@contextmanager
def channels_last(models: list[Segmenter | None], enabled: bool) -> Iterator[None]:
    """Inside, weights of convolutions have their channels innermost in memory; their values are the same."""
    kept = [model for model in models if model is not None and enabled]
    for model in kept:
        model.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for model in kept:
            model.to(memory_format=torch.contiguous_format)


class FiniteCheck:
    """Is a loss finite? Asked when it is made, answered before the optimiser's step: a GPU is not kept waiting between
    the forward and the backward pass."""

    def __init__(self, total: Tensor, terms: dict[str, Tensor], names: list[str]):
        self.terms, self.names = terms, names
        self.finite = total.detach().isfinite().to("cpu", non_blocking=True)
        self.copied = torch.cuda.Event() if total.is_cuda else None
        if self.copied:
            self.copied.record()

    def answer(self, ctx: StepContext, method: Method) -> None:
        """Raises NonFiniteLossError, naming terms and images."""
        if self.copied:
            self.copied.synchronize()
        if not self.finite:
            values = ", ".join(f"{key} = {float(value.detach()):g}" for key, value in self.terms.items())
            raise NonFiniteLossError(
                f"The loss of {type(method).__name__} is not finite at step {ctx.step.index} ({values}). The batch "
                f"held the images {', '.join(self.names)}. Lower optim.lr, set optim.clip, or look at these images."
            )


def forward(fabric: Fabric, module: Any, loaded: dict[str, Any], train: TrainConfig) -> dict[str, Tensor]:
    """One pass of `module`, a `LossPass` as Fabric set it up: the method's loss terms."""
    images = loaded["images"]  # or, from `frozen.EncodedBatches`, on the device already, what the encoder made of them
    if isinstance(images, Tensor):
        layout = torch.channels_last if train.channels_last else torch.preserve_format
        images = images.to(fabric.device, non_blocking=True, memory_format=layout)
    return module(images, loaded["labels"].to(fabric.device, non_blocking=True), list(loaded["names"]))


class LossPass(nn.Module):
    """The model's forward pass (and the previous model's, without gradients) and the method's loss terms, as one
    module: what DDP wraps then ends in the loss, and shows which parameters get a gradient.

    The previous model runs under `no_grad`, in the eval mode that `freeze_copy` gave it. Not under `inference_mode`: a
    loss such as (new * old).sum() saves `old` for its backward pass, which torch refuses for an inference tensor.
    """

    def __init__(self, fabric: Fabric, ctx: StepContext, method: Method, train: TrainConfig):
        super().__init__()
        self.fabric, self.ctx, self.method = fabric, ctx, method
        self.teacher_half = train.teacher_precision == "bf16"
        self.model = ctx.model
        self.is_sharded = is_sharded(ctx.model)
        self.idle = nn.Parameter(torch.zeros(1))  # without one that gets no gradient, DDP warns that it looked for any

    def forward(self, images: Any, labels: Tensor, names: list[str]) -> dict[str, Tensor]:
        """Called under Fabric's autocast, out of which the loss is taken."""
        ctx, method, kind = self.ctx, self.method, self.fabric.device.type
        previous = None
        if ctx.previous is not None and method.uses_previous:
            half = torch.autocast(kind, torch.bfloat16)
            with torch.no_grad(), half if self.teacher_half else nullcontext():
                previous = ctx.previous(images)
        with torch.autocast(kind, enabled=False):
            inputs = self.model.training_inputs(labels)
        output = check_output(self.model, self.model(images, **inputs))
        output = self.fabric.strategy.precision.convert_output(output)
        seen = images if isinstance(images, Tensor) else None
        with torch.autocast(kind, enabled=False):
            terms = check_terms(method, method.loss(ctx, Batch(seen, labels, output, previous, names)))
            return {name: term + touched(self.model) for name, term in terms.items()} if self.is_sharded else terms
