"""From run folders to scores, sorted into settings: sets of runs whose numbers may stand in one table.

A run that learned everything in one step is an *oracle*. It has no base and incremental classes of its own, so it is
scored with the class groups of each setting on the same data, and stands in that setting's tables.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cssbench import compare, scoring
from cssbench.errors import RunError
from cssbench.metrics import continual
from cssbench.protocol import Protocol
from cssbench.results import RunFolder, StepRecord

Scores = dict[str, float | None]


@dataclass(frozen=True)
class Setting:
    """All that two runs must share for one table. `data` names files and evaluated images by their fingerprints; `void`
    is "class" where label 0 is background, a class of the dataset."""

    dataset: str
    scenario: str
    mode: str
    void: str
    split: str
    data: str
    groups: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, run: RunFolder) -> Setting:
        scene = run.scenario
        found = run.provenance.get("data")
        found = found if isinstance(found, dict) else {}
        data = json.dumps([found.get("identity"), found.get("evaluated_sha256")], sort_keys=True)
        return cls(
            str(scene["dataset"]),
            str(scene["name"]),
            str(scene["mode"]),
            "class" if scoring.has_background_class(run) else str(scene.get("void", "background")),
            run.config.evaluate.split,
            data,
            tuple(tuple(group) for group in run.groups),
        )

    @property
    def digest(self) -> str:
        return _digest(self)

    @property
    def title(self) -> str:
        return f"{self.scenario}, {self.mode}"

    @property
    def facts(self) -> str:
        """Everything else that tells two settings apart, in words."""
        return f"Dataset {self.dataset}; {describe_sizes([len(group) for group in self.groups])}; {self.conditions}"

    @property
    def conditions(self) -> str:
        """What scenarios of one data set share, in words."""
        parts = [
            "native class order" if list(self.order) == sorted(self.order) else f"class order {_digest(self.order)}",
            UNLABELLED[self.void],
            f"evaluated on {self.split}",
            *([f"data {_digest(self.data)}"] if self.data != UNKNOWN else []),
        ]
        return "; ".join(parts)

    @property
    def order(self) -> tuple[int, ...]:
        """Class ids in the order in which they are learned."""
        return tuple(c for group in self.groups for c in group)

    @property
    def shared(self) -> tuple[Any, ...]:
        """What scenarios of one data set must have in common for one table."""
        return self.dataset, self.mode, self.void, self.split, self.data, self.order

    def same_data(self, other: Setting) -> bool:
        """Whether both learn the same classes from the same files and are evaluated on the same images."""
        return (self.dataset, self.split, self.data, set(self.order)) == (
            other.dataset,
            other.split,
            other.data,
            set(other.order),
        )


UNLABELLED = {
    "background": "unlabelled pixels trained as background",
    "ignore": "unlabelled pixels ignored",
    "class": "background is a class",
}
UNKNOWN = json.dumps([None, None])  # `Setting.data` of a run that recorded none


def _digest(value: Any) -> str:
    """Eight hex digits: equal for equal values."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:8]


def describe_sizes(sizes: Sequence[int]) -> str:
    """[100, 10, 10] -> '100 base classes, then 2 steps of 10'."""
    base, later = f"{sizes[0]} base classes", list(sizes[1:])
    if not later:
        return f"{sizes[0]} classes in one step"
    if len(set(later)) == 1:
        return f"{base}, then {len(later)} step{'s' * (len(later) > 1)} of {later[0]}"
    return f"{base}, then steps of {', '.join(map(str, later))}"


