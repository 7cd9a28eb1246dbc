"""From scores to tidy data frames: one row per run, entry, group, step or class; values in [0, 1], seconds, counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import pandas as pd

from cssbench.metrics import continual
from cssbench.reports.entries import MEANS, Entry, by_class_and_seed, entries
from cssbench.reports.noise import Spread, sign_flip
from cssbench.reports.scored import Scored, by_setting, caveats, own_oracle

GROUP_MEASURES = ("first", "last", "drop", "forgetting", "lost_to_parameters", "lost_to_competition", "bwt")
SUMMARY = (*MEANS, "avg")
DROPS = tuple(f"{name}{kind}" for name in MEANS for kind in ("_drop", "_relative_drop"))


def summary_frame(scored: Sequence[Scored]) -> pd.DataFrame:
    """One row per run and setting: base, incremental, all (after the last finished step), avg, and drops to the oracle.

    `<mean>_drop` is oracle - run, `<mean>_relative_drop` the same as a part of the oracle. Missing without an own
    oracle, for an oracle itself and for an unfinished run, whose means cover fewer classes. avg is missing for an
    oracle. train_seconds: over the finished steps; parameters: of the last one, trainable or not.
    """
    rows = []
    for one in scored:
        oracle, last = own_oracle(one, scored), one.scores[-1]
        row = who(one) | {name: last[name] for name in MEANS}
        row["avg"] = None if one.oracle else continual.average(one.scores)
        row["own_oracle"] = oracle.label if oracle else None
        rows.append(row | drops(one, oracle) | cost(one) | {"caveats": "; ".join(caveats(one.run))})
    return to_frame(rows, (*SUMMARY, *DROPS, "train_seconds", "parameters"))


def drops(one: Scored, oracle: Scored | None) -> dict[str, float | None]:
    """`DROPS` of a run against its own oracle; None without one."""
    found: dict[str, float | None] = {}
    for name in MEANS:
        best, mine = oracle.scores[-1][name] if oracle else None, one.scores[-1][name]
        drop = None if best is None or mine is None else best - mine
        found[f"{name}_drop"] = drop
        found[f"{name}_relative_drop"] = drop / best if drop is not None and best else None
    return found


def entry_drops(entry: Entry, scored: Sequence[Scored]) -> dict[str, Spread | None]:
    """`DROPS` over the runs of an entry, each against the oracle of its own seed where there is one."""
    found = [drops(one, own_oracle(one, scored)) for one in entry.members]
    return {name: entry.spread([each[name] for each in found]) for name in DROPS}


def cost(one: Scored) -> dict[str, float | None]:
    """{"train_seconds", "parameters"}; None where a record does not tell."""
    seconds, parameters = [], None
    for record in one.run.records():
        times, counts = record.content.get("seconds"), record.content.get("parameters")
        seconds.append(_number(times, "train"))
        parameters = _number(counts, "total")
    known = [second for second in seconds if second is not None]
    return {"train_seconds": sum(known) if len(known) == len(seconds) else None, "parameters": parameters}


def _number(content: Any, key: str) -> float | None:
    value = content.get(key) if isinstance(content, dict) else None
    return value if isinstance(value, int | float) else None


def means_frame(scored: Sequence[Scored]) -> pd.DataFrame:
    """One row per entry and setting: `<measure>_mean`, `<measure>_std` (n - 1 in the denominator) and n."""
    rows = []
    for members in by_setting(scored).values():
        for entry in entries(members):
            row = who(entry.first) | {"run": entry.label, "seed": entry.seeds, "n": entry.n}
            values = {name: entry.last(name) for name in SUMMARY} | entry_drops(entry, members)
            for name, value in values.items():
                row |= {f"{name}_mean": value and value.mean, f"{name}_std": value and value.std}
            rows.append(row)
    columns = [f"{name}_{part}" for name in (*SUMMARY, *DROPS) for part in ("mean", "std")]
    frame = to_frame(rows, columns)
    return frame.reindex(columns=[*(c for c in frame if c not in columns), *columns])


def pairs_frame(scored: Sequence[Scored]) -> pd.DataFrame:
    """One row per two entries of a setting: difference in `all`, and p-values of `noise.sign_flip` over classes (what
    tells these very runs apart) and over the seeds that both have (what tells the methods apart)."""
    rows = []
    for members in by_setting(scored).values():
        for one, other in combinations([entry for entry in entries(members) if entry.compared], 2):
            first, second = one.last("all"), other.last("all")
            classes, seeds = by_class_and_seed(one, other)
            row = {key: value for key, value in who(one.first).items() if key in WHERE}
            row |= {"run": one.label, "other": other.label, "n": one.n, "other_n": other.n}
            row["difference"] = first.mean - second.mean if first and second else None
            row |= {"classes": len(classes), "p_classes": sign_flip(classes)}
            rows.append(row | {"seeds": len(seeds), "p_seeds": sign_flip(seeds)})
    return to_frame(rows, ("difference", "p_classes", "p_seeds"))


def forgetting_frame(scored: Sequence[Scored]) -> pd.DataFrame:
    """One row per run and group learned so far, and a row `mean` over the groups learned before the last finished step.

    Oracles forget nothing and have no rows. `bwt` stands in the row `mean` alone.
    """
    rows = [who(one) | row for one in scored if not one.oracle for row in _group_rows(one)]
    return to_frame(rows, GROUP_MEASURES)


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
        who(one) | {"step": t} | {name: scores[name] for name in MEANS}
        for one in scored
        for t, scores in enumerate(one.scores)
    ]
    return to_frame(rows, MEANS)


def per_class_frame(scored: Sequence[Scored]) -> pd.DataFrame:
    """One row per run and class seen: IoU after the last finished step; missing where no pixel of it is in the truth.

    `group` is the step that taught the class; the background, where the protocol scores it, is class 0 of group 0.
    forgetting: best IoU at an earlier step minus the last; missing for the newest group and for an oracle.
    """
    rows = []
    for one in scored:
        names, lost = one.classes, one.class_forgetting
        rows += [
            who(one) | {"class": c, "name": names[c], "group": t, "iou": one.ious.get(c), "forgetting": lost.get(c)}
            for c, t in taught(one).items()
        ]
    return to_frame(rows, ("iou", "forgetting"))


def class_steps_frame(scored: Sequence[Scored]) -> pd.DataFrame:
    """One row per run, finished step and class seen by then: IoU; missing where no pixel of it is in the truth."""
    rows = []
    for one in scored:
        names, groups = one.classes, taught(one)
        for t, ious in enumerate(one.step_ious):
            seen = [c for c, group in groups.items() if one.oracle or group <= t]
            rows += [
                who(one) | {"step": t, "class": c, "name": names[c], "group": groups[c], "iou": ious.get(c)}
                for c in seen
            ]
    return to_frame(rows, ("iou",))


def taught(one: Scored) -> dict[int, int]:
    """Class id -> step that taught it, in that order; the background where the protocol gives it an IoU."""
    seen = one.setting.groups if one.oracle else one.setting.groups[: one.done]
    background = {0: 0} if one.protocol.background_in_mean else {}
    return background | {c: t for t, group in enumerate(seen) for c in group}


WHERE = ("protocol", "dataset", "scenario", "mode", "split", "setting")


def who(one: Scored) -> dict[str, Any]:
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
        "imported": one.imported,
        "steps_done": one.done,
        "steps": one.run.num_steps,
    }


def to_frame(rows: list[dict[str, Any]], numbers: Sequence[str]) -> pd.DataFrame:
    """`numbers` become float64, NaN where a value is missing."""
    frame = pd.DataFrame(rows)
    return frame.astype(dict.fromkeys(numbers, float)) if rows else frame
