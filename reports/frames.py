"""From scores to tidy data frames: one row per run, per group, per step or per class; all values in [0, 1]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from cssbench.metrics import continual
from cssbench.reports.scored import Scored, caveats, own_oracle

MEANS = ("base", "incremental", "all")
GROUP_MEASURES = ("first", "last", "drop", "forgetting", "lost_to_parameters", "lost_to_competition", "bwt")


def summary_frame(scored: Sequence[Scored]) -> pd.DataFrame:
    """One row per run and setting: base, incremental, all (after the last finished step), avg, and drops to the oracle.

    `<mean>_drop` is oracle - run, `<mean>_relative_drop` the same as a part of the oracle. Missing without an own
    oracle, for an oracle itself and for an unfinished run, whose means cover fewer classes. avg is missing for an
    oracle.
    """
    rows = []
    for one in scored:
        oracle = own_oracle(one, scored)
        last = one.scores[-1]
        row = _who(one) | {name: last[name] for name in MEANS}
        row["avg"] = None if one.oracle else continual.average(one.scores)
        row["own_oracle"] = oracle.label if oracle else None
        for name in MEANS:
            best, mine = oracle.scores[-1][name] if oracle else None, last[name]
            drop = None if best is None or mine is None else best - mine
            row[f"{name}_drop"] = drop
            row[f"{name}_relative_drop"] = drop / best if drop is not None and best else None
        rows.append(row | {"caveats": "; ".join(caveats(one.run))})
    drops = [f"{name}{kind}" for name in MEANS for kind in ("_drop", "_relative_drop")]
    return _frame(rows, (*MEANS, "avg", *drops))


def forgetting_frame(scored: Sequence[Scored]) -> pd.DataFrame:
    """One row per run and group learned so far, and a row `mean` over the groups learned before the last finished step.

    Oracles forget nothing and have no rows. `bwt` stands in the row `mean` alone.
    """
    rows = [_who(one) | row for one in scored if not one.oracle for row in _group_rows(one)]
    return _frame(rows, GROUP_MEASURES)


def _group_rows(one: Scored) -> Iterator[dict[str, Any]]:
    table = one.table
    before = len(table) - 1
    parts = continual.lost_parts(table, one.alone)
    columns = {
        "first": [table[g][g] for g in range(before)],
        "last": [table[before][g] for g in range(before)],
        "drop": continual.drop(table),
        "forgetting": continual.forgetting(table),
        "lost_to_parameters": [p for p, _ in parts],
        "lost_to_competition": [c for _, c in parts],
    }
    sizes = [len(group) for group in one.setting.groups]
    blank = dict.fromkeys(GROUP_MEASURES)
    for g in range(before):
        yield {"group": str(g), "classes": sizes[g]} | blank | {name: values[g] for name, values in columns.items()}
    newest = table[before][before]
    yield {"group": str(before), "classes": sizes[before]} | blank | {"first": newest, "last": newest}
    if before:
        means: dict[str, float | None] = {name: continual.mean(values) for name, values in columns.items()}
        means["bwt"] = continual.backward_transfer(table)
        yield {"group": "mean", "classes": sum(sizes[:before])} | means


def steps_frame(scored: Sequence[Scored]) -> pd.DataFrame:
    """One row per run and finished step: base, incremental and all, over the classes seen by then."""
    rows = [
        _who(one) | {"step": t} | {name: scores[name] for name in MEANS}
        for one in scored
        for t, scores in enumerate(one.scores)
    ]
    return _frame(rows, MEANS)


def per_class_frame(scored: Sequence[Scored]) -> pd.DataFrame:
    """One row per run and class seen: IoU after the last finished step; missing where no pixel of it is in the truth.

    `group` is the step that taught the class; the background, where the protocol scores it, is class 0 of group 0.
    """
    rows = []
    for one in scored:
        seen = one.setting.groups if one.oracle else one.setting.groups[: one.done]
        taught = {0: 0} if one.protocol.background_in_mean else {}
        taught |= {c: t for t, group in enumerate(seen) for c in group}
        names = one.classes
        rows += [
            _who(one) | {"class": c, "name": names[c], "group": t, "iou": one.ious.get(c)} for c, t in taught.items()
        ]
    return _frame(rows, ("iou",))


def _who(one: Scored) -> dict[str, Any]:
    config = one.run.config
    return {
        "protocol": one.protocol.id,
        "dataset": one.setting.dataset,
        "scenario": one.setting.scenario,
        "mode": one.setting.mode,
        "split": one.setting.split,
        "setting": one.setting.digest,
        "run": one.label,
        "method": config.method.name,
        "model": config.model.name,
        "seed": config.seed,
        "oracle": one.oracle,
        "steps_done": one.done,
        "steps": one.run.num_steps,
    }


def _frame(rows: list[dict[str, Any]], numbers: Sequence[str]) -> pd.DataFrame:
    """`numbers` become float64, NaN where a value is missing."""
    frame = pd.DataFrame(rows)
    return frame.astype(dict.fromkeys(numbers, float)) if rows else frame
