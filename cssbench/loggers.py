"""The loggers that come with cssbench: TensorBoard, Weights & Biases, MLflow. The interface is `cssbench.logs.Logger`.

The latter two are extras. Accounts, servers and offline modes are their own business, set by their own environment
variables (WANDB_MODE=offline, MLFLOW_TRACKING_URI, ...). Each keeps the id of its run in the run folder, so that a
resumed run goes on in the same one.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from cssbench.errors import ConfigError
from cssbench.logs import LoggedRun, Logger


def require(module: str, extra: str) -> None:
    """Raises ConfigError, naming the extra of cssbench, unless the module is installed."""
    if find_spec(module) is None:
        raise ConfigError(
            f"log.loggers names {extra!r}, which needs the package {module!r}. Install it with "
            f'`pip install "cssbench[{extra}]"`, or leave {extra!r} out.'
        )


class TensorBoard(Logger):
    """`logs/tensorboard/step-<step>`: scalars by iteration; `logs/tensorboard/scores`: scores and samples by step."""

    def __init__(self, run: LoggedRun):
        super().__init__(run)
        self.folder = run.folder / "logs" / "tensorboard"
        self.events: Any = None

    def start_step(self, step: int, start: int) -> None:
        self.close()
        events = self.folder / f"step-{step:02d}"
        if not start:
            shutil.rmtree(events, ignore_errors=True)
        self.events = _writer(events, purge_step=start or None)

    def scalar(self, name: str, value: float, step: int, iteration: int) -> None:
        self.events.add_scalar(name, value, iteration)

    def scores(self, step: int, scores: dict[str, float]) -> None:
        with _writer(self.folder / "scores") as events:
            for name, value in scores.items():
                events.add_scalar(f"mIoU/{name}", value, step)

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        with _writer(self.folder / "scores") as events:
            events.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        if self.events:
            self.events.close()
            self.events = None


def _writer(folder: Path, **how: Any) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), **how)


class WandB(Logger):
    """A run of Weights & Biases: `train/<name>` over `iteration` (of all steps), `mIoU/<name>` over `step`."""

    @classmethod
    def check(cls) -> None:
        require("wandb", "wandb")

    def __init__(self, run: LoggedRun):
        import wandb

        super().__init__(run)
        folder = run.folder / "logs"
        self.made = wandb.init(
            project=run.project,
            name=run.name,
            id=remembered(folder / "wandb-run", lambda: uuid.uuid4().hex[:8]),
            resume="allow",
            dir=str(folder),
            config=run.settings,
        )
        self.made.define_metric("train/*", step_metric="iteration")
        self.made.define_metric("mIoU/*", step_metric="step")

    def scalar(self, name: str, value: float, step: int, iteration: int) -> None:
        self.made.log({f"train/{name}": value, "step": step, "iteration": self.run.overall(step, iteration)})

    def scores(self, step: int, scores: dict[str, float]) -> None:
        self.made.log({"step": step} | {f"mIoU/{name}": value for name, value in scores.items()})

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        import wandb

        self.made.log({"step": step, f"samples/{name}": wandb.Image(image, caption=f"step {step}")})

    def close(self) -> None:
        self.made.finish()


class MLflow(Logger):
    """A run of MLflow: metrics `train/<name>` by iteration (of all steps) and `mIoU/<name>` by step, samples as images.

    Without MLFLOW_TRACKING_URI it goes into `logs/mlflow` of the run folder.
    """

    MOST = 200  # metrics sent at once

    @classmethod
    def check(cls) -> None:
        require("mlflow", "mlflow")

    def __init__(self, run: LoggedRun):
        from mlflow.tracking import MlflowClient

        super().__init__(run)
        folder = run.folder / "logs"
        self.waiting: list[Any] = []
        self.client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or _own_store(folder / "mlflow"))
        self.id = remembered(folder / "mlflow-run", self._create)
        self.client.update_run(self.id, status="RUNNING")

    def _create(self) -> str:
        known = self.client.get_experiment_by_name(self.run.project)
        experiment = known.experiment_id if known else self.client.create_experiment(self.run.project)
        found: str = self.client.create_run(experiment, run_name=self.run.name).info.run_id
        for name, value in flat(self.run.settings).items():
            self.client.log_param(found, name, str(value)[:500])
        return found

    def scalar(self, name: str, value: float, step: int, iteration: int) -> None:
        self._metric(f"train/{name}", value, self.run.overall(step, iteration))

    def scores(self, step: int, scores: dict[str, float]) -> None:
        for name, value in scores.items():
            self._metric(f"mIoU/{name.replace('@', '-')}", value, step)  # '@' may not stand in a metric's name
        self._send()

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        self.client.log_image(self.id, image, artifact_file=f"samples/step-{step:02d}/{Path(name).name}.png")

    def close(self) -> None:
        self._send()
        self.client.set_terminated(self.id)

    def _metric(self, name: str, value: float, at: int) -> None:
        from mlflow.entities import Metric

        self.waiting.append(Metric(name, value, int(1000 * time.time()), at))
        if len(self.waiting) >= self.MOST:
            self._send()

    def _send(self) -> None:
        if self.waiting:
            self.client.log_batch(self.id, metrics=self.waiting)
            self.waiting = []


def _own_store(folder: Path) -> str:
    """A store of plain files. MLflow 3 has them switched off, and a database needs more than mlflow-skinny."""
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    return folder.resolve().as_uri()


def remembered(path: Path, make: Any) -> str:
    """The text of a file; where there is none, what `make` returns, which is written there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(make(), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
