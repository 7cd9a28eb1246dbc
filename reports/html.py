"""One self-contained HTML page: tables, figures, sample images, provenance. No script, no network, all escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import jinja2

import cssbench
from cssbench import protocol as protocols
from cssbench import scoring
from cssbench.protocol import Protocol
from cssbench.reports import conventions, figures, forms, origins, tables
from cssbench.reports.admission import mix, score_all
from cssbench.reports.formats import Table, file_part
from cssbench.reports.origins import Origin
from cssbench.reports.overview import overview_tables
from cssbench.reports.plots import Plot
from cssbench.reports.samples import VERDICT_COLOURS, Sample, map_uri, photo_uri, samples, verdict_legend
from cssbench.reports.scored import Scored, Setting, by_setting, labels, unique
from cssbench.reports.stops import StopSample, stop_samples
from cssbench.reports.tokens import tokens_table
from cssbench.results import RunFolder, write_bytes


@dataclass(frozen=True)
class Section:
    """One setting under one protocol. classes: the figures of each entry, under its label."""

    anchor: str
    protocol: Protocol
    summary: Table
    groups: Table | None
    measures: Table | None
    forgetting: Table | None
    tokens: Table | None
    per_class: Table
    plots: dict[str, Plot]
    classes: dict[str, list[Plot]]
    mixed: str

    @property
    def drawn(self) -> list[Plot]:
        return [*self.plots.values(), *(plot for each in self.classes.values() for plot in each)]


@dataclass(frozen=True)
class Chapter:
    """One setting: its sections; its runs under every protocol; the sample images, which belong to no protocol."""

    anchor: str
    name: str
    setting: Setting
    sections: tuple[Section, ...]
    conventions: tuple[tuple[str, Table], ...]
    samples: tuple[Sample, ...]
    stops: tuple[StopSample, ...]


def write(
    runs: list[RunFolder],
    out_dir: Path,
    protocol_ids: list[str],
    *,
    allow_mixed: bool = False,
    notices: Sequence[str] = (),
) -> list[Path]:
    """The entry point `html`: the page, figures and every file of the `tables` report; returns the files, page first.

    notices: runs that were meant to be in the report and are not, one sentence each; the page begins with them.
    Raises RunError when a run has no finished step, is damaged, or none fits any protocol, and where runs must not
    share a table (see `admission.score_all`).
    """
    out_dir, runs = Path(out_dir), unique(runs)
    scored = score_all(runs, protocol_ids, allow_mixed)
    chapters = make_chapters(scored, out_dir / "figures")
    written = tables.write_scored(scored, out_dir)
    drawn = [path for chapter in chapters for part in chapter.sections for plot in part.drawn for path in plot.files]
    for chapter in chapters:
        masks = figures.sample_figures(chapter.samples, out_dir / "figures", chapter.name)
        masks += figures.stop_figures(chapter.stops, out_dir / "figures", chapter.name)
        drawn += [path for plot in masks for path in plot.files]
    names = labels(runs)
    page = out_dir / "report.html"
    known = [origins.origin(run, names[run.path]) for run in runs]
    page_text = _template().render(
        css=_resource("report.css"),
        version=cssbench.__version__,
        run_headings=origins.RUN_HEADINGS,
        run_rows=[origins.run_row(run, names[run.path]) for run in runs],
        against=_against(known),
        notices=list(notices),
        overviews=_overviews(scored),
        chapters=chapters,
        unscored=_unscored(scored, {names[run.path]: run for run in runs}),
        origins=known,
        step_headings=origins.STEP_HEADINGS,
        verdicts=verdict_legend(),
        verdict_colours=VERDICT_COLOURS,
        files=[path.relative_to(out_dir).as_posix() for path in (*written, *drawn)],
    )
    write_bytes(page, page_text.encode())
    return [page, *written, *drawn]


def _resource(name: str) -> str:
    return (resources.files("cssbench.reports") / name).read_text(encoding="utf-8")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"photo_uri": photo_uri, "map_uri": map_uri}
    return environment.from_string(_resource("report.html.j2"))


def make_chapters(scored: dict[str, list[Scored]], folder: Path) -> list[Chapter]:
    """Settings in order of appearance, each with its protocols; their figures are drawn into `folder`."""
    found: dict[Setting, dict[str, list[Scored]]] = {}
    for name, ones in scored.items():
        for setting, members in by_setting(ones).items():
            found.setdefault(setting, {})[name] = members
    several = len({setting.title for setting in found}) < len(found)
    chapters = []
    for number, (setting, by_protocol) in enumerate(found.items(), 1):
        anchor = f"setting-{number}"
        place = f"{setting.scenario}.{setting.mode}{f'.{setting.digest}' if several else ''}"
        sections = [_section(anchor, members, folder, f"{name}.{place}") for name, members in by_protocol.items()]
        shown = list({one.label: one for members in by_protocol.values() for one in members}.values())
        pictures = samples(shown)
        pages = ((one.label, conventions.protocol_table(one)) for one in shown if not one.oracle)
        chapters.append(
            Chapter(
                anchor,
                place,
                setting,
                tuple(sections),
                tuple((label, page) for label, page in pages if page),
                tuple(pictures),
                tuple(stop_samples(pictures)),
            )
        )
    return chapters


def _section(anchor: str, members: list[Scored], folder: Path, name: str) -> Section:
    drawn = figures.setting_figures(members, folder, name)
    single = {plot.kind: plot for plot in drawn if plot.label is None}
    classes: dict[str, list[Plot]] = {}
    for plot in drawn:
        if plot.label is not None:
            classes.setdefault(plot.label, []).append(plot)
    return Section(
        f"{anchor}-{file_part(members[0].protocol.id)}",
        members[0].protocol,
        forms.summary_table(members),
        forms.first_last_table(members),
        forms.measures_table(members),
        forms.forgetting_table(members),
        tokens_table(members),
        forms.per_class_table(members),
        single,
        classes,
        "; ".join(mix(members)),
    )


def _overviews(scored: dict[str, list[Scored]]) -> list[tuple[Protocol, list[Table]]]:
    """Protocol -> tables over scenarios, where they say more than the table of each setting."""
    found = []
    for name, ones in scored.items():
        made = [table for table in overview_tables(ones) if _more(table)]
        found += [(protocols.get(name), made)] if made else []
    return found


def _more(table: Table) -> bool:
    published = any("published" in kind.split() for kind in table.kinds)
    return published or len({head for head, _ in table.columns if head}) > 1


def _against(known: Sequence[Origin]) -> list[tuple[str, list[str]]]:
    """(caveats, the runs they hold for), each text once."""
    found: dict[str, list[str]] = {}
    for one in known:
        if one.caveats:
            found.setdefault("; ".join(one.caveats), []).append(one.label)
    return list(found.items())


def _unscored(scored: dict[str, list[Scored]], runs: dict[str, RunFolder]) -> list[str]:
    """One sentence for each protocol that cannot score some run, and why."""
    sentences = []
    for name, ones in scored.items():
        reasons: dict[str, list[str]] = {}
        for label in sorted(runs.keys() - {one.label for one in ones}):
            reason = scoring.why_not(runs[label], protocols.get(name)) or "no step is finished"
            reasons.setdefault(reason, []).append(label)
        if reasons:
            why = "; ".join(f"{', '.join(labels)} ({reason})" for reason, labels in reasons.items())
            sentences.append(f"Not scored under {name}: {why}.")
    return sentences
