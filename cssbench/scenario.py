"""Scenarios: a dataset's classes cut into steps, the images of each step, and the labels a learner sees.

Two numberings occur. A *class id* is the dataset's: 1..K, 0 = void (unlabelled). A *position* is a model output:
0 = background, 1, 2, ... in the order in which the scenario introduces the classes. With the native class order the
two agree. Labels that a learner sees, and model outputs, are positions; stored matrices are in class ids.

Sources: image selection and relabelling as in Cermelli et al. 2020 (MiB) and Douillard et al. 2021 (PLOP);
`partitioned` as in arXiv 2405.09858 (each image in exactly one step).
"""

from __future__ import annotations

import hashlib
import tomllib
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from cssbench import registry
from cssbench.config import explain_validation
from cssbench.errors import ScenarioError, UnknownNameError, fault

Mode = Literal["overlapped", "disjoint", "sequential", "partitioned"]
Void = Literal["background", "ignore"]
IGNORE = 255  # padding, and void where `void = "ignore"`
MAX_CLASSES = 254  # label maps are uint8: 0 is background, 255 is ignored


@dataclass(frozen=True)
class Step:
    """One increment. `new` and `old` are class ids in the order in which they are learned; `index` 0 is the base."""

    index: int
    new: tuple[int, ...]
    old: tuple[int, ...]

    @property
    def seen(self) -> tuple[int, ...]:
        return self.old + self.new

    @property
    def new_positions(self) -> range:
        """Positions (model outputs) of the new classes; background is position 0."""
        return range(1 + len(self.old), 1 + len(self.seen))


class ScenarioSpec(BaseModel):
    """The content of a scenario TOML. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: str
    description: str = ""
    classes: int = Field(ge=1, le=MAX_CLASSES, description="number of classes of the dataset")
    base: int = Field(ge=1, description="number of classes of step 0")
    increment: int | list[int] = Field(default_factory=list, description="classes of each later step")
    mode: Mode = "overlapped"
    order: list[int] | NonNegativeInt | None = Field(
        default=None, description="class ids, a seed, or nothing: as numbered"
    )
    void: Void = "background"
    partition_seed: NonNegativeInt = 0


@dataclass(frozen=True)
class Scenario:
    """A dataset cut into steps. Build one with `load` or `from_dict`, which check everything.

    `groups` are the class ids of each step, in the order in which they are learned.
    """

    name: str
    dataset: str
    groups: tuple[tuple[int, ...], ...]
    mode: Mode = "overlapped"
    void: Void = "background"
    partition_seed: int = 0
    description: str = ""

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        old: tuple[int, ...] = ()
        steps = []
        for index, new in enumerate(self.groups):
            steps.append(Step(index, new, old))
            old += new
        return tuple(steps)

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Class ids in the order in which they are learned: position p > 0 is class `order[p - 1]`."""
        return self.steps[-1].seen

    @property
    def num_classes(self) -> int:
        return len(self.order)

    def joint(self) -> Scenario:
        """The same classes in one step: what the oracle learns."""
        return replace(self, name=f"{self.name}-joint", groups=(self.order,))

    def position_table(self) -> np.ndarray:
        """(256,) uint8: class id -> position, for every class; 0 -> 0, all else -> 255."""
        table = np.full(256, IGNORE, np.uint8)
        table[0] = 0
        table[list(self.order)] = np.arange(1, 1 + self.num_classes)
        return table

    def train_table(self, step: Step) -> np.ndarray:
        """(256,) uint8 look-up table: class id -> label that the learner sees at `step`.

        New classes become their position; old and future classes become background 0 (`sequential`: old classes keep
        their position); void becomes 0, or 255 with `void = "ignore"`; 255 stays 255.
        """
        shown = step.seen if self.mode == "sequential" else step.new
        positions = self.position_table()
        table = np.zeros(256, np.uint8)
        table[list(shown)] = positions[list(shown)]
        table[0] = IGNORE if self.void == "ignore" else 0
        table[self.num_classes_max + 1 :] = IGNORE
        return table

    @property
    def num_classes_max(self) -> int:
        """Largest class id in the scenario."""
        return max(self.order)

    def images(self, presence: np.ndarray) -> list[np.ndarray]:
        """Training images of each step: indices, ascending, into `presence` (as for `selected`).

        Raises ScenarioError when a step has no image.
        """
        picked = [np.flatnonzero(column) for column in self.selected(presence).T]
        for step, indices in zip(self.steps, picked, strict=True):
            if len(indices) == 0:
                raise ScenarioError(
                    f"Step {step.index} of scenario {self.name!r} ({self.mode}) has no training image: none shows its "
                    f"classes {list(step.new)} under that rule. Use another mode, order or increment."
                )
        return picked

    def selected(self, presence: np.ndarray) -> np.ndarray:
        """(n, steps) bool: does image i belong to step t?

        presence: (n, K+1) bool, does image i show class id c (column 0, void, is not looked at).
        Raises ScenarioError when it lacks a class.
        """
        if presence.shape[1] <= self.num_classes_max:
            raise ScenarioError(
                f"Scenario {self.name!r} has class ids up to {self.num_classes_max}, but the data hold only "
                f"{presence.shape[1] - 1} classes. Use the scenario of that dataset, or import the right index."
            )
        shows = np.stack([presence[:, list(group)].any(axis=1) for group in self.groups], axis=1)
        if self.mode == "overlapped":
            return shows
        if self.mode == "partitioned":
            return _partition(shows, self.partition_seed)
        later = np.cumsum(shows[:, ::-1], axis=1)[:, ::-1] - shows > 0
        return shows & ~later  # disjoint, sequential: no class of a later step may show


