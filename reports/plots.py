"""How figures are drawn and written, and those over groups and steps. Colour-blind-safe, and told apart in print by
marker, line and hatch.

matplotlib's object interface with the Agg canvas: nothing global is changed, and equal numbers give equal bytes.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from cssbench.metrics import continual
from cssbench.reports.entries import Entry
from cssbench.reports.noise import Spread
from cssbench.results import write_bytes

# Okabe & Ito 2008, without black (the oracle's lines are grey) and with the pale yellow last.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#F0E442")
MARKERS = "osD^vPX<>"
LINES = ("-", "--", ":", "-.")
HATCHES = ("", "//", "\\\\", "xx", "--", "++", "||", "//--")
LEAST = 1.0  # points that an axis of differences covers at least: noise must not look like a result
LEGEND = 15  # characters of a legend per inch of a figure's width
LABEL = 48  # longest name in a figure, characters
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
    """A figure as the page shows it: its kind, the entry it is of (None: of all), its width in inches, data URIs for
    light and dark, a caption, and the files written."""

    kind: str
    label: str | None
    width: float
    light: str
    dark: str
    caption: str
    files: tuple[Path, ...]

    @property
    def png(self) -> Path:
        return next(path for path in self.files if path.suffix == ".png")


def miou_figure(found: Sequence[Entry], theme: Theme) -> Figure:
    """Two panels over the steps, mIoU in %: all classes seen so far; base classes (thesis Figure 4.8). One line per
    entry, the mean of its runs, with a band of one standard deviation where there are several."""
    figure = Figure(figsize=(7.2, 3.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    handles: dict[str, Any] = {}
    learners, oracles = [e for e in found if not e.oracle], [e for e in found if e.oracle]
    for axes, part, title in zip(panels, ("all", "base"), ("all classes seen so far", "base classes"), strict=True):
        for index, entry in enumerate(learners):
            means, stds = in_percent(entry.steps(part))
            (line,) = axes.plot(
                range(len(means)), means, color=COLOURS[index % 7], marker=MARKERS[index % 9], markersize=4.5,
                linestyle=LINES[index // 7 % 4], linewidth=1.5, markeredgecolor=theme.page, markeredgewidth=0.5,
            )  # fmt: skip
            if entry.n > 1:
                axes.fill_between(
                    range(len(means)), means - stds, means + stds, color=COLOURS[index % 7], alpha=0.2, linewidth=0
                )
            handles[with_n(entry)] = line
        for index, entry in enumerate(oracles):
            value = entry.last(part)
            if value is not None:
                style = (0, (4, 2 + 2 * index))
                axes.axhline(100 * value.mean, color=theme.oracle, linewidth=1, linestyle=style, zorder=1)
                handles[with_n(entry)] = Line2D([], [], color=theme.oracle, linewidth=1, linestyle=style)
        dress(axes, theme, title, "step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("mIoU, %", color=theme.ink)
    legend(figure, handles, theme)
    return figure


def forgetting_figure(found: Sequence[Entry], theme: Theme) -> Figure:
    """Bars of forgetting (points of mIoU) per group learned before the last step, one colour and hatch per entry; a
    line of one standard deviation up and down where it has several runs."""
    groups = max(entry.first.done for entry in found) - 1
    figure = Figure(figsize=(7.2, 3.0), layout="constrained")
    axes = figure.subplots()
    handles: dict[str, Any] = {}
    width = 0.8 / len(found)
    for index, entry in enumerate(found):
        runs = [continual.forgetting(one.table) for one in entry.members]
        means, stds = in_percent([entry.spread(values) for values in zip(*runs, strict=True)])
        places = np.arange(len(means)) + (index - (len(found) - 1) / 2) * width
        handles[with_n(entry)] = axes.bar(
            places, means, width * 0.92, color=COLOURS[index % 7], hatch=HATCHES[index % 8],
            edgecolor=theme.page, linewidth=0,
        )  # fmt: skip
        if entry.n > 1:
            axes.errorbar(places, means, stds, fmt="none", ecolor=theme.ink, elinewidth=1, capsize=2)
    axes.axhline(0, color=theme.ink, linewidth=0.8)
    axes.set_xticks(range(groups), ["0 (base)", *map(str, range(1, groups))])
    dress(axes, theme, "", "group, by the step that taught it")
    axes.tick_params(axis="x", length=0)
    axes.grid(visible=False, axis="x")
    axes.set_xlim(-0.6, groups - 0.4)
    low, high = axes.get_ylim()
    axes.set_ylim(low, max(high, low + LEAST))
    axes.set_ylabel("forgetting, points", color=theme.ink)
    legend(figure, handles, theme)
    return figure


def in_percent(values: Sequence[Spread | None]) -> tuple[np.ndarray, np.ndarray]:
    """(means, standard deviations) in %; NaN and 0 where missing."""
    means = [np.nan if v is None else 100 * v.mean for v in values]
    return np.array(means), np.array([100 * v.std if v and v.std is not None else 0.0 for v in values])


def with_n(entry: Entry) -> str:
    shown = entry.shown_as
    if entry.n == 1:
        return shown
    return f"{shown.removesuffix(')')}, n = {entry.n})" if shown.endswith(" (oracle)") else f"{shown} (n = {entry.n})"


def dress(axes: Axes, theme: Theme, title: str, xlabel: str) -> None:
    axes.set_title(title, color=theme.ink, loc="left")
    axes.set_xlabel(xlabel, color=theme.ink)
    axes.set_facecolor("none")
    axes.grid(visible=True, axis="y", color=theme.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.ink)
    axes.tick_params(colors=theme.ink)


def legend(figure: Figure, handles: dict[str, Any], theme: Theme) -> None:
    # matplotlib leaves out labels that begin with an underscore.
    names = [legible(name) for name in handles]
    names = [f" {name}" if name.startswith("_") else name for name in names]
    room = LEGEND * figure.get_figwidth()
    columns = next(n for n in range(min(6, len(names)), 0, -1) if n == 1 or _width(names, n) <= room)
    columns = -(-len(names) // -(-len(names) // columns))  # as few as fill the same number of rows
    figure.legend(
        list(handles.values()), names, loc="outside lower center", ncols=columns, frameon=False, labelcolor=theme.ink,
        handlelength=2.6,
    )  # fmt: skip


def _width(names: Sequence[str], columns: int) -> int:
    """Characters that a legend of so many columns is wide; each handle counts as 8."""
    rows = -(-len(names) // columns)
    return sum(8 + max(map(len, names[start : start + rows])) for start in range(0, len(names), rows))


def legible(text: str, longest: int = LABEL) -> str:
    """`text` cut to `longest`, a box for each character that the font lacks."""
    shown = "".join(c if ord(c) in _glyphs() else " " if c.isspace() else "□" for c in text)
    return shown if len(shown) <= longest else f"{shown[: longest - 1]}…"


@cache
def _glyphs() -> frozenset[int]:
    path = font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans"))
    return frozenset(font_manager.get_font(path).get_charmap())


def plot(kind: str, draw: Callable[[Theme], Figure], stem: Path, caption: str, label: str | None = None) -> Plot:
    """Draw a figure and write it as `<stem>.{svg,pdf,png}` (PNG: 200 dots per inch)."""
    figure, drawn = render(draw)
    files = []
    for end, content in drawn.items():
        path = stem.with_name(f"{stem.name}.{end}")
        write_bytes(path, content)
        files.append(path)
    light, dark = (_svg_uri(slim(svg)) for svg in (drawn["svg"], darkened(drawn["svg"])))
    return Plot(kind, label, figure.get_figwidth(), light, dark, caption, tuple(files))


def render(draw: Callable[[Theme], Figure]) -> tuple[Figure, dict[str, bytes]]:
    """The figure, drawn and laid out once, and its bytes by kind of file, in the light theme."""
    found = {}
    with matplotlib.rc_context(SETTINGS):
        figure = draw(LIGHT)
        FigureCanvasAgg(figure)
        figure.set_facecolor(LIGHT.page)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for kind in ("svg", "pdf", "png"):
            buffer = io.BytesIO()
            # tight: long class names reach beyond what the layout engine foresaw
            figure.savefig(buffer, format=kind, dpi=200, metadata=METADATA[kind], bbox_inches="tight", pad_inches=0.06)
            found[kind] = buffer.getvalue()
    return figure, found


def darkened(svg: bytes) -> bytes:
    """A figure in the light theme with the colours of the dark one; no other part of a figure has a theme's colours."""
    dark = dict(zip(astuple(LIGHT), (colour.encode() for colour in astuple(DARK)), strict=True))
    pattern = "|".join(dark).encode()
    return re.sub(pattern, lambda match: dark[match.group().decode()], svg)


def slim(svg: bytes) -> bytes:
    """The same picture in fewer bytes, for a page: three decimals, no comments, no indentation."""
    svg = re.sub(rb"<!--.*?-->|<metadata>.*?</metadata>", b"", svg, flags=re.DOTALL)
    return re.sub(rb"\s*\n\s*", b"\n", re.sub(rb"(\.\d{3})\d+", rb"\1", svg))


def _svg_uri(content: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(content).decode()}"
