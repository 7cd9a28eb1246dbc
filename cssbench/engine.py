"""One run on many processes: joining them, sharing out a batch, and the state of model and optimiser as a whole."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.fabric.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from cssbench import processes
from cssbench.config import TrainConfig
from cssbench.errors import ConfigError
from cssbench.method import Method, StepContext
from cssbench.models.segmenter import Segmenter

TIMEOUT = timedelta(hours=2)  # of a process that waits: the first one may store all images while the others do


DDP_OPTIONS = signature(DistributedDataParallel).parameters
OWN_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in DDP_OPTIONS else "broadcast_buffers"  # renamed


def make_fabric(config: TrainConfig) -> Fabric:
    """Fabric for the recipe's accelerator and precision, on the processes that torchrun started (else one).

    Raises ConfigError where several are wanted and nobody started them, where a machine has fewer GPUs than processes,
    and for settings that do not go together on several.
    """
    world, local = processes.world(), processes.local_world()
    if world == 1 and config.devices > 1:
        raise ConfigError(
            f"train.devices = {config.devices} wants as many processes, and this is the only one. `cssbench run`, "
            f"`resume` and `evaluate` start them; for other programs `torchrun --nproc-per-node {config.devices}` does."
        )
    check_strategy(config, world)
    options: dict[str, Any] = {"accelerator": config.accelerator, "precision": config.precision}
    if world == 1:  # said in words, because Lightning would take a batch job of SLURM for several processes
        fabric = Fabric(devices=1, plugins=[LightningEnvironment()], **options)
    else:
        _check_gpus(config, local)
        for name in ("distributed", "rank_zero"):  # no words on each process
            logging.getLogger(f"lightning.fabric.utilities.{name}").setLevel(logging.WARNING)
        ddp: dict[str, Any] = {"find_unused_parameters": True, OWN_BUFFERS: False}
        fabric = Fabric(
            devices=local,
            num_nodes=world // local,
            strategy=Strategy(timeout=TIMEOUT, **ddp),
            plugins=[TorchElasticEnvironment()],
            **options,
        )
    fabric.launch()
    return fabric


def check_strategy(config: TrainConfig, world: int) -> None:
    """Raises ConfigError for settings that sharding does not go with."""
    if config.strategy != "fsdp" or world == 1:
        return
    against = {
        "train.compile = true": config.compile,
        "train.channels_last = true": config.channels_last,
        "train.precision = '16-mixed'": config.precision == "16-mixed",
    }
    if wrong := [name for name, given in against.items() if given]:
        raise ConfigError(
            f"train.strategy = 'fsdp' does not go with {wrong[0]}. Change that (for half precision take 'bf16-mixed'), "
            f"or set train.strategy = 'ddp'."
        )


def _check_gpus(config: TrainConfig, local: int) -> None:
    there = torch.cuda.device_count() if config.accelerator != "cpu" else 0
    if (there or config.accelerator == "cuda") and there < local:
        raise ConfigError(
            f"{local} processes on a machine with {there} GPUs: each needs one of its own. Start {there or 'none'}, or "
            f"set train.accelerator = 'cpu'."
        )


class Strategy(DDPStrategy):
    """DDP; a model that is sharded already is left as it is. Parameters without a gradient in some pass are looked
    for, because a method may train less than is trainable, and not in all passes the same."""

    def setup_module(self, module: nn.Module) -> Any:
        return module if is_sharded(module) else super().setup_module(module)


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


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


@contextmanager
def sharded(fabric: Fabric, ctx: StepContext, config: TrainConfig) -> Iterator[None]:
    """Inside, where `train.strategy` is "fsdp", `ctx.model` is a copy whose parameters, gradients and optimiser state
    are shared out over the processes (FSDP2: blocks of the encoder one by one, then the rest); at its end the model
    takes over the copy's weights and `ctx.model` is again what it was, whole.

    A step that does not train the encoder has little to share out, and goes without. All processes enter and leave it;
    when one fails, nothing is taken over. Raises ConfigError for a model with a parameter without dimensions.
    """
    if config.strategy != "fsdp" or fabric.world_size == 1 or ctx.model.encoder_frozen:
        yield
        return
    whole = ctx.model
    share_weights(fabric, whole)
    ctx.model = shard(copy.deepcopy(whole.cpu()), fabric.device.type, fabric.world_size)
    yield
    trained, own = ctx.model.state_dict(), whole.state_dict()
    for name, tensor in trained.items():
        own[name].copy_(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
    ctx.model = whole.to(fabric.device)


def shard(model: Segmenter, device: str, world: int) -> Segmenter:
    """`model`, in place."""
    scalars = [name for name, parameter in model.named_parameters() if not parameter.ndim]
    if scalars:
        raise ConfigError(
            f"train.strategy = 'fsdp' cannot share out {scalars[0]!r} of {type(model).__name__}, a parameter without "
            f"dimensions. Give it the shape (1,), or set train.strategy = 'ddp'."
        )
    mesh = init_device_mesh(device, (world,))
    for part in model.compiled_parts():
        part.register_forward_hook(_touch)  # before FSDP's own, which puts the weights away
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def touched(module: nn.Module) -> Tensor | float:
    """0, as a function of every trainable parameter of `module` that is whole at the moment.

    FSDP reduces the gradients that a process has, so that all must have those of the same parameters. A parameter that
    nobody used has a gradient of 0 then, not none: weight decay still acts on it.
    """
    parts = [p.flatten()[0] * 0 for p in module.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    return torch.stack([part.float() for part in parts]).sum() if parts else 0.0


def _touch(module: nn.Module, args: Any, output: Any) -> Any:
    return output + touched(module) if isinstance(output, Tensor) and torch.is_grad_enabled() else output


def share_weights(fabric: Fabric, model: nn.Module) -> None:
    """Every process gets the first one's parameters and buffers."""
    if fabric.world_size > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)