@dataclass(frozen=True)
class Scored:
    """One run under one protocol in one setting.

    scores: `Protocol.scores` after each finished step (an oracle: once, after all classes). step_ious: class id -> IoU
    after the same steps. alone[g]: see `continual.lost_parts`. All in [0, 1].
    flaws: why it stands in tables by permission only. fitting: labels of the oracles that may be its own.
    """

    setting: Setting
    protocol: Protocol
    run: RunFolder
    label: str
    scores: tuple[Scores, ...]
    step_ious: tuple[dict[int, float], ...]
    alone: tuple[float | None, ...]
    flaws: tuple[str, ...] = ()
    fitting: frozenset[str] = frozenset()

    @property
    def ious(self) -> dict[int, float]:
        """Class id -> IoU after the last finished step."""
        return self.step_ious[-1]

    @property
    def imported(self) -> bool:
        return scoring.is_imported(self.run)

    @property
    def oracle(self) -> bool:
        return self.run.num_steps == 1

    @property
    def done(self) -> int:
        """Number of finished steps."""
        return len(self.scores)

    @property
    def finished(self) -> bool:
        return self.done == self.run.num_steps

    @property
    def mark(self) -> str:
        """What a reader must know beside every number, to stand behind the label."""
        known = f"{' (imported)' if self.imported else ''}{again(self.run)}"
        if self.oracle:
            return f"{known} (oracle)"
        return known if self.finished else f"{known} ({self.done} of {self.run.num_steps} steps)"

    @property
    def shown_as(self) -> str:
        return self.label + self.mark

    @cached_property
    def table(self) -> list[list[float | None]]:
        """table[t][g], see `continual`. Only for runs that are no oracle."""
        return continual.group_table(self.scores)

    @cached_property
    def class_forgetting(self) -> dict[int, float]:
        """Class id -> best IoU at an earlier step minus the last one, for classes measured at both. Not the background,
        which becomes another thing with every step."""
        found = {}
        for c, last in self.ious.items():
            earlier = [ious[c] for ious in self.step_ious[:-1] if c in ious]
            if c and earlier:
                found[c] = max(earlier) - last
        return found

    @property
    def classes(self) -> dict[int, str]:
        """Class id -> name, background included."""
        names = self.run.scenario.get("classes") or []
        count = max(c for group in self.setting.groups for c in group)
        known = {c: str(names[c - 1]) if c <= len(names) else f"class {c}" for c in range(1, count + 1)}
        return {0: "background"} | known


def training(run: RunFolder) -> dict[str, Any]:
    """The provenance of what trained the weights: the run's own, or that of the run whose weights it evaluated."""
    origin = run.provenance.get("evaluated_from")
    found = origin.get("provenance") if isinstance(origin, dict) else None
    return found if isinstance(found, dict) else run.provenance


def again(run: RunFolder) -> str:
    """To follow the label of stored weights that were evaluated again: ' (evaluated again: p0 0.8)'; else nothing."""
    origin = run.provenance.get("evaluated_from")
    if not isinstance(origin, dict):
        return ""
    changes = origin.get("changes")
    shown = [
        f"{key.removeprefix('model.')} {'none' if new is None else new}"
        for key, (_, new) in (changes.items() if isinstance(changes, dict) else ())
        if not key.startswith(("data.", "train."))  # where it ran
    ]
    return f" (evaluated again{': ' if shown else ''}{', '.join(shown)})"


def caveats(run: RunFolder) -> list[str]:
    """Why the numbers of a run must not stand beside published ones; empty where nothing is known against it."""
    data, scale = run.provenance.get("data"), str(training(run).get("scale") or "full")
    data = data if isinstance(data, dict) else {}
    found = []
    if data.get("generated") or "synthetic" in (data.get("name"), run.scenario["dataset"]):
        found.append("generated data")
    if scale != "full":
        found.append(scale.replace("small", "small budget", 1) if scale.startswith("small") else scale)
    if run.config.evaluate.limit is not None:
        found.append(f"evaluated on the first {run.config.evaluate.limit} images only")
    note = str(training(run).get("note") or run.config.note)
    return found + ([note] if note else [])


def unique(runs: Iterable[RunFolder]) -> list[RunFolder]:
    """Each folder once. Raises RunError when there is none, or one has no finished step."""
    found = list({run.path.resolve(): run for run in runs}.values())
    if not found:
        raise RunError("There is no run to report. Name at least one run folder.")
    for run in found:
        if not run.records():
            raise RunError(
                f"{run.path} has no finished step, so there is nothing to report. "
                f"`cssbench resume {run.path}` goes on with it."
            )
    return found


def labels(runs: Sequence[RunFolder]) -> dict[Path, str]:
    """Path -> the shortest end of it that no other run shares."""
    paths = {run.path: run.path.resolve() for run in runs}

    def end(path: Path, length: int) -> str:
        return "/".join(path.parts[-length:])

    found = {}
    for path, full in paths.items():
        others = [p for p in paths.values() if p != full]
        length = 1
        while any(end(full, length) == end(other, length) for other in others):
            length += 1
        found[path] = end(full, length)
    return found


