"""Training of one step: rates and groups by hand, accumulation, clipping, what a method is given and may return."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cssbench.config import OptimConfig, TrainConfig
from cssbench.errors import ConfigError, NonFiniteLossError, PluginError
from cssbench.logs import StepLog
from cssbench.method import Batch, Method, StepContext
from cssbench.models.segmenter import Segmenter, SegOutput, freeze_copy
from cssbench.scenario import Step, from_dict
from cssbench.trainer import fit, make_fabric, make_optimizer, micro_batch, rate_at

torch.set_num_threads(1)
SCENE = from_dict("toy", {"dataset": "toy", "classes": 3, "base": 2, "increment": 1})


@dataclass
class LinearOutput(SegOutput):
    ready: Tensor | None = None

    @cached_property
    def scores(self) -> Tensor:
        assert self.ready is not None
        return self.ready


class Shift(nn.Module):
    """An embedding: no weight decay by its name, not by its number of dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(4, 1, 1))


class Linear(Segmenter):
    """Per pixel: a linear encoder, a linear head per step."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.shift = Shift()
        self.seen_types: list[torch.dtype] = []
        self.modes: list[tuple[bool, bool]] = []  # of each forward pass: training, gradients

    def grow(self, step: Step) -> None:
        self.heads.append(nn.Conv2d(4, len(step.new) + (step.index == 0), 1))

    def forward(self, images: Tensor) -> LinearOutput:
        hidden = self.first(images)
        self.seen_types.append(hidden.dtype)
        self.modes.append((self.training, torch.is_grad_enabled()))
        hidden = hidden.relu() + self.shift.offset
        ready = torch.cat([head(hidden) for head in self.heads], dim=1)
        return LinearOutput((images.shape[-2], images.shape[-1]), [hidden], ready)

    def loss(self, output: LinearOutput, labels: Tensor) -> dict[str, Tensor]:
        return {"ce": F.cross_entropy(output.scores, labels, ignore_index=255)}

    def no_decay_names(self) -> set[str]:
        return {"shift.offset"}


class Plain(Method):
    def loss(self, ctx: StepContext, batch: Batch) -> dict[str, Tensor]:
        return ctx.model.loss(batch.output, batch.labels)


def model_of(step: int) -> Linear:
    torch.manual_seed(0)
    model = Linear()
    for grown in SCENE.steps[: step + 1]:
        model.grow(grown)
    return model


def context(
    step: int = 0, previous: Segmenter | None = None, log: Callable[..., None] = lambda *_: None
) -> StepContext:
    return StepContext(
        scenario=SCENE,
        step=SCENE.steps[step],
        model=model_of(step),
        previous=previous,
        train_loader=[],
        holdout_loader=None,
        device=torch.device("cpu"),
        images=(8,),
        class_images={1: 4, 2: 4},
        log=log,
    )


def images_of(number: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(8, 3, 5, 4, generator=generator)
    labels = torch.randint(0, 3, (8, 5, 4), generator=generator)
    return {"images": images, "labels": labels, "names": [f"image-{number}-{i}" for i in range(8)]}


def split(batch: dict[str, Any], parts: int) -> list[dict[str, Any]]:
    size = 8 // parts
    return [{key: value[i : i + size] for key, value in batch.items()} for i in range(0, 8, size)]


def train(
    ctx: StepContext,
    method: Method | None = None,
    batches: list[dict[str, Any]] | None = None,
    iterations: int = 3,
    optim: dict[str, Any] | None = None,
    **changes: Any,
) -> dict[str, float]:
    config = TrainConfig(**{"iterations": iterations, "batch_size": 8, "accelerator": "cpu"} | changes)
    if batches is None:
        batches = [part for i in range(iterations) for part in split(images_of(i), config.accumulate)]
    settings = OptimConfig(**{"lr": 0.1, "name": "sgd", "momentum": 0.0, "weight_decay": 0.0} | (optim or {}))
    return fit(make_fabric(config), ctx, method or Plain(), batches, settings, config, iterations)


def weights(ctx: StepContext) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in ctx.model.state_dict().items()}


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


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_model_may_ask_for_more_than_the_images(precision: str):
    """In training passes only; the previous model is called with images alone."""
    seen: list[Tensor | None] = []

    class Asking(Linear):
        def training_inputs(self, labels: Tensor) -> dict[str, Tensor]:
            return {"mask": labels > 1}

        def forward(self, images: Tensor, mask: Tensor | None = None) -> LinearOutput:
            seen.append(mask)
            return super().forward(images)

    previous, ctx = Asking(), context(1)
    previous.grow(SCENE.steps[0])
    ctx.previous, ctx.model = previous.eval(), Asking()
    for step in SCENE.steps[:2]:
        ctx.model.grow(step)

    class Distilling(Plain):
        uses_previous = True

    train(ctx, Distilling(), iterations=1, precision=precision)
    labels = images_of(0)["labels"]
    assert seen[0] is None
    assert seen[1] is not None
    assert torch.equal(seen[1], labels > 1)


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


@pytest.mark.parametrize(
    ("log_every", "logged"), [(1, [0, 1, 2, 3, 4, 5, 6]), (3, [0, 3, 6]), (4, [0, 4, 6]), (9, [0, 6])]
)
def test_logged_iterations_include_the_last(log_every: int, logged: list[int]):
    rows: list[tuple[str, int]] = []
    ctx = context(log=lambda name, value: rows.append((name, ctx.iteration)))
    train(ctx, iterations=7, log_every=log_every)
    assert [i for name, i in rows if name == "ce"] == logged


def test_the_log_file_holds_iterations(tmp_path: Path):
    with StepLog(tmp_path, 2) as log:
        ctx = context(log=lambda name, value: log(name, value, ctx.iteration))
        train(ctx, iterations=3, log_every=2)
    with (tmp_path / "train-02.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(r["step"], r["iteration"], r["name"]) for r in rows] == [
        ("2", "0", "ce"), ("2", "0", "lr"), ("2", "2", "ce"), ("2", "2", "lr"),
    ]  # fmt: skip
    assert all(float(r["value"]) > 0 for r in rows)
    assert list((tmp_path / "tensorboard" / "step-02").iterdir())


def test_another_try_at_a_step_starts_its_log_anew(tmp_path: Path):
    for value in (1.0, 2.0):
        with StepLog(tmp_path, 0) as log:
            log("ce", value, 0)
    assert (tmp_path / "train-00.csv").read_text().splitlines() == ["step,iteration,name,value", "0,0,ce,2.0"]
    assert len(list((tmp_path / "tensorboard" / "step-00").iterdir())) == 1
    with StepLog(tmp_path / "other", 0, enabled=False) as log:
        log("ce", 1.0, 0)
    assert not (tmp_path / "other").exists()


class Given(Method):
    """Loss terms from a list, tied to the model so that they have gradients."""

    def __init__(self, *terms: Any):
        super().__init__()
        self.terms, self.calls = terms, 0

    def loss(self, ctx: StepContext, batch: Batch) -> Any:
        found = self.terms[self.calls]
        self.calls += 1
        zero = 0 * batch.output.scores.sum()
        return {k: zero + v for k, v in found.items()} if isinstance(found, dict) else found


@pytest.mark.parametrize(("iterations", "mean"), [(1, 0.0), (9, 8.0), (10, 9.0), (20, 18.5), (30, 28.0)])
def test_reported_losses_are_means_over_the_last_tenth(iterations: int, mean: float):
    method = Given(*({"a": float(i), "b": 1.0} for i in range(iterations)))
    assert train(context(), method, iterations=iterations) == pytest.approx({"a": mean, "b": 1.0})


def test_a_term_that_only_some_passes_have_is_counted():
    rows: dict[str, float] = {}
    method = Given({"a": 1.0, "rare": 4.0}, {"a": 3.0})
    found = train(context(log=rows.__setitem__), method, iterations=1, accumulate=2)
    assert found == pytest.approx({"a": 2.0, "rare": 2.0})
    assert rows["rare"] == pytest.approx(2.0)


def test_every_iteration_is_reported():
    calls: list[int] = []
    config = TrainConfig(iterations=3, batch_size=8, accelerator="cpu")
    batches = [images_of(i) for i in range(3)]
    fit(make_fabric(config), context(), Plain(), batches, OptimConfig(), config, 3, lambda: calls.append(1))
    assert calls == [1, 1, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_names_term_and_images(bad: float):
    ctx = context(1)
    before = weights(ctx)
    with pytest.raises(NonFiniteLossError) as caught:
        train(ctx, Given({"good": 1.0, "bad": bad}), iterations=1)
    message = str(caught.value)
    assert "Given" in message
    assert "step 1" in message
    assert "good = 1" in message
    assert f"bad = {bad:g}" in message
    assert all(f"image-0-{i}" in message for i in range(8))
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(ctx).items())


def test_infinities_do_not_cancel():
    with pytest.raises(NonFiniteLossError):
        train(context(), Given({"up": math.inf, "down": -math.inf}), iterations=1)


@pytest.mark.parametrize(
    ("terms", "described"),
    [
        (None, "NoneType"),
        (torch.zeros(()), r"a tensor of shape \(\)"),
        ([torch.zeros(())], "list"),
        ({}, r"\{\}"),
        ({"ce": torch.zeros(2)}, r"\{ce: a tensor of shape \(2,\)\}"),
        ({"ce": torch.zeros(1)}, r"\{ce: a tensor of shape \(1,\)\}"),
    ],
)
def test_a_wrong_return_type_names_the_method(terms: Any, described: str):
    class Wrong(Method):
        def loss(self, ctx: StepContext, batch: Batch) -> Any:
            return terms

    with pytest.raises(PluginError, match=rf"Wrong\.loss must return a dict of named scalar tensors, not {described}"):
        train(context(), Wrong(), iterations=1)


def test_plain_numbers_are_no_loss():
    class Wrong(Method):
        def loss(self, ctx: StepContext, batch: Batch) -> Any:
            return {"ce": 1.5}

    with pytest.raises(PluginError, match=r"\{ce: float\}"):
        train(context(), Wrong(), iterations=1)


def test_the_previous_model_runs_once_in_eval_mode_without_gradients():
    class Watching(Plain):
        seen: list[Batch]

        def loss(self, ctx: StepContext, batch: Batch) -> dict[str, Tensor]:
            self.seen = [*getattr(self, "seen", []), batch]
            return super().loss(ctx, batch)

    previous: Any = freeze_copy(model_of(0))
    ctx, method = context(1, previous), Watching()
    train(ctx, method, iterations=2)
    assert previous.modes == [(False, False)] * 2  # without gradients it keeps no buffers for a backward pass either
    assert ctx.model.modes == [(True, True)] * 2
    for batch, loaded in zip(method.seen, [images_of(0), images_of(1)], strict=True):
        assert batch.previous is not None
        assert batch.previous.scores.shape == (8, 3, 5, 4)
        assert not batch.previous.scores.requires_grad
        assert batch.output.scores.requires_grad
        torch.testing.assert_close(batch.previous.scores, previous(loaded["images"]).scores)
        assert batch.names == loaded["names"]
        assert torch.equal(batch.labels, loaded["labels"])


def test_the_previous_model_runs_once_per_accumulated_pass():
    previous: Any = freeze_copy(model_of(0))
    train(context(1, previous), iterations=2, accumulate=4)
    assert len(previous.modes) == 8


def test_a_loss_may_multiply_by_what_the_previous_model_puts_out():
    class Product(Method):
        def loss(self, ctx: StepContext, batch: Batch) -> dict[str, Tensor]:
            assert batch.previous is not None
            return {"product": (batch.output.features[0] * batch.previous.features[0]).mean()}

    ctx = context(1, freeze_copy(model_of(0)))
    before = weights(ctx)
    train(ctx, Product(), iterations=1)  # inference tensors could not be kept for the backward pass
    assert not torch.equal(weights(ctx)["first.weight"], before["first.weight"])


def test_a_method_may_spare_the_previous_model():
    class Alone(Plain):
        uses_previous = False

        def loss(self, ctx: StepContext, batch: Batch) -> dict[str, Tensor]:
            assert batch.previous is None
            return super().loss(ctx, batch)

    previous = freeze_copy(model_of(0))
    train(context(1, previous), Alone(), iterations=1)
    assert previous.seen_types == []


def test_training_leaves_frozen_parts_alone():
    ctx = context(1)
    ctx.model.eval()
    ctx.model.freeze_old()
    before = weights(ctx)
    train(ctx, optim={"weight_decay": 0.1})
    changed = {name for name, tensor in weights(ctx).items() if not torch.equal(tensor, before[name])}
    assert changed == {"heads.1.weight", "heads.1.bias"}
    assert ctx.model.heads[1].training  # `fit` turns on training mode,
    assert not ctx.model.heads[0].training  # which frozen parts do not follow


def test_bfloat16_on_the_cpu():
    ctx = context()
    before = weights(ctx)
    loss = train(ctx, precision="bf16-mixed")
    model: Any = ctx.model
    assert set(model.seen_types) == {torch.bfloat16}  # the forward pass
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert not torch.equal(weights(ctx)["first.weight"], before["first.weight"])
    full = context()
    assert loss == pytest.approx(train(full), rel=0.02)
    assert set(full.model.seen_types) == {torch.float32}  # type: ignore[arg-type]


def test_micro_batches_keep_the_effective_batch():
    config = TrainConfig(iterations=1, batch_size=24, accumulate=3)
    assert [micro_batch(config, world) for world in (1, 2, 4, 8)] == [8, 4, 2, 1]


def test_a_batch_that_does_not_divide_is_refused():
    config = TrainConfig(iterations=1, batch_size=16, accumulate=2)
    with pytest.raises(ConfigError, match=r"16 does not divide by 2 accumulated passes x 3 processes.*multiple of 6"):
        micro_batch(config, 3)
    with pytest.raises(ConfigError, match="multiple of 32"):
        micro_batch(config, 16)
