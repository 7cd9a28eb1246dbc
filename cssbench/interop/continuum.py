"""Scenarios of Continuum from ours, and ours from Continuum's.

Importing this module imports Continuum, which takes seconds. Raises ConfigError where it is not installed.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cssbench import scenario as scenarios
from cssbench.data.base import SegDataset
from cssbench.data.presence import PresenceIndex, build
from cssbench.errors import ScenarioError
from cssbench.experiment import check_classes
from cssbench.interop.extras import require
from cssbench.scenario import IGNORE, Mode, Scenario

require("continuum", "six", extra="continuum", what="cssbench.interop.continuum")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of packages that Continuum imports and we have no say in
    from continuum.datasets import InMemoryDataset
    from continuum.scenarios import SegmentationClassIncremental
    from continuum.tasks import TaskType

MODES: dict[Mode, str] = {"overlapped": "overlap", "disjoint": "disjoint", "sequential": "sequential"}


class Table:
    """A (256,) uint8 look-up table as a target transformation, for label maps of uint8; it pickles."""

    def __init__(self, table: np.ndarray):
        self.table = torch.from_numpy(np.array(table, np.uint8))

    def __call__(self, labels: Tensor) -> Tensor:
        return torch.from_numpy(self.table.numpy()[np.asarray(labels)])


class ClassOrder:
    """Labels -> class ids as the data set numbers them; 0 and 255 stay."""

    def __init__(self, order: tuple[int, ...]):
        self.table = np.full(256, IGNORE)
        self.table[: 1 + len(order)] = [0, *order]

    def __call__(self, labels: Any) -> np.ndarray:
        return self.table[np.asarray(labels)]


class CSSScenario(SegmentationClassIncremental):
    """`SegmentationClassIncremental` of a scenario of ours: images from our presence index, labels from our tables.

    As the original wherever both can say it, and beyond it: `partitioned` images, void that is ignored, slices, task
    sets that pickle, task ids that are whole numbers.
    """

    def __init__(
        self,
        scenario: Scenario,
        dataset: SegDataset,
        index: PresenceIndex,
        split: str,
        transformations: list[Any] | None = None,
        test_background: bool = True,
    ):
        self.scenario, self.source, self.index = scenario, dataset, index
        images = np.array([str(dataset.image_path(split, stem)) for stem in index.stems])
        labels = np.array([str(dataset.label_path(split, stem)) for stem in index.stems])
        super().__init__(
            InMemoryDataset(images, labels, data_type=TaskType.SEGMENTATION, train=split == "train"),
            nb_classes=scenario.num_classes,
            increment=[len(group) for group in scenario.groups],
            class_order=list(scenario.order),
            mode=MODES.get(scenario.mode, "overlap"),  # partitioned: labels as in overlapped
            transformations=transformations,
            test_background=test_background,
        )

    @property
    def classes(self) -> np.ndarray:
        """Class ids in the order in which they are learned."""
        return np.array(self.scenario.order)

    def _setup(self, nb_tasks: int) -> int:
        """The index of images, (n, tasks): what takes the original a pass over all label maps."""
        self._class_mapping = ClassOrder(self.scenario.order)
        self._increments = list(self.increment)
        images, labels, _ = self.cl_dataset.get_data()
        self.dataset = images, labels, self.scenario.selected(self.index.table).astype(np.int64)
        return len(self._increments)

    def __getitem__(self, task_index: Any) -> Any:
        """A task set; of a slice or list of tasks, the images of all of them, with the labels of all of them."""
        if isinstance(task_index, slice):
            task_index = list(range(*task_index.indices(len(self))))
            if not task_index:
                raise ScenarioError(f"That slice takes none of the {len(self)} tasks of {self.scenario.name!r}.")
        return super().__getitem__(task_index)

    def _get_task_ids(self, t: np.ndarray, task_indexes: Any) -> np.ndarray:
        return np.full(len(t), np.max(task_indexes), np.int64)

    def _get_label_transformation(self, task_index: Any) -> Table:
        """Values as stored -> labels."""
        tasks = [int(t) for t in np.atleast_1d(task_index)]
        raw = self.source.raw_table()
        table = self._train_table(tasks) if self.train else self._test_table(max(tasks))
        return Table(table[np.where(raw < 0, IGNORE, raw)])

    def _train_table(self, tasks: list[int]) -> np.ndarray:
        """(256,) uint8 of class ids: `Scenario.train_table`, of several tasks what any of them shows."""
        first, *rest = (self.scenario.train_table(self.scenario.steps[t]) for t in tasks)
        for table in rest:
            first = np.where(first == 0, table, first)
        return first

    def _test_table(self, last: int) -> np.ndarray:
        """(256,) uint8 of class ids: classes seen; others as `test_background` says."""
        table = np.full(256, 0 if self.test_background else IGNORE, np.uint8)
        seen = list(self.scenario.steps[last].seen)
        table[seen] = self.scenario.position_table()[seen]
        if self.scenario.void == "ignore":
            table[0] = IGNORE
        table[self.scenario.num_classes_max + 1 :] = IGNORE
        return table


def to_continuum(
    scenario: Scenario,
    dataset: SegDataset,
    split: str = "train",
    transformations: list[Any] | None = None,
    test_background: bool = True,
) -> CSSScenario:
    """A native scenario of Continuum: `for taskset in to_continuum(...)` gives (image, labels, task id) as any other.

    split: "train" shows what a learner sees; another, as Continuum tests: labels of all classes seen so far, later ones
    background (`test_background`) or 255. The presence index is built once and cached, as for runs.
    Raises ConfigError where scenario and dataset differ, DataError.
    """
    check_classes(scenario, dataset)
    return CSSScenario(
        scenario, dataset, build(dataset, split, progress=False), split, transformations, test_background
    )


def from_continuum(made: SegmentationClassIncremental, name: str = "continuum", dataset: str = "") -> Scenario:
    """The scenario of ours that a Continuum scenario is: its classes, their order and steps, its mode.

    name, dataset: what Continuum does not know; of an object that `to_continuum` made, the scenario is returned as it
    was. Raises ScenarioError where class ids are not 1..K, each once.
    """
    if isinstance(made, CSSScenario):
        return made.scenario
    base, *later = (int(size) for size in made._increments)
    modes = {theirs: ours for ours, theirs in MODES.items()}
    content = {
        "dataset": dataset,
        "classes": int(made.nb_classes),
        "base": base,
        "increment": later,
        "order": [int(c) for c in made.class_order],
        "mode": modes[made.mode],
    }
    return scenarios.from_dict(name, content)
