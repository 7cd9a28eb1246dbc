"""The bench of the conformance kit: tiny scenes, a tiny model, three steps of the real task loop, and what is seen."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cssbench import config, progress
from cssbench.config import CheckpointConfig
from cssbench.errors import CssbenchError
from cssbench.experiment import Experiment, build_experiment, resolve
from cssbench.method import Method
from cssbench.task_loop import run
from cssbench.testing.watch import Watched

SIDE = 40  # px; a size that nothing else has, so that a tensor (..., SIDE, SIDE) is an image or a label map
CLASSES, STEPS = 8, 3
ORDER = [2, 6, 3, 8, 5, 1, 7, 4]  # the commonest first, so that later steps leave images out
VIT = {"name": "vit_tiny_patch16_224", "image_size": SIDE, "patch": 8, "width": 32, "depth": 2, "heads": 2}
TINY: dict[str, dict[str, Any]] = {
    "vit-linear": {"backbone": {**VIT, "layers": [1, 2], "drop_path": 0.0}},
    "setr-naive": {"backbone": {**VIT, "layers": [1, 2], "drop_path": 0.0}, "head_width": 16},
    "segmenter": {
        "backbone": {**VIT, "layers": [1, 2], "drop_path": 0.0},
        "decoder_layers": 1,
        "decoder_heads": 2,
    },
    "deeplabv3": {"backbone": {"name": "resnet10t"}, "width": 16, "dilations": [1, 2]},
    "segvit": {
        "backbone": {**VIT, "layers": [1, 2], "drop_path": 0.0},
        "head": {"width": 16, "heads": 2, "layers": 1, "init_std": 0.1},
    },
    "dtop": {
        "backbone": {**VIT, "layers": [1, 2], "drop_path": 0.0},
        "head": {"width": 16, "heads": 2, "layers": 1, "init_std": 0.1},
        "p0": 0.3,
        "keep": 2,
    },
    "setr-dtop": {
        "backbone": {**VIT, "layers": [1, 2], "drop_path": 0.0},
        "head_width": 16,
        "p0": 0.2,
        "keep": 2,
    },
    "shrunk": {
        "backbone": {**VIT, "layers": [2], "drop_path": 0.0},
        "head": {"width": 16, "heads": 2, "layers": 1, "init_std": 0.1},
        "down_layer": 1,
        "upsample_layers": 1,
        "upsample_queries": "bicubic",  # the kit feeds inputs that are not square
    },
}


class Refused(CssbenchError):
    """The method does not work with that model, and says so."""


@dataclass
class Trace:
    """What one run left: weights and method state after each step, what the watch complained of, how it ended."""

    folder: Path
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    trained: list[dict[str, Tensor]] = field(default_factory=list)  # weights before `end_step`
    complaints: dict[str, list[str]] = field(default_factory=dict)
    error: Exception | None = None
    error_at: str = ""

    def complain(self, invariant: str, reason: str) -> None:
        found = self.complaints.setdefault(invariant, [])
        if reason not in found:
            found.append(reason)


class Rig:
    """A folder with the scenario (4 + 2 + 2 classes) and 16 + 4 scenes, and the recipe of its runs."""

    def __init__(self, folder: Path, model: str, model_options: dict[str, Any]):
        self.folder, self.model = folder, model
        scenario = folder / "conformance.toml"
        scenario.write_text(f'dataset = "synthetic"\nclasses = {CLASSES}\norder = {ORDER}\nbase = 4\nincrement = 2\n')
        recipe = {
            "scenario": {"name": str(scenario)},
            "data": {"root": str(folder), "options": {"classes": CLASSES, "size": SIDE, "train": 16, "val": 4}},
            "method": {"name": "conformance"},
            "model": {"name": model} | TINY.get(model, {}) | model_options,
            "augment": {"crop": SIDE, "photometric": False, "scale": [0.8, 1.3]},
            "optim": {"lr": 2e-3, "head_lr_scale": 1.0, "clip": 5.0},
            "train": {"batch_size": 4, "iterations": [3, 2, 2], "accelerator": "cpu"},
            "checkpoint": {"minutes": "none"},
            "evaluate": {"crop": SIDE, "short_side": SIDE, "samples": 0, "geometries": ["full"], "flops_images": 0},
        }
        self.config = resolve(config.validate(recipe, "The recipe of the conformance kit"), parts=("model",))
        self._runs = 0

    def run(
        self,
        method: Method,
        change: str = "",
        probe: bool = False,
        source: Path | None = None,
        keep: int = 0,
        stop: tuple[int, int] | None = None,
    ) -> Trace:
        """Train and evaluate all steps, into a new run folder.

        change: what of the training data is replaced that no method may depend on: "labels", "images" or "both".
        probe: also feed odd batches. source, keep: go on from a copy of the first `keep` steps of that run.
        stop: (step, iteration) at which the run is stopped, with a checkpoint of every iteration before it.
        """
        out = self.folder / f"run-{self._runs}"
        self._runs += 1
        trace = Trace(out)
        with quiet():
            if source is not None:
                shutil.copytree(source, out)
                for step in sorted((out / "steps").iterdir())[keep:]:
                    shutil.rmtree(step)
            made = build_experiment(self.config, out, ["cssbench", "check"] if source is None else None, method)
            if source is None:
                made.folder.create()
            made.data = data = Altered(made, change)  # type: ignore[assignment]
            made.method = watched = Watched(method, made, trace, data, probe, stop)
            if stop is not None:
                made.config = made.config.model_copy(update={"checkpoint": CheckpointConfig(iterations=1)})
            try:
                run(made)
            except Exception as error:
                trace.error, trace.error_at = error, watched.where
        return trace


class Altered:
    """The dataset of a run with parts of its training split replaced, those of the step in hand left alone.

    labels: in the step's images, the ids of old and future classes change places; the learner's labels stay as they
            are, since all of them are background to it.
    images: images that do not belong to the step come as negatives, with empty label maps.
    """

    def __init__(self, made: Experiment, change: str):
        self._data, self._change = made.data, change
        self._stems = [frozenset(stems) for stems in made.train_stems]
        self._tables = []
        for step in made.scenario.steps:
            table = np.arange(256, dtype=np.uint8)
            others = [c for c in made.scenario.order if c not in step.new]
            table[others] = np.roll(others, 1)
            self._tables.append(table)
        self.step = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def image(self, split: str, stem: str) -> np.ndarray:
        image = self._data.image(split, stem)
        return 255 - image if self._foreign(split, stem) else image

    def label(self, split: str, stem: str) -> np.ndarray:
        label = self._data.label(split, stem)
        if self._foreign(split, stem):
            return np.zeros_like(label)
        return self._tables[self.step][label] if split == "train" and self._change in ("labels", "both") else label

    def pair(self, split: str, stem: str) -> tuple[np.ndarray, np.ndarray]:
        return self.image(split, stem), self.label(split, stem)

    def _foreign(self, split: str, stem: str) -> bool:
        changed = split == "train" and self._change in ("images", "both")
        return changed and stem not in self._stems[self.step]


@contextmanager
def quiet() -> Iterator[None]:
    """No news on the terminal, one thread (so that sums come out alike), everything as before afterwards."""
    was, threads = progress.console.quiet, torch.get_num_threads()
    progress.console.quiet = True
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        progress.console.quiet = was
        torch.set_num_threads(threads)
