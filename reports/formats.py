"""How a table is written: Markdown, LaTeX (booktabs), and the words that stand in all of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

import pandas as pd

from cssbench.reports.noise import Spread

MISSING = "–"
MIOU, DROP, RELATIVE, CHANGE = "mIoU, %", "drop to oracle, points", "relative drop, %", "change, points"
GROUPS = "classes of a group, by the step that taught it"
# Markdown has one line of headings: what stands there before the name of a column, where not the heading itself.
SHORT = {"": "", MIOU: "", GROUPS: "group ", CHANGE: "", DROP: "drop, points: ", RELATIVE: "relative drop, %: "}
PUBLISHED = "0B5CAD"  # RGB of published rows and marks, as --link in report.css


class Cell(NamedTuple):
    """text: the value. under: what stands below it in smaller print, or "". best: set in bold. number, aside, wrap: of
    its column."""

    text: str
    under: str
    best: bool
    number: bool
    aside: bool
    wrap: bool


class Head(NamedTuple):
    """The name of a column; number: set flush right; aside: left out on a narrow screen."""

    name: str
    number: bool
    aside: bool


@dataclass(frozen=True)
class Table:
    """One table, every cell a string; a line break in a cell parts its value from what stands below it.

    cells: columns are pairs (heading over several columns or "", column); the first `text` columns hold words, the
    others numbers. kinds: one per row, words of "oracle", "unfinished", "published", "mean", "start" (of a block of
    rows). formulas: column -> formula. best: (row, column) of cells in bold. aside: columns that a narrow screen can do
    without. wrap: columns of sentences. remarks: notes on single rows, many of them.
    """

    caption: str
    cells: pd.DataFrame
    text: int
    kinds: tuple[str, ...]
    formulas: dict[str, str]
    notes: tuple[str, ...]
    best: frozenset[tuple[int, int]] = frozenset()
    aside: tuple[str, ...] = ("method", "model", "seed", "classes")
    wrap: tuple[str, ...] = ("why",)
    remarks: tuple[str, ...] = ()

    @property
    def columns(self) -> list[tuple[str, str]]:
        """(heading or "", name) of each column."""
        return [(str(pair[0]), str(pair[1])) for pair in self.cells.columns]

    @property
    def headings(self) -> list[tuple[str, list[Head]]]:
        """(heading, the columns under it), from left to right."""
        heads = (
            (head, Head(name, n >= self.text and name not in self.wrap, name in self.aside))
            for n, (head, name) in enumerate(self.columns)
        )
        return [(head, [one for _, one in each]) for head, each in groupby(heads, key=lambda pair: pair[0])]

    @property
    def rows(self) -> list[tuple[str, list[Cell]]]:
        """(kind, cells) of each row."""
        found = []
        for row, (kind, texts) in enumerate(zip(self.kinds, self.cells.to_numpy().tolist(), strict=True)):
            cells = []
            for column, (content, (_, name)) in enumerate(zip(texts, self.columns, strict=True)):
                text, _, under = str(content).partition("\n")
                wrap = name in self.wrap
                number = column >= self.text and not wrap
                cells.append(Cell(text, under, (row, column) in self.best, number, name in self.aside, wrap))
            found.append((kind, cells))
        return found


def percent(value: float | None) -> str:
    """0.1234 -> '12.34', with a true minus sign; an en dash for None and NaN."""
    if value is None or pd.isna(value):
        return MISSING
    return f"{round(100 * value, 2) + 0.0:.2f}".replace("-", "−")


def plus_minus(value: Spread | None) -> str:
    """'12.34' for one run, '12.34 ± 0.31' for several."""
    if value is None:
        return MISSING
    return percent(value.mean) + ("" if value.std is None else f" ± {percent(value.std)}")


def ranges(ids: Sequence[int]) -> str:
    """[1, 2, 3, 7] -> '1–3, 7'; order kept."""
    runs: list[list[int]] = []
    for c in ids:
        if runs and runs[-1][-1] == c - 1:
            runs[-1].append(c)
        else:
            runs.append([c])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}–{r[-1]}" for r in runs)


def markdown(table: Table) -> str:
    """A caption, a GitHub table, formulas and notes; names are escaped."""
    escape = markdown_escape

    def one(cell: Cell) -> str:
        text = escape(f"{cell.text} ({cell.under})" if cell.under else cell.text)
        return f"**{text}**" if cell.best else text

    rows = [[one(cell) for cell in cells] for _, cells in table.rows]
    names = [escape(SHORT.get(head, f"{head}: ") + name) for head, name in table.columns]
    align = ["right" if head.number else "left" for _, heads in table.headings for head in heads]
    flat = pd.DataFrame(rows, columns=pd.Index(names), dtype=object)
    grid = flat.to_markdown(index=False, disable_numparse=True, colalign=align)
    formulas = [f"- {escape(name)}: {escape(formula)}" for name, formula in table.formulas.items()]
    notes = [f"- {escape(note)}" for note in (*table.notes, *table.remarks)]
    return "\n".join([escape(table.caption), "", grid, "", *formulas, *notes, ""])


def markdown_escape(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|#~])", r"\\\1", re.sub(r"\s+", " ", text))


def latex(table: Table, label: str) -> str:
    r"""A `table` environment in booktabs style, shrunk to the line where wider; names are escaped."""
    escape = latex_escape
    cells = pd.DataFrame([_latex_row(kind, cells) for kind, cells in table.rows], dtype=object)
    cells.columns = pd.MultiIndex.from_tuples([(escape(head), escape(name)) for head, name in table.columns])
    form = "".join(
        "p{9cm}" if name in table.wrap else "l" if n < table.text else "r" for n, (_, name) in enumerate(table.columns)
    )
    grid = cells.style.hide(axis="index").to_latex(hrules=True, column_format=form, multicol_align="c")
    rules, start = "", 1
    for heading, under in table.headings:
        rules += f"\\cmidrule(lr){{{start}-{start + len(under) - 1}}}" if heading else ""
        start += len(under)
    lines = grid.replace("\\\\\n", f"\\\\\n{rules}\n", 1).strip().split("\n")
    first = lines.index("\\midrule") + 1
    for row in reversed([n for n, kind in enumerate(table.kinds) if n and "start" in kind.split()]):
        lines.insert(first + row, "\\addlinespace")
    below = [f"{escape(name)}: {escape(formula)}." for name, formula in table.formulas.items()]
    below += [escape(note) for note in table.notes]
    remarks = "\\par\n".join(escape(remark) for remark in table.remarks)
    return "\n".join(
        [
            "\\begin{table}[!htbp]",
            "\\centering\\footnotesize\\setlength{\\tabcolsep}{4pt}",
            f"\\caption{{{escape(table.caption)}}}\\label{{{label}}}\\par\\smallskip",
            "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%",
            *lines,
            "}",
            "\\par\\smallskip\\begin{minipage}{\\linewidth}\\scriptsize\\raggedright",
            "\\\\\n".join(below),
            "\\end{minipage}",
            "\\end{table}\n",
            # Outside of the float, which could not be broken over pages.
            *([f"\\begingroup\\scriptsize\\noindent\\raggedright {remarks}\\par\\endgroup\n"] if remarks else []),
        ]
    )


def cut(table: Table, longest: int = 28) -> list[Table]:
    """The table cut into parts of at most `longest` rows, before the first row of a block where there is one."""
    starts = [row for row, kind in enumerate(table.kinds) if "start" in kind.split()]
    cuts, rows = [0], len(table.kinds)
    while rows - cuts[-1] > longest:
        inside = [row for row in starts if cuts[-1] < row <= cuts[-1] + longest]
        cuts.append(max(inside, default=cuts[-1] + longest))
    found = []
    for number, (start, end) in enumerate(zip(cuts, [*cuts[1:], rows], strict=True)):
        last = end == rows
        found.append(
            replace(
                table,
                caption=f"{table.caption}{' (continued)' if number else ''}",
                cells=table.cells.iloc[start:end],
                kinds=table.kinds[start:end],
                best=frozenset((row - start, column) for row, column in table.best if start <= row < end),
                formulas=table.formulas if last else {},
                notes=table.notes if last else (),
                remarks=table.remarks if last else (),
            )
        )
    return found


def _latex_row(kind: str, cells: Sequence[Cell]) -> list[str]:
    found = []
    for cell in cells:
        text = latex_escape(cell.text)
        text = f"\\textbf{{{text}}}" if cell.best else text
        text += f" {{\\scriptsize ({latex_escape(cell.under)})}}" if cell.under else ""
        text = f"\\textit{{{text}}}" if "oracle" in kind.split() and text else text
        found.append(f"\\textcolor[HTML]{{{PUBLISHED}}}{{{text}}}" if "published" in kind.split() and text else text)
    return found


LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "|": "\\textbar{}",
    "−": "$-$",
    "–": "--",
    "±": "$\\pm$",
    "×": "$\\times$",
    "≥": "$\\geq$",
    "▼": "$\\blacktriangledown$",
    "†": "\\dag{}",
    "‡": "\\ddag{}",
    "…": "\\ldots{}",
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
\IfFileExists{lmodern.sty}{\usepackage{lmodern}}{}
\usepackage[margin=15mm]{geometry}
\usepackage{amssymb}
\usepackage{booktabs}
\usepackage{graphicx}
\usepackage{xcolor}
\begin{document}
%s
\end{document}
"""
NEEDED = "% needs \\usepackage{amssymb,booktabs,graphicx,xcolor} and \\usepackage[T1]{fontenc}\n"


def file_part(name: str) -> str:
    """`name` with everything replaced that cannot stand in a file name, cut to 100 characters."""
    return re.sub(r"[^A-Za-z0-9@._-]", "_", name)[:100]


def file_parts(names: Iterable[str]) -> dict[str, str]:
    """`file_part` of each name, numbered where two would get the same."""
    found: dict[str, str] = {}
    for name in names:
        part, number = file_part(name), 1
        while part in found.values():
            number += 1
            part = f"{file_part(name)}-{number}"
        found[name] = part
    return found
