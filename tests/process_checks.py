"""What is checked on the processes themselves; run by `many_processes` under torchrun. A failed assertion ends all."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from toy_training import Linear, Plain, context, images_of, split

from cssbench import engine
from cssbench.api import Batch, Method, StepContext
from cssbench.config import OptimConfig, TrainConfig
from cssbench.sync_batchnorm import synchronised
from cssbench.trainer import fit

ADAM = OptimConfig(lr=0.1, head_lr_scale=1.0, clip=0.5, weight_decay=0.0)


def check_all() -> None:
    fabric_of()  # joins the processes
    rank, world = dist.get_rank(), dist.get_world_size()
    check_sums(rank, world)
    check_terms(rank, world)
    check_batchnorm(rank, world)
    check_agreement(rank)
    for strategy in ("ddp", "fsdp"):
        check_idle_parameters(rank, world, strategy)
        check_whole_state(rank, world, strategy)


def fabric_of(**options: Any) -> tuple[Any, TrainConfig]:
    train = TrainConfig(iterations=3, batch_size=8, accelerator="cpu", **options)
    return engine.make_fabric(train), train


def check_sums(rank: int, world: int) -> None:
    fabric, _ = fabric_of()
    assert engine.add_up(fabric, {"a": rank, "b": 1}) == {"a": sum(range(world)), "b": world}
    assert engine.gather(fabric, {f"of {rank}": rank}) == {f"of {r}": r for r in range(world)}


def check_terms(rank: int, world: int) -> None:
    """A term that only the last process has counts as 0 on the others."""
    terms = {"ce": torch.tensor(float(rank))} | ({"extra": torch.tensor(6.0)} if rank == world - 1 else {})
    found = engine.mean_terms(fabric_of()[0], terms)
    assert found["ce"] == sum(range(world)) / world
    assert found["extra"] == 6.0 / world


def check_batchnorm(rank: int, world: int) -> None:
    """Output, gradients and running statistics as of one process with all images."""
    values = torch.randn(2 * world, 3, 5, 4, generator=torch.Generator().manual_seed(0)) * 2 + 1
    torch.manual_seed(1)
    alone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    shared = copy.deepcopy(alone)
    expected = alone(values)
    expected.square().mul(torch.linspace(0, 1, 4).view(1, -1, 1, 1)).mean().backward()
    mine = slice(2 * rank, 2 * rank + 2)
    with synchronised(shared):
        found = shared(values[mine])
        found.square().mul(torch.linspace(0, 1, 4).view(1, -1, 1, 1)).mean().backward()
    torch.testing.assert_close(found, expected[mine])
    for parameter, other in zip(shared.parameters(), alone.parameters(), strict=True):
        dist.all_reduce(parameter.grad)
        torch.testing.assert_close(parameter.grad / world, other.grad, atol=1e-5, rtol=1e-4)
    for name, buffer in shared.named_buffers():
        torch.testing.assert_close(buffer, dict(alone.named_buffers())[name])
    assert "forward" not in vars(shared[1])
    shared.eval()
    torch.testing.assert_close(shared(values), alone.eval()(values))


class Remembers(Plain):
    """Keeps what it saw in `loss`, which differs from process to process."""

    seen: Tensor = torch.zeros(())

    def loss(self, ctx: StepContext, batch: Batch) -> dict[str, Tensor]:
        assert batch.images is not None
        self.seen = self.seen + batch.images.sum()
        return super().loss(ctx, batch)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


def same_everywhere(tensor: Tensor) -> bool:
    first = tensor.clone()
    dist.broadcast(first, 0)
    return torch.equal(first, tensor)


def check_agreement(rank: int) -> None:
    fabric, _ = fabric_of()
    model, method = Linear(), Remembers()
    method.seen = torch.tensor(float(rank))
    with torch.no_grad():
        model.first.weight.fill_(rank)
    engine.agree(fabric, model, method)
    assert method.seen == 0
    assert (model.first.weight == 0).all()


class Sparse(Plain):
    """Trains the encoder alone in some passes, and the offset never."""

    def loss(self, ctx: StepContext, batch: Batch) -> dict[str, Tensor]:
        if batch.names[0].endswith("-0"):
            return {"size": batch.output.features[0].sub(ctx.model.shift.offset.detach()).square().mean()}
        return super().loss(ctx, batch)


def trained(world: int, rank: int, method: Method, strategy: str, **options: Any) -> tuple[StepContext, Any]:
    """Three iterations of two accumulated passes on each process, of two (world 2) or one image (4)."""
    fabric, train = fabric_of(strategy=strategy, accumulate=2, **options)
    passes = [part for number in range(3) for part in split(images_of(number), 2 * world)]
    ctx = context()
    fit(fabric, ctx, method, passes[rank::world], ADAM, train, 3)
    return ctx, passes


def alone(passes: list[Any], method: Method) -> StepContext:
    """The same on one process, without Fabric: plain torch."""
    ctx = context()
    optimizer = torch.optim.AdamW(ctx.model.parameters(), lr=0.1, betas=ADAM.betas, weight_decay=0.0)
    number = len(passes) // 3
    for iteration in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - iteration / 3)
        for one in passes[number * iteration : number * (iteration + 1)]:
            output = ctx.model(one["images"])
            terms = method.loss(ctx, Batch(one["images"], one["labels"], output, None, one["names"]))
            (torch.stack(list(terms.values())).sum() / number).backward()
        nn.utils.clip_grad_norm_(ctx.model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return ctx


def check_idle_parameters(rank: int, world: int, strategy: str) -> None:
    """Parameters without a gradient in some passes, on some processes or ever."""
    ctx, passes = trained(world, rank, Sparse(), strategy)
    expected = alone(passes, Sparse())
    for (name, found), other in zip(ctx.model.state_dict().items(), expected.model.state_dict().values(), strict=True):
        torch.testing.assert_close(found, other, atol=1e-5, rtol=1e-4, msg=f"{strategy}: {name}")
        assert same_everywhere(found), name
    assert type(ctx.model) is Linear


def check_whole_state(rank: int, world: int, strategy: str) -> None:
    """Taken after two iterations and loaded into a fresh model and optimiser: the third gives the same weights."""
    fabric, train = fabric_of(strategy=strategy)
    batches = [split(images_of(number), world)[rank] for number in range(3)]

    def made() -> tuple[StepContext, Any, Any]:
        ctx = context()
        stack = engine.sharded(fabric, ctx, train)
        stack.__enter__()
        optimizer = torch.optim.AdamW(ctx.model.parameters(), lr=0.1, fused=True)
        return ctx, optimizer, stack

    def step(ctx: StepContext, optimizer: Any, batch: dict[str, Any]) -> None:
        ctx.model.loss(ctx.model(batch["images"]), batch["labels"])["ce"].backward()
        if strategy == "ddp":
            for parameter in ctx.model.parameters():
                dist.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()

    ctx, optimizer, stack = made()
    assert engine.is_sharded(ctx.model) == (strategy == "fsdp")
    for batch in batches[:2]:
        step(ctx, optimizer, batch)
    model_state, state = engine.whole_state(ctx.model, optimizer)
    assert bool(model_state) == bool(state) == (rank == 0)
    shared: list[Any] = [model_state, state]
    dist.broadcast_object_list(shared, 0)
    assert all(type(tensor) is Tensor and tensor.device.type == "cpu" for tensor in shared[0].values())
    assert {name: tensor.shape for name, tensor in shared[0].items()} == {
        name: tensor.shape for name, tensor in context().model.state_dict().items()
    }
    moments = [value for entry in shared[1]["state"].values() for value in entry.values()]
    assert moments
    assert all(type(value) is Tensor for value in moments)
    again, other, second = made()
    engine.load_whole_state(again.model, other, *shared)
    step(ctx, optimizer, batches[2])
    step(again, other, batches[2])
    for context_manager in (stack, second):
        context_manager.__exit__(None, None, None)
    for found, expected in zip(again.model.parameters(), ctx.model.parameters(), strict=True):
        assert torch.equal(found, expected)