def agree(fabric: Fabric, model: nn.Module, method: Method) -> None:
    """Every process gets the first one's weights, and its state of the method where its own is another.

    They are equal already unless a GPU added up in another order, or the method keeps what it saw in `loss`, of which
    each process sees its share (docs/devices.md).
    """
    if fabric.world_size == 1:
        return
    share_weights(fabric, model)
    state = _whole(method.state_dict(), keep=True)
    first = fabric.broadcast(state)
    if not equal(first, state):
        method.load_state_dict(first)


def equal(a: Any, b: Any) -> bool:
    """Whether two states, as data, are the same to the last bit (a NaN equals no NaN)."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def average_statistics(fabric: Fabric, model: nn.Module) -> None:
    """Running means and variances of BatchNorm, of which each process has its own: their means over the processes."""
    if fabric.world_size == 1:
        return
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.training:
            for statistic in (module.running_mean, module.running_var):
                if statistic is not None:
                    dist.all_reduce(statistic)
                    statistic.div_(fabric.world_size)


def mean_terms(fabric: Fabric, terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Means over the processes of named scalars; one that a process lacks counts as 0 there. All processes call it."""
    if fabric.world_size == 1:
        return terms
    shares: list[Any] = [None] * fabric.world_size
    dist.all_gather_object(shares, list(terms))
    names = list(dict.fromkeys(name for share in shares for name in share))
    zero = torch.zeros((), device=fabric.device)
    values = torch.stack([terms.get(name, zero).detach().float() for name in names])
    dist.all_reduce(values)
    return dict(zip(names, values / fabric.world_size, strict=True))


def gather(fabric: Fabric, share: dict[str, Any]) -> dict[str, Any]:
    """The dicts of all processes as one. All processes call it."""
    if fabric.world_size == 1:
        return share
    shares: list[Any] = [None] * fabric.world_size
    dist.all_gather_object(shares, share)
    return {key: value for part in shares for key, value in part.items()}


def add_up(fabric: Fabric, counts: dict[str, int]) -> dict[str, int]:
    """Sums over the processes, which all have these names."""
    values = torch.tensor(list(counts.values()), dtype=torch.int64, device=fabric.device)
    return dict(zip(counts, torch.as_tensor(fabric.all_reduce(values, reduce_op="sum")).tolist(), strict=True))
