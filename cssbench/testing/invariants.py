"""What every method promises, one function each, in the order in which a broken promise explains the next."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import tomli_w
import torch
from pydantic import ValidationError
from torch import Tensor

from cssbench import checkpoint
from cssbench.base_facts import is_plain
from cssbench.config import Section, plain
from cssbench.errors import ConfigError
from cssbench.method import Method
from cssbench.testing.rig import STEPS, Refused, Rig, Trace
from cssbench.testing.watch import Stopped

HOOKS = (
    "start_step", "param_groups", "loss", "after_backward", "after_update", "end_step", "state_dict", "load_state_dict",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """passed is None where it could not be tried, because something before it failed. reason: empty when passed."""

    name: str
    promise: str
    passed: bool | None
    reason: str = ""


class Violation(Exception):
    """The promise is broken; the message says how."""


@dataclass
class Subject:
    """A method under test, and its runs, each made when first needed."""

    cls: type[Method]
    options: dict[str, Any]
    rig: Rig
    _runs: dict[Any, Trace] = field(default_factory=dict)

    def make(self) -> Method:
        return self.cls(self.cls.Config(**self.options))

    def run(self, **how: Any) -> Trace:
        key = tuple(sorted(how.items()))
        if key not in self._runs:
            self._runs[key] = self.rig.run(self.make(), **how)
        return self._runs[key]

    @cached_property
    def plain_run(self) -> Trace:
        """The uninterrupted run. Raises Refused when the method does not take the model."""
        trace = self.run()
        if isinstance(trace.error, ConfigError) and trace.error_at == "step 0, start_step":
            raise Refused(str(trace.error))
        return trace


Check = Callable[[Subject], None]
INVARIANTS: dict[str, tuple[str, Check]] = {}


def invariant(name: str, promise: str) -> Callable[[Check], Check]:
    def keep(check: Check) -> Check:
        INVARIANTS[name] = promise, check
        return check

    return keep


def examine(subject: Subject) -> list[Finding]:
    """A finding per invariant; after interface, options or the run itself failed, the rest is not tried."""
    findings: list[Finding] = []
    usable = True
    for name, (promise, check) in INVARIANTS.items():
        if not usable:
            findings.append(Finding(name, promise, None, "not tried"))
            continue
        try:
            check(subject)
            findings.append(Finding(name, promise, True))
        except Refused:
            raise
        except Violation as broken:
            findings.append(Finding(name, promise, False, str(broken)))
        except Exception as error:
            findings.append(Finding(name, promise, False, f"{type(error).__name__}: {error}"))
        if name in ("interface", "options", "runs"):
            usable = findings[-1].passed is True
    return findings


@invariant("interface", "a subclass of Method whose Config is a Section, with `loss` and the hooks' own arguments")
def _interface(subject: Subject) -> None:
    cls = subject.cls
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise Violation(f"{cls!r} is not a subclass of cssbench.api.Method")
    if not (isinstance(cls.Config, type) and issubclass(cls.Config, Section)):
        raise Violation("Config must be a subclass of cssbench.api.Section")
    if cls.loss is Method.loss:
        raise Violation("`loss` is missing; it is the one hook that every method defines")
    for hook in HOOKS:
        wanted, found = inspect.signature(getattr(Method, hook)), inspect.signature(getattr(cls, hook))
        try:
            found.bind(*wanted.parameters)  # the loop passes them by position
        except TypeError:
            take, takes = (", ".join(list(one.parameters)[1:]) for one in (wanted, found))
            raise Violation(f"{hook} must take ({take}), not ({takes})") from None


@invariant("options", "options have defaults, unknown ones are refused, and a run's config.toml can hold them")
def _options(subject: Subject) -> None:
    config = subject.cls.Config
    try:
        made = config(**subject.options)
    except ValidationError as error:
        missing = [".".join(map(str, found["loc"])) for found in error.errors()]
        raise Violation(f"Config needs values for {', '.join(missing)}; give defaults, the paper's values") from None
    try:
        config.model_validate({**subject.options, "no option has this name": 1})
    except ValidationError:
        pass
    else:
        raise Violation("Config accepts an option that it does not know; leave `extra` as Section has it")
    if config.model_validate(plain(made)) != made:
        raise Violation("Config read back from what is written to config.toml differs")
    tomli_w.dumps(plain(made))


@invariant("runs", f"{STEPS} steps of training and evaluation end without an error")
def _runs(subject: Subject) -> None:
    trace = subject.plain_run
    if trace.error is not None:
        raise Violation(f"{trace.error_at}: {type(trace.error).__name__}: {trace.error}")


def _watched(name: str, promise: str, **how: Any) -> None:
    """An invariant that the watch of one run decides."""

    def check(subject: Subject) -> None:
        trace = subject.run(**how)
        if found := trace.complaints.get(name):
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise Violation(found[0] + more)
        _finished(trace)

    invariant(name, promise)(check)


def _finished(trace: Trace) -> None:
    if trace.error is not None:
        raise Violation(f"{trace.error_at}: {type(trace.error).__name__}: {trace.error}")


_watched("losses", "`loss` returns named finite scalars that have a gradient, at every step")
_watched("parameters", "`param_groups` holds each trained parameter once, none that is frozen, and known keys")
_watched("structure", "the model's modules, parameters and buffers change only when the loop grows it")
_watched("width", "after a step the model has one output per class seen so far, and background where it has one")
_watched("frozen", "what has no gradient when training starts is the same at the end, the previous model too")
_watched("batch", "`loss` leaves images, labels and the mode of the model alone")
_watched("surroundings", "global settings, and the working directory, come out of every hook as they went in")


@invariant("deterministic", "the same seed gives the same weights and state, bit for bit")
def _deterministic(subject: Subject) -> None:
    if _difference(subject.plain_run, subject.run(change="both")):  # equal: repeated, and blind to what was changed
        _equal(subject.plain_run, subject.rig.run(subject.make()), "a second run")


@invariant("labels", "no weight depends on labels of old or future classes")
def _labels(subject: Subject) -> None:
    _blind(subject, "labels", "with the labels of old and future classes exchanged,")


@invariant("images", "no weight depends on images, or their labels, that do not belong to the step")
def _images(subject: Subject) -> None:
    _blind(subject, "images", "with images of other steps replaced,")


def _blind(subject: Subject, change: str, words: str) -> None:
    if _difference(subject.plain_run, subject.run(change="both")):
        _equal(subject.plain_run, subject.run(change=change), words)


_watched("memory", "no image, label map or image name is kept after a step, beyond what `memory` declares")
_watched("state", "`state_dict` holds tensors, numbers, strings, lists and dicts of them, and nothing else")


@invariant("round trip", "a new object that loads the state gives the same state")
def _round_trip(subject: Subject) -> None:
    for index, state in enumerate(subject.plain_run.states):
        fresh = subject.make()
        fresh.load_state_dict(_reread(state))
        if path := _unequal(fresh.state_dict(), state):
            raise Violation(f"step {index}: state_dict(){path} is not what load_state_dict was given")


def _reread(state: dict[str, Any]) -> dict[str, Any]:
    return checkpoint.decode_state(checkpoint.encode_state(state), "of the method")


@invariant("resume", "resumed after any finished step, a run ends as an uninterrupted one, bit for bit")
def _resume(subject: Subject) -> None:
    for keep in range(1, STEPS):
        whole = subject.plain_run
        trace = subject.run(source=whole.folder, keep=keep)
        rest = replace(whole, weights=whole.weights[keep:], states=whole.states[keep:])
        _equal(rest, trace, f"resumed after step {keep - 1},", first=keep)


@invariant("resume inside", "resumed from a checkpoint inside a step, a run ends as an uninterrupted one, bit for bit")
def _resume_inside(subject: Subject) -> None:
    whole, step = subject.plain_run, STEPS - 1
    stopped = subject.run(stop=(step, 1))
    if not isinstance(stopped.error, Stopped):
        raise Violation(f"stopped inside step {step}, {stopped.error_at} raised {stopped.error}")
    trace = subject.run(source=stopped.folder, keep=STEPS)
    rest = replace(whole, weights=whole.weights[step:], states=whole.states[step:])
    _equal(rest, trace, f"stopped inside step {step} and resumed,", first=step)


_watched("odd batches", "finite losses and gradients: only background, only ignored, one class, not square", probe=True)
_watched("half precision", "finite losses and gradients under bfloat16 autocast", probe=True)


@invariant("plain base", "a method that declares `plain_base` trains step 0 exactly as fine-tuning does")
def _plain_base(subject: Subject) -> None:
    if not is_plain(subject.make()):
        return
    reference = subject.rig.run(Plain())
    mine = subject.plain_run.trained[0]
    if name := _first_difference(reference.trained[0], mine):
        raise Violation(f"step 0: {name!r} differs from what the model's own loss alone gives")


class Plain(Method):
    """The model's own loss, nothing else."""

    uses_previous = False

    def loss(self, ctx: Any, batch: Any) -> dict[str, Tensor]:
        return ctx.model.loss(batch.output, batch.labels)


