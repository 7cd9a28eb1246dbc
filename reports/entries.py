"""Rows of tables and lines of figures: runs that differ in nothing but the seed, or in seed and class order."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cssbench.metrics import continual
from cssbench.reports.noise import Spread, spread
from cssbench.reports.scored import Scored

MEANS = ("base", "incremental", "all")
# What may differ between two runs of one entry, as dotted keys of the recipe.
FREE = ("seed", "note", "scenario.order", "data.root", "data.workers", "evaluate.flops_images")


@dataclass(frozen=True)
class Entry:
    """One row: `members` share everything but `FREE`. label: their labels, shortened to what differs."""

    members: tuple[Scored, ...]
    label: str

    @property
    def first(self) -> Scored:
        return self.members[0]

    @property
    def n(self) -> int:
        """Number of runs. In a table over class orders, an oracle is a member under each order."""
        return len({one.run.path for one in self.members})

    @property
    def oracle(self) -> bool:
        return self.first.oracle

    @property
    def finished(self) -> bool:
        return self.first.finished

    @property
    def compared(self) -> bool:
        """Whether it takes part in comparisons between methods."""
        return self.finished and not self.oracle and not self.first.imported

    @property
    def shown_as(self) -> str:
        """The label with what a reader must know beside every number."""
        return self.label + self.first.mark

    @property
    def seeds(self) -> str:
        return ", ".join(str(seed) for seed in sorted({one.run.config.seed for one in self.members}))

    def spread(self, values: Sequence[float | None]) -> Spread | None:
        """Over the runs, from one value per member; None where one is missing."""
        found: dict[Path, list[float]] = {}
        for one, value in zip(self.members, values, strict=True):
            if value is None:
                return None
            found.setdefault(one.run.path, []).append(value)
        return spread([sum(each) / len(each) for each in found.values()])

    def last(self, name: str) -> Spread | None:
        """`name` of `MEANS` after the last finished step, or "avg" (no oracle has one), over the runs."""
        if name != "avg":
            return self.spread([one.scores[-1][name] for one in self.members])
        return None if self.oracle else self.spread([continual.average(one.scores) for one in self.members])

    def steps(self, name: str) -> list[Spread | None]:
        """`name` of `MEANS` after each finished step, over the runs."""
        return [self.spread([one.scores[t][name] for one in self.members]) for t in range(self.first.done)]

    def ious(self, step: int = -1) -> dict[int, float]:
        """Class id -> IoU after `step`, mean over the runs; the classes that all of them could measure."""
        found = [one.step_ious[step] for one in self.members]
        return {c: sum(ious[c] for ious in found) / len(found) for c in found[0] if all(c in ious for ious in found)}

    def forgetting(self) -> dict[int, float]:
        """Class id -> best IoU at an earlier step minus the last, mean over the runs."""
        found = [one.class_forgetting for one in self.members]
        return {c: sum(lost[c] for lost in found) / len(found) for c in found[0] if all(c in lost for lost in found)}


def entries(scored: Sequence[Scored]) -> list[Entry]:
    """The runs of one table, put together in order of appearance. An unfinished run and an imported one stand alone.

    A run with the seed and class order of an earlier one is a repetition, no further sample: it begins another row.
    """
    found: dict[str, list[Scored]] = {}
    for one in scored:
        same = f"{one.label}\n" if one.imported or not one.finished else recipe(one)
        turn = 0
        while any(_draw(other) == _draw(one) for other in found.get(f"{same}{turn}", [])):
            turn += 1
        found.setdefault(f"{same}{turn}", []).append(one)
    return [Entry(tuple(members), short([one.label for one in members])) for members in found.values()]


def _draw(one: Scored) -> tuple[Any, ...]:
    return one.run.config.seed, one.setting.groups


def recipe(one: Scored) -> str:
    """The resolved recipe without `FREE`; equal for two runs of one entry."""
    content = one.run.config.dump()
    for key in FREE:
        *path, name = key.split(".")
        section = content
        for part in path:
            section = section.get(part, {})
        section.pop(name, None)
    return json.dumps([one.oracle, content], sort_keys=True)


def short(labels: Sequence[str]) -> str:
    """["cl-s0", "cl-s1"] -> "cl-s{0,1}"; the middle of many is left out."""
    if len(labels) == 1:
        return labels[0]
    head = _common_start(labels)
    tail = _common_start([label[len(head) :][::-1] for label in labels])[::-1]
    middle = [label[len(head) : len(label) - len(tail)] for label in labels]
    if len(middle) > 5:
        middle = [*middle[:2], "…", middle[-1]]
    return f"{head}{{{','.join(middle)}}}{tail}"


def _common_start(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)
    return first[: next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def by_class_and_seed(one: Entry, other: Entry, name: str = "all") -> tuple[list[float], list[float]]:
    """(differences per class, differences per shared seed and order) of `one` minus `other` after the last step.

    Per class: IoU, mean over the runs of each. Per seed: the mean `name` of the two runs with that seed.
    """
    mine, its = one.ious(), other.ious()
    runs = {_draw(run): run.scores[-1][name] for run in other.members}
    pairs = [(run.scores[-1][name], runs.get(_draw(run))) for run in one.members]
    return [mine[c] - its[c] for c in mine if c in its], [a - b for a, b in pairs if a is not None and b is not None]


def learners(found: Iterable[Entry]) -> list[Entry]:
    return [entry for entry in found if not entry.oracle]
