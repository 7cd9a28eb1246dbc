"""Checkpoints inside a step: from the newest sound one, training goes on to the bits of a run that never stopped.

steps/<t>/training/
  <iteration>.safetensors   what `trainer.Training.state_dict` returns: weights, optimiser, loss scale, random numbers
                            of every process, the method's state, the loss so far
  <iteration>.json          iteration, SHA-256 of the file above, processes, seconds so far, who wrote it; written last
The newest two are kept while the step trains. They go when the step is finished.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cssbench import checkpoint, provenance
from cssbench.errors import RunError
from cssbench.interrupt import Interrupted, Signals
from cssbench.progress import say
from cssbench.results import content_digest, read_json, write_bytes, write_json
from cssbench.scenario import Step

if TYPE_CHECKING:
    from cssbench.experiment import Experiment
    from cssbench.trainer import Training

KEPT = 2
SAVE = 1  # what processes agree on: nothing, to save, or (the number of a signal, at least 2) to save and stop


class StepCheckpoints:
    """Of one step of one run. `start`: the iteration that `load` found, 0 where training begins; `seconds`: what
    training took up to there."""

    def __init__(self, made: Experiment, step: Step, signals: Signals):
        self.fabric, self.config, self.signals = made.fabric, made.config.checkpoint, signals
        self.every = made.config.train.log_every
        self.step, self.folder = step, made.folder.step_folder(step.index) / "training"
        self.start, self.seconds = 0, 0.0
        self.about: dict[str, Any] = {}
        self.state: dict[str, Any] | None = None
        self.began = self.saved = time.monotonic()

    @property
    def record(self) -> dict[str, Any]:
        """What the step's record says: nothing, or from where training went on and who had trained until there."""
        names = ("iteration", "commit", "when", "processes", "earlier")
        return {"resumed": {name: self.about[name] for name in names if name in self.about}} if self.start else {}

    def load(self) -> int:
        """Find the newest sound checkpoint; the iteration from which training goes on. All processes call it."""
        self.about = self.fabric.broadcast(self._newest() if self.fabric.is_global_zero else {})
        if self.about:
            path = self._path(self.about["iteration"])
            self.state = checkpoint.load_state(path)
            self.start, self.seconds = self.about["iteration"], self.about["seconds"]
            say(f"step {self.step.index}: goes on at iteration {self.start} of {self.about['iterations']}")
        return self.start

    def _newest(self) -> dict[str, Any]:
        passed = ""
        for path in sorted(self.folder.glob("*.json"), reverse=True):
            try:
                about = read_json(path)
                content = self._path(about["iteration"]).read_bytes()
                if about["digest"] == content_digest(about) and about["sha256"] == hashlib.sha256(content).hexdigest():
                    if passed:
                        say(f"{passed}; the one of iteration {about['iteration']} is used")
                    return about
            except (RunError, OSError, KeyError, TypeError, AttributeError, ValueError):
                pass
            passed = f"step {self.step.index}: the checkpoint {path.with_suffix('.safetensors')} is damaged"
        if passed:
            say(f"{passed}; the step is trained from its start")
        return {}

    def _path(self, iteration: int) -> Path:
        return self.folder / f"{int(iteration):08d}.safetensors"

    def restore(self, training: Training) -> int:
        """Bring `training` to where it was; the iteration with which it goes on."""
        if self.state is None:
            training.method.state_dict()  # what cannot be kept shows at the start, not minutes later
        else:
            training.load_state_dict(self.state)
            if self.about["processes"] != self.fabric.world_size:
                say(
                    f"step {self.step.index}: this checkpoint is of {self.about['processes']} processes, now there are "
                    f"{self.fabric.world_size}: the result differs in its last digits"
                )
            self.state = None
        return self.start

    def after(self, done: int, total: int, training: Training) -> None:
        """Called after every iteration, `done` of `total`: saves where it is due. Raises Interrupted when a signal
        came; then it has saved too."""
        wanted = self.signals.received or (SAVE if self._due(done) else 0)
        if self.fabric.world_size > 1:
            if done % self.every and not self._by_count(done):  # agreeing makes a GPU wait
                return
            flag = torch.tensor(wanted, device=self.fabric.device)
            wanted = int(torch.as_tensor(self.fabric.all_reduce(flag, reduce_op="max")))
        if wanted:
            self.save(done, total, training)
        if wanted > SAVE:
            raise Interrupted(wanted)

    def _due(self, done: int) -> bool:
        minutes = self.config.minutes
        late = minutes is not None and time.monotonic() - self.saved >= 60 * minutes
        return late or self._by_count(done)

    def _by_count(self, done: int) -> bool:
        return self.config.iterations is not None and done % self.config.iterations == 0

    def end(self, total: int, training: Training) -> None:
        """Training is over, evaluation to come: save what took more than a minute, or a tenth of `minutes`."""
        minutes = self.config.minutes
        flag = minutes is not None and time.monotonic() - self.saved >= 60 * min(1.0, minutes / 10)
        if self.fabric.broadcast(flag):
            self.save(total, total, training)

    def save(self, done: int, total: int, training: Training) -> None:
        """All processes call it. Raises RunError where it cannot be written; older checkpoints are whole then."""
        state = training.state_dict()
        if self.fabric.is_global_zero:
            content = checkpoint.encode_state(state)
            write_bytes(self._path(done), content)
            found = self._origin
            about = {
                "step": self.step.index,
                "iteration": done,
                "iterations": total,
                "processes": self.fabric.world_size,
                "seconds": round(self.seconds + time.monotonic() - self.began, 3),
                "sha256": hashlib.sha256(content).hexdigest(),
                "commit": found["commit"],
                "version": found["version"],
                "when": datetime.now(UTC).isoformat(timespec="seconds"),
                "hardware": found["hardware"],
            }
            if self.start:
                about["earlier"] = [*self.about.get("earlier", []), self.start]
            write_json(self._path(done).with_suffix(".json"), about | {"digest": content_digest(about)})
            self._forget()
        self.fabric.barrier()
        self.saved = time.monotonic()

    @cached_property
    def _origin(self) -> dict[str, Any]:
        """Code and machine; asked once, since it starts git."""
        return provenance.collect([])

    def _forget(self) -> None:
        for path in sorted(self.folder.glob("*.json"))[:-KEPT]:
            path.unlink()
            path.with_suffix(".safetensors").unlink(missing_ok=True)
        for rest in self.folder.glob(".*.tmp"):  # of a process that was killed while it wrote
            rest.unlink(missing_ok=True)

    def clear(self) -> None:
        """The step is finished."""
        if self.fabric.is_global_zero:
            shutil.rmtree(self.folder, ignore_errors=True)