# --- comparing runs -----------------------------------------------------------------------------------------------


def _equal(whole: Trace, other: Trace, words: str, first: int = 0) -> None:
    if other.error is not None:
        raise Violation(f"{words} {other.error_at} raised {type(other.error).__name__}: {other.error}")
    if found := _difference(whole, other, first):
        raise Violation(f"{words} {found}")


def _difference(one: Trace, other: Trace, first: int = 0) -> str:
    """Where two runs part, in words; empty when they are equal."""
    if other.error is not None:
        return f"{other.error_at} raised {type(other.error).__name__}: {other.error}"
    for index, (mine, its) in enumerate(zip(one.weights, other.weights, strict=True), first):
        if name := _first_difference(mine, its):
            return f"step {index} ends with another {name!r}"
    for index, (state, its_state) in enumerate(zip(one.states, other.states, strict=True), first):
        if path := _unequal(state, its_state):
            return f"step {index} ends with another state_dict(){path}"
    return ""


def _first_difference(mine: dict[str, Tensor], its: dict[str, Tensor]) -> str:
    return next((name for name in mine if name not in its or not torch.equal(mine[name], its[name])), "")


def _unequal(a: Any, b: Any, path: str = "") -> str:
    """The place where two states differ, as '["key"][0]'; empty when they do not."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.shape == b.shape and a.dtype == b.dtype and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
        return "" if same else path or " "
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return next((found for key in a if (found := _unequal(a[key], b[key], f"{path}[{key!r}]"))), "")
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = zip(a, b, strict=True)
        return next((found for i, (x, y) in enumerate(pairs) if (found := _unequal(x, y, f"{path}[{i}]"))), "")
    return "" if type(a) is type(b) and a == b else path or " "
