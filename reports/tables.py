"""Tables for readers: numbers in percent with two decimals, as Markdown, LaTeX (booktabs) and for the HTML page.

`write` also leaves the data frames behind them as CSV with full precision (see `frames`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd

from cssbench.metrics.continual import FORMULAS
from cssbench.reports import frames
from cssbench.reports.scored import Scored, by_setting, caveats, own_oracle, score_all
from cssbench.results import RunFolder, write_bytes

MISSING = "–"
MIOU, DROP, RELATIVE = "mIoU, %", "drop to oracle, points", "relative drop, %"
SINGLE = "Every row is a single run (n = 1): a difference within the noise between runs is no win."


@dataclass(frozen=True)
class Table:
    """One table of one setting under one protocol, every cell a string.

    cells: columns are pairs (heading over several columns or "", column); the first `text` columns hold words, the
    others numbers. kinds: one per row, words of "oracle", "unfinished", "mean", "start" (of a run's rows). formulas:
    column -> formula. aside: columns that a narrow screen can do without.
    """

    caption: str
    cells: pd.DataFrame
    text: int
    kinds: tuple[str, ...]
    formulas: dict[str, str]
    notes: tuple[str, ...]
    aside: tuple[str, ...] = ("method", "model", "seed", "classes")

    @property
    def columns(self) -> list[tuple[str, str]]:
        """(heading or "", name) of each column."""
        return [(str(pair[0]), str(pair[1])) for pair in self.cells.columns]

    @property
    def headings(self) -> list[tuple[str, int]]:
        """(heading, number of columns under it), from left to right."""
        return [(name, len(list(columns))) for name, columns in groupby(head for head, _ in self.columns)]

    @property
    def rows(self) -> list[tuple[str, list[str]]]:
        """(kind, cells) of each row."""
        return list(zip(self.kinds, self.cells.to_numpy().tolist(), strict=True))


def percent(value: float | None) -> str:
    """0.1234 -> '12.34', with a true minus sign; an en dash for None and NaN."""
    if value is None or pd.isna(value):
        return MISSING
    return f"{round(100 * value, 2) + 0.0:.2f}".replace("-", "−")


def summary_table(scored: Sequence[Scored]) -> Table:
    """Base, incremental, all and avg of the runs of one setting; drops where any run has its own oracle."""
    frame = frames.summary_frame(scored)
    shown = [(MIOU, name, name) for name in (*frames.MEANS, "avg")]
    if frame["own_oracle"].notna().any():
        shown += [(DROP, name, f"{name}_drop") for name in frames.MEANS]
        shown += [(RELATIVE, name, f"{name}_relative_drop") for name in frames.MEANS]
    columns: dict[tuple[str, str], Iterable[str]] = {("", "run"): [one.shown_as for one in scored]}
    columns |= {("", name): frame[name].astype(str) for name in ("method", "model", "seed")}
    columns |= {(head, name): frame[column].map(percent) for head, name, column in shown}
    formulas = [*frames.MEANS, "avg", *(["drop to oracle", "relative drop"] if len(shown) > 4 else [])]
    served: dict[str, list[str]] = {}
    for one in scored:
        if oracle := own_oracle(one, scored):
            served.setdefault(oracle.label, []).append(one.label)
    notes = [f"Own oracle of {', '.join(runs)}: {oracle}." for oracle, runs in served.items()]
    return _table(
        "Accuracy after the last step", scored, columns, 4, [_kind(one) for one in scored], formulas, [*notes, SINGLE]
    )


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
        columns[MIOU if name in ("first", "last") else "change, points", shown] = frame[name].map(percent)
    columns["change, points", "BWT"] = [
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
    return _table("Forgetting by group", learners, columns, 2, kinds, list(measures.values()), notes)


def per_class_table(scored: Sequence[Scored]) -> Table:
    """IoU of each class after the last finished step, a column per run, in the order in which classes are learned."""
    frame = frames.per_class_frame(scored)
    keys = frame.drop_duplicates("class")[["class", "name", "group"]]
    columns: dict[tuple[str, str], Iterable[str]] = {
        ("", "class"): keys["class"].astype(str).tolist(),
        ("", "name"): keys["name"].tolist(),
        ("", "learned at step"): keys["group"].astype(str).tolist(),
    }
    for one in scored:
        mine = frame[frame["run"] == one.label].set_index("class")["iou"]
        columns["IoU, %", one.shown_as] = [percent(mine.get(c)) for c in keys["class"]]
    notes = ["An en dash: not learned yet, or not one pixel of that class in the truth."]
    return _table("IoU of each class after the last step", scored, columns, 3, [""] * len(keys), [], notes)


def _table(
    title: str,
    scored: Sequence[Scored],
    columns: dict[tuple[str, str], Iterable[str]],
    text: int,
    kinds: Sequence[str],
    formulas: Sequence[str],
    notes: Sequence[str],
) -> Table:
    setting, protocol = scored[0].setting, scored[0].protocol
    caption = (
        f"{title}: {setting.title}. Protocol {protocol.id} (as used by {protocol.used_by}): {protocol.summary}. "
        f"{setting.facts}."
    )
    against = dict.fromkeys(caveat for one in scored for caveat in caveats(one.run))
    if against:
        caption += f" Not comparable with published numbers: {'; '.join(against)}."
    cells = pd.DataFrame({key: list(values) for key, values in columns.items()}, dtype=object)
    cells.columns = pd.MultiIndex.from_tuples(columns)
    unfinished = [
        f"{one.label} has finished {one.done} of {one.run.num_steps} steps: its last step here is step {one.done - 1}, "
        f"and its means hold the classes seen by then. Not comparable with finished runs."
        for one in scored
        if not one.finished
    ]
    chosen = {name: FORMULAS[name] for name in formulas}
    return Table(caption, cells, text, tuple(kinds), chosen, (*unfinished, *notes))


def _kind(one: Scored) -> str:
    return "oracle" if one.oracle else "" if one.finished else "unfinished"


def _group(group: str, last: int) -> str:
    """'0' -> '0 (base)'; 'mean' -> 'mean of 0–4' where 4 is the last group that can be forgotten."""
    if group == "mean":
        return f"mean of 0–{last}" if last else "mean"
    return "0 (base)" if group == "0" else group


def markdown(table: Table) -> str:
    """A caption, a GitHub table, formulas and notes; names are escaped."""
    escape = markdown_escape
    short = {MIOU: "", DROP: "drop, points: ", RELATIVE: "relative drop, %: "}
    flat = table.cells.map(escape)
    flat.columns = pd.Index([escape(short.get(head, "") + name) for head, name in table.columns])
    align = ["left"] * table.text + ["right"] * (len(flat.columns) - table.text)
    grid = flat.to_markdown(index=False, disable_numparse=True, colalign=align)
    formulas = [f"- {escape(name)}: {escape(formula)}" for name, formula in table.formulas.items()]
    notes = [f"- {escape(note)}" for note in table.notes]
    return "\n".join([escape(table.caption), "", grid, "", *formulas, *notes, ""])


def markdown_escape(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|#~])", r"\\\1", re.sub(r"\s+", " ", text))


def latex(table: Table, label: str) -> str:
    r"""A `table` environment in booktabs style, shrunk to the line where wider; names are escaped."""
    escape = latex_escape
    cells = table.cells.map(escape)
    cells.columns = pd.MultiIndex.from_tuples([(escape(head), escape(name)) for head, name in table.columns])
    form = "l" * table.text + "r" * (len(cells.columns) - table.text)
    grid = cells.style.hide(axis="index").to_latex(hrules=True, column_format=form, multicol_align="c")
    rules, start = "", 1
    for heading, width in table.headings:
        rules += f"\\cmidrule(lr){{{start}-{start + width - 1}}}" if heading else ""
        start += width
    grid = grid.replace("\\\\\n", f"\\\\\n{rules}\n", 1).strip()
    under = [f"{escape(name)}: {escape(formula)}." for name, formula in table.formulas.items()]
    under += [escape(note) for note in table.notes]
    return "\n".join(
        [
            "\\begin{table}[!htbp]",
            "\\centering\\footnotesize\\setlength{\\tabcolsep}{4pt}",
            f"\\caption{{{escape(table.caption)}}}\\label{{{label}}}\\par\\smallskip",
            f"\\resizebox{{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}}{{!}}{{%\n{grid}%\n}}",
            "\\par\\smallskip\\begin{minipage}{\\linewidth}\\scriptsize\\raggedright",
            "\\\\\n".join(under),
            "\\end{minipage}",
            "\\end{table}\n",
        ]
    )


LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "|": "\\textbar{}",
    "−": "$-$",
    "–": "--",
    "[": "{[}",  # after the end of a row a bare one would be read as its option
    "*": "{*}",
}


def latex_escape(text: str) -> str:
    r"""Any text as LaTeX that pdflatex sets: letters of Latin-1 stay, other characters become their code, \u4e2d."""

    def one(character: str) -> str:
        plain = character.isascii() and character.isprintable()
        if character in LATEX or plain or (character.isalpha() and ord(character) < 256):
            return LATEX.get(character, character)
        return " " if character.isspace() else f"\\textbackslash{{}}u{ord(character):04x}"

    return "".join(map(one, text))


DOCUMENT = r"""\documentclass[a4paper,landscape]{article}
\usepackage[T1]{fontenc}
\usepackage[utf8]{inputenc}
\usepackage[margin=15mm]{geometry}
\usepackage{booktabs}
\usepackage{graphicx}
\begin{document}
%s
\end{document}
"""
NEEDED = "% needs \\usepackage{booktabs}, \\usepackage{graphicx} and \\usepackage[T1]{fontenc}\n"


def write(runs: list[RunFolder], out_dir: Path, protocol_ids: list[str]) -> list[Path]:
    """The entry point `tables`: summary, forgetting, steps and IoU per class for each protocol; returns the files.

    Raises RunError when a run has no finished step, is damaged, or none fits any protocol.
    """
    return write_scored(score_all(runs, protocol_ids), Path(out_dir))


def write_scored(scored: dict[str, list[Scored]], out_dir: Path) -> list[Path]:
    """CSV holds all settings of a protocol; Markdown and LaTeX hold one table for each."""
    written, inputs = [], []

    def put(name: str, text: str) -> None:
        write_bytes(out_dir / name, text.encode())
        written.append(out_dir / name)

    for protocol, ones in scored.items():
        end = file_part(protocol)
        settings = list(by_setting(ones).values())
        for kind, frame in _frames(ones).items():
            if not frame.empty:
                put(f"{kind}.{end}.csv", frame.to_csv(index=False, lineterminator="\n"))
        summaries = [summary_table(members) for members in settings]
        wide = [table for members in settings if (table := forgetting_table(members))]
        # One table per run: with many steps, all of them together would not fit a page.
        narrow = [table for one in ones if (table := forgetting_table([one]))]
        for kind, shown, printed in (("summary", summaries, summaries), ("forgetting", wide, narrow)):
            if shown:
                put(f"{kind}.{end}.md", "\n".join(markdown(table) for table in shown))
                text = [latex(table, f"tab:{kind}.{end}.{n}") for n, table in enumerate(printed, 1)]
                put(f"{kind}.{end}.tex", NEEDED + "\n".join(text))
                inputs.append(f"\\input{{{kind}.{end}.tex}}\n\\clearpage")
    put("tables.tex", DOCUMENT % "\n".join(inputs))
    return written


def _frames(scored: Sequence[Scored]) -> dict[str, pd.DataFrame]:
    makers: dict[str, Callable[[Sequence[Scored]], Any]] = {
        "summary": frames.summary_frame,
        "forgetting": frames.forgetting_frame,
        "steps": frames.steps_frame,
        "per_class": frames.per_class_frame,
    }
    return {kind: make(scored) for kind, make in makers.items()}


def file_part(name: str) -> str:
    """`name` with everything replaced that cannot stand in a file name."""
    return re.sub(r"[^A-Za-z0-9@._-]", "_", name)
