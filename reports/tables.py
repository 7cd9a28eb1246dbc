"""Every table of a report as CSV (full precision), Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from cssbench.reports import conventions, forms, frames
from cssbench.reports.admission import score_all
from cssbench.reports.formats import DOCUMENT, NEEDED, Table, cut, file_part, latex, markdown
from cssbench.reports.overview import overview_tables
from cssbench.reports.scored import Scored, by_setting
from cssbench.reports.tokens import tokens_frame, tokens_table
from cssbench.results import RunFolder, write_bytes

FRAMES: dict[str, Callable[[Sequence[Scored]], pd.DataFrame]] = {
    "summary": frames.summary_frame,
    "means": frames.means_frame,
    "pairs": frames.pairs_frame,
    "forgetting": frames.forgetting_frame,
    "steps": frames.steps_frame,
    "per_class": frames.per_class_frame,
    "class_steps": frames.class_steps_frame,
    "tokens": tokens_frame,
}


def write(runs: list[RunFolder], out_dir: Path, protocol_ids: list[str], *, allow_mixed: bool = False) -> list[Path]:
    """The entry point `tables`; returns the files.

    Raises RunError when a run has no finished step, is damaged, or none fits any protocol, and where runs must not
    share a table (see `admission.score_all`).
    """
    return write_scored(score_all(runs, protocol_ids, allow_mixed), Path(out_dir))


def write_scored(scored: dict[str, list[Scored]], out_dir: Path) -> list[Path]:
    """CSV holds all settings of a protocol; Markdown and LaTeX hold one table for each."""
    written: list[Path] = []
    inputs: list[str] = []

    def put(name: str, text: str) -> None:
        write_bytes(out_dir / name, text.encode())
        written.append(out_dir / name)

    def put_tables(name: str, shown: Sequence[Table], printed: Sequence[Table]) -> None:
        if shown:
            put(f"{name}.md", "\n".join(markdown(table) for table in shown))
            parts = [part for table in printed for part in cut(table)]
            put(f"{name}.tex", NEEDED + "\n".join(latex(part, f"tab:{name}.{n}") for n, part in enumerate(parts, 1)))
            inputs.append(f"\\input{{{name}.tex}}\n\\clearpage")

    for protocol, ones in scored.items():
        end = file_part(protocol)
        for kind, make in FRAMES.items():
            frame = make(ones)
            if not frame.empty:
                put(f"{kind}.{end}.csv", frame.to_csv(index=False, lineterminator="\n"))
        for kind, (shown, printed) in _tables(ones).items():
            put_tables(f"{kind}.{end}", shown, printed)
    ones = list({(one.label, one.setting): one for found in scored.values() for one in found}.values())
    put("protocols.csv", conventions.protocols_frame(ones).to_csv(index=False, lineterminator="\n"))
    under_each = [table for one in ones if not one.oracle and (table := conventions.protocol_table(one))]
    put_tables("protocols", under_each, under_each)
    put("tables.tex", DOCUMENT % "\n".join(inputs))
    return written


def _tables(ones: Sequence[Scored]) -> dict[str, tuple[list[Table], list[Table]]]:
    """Kind -> (tables on a screen, the same on paper)."""
    settings = list(by_setting(ones).values())
    summaries = [forms.summary_table(members) for members in settings]
    groups = [table for members in settings if (table := forms.first_last_table(members))]
    wide = [table for members in settings if (table := forms.forgetting_table(members))]
    # One table per run: with many steps, all of them together would not fit a page.
    narrow = [table for one in ones if (table := forms.forgetting_table([one]))]
    measures = [table for members in settings if (table := forms.measures_table(members))]
    tokens = [table for members in settings if (table := tokens_table(members))]
    same = {"overview": overview_tables(ones), "summary": summaries, "groups": groups, "measures": measures}
    same |= {"tokens": tokens}
    return {kind: (found, found) for kind, found in same.items()} | {"forgetting": (wide, narrow)}
