"""The conformance kit: every built-in keeps every promise, and a method that breaks one is found out by that one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import Field

from cssbench import registry
from cssbench.api import Batch, ConfigError, Method, Section, StepContext
from cssbench.testing import INVARIANTS, Refused, assert_conforms, conformance
from cssbench.testing.invariants import Subject, Violation, examine
from cssbench.testing.rig import Rig

BUILT_IN = sorted(name for name, part in registry.parts("methods").items() if part.distribution == "cssbench")


@pytest.mark.parametrize("model", ["vit-linear", "segvit"])
@pytest.mark.parametrize("method", BUILT_IN)
def test_built_ins_keep_every_promise(method: str, model: str):
    cls = registry.load("methods", method)
    if method == "segvit-cl" and model == "vit-linear":
        with pytest.raises(Refused, match="ATM heads"):
            conformance(cls, model=model)
    else:
        assert_conforms(cls, model=model)


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in BUILT_IN if name != "segvit-cl"])
def test_built_ins_keep_every_promise_on_deeplab(method: str):
    assert_conforms(registry.load("methods", method), model="deeplabv3")


@pytest.mark.parametrize(
    ("method", "model", "options"),
    [
        ("segvit-cl", "segvit", {"calibration": "prior"}),
        ("mib", "segvit", {"form": "query"}),
        ("plop", "vit-linear", {"arithmetic": "paper", "pod_normalise": True, "adaptive": False}),
        ("reminder", "vit-linear", {"weighting": "pixel", "without_background": 1.0}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_of_built_ins_keep_every_promise(method: str, model: str, options: dict[str, Any]):
    assert_conforms(registry.load("methods", method), options, model)


# --- planted violations -------------------------------------------------------------------------------------------


class Good(Method):
    def loss(self, ctx: StepContext, batch: Batch) -> dict[str, torch.Tensor]:
        return ctx.model.loss(batch.output, batch.labels)


class NoLoss(Method):
    pass


class OtherArguments(Good):
    def end_step(self) -> None:  # type: ignore[override]
        pass


class PlainConfig(Good):
    class Config:  # type: ignore[assignment]
        pass


class NeedsOption(Good):
    class Config(Section):
        weight: float


class TakesAnything(Good):
    class Config(Section, extra="allow"):
        pass


class Forgetful(Good):
    """Does not write what it was given."""

    class Config(Section):
        weight: float = Field(1.0, exclude=True)


class Raises(Good):
    def loss(self, ctx, batch):
        return super().loss(ctx, batch) | {"more": batch.output.scores[:, 99].mean()}


class LogsOnly(Good):
    def loss(self, ctx, batch):
        return {name: term.detach() for name, term in super().loss(ctx, batch).items()}


class TrainsFrozen(Good):
    def param_groups(self, ctx):
        parameters = list(ctx.model.parameters())
        parameters[0].requires_grad_(False)
        return [{"params": parameters}]


class UnknownKey(Good):
    def param_groups(self, ctx):
        return [{**group, "learning_rate": 1.0} for group in super().param_groups(ctx)]


class AddsLayer(Good):
    def start_step(self, ctx):
        ctx.model.extra = torch.nn.Linear(1, 1)


class AddsOutput(Good):
    """Grows the classifier after training."""

    def end_step(self, ctx):
        head = ctx.model.heads[-1]
        wider = torch.nn.Conv2d(head.in_channels, head.out_channels + 1, 1)
        ctx.model.heads[-1] = wider


class MovesFrozen(Good):
    def start_step(self, ctx):
        if ctx.step.index:
            ctx.model.freeze_old()

    def end_step(self, ctx):
        with torch.no_grad():
            next(ctx.model.parameters()).mul_(1.01)


class MovesPrevious(Good):
    def loss(self, ctx, batch):
        if ctx.previous is not None:
            with torch.no_grad():
                next(ctx.previous.parameters()).mul_(0.5)
        return super().loss(ctx, batch)


class ChangesLabels(Good):
    def loss(self, ctx, batch):
        batch.labels[:, 0] = 255
        return super().loss(ctx, batch)


class SwitchesMode(Good):
    def loss(self, ctx, batch):
        ctx.model.eval()
        return super().loss(ctx, batch)


class ChangesThreads(Good):
    def start_step(self, ctx):
        torch.set_num_threads(2)


class OwnDice(Good):
    """Draws from a generator that no seed of the run reaches."""

    def loss(self, ctx, batch):
        return {name: term * np.random.rand() for name, term in super().loss(ctx, batch).items()}


class Peeks(Good):
    """Trains on the true labels of the step's images, old and future classes included."""

    def loss(self, ctx, batch):
        data = ctx.train_loader.dataset
        true = [int(np.bincount(data.source.label("train", name).ravel())[1:].argmax()) for name in batch.names]
        return super().loss(ctx, batch) | {"peek": batch.output.logits[:, 1].mean() * sum(true)}


