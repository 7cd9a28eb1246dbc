"""Rates, groups, clipping and accumulation of one step's training, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_training import Plain, context, images_of, model_of, train, weights

from cssbench.config import OptimConfig, TrainConfig
from cssbench.engine import micro_batch
from cssbench.errors import ConfigError
from cssbench.method import Batch, StepContext
from cssbench.trainer import make_optimizer, rate_at


def test_poly_schedule_by_hand():
    flat = OptimConfig(lr=1.0)
    assert [rate_at(flat, 2.0, i, 4) for i in range(4)] == [2.0, 1.5, 1.0, 0.5]
    assert rate_at(OptimConfig(power=2.0), 2.0, 2, 4) == 0.5
    assert rate_at(OptimConfig(power=0.0), 2.0, 3, 4) == 2.0
    assert rate_at(OptimConfig(power=0.9), 1.0, 1, 4) == pytest.approx(0.75**0.9)
    assert rate_at(OptimConfig(min_lr=0.2), 1.0, 2, 4) == pytest.approx(0.6)  # half way from 1 to 0.2


def test_linear_warm_up_by_hand():
    config = OptimConfig(warmup=4, warmup_ratio=0.5, power=0.0)
    assert [rate_at(config, 8.0, i, 10) for i in range(6)] == [4.0, 5.0, 6.0, 7.0, 8.0, 8.0]
    # the two factors multiply: 0.8 of the poly schedule, 0.75 of the warm-up
    assert rate_at(OptimConfig(warmup=4, warmup_ratio=0.5), 1.0, 2, 10) == pytest.approx(0.8 * 0.75)
    # models.md 2.4: base (1 - i/T) [1 - (1 - i/1500)(1 - 1e-6)]
    assert rate_at(OptimConfig(warmup=1500), 2e-5, 0, 160_000) == pytest.approx(2e-11)
    found = rate_at(OptimConfig(warmup=1500), 2e-5, 750, 160_000)
    assert found == pytest.approx(2e-5 * (1 - 750 / 160_000) * (1 - 0.5 * (1 - 1e-6)))


def groups_of(ctx: StepContext, config: OptimConfig, step: int = 0) -> list[dict[str, Any]]:
    return make_optimizer(config, Plain().param_groups(ctx), step).param_groups


def test_optimiser_groups_by_hand():
    ctx = context(1)
    model: Any = ctx.model
    encoder, plain, heads = groups_of(ctx, OptimConfig(lr=0.01, weight_decay=0.3))
    assert {id(p) for p in encoder["params"]} == {id(model.first.weight)}
    assert {id(p) for p in plain["params"]} == {id(model.first.bias), id(model.shift.offset)}
    assert {id(p) for p in heads["params"]} == {id(p) for p in model.heads.parameters()}
    assert [g["lr"] for g in (encoder, plain, heads)] == pytest.approx([0.01, 0.01, 0.1])  # heads learn 10x faster
    assert [g["base_lr"] for g in (encoder, plain, heads)] == pytest.approx([0.01, 0.01, 0.1])
    assert [g["weight_decay"] for g in (encoder, plain, heads)] == [0.3, 0.0, 0.3]  # heads decay throughout


def test_later_steps_may_have_their_own_rate():
    config = OptimConfig(lr=0.01, later_lr=0.002, head_lr_scale=3.0)
    assert [g["lr"] for g in groups_of(context(0), config, 0)] == pytest.approx([0.01, 0.01, 0.03])
    assert [g["lr"] for g in groups_of(context(1), config, 1)] == pytest.approx([0.002, 0.002, 0.006])
    assert [g["lr"] for g in groups_of(context(1), OptimConfig(lr=0.01), 1)] == pytest.approx([0.01, 0.01, 0.1])


def test_frozen_parameters_are_in_no_group():
    ctx = context(1)
    ctx.model.freeze_old()
    (heads,) = groups_of(ctx, OptimConfig())
    assert {id(p) for p in heads["params"]} == {id(p) for p in ctx.model.heads[-1].parameters()}


def test_a_method_sets_scale_and_decay_of_a_group():
    group = {"params": [nn.Parameter(torch.zeros(2))], "head": True, "lr_scale": 0.5, "weight_decay": 0.7}
    (found,) = make_optimizer(OptimConfig(lr=0.1), [group], 0).param_groups
    assert found["lr"] == pytest.approx(0.1 * 10 * 0.5)
    assert found["weight_decay"] == 0.7


def test_optimisers_are_what_the_recipe_says():
    group = {"params": [nn.Parameter(torch.zeros(2))]}
    adam = make_optimizer(OptimConfig(betas=(0.8, 0.9)), [group], 0)
    assert isinstance(adam, torch.optim.AdamW)
    assert adam.param_groups[0]["betas"] == (0.8, 0.9)
    sgd = make_optimizer(OptimConfig(name="sgd", momentum=0.7), [group], 0)
    assert isinstance(sgd, torch.optim.SGD)
    assert sgd.param_groups[0]["momentum"] == 0.7
    assert sgd.param_groups[0]["nesterov"]
    make_optimizer(OptimConfig(name="sgd", momentum=0.0), [group], 0)  # torch refuses Nesterov without momentum


def test_two_steps_of_sgd_by_hand():
    ctx, reference = context(), model_of(0)
    train(ctx, iterations=2, optim={"lr": 0.1, "head_lr_scale": 10.0})
    for factor, batch in zip((1.0, 0.5), (images_of(0), images_of(1)), strict=True):
        loss = reference.loss(reference(batch["images"]), batch["labels"])["ce"]
        names, parameters = zip(*reference.named_parameters(), strict=True)
        with torch.no_grad():
            for name, parameter, slope in zip(names, parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter -= factor * (1.0 if name.startswith("heads") else 0.1) * slope
    for name, tensor in weights(ctx).items():
        torch.testing.assert_close(tensor, reference.state_dict()[name], msg=name)


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("optim", [{}, {"name": "adamw", "lr": 0.01, "clip": 0.05}])
def test_accumulated_passes_equal_one_large_batch(parts: int, optim: dict[str, Any]):
    whole, pieces = context(), context()
    loss = train(whole, optim=optim)
    assert train(pieces, optim=optim, accumulate=parts) == pytest.approx(loss, rel=1e-5)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(pieces)[name], tensor, msg=name)
    assert not torch.equal(weights(whole)["first.weight"], model_of(0).first.weight)


def moved(ctx: StepContext) -> float:
    start = model_of(0).state_dict()
    return math.sqrt(sum(float((tensor - start[name]).square().sum()) for name, tensor in weights(ctx).items()))


def test_the_gradient_is_clipped_to_its_norm():
    free, clipped, loose = context(), context(), context()
    plain = {"lr": 1.0, "head_lr_scale": 1.0}
    train(free, iterations=1, optim=plain)
    train(clipped, iterations=1, optim=plain | {"clip": 0.01})
    train(loose, iterations=1, optim=plain | {"clip": 100.0})
    assert moved(free) > 0.02
    assert moved(clipped) == pytest.approx(0.01, rel=1e-3)  # one norm over all groups
    assert moved(loose) == pytest.approx(moved(free))


def test_the_schedule_reaches_every_group():
    class Watching(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.iterations: list[int] = []

        def loss(self, ctx: StepContext, batch: Batch) -> dict[str, Tensor]:
            self.iterations.append(ctx.iteration)
            return super().loss(ctx, batch)

    rows: list[tuple[str, float, int]] = []
    ctx = context(log=lambda name, value: rows.append((name, value, ctx.iteration)))
    method = Watching()
    train(ctx, method, iterations=4, optim={"lr": 0.08, "power": 1.0}, accumulate=2, log_every=1)
    rates = [(round(v, 6), i) for n, v, i in rows if n == "lr"]
    assert rates == [(0.08, 0), (0.06, 1), (0.04, 2), (0.02, 3)]
    assert method.iterations == [0, 0, 1, 1, 2, 2, 3, 3]  # what a schedule inside a method relies on
    assert ctx.iteration == 4


def test_micro_batches_keep_the_effective_batch():
    config = TrainConfig(iterations=1, batch_size=24, accumulate=3)
    assert [micro_batch(config, world) for world in (1, 2, 4, 8)] == [8, 4, 2, 1]


def test_a_batch_that_does_not_divide_is_refused():
    config = TrainConfig(iterations=1, batch_size=16, accumulate=2)
    with pytest.raises(ConfigError, match=r"16 does not divide by 2 accumulated passes x 3 processes.*multiple of 6"):
        micro_batch(config, 3)
    with pytest.raises(ConfigError, match="multiple of 32"):
        micro_batch(config, 16)
