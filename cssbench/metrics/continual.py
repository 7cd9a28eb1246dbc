"""Continual measures from the scores of every step. numpy only; each function gives its formula and source.

`table[t][g]` is the mIoU (0..1) of the classes of step g, measured after step t >= g; None where not measurable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

Table = Sequence[Sequence[float | None]]

FORMULAS = {
    "base": "mIoU of the base classes after the last step",
    "incremental": "mIoU of all later classes after the last step",
    "all": "mIoU of all classes after the last step",
    "avg": "mean over steps t (t = 0 included) of the mIoU of all classes seen at t",
    "drop to oracle": "mIoU(own oracle) - mIoU(run), over the same classes",
    "relative drop": "(mIoU(own oracle) - mIoU(run)) / mIoU(own oracle), over the same classes",
    "first": "mIoU(group, right after learning it)",
    "last": "mIoU(group, T), T the last step",
    "drop": "mIoU(group, right after learning it) - mIoU(group, T)   [first minus last: thesis Table 4.12]",
    "forgetting": "max over steps s < T of mIoU(group, s) - mIoU(group, T)   [Chaudhry et al. 2018, eq. 3]",
    "mean forgetting": "mean of forgetting over the groups learned before the last step",
    "lost to parameters": "mIoU(group, right after learning it) - mIoU(group, T, later outputs left out)",
    "lost to competition": "mIoU(group, T, later outputs left out) - mIoU(group, T)",
    "BWT": "mean over groups g < T of mIoU(g, T) - mIoU(g, g)   [Lopez-Paz & Ranzato 2017, eq. 3]",
}


def group_table(scores: Sequence[Mapping[str, float | None]]) -> list[list[float | None]]:
    """`Protocol.scores` of each step -> table[t][g]."""
    return [[step[f"group{g}"] for g in range(t + 1)] for t, step in enumerate(scores)]


def average(scores: Sequence[Mapping[str, float | None]]) -> float | None:
    """`avg`: mean over steps of "all", step 0 included. None when a step has none."""
    values = [step["all"] for step in scores]
    return None if None in values else mean(values)


def forgetting(table: Table) -> list[float | None]:
    """Per group learned before the last step: best earlier mIoU minus the last. Chaudhry et al. 2018, eq. 3.

    Can be negative where the last step is the best. Empty with one step.
    """
    last = len(table) - 1
    found: list[float | None] = []
    for group in range(last):
        earlier = [v for t in range(group, last) if (v := table[t][group]) is not None]
        final = table[last][group]
        found.append(None if final is None or not earlier else max(earlier) - final)
    return found


def drop(table: Table) -> list[float | None]:
    """Per group learned before the last step: mIoU right after learning it minus the last (thesis Table 4.12)."""
    last = len(table) - 1
    return [_difference(table[group][group], table[last][group]) for group in range(last)]


def backward_transfer(table: Table) -> float | None:
    """BWT: mean over groups before the last of (last - just learned). Lopez-Paz & Ranzato 2017, eq. 3."""
    return mean([None if d is None else -d for d in drop(table)])


def lost_parts(table: Table, alone: Sequence[float | None]) -> list[tuple[float | None, float | None]]:
    """Split each group's `drop` exactly into (lost to parameters, lost to competition between outputs).

    alone[g]: mIoU of group g after the last step with only the outputs of steps 0..g in the argmax, scored as at step
    g. The first part is 0 where old parameters did not change; the sum is `drop`. Where a protocol ignores classes not
    yet learned, the second part also holds what their pixels cost once they count.
    """
    last = len(table) - 1
    return [
        (_difference(table[group][group], alone[group]), _difference(alone[group], table[last][group]))
        for group in range(last)
    ]


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are there; None when none is."""
    there = [v for v in values if v is not None]
    return float(np.mean(there)) if there else None


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