class Rereads(Good):
    """Learns from the pixels of all images, at every step."""

    def loss(self, ctx, batch):
        source = ctx.train_loader.dataset.source
        mean = float(np.mean([source.image("train", name).mean() for name in source.stems("train")]))
        return super().loss(ctx, batch) | {"mean": batch.output.logits[:, 1].mean() * mean}


class KeepsImages(Good):
    kept: torch.Tensor | None = None

    def loss(self, ctx, batch):
        self.kept = batch.images[:2].clone()
        return super().loss(ctx, batch)

    def state_dict(self):
        return {} if self.kept is None else {"kept": self.kept}

    def load_state_dict(self, state):
        self.kept = state.get("kept")


class KeepsNames(Good):
    names: list[str]

    def loss(self, ctx, batch):
        self.names = list(batch.names)
        return super().loss(ctx, batch)


class KeepsContext(Good):
    def start_step(self, ctx):
        self.ctx = ctx


class DeclaresMemory(KeepsImages):
    memory = 2


class KeepsFunction(Good):
    def state_dict(self):
        return {"where": Path()}


class LosesState(Good):
    count = 0

    def end_step(self, ctx):
        self.count += 1

    def state_dict(self):
        return {"count": self.count}


class CountsSteps(Good):
    """Weighs the loss by a number that is not in its state."""

    count = 0

    def loss(self, ctx, batch):
        return {name: (1 + self.count) * term for name, term in super().loss(ctx, batch).items()}

    def end_step(self, ctx):
        self.count += 1


class CountsIterations(Good):
    """Weighs the loss by the number of passes in this step, which is in no state."""

    count = 0

    def start_step(self, ctx):
        self.count = 0

    def loss(self, ctx, batch):
        self.count += 1
        return {name: self.count * term for name, term in super().loss(ctx, batch).items()}


class NewClassesOnly(Good):
    """A mean over no pixel is NaN."""

    def loss(self, ctx, batch):
        logits, new = batch.output.logits, batch.labels >= ctx.step.new_positions[0]
        return {
            "ce": F.cross_entropy(
                logits.movedim(1, -1)[new & (batch.labels != 255)], batch.labels[new & (batch.labels != 255)]
            )
        }


class Overflows(Good):
    """Log of a probability that bfloat16 rounds to zero."""

    def loss(self, ctx, batch):
        small = batch.output.low.sigmoid() * 1e-3 + (1 - 1e-3)
        return super().loss(ctx, batch) | {
            "log": (1 - small.bfloat16().float()).log().mean() if small.dtype != torch.float32 else small.mean()
        }


class NotPlain(Good):
    plain_base = True

    def loss(self, ctx, batch):
        return {name: 2 * term for name, term in super().loss(ctx, batch).items()}


VIOLATIONS = [
    ("interface", NoLoss, "`loss` is missing"),
    ("interface", OtherArguments, r"end_step must take \(ctx\), not \(\)"),
    ("interface", PlainConfig, "Config must be a subclass"),
    ("interface", dict, "not a subclass of cssbench.api.Method"),
    ("options", NeedsOption, "needs values for weight"),
    ("options", TakesAnything, "accepts an option that it does not know"),
    ("runs", Raises, "step 0, loss: IndexError"),
    ("losses", LogsOnly, "step 0: no term has a gradient"),
    ("parameters", TrainsFrozen, "step 0: it holds a frozen parameter"),
    ("parameters", UnknownKey, "unknown key 'learning_rate'"),
    ("structure", AddsLayer, "start_step changed"),
    ("width", AddsOutput, "puts out 6 scores per pixel instead of 5"),
    ("frozen", MovesFrozen, "step 1: 'heads.0.weight' was frozen when training started"),
    ("frozen", MovesPrevious, "step 1: 'heads.0.weight' of the previous model changed"),
    ("batch", ChangesLabels, "in place"),
    ("batch", SwitchesMode, "between training and eval"),
    ("surroundings", ChangesThreads, "start_step changed torch's number of threads from 1 to 2"),
    ("deterministic", OwnDice, "a second run step 0 ends with another"),
    ("labels", Peeks, "with the labels of old and future classes exchanged, step 1"),
    ("images", Rereads, "with images of other steps replaced, step 1"),
    ("memory", KeepsImages, "self.kept keeps 2 images"),
    ("memory", KeepsNames, "self.names keeps 4 images, label maps or image names"),
    ("memory", KeepsContext, "self.ctx.train_loader keeps a loader"),
    ("state", KeepsFunction, "Path"),
    ("round trip", LosesState, r"state_dict\(\)\['count'\] is not what"),
    ("resume", CountsSteps, "resumed after step 0, step 1 ends with another"),
    ("resume inside", CountsIterations, "stopped inside step 2 and resumed, step 2 ends with another"),
    ("odd batches", NewClassesOnly, "only background: the term 'ce' is not finite"),
    ("half precision", Overflows, "bfloat16: the term 'log' is not finite"),
    ("plain base", NotPlain, "differs from what the model's own loss alone gives"),
]


