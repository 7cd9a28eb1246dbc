"""What a suite will cost: seconds from runs that are there, from a few real iterations, or from the machine's speed.

A *kind* of iteration is what makes it equally long: model, crop, batch, precision and device, and at later steps the
method. A run's evaluation after each step is taken to be as long as a whole one.
"""

from __future__ import annotations

import csv
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from cssbench.config import RunConfig
from cssbench.errors import ConfigError, CssbenchError
from cssbench.progress import say
from cssbench.results import RunFolder, content_digest
from cssbench.suites.plan import Planned

Kind = tuple[str, str]  # digest of the settings, "base" or "later"
ITERATIONS = 6  # of each kind that is measured; the first two are left out
IMAGES = 4  # that are evaluated for a measurement
BACKWARD = 3  # a training pass costs about three forward passes


@dataclass
class Rates:
    """Seconds per iteration of each kind, and seconds per evaluation, with words on where they come from."""

    train: dict[Kind, float]
    evaluate: dict[str, float]
    source: str

    def seconds(self, one: Planned, shares: bool) -> float | None:
        """Of a run, None where a kind is unknown. shares: it takes its base step from another."""
        config = resolved(one)
        total = 0.0
        for step, count in enumerate(one.iterations):
            if step == 0 and shares:
                continue
            rate = self.train.get(kind(config, step))
            if rate is None:
                return None
            total += count * rate
        evaluations = len(one.iterations) - shares
        return total + evaluations * self.evaluate.get(_evaluated(config), 0.0)


def resolved(one: Planned) -> RunConfig:
    from cssbench.experiment import resolve

    return resolve(one.run.config)


def kind(config: RunConfig, step: int) -> Kind:
    facts = {
        "model": config.model.model_dump(mode="json"),
        "crop": config.augment.crop,
        "train": config.train.model_dump(
            mode="json", include={"batch_size", "accumulate", "precision", "accelerator", "devices", "compile"}
        ),
        "method": config.method.model_dump(mode="json") if step else None,
    }
    return content_digest(facts), "later" if step else "base"


def _evaluated(config: RunConfig) -> str:
    settings = config.evaluate.model_dump(mode="json", exclude={"limit", "samples", "flops_images"})
    return content_digest({"model": config.model.model_dump(mode="json"), "evaluate": settings})


def from_runs(folders: Iterable[Path]) -> Rates:
    """From the finished steps of run folders; what is no run folder, or damaged, is passed over."""
    train: dict[Kind, list[float]] = {}
    evaluate: dict[str, list[float]] = {}
    used = 0
    for folder in folders:
        try:
            run = RunFolder.read(folder)
            for record in run.records():
                seconds, iterations = record.content["seconds"], record.content["iterations"]
                train.setdefault(kind(run.config, record.index), []).append(seconds["train"] / iterations)
                evaluate.setdefault(_evaluated(run.config), []).append(seconds["evaluate"])
        except (CssbenchError, KeyError, TypeError, ZeroDivisionError):
            continue
        used += 1
    return Rates(
        {key: median(values) for key, values in train.items()},
        {key: median(values) for key, values in evaluate.items()},
        f"the median of {used} run{'s' * (used != 1)} that {'are' if used != 1 else 'is'} there",
    )


def measure(planned: Sequence[Planned]) -> Rates:
    """From a few real iterations of each kind, on this machine. A kind's method passes over the data as in a run."""
    found = Rates({}, {}, f"{ITERATIONS} iterations of each kind and {IMAGES} evaluated images, measured here")
    for one in sorted(planned, key=lambda one: -len(one.iterations)):
        config = resolved(one)
        kinds = {kind(config, step) for step in range(min(2, len(one.iterations)))}
        if kinds <= found.train.keys() and _evaluated(config) in found.evaluate:
            continue
        say(f"measuring {one.id}")
        with tempfile.TemporaryDirectory() as folder:
            _measure(one, config, Path(folder) / "run", found)
    return found


class _Enough(Exception):
    """Ends a measurement."""


