"""Loss terms and whatever a method logs: one CSV per step, and TensorBoard."""

from __future__ import annotations

import csv
import io
import shutil
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter

from cssbench.errors import RunError

HEADER = ["step", "iteration", "name", "value"]


class StepLog:
    """Writes `logs/train-<step>.csv` (step, iteration, name, value) and TensorBoard events of one step.

    start: the iteration with which training goes on. What an interrupted try logged before it stays and is not logged
    again; what it logged later is removed. `enabled=False` writes nothing (other processes).
    Raises RunError when the file cannot be written.
    """

    def __init__(self, folder: Path, step: int, enabled: bool = True, start: int = 0):
        self.step, self.enabled, self.start = step, enabled, start
        if enabled:
            self.path, events = folder / f"train-{step:02d}.csv", folder / "tensorboard" / f"step-{step:02d}"
            if not start:
                shutil.rmtree(events, ignore_errors=True)
            self._write(rows_before(self.path, start), "w")
            self.events = SummaryWriter(str(events), purge_step=start or None)

    def __call__(self, name: str, value: float, iteration: int) -> None:
        if self.enabled and iteration >= self.start:
            self._write([[str(self.step), str(iteration), name, repr(float(value))]], "a")
            self.events.add_scalar(name, value, iteration)

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

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.enabled:
            self.events.close()


def rows_before(path: Path, iteration: int) -> list[list[str]]:
    """The header, and the rows of a log before `iteration`; a last line that was cut short is left out."""
    if not iteration or not path.exists():
        return [HEADER]
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = [row for row in csv.reader(file) if len(row) == len(HEADER) and row[1].isdecimal()]
    return [HEADER, *(row for row in rows if int(row[1]) < iteration)]
