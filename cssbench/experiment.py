"""From a configuration to the objects of a run: data, scenario, image sets, model, method, run folder."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric

from cssbench import processes, provenance, registry, scenario
from cssbench.config import RunConfig, part_config, plain
from cssbench.contract import build_method, build_model, method_class, model_class
from cssbench.data.base import SegDataset
from cssbench.data.presence import PresenceIndex, build
from cssbench.data.registry import make_dataset
from cssbench.data.step_dataset import split_holdout
from cssbench.data.stored import StoredDataset
from cssbench.data.transforms import TrainTransform
from cssbench.engine import make_fabric, micro_batch
from cssbench.errors import ConfigError, RunError
from cssbench.lock import FileLock
from cssbench.logs import LoggedRun, RunLog, logger_class
from cssbench.method import Method
from cssbench.models.segmenter import Segmenter
from cssbench.results import RunFolder
from cssbench.scenario import Scenario, Step, stems_digest


@contextmanager
def sole_writer(made: Experiment) -> Iterator[None]:
    """Inside, no other process trains or evaluates into the run folder. Raises RunError where one does. All processes
    of a distributed run call it. A folder in which nothing was written is gone afterwards."""
    lock, folder = FileLock(made.folder.path / ".lock"), made.folder.path
    first, held = made.fabric.is_global_zero, False
    try:
        held = made.fabric.broadcast(lock.acquire() if first else False)
        if not held:
            raise RunError(
                f"{folder} is in use: {lock.holder} works in it. Wait until it ends, or stop it; then "
                f"`cssbench resume {folder}` goes on."
            )
        if first:
            lock.sign()
        yield
    finally:
        with suppress(OSError):
            if first and held and os.listdir(folder) == [lock.path.name]:
                shutil.rmtree(folder)
        lock.release()


@dataclass
class Experiment:
    """All that the task loop needs. `train_stems[t]`, `holdout_stems[t]`: image names of step t."""

    config: RunConfig
    folder: RunFolder
    fabric: Fabric
    data: SegDataset
    scenario: Scenario
    train: PresenceIndex
    train_stems: list[list[str]]
    holdout_stems: list[list[str]]
    evaluation: PresenceIndex
    model: Segmenter
    method: Method
    evaluated_encoder: str | None = None  # digest, at the last evaluation of this process

    @property
    def transform(self) -> TrainTransform:
        return TrainTransform(self.config.augment, self.model.pixel_mean, self.model.pixel_std)

    @cached_property
    def training_data(self) -> SegDataset:
        """What steps train on: `data`, from stored images where the settings ask for them, and at `stored_side`."""
        settings = self.config.data
        if settings.stored is None and settings.stored_side is None:
            return self.data
        return StoredDataset(self.data, settings.stored_side, settings.options)

    @property
    def evaluated_data(self) -> SegDataset:
        """What is evaluated: `data`, from stored images where they are stored as they are."""
        return self.training_data if self.config.data.stored_side is None else self.data

    def store_images(self) -> None:
        """Fill the store of `data.stored` with all that this run reads. All processes of a distributed run call it."""
        data, limit = self.training_data, self.config.data.stored
        if limit is not None and isinstance(data, StoredDataset) and self.fabric.is_global_zero:
            images = [("train", stem) for stem in sorted({stem for stems in self.train_stems for stem in stems})]
            if data is self.evaluated_data and self.config.evaluate.split != "holdout":
                seen = self.evaluation_stems(self.scenario.steps[-1])
                images += [(self.config.evaluate.split, stem) for stem in seen]
            data.fill(images, limit)
        self.fabric.barrier()

    def evaluation_stems(self, step: Step) -> list[str]:
        """Images of the evaluated split that show a class seen by `step` (the first `evaluate.limit` of them)."""
        return self.evaluation.showing(step.seen)[: self.config.evaluate.limit]

    def class_images(self, step: Step) -> dict[int, int]:
        """Position of each new class -> number of the step's training images that show it."""
        rows = np.isin(self.train.stems, self.train_stems[step.index])
        counts = self.train.table[rows].sum(axis=0)
        return {p: int(counts[c]) for p, c in zip(step.new_positions, step.new, strict=True)}

    @cached_property
    def sample_stems(self) -> list[str]:
        """Images kept for the report: greedily those that add the most classes not yet shown, then in order."""
        stems = self.evaluation_stems(self.scenario.steps[-1])
        table = dict(zip(self.evaluation.stems, list(self.evaluation.table[:, 1:]), strict=True))
        chosen: list[str] = []
        shown = np.zeros(self.evaluation.table.shape[1] - 1, bool)
        for _ in range(min(self.config.evaluate.samples, len(stems))):
            rest = [s for s in stems if s not in chosen]
            best = max(rest, key=lambda s: (int((table[s] & ~shown).sum()), int(table[s].sum())))
            chosen.append(best)
            shown |= table[best]
        return chosen

    def open_log(self) -> RunLog:
        """The loggers of the run, on the first process; none on the others."""
        counts = tuple(self.config.train.length(t, len(stems)) for t, stems in enumerate(self.train_stems))
        logged = LoggedRun(self.folder.path, self.config.dump(), self.config.log.project, counts)
        names = self.config.log.loggers if self.fabric.is_global_zero else []
        return RunLog.open(logged, {name: logger_class(name) for name in names})

    def describe_scenario(self) -> dict[str, Any]:
        """Content of scenario.json."""
        steps = zip(self.scenario.steps, self.train_stems, strict=True)
        return {
            "name": self.scenario.name,
            "dataset": self.scenario.dataset,
            "mode": self.scenario.mode,
            "void": self.scenario.void,
            "description": self.scenario.description,
            "classes": list(self.data.classes),
            "palette": self.data.palette.tolist(),
            "steps": [{"new": list(s.new), "images": len(i), "sha256": stems_digest(i)} for s, i in steps],
            **({"background_class": True} if self.data.background_class else {}),
        }

    def describe_data(self) -> dict[str, Any]:
        """The data part of provenance.json. `identity` does not depend on where the files lie or when they came."""
        splits = {"train", "train" if self.config.evaluate.split == "holdout" else self.config.evaluate.split}
        return {
            "name": self.data.name,
            "root": str(self.data.root),
            "identity": {split: self.data.fingerprint(split) for split in sorted(splits)},
            "evaluated": self.config.evaluate.split,
            "evaluated_images": len(self.evaluation_stems(self.scenario.steps[-1])),
            "evaluated_sha256": stems_digest(self.evaluation_stems(self.scenario.steps[-1])),
        }