def score(
    runs: Iterable[RunFolder], protocol: Protocol, flaws: Mapping[Path, tuple[str, ...]] = MappingProxyType({})
) -> list[Scored]:
    """Every run under `protocol`, setting by setting, oracles last. An oracle stands in every setting that it serves.

    Runs that kept no matrix for the protocol's geometry and rule are left out: compare the labels.
    Raises RunError when a run has no finished step or a damaged file.
    """
    runs = unique(runs)
    names = labels(runs)
    found = []
    for setting, members in _members(runs).items():
        for run in members:
            scored = _score_one(setting, protocol, run, names[run.path], flaws.get(run.path, ()))
            found += [scored] if scored else []
    return [replace(one, fitting=_fitting(one, found)) for one in found]


def _fitting(one: Scored, among: Iterable[Scored]) -> frozenset[str]:
    """The oracles of the same model and data, without any other difference that counts."""
    if one.oracle or one.imported:
        return frozenset()
    oracles = [o for o in among if o.oracle and o.setting == one.setting]
    alike = [o for o in oracles if o.run.config.model == one.run.config.model]
    return frozenset(o.label for o in alike if not compare.differences([one.run, o.run], one.protocol))


def by_setting(scored: Iterable[Scored]) -> dict[Setting, list[Scored]]:
    """Sorted apart, in order of appearance."""
    found: dict[Setting, list[Scored]] = {}
    for one in scored:
        found.setdefault(one.setting, []).append(one)
    return found


def own_oracle(one: Scored, among: Iterable[Scored]) -> Scored | None:
    """Of the oracles that fit, one of the same method and seed is preferred. None for an unfinished run."""
    if not one.finished:
        return None
    mine = one.run.config
    fitting = [o for o in among if o.label in one.fitting and o.setting == one.setting]

    def likeness(oracle: Scored) -> tuple[bool, bool]:
        return oracle.run.config.method == mine.method, oracle.run.config.seed == mine.seed

    return max(fitting, key=likeness, default=None)


def _members(runs: Sequence[RunFolder]) -> dict[Setting, list[RunFolder]]:
    """Setting -> its runs. An oracle stands in every setting on its data, an imported run, whose data are not known, in
    the first setting that it fits otherwise."""
    found: dict[Setting, list[RunFolder]] = {}
    for run in sorted(runs, key=scoring.is_imported):  # the imported ones last
        if run.num_steps > 1:
            own = Setting.of(run)
            fitting = [s for s in found if scoring.is_imported(run) and replace(own, data=s.data, split=s.split) == s]
            found.setdefault(next(iter(fitting), own), []).append(run)
    several = list(found)
    for run in runs:
        if run.num_steps == 1:
            own = Setting.of(run)
            served = [setting for setting in several if setting.same_data(own)]
            for setting in served or [own]:
                found.setdefault(setting, []).append(run)
    return found


def _score_one(
    setting: Setting, protocol: Protocol, run: RunFolder, label: str, flaws: tuple[str, ...]
) -> Scored | None:
    records = run.records()
    if not scoring.is_imported(run):
        for record in records:
            run.verify(record, "matrices.npz")
    if not scoring.can_score(run, protocol):
        return None
    scores = tuple(scoring.run_scores(run, protocol, setting.groups))
    ious = tuple(scoring.step_ious(run, record, protocol, setting.groups) for record in records)
    # An oracle has seen every class after its only step.
    alone = [] if run.num_steps == 1 else scoring.alone_scores(run, records[-1], protocol)
    return Scored(setting, protocol, run, label, scores, ious, tuple(alone), flaws)


def sample_files(run: RunFolder, records: Sequence[StepRecord]) -> dict[str, tuple[Path, Path, dict[int, Path]]]:
    """Stem -> (image, truth, {step: prediction}) of the sample images of a run that are there."""
    found = {}
    predictions = {record.index: record.samples() for record in records}
    for truth in sorted((run.path / "samples").glob("*.truth.png")):
        stem = truth.name.removesuffix(".truth.png")
        image = truth.with_name(f"{stem}.image.png")
        steps = {index: there[stem] for index, there in predictions.items() if stem in there}
        if image.is_file() and steps:
            found[stem] = (image, truth, steps)
    return found
