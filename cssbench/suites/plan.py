"""What a suite trains: iterations of each step, which runs share their base step, and the order to start them in.

Image sets come from the data, or from class lists as in `cssbench scenario show --index`; where all lengths are given
in iterations neither is needed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cssbench import scenario
from cssbench.config import RunConfig
from cssbench.errors import ConfigError
from cssbench.results import content_digest
from cssbench.scenario import Scenario, stems_digest
from cssbench.suites.folder import Entry
from cssbench.suites.spec import SuiteRun

if TYPE_CHECKING:
    from cssbench.data.presence import PresenceIndex


@dataclass(frozen=True)
class Planned:
    """One run, its scenario, its training images by step (None: not looked at) and iterations by step.

    base: what determines its base step, as far as settings and image sets tell (`cssbench.shared` also looks at the
    weights it starts from, at files, versions and the machine); runs with the same one train it once.
    """

    run: SuiteRun
    scene: Scenario
    images: tuple[int, ...] | None
    iterations: tuple[int, ...]
    base: str

    @property
    def id(self) -> str:
        return self.run.id

    @property
    def entry(self) -> Entry:
        run = self.run
        return Entry(
            run.id,
            run.method,
            run.scenario,
            run.model,
            run.seed,
            run.order,
            run.oracle,
            self.base,
            self.iterations,
            run.config.train.devices,
        )


@dataclass(frozen=True)
class Account:
    """Iterations: `separate`, every run by itself; `suite`, each base step once."""

    runs: int
    separate: int
    suite: int

    @property
    def share(self) -> float:
        return self.suite / self.separate


def plan(runs: Sequence[SuiteRun], index: Path | None = None, has_data: bool = False) -> list[Planned]:
    """Every run with its lengths. index: class lists of the training images; has_data: the runs' data roots are there.

    Raises ConfigError where a length in epochs needs images and neither is given, DataError, ScenarioError; and, with
    the options of a method or model, whatever `cssbench run` would refuse.
    """
    from cssbench.experiment import resolve

    return [_plan(run, resolve(run.config), index, has_data) for run in runs]


def _plan(run: SuiteRun, config: RunConfig, index: Path | None, has_data: bool) -> Planned:
    chosen = config.scenario
    scene = scenario.load(
        chosen.name, mode=chosen.mode, order=chosen.order, void=chosen.void, partition_seed=chosen.partition_seed
    )
    stems = _stems(config, scene, index, has_data)
    if stems is None and config.train.iterations is None:
        raise ConfigError(
            f"The run {run.id!r} is as long as its epochs say, so the number of images must be known: give the data "
            f"root with --data, or class lists of the training images with --index."
        )
    images = None if stems is None else tuple(map(len, stems))
    iterations = tuple(config.train.length(t, images[t] if images else 0) for t in range(len(scene.steps)))
    base = content_digest(_base(config, scene, stems, iterations[0]))
    return Planned(run, scene, images, iterations, base)


def _base(config: RunConfig, scene: Scenario, stems: list[list[str]] | None, iterations: int) -> dict[str, Any]:
    """What two runs must have in common to share their base step."""
    from cssbench.base_facts import is_plain, settings_facts
    from cssbench.contract import build_method

    if stems is not None:
        images: Any = stems_digest(stems[0])
    elif scene.mode == "overlapped":
        images = sorted(scene.groups[0])
    else:  # later classes matter too
        images = [scene.mode, scene.partition_seed, *map(list, scene.groups)]
    plain = is_plain(build_method(config.method))
    return {
        "data": [scene.dataset, config.data.root, config.data.options, config.data.holdout, config.data.stored_side],
        "images": images,
        "model": config.model.model_dump(mode="json"),
        "initial": config.train.initial,
        "method": None if plain else [config.method.model_dump(mode="json"), [list(group) for group in scene.groups]],
        "devices": [config.train.accelerator, config.train.devices],
        **settings_facts(config, scene, iterations),
    }


def _stems(config: RunConfig, scene: Scenario, index: Path | None, has_data: bool) -> list[list[str]] | None:
    """Names of the training images of each step; None where there is nothing to look at."""
    from cssbench.data.step_dataset import split_holdout

    if index is not None:
        found = _class_lists(index, scene.num_classes_max)
    elif has_data:
        found = _presence(scene.dataset, config.data.root, json.dumps(config.data.options))
    else:
        return None
    kept = set(split_holdout(found.stems, config.data.holdout)[0])
    rows = [i for i, stem in enumerate(found.stems) if stem in kept]
    return [[found.stems[rows[i]] for i in indices] for indices in scene.images(found.table[rows])]


@cache
def _class_lists(index: Path, classes: int) -> PresenceIndex:
    from cssbench.data import presence

    return presence.from_class_lists(index, classes)


@cache
def _presence(dataset: str, root: str | None, options: str) -> PresenceIndex:
    """options: those of the dataset, as JSON."""
    from cssbench.data import presence
    from cssbench.data.registry import make_dataset

    return presence.build(make_dataset(dataset, root, json.loads(options)), "train")


def account(planned: Sequence[Planned]) -> Account:
    """Iterations of the runs one by one, and as a suite."""
    separate = sum(sum(one.iterations) for one in planned)
    once = {one.base: one.iterations[0] for one in planned}
    return Account(len(planned), separate, sum(sum(p.iterations[1:]) for p in planned) + sum(once.values()))


def makers(entries: Sequence[Entry]) -> dict[str, str]:
    """Run -> the run that trains its base step: of those that share it the shortest, so that others wait least."""
    chosen: dict[str, Entry] = {}
    for entry in entries:
        there = chosen.get(entry.base)
        if there is None or sum(entry.iterations) < sum(there.iterations):
            chosen[entry.base] = entry
    return {entry.id: chosen[entry.base].id for entry in entries}


def in_order(entries: Sequence[Entry]) -> list[Entry]:
    """The order to start runs in: those that train a base step for most others first, then runs that share none, then
    the sharers, whose base step is there by then."""
    made_by = makers(entries)
    served = {entry.id: sum(maker == entry.id for maker in made_by.values()) - 1 for entry in entries}
    first = [entry for entry in entries if made_by[entry.id] == entry.id]
    return sorted(first, key=lambda entry: -served[entry.id]) + [e for e in entries if made_by[e.id] != e.id]