def build_experiment(
    config: RunConfig,
    out: Path,
    command: list[str] | None = None,
    method: Method | None = None,
    trains: bool = True,
) -> Experiment:
    """Build everything and check it together, before anything is written. `command` None: to resume `out`.

    method: instead of the one that the configuration names. trains: False where the batch does not matter.
    """
    chosen = config.scenario
    scene = scenario.load(
        chosen.name, mode=chosen.mode, order=chosen.order, void=chosen.void, partition_seed=chosen.partition_seed
    )
    method = make_method(config) if method is None else method
    if trains:
        for name in config.log.loggers:
            logger_class(name)
        micro_batch(config.train, processes.world())
    fabric = make_fabric(config.train)
    data = make_dataset(scene.dataset, config.data.root, config.data.options)
    check_classes(scene, data)
    train = build(data, "train")
    kept, held = split_holdout(train.stems, config.data.holdout)
    if config.evaluate.split == "holdout" and not held:
        raise ConfigError("evaluate.split = 'holdout' needs data.holdout above 0.")
    trained = train.subset(np.flatnonzero(np.isin(train.stems, kept)))
    per_step = [[trained.stems[i] for i in indices] for indices in scene.images(trained.table)]
    evaluation = train.subset(np.flatnonzero(np.isin(train.stems, held)))
    holdout = _holdout_steps(scene, evaluation)
    if config.evaluate.split != "holdout":
        evaluation = build(data, config.evaluate.split)
    torch.manual_seed(derive_seed(config.seed, "model"))
    model = make_model(config)
    check_sizes(config, model)
    check_cache(config, model)
    folder = RunFolder(out, config) if command is not None else _to_resume(out)
    made = Experiment(config, folder, fabric, data, scene, train, per_step, holdout, evaluation, model, method)
    if command is not None:
        folder.scenario = made.describe_scenario()
        folder.provenance = provenance.collect(command) | run_facts(made)
    elif folder.scenario != made.describe_scenario():
        raise RunError(
            f"{out} was started on other data: its scenario.json does not agree with what lies at "
            f"{config.data.root}. Give the data it was started on with --data."
        )
    return made


