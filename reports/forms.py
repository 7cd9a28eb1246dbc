"""The tables of one setting under one protocol: accuracy, first and last time, forgetting, IoU per class.

Numbers in percent with two decimals; drops in points of mIoU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd

from cssbench.metrics import continual
from cssbench.reports import frames, literature
from cssbench.reports.admission import mix
from cssbench.reports.entries import Entry, by_class_and_seed, entries
from cssbench.reports.formats import CHANGE, DROP, GROUPS, MIOU, MISSING, RELATIVE, Table, percent, plus_minus, ranges
from cssbench.reports.noise import RULE, Spread, clear_best, sign_flip
from cssbench.reports.scored import Scored, Setting, caveats, own_oracle

SINGLE = "† A single run (n = 1): a difference within the noise between runs is no win."
SPREAD = (
    "±: sample standard deviation over the n runs of a row: other seeds, and class orders where the caption says so."
)
THESIS_MEAN = "mean over the incremental groups, the newest (drop 0) included, as in thesis Table 4.12"


def summary_table(scored: Sequence[Scored]) -> Table:
    """Base, incremental, all and avg of the runs of one setting; drops where any run has its own oracle."""
    found = entries(scored)
    drops = [frames.entry_drops(entry, scored) for entry in found]
    columns: dict[tuple[str, str], Iterable[str]] = {
        ("", "run"): [entry.shown_as for entry in found],
        ("", "method"): [entry.first.run.config.method.name for entry in found],
        ("", "model"): [entry.first.run.config.model.name for entry in found],
        ("", "seed"): [entry.seeds for entry in found],
        ("", "n"): [count(entry) for entry in found],
    }
    columns |= {(MIOU, name): [plus_minus(entry.last(name)) for entry in found] for name in frames.SUMMARY}
    mixed = bool(mix(scored))
    best = frozenset() if mixed else best_cells(found, 5)
    formulas = list(frames.SUMMARY)
    if any(value for each in drops for value in each.values()):
        for head, kind in ((DROP, "_drop"), (RELATIVE, "_relative_drop")):
            columns |= {(head, name): [_mean_of(each[name + kind]) for each in drops] for name in frames.MEANS}
        formulas += ["drop to oracle", "relative drop"]
    notes = [*oracle_notes(found, scored), *noise_notes(found, None if mixed else bool(best))]
    notes += [] if mixed else pair_notes(found)
    kinds = [kind_of(entry) for entry in found]
    return table("Accuracy after the last step", scored, columns, 4, kinds, formulas, notes, best)


def _mean_of(value: Spread | None) -> str:
    """Without the standard deviation, which `means.*.csv` has."""
    return percent(value.mean if value else None)


def count(entry: Entry) -> str:
    return str(entry.n) if entry.n > 1 else "1†"


def best_cells(found: Sequence[Entry], first_column: int) -> frozenset[tuple[int, int]]:
    """(row, column) of the clear winners in the columns of `frames.SUMMARY`, which begin at `first_column`."""
    rows = [row for row, entry in enumerate(found) if entry.compared]
    winners = [clear_best([found[row].last(name) for row in rows]) for name in frames.SUMMARY]
    return frozenset((rows[best], first_column + n) for n, best in enumerate(winners) if best is not None)


def oracle_notes(found: Sequence[Entry], scored: Sequence[Scored]) -> list[str]:
    """Whose oracle is whose."""
    served: dict[str, dict[str, None]] = {}
    for entry in found:
        for one in entry.members:
            if oracle := own_oracle(one, scored):
                served.setdefault(oracle.label, {})[one.label] = None
    return [f"Own oracle of {', '.join(runs)}: {oracle}." for oracle, runs in served.items()]


def noise_notes(found: Sequence[Entry], bold: bool | None = None) -> list[str]:
    """What ± and † mean, as far as the table shows them, and when a number is bold. bold: whether any is; None where a
    table has no such thing."""
    several = sum(entry.compared and entry.n > 1 for entry in found) > 1
    holds = {
        SPREAD: any(entry.n > 1 for entry in found),
        SINGLE: any(entry.n == 1 for entry in found),
        RULE: several and bool(bold),
        "No lead exceeds the noise: nothing is bold.": several and bold is False,
    }
    return [note for note, shown in holds.items() if shown]


def pair_notes(found: Sequence[Entry]) -> list[str]:
    """The paired test of the best entry on `all` against the second."""
    ranked = sorted(
        ((value.mean, entry) for entry in found if entry.compared and (value := entry.last("all"))),
        key=lambda pair: -pair[0],
    )
    if len(ranked) < 2:
        return []
    (best, one), (second, other) = ranked[:2]
    classes, seeds = by_class_and_seed(one, other)
    text = (
        f"all, {one.label} against {other.label}: {percent(best - second)} points. Paired sign-flip test, two-sided: "
        f"about these very runs, over {len(classes)} classes, {_p(sign_flip(classes))}"
    )
    if len(seeds) > 1:
        least = f" (no less is possible than {2 / 2 ** len(seeds):.3f})" if len(seeds) < 6 else ""
        text += f"; about the methods, over {len(seeds)} seeds, {_p(sign_flip(seeds))}{least}"
    return [f"{text}."]


def _p(value: float | None) -> str:
    return "p unknown" if value is None else "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def first_last_table(scored: Sequence[Scored]) -> Table | None:
    """The form of thesis Table 4.12: a column per group; first time, last time and drop of each run below each other,
    then of published runs of the same scenario. None when nothing was learned before the last step."""
    found = [entry for entry in entries(scored) if not entry.oracle]
    if not any(entry.first.done > 1 for entry in found):
        return None
    setting, done = scored[0].setting, max(entry.first.done for entry in found)
    later, published = ranges(range(1, done)), _published_first_last(setting, done)
    rows = [_first_last(entry, done) for entry in found] + list(published.values())
    names = [*(entry.shown_as for entry in found), *published]
    columns: dict[tuple[str, str], Iterable[str]] = {
        ("", "run"): [text for name in names for text in (name, "", "")],
        ("", "mIoU, %"): [text for _ in names for text in ("first time", "last time", "drop")],
    }
    for g in range(done):
        name = f"{_classes(setting.groups[g])}{' (base)' if g == 0 else ''}"
        columns[GROUPS, f"{g}: {name}"] = [text for each in rows for text in each[g]]
    if done > 1:
        columns["", f"mean of {later}"] = [text for each in rows for text in each[done]]
    words = [kind_of(entry) for entry in found] + ["published"] * len(published)
    kinds = [f"{word}{' start' if n and not row else ''}".strip() for n, word in enumerate(words) for row in range(3)]
    notes = [f"mean of {later}: {THESIS_MEAN}.", *noise_notes(found)]
    formulas = ["first", "last", "drop"]
    return table("First and last mIoU of each group", scored, columns, 2, kinds, formulas, notes)


def _published_first_last(setting: Setting, done: int) -> dict[str, list[tuple[str, str, str]]]:
    """Who printed it -> as `_first_last`, as printed; of the scenario and mode of `setting`."""
    places = {f"{group[0]}-{group[-1]}": g for g, group in enumerate(setting.groups)} | {"mean": done}
    found: dict[str, list[tuple[str, str, str]]] = {}
    for row in literature.shipped().forgetting:
        if (row.scenario, row.mode) == (setting.scenario, setting.mode) and row.group in places:
            name = f"{row.method}, {row.backbone}\n{row.paper} {row.year}, {row.protocol or 'protocol not stated'}"
            cells = found.setdefault(name, [(MISSING,) * 3] * (done + 1))
            if places[row.group] < len(cells):
                cells[places[row.group]] = str(row.first), str(row.last), str(row.forgetting)
    return found


def _first_last(entry: Entry, done: int) -> list[tuple[str, str, str]]:
    """(first, last, drop) of each of `done` groups, then their means over the groups 1..; over the runs."""
    cells = []
    for groups in [*([g] for g in range(done)), range(1, done)]:
        there = [g for g in groups if g < entry.first.done]
        firsts = [_mean([one.table[g][g] for g in there]) for one in entry.members]
        lasts = [_mean([one.table[-1][g] for g in there]) for one in entry.members]
        lost = [None if f is None or v is None else f - v for f, v in zip(firsts, lasts, strict=True)]
        first, last, drop = (plus_minus(entry.spread(values)) for values in (firsts, lasts, lost))
        cells.append((first, last, drop))
    return cells


def _mean(values: Sequence[float | None]) -> float | None:
    """None where there is nothing, or anything is missing."""
    there = [v for v in values if v is not None]
    return sum(there) / len(there) if there and len(there) == len(values) else None


def _classes(group: Sequence[int]) -> str:
    text = ranges(group)
    return text if "," not in text else f"{len(group)} classes"


def forgetting_table(scored: Sequence[Scored]) -> Table | None:
    """Forgetting per step group of the runs of one setting; None when nothing was learned before the last step."""
    learners = [one for one in scored if not one.oracle]
    frame = frames.forgetting_frame(learners)
    if frame.empty or not (frame["group"] == "mean").any():
        return None
    names = {one.label: one.shown_as for one in learners}
    before = {one.label: one.done - 2 for one in learners}
    again = frame["run"].eq(frame["run"].shift())
    columns: dict[tuple[str, str], Iterable[str]] = {
        ("", "run"): ["" if same else names[run] for run, same in zip(frame["run"], again, strict=True)],
        ("", "group"): [_group(g, before[run]) for g, run in zip(frame["group"], frame["run"], strict=True)],
        ("", "classes"): frame["classes"].astype(str),
    }
    measures = {name: name.replace("_", " ").replace("bwt", "BWT") for name in frames.GROUP_MEASURES}
    for name, shown in measures.items():
        columns[MIOU if name in ("first", "last") else CHANGE, shown] = frame[name].map(percent)
    columns[CHANGE, "BWT"] = [
        percent(value) if group == "mean" else "" for value, group in zip(frame["bwt"], frame["group"], strict=True)
    ]
    unfinished = {one.label for one in learners if not one.finished}
    words = {
        "mean": frame["group"] == "mean",
        "unfinished": frame["run"].isin(unfinished),
        "start": ~again & (frame.index > 0),
    }
    kinds = [" ".join(word for word, holds in words.items() if holds[row]) for row in frame.index]
    notes = ["A group is the classes of one step. Each run stands for itself (n = 1)."]
    if frame["lost_to_parameters"].isna().all():
        notes.append("The runs hold no matrices with later outputs left out: what was lost to which cause is unknown.")
    elif learners[0].protocol.future == "ignore":
        notes.append(
            "This protocol ignores pixels of classes not yet learned, so lost to competition also holds what these "
            "pixels cost the older classes once they count."
        )
    return table("Forgetting by group", learners, columns, 2, kinds, list(measures.values()), notes)


def measures_table(scored: Sequence[Scored]) -> Table | None:
    """The measures of continual learning that sum up a run; None when nothing was learned before the last step."""
    found = [entry for entry in entries(scored) if not entry.oracle and entry.first.done > 1]
    if not found:
        return None
    each = [[_measures(one, scored) for one in entry.members] for entry in found]
    names = list(each[0][0])
    columns: dict[tuple[str, str], Iterable[str]] = {
        ("", "run"): [entry.shown_as for entry in found],
        ("", "n"): [count(entry) for entry in found],
    }
    for name in names:
        values = [entry.spread([one[name] for one in runs]) for entry, runs in zip(found, each, strict=True)]
        columns["%, points", name] = map(plus_minus, values)
    notes = [
        "intransigence: of the newest group, the only one that the own oracle can judge.",
        *noise_notes(found),
    ]
    kinds = [kind_of(entry) for entry in found]
    return table("Measures of continual learning", scored, columns, 1, kinds, names, notes)


def _measures(one: Scored, scored: Sequence[Scored]) -> dict[str, float | None]:
    oracle, newest = own_oracle(one, scored), f"group{one.done - 1}"
    best = oracle.scores[-1][newest] if oracle else None
    hard = continual.intransigence(one.table, [None] * (one.done - 1) + [best])[-1]
    return continual.summary(one.table) | {"intransigence": hard}


def per_class_table(scored: Sequence[Scored]) -> Table:
    """IoU of each class after the last finished step, a column per entry, in the order in which classes are learned."""
    frame, found = frames.per_class_frame(scored), entries(scored)
    keys = frame.drop_duplicates("class")[["class", "name", "group"]].sort_values("group", kind="stable")
    columns: dict[tuple[str, str], Iterable[str]] = {
        ("", "class"): keys["class"].astype(str).tolist(),
        ("", "name"): keys["name"].tolist(),
        ("", "learned at step"): keys["group"].astype(str).tolist(),
    }
    for entry in found:
        mine = entry.ious()
        columns["IoU, %", entry.shown_as] = [percent(mine.get(c)) for c in keys["class"]]
    notes = ["An en dash: not learned yet, or not one pixel of that class in the truth."]
    if any(entry.n > 1 for entry in found):
        notes.append("Where a column holds several runs: their mean.")
    return table("IoU of each class after the last step", scored, columns, 3, [""] * len(keys), [], notes)


def table(
    title: str,
    scored: Sequence[Scored],
    columns: dict[tuple[str, str], Iterable[str]],
    text: int,
    kinds: Sequence[str],
    formulas: Sequence[str],
    notes: Sequence[str],
    best: frozenset[tuple[int, int]] = frozenset(),
) -> Table:
    """A table of one setting, with what every table says: setting, protocol, what speaks against its numbers."""
    setting, protocol = scored[0].setting, scored[0].protocol
    caption = (
        f"{title}: {setting.title}. Protocol {protocol.id} (as used by {protocol.used_by}): {protocol.summary}. "
        f"{setting.facts}.{warning(scored)}"
    )
    unfinished = [
        f"{one.label} has finished {one.done} of {one.run.num_steps} steps: its last step here is step {one.done - 1}, "
        f"and its means hold the classes seen by then. Not comparable with finished runs."
        for one in scored
        if not one.finished
    ]
    return assemble(caption, columns, text, kinds, formulas, [*unfinished, *memory_notes(scored), *notes], best)


def memory_notes(scored: Sequence[Scored]) -> list[str]:
    """Whose method keeps images of finished steps, and how many (`Method.memory`)."""
    kept = {one.label: one.run.provenance.get("memory") for one in scored}
    return [
        f"{label} keeps up to {memory} images of finished steps, against the rule of this benchmark: not to be ranked "
        f"with methods that keep none."
        for label, memory in kept.items()
        if isinstance(memory, int) and memory > 0
    ]


def warning(scored: Sequence[Scored]) -> str:
    """What speaks against the numbers of a table, or against comparing its rows; to follow its caption."""
    against = dict.fromkeys(caveat for one in scored for caveat in caveats(one.run))
    unfit = dict.fromkeys(f"{one.label}, {'; '.join(one.flaws)}" for one in scored if one.flaws)
    mixed = mix(scored)
    text = f" Not comparable with published numbers: {'; '.join(against)}." if against else ""
    text += f" Printed although not fit for a table: {'; '.join(unfit)}." if unfit else ""
    return text + (f" MIXED, rows not comparable with each other: {'; '.join(mixed)}." if mixed else "")


def assemble(
    caption: str,
    columns: dict[tuple[str, str], Iterable[str]],
    text: int,
    kinds: Sequence[str],
    formulas: Sequence[str],
    notes: Sequence[str],
    best: frozenset[tuple[int, int]] = frozenset(),
) -> Table:
    cells = pd.DataFrame({key: list(values) for key, values in columns.items()}, dtype=object)
    cells.columns = pd.MultiIndex.from_tuples(columns)
    chosen = {name: continual.FORMULAS[name].replace("`", "") for name in formulas}
    return Table(caption, cells, text, tuple(kinds), chosen, tuple(notes), best)


def kind_of(entry: Entry) -> str:
    return "oracle" if entry.oracle else "" if entry.finished else "unfinished"


def _group(group: str, last: int) -> str:
    """'0' -> '0 (base)'; 'mean' -> 'mean of 0–4' where 4 is the last group that can be forgotten."""
    if group == "mean":
        return f"mean of 0–{last}" if last else "mean"
    return "0 (base)" if group == "0" else group
