"""`train.sync_batchnorm`: BatchNorm over the images of all processes, on any device.

torch's SyncBatchNorm is for GPUs alone, and takes the module's place; here modules keep their class, so that growth,
copies and checkpoints do not notice. Every process has as many values per channel, as the trainer's batches do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Sum(torch.autograd.Function):
    """The sum of a tensor over all processes, each of which makes something of it: so are gradients summed up."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


@contextmanager
def synchronised(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Inside, every BatchNorm of `model` in training mode normalises by mean and variance over all processes."""
    modules = [module for module in model.modules() if isinstance(module, _BatchNorm) and enabled]
    for module in modules:
        module.__dict__["forward"] = partial(_forward, module, module.forward)
    try:
        yield
    finally:
        for module in modules:
            del module.__dict__["forward"]


def _forward(module: _BatchNorm, alone: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    if not module.training:
        return alone(values)
    world, axes = dist.get_world_size(), [axis for axis in range(values.ndim) if axis != 1]
    full = values.float()
    mean = Sum.apply(full.mean(axes)) / world
    shape = (1, -1, *[1] * (values.ndim - 2))
    centred = full - mean.view(shape)
    variance = Sum.apply(centred.square().mean(axes)) / world
    if module.running_mean is not None and module.running_var is not None:
        _follow(module, mean.detach(), variance.detach(), values.numel() // values.shape[1] * world)
    normal = centred * torch.rsqrt(variance + module.eps).view(shape)
    if module.affine:
        normal = normal * module.weight.view(shape) + module.bias.view(shape)
    return normal.to(values.dtype)


def _follow(module: _BatchNorm, mean: Tensor, variance: Tensor, number: int) -> None:
    """Running statistics as torch keeps them: of the variance its unbiased estimate."""
    assert module.running_mean is not None
    assert module.running_var is not None
    assert module.num_batches_tracked is not None
    module.num_batches_tracked.add_(1)
    momentum = 1 / float(module.num_batches_tracked) if module.momentum is None else module.momentum
    module.running_mean.lerp_(mean.to(module.running_mean), momentum)
    module.running_var.lerp_((variance * number / max(number - 1, 1)).to(module.running_var), momentum)
