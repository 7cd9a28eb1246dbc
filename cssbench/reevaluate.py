"""Stored weights evaluated again under changed options, into a run folder of its own: `cssbench evaluate`.

The new folder is a whole run folder without weights. Its provenance.json is of this command and has

    evaluated_from    path, digest (`RunFolder.digest`) and provenance of the run that was trained, and `changes`:
                      option -> [old, new]

Each of its records has `evaluated_from`: the digest of the trained step's record, and under `kept` the names of what
was copied from there: numbers of training, of which the seconds are those of `seconds.train`. Everything else is new.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from cssbench import checkpoint, config, processes, recipes, validate
from cssbench.config import RunConfig
from cssbench.errors import ConfigError, CssbenchError, RunError
from cssbench.experiment import Experiment, build_experiment, derive_seed, resolve, sole_writer
from cssbench.progress import say
from cssbench.results import RunFolder, content_digest
from cssbench.scenario import Step
from cssbench.step_evaluation import evaluate_step, save_pictures
from cssbench.task_loop import Clock, summary_line

TRAINED = (
    "images",
    "iterations",
    "parameters",
    "loss",
    "cache",
    "initial",
    "shared",
)  # of a record, copied as they are
MACHINE = (
    "data.root",
    "data.workers",
    "data.stored",
    "train.accelerator",
    "train.devices",
    "cache.evaluation",
    "cache.folder",
    "cache.max_gib",
)  # where and how it runs, not what


def evaluate_again(source: Path, out: Path, changes: list[str], data: Path | None, command: list[str]) -> int:
    """Evaluate every finished step of `source` that `out` does not have yet; returns how many there were to do.

    changes: `section.key=value` of `evaluate`, `model` and `MACHINE`. Raises ConfigError for any other, and for options
    of the model that the weights do not fit; RunError when `source` has no weights or was edited, or `out` is of
    another evaluation.
    """
    there = RunFolder.read(source)
    there.weights(0)
    _refuse_edited(there)
    if data is not None:
        changes = [*changes, f"data.root={str(data.resolve())!r}"]
    wanted = changed_config(there, changes)
    origin = {
        "path": str(source.resolve()),
        "digest": there.digest,
        "changes": changed_options(resolve(there.config), wanted),
        "provenance": there.provenance,
    }
    before = _continued(out, wanted, there) if (out / "config.toml").exists() else None
    done = len(before.records()) if before else 0
    if done == len(there.records()):
        return 0
    words = ["evaluate", str(source), "--out", str(out), *(f"--set={change}" for change in changes)]
    processes.start(wanted.train.devices, words)
    made = build_experiment(wanted, out, command, trains=False)
    if made.folder.scenario != there.scenario:
        raise RunError(
            f"{source} was trained on other data: its scenario.json does not agree with what lies at "
            f"{wanted.data.root}. Give the data it was trained on with --data."
        )
    made.folder.provenance |= {"evaluated_from": origin}
    with sole_writer(made):
        _evaluate_steps(made, there, done, new=before is None)
    return len(there.records()) - done


def _refuse_edited(there: RunFolder) -> None:
    """What is wrong with the numbers of a run must not get a new digest."""
    free = (validate.UNFINISHED, validate.LIMITED)
    found = [what for what in validate.problems(there, weights=False) if not what.startswith(free)]
    if found:
        raise RunError(f"{there.path} cannot be evaluated again: {'; '.join(found)}. Restore it, or repeat the run.")


def changed_config(there: RunFolder, changes: list[str]) -> RunConfig:
    """The resolved configuration of a run with `changes`. Raises ConfigError for what must not change."""
    old = resolve(there.config)
    content = recipes.override(there.config.dump(), changes)
    wanted = resolve(config.validate(content, f"The recipe of {there.path} with these changes"))
    refused = [
        key
        for key in changed_options(old, wanted)
        if key == "model.name" or not (key.startswith(("evaluate.", "model.")) or key in MACHINE)
    ]
    if refused:
        raise ConfigError(
            f"{', '.join(refused)} cannot change: the weights of {there.path} were trained with it. Of a trained run "
            f"the options of [evaluate] and [model] may change, and {', '.join(MACHINE)}."
        )
    return wanted


def changed_options(old: RunConfig, new: RunConfig) -> dict[str, list[Any]]:
    """Dotted key -> [old value, new value], None where a configuration does not have the key."""
    before, after = dict(_flat(old.dump())), dict(_flat(new.dump()))
    keys = sorted(before.keys() | after.keys())
    return {key: [before.get(key), after.get(key)] for key in keys if before.get(key) != after.get(key)}


def _flat(content: dict[str, Any], path: str = "") -> list[tuple[str, Any]]:
    items: list[tuple[str, Any]] = []
    for key, value in content.items():
        items += _flat(value, f"{path}{key}.") if isinstance(value, dict) else [(f"{path}{key}", value)]
    return items


def _continued(out: Path, wanted: RunConfig, there: RunFolder) -> RunFolder:
    """The folder `out`, if it holds the same evaluation of the same weights. Raises RunError."""
    found = RunFolder.read(out)
    differing = ", ".join(changed_options(found.config, wanted))
    if "evaluated_from" not in found.provenance:
        reason = "a run of its own"
    elif differing:
        reason = f"an evaluation with other options (differs in {differing})"
    elif _sources(found) != [content_digest(r.content) for r in there.records()][: len(found.records())]:
        reason = f"an evaluation of other weights than {there.path} has now"
    else:
        return found
    raise RunError(f"{out} holds {reason}. Choose another --out, or remove that folder.")


def _sources(found: RunFolder) -> list[Any]:
    return [record.content.get("evaluated_from", {}).get("digest") for record in found.records()]


def _evaluate_steps(made: Experiment, there: RunFolder, done: int, new: bool) -> None:
    for step in made.scenario.steps[: len(there.records())]:
        torch.manual_seed(derive_seed(made.config.seed, "grow", step.index))
        made.model.grow(step)
        if step.index < done:
            continue
        _load(made, there, step)
        if new and step.index == 0 and made.fabric.is_global_zero:
            made.folder.create()
        made.fabric.barrier()
        try:
            _evaluate(made, there, step)
        except CssbenchError:
            if new and made.fabric.is_global_zero and not made.folder.records():
                shutil.rmtree(made.folder.path)  # as `cssbench run`: a mistake seen late leaves nothing
            raise


def _load(made: Experiment, there: RunFolder, step: Step) -> None:
    """Raises ConfigError when the weights do not fit the options."""
    _, weights = there.weights(step.index)
    changes = [key for key in changed_options(resolve(there.config), made.config) if key.startswith("model.")]
    try:
        checkpoint.load_weights(weights, made.model)
    except RunError as error:
        if not changes:
            raise
        raise ConfigError(
            f"{error} Changed: {', '.join(changes)}. Only options that leave the weights as they are may change."
        ) from error
    made.model.to(made.fabric.device)


def _evaluate(made: Experiment, there: RunFolder, step: Step) -> None:
    clock, old = Clock(), there.records()[step.index].content
    found = evaluate_step(made, step)
    if made.fabric.is_global_zero:
        save_pictures(made, step, found)
    clock.lap("evaluate")
    made.fabric.barrier()
    if made.fabric.is_global_zero:
        kept = {name: old[name] for name in TRAINED if name in old}
        seconds = {name: value for name, value in old.get("seconds", {}).items() if name == "train"}
        origin = {"digest": content_digest(old), "kept": [*kept, *(f"seconds.{name}" for name in seconds)]}
        numbers = kept | {
            "evaluated_images": len(made.evaluation_stems(step)),
            "seconds": seconds | {"evaluate": round(clock.seconds["evaluate"], 3)},
            "evaluated_from": origin,
        }
        made.folder.finish_step(step.index, found.matrices, numbers | found.numbers | found.cached)
        say(f"step {step.index}: {summary_line(made, step, found.matrices)}, {clock.seconds['evaluate']:.0f} s")
    made.fabric.barrier()
