"""Loss terms and whatever a method logs: one CSV per step, and TensorBoard."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter


class StepLog:
    """Writes `logs/train-<step>.csv` (step, iteration, name, value) and TensorBoard events of one step.

    Opening it removes what an interrupted try at the same step left. `enabled=False` writes nothing (other processes).
    """

    def __init__(self, folder: Path, step: int, enabled: bool = True):
        self.step, self.enabled = step, enabled
        if enabled:
            events = folder / "tensorboard" / f"step-{step:02d}"
            shutil.rmtree(events, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            self.file = (folder / f"train-{step:02d}.csv").open("w", newline="", encoding="utf-8")
            self.rows = csv.writer(self.file)
            self.rows.writerow(["step", "iteration", "name", "value"])
            self.events = SummaryWriter(str(events))

    def __call__(self, name: str, value: float, iteration: int) -> None:
        if self.enabled:
            self.rows.writerow([self.step, iteration, name, repr(float(value))])
            self.file.flush()  # so that a person can watch
            self.events.add_scalar(name, value, iteration)

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.enabled:
            self.file.close()
            self.events.close()
