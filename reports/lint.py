"""Do printed numbers agree with themselves? Rules that need nothing but the row, its oracle and its neighbours.

Every printed number stands for an interval: half a unit of its last place to both sides. Two numbers agree when the
intervals meet, so that nothing is flagged which rounding can explain.

- Weighted mean: all = (w base + n inc) / (w + n), n incremental classes, w the base classes with the background
  (100-50: 101, of 151) or without (100, of 150). It tells which convention a row used. A row that fits neither has a
  misprint or mixes runs; one that fits another than it claims, or than most rows of its file, is not comparable.
- avg is the mean over steps of the mIoU of all classes seen. It is no mean of base and inc; in two steps 2 avg - all is
  the mIoU after step 0, before anything could be forgotten; and with more steps it does not fall below all.
- Reductions against the joint row of the same file, backbone and scenario are points (oracle - value) or percent
  (100 (oracle - value) / oracle), one of them throughout a file.
- Two methods do not reach the same base, inc and all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path

from cssbench import protocol, scenario
from cssbench.reports import literature
from cssbench.reports.literature import Row

MEANS = ("base", "inc", "all")
Interval = tuple[Decimal, Decimal]
Flag = tuple[str, str]  # rule, one sentence


@dataclass(frozen=True)
class Verdict:
    """What the rules say of a row. fits: `fits 151`, `fits 150`, `fits both`, `fits neither` or `not checkable` (the
    numbers of classes are the scenario's, with and without the background)."""

    row: Row
    fits: str
    flags: tuple[Flag, ...]

    @property
    def name(self) -> str:
        row = self.row
        return f"{row.file}: {row.method}, {row.backbone}, {row.scenario}{' (reproduced)' if row.reproduced else ''}"


def span(printed: Decimal) -> Interval:
    """All values that round to what is printed. 1.5 -> (1.45, 1.55)."""
    half = Decimal(1).scaleb(int(printed.as_tuple().exponent)) / 2
    return printed - half, printed + half


def meet(a: Interval, b: Interval) -> bool:
    return a[0] <= b[1] and b[0] <= a[1]


def weighted(parts: Sequence[tuple[int, Decimal]]) -> Interval:
    """Weighted mean of printed numbers, parts = (weight, number)."""
    total = sum(weight for weight, _ in parts)
    low, high = (sum(weight * span(value)[end] for weight, value in parts) / total for end in (0, 1))
    return Decimal(low), Decimal(high)


def middle(interval: Interval) -> str:
    return f"{(interval[0] + interval[1]) / 2:.2f}"


@cache
def sizes(name: str) -> tuple[int, ...]:
    """Number of classes of each step. Raises UnknownNameError."""
    return tuple(len(group) for group in scenario.load(name).groups)


def combined(row: Row, background: bool) -> Interval | None:
    """What base and inc (or the groups) make of `all`, the background being a base class or none; None: not printed."""
    counts = sizes(row.scenario)
    first = counts[0] + background
    if row.base is not None and row.inc is not None:
        return weighted([(first, row.base), (sum(counts[1:]), row.inc)])
    if len(row.groups) == len(counts):
        return weighted(list(zip((first, *counts[1:]), row.groups, strict=True)))
    return None


def convention(row: Row) -> tuple[str, str | None, list[Flag]]:
    """(what fits, which classes it counts where one convention fits alone, flags) by the weighted mean."""
    having, without = combined(row, True), combined(row, False)
    counts = sizes(row.scenario)
    if row.groups and len(row.groups) != len(counts):
        return "not checkable", None, [("groups", f"it has {len(row.groups)} groups, the scenario {len(counts)} steps")]
    if row.all is None or having is None or without is None:
        return "not checkable", None, []
    classes = sum(counts)
    fits = {True: meet(having, span(row.all)), False: meet(without, span(row.all))}
    if not any(fits.values()):
        made = f"base and inc make {middle(having)} of {classes + 1} classes or {middle(without)} of {classes}"
        return "fits neither", None, [("mean", f"{made}; printed is {row.all}")]
    if all(fits.values()):
        return "fits both", None, []
    count, wanted = classes + fits[True], _claimed_classes(row, classes)
    flags = [("protocol", f"it claims {row.protocol}, of {wanted} classes")] if wanted not in (None, count) else []
    return f"fits {count}", f"{count} classes", flags


def _claimed_classes(row: Row, classes: int) -> int | None:
    """How many classes the claimed protocol weighs as this rule does; None: no claim, or another rule."""
    claimed = protocol.protocols().get(row.protocol or "")
    if claimed is None or claimed.background == "all" or claimed.all_mean == "nonzero":
        return None
    return classes + (claimed.background == "base")


def average(row: Row) -> Iterator[Flag]:
    """Flags of avg, at most one."""
    if row.avg is None:
        return
    base, inc = row.base, row.inc
    if base is not None and inc is not None and meet(span(row.avg), weighted([(1, base), (1, inc)])):
        yield "avg", f"avg {row.avg} is (base + inc) / 2, no mean over steps"
        return
    if row.all is None:
        return
    (low, high), (least, most) = span(row.avg), span(row.all)
    start = 2 * low - most, 2 * high - least
    if len(sizes(row.scenario)) == 2 and row.base is not None and start[1] < span(row.base)[0]:
        yield "avg", f"avg {row.avg} and all {row.all} imply {middle(start)} after step 0, less than base at the end"
    elif high < least:
        yield "avg", f"avg {row.avg} is below all {row.all}: the steps before would have been worse than the last"


def reductions(row: Row, oracle: Row | None) -> tuple[str | None, list[Flag]]:
    """("points" or "percent", or None where that is open; flags) of the printed reductions against `oracle`."""
    fitting, flags = [], []
    for name in MEANS:
        value, best, printed = (getattr(one, name, None) for one in (row, oracle, row.reduction))
        if value is None or not best or printed is None:
            continue
        (low, high), (least, most) = span(value), span(best)
        points = least - high, most - low
        percent = 100 * (1 - high / least), 100 * (1 - low / most)
        fits = {kind for kind, one in (("points", points), ("percent", percent)) if meet(one, span(printed))}
        if fits:
            fitting.append(fits)
        else:
            made = f"{best} - {value} is {middle(points)} points or {middle(percent)} %"
            flags.append(("reduction", f"reduction of {name}: {made}; printed is {printed}"))
    agreed = set.intersection(*fitting) if fitting else set()
    if fitting and not agreed:
        flags.append(("reduction", "its reductions are partly points, partly percent"))
    return agreed.pop() if len(agreed) == 1 else None, flags


def minority(groups: Sequence[object], kinds: Sequence[str | None]) -> list[str | None]:
    """For each row whose kind is not the one of most rows of its group: that kind. None for the others."""
    usual = {
        group: Counter(k for g, k in zip(groups, kinds, strict=True) if g == group and k).most_common(1)
        for group in set(groups)
    }
    return [usual[g][0][0] if k and usual[g][0][0] != k else None for g, k in zip(groups, kinds, strict=True)]


def lint_rows(rows: Sequence[Row]) -> list[Verdict]:
    """One verdict per row, in order. Raises UnknownNameError for a scenario that is not installed."""
    oracles = {(row.file, row.backbone, row.scenario): row for row in rows if row.oracle}
    means = [convention(row) for row in rows]
    reduced = [reductions(row, oracles.get((row.file, row.backbone, row.scenario))) for row in rows]
    other_mean = minority([(row.file, row.protocol) for row in rows], [kind for _, kind, _ in means])
    other_reduction = minority([row.file for row in rows], [kind for kind, _ in reduced])
    verdicts = []
    for i, row in enumerate(rows):
        fits, counts, flags = means[i]
        if other_mean[i]:
            flags.append(("mixed", f"it counts {counts}, most rows of the file {other_mean[i]}"))
        flags += [*average(row), *reduced[i][1]]
        if other_reduction[i]:
            flags.append(("reduction", f"its reductions are {reduced[i][0]}, most of the file's {other_reduction[i]}"))
        flags += [("copy", f"base, inc and all are those of {one.method}") for one in rows if _same_numbers(row, one)]
        verdicts.append(Verdict(row, fits, tuple(flags)))
    return verdicts


def _same_numbers(row: Row, other: Row) -> bool:
    def run(one: Row) -> tuple[object, ...]:
        return one.file, one.backbone, one.scenario, one.mode, one.base, one.inc, one.all

    return row.method != other.method and None not in run(row)[-3:] and run(row) == run(other)


def lint(paths: Sequence[Path] = ()) -> tuple[str, int]:
    """(table of verdicts and list of flags as Markdown, number of flagged rows) of these files; without any, of all
    that cssbench ships. Raises DataError for a file that is not valid, UnknownNameError for an unknown scenario."""
    rows = (literature.read_all(paths) if paths else literature.shipped()).rows
    verdicts = lint_rows(rows)
    flagged = [verdict for verdict in verdicts if verdict.flags]
    text = table(verdicts) + f"\n\n{len(flagged)} of {len(verdicts)} rows flagged{':' if flagged else '.'}\n"
    for verdict in flagged:
        text += f"\n- {verdict.name}: " + "; ".join(sentence for _, sentence in verdict.flags) + "."
    return text, len(flagged)


def table(verdicts: Sequence[Verdict]) -> str:
    """Markdown, padded so that it reads well in a terminal."""
    columns: dict[str, Callable[[Verdict], object]] = {
        "file": lambda v: v.row.file,
        "method": lambda v: v.row.method,
        "backbone": lambda v: v.row.backbone,
        "scenario": lambda v: v.row.scenario,
        **{name: lambda v, name=name: getattr(v.row, name) for name in (*MEANS, "avg")},  # type: ignore[misc]
        "claims": lambda v: v.row.protocol,
        "verdict": lambda v: v.fits,
        "flagged": lambda v: ", ".join(dict.fromkeys(rule for rule, _ in v.flags)),
    }
    cells = [["-" if (c := get(v)) is None else str(c) for get in columns.values()] for v in verdicts]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    lines = [list(columns), ["-" * width for width in widths], *cells]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)
