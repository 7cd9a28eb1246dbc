"""What a learner meets at each step: how many images show each class, how many pixels it has, and as what they count.

Every class is counted at every step, those too that the learner sees as background: how much of the background of a
step is old or future classes (the background shift) is what the modes of a scenario differ in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from cssbench.data.base import SegDataset
from cssbench.data.parallel import parallel_map
from cssbench.scenario import IGNORE, Scenario

KINDS = ("new", "old", "future", "void", "padding")


@dataclass(frozen=True)
class Frequency:
    """One class among the training images of one step.

    class_id: 0 = void, 255 = ignored by the data set. learned: step that introduces the class; None for 0 and 255.
    kind: `new`, `old` or `future` at this step, `void`, or `padding` (255). seen_as: `class`, `background` or
    `ignored`. images: how many of the step's images show it. pixels: how many it has there. share: of all pixels.
    """

    mode: str
    step: int
    class_id: int
    name: str
    learned: int | None
    kind: str
    seen_as: str
    images: int
    pixels: int
    share: float


@dataclass(frozen=True)
class StepFrequencies:
    """The training set of one step: number of images, and every class that occurs or is learned there."""

    mode: str
    step: int
    images: int
    rows: tuple[Frequency, ...]

    def share(self, *kinds: str, seen_as: str | None = None) -> float:
        """Share of the step's pixels, in [0, 1], that are of classes of these kinds."""
        return sum(row.share for row in self.rows if row.kind in kinds and seen_as in (None, row.seen_as))

    @property
    def labelled(self) -> list[Frequency]:
        """The classes that the learner has labels of, in the order in which they are learned."""
        return [row for row in self.rows if row.seen_as == "class"]


def count_pixels(dataset: SegDataset, split: str = "train", progress: bool = True) -> np.ndarray:
    """(n, 256) int64: pixels of each class id in each label map of a split, in the order of `stems`.

    Raises DataError at an unreadable or out-of-range label map.
    """
    stems = dataset.stems(split)
    rows = parallel_map(partial(_counts, dataset, split), stems, f"Counting {split} labels", progress=progress)
    return np.stack(rows)


def _counts(dataset: SegDataset, split: str, stem: str) -> np.ndarray:
    return np.bincount(dataset.label(split, stem).ravel(), minlength=256)


def frequencies(
    scenario: Scenario, counts: np.ndarray, names: Sequence[str], background_class: bool = False
) -> list[StepFrequencies]:
    """Each step of a scenario in its mode. counts: from `count_pixels`; names: of the classes 1, 2, ...;
    background_class: class id 0 is background, a class of the dataset, and not void (its kind is `void` all the same).

    Raises ScenarioError when the scenario has other classes, or a step has no image.
    """
    presence = counts[:, : len(names) + 1] > 0
    learned = {c: t for t, group in enumerate(scenario.groups) for c in group}
    found = []
    for step, chosen in zip(scenario.steps, scenario.images(presence), strict=True):
        here = counts[chosen]
        pixels, images = here.sum(axis=0), (here > 0).sum(axis=0)
        table, total = scenario.train_table(step), max(1, int(here.sum()))
        rows = []
        for c in (*scenario.order, *sorted(set(range(1, 1 + len(names))) - set(scenario.order)), 0, IGNORE):
            kind = _kind(c, learned.get(c), step.index)
            if not pixels[c] and kind != "new":
                continue
            label = int(table[c])
            seen_as = "ignored" if label == IGNORE else "class" if label else "background"
            zero = "background" if background_class else kind
            name = names[c - 1] if 0 < c <= len(names) else kind if c else zero
            share = int(pixels[c]) / total
            rows.append(
                Frequency(
                    scenario.mode, step.index, c, name, learned.get(c), kind, seen_as, int(images[c]), int(pixels[c]),
                    share,
                )
            )  # fmt: skip
        found.append(StepFrequencies(scenario.mode, step.index, len(chosen), tuple(rows)))
    return found


def _kind(class_id: int, learned: int | None, step: int) -> str:
    if class_id in (0, IGNORE):
        return "void" if class_id == 0 else "padding"
    if learned is None or learned > step:
        return "future"
    return "new" if learned == step else "old"
