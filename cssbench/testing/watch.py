"""A method under observation: every hook is passed on, and what it does to its surroundings is noted."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cssbench import checkpoint, contract
from cssbench.errors import RunError
from cssbench.experiment import Experiment
from cssbench.method import Batch, Method, StepContext
from cssbench.scenario import IGNORE

if TYPE_CHECKING:
    from cssbench.testing.rig import Altered, Trace


class Stopped(Exception):
    """Ends a run inside a step, on purpose."""


class Watched(Method):
    """Stands in for `inner` in the task loop. `where` says in which hook of which step it is."""

    def __init__(self, inner: Method, made: Experiment, trace: Trace, data: Altered, probe: bool, stop: Any = None):
        self.inner, self.made, self.trace, self.data, self.probe, self.stop = inner, made, trace, data, probe, stop
        self.config = inner.config
        self.uses_previous, self.memory = inner.uses_previous, inner.memory
        self.where, self.ended = "before the first step", False
        self.structure: dict[str, Any] = {}
        self.still: dict[str, Tensor] | None = None
        self.previous: dict[str, Tensor] = {}

    # --- hooks --------------------------------------------------------------------------------------------------

    def start_step(self, ctx: StepContext) -> None:
        self.data.step, self.ended = ctx.step.index, False
        self.structure = structure(ctx.model)
        self.previous = copy_of(ctx.previous)
        self.still = None
        with self._hook("start_step", ctx):
            self.inner.start_step(ctx)

    def param_groups(self, ctx: StepContext) -> list[dict[str, Any]]:
        with self._hook("param_groups", ctx):
            groups = self.inner.param_groups(ctx)
        wrong = contract.wrong_groups(groups)
        if wrong is None and not all(p.requires_grad for group in groups for p in group["params"]):
            wrong = "it holds a frozen parameter"
        if wrong:
            self._complain("parameters", ctx, wrong)
        return groups

    def loss(self, ctx: StepContext, batch: Batch) -> dict[str, Tensor]:
        if self.stop == (ctx.step.index, ctx.iteration):
            raise Stopped
        if self.still is None:  # training starts: what is frozen now stays so
            self.still = frozen(ctx.model)
            if self.probe:
                self._probe(ctx)
        assert batch.images is not None, "the kit stores no features"
        images, labels, mode = batch.images.clone(), batch.labels.clone(), ctx.model.training
        with self._hook("loss", ctx):
            terms = self.inner.loss(ctx, batch)
        if not torch.equal(images, batch.images) or not torch.equal(labels, batch.labels):
            self._complain("batch", ctx, "loss changed batch.images or batch.labels in place; work on a clone")
        if ctx.model.training != mode:
            self._complain("batch", ctx, "loss switched the model between training and eval mode")
            ctx.model.train(mode)
        if isinstance(terms, dict) and not any(getattr(term, "requires_grad", False) for term in terms.values()):
            self._complain("losses", ctx, "no term has a gradient, so nothing is learned")
        return terms

    def after_backward(self, ctx: StepContext) -> None:
        with self._hook("after_backward", ctx):
            self.inner.after_backward(ctx)

    def after_update(self, ctx: StepContext) -> None:
        with self._hook("after_update", ctx):
            self.inner.after_update(ctx)

    def end_step(self, ctx: StepContext) -> None:
        self.trace.trained.append(copy_of(ctx.model))
        with self._hook("end_step", ctx):
            self.inner.end_step(ctx)
        self._complain_of_changes(ctx)
        with torch.random.fork_rng(), torch.no_grad():
            found = ctx.model.eval()(next(iter(ctx.train_loader))["images"][:1]).scores.shape[1]
        wanted = len(ctx.step.seen) + ctx.model.has_background
        if found != wanted:
            self._complain("width", ctx, f"the model puts out {found} scores per pixel instead of {wanted}")
        self._complain_of_samples(ctx)
        self.trace.weights.append(copy_of(ctx.model))
        self.ended = True

    def state_dict(self) -> dict[str, Any]:
        state = self.inner.state_dict()
        try:
            checkpoint.encode_state(state)
        except RunError as error:
            self.trace.complain("state", str(error))
        if self.ended:  # and not within a step, for a checkpoint
            self.trace.states.append(state if not isinstance(state, dict) else clone(state))
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)

    # --- what is noted ------------------------------------------------------------------------------------------

    def _complain(self, invariant: str, ctx: StepContext, reason: str) -> None:
        self.trace.complain(invariant, f"step {ctx.step.index}: {reason}")

    @contextmanager
    def _hook(self, name: str, ctx: StepContext) -> Iterator[None]:
        """Around a call of the method: global settings and the model's structure must come out as they went in."""
        self.where = f"step {ctx.step.index}, {name}"
        before = surroundings()
        yield
        for what, (value, restore) in surroundings().items():
            if value != before[what][0]:
                self._complain("surroundings", ctx, f"{name} changed {what} from {before[what][0]} to {value}")
                restore(before[what][0])
        now = structure(ctx.model)
        changed = sorted(k for k in now.keys() | self.structure.keys() if now.get(k) != self.structure.get(k))
        if changed:
            self._complain("structure", ctx, f"{name} changed {changed[0]!r}, {len(changed)} entries in all")
            self.structure = now

    def _complain_of_changes(self, ctx: StepContext) -> None:
        now = ctx.model.state_dict()
        moved = [name for name, value in (self.still or {}).items() if name in now and differ(now[name], value)]
        if moved:
            self._complain("frozen", ctx, f"{moved[0]!r} was frozen when training started, and changed")
        for name, value in copy_of(ctx.previous).items():
            if differ(value, self.previous[name]):
                self._complain("frozen", ctx, f"{name!r} of the previous model changed")
                break
        if ctx.previous is not None and (ctx.previous.training or trainable(ctx.previous)):
            self._complain("frozen", ctx, "the previous model was put in training mode or given gradients")

    def _complain_of_samples(self, ctx: StepContext) -> None:
        stems = {stem for step in self.made.train_stems for stem in step}
        side = self.made.config.augment.crop
        kept: dict[str, int] = {}
        for place, count in samples({"self": vars(self.inner), "state_dict()": self.inner.state_dict()}, stems, side):
            if count < 0:
                self._complain("memory", ctx, f"{place} keeps a loader, so images of this step; drop it in end_step")
            kept[place] = max(count, 0)
        allowed = self.inner.memory
        if max(kept.values(), default=0) > allowed:
            place = max(kept, key=lambda name: kept[name])
            self._complain(
                "memory",
                ctx,
                f"{place} keeps {kept[place]} images, label maps or image names, and the method declares "
                f"`memory = {allowed}`",
            )

    def _probe(self, ctx: StepContext) -> None:
        """Odd batches, each forward and backward; gradients are thrown away."""
        for name, labels, half in odd_batches(ctx):
            invariant = "half precision" if half else "odd batches"
            images = torch.randn(len(labels), 3, *labels.shape[1:])
            try:
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    previous = None
                    if ctx.previous is not None and self.inner.uses_previous:
                        with torch.no_grad():
                            previous = ctx.previous(images)
                    output = ctx.model(images, **ctx.model.training_inputs(labels))
                    terms = self.inner.loss(ctx, Batch(images, labels, output, previous, ["probe"] * len(labels)))
                total = torch.stack(list(terms.values())).sum()
                bad = [key for key, term in terms.items() if not torch.isfinite(term)]
                if total.requires_grad:
                    total.backward()
                grads = [p.grad for p in ctx.model.parameters() if p.grad is not None]
                if bad:
                    self._complain(invariant, ctx, f"{name}: the term {bad[0]!r} is not finite")
                elif not all(torch.isfinite(grad).all() for grad in grads):
                    self._complain(invariant, ctx, f"{name}: the loss is finite, its gradient is not")
            except Exception as error:  # whatever a stranger's loss raises is its answer
                self._complain(invariant, ctx, f"{name}: {type(error).__name__}: {error}")
            ctx.model.zero_grad(set_to_none=True)


