"""Training of one step: what a method is given and may return, what is logged and reported, what stays frozen."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_training import SCENE, Linear, LinearOutput, Plain, context, images_of, model_of, train, weights

from cssbench.config import OptimConfig, TrainConfig
from cssbench.engine import make_fabric
from cssbench.errors import NonFiniteLossError, PluginError
from cssbench.logs import StepLog
from cssbench.method import Batch, Method, StepContext
from cssbench.models.segmenter import freeze_copy
from cssbench.trainer import fit


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


@pytest.mark.parametrize(
    ("log_every", "logged"), [(1, [0, 1, 2, 3, 4, 5, 6]), (3, [0, 3, 6]), (4, [0, 4, 6]), (9, [0, 6])]
)
def test_logged_iterations_include_the_last(log_every: int, logged: list[int]):
    rows: list[tuple[str, int]] = []
    ctx = context(log=lambda name, value: rows.append((name, ctx.iteration)))
    train(ctx, iterations=7, log_every=log_every)
    assert [i for name, i in rows if name == "ce"] == logged


def test_the_log_file_holds_iterations(tmp_path: Path):
    log = StepLog(tmp_path, 2)
    ctx = context(log=lambda name, value: log(name, value, ctx.iteration))
    train(ctx, iterations=3, log_every=2)
    with (tmp_path / "train-02.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(r["step"], r["iteration"], r["name"]) for r in rows] == [
        ("2", "0", "ce"), ("2", "0", "lr"), ("2", "2", "ce"), ("2", "2", "lr"),
    ]  # fmt: skip
    assert all(float(r["value"]) > 0 for r in rows)


def test_another_try_at_a_step_starts_its_log_anew(tmp_path: Path):
    for value in (1.0, 2.0):
        StepLog(tmp_path, 0)("ce", value, 0)
    assert (tmp_path / "train-00.csv").read_text().splitlines() == ["step,iteration,name,value", "0,0,ce,2.0"]
    StepLog(tmp_path / "other", 0, enabled=False)("ce", 1.0, 0)
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
