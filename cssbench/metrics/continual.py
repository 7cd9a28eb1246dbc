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
    "FWT": "mean over groups g > 0 of mIoU(g, g) - mIoU(g, a model trained on step g alone)   [Wang et al. 2024]",
    "intransigence": "mIoU(g, joint model of steps 0..g) - mIoU(g, g)   [Chaudhry et al. 2018]",
    "plasticity": "mean over groups g > 0 of mIoU(g, g): new classes right after learning them",
    "stability": "mean over groups g < T of mIoU(g, T) / mIoU(g, g): the part that is kept, 1 where nothing is lost",
    "rigidity": "mIoU of the base classes after the last step, which is `base`   [thesis, section 4.3.6]",
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


def forward_transfer(table: Table, single: Sequence[float | None] | None) -> float | None:
    """FWT: mean over groups g > 0 of (mIoU right after learning g) - single[g], in [-1, 1].

    single[g]: mIoU of group g by a model of the same kind trained from scratch on the images of step g alone. Needs
    such runs; None without them. The form of Wang et al. 2024 (A Comprehensive Survey of Continual Learning). The
    older one of Lopez-Paz & Ranzato 2017, eq. 4, scores group g *before* step g: a segmenter has no output for its
    classes yet, their IoU is 0 by construction, so that form measures nothing here.
    """
    if single is None:
        return None
    return mean([_difference(table[g][g], single[g]) for g in range(1, len(table))])


def intransigence(table: Table, oracle: Sequence[float | None]) -> list[float | None]:
    """Per group: mIoU(g, joint model of steps 0..g) - mIoU(g, right after learning it). Chaudhry et al. 2018.

    oracle[g]: mIoU of group g by the same model trained jointly on the classes of steps 0..g, None where there is no
    such run. The joint run of all classes serves the last group only. Negative where the run is better.
    """
    return [_difference(oracle[g], table[g][g]) for g in range(len(table))]


def plasticity(table: Table) -> float | None:
    """Mean over groups g > 0 of the mIoU right after learning g, in [0, 1]. None with one step."""
    return mean([table[g][g] for g in range(1, len(table))])


def stability(table: Table) -> float | None:
    """Mean over groups before the last of last mIoU / mIoU right after learning, 1 where nothing is lost.

    Above 1 where old groups gained. Groups that start at 0 have nothing to lose and are left out.
    """
    last = len(table) - 1
    pairs = [(table[last][g], table[g][g]) for g in range(last)]
    return mean([after / before for after, before in pairs if after is not None and before])


def rigidity(table: Table) -> float | None:
    """mIoU of the base classes after the last step (thesis, section 4.3.6). None without a step."""
    return table[-1][0] if table else None


def group_rows(table: Table, alone: Sequence[float | None]) -> list[dict[str, float | None]]:
    """Per group, the last included: its measures by their names in `FORMULAS` (thesis Table 4.12). alone: `lost_parts`.

    The newest group has `first` and `last` alone: it had no step to lose anything in.
    """
    last = len(table) - 1
    names = ("drop", "forgetting", "lost to parameters", "lost to competition")
    columns = [drop(table), forgetting(table), *zip(*lost_parts(table, alone), strict=True)]
    rows = []
    for group in range(last + 1):
        measured = [column[group] for column in columns] if group < last else [None] * len(names)
        rows.append(
            {"first": table[group][group], "last": table[last][group], **dict(zip(names, measured, strict=True))}
        )
    return rows


def summary(table: Table) -> dict[str, float | None]:
    """The measures of a run on its own, by their names in `FORMULAS`."""
    return {
        "mean forgetting": mean(forgetting(table)),
        "BWT": backward_transfer(table),
        "plasticity": plasticity(table),
        "stability": stability(table),
        "rigidity": rigidity(table),
    }


def drop_to_oracle(own: float | None, oracle: float | None) -> tuple[float | None, float | None]:
    """(absolute, relative) drop: oracle - own, and that divided by the oracle. `oracle`: the run's own joint run.

    The thesis' Table 4.11 prints the first in its ResNet and SegViT rows and the second, in %, in its ViT rows.
    """
    absolute = _difference(oracle, own)
    return absolute, absolute / oracle if absolute is not None and oracle else None


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