def subject(cls: Any, folder: Path) -> Subject:
    return Subject(cls, {}, Rig(folder, "vit-linear", {}))


@pytest.mark.parametrize(("name", "cls", "reason"), VIOLATIONS, ids=[f"{n}-{c.__name__}" for n, c, _ in VIOLATIONS])
def test_a_planted_violation_is_found(name: str, cls: Any, reason: str, tmp_path: Path):
    with pytest.raises(Violation, match=reason):
        INVARIANTS[name][1](subject(cls, tmp_path))


def test_every_invariant_has_a_planted_violation():
    assert {name for name, _, _ in VIOLATIONS} == set(INVARIANTS)


def test_declared_memory_is_allowed(tmp_path: Path):
    INVARIANTS["memory"][1](subject(DeclaresMemory, tmp_path))


def test_a_violation_costs_no_other_finding():
    found = {one.name: one for one in conformance(SwitchesMode)}
    assert not found["batch"].passed
    assert all(one.passed for name, one in found.items() if name != "batch")


def test_nothing_is_tried_on_a_method_that_does_not_run(tmp_path: Path):
    found = {one.name: one for one in examine(subject(Raises, tmp_path))}
    assert found["runs"].passed is False
    assert [one.passed for one in found.values()] == [True, True, False] + [None] * (len(INVARIANTS) - 3)


def test_assert_conforms_names_what_failed():
    with pytest.raises(AssertionError, match=r"NoLoss on vit-linear violates\n  interface: `loss` is missing"):
        assert_conforms(NoLoss)


# --- the command --------------------------------------------------------------------------------------------------


def test_the_table_of_a_method(command):
    code, printed, _ = command("check", "finetune", "--model", "vit-linear")
    assert code == 0
    assert f"on vit-linear: {len(INVARIANTS)} of {len(INVARIANTS)} passed" in printed
    assert "FineTune from cssbench" in printed


def test_a_method_by_module_and_class(command, tmp_path: Path, monkeypatch):
    (tmp_path / "half_done.py").write_text(
        "from cssbench.api import Method\nclass Mine(Method):\n    def start_step(self):\n        pass\n"
        "    def loss(self, ctx, batch):\n        return {}\n"
    )
    monkeypatch.chdir(tmp_path)
    code, printed, _ = command("check", "half_done:Mine", "--model", "vit-linear")
    assert code == 1
    assert "interface: start_step must take (ctx), not ()" in printed


def test_a_method_that_takes_another_model_is_tried_there(command):
    code, printed, _ = command("check", "segvit-cl", "--set", "method.calibration=prior")
    assert code == 0
    assert "not tried on vit-linear: Method 'segvit-cl' needs a model with ATM heads" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mibb"], "Did you mean 'mib'?"),
        (["no_such_module:X"], "'no_such_module:X' cannot be imported: ModuleNotFoundError"),
        (["cssbench.baselines.mib:Mib"], "has no attribute 'Mib'"),
        (["mib", "--model", "resnet"], "There is no model named 'resnet'"),
        (["mib", "--model", "segvit-b"], "'segvit-b' is a preset: model 'segvit'"),
        (["mib", "--set", "train.iterations=3"], "method.key=value and model.key=value, not 'train'"),
        (["segvit-cl", "--model", "vit-linear"], "works with none of these models"),
        (["mib", "--set", "method.wieght=3"], "wieght"),
    ],
)
def test_a_mistake_is_one_clear_error(command, words: list[str], message: str):
    code, printed, error = command("check", *words)
    assert (code, message in error) == (2, True), error
    assert "Traceback" not in printed + error


def test_a_refusal_is_no_finding():
    class Refuses(Good):
        def start_step(self, ctx):
            raise ConfigError("needs another model")

    with pytest.raises(Refused, match="needs another model"):
        conformance(Refuses)
