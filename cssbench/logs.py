"""What a run says of itself while it trains: loss terms, scores after each step, sample images.

Loss terms and whatever a method logs always go into one CSV per step (`StepLog`). The loggers of the recipe's `[log]`
section are told too (`RunLog`): TensorBoard unless it says otherwise. A package adds one under the entry-point group
`cssbench.loggers`: a subclass of `Logger`. One that fails is named once and left out; training goes on.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from cssbench import registry
from cssbench.errors import RunError
from cssbench.progress import say
from cssbench.results import image_name

HEADER = ["step", "iteration", "name", "value"]


@dataclass(frozen=True)
class LoggedRun:
    """What a logger may know of its run. folder: of the run; loggers keep their files in `folder / "logs"`.

    settings: the resolved recipe as plain data. project: `log.project`. iterations: optimiser steps of each step.
    """

    folder: Path
    settings: dict[str, Any]
    project: str
    iterations: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def overall(self, step: int, iteration: int) -> int:
        """`iteration` of `step`, counted from the start of step 0: an axis that never runs backwards."""
        return sum(self.iterations[:step]) + iteration


class Logger:
    """Where a run's numbers go beside the CSV. Built as `cls(run)` by the first process whenever the run starts or
    resumes. Every hook may be left out, and may raise: the logger is then named once and left out."""

    def __init__(self, run: LoggedRun):
        self.run = run

    @classmethod
    def check(cls) -> None:
        """Before anything is trained: raise ConfigError where what the logger needs is not installed."""

    def start_step(self, step: int, start: int) -> None:
        """Training of `step` begins, or goes on, with iteration `start`."""

    def scalar(self, name: str, value: float, step: int, iteration: int) -> None:
        """A loss term, the learning rate, or what a method logs."""

    def scores(self, step: int, scores: dict[str, float]) -> None:
        """After `step`: "base/<protocol>", "incremental/<protocol>" and "all/<protocol>" -> mIoU in [0, 1]."""

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        """After `step`: (h, w, 3) uint8, a sample image, its truth and the prediction side by side."""

    def close(self) -> None:
        """The run ends, or stops."""


@dataclass
class RunLog:
    """The loggers of a run that still work: name -> logger."""

    run: LoggedRun
    loggers: dict[str, Logger] = field(default_factory=dict)

    @classmethod
    def open(cls, run: LoggedRun, classes: dict[str, type[Logger]]) -> RunLog:
        log = cls(run)
        for name, made in classes.items():
            log._try(name, partial(made, run), keep=True)
        return log

    def tell(self, hook: str, *values: Any) -> None:
        """Call a hook of every logger."""
        for name, logger in list(self.loggers.items()):
            self._try(name, partial(getattr(logger, hook), *values))

    def _try(self, name: str, call: Callable[[], Any], keep: bool = False) -> None:
        try:
            found = call()
        except Exception as error:  # whatever a service or a stranger's code raises: training goes on
            self.loggers.pop(name, None)
            say(
                f"The logger {name!r} failed ({registry.describe(error)}) and is left out from here on; training goes "
                f"on, and {self.run.folder / 'logs'} has the CSV."
            )
        else:
            if keep:
                self.loggers[name] = found

    def evaluated(self, step: int, scores: dict[str, float], folder: Path, stems: Sequence[str]) -> None:
        """Tell scores, and show each sample image of the step whose pictures lie in `folder`."""
        self.tell("scores", step, scores)
        for stem in stems if self.loggers else ():
            if (triple := sample_triple(self.run.folder, folder, stem)) is not None:
                self.tell("image", stem, triple, step)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.tell("close")
        self.loggers.clear()


def logger_class(name: str) -> type[Logger]:
    """The logger `name`. Raises UnknownNameError; PluginError unless it is a Logger; ConfigError where it lacks what it
    needs."""
    cls = registry.load_class("loggers", name, Logger, [])
    cls.check()
    return cls


def sample_triple(run: Path, step: Path, stem: str) -> np.ndarray | None:
    """(h, 3 w, 3) uint8: image, truth, prediction after a step, as `step_evaluation.save_pictures` wrote them; None
    where one is missing."""
    name = image_name(stem)
    files = [run / "samples" / f"{name}.{kind}.png" for kind in ("image", "truth")] + [step / "samples" / f"{name}.png"]
    if not all(file.exists() for file in files):
        return None
    pictures = []
    for file in files:
        with Image.open(file) as picture:
            pictures.append(np.array(picture.convert("RGB")))
    return np.concatenate(pictures, axis=1)


class StepLog:
    """Writes `train-<step>.csv` (step, iteration, name, value) in `folder`, and tells the loggers of the run.

    start: the iteration with which training goes on. What an interrupted try logged before it stays and is not logged
    again; what it logged later is removed. `enabled=False` writes nothing (other processes).
    Raises RunError when the file cannot be written.
    """

    def __init__(self, folder: Path, step: int, enabled: bool = True, start: int = 0, run_log: RunLog | None = None):
        self.step, self.enabled, self.start, self.run_log = step, enabled, start, run_log
        self.path = folder / f"train-{step:02d}.csv"
        if enabled:
            self._write(rows_before(self.path, start), "w")
            if run_log:
                run_log.tell("start_step", step, start)

    def __call__(self, name: str, value: float, iteration: int) -> None:
        if self.enabled and iteration >= self.start:
            self._write([[str(self.step), str(iteration), name, repr(float(value))]], "a")
            if self.run_log:
                self.run_log.tell("scalar", name, float(value), self.step, iteration)

    def _write(self, rows: list[list[str]], mode: str) -> None:
        """Opened for each line, so that a person can watch, and a full disk is noticed here."""
        text = io.StringIO()
        csv.writer(text).writerows(rows)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open(mode, newline="", encoding="utf-8") as file:
                file.write(text.getvalue())
        except OSError as error:
            raise RunError(
                f"{self.path} could not be written: {error.strerror or error}. Free disk space or mend the "
                f"permissions, then `cssbench resume` the run."
            ) from error


def rows_before(path: Path, iteration: int) -> list[list[str]]:
    """The header, and the rows of a log before `iteration`; a last line that was cut short is left out."""
    if not iteration or not path.exists():
        return [HEADER]
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = [row for row in csv.reader(file) if len(row) == len(HEADER) and row[1].isdecimal()]
    return [HEADER, *(row for row in rows if int(row[1]) < iteration)]
