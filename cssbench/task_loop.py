"""The task loop: step after step, grow, train, save, evaluate. Knows no method, model or scenario by name."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cssbench import checkpoint
from cssbench.data.step_dataset import BatchStream, HoldoutDataset, StepDataset, make_loader, one_pass
from cssbench.engine import agree, micro_batch
from cssbench.errors import RunError
from cssbench.experiment import Experiment, derive_seed
from cssbench.frozen import training_batches
from cssbench.initial import start_from_initial
from cssbench.interrupt import Signals, listening
from cssbench.logs import RunLog, StepLog
from cssbench.method import StepContext
from cssbench.models.segmenter import Segmenter, count_parameters, freeze_copy
from cssbench.progress import say, track
from cssbench.protocol import DEFAULTS, get
from cssbench.scenario import Step
from cssbench.shared import BaseStep
from cssbench.step_checkpoint import StepCheckpoints
from cssbench.step_evaluation import Evaluated, evaluate_step, save_pictures
from cssbench.trainer import fit


@dataclass
class Clock:
    """Seconds of the parts of a step."""

    seconds: dict[str, float] = field(default_factory=dict)
    last: float = field(default_factory=time.perf_counter)

    def lap(self, name: str | None = None) -> None:
        """Add the time since the last lap to a part, or to none."""
        now = time.perf_counter()
        if name:
            self.add(name, now - self.last)
        self.last = now

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def run(made: Experiment, shared: Path | None = None) -> None:
    """Run every step that is not finished yet. A finished one is replayed: growth, then its weights and state.

    shared: a folder of base steps, from which this run's is taken, or in which it is put (`cssbench.shared`).
    """
    with listening() as signals, made.open_log() as log:
        _run_steps(made, shared, signals, log)


def _run_steps(made: Experiment, shared: Path | None, signals: Signals, log: RunLog) -> None:
    previous: Segmenter | None = None
    finished = made.fabric.broadcast(_sound_steps(made) if made.fabric.is_global_zero else 0)
    if finished < len(made.scenario.steps):
        made.store_images()
    for step in made.scenario.steps:
        torch.manual_seed(derive_seed(made.config.seed, "grow", step.index))  # alike on every process
        made.model.grow(step)
        if step.index < finished - 1:
            continue
        if step.index == finished - 1:
            _restore(made, step)
        else:
            with BaseStep(made, None if step.index else shared) as base:
                _run_step(made, step, previous, base, StepCheckpoints(made, step, signals), log)
        previous = freeze_copy(made.model)


def _sound_steps(made: Experiment) -> int:
    """How many steps are finished. Where the files of the last are damaged, it is laid aside: the one before counts."""
    while records := made.folder.records():
        folder = records[-1].folder
        try:
            made.folder.verify(records[-1])
        except RunError as error:
            aside = next(p for n in count(1) if not (p := folder.with_name(f"{folder.name}.damaged-{n}")).exists())
            folder.rename(aside)
            say(f"step {len(records) - 1}: {error} It is trained again; what was found lies in {aside}.")
        else:
            break
    return len(records)


def _restore(made: Experiment, step: Step) -> None:
    record = made.folder.records()[step.index]
    checkpoint.load_weights(record.folder / "model.safetensors", made.model)
    made.method.load_state_dict(checkpoint.load_state(record.folder / "method.safetensors"))
    made.model.to(made.fabric.device)
    say(f"step {step.index}: finished before, weights and state restored")


def _run_step(
    made: Experiment,
    step: Step,
    previous: Segmenter | None,
    base: BaseStep,
    checkpoints: StepCheckpoints,
    log: RunLog,
) -> None:
    """Train, save, evaluate, and write the record that makes the step finished."""
    clock, fabric = Clock(), made.fabric
    numbers = _train(made, step, previous, base, checkpoints, clock, log)
    if fabric.is_global_zero:
        folder = made.folder.step_folder(step.index)
        checkpoint.save_weights(folder / "model.safetensors", made.model)
        checkpoint.save_state(folder / "method.safetensors", made.method.state_dict())
    clock.lap("save")
    found = _evaluate(made, step, base, clock)
    fabric.barrier()
    if fabric.is_global_zero:
        numbers["seconds"] = {name: round(value, 3) for name, value in clock.seconds.items()}
        made.folder.finish_step(step.index, found.matrices, numbers | found.numbers | found.cached)
        seconds = f"{sum(clock.seconds.values()):.0f} s{' when trained' if base.reused else ''}"
        checkpoints.clear()
        scores = default_scores(made, step, found.matrices)
        log.evaluated(step.index, scores, made.folder.step_folder(step.index), made.sample_stems)
        say(f"step {step.index}: {base.origin}{summary_line(made, step, found.matrices)}, {seconds}")
    fabric.barrier()


def _train(
    made: Experiment,
    step: Step,
    previous: Segmenter | None,
    base: BaseStep,
    checkpoints: StepCheckpoints,
    clock: Clock,
    run_log: RunLog,
) -> dict[str, Any]:
    """The method's hooks around training; returns the numbers of the step's record."""
    fabric, method, config = made.fabric, made.method, made.config
    model = made.model.to(fabric.device)
    initial = {} if step.index else start_from_initial(made)
    torch.manual_seed(derive_seed(config.seed, "train", step.index, 0))  # alike on every process, as all numbers drawn
    images = len(made.train_stems[step.index])
    iterations = config.train.length(step.index, images)
    start = checkpoints.load()
    log = StepLog(made.folder.path / "logs", step.index, fabric.is_global_zero, start, run_log)
    ctx, data, stream = _context(made, step, previous, iterations, log, start)
    method.start_step(ctx)
    trainable = count_parameters(model, trainable=True)
    with training_batches(made, ctx, data, stream) as (batches, cached):
        loss = _learn(made, ctx, batches, iterations, base, checkpoints, clock)
    return {
        "images": images,
        "iterations": iterations,
        "evaluated_images": len(made.evaluation_stems(step)),
        "parameters": {"total": count_parameters(model), "trainable": trainable},
        "loss": loss,
        **cached,
        **initial,
        **base.record,
        **checkpoints.record,
    }


def _learn(
    made: Experiment,
    ctx: StepContext,
    batches: Any,
    iterations: int,
    base: BaseStep,
    checkpoints: StepCheckpoints,
    clock: Clock,
) -> dict[str, float]:
    """`fit` and `end_step`, or what they left behind when another run trained this base step; the loss of the end."""
    fabric, method, config, step = made.fabric, made.method, made.config, ctx.step
    clock.lap("train")
    before = clock.seconds["train"]
    found = base.load(ctx, iterations)
    clock.lap()
    if found:
        loss = found["loss"]
        clock.add("train", found["seconds"])
    else:
        title = f"step {step.index}/{len(made.scenario.steps) - 1}  train"
        with track(title, iterations, checkpoints.start) as advance, checkpoints.signals.watched():
            seed = derive_seed(config.seed, "passes", step.index)
            loss = fit(fabric, ctx, method, batches, config.optim, config.train, iterations, advance, checkpoints, seed)
        clock.lap("train")
        clock.add("train", checkpoints.seconds)
        if base.plain:
            base.keep(loss, iterations, clock.seconds["train"] - before)
            clock.lap()
    if not found or base.plain:
        torch.manual_seed(derive_seed(config.seed, "end", step.index, 0))  # as if trained here, alike on every process
        method.end_step(ctx)
        agree(fabric, made.model, method)
        clock.lap("train")
    if not found and not base.plain:
        base.keep(loss, iterations, clock.seconds["train"] - before)
        clock.lap()
    return loss


def _evaluate(made: Experiment, step: Step, base: BaseStep, clock: Clock) -> Evaluated:
    """Evaluate the images that show a class seen so far, or take up what that gave; writes the sample pictures."""
    found = base.evaluation()
    clock.lap()
    if found:
        clock.add("evaluate", found.seconds)
    else:
        found = evaluate_step(made, step)
        clock.lap("evaluate")
        found.seconds = clock.seconds["evaluate"]
        base.keep_evaluation(found)
    if made.fabric.is_global_zero:
        save_pictures(made, step, found)
    clock.lap("evaluate")
    return found


def _context(made: Experiment, step: Step, previous: Segmenter | None, iterations: int, log: StepLog, start: int):
    """The step's context for the method, its training data, and the order of micro-batches for the trainer."""
    config, table = made.config, made.scenario.train_table(step)
    micro = micro_batch(config.train, made.fabric.world_size)
    seed = derive_seed(config.seed, "data")
    views = config.augment.later_views if step.index else None
    data = StepDataset(made.training_data, "train", made.train_stems[step.index], table, made.transform, seed, views)
    held = HoldoutDataset(made.evaluated_data, made.holdout_stems[step.index], table, made.transform)
    stream = BatchStream(
        len(data),
        derive_seed(seed, step.index),
        micro,
        iterations * config.train.accumulate,
        made.fabric.global_rank,
        made.fabric.world_size,
        start * config.train.accumulate,
    )
    workers = config.data.workers
    ctx = StepContext(
        scenario=made.scenario,
        step=step,
        model=made.model,
        previous=previous,
        train_loader=make_loader(data, one_pass(len(data), micro), workers),
        holdout_loader=make_loader(held, _batches(len(held), micro), workers) if len(held) else None,
        device=made.fabric.device,
        images=tuple(len(s) for s in made.train_stems[: step.index + 1]),
        class_images=made.class_images(step),
        log=lambda name, value: log(name, value, ctx.iteration),
    )
    return ctx, data, stream