def _measure(one: Planned, config: RunConfig, out: Path, found: Rates) -> None:
    from cssbench.experiment import build_experiment
    from cssbench.task_loop import run

    changes = {
        "train": config.train.model_copy(update={"iterations": ITERATIONS, "epochs": None}),
        "evaluate": config.evaluate.model_copy(update={"limit": IMAGES, "samples": 0, "flops_images": 0}),
    }
    made = build_experiment(config.model_copy(update=changes), out, ["measurement"])
    whole = len(_unlimited(made).evaluation_stems(made.scenario.steps[-1]))
    made.scenario = replace(made.scenario, groups=made.scenario.groups[:2])
    laps: dict[int, list[float]] = {}
    made.method.loss = _timed(made.method.loss, laps, config.train.accumulate)  # type: ignore[method-assign]
    made.folder.create()
    with suppress(_Enough):
        run(made)
    for step, times in laps.items():
        lengths = [b - a for a, b in pairwise(times[2:])]
        found.train[kind(config, step)] = median(lengths) * config.train.accumulate
    record = made.folder.records()[0].content
    rate = record["seconds"]["evaluate"] / max(1, record["evaluated_images"])
    found.evaluate[_evaluated(config)] = rate * whole


def _unlimited(made: Any) -> Any:
    """The experiment with all images to evaluate."""
    config = made.config.model_copy(update={"evaluate": made.config.evaluate.model_copy(update={"limit": None})})
    return replace(made, config=config)


def _timed(loss: Callable[..., Any], laps: dict[int, list[float]], accumulate: int) -> Callable[..., Any]:
    """The method's loss, noting when it is called; it ends the second step after its last iteration."""

    def timed(ctx: Any, batch: Any) -> Any:
        times = laps.setdefault(ctx.step.index, [])
        times.append(time.perf_counter())
        if ctx.step.index and len(times) == ITERATIONS * accumulate:
            raise _Enough
        return loss(ctx, batch)

    return timed


def from_bench(planned: Sequence[Planned], path: Path) -> Rates:
    """From a table of `bench/throughput.py`: multiply-adds per second in training, and those that the models need.

    Rough: it knows neither the loss of a method nor how well another model fills the machine. No evaluation.
    """
    speed, name = _speed(path)
    train: dict[Kind, float] = {}
    for one in planned:
        config = resolved(one)
        for step in range(min(2, len(one.iterations))):
            if kind(config, step) not in train:
                passes = BACKWARD + (1 if step else 0)  # later steps have the previous model's forward pass too
                work = 2e9 * _gflops(one, config) * passes * config.train.batch_size
                train[kind(config, step)] = work / (speed * config.train.devices)
    return Rates(train, {}, f"{path.name} ({name}; rough, without evaluation)")


def _speed(path: Path) -> tuple[float, str]:
    """Floating-point operations per second of the training row that does most, and the machine's name."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["mode"] == "training"]
        found = [
            (1e12 * float(row["matmul_peak_tflops"]) * float(row["of_matmul_peak"].rstrip(" %")) / 100, row["machine"])
            for row in rows
        ]
        return max(found)
    except (OSError, KeyError, ValueError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(
            f"{path} is no table of training speeds ({type(error).__name__}: {error}). Give a file that "
            f"`python bench/throughput.py` wrote: bench/results/<machine>-throughput.csv."
        ) from None


def _gflops(one: Planned, config: RunConfig) -> float:
    """10^9 multiply-adds of a forward pass of one crop, with all classes."""
    from cssbench import profile

    model = profile.build_model(config.model.name, config.model.options)
    return float(profile.growth(model, one.scene.steps, profile.no_image(config.augment.crop))[-1].gflops)


def disk(planned: Sequence[Planned]) -> tuple[dict[str, int], int]:
    """Bytes of the weights that each run leaves, and of the store of base steps."""
    sizes: dict[str, list[int]] = {}
    runs: dict[str, int] = {}
    store: dict[str, int] = {}
    for one in planned:
        config = resolved(one)
        counts = [len(group) for group in one.scene.groups]
        key = json.dumps([config.model.model_dump(mode="json"), counts], sort_keys=True)
        if key not in sizes:
            sizes[key] = _weights(one, config)
        runs[one.id] = sum(sizes[key])
        store[one.base] = sizes[key][0]
    return runs, sum(store.values())


def _weights(one: Planned, config: RunConfig) -> list[int]:
    """Bytes of a model's weights after each step."""
    import torch

    from cssbench import profile

    model, sizes = profile.build_model(config.model.name, config.model.options), []
    for step in one.scene.steps:
        with torch.device("meta"):
            model.grow(step)
        sizes.append(sum(value.numel() * value.element_size() for value in model.state_dict().values()))
    return sizes
