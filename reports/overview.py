"""The form of thesis Table 4.11: methods by scenarios of one data set, drops to the own oracle, published rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cache

from cssbench.reports import frames, lint, literature
from cssbench.reports.admission import by_comparability, mix
from cssbench.reports.entries import Entry, entries
from cssbench.reports.formats import MISSING, Table, percent, plus_minus
from cssbench.reports.forms import (
    assemble,
    best_cells,
    count,
    kind_of,
    memory_notes,
    noise_notes,
    oracle_notes,
    warning,
)
from cssbench.reports.lint import Verdict
from cssbench.reports.literature import Row
from cssbench.reports.scored import Scored

BELOW = "▼: drop to the own oracle, absolute in points and relative in percent of the oracle"
PRINTED = (
    "Published rows are as printed, their drops to the joint row of the same source and backbone. Another protocol "
    "than that of this table, or one that is not stated, is not comparable with it; fits tells how many classes the "
    "weighted mean of base and incremental counts. ‡: the linter flags the row, see the remarks."
)
COLUMNS = {"base": "base", "incremental": "inc", "all": "all", "avg": "avg"}  # ours -> a published row's


@dataclass(frozen=True)
class Line:
    """One row: the words before the numbers (after a line break what stands below them), and for each scenario that
    has one an entry, or a published row."""

    words: tuple[str, ...]
    model: str
    kind: str
    ours: dict[str, Entry]
    printed: dict[str, Verdict]


def overview_tables(scored: Sequence[Scored]) -> list[Table]:
    """One table per data set, mode, class order and images; where runs took several class orders, also one over all
    of them, with the methods that took each. Unfinished runs stand in the tables of their setting alone."""
    finished = [one for one in scored if one.finished]
    found = [overview_table(members) for members in by_comparability(finished).values()]
    apart: dict[tuple[object, ...], list[Scored]] = {}
    for one in finished:
        apart.setdefault(one.setting.shared[:-1], []).append(one)
    for members in apart.values():
        orders = {one.setting.order for one in members}
        if len(orders) > 1 and (balanced := _balanced(members, len(orders))):
            found.append(overview_table(balanced, len(orders)))
    return found


def _balanced(members: Sequence[Scored], orders: int) -> list[Scored]:
    """The runs of entries that took every class order in their scenario."""
    kept = []
    for ones in _by_scenario(members).values():
        full = [e for e in entries(ones) if len({one.setting.order for one in e.members}) == orders]
        kept += [one for entry in full for one in entry.members] if any(not e.oracle for e in full) else []
    return kept


def _by_scenario(scored: Iterable[Scored]) -> dict[str, list[Scored]]:
    """Name of the scenario, with its sizes where one name has several -> its runs."""
    found: dict[tuple[str, str], list[Scored]] = {}
    for one in scored:
        sizes = "-".join(str(len(group)) for group in one.setting.groups)
        found.setdefault((one.setting.scenario, sizes), []).append(one)
    several = Counter(name for name, _ in found)
    return {name if several[name] == 1 else f"{name}: {sizes}": ones for (name, sizes), ones in found.items()}


def overview_table(scored: Sequence[Scored], orders: int = 1) -> Table:
    """`scored`: runs that may share a table (`Setting.shared`). orders: over how many class orders the means go."""
    setting, protocol = scored[0].setting, scored[0].protocol
    scenarios, mixed = _by_scenario(scored), bool(mix(scored))
    published = _published_lines(scenarios, setting.mode, protocol.id)
    lines = _our_lines({name: entries(members) for name, members in scenarios.items()}, protocol.id) + published
    heads = ["method", "n", *(["source"] if published else [])]
    columns: dict[tuple[str, str], Iterable[str]] = {
        ("", head): [line.words[n] for line in lines] for n, head in enumerate(heads)
    }
    best: set[tuple[int, int]] = set()
    for name, members in scenarios.items():
        here = {row: line.ours[name] for row, line in enumerate(lines) if name in line.ours}
        winners = best_cells(list(here.values()), len(columns)) if not mixed else ()
        best |= {(list(here)[row], column) for row, column in winners}
        for measure in frames.SUMMARY:
            columns[name, measure] = [_cell(line, name, measure, members) for line in lines]
    found = [entry for line in lines for entry in line.ours.values()]
    notes = [
        f"{BELOW}.",
        *memory_notes(scored),
        *oracle_notes(found, scored),
        *noise_notes(found, None if mixed else bool(best)),
    ]
    notes += [PRINTED, _sources(published)] if published else []
    over = f", mean over {orders} class orders" if orders > 1 else ""
    caption = (
        f"Methods and scenarios: {setting.dataset}, {setting.mode}{over}. Protocol {protocol.id} (as used by "
        f"{protocol.used_by}): {protocol.summary}{f'; {setting.conditions}' if orders == 1 else ''}.{warning(scored)}"
    )
    formulas = [*frames.SUMMARY, "drop to oracle", "relative drop"]
    kinds = [line.kind for line in lines]
    made = assemble(caption, columns, len(heads), kinds, formulas, notes, frozenset(best))
    return replace(made, remarks=tuple(_remarks(published)), aside=())


def _our_lines(found: dict[str, list[Entry]], protocol: str) -> list[Line]:
    """A line per method and model; where a scenario has several entries of both, a line for each of these."""
    counts = Counter((name, _method(entry), _model(entry)) for name, each in found.items() for entry in each)
    several = {(method, model) for (_, method, model), number in counts.items() if number > 1}
    lines: dict[tuple[str, str], dict[str, Entry]] = {}
    for name, each in found.items():
        for entry in each:
            method, model = _method(entry), _model(entry)
            shown = f"{method}: {entry.label}" if (method, model) in several else method
            lines.setdefault((model, shown), {})[name] = entry
    models = list(dict.fromkeys(model for model, _ in lines))
    order = sorted(lines, key=lambda key: (models.index(key[0]), any(e.oracle for e in lines[key].values())))
    made: list[Line] = []
    for model, shown in order:
        ours = lines[model, shown]
        start = bool(made) and models.index(model) > 0 and not any(line.model == model for line in made)
        kind = " ".join(word for word in (kind_of(next(iter(ours.values()))), "start" * start) if word)
        number = "/".join(dict.fromkeys(count(entry) for entry in ours.values()))
        words = f"{shown}\n{model}", number, f"this report\n{protocol}"
        made.append(Line(words, model, kind, ours, {}))
    return made


def _method(entry: Entry) -> str:
    return entry.first.run.config.method.name + (" (oracle)" if entry.oracle else "")


def _model(entry: Entry) -> str:
    """Name of the model, and of its backbone where it has a section of that name."""
    model = entry.first.run.config.model
    backbone = model.options.get("backbone")
    name = backbone.get("name") if isinstance(backbone, dict) else None
    return f"{model.name}, {name}" if name else model.name


def _cell(line: Line, scenario: str, measure: str, members: Sequence[Scored]) -> str:
    """The value, and below it the drop to the own oracle where there is one."""
    if entry := line.ours.get(scenario):
        value = plus_minus(entry.last(measure))
        drops = frames.entry_drops(entry, members) if measure in frames.MEANS else {}
        drop, relative = drops.get(f"{measure}_drop"), drops.get(f"{measure}_relative_drop")
        return f"{value}\n{_below(drop.mean, relative.mean)}" if drop and relative else value
    if verdict := line.printed.get(scenario):
        mine, best = _printed(verdict.row, measure), _printed(_joint(verdict.row), measure)
        if mine is None:
            return MISSING
        if best is None or measure not in frames.MEANS or verdict.row.oracle:
            return str(mine)
        return f"{mine}\n{_below(float(best - mine) / 100, float((best - mine) / best))}"
    return ""


def _below(drop: float, relative: float) -> str:
    return f"▼ {percent(drop)}, {100 * relative:.1f} %".replace("-", "−")


def _printed(row: Row | None, measure: str) -> Decimal | None:
    return getattr(row, COLUMNS[measure], None)


@cache
def _verdicts() -> tuple[Verdict, ...]:
    return tuple(lint.lint_rows(literature.shipped().rows))


def _joint(row: Row) -> Row | None:
    """The joint row of the same source, backbone and scenario."""
    key = row.file, row.backbone, row.scenario, row.mode
    same = (one for one in literature.shipped().rows if one.oracle)
    return next((one for one in same if (one.file, one.backbone, one.scenario, one.mode) == key), None)


def _published_lines(scenarios: Iterable[str], mode: str, protocol: str) -> list[Line]:
    """Published rows of these scenarios and this mode, those that claim `protocol` first."""
    lines: dict[tuple[object, ...], dict[str, Verdict]] = {}
    for verdict in _verdicts():
        row = verdict.row
        if row.scenario in scenarios and row.mode == mode:
            key = (row.protocol != protocol, row.base is None, row.file, row.backbone, row.oracle, row.method)
            lines.setdefault((*key, row.reproduced, row.source), {})[row.scenario] = verdict
    made: list[Line] = []
    source = ""
    for _, printed in sorted(lines.items(), key=lambda item: item[0][:5]):  # the order of a file stays
        row = next(iter(printed.values())).row
        flagged = " ‡" if any(verdict.flags for verdict in printed.values()) else ""
        fits = "/".join(dict.fromkeys(verdict.fits for verdict in printed.values())).replace("/fits ", "/")
        shown = f"{row.method}{' (reproduced)' if row.reproduced else ''}{flagged}"
        read = f"{row.paper} {row.year}\n{row.protocol or 'protocol not stated'}; {fits}"
        start = not made or (made[-1].model, source) != (row.backbone, row.file)
        source = row.file
        kind = " ".join(["published", *(["oracle"] if row.oracle else []), *(["start"] if start else [])])
        made.append(Line((f"{shown}\n{row.backbone}", "", read), row.backbone, kind, {}, printed))
    return made


def _sources(published: Sequence[Line]) -> str:
    rows = [verdict.row for line in published for verdict in line.printed.values()]
    return f"Read in: {'; '.join(dict.fromkeys(f'{row.paper} {row.year}, {row.source}' for row in rows))}."


def _remarks(published: Sequence[Line]) -> list[str]:
    """What the linter has against published rows, and what their files say beside them."""
    found = []
    for verdict in (verdict for line in published for verdict in line.printed.values()):
        said = [text for _, text in verdict.flags] + ([verdict.row.note] if verdict.row.note else [])
        if said:
            found.append(f"{'‡ ' if verdict.flags else ''}{verdict.name}: {'; '.join(said)}.")
    return found