def _batches(n: int, size: int) -> list[list[int]]:
    return [list(range(start, min(start + size, n))) for start in range(0, n, size)]


def default_scores(made: Experiment, step: Step, matrices: dict[str, np.ndarray]) -> dict[str, float]:
    """`base`, `incremental` and `all` under each default protocol whose matrix is there: "all/<protocol>" -> mIoU."""
    found: dict[str, float] = {}
    for protocol in map(get, DEFAULTS):
        if protocol.key in matrices:
            score = protocol.scores(matrices[protocol.key], made.scenario.groups, step.index)
            part = {f"{k}/{protocol.id}": score.get(k) for k in ("base", "incremental", "all")}
            found |= {name: value for name, value in part.items() if value is not None}
    return found


def summary_line(made: Experiment, step: Step, matrices: dict[str, np.ndarray]) -> str:
    """mIoU of base and all classes so far, under each default protocol whose matrix is there."""
    parts, background_class = [], made.data.background_class
    for protocol in map(get, DEFAULTS):
        if protocol.key in matrices and protocol.can_score(background_class):
            score = protocol.scores(matrices[protocol.key], made.scenario.groups, step.index, background_class)
            shown = ", ".join(f"{k} {100 * v:.2f}" for k in ("base", "all") if (v := score[k]) is not None)
            parts.append(f"{shown} % ({protocol.id})")
    return "; ".join(parts)