def odd_batches(ctx: StepContext) -> Iterator[tuple[str, Tensor, bool]]:
    """(what is odd, labels (2, H, W), half precision?)."""
    side = next(iter(ctx.train_loader))["labels"].shape[-1]
    first, last = ctx.step.new_positions[0], ctx.step.new_positions[-1]
    mixed = torch.zeros(2, side, side, dtype=torch.int64)
    mixed[0, :, side // 2 :], mixed[1, : side // 2], mixed[:, :2] = first, last, IGNORE
    yield "only background", torch.zeros_like(mixed), False
    yield "only ignored pixels", torch.full_like(mixed, IGNORE), False
    yield "only one class", torch.full_like(mixed, first), False
    yield "one image without labels", torch.stack([mixed[0], torch.full_like(mixed[0], IGNORE)]), False
    yield "higher than wide", torch.cat([mixed, mixed[:, :16]], dim=1), False
    yield "a usual batch in bfloat16", mixed, True
    yield "only background in bfloat16", torch.zeros_like(mixed), True


def structure(model: nn.Module) -> dict[str, Any]:
    """Module name -> type, parameter or buffer name -> shape."""
    kinds = {f"module {name}": type(module).__name__ for name, module in model.named_modules()}
    return kinds | {name: tuple(value.shape) for name, value in model.state_dict().items()}


def copy_of(model: nn.Module | None) -> dict[str, Tensor]:
    return {} if model is None else {name: value.detach().clone() for name, value in model.state_dict().items()}


def frozen(model: nn.Module) -> dict[str, Tensor]:
    """Parameters without gradient, and buffers of modules in eval mode."""
    found = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    for place, module in model.named_modules():
        if not module.training:
            found |= {f"{place}.{name}".lstrip("."): b for name, b in module.named_buffers(recurse=False)}
    return {name: value.detach().clone() for name, value in found.items()}


def trainable(model: nn.Module) -> bool:
    return any(p.requires_grad for p in model.parameters())


def differ(a: Tensor, b: Tensor) -> bool:
    return a.shape != b.shape or not torch.equal(a, b)


def surroundings() -> dict[str, tuple[Any, Callable[[Any], Any]]]:
    """Global setting -> (value, how to set it)."""
    return {
        "torch's default dtype": (torch.get_default_dtype(), torch.set_default_dtype),
        "whether gradients are recorded": (torch.is_grad_enabled(), torch.set_grad_enabled),
        "torch's number of threads": (torch.get_num_threads(), torch.set_num_threads),
        "torch's deterministic mode": (
            torch.are_deterministic_algorithms_enabled(),
            torch.use_deterministic_algorithms,
        ),
        "the working directory": (os.getcwd(), os.chdir),
    }


def samples(value: Any, stems: set[str], side: int, place: str = "", seen: set[int] | None = None) -> Iterator:
    """(place, number of images, label maps or image names kept there; -1 for a loader), for every place that has any.

    Looks into dicts, lists, tuples, sets and the attributes of plain objects; not into modules.
    """
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor | np.ndarray):
        if value.ndim >= 2 and tuple(value.shape[-2:]) == (side, side):
            channels = 3 if value.ndim >= 3 and value.shape[-3] == 3 else 1
            yield place, int(np.prod(value.shape[:-2])) // channels or 1
    elif isinstance(value, DataLoader):
        yield place, -1
    elif isinstance(value, dict):
        names = [key for key in (*value.keys(), *value.values()) if isinstance(key, str) and key in stems]
        if names:
            yield place, len(set(names))
        for key, part in value.items():
            yield from samples(part, stems, side, f"{place}.{key}" if place else str(key), seen)
    elif isinstance(value, list | tuple | set | frozenset):
        names = [part for part in value if isinstance(part, str) and part in stems]
        if names:
            yield place, len(set(names))
        tensors = sum(count for part in value for _, count in samples(part, stems, side, place, seen))
        if tensors:
            yield place, tensors
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type) and not callable(value):
        yield from samples(vars(value), stems, side, place, seen)


def clone(value: Any) -> Any:
    """A deep copy of a method's state."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: clone(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(clone(part) for part in value)
    return value
