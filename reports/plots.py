"""Figures: mIoU over the steps, forgetting per group. Colour-blind-safe, told apart in print by marker, line and hatch.

matplotlib's object interface with the Agg canvas: nothing global is changed, and equal numbers give equal bytes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from cssbench.metrics import continual
from cssbench.reports.scored import Scored
from cssbench.reports.tables import file_part
from cssbench.results import write_bytes

# Okabe & Ito 2008, without black (the oracle's lines are grey) and with the pale yellow last.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#F0E442")
MARKERS = "osD^vPX<>"
LINES = ("-", "--", ":", "-.")
HATCHES = ("", "//", "\\\\", "xx", "--", "++", "||", "//--")
LEGEND = 108  # characters across a figure
SETTINGS: Any = {
    "svg.hashsalt": "cssbench",
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
    "text.parse_math": False,  # a name may hold a dollar sign
    "font.size": 9,
    "axes.titlesize": 9,
    "hatch.linewidth": 0.6,
}
METADATA: dict[str, dict[str, Any]] = {
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "png": {"Software": None},
}


@dataclass(frozen=True)
class Theme:
    """Colours of a figure: text and axes, grid, oracle, page."""

    ink: str
    grid: str
    oracle: str
    page: str


LIGHT = Theme("#1f2328", "#d8dce1", "#5b626b", "#ffffff")
DARK = Theme("#e4e7eb", "#3a4048", "#a9b0b9", "#16191d")


@dataclass(frozen=True)
class Plot:
    """A figure as the page shows it: data URIs for light and dark, a caption, and the files written."""

    light: str
    dark: str
    caption: str
    files: tuple[Path, ...]


def plots(scored: Sequence[Scored], folder: Path, name: str) -> list[Plot]:
    """Draw the figures of one setting under one protocol into `folder` as `<kind>.<name>.{svg,pdf,png}`."""
    name = file_part(name)
    learners = [one for one in scored if not one.oracle]
    found = []
    where = f"{scored[0].setting.title}, protocol {scored[0].protocol.id}"
    if learners:
        caption = f"mIoU after each step of all classes seen so far, and of the base classes. {where}."
        found.append(_plot(miou_figure, scored, folder / f"miou.{name}", caption))
    if any(one.done > 1 for one in learners):
        caption = f"Forgetting of each group: {continual.FORMULAS['forgetting']}. {where}."
        found.append(_plot(forgetting_figure, learners, folder / f"forgetting.{name}", caption))
    return found


def miou_figure(scored: Sequence[Scored], theme: Theme) -> Figure:
    """Two panels over the steps, mIoU in %: all classes seen so far; base classes. One line per run."""
    figure = Figure(figsize=(7.2, 3.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    handles: dict[str, Any] = {}
    learners, oracles = [o for o in scored if not o.oracle], [o for o in scored if o.oracle]
    for axes, part, title in zip(panels, ("all", "base"), ("all classes seen so far", "base classes"), strict=True):
        for index, one in enumerate(learners):
            values = [np.nan if s[part] is None else 100 * float(s[part]) for s in one.scores]
            (line,) = axes.plot(
                range(one.done), values, color=COLOURS[index % 7], marker=MARKERS[index % 9], markersize=4.5,
                linestyle=LINES[index // 7 % 4], linewidth=1.5, markeredgecolor=theme.page, markeredgewidth=0.5,
            )  # fmt: skip
            handles[one.shown_as] = line
        for index, one in enumerate(oracles):
            value = one.scores[-1][part]
            if value is not None:
                style = (0, (4, 2 + 2 * index))
                axes.axhline(100 * value, color=theme.oracle, linewidth=1, linestyle=style, zorder=1)
                handles[one.shown_as] = Line2D([], [], color=theme.oracle, linewidth=1, linestyle=style)
        _dress(axes, theme, title, "step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("mIoU, %", color=theme.ink)
    _legend(figure, handles, theme)
    return figure


def forgetting_figure(learners: Sequence[Scored], theme: Theme) -> Figure:
    """Bars of forgetting (points of mIoU) per group learned before the last step, one colour and hatch per run."""
    groups = max(one.done for one in learners) - 1
    figure = Figure(figsize=(7.2, 3.0), layout="constrained")
    axes = figure.subplots()
    handles: dict[str, Any] = {}
    width = 0.8 / len(learners)
    for index, one in enumerate(learners):
        values = [np.nan if f is None else 100 * f for f in continual.forgetting(one.table)]
        places = np.arange(len(values)) + (index - (len(learners) - 1) / 2) * width
        bars = axes.bar(
            places, values, width * 0.92, color=COLOURS[index % 7], hatch=HATCHES[index % 8],
            edgecolor=theme.page, linewidth=0,
        )  # fmt: skip
        handles[one.shown_as] = bars
    axes.axhline(0, color=theme.ink, linewidth=0.8)
    axes.set_xticks(range(groups), ["0 (base)", *map(str, range(1, groups))])
    _dress(axes, theme, "", "group, by the step that taught it")
    axes.tick_params(axis="x", length=0)
    axes.grid(visible=False, axis="x")
    axes.set_xlim(-0.6, groups - 0.4)
    axes.set_ylabel("forgetting, points", color=theme.ink)
    _legend(figure, handles, theme)
    return figure


def _dress(axes: Axes, theme: Theme, title: str, xlabel: str) -> None:
    axes.set_title(title, color=theme.ink, loc="left")
    axes.set_xlabel(xlabel, color=theme.ink)
    axes.set_facecolor("none")
    axes.grid(visible=True, axis="y", color=theme.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.ink)
    axes.tick_params(colors=theme.ink)


def _legend(figure: Figure, handles: dict[str, Any], theme: Theme) -> None:
    # matplotlib leaves out labels that begin with an underscore.
    names = [name if len(name) <= 48 else f"{name[:47]}…" for name in handles]
    names = [f" {name}" if name.startswith("_") else name for name in names]
    columns = next(n for n in range(min(6, len(names)), 0, -1) if n == 1 or _width(names, n) <= LEGEND)
    columns = -(-len(names) // -(-len(names) // columns))  # as few as fill the same number of rows
    figure.legend(
        list(handles.values()), names, loc="outside lower center", ncols=columns, frameon=False, labelcolor=theme.ink,
        handlelength=2.6,
    )  # fmt: skip


def _width(names: Sequence[str], columns: int) -> int:
    """Characters that a legend of so many columns is wide; each handle counts as 8."""
    rows = -(-len(names) // columns)
    return sum(8 + max(map(len, names[start : start + rows])) for start in range(0, len(names), rows))


def _plot(draw: Any, scored: Sequence[Scored], stem: Path, caption: str) -> Plot:
    files = []
    for kind in ("svg", "pdf", "png"):
        path = stem.with_name(f"{stem.name}.{kind}")
        write_bytes(path, render(draw, scored, LIGHT, kind))
        files.append(path)
    light, dark = (_svg_uri(render(draw, scored, theme, "svg", transparent=True)) for theme in (LIGHT, DARK))
    return Plot(light, dark, caption, tuple(files))


def render(draw: Any, scored: Sequence[Scored], theme: Theme, kind: str, transparent: bool = False) -> bytes:
    """The bytes of `draw(scored, theme)` as "svg", "pdf" or "png" (200 dots per inch)."""
    with matplotlib.rc_context(SETTINGS):
        figure = draw(scored, theme)
        FigureCanvasAgg(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=200, transparent=transparent, metadata=METADATA[kind])
    return buffer.getvalue()


def _svg_uri(content: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(content).decode()}"
