"""One run on many processes: joining them, sharing out a batch, and the state of model and optimiser as a whole."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from cssbench.config import TrainConfig
from cssbench.errors import ConfigError


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


def whole_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """`state_dict()` of both, as plain tensors on the CPU that share no memory with the originals.

    model: `ctx.model` as it is while `trainer.fit` runs. All processes call it; both dicts are empty on all but the
    first, which is the one that writes.
    """
    keep = first_process()
    return _whole(model.state_dict(), keep) or {}, _whole(optimizer.state_dict(), keep) or {}


def load_whole_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, model_state: dict[str, Any], optimizer_state: dict[str, Any]
) -> None:
    """Load what `whole_state` returned, whatever the number of processes was. All processes call it with all of it.

    The optimiser has the parameter groups that it had then. Raises RuntimeError or ValueError, as torch does, for the
    state of another model or of other groups.
    """
    own = model.state_dict()
    model.load_state_dict({name: _like(tensor, own.get(name)) for name, tensor in model_state.items()})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {
        index: {name: _like(value, parameters[index]) for name, value in state.items()}
        for index, state in optimizer_state["state"].items()
    }
    optimizer.load_state_dict({"state": states, "param_groups": optimizer_state["param_groups"]})


def first_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _whole(value: Any, keep: bool) -> Any:
    """`value` with its tensors whole, on the CPU and cloned; None unless `keep`, after the same collective calls."""
    if isinstance(value, dict):
        found = {key: _whole(item, keep) for key, item in value.items()}
        return found if keep else None
    if isinstance(value, list):
        return [_whole(item, keep) for item in value]
    if not isinstance(value, Tensor):
        return value
    tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return tensor.detach().to("cpu", copy=True).contiguous() if keep else None


def _like(value: Any, target: Any) -> Any:
    """A whole tensor of the shape of `target`, cut into its shares where that is sharded, and laid out in memory as it
    is: fused optimisers pair numbers by their place."""
    if not (isinstance(value, Tensor) and isinstance(target, Tensor) and value.shape == target.shape):
        return value
    if isinstance(target, DTensor):
        return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    return torch.empty_like(target, dtype=value.dtype, device=value.device, requires_grad=False).copy_(value)