def _to_resume(out: Path) -> RunFolder:
    folder = RunFolder.read(out)
    if origin := folder.provenance.get("evaluated_from"):
        raise RunError(
            f"{out} holds evaluations of the weights of {origin['path']}: there is nothing to train. The same "
            f"`cssbench evaluate {origin['path']} --out {out}` with the same changes goes on with it."
        )
    return folder


def run_facts(made: Experiment) -> dict[str, Any]:
    """What provenance.json says of the run beside the machine."""
    config = made.config
    return {
        "seed": config.seed,
        "processes": made.fabric.world_size,
        "effective_batch": config.train.batch_size,
        "precision": config.train.precision,
        "iterations": [config.train.length(t, len(s)) for t, s in enumerate(made.train_stems)],
        "note": config.note,
        "parts": {kind: part_origin(kind, getattr(config, kind).name) for kind in ("method", "model")},
        "memory": made.method.memory,
        "debug_limited": config.evaluate.limit is not None,
        "data": made.describe_data(),
    }


def part_origin(kind: str, name: str) -> dict[str, str | None]:
    """{"distribution", "version"} of an installed method or model; None where it has no entry point."""
    origin = registry.distribution_of(f"{kind}s", name)
    return {"distribution": origin, "version": provenance.package_version(origin) if origin else None}


def _holdout_steps(scene: Scenario, held: PresenceIndex) -> list[list[str]]:
    """The held-out images of each step, those that show one of its classes; a step may have none."""
    return [held.showing(step.new) for step in scene.steps]


def check_classes(scene: Scenario, data: SegDataset) -> None:
    """Raises ConfigError when scenario and dataset do not have the same number of classes, or mean another label 0."""
    if scene.num_classes != data.num_classes:
        raise ConfigError(
            f"Scenario {scene.name!r} has {scene.num_classes} classes, dataset {data.name!r} at {data.root} has "
            f"{data.num_classes}. Use the scenario of that dataset, or set data.options."
        )
    if scene.void == "ignore" and data.background_class:
        raise ConfigError(
            f"Scenario {scene.name!r} ignores void in training, but label 0 of dataset {data.name!r} is background, a "
            f'class of its own. Leave `void` at "background".'
        )


def make_method(config: RunConfig) -> Method:
    return build_method(config.method)


def make_model(config: RunConfig) -> Segmenter:
    return build_model(config.model)


def check_sizes(config: RunConfig, model: Segmenter) -> None:
    """Raises ConfigError when a configured square is not a multiple of what the model needs."""
    sizes = {"augment.crop": config.augment.crop}
    if config.evaluate.inference == "slide":
        sizes["evaluate.window"] = config.evaluate.window
    for name, size in sizes.items():
        if size % model.multiple:
            near = {max(size // model.multiple, 1) * model.multiple, (size // model.multiple + 1) * model.multiple}
            raise ConfigError(
                f"{name} = {size} is not a multiple of {model.multiple}, the patch size of model "
                f"{config.model.name!r}. Near it: {' or '.join(map(str, sorted(near)))}."
            )


def check_cache(config: RunConfig, model: Segmenter) -> None:
    """Raises ConfigError where features are to be kept of a model whose encoder does not stand by itself."""
    wanted = [name for name in ("features", "evaluation") if getattr(config.cache, name)]
    if wanted and not model.splits:
        raise ConfigError(
            f"cache.{wanted[0]} keeps what an encoder makes for its heads, but model {config.model.name!r} does not "
            f"keep the two apart: its heads work inside the encoder, or it defines forward instead of encode and "
            f"decode. Set cache.{wanted[0]} = false, or choose a model that does."
        )


def resolve(config: RunConfig, parts: Sequence[str] = ("method", "model")) -> RunConfig:
    """`config` with the options of method and model (of `parts` only) written out in full, defaults included."""
    changes = {}
    classes: dict[str, Callable[[str], Any]] = {"method": method_class, "model": model_class}
    for kind in parts:
        choice = getattr(config, kind)
        options = plain(part_config(kind, choice, classes[kind](choice.name).Config))
        changes[kind] = type(choice)(name=choice.name, **options)
    return config.model_copy(update=changes)


def derive_seed(seed: int, *parts: Any) -> int:
    """A 63-bit seed that depends on all of its arguments."""
    return int.from_bytes(hashlib.sha256(repr((seed, *parts)).encode()).digest()[:8], "big") >> 1
