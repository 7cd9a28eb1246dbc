"""What dropping tokens saves: GFLOPs, mIoU and how deep tokens went, of the runs of one setting under one protocol.

Runs that differ in one option alone are a *sweep* and stand together, sorted by it: the form of thesis Table 5.2.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from cssbench.reports import frames, literature
from cssbench.reports.entries import Entry, entries, recipe, short
from cssbench.reports.formats import MIOU, MISSING, Table, percent, plus_minus
from cssbench.reports.forms import count, kind_of, noise_notes, table
from cssbench.reports.plots import COLOURS, LINES, MARKERS, Theme, dress, legend, legible
from cssbench.reports.scored import Scored, again, caveats

DEPTHS = "tokens by encoder blocks, %"
PRINTED = ("4.7", "5.1", "5.2")  # tables of the thesis: Shrunk and EQD, schemes of DToP, its threshold
VALUE = 16  # characters of an option's value in the figure
NOTE = (
    f"{DEPTHS}: share of the tokens that went through so many blocks as queries of their own, over every forward pass "
    "of the evaluation after the last step. A row without one: a model whose tokens all go through every block, or a "
    "run that did not record it."
)
PUBLISHED_NOTE = (
    "Published rows are as printed (Zhang, thesis 2023; single scale), of another implementation and budget: no part "
    "of any comparison with the rows above."
)


@dataclass(frozen=True)
class Sweep:
    """Entries that differ in one option alone, by ascending value; or one entry, without an option.

    option: its dotted key. values: what the members have there.
    """

    members: tuple[Entry, ...]
    option: str = ""
    values: tuple[Any, ...] = (None,)

    @property
    def name(self) -> str:
        """The option, one of the model without its section."""
        return self.option.removeprefix("model.")

    @property
    def settings(self) -> list[str]:
        """'p0 = 0.8' of each member."""
        return [f"{self.name} = {shown(value)}" if self.option else MISSING for value in self.values]


def sweeps(scored: Sequence[Scored]) -> list[Sweep]:
    """The entries with a recorded cost; empty where no run recorded how deep its tokens went. A sweep stands where its
    first entry does. Where an entry could belong to several, it belongs to the largest."""
    if not any(depths(one) for one in scored):
        return []
    left = [entry for entry in entries(scored) if any(gflops(one) is not None or depths(one) for one in entry.members)]
    flat = {entry.label: _options(entry) for entry in left}
    found: list[Sweep] = []
    while left:
        alike: dict[str, list[Entry]] = {}
        mine = flat[left[0].label]
        for other in left[1:]:
            its = flat[other.label]
            differing = [key for key in mine | its if mine.get(key) != its.get(key)]
            if len(differing) == 1:
                alike.setdefault(differing[0], []).append(other)
        option = max(alike, key=lambda key: len(alike[key]), default="")
        members = [left[0], *alike.get(option, [])]
        members.sort(key=lambda entry: _order(flat[entry.label].get(option)))
        found.append(Sweep(tuple(members), option, tuple(flat[entry.label].get(option) for entry in members)))
        left = [entry for entry in left if entry not in members]
    return found


def _options(entry: Entry) -> dict[str, Any]:
    """What may make two entries differ: dotted key -> value."""
    oracle, content = json.loads(recipe(entry.first))
    return {"oracle": oracle} | dict(_flat(content, ""))


def _flat(content: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _order(value: Any) -> tuple[bool, float, str]:
    """Numbers first, ascending, then words."""
    number = isinstance(value, int | float)
    return not number, float(value) if number else 0.0, str(value)


def shown(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value).lower()


def gflops(one: Scored) -> float | None:
    """Of one forward pass after the last finished step."""
    found = one.run.records()[-1].gflops
    return found["per_pass"] if found else None


def depths(one: Scored) -> dict[int, float]:
    return one.run.records()[-1].tokens or {}


def tokens_table(scored: Sequence[Scored]) -> Table | None:
    """Option, GFLOPs, mIoU of all classes and the share of tokens by depth; None where no run dropped tokens."""
    found = sweeps(scored)
    if not found:
        return None
    members, printed = [entry for sweep in found for entry in sweep.members], published(scored, found)
    options = [option for sweep in found for option in sweep.settings] + [row.option for row in printed]
    columns: dict[tuple[str, str], Iterable[str]] = {
        ("", "run"): [entry.shown_as for entry in members] + [row.name for row in printed],
        ("", "model"): [entry.first.run.config.model.name for entry in members] + [MISSING] * len(printed),
    }
    columns |= {("", "option"): options} if set(options) != {MISSING} else {}
    text = len(columns)
    columns |= {
        ("", "n"): [count(entry) for entry in members] + [""] * len(printed),
        ("", "GFLOPs"): [_cost(entry) for entry in members] + [row.gflops for row in printed],
        (MIOU, "all"): [plus_minus(entry.last("all")) for entry in members] + [row.miou for row in printed],
    }
    for depth in _every(members):
        columns[DEPTHS, str(depth)] = [_share(entry, depth) for entry in members] + [MISSING] * len(printed)
    words = [kind_of(entry) for entry in members] + ["published"] * len(printed)
    starts = {sum(len(sweep.members) for sweep in found[:n]) for n in range(1, len(found) + 1)}
    kinds = [f"{word}{' start' if n in starts else ''}".strip() for n, word in enumerate(words)]
    notes = [_counted(members), NOTE, *noise_notes(members), *([PUBLISHED_NOTE] if printed else [])]
    made = table("Tokens and cost after the last step", scored, columns, text, kinds, ["all"], notes)
    return replace(made, aside=("model", "n"))


def _every(members: Iterable[Entry]) -> list[int]:
    return sorted({depth for entry in members for one in entry.members for depth in depths(one)})


def _cost(entry: Entry) -> str:
    value = entry.spread([gflops(one) for one in entry.members])
    if value is None:
        return MISSING
    return f"{value.mean:.4g}" + ("" if value.std is None else f" ± {value.std:.2g}")


def _share(entry: Entry, depth: int) -> str:
    found = [depths(one) for one in entry.members]
    if not all(found):
        return MISSING
    return percent(sum(each.get(depth, 0.0) for each in found) / len(found))


def _counted(members: Sequence[Entry]) -> str:
    """What the GFLOPs are of, with the runs where it differs."""
    ways: dict[str, list[str]] = {}
    for one in (one for entry in members for one in entry.members):
        cost, config = one.run.records()[-1].gflops, one.run.config.evaluate
        if cost:
            window = cost["geometry"] == "full" and config.inference == "slide"
            size = f"one window of {config.window} px" if window else f"one image, geometry {cost['geometry']}"
            ways.setdefault(f"{size}, mean over the first {cost['images']} images", []).append(one.label)
    several = len(ways) > 1
    text = "; ".join(f"{way}{f' ({short(labels)})' if several else ''}" for way, labels in ways.items())
    return f"GFLOPs: 10^9 multiply-adds of one forward pass, counted as the papers do, of {text or 'no run'}."


@dataclass(frozen=True)
class Printed:
    """One published row, as printed."""

    name: str
    option: str
    gflops: str
    miou: str


def published(scored: Sequence[Scored], found: Sequence[Sweep]) -> list[Printed]:
    """Rows of `PRINTED` on the same data set. None beside runs over steps, beside runs that must not be compared with
    published numbers, and no row of a sweep that is not made here."""
    if any(caveats(one.run) or not one.oracle for one in scored):
        return []
    options = {sweep.name for sweep in found}
    rows = []
    for row in literature.shipped().tables:
        known = row.table in PRINTED and row.dataset == scored[0].setting.dataset
        if known and row.values.keys() >= {"gflops", "miou_ss"} and ("p0" not in row.setting or "p0" in options):
            said = [
                value if isinstance(value, str) else f"{key.replace('_', ' ')} {str(value).lower()}"
                for key, value in row.setting.items()
                if key != "p0"
            ]
            option = f"p0 = {row.setting['p0']}" if "p0" in row.setting else MISSING
            name = f"{', '.join(said)}\nthesis, Table {row.table}"
            rows.append(Printed(name, option, str(row.values["gflops"]), str(row.values["miou_ss"])))
    return rows


def tokens_frame(scored: Sequence[Scored]) -> pd.DataFrame:
    """One row per run: option and value of its sweep, GFLOPs per forward pass and per image, `all` after the last step,
    and `tokens_<n>`, the share of tokens that went through n blocks; empty where no run dropped tokens."""
    rows, found = [], sweeps(scored)
    every = _every(entry for sweep in found for entry in sweep.members)
    for sweep in found:
        for entry, value in zip(sweep.members, sweep.values, strict=True):
            for one in entry.members:
                cost, mine = one.run.records()[-1].gflops or {}, depths(one)
                row = frames.who(one) | {"option": sweep.option, "value": shown(value) if sweep.option else ""}
                row |= {"gflops": cost.get("per_pass"), "gflops_per_image": cost.get("per_image")}
                row |= {"gflops_images": cost.get("images"), "all": one.scores[-1]["all"]}
                rows.append(row | {f"tokens_{depth}": mine.get(depth, 0.0) if mine else None for depth in every})
    numbers = ("gflops", "gflops_per_image", "gflops_images", "all", *(f"tokens_{depth}" for depth in every))
    return frames.to_frame(rows, numbers)


def tokens_figure(found: Sequence[Sweep], theme: Theme) -> Figure:
    """mIoU of all classes against GFLOPs of a forward pass, a mark per entry (the mean of its runs); a sweep is a line
    with the option's value at each mark."""
    figure = Figure(figsize=(5.4, 4.0), layout="constrained")
    axes = figure.subplots()
    handles: dict[str, Any] = {}
    for index, sweep in enumerate(found):
        points = {n: point for n, entry in enumerate(sweep.members) if (point := _point(entry))}
        if not points:
            continue
        x, y = zip(*points.values(), strict=True)
        name = f"{_label(sweep)}{f', by {sweep.name}' if sweep.option else ''}"
        (handles[name],) = axes.plot(
            x, y, color=COLOURS[index % 7], marker=MARKERS[index % 9], linestyle=LINES[index // 7 % 4], linewidth=1.2,
            markersize=6, markeredgecolor=theme.page, markeredgewidth=0.6, clip_on=False, zorder=3,
        )  # fmt: skip
        for point in dict.fromkeys(points.values()) if sweep.option else ():
            values = [legible(shown(sweep.values[n]), VALUE) for n, other in points.items() if other == point]
            axes.annotate(
                ", ".join(values), point, xytext=(4, -9), textcoords="offset points", fontsize=7, color=theme.ink
            )
    dress(axes, theme, "", "GFLOPs of a forward pass")
    axes.margins(0.12)
    axes.set_ylabel("all classes, mIoU %", color=theme.ink)
    legend(figure, handles, theme)
    return figure


def _label(sweep: Sweep) -> str:
    """The run whose weights the others evaluated again, where it is there; else all of them."""
    trained = [entry.label for entry in sweep.members if not again(entry.first.run)]
    return trained[0] if len(trained) == 1 else short([entry.label for entry in sweep.members])


def _point(entry: Entry) -> tuple[float, float] | None:
    cost, score = entry.spread([gflops(one) for one in entry.members]), entry.last("all")
    return (cost.mean, 100 * score.mean) if cost and score else None
