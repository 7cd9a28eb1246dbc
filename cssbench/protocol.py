"""Scoring conventions, named and versioned: from a stored confusion matrix to IoU per class and group means.

"mIoU on ADE20K 100-50" names several conventions in public code; numbers of two of them must not share a table.
A protocol says which test geometry and argmax rule it reads, and what it does with void pixels, with classes not yet
learned, with the background index, and with classes that have no ground truth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cssbench import registry
from cssbench.errors import RunError, UnknownNameError


@dataclass(frozen=True)
class Protocol:
    """One convention. `void` and `future` say what happens to pixels whose truth is void (raw 0) or a class not yet
    learned: `ignore` drops the row of the matrix, `background` adds it to the background's row.

    `background_in_mean`: index 0 counts as a class of the base group and of "all".
    Classes without a ground-truth pixel are left out of every mean.
    """

    name: str
    version: int
    geometry: Literal["full", "crop"]
    rule: Literal["all", "foreground"]
    void: Literal["ignore", "background"]
    future: Literal["ignore", "background"]
    background_in_mean: bool
    summary: str
    used_by: str

    @property
    def id(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def key(self) -> str:
        """Which matrix of a step it reads."""
        return f"{self.geometry}.{self.rule}"

    def ious(self, matrix: np.ndarray, seen: Sequence[int]) -> dict[int, float]:
        """IoU = TP / (GT + PRED - TP) of each scored class id in [0, 1], from one matrix of the whole set.

        matrix: (K+1, K+1) int64, raw class id x predicted class id. Returns seen classes (and 0 where
        `background_in_mean`) that have ground truth. Predictions of the background count as misses of the true class.
        """
        matrix = np.asarray(matrix)
        if matrix.dtype.kind != "i" or matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise RunError(f"A confusion matrix must be square and of integers, not {matrix.dtype} {matrix.shape}.")
        seen = list(seen)
        if seen and not 0 < min(seen) <= max(seen) < len(matrix):
            raise RunError(f"Classes {min(seen)}..{max(seen)} do not fit a matrix of {len(matrix) - 1} classes.")
        future = np.setdiff1d(np.arange(1, len(matrix)), seen)
        rows = np.zeros_like(matrix)
        rows[seen] = matrix[seen]
        if self.void == "background":
            rows[0] += matrix[0]
        if self.future == "background":
            rows[0] += matrix[future].sum(axis=0)
        truth, predicted, hits = rows.sum(axis=1), rows.sum(axis=0), rows.diagonal()
        scored = ([0] if self.background_in_mean else []) + seen
        return {c: float(hits[c] / (truth[c] + predicted[c] - hits[c])) for c in scored if truth[c] > 0}

    def scores(self, matrix: np.ndarray, groups: Sequence[Sequence[int]], step: int) -> dict[str, float | None]:
        """Means in [0, 1] after step `step`: `base`, `incremental`, `all`, and `group<t>` for every step so far.

        A group without any scored class is None. The background, where it counts, belongs to the base group.
        """
        return self.means(self.ious(matrix, [c for group in groups[: step + 1] for c in group]), groups, step)

    def means(self, iou: Mapping[int, float], groups: Sequence[Sequence[int]], step: int) -> dict[str, float | None]:
        """As `scores`, from the IoU of each scored class."""
        first = ([0] if self.background_in_mean else []) + list(groups[0])
        later = [c for group in groups[1 : step + 1] for c in group]
        parts = {"base": first, "incremental": later, "all": first + later}
        parts |= {f"group{t}": first if t == 0 else list(groups[t]) for t in range(step + 1)}
        return {name: _mean([iou[c] for c in classes if c in iou]) for name, classes in parts.items()}


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


BUILT_IN = (
    Protocol(
        name="mmseg150",
        version=1,
        geometry="full",
        rule="foreground",
        void="ignore",
        future="ignore",
        background_in_mean=False,
        summary="full-size images; void and classes not yet learned are ignored; the background is no class",
        used_by="SegViT, BalConpas, SimCIS, mmsegmentation",
    ),
    Protocol(
        name="plop",
        version=1,
        geometry="crop",
        rule="all",
        void="background",
        future="background",
        background_in_mean=True,
        summary="short side 512 and centre crop; void and classes not yet learned are scored as background, a class",
        used_by="PLOP, REMINDER, RCIL, EWF, NeST",
    ),
)


def protocols() -> dict[str, Protocol]:
    """Every installed protocol by id (`name@version`)."""
    found: dict[str, Protocol] = {}
    for part in registry.parts("protocols").values():
        loaded = part.load()
        for protocol in loaded if isinstance(loaded, tuple) else (loaded,):
            found[protocol.id] = protocol
    return found


def get(name: str) -> Protocol:
    """The protocol `name@version`, or the newest version of `name`. Raises UnknownNameError."""
    found = protocols()
    if name in found:
        return found[name]
    versions = [p for p in found.values() if p.name == name]
    if not versions:
        raise UnknownNameError("protocol", name, found)
    return max(versions, key=lambda p: p.version)