def _partition(shows: np.ndarray, seed: int) -> np.ndarray:
    """Give each image that shows any class to exactly one step that it shows classes of.

    Balanced: images are visited in a seeded random order, those with the fewest choices first, and each goes to its
    candidate step that is furthest below its fair share (share = its part of all image-step candidacies).
    """
    rng = np.random.default_rng(seed)
    chosen = np.zeros_like(shows)
    share = shows.sum(axis=0) / max(1, shows.sum())
    count = np.zeros(shows.shape[1])
    order = rng.permutation(len(shows))
    order = order[np.argsort(shows[order].sum(axis=1), kind="stable")]
    for image in order:
        candidates = np.flatnonzero(shows[image])
        if len(candidates):
            step = candidates[np.argmin(count[candidates] / share[candidates])]
            chosen[image, step] = True
            count[step] += 1
    return chosen


def stems_digest(stems: list[str]) -> str:
    """SHA-256 (hex) of the sorted stems joined by newlines: names an image set, whatever its order."""
    return hashlib.sha256("\n".join(sorted(stems)).encode()).hexdigest()


def from_dict(name: str, content: dict[str, Any]) -> Scenario:
    """Build and check a scenario from the content of its TOML. Raises ScenarioError."""
    try:
        spec = ScenarioSpec.model_validate(content)
    except ValidationError as error:
        raise ScenarioError(explain_validation(f"Scenario {name!r}", error, ScenarioSpec)) from None
    order = _class_order(name, spec)
    sizes = [spec.base, *_increments(name, spec)]
    starts = np.cumsum([0, *sizes])
    groups = tuple(tuple(order[a:b]) for a, b in pairwise(starts))
    return Scenario(name, spec.dataset, groups, spec.mode, spec.void, spec.partition_seed, spec.description)


def _class_order(name: str, spec: ScenarioSpec) -> list[int]:
    native = list(range(1, 1 + spec.classes))
    if spec.order is None:
        return native
    if isinstance(spec.order, int):
        return [int(c) for c in np.random.default_rng(spec.order).permutation(native)]
    twice = sorted({c for c in spec.order if spec.order.count(c) > 1})
    if twice:
        raise ScenarioError(f"Scenario {name!r} lists class {twice[0]} twice in `order`. List every class once.")
    wrong = sorted(set(spec.order) ^ set(native))
    if wrong:
        raise ScenarioError(
            f"The `order` of scenario {name!r} must hold each class id 1..{spec.classes} once; "
            f"missing or out of range: {wrong[:10]}."
        )
    return list(spec.order)


def _increments(name: str, spec: ScenarioSpec) -> list[int]:
    rest = spec.classes - spec.base
    if isinstance(spec.increment, int):
        if spec.increment < 1 or rest < 0 or rest % spec.increment:
            raise ScenarioError(
                f"Scenario {name!r}: {spec.base} base classes and increments of {spec.increment} do not add up to "
                f"{spec.classes} classes. Choose an increment that divides {rest}, or list the increments."
            )
        return [spec.increment] * (rest // spec.increment)
    if any(size < 1 for size in spec.increment) or sum(spec.increment) != rest:
        raise ScenarioError(
            f"Scenario {name!r}: {spec.base} base classes and increments {spec.increment} do not add up to "
            f"{spec.classes} classes ({spec.base + sum(spec.increment)} instead), or one is below 1."
        )
    return list(spec.increment)


def names() -> dict[str, str]:
    """Every installed scenario: id -> the distribution that ships it."""
    return {stem: distribution for stem, (distribution, _) in registry.toml_files("scenarios").items()}


def load(name: str, **overrides: Any) -> Scenario:
    """The scenario `name`: an installed one, or a path to a TOML file (its stem becomes the name).

    overrides: keys of the TOML to replace (`mode`, `order`, `void`, `partition_seed`); None leaves a key alone.
    Raises UnknownNameError, ScenarioError.
    """
    overrides = {key: value for key, value in overrides.items() if value is not None}
    path = Path(name)
    if path.suffix == ".toml":
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UnknownNameError("scenario file", name, names()) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ScenarioError(f"Scenario file {name!r} is not valid TOML: {fault(error)}.") from None
        return from_dict(path.stem, content | overrides)
    return from_dict(name, registry.read_toml("scenarios", name) | overrides)
