"""Figures over classes and over runs: IoU of each class after each step, what each class lost, old against new
classes, accuracy against cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from cssbench.protocol import Protocol
from cssbench.reports import frames
from cssbench.reports.entries import Entry
from cssbench.reports.plots import COLOURS, LEAST, MARKERS, Theme, dress, legend, legible, with_n
from cssbench.reports.samples import VERDICT_COLOURS, Sample, verdict_legend

ROWS = 50  # classes in one panel of a heat map
BARS = 40  # classes up to which all have a bar
ENDS = 15  # bars shown of each end above that
NAME = 26  # characters of a class name
LOST, WON = "#D55E00", "#0072B2"


def heat_figure(entry: Entry, theme: Theme) -> Figure:
    """IoU (%) of each class (rows, in the order of learning) after each step (columns), mean over the runs of `entry`.

    Empty: not learned yet. Crossed: not one pixel of the class in the truth.
    """
    one = entry.first
    taught, steps = list(frames.taught(one).items()), one.done
    values = np.full((len(taught), steps), np.nan)
    for t in range(steps):
        ious = entry.ious(t)
        values[:, t] = [100 * ious.get(c, np.nan) for c, _ in taught]
    panels = -(-len(taught) // ROWS)
    rows = -(-len(taught) // panels)
    wide, tall = min(0.55, max(0.24, 3 / steps)), 0.2 if rows <= 30 else 0.14
    size = (panels * (2.0 + steps * wide) + 0.8, 0.8 + rows * tall)
    figure = Figure(figsize=size, layout="constrained")
    every = figure.subplots(1, panels, squeeze=False)[0]
    for number, axes in enumerate(every):
        part = slice(number * rows, (number + 1) * rows)
        image = _heat(axes, values[part], [step for _, step in taught[part]], theme)
        names = [f"{legible(one.classes[c], NAME)}  {step}" for c, step in taught[part]]
        axes.set_yticks(range(len(names)), names, fontsize=7.5 if rows <= 30 else 6)
        axes.set_ylim(rows - 0.5, -0.5)
    bar = figure.colorbar(image, ax=list(every), shrink=min(1.0, 3 / size[1]), pad=0.02)
    bar.set_label("IoU, %", color=theme.ink)
    bar.ax.tick_params(colors=theme.ink)
    return figure


def _heat(axes: Axes, values: np.ndarray, taught: Sequence[int], theme: Theme) -> Any:
    rows, steps = values.shape
    image = axes.pcolormesh(
        np.arange(steps + 1) - 0.5, np.arange(rows + 1) - 0.5, np.ma.masked_invalid(values),
        cmap="viridis", vmin=0, vmax=100, rasterized=values.size > 120,
    )  # fmt: skip
    for row, step in enumerate(taught):
        for t in range(steps):
            value = values[row, t]
            if np.isnan(value):
                if t >= step:
                    cross = Rectangle((t - 0.5, row - 0.5), 1, 1, fill=False, hatch="xxx", linewidth=0)
                    cross.set_edgecolor(theme.grid)
                    axes.add_patch(cross)
            elif rows <= 30 and steps <= 12:
                ink = "#000000" if value > 60 else "#fefefe"  # no colour of a theme
                axes.text(t, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=ink)
    for row in range(1, rows):
        if taught[row] != taught[row - 1]:
            axes.axhline(row - 0.5, color=theme.page, linewidth=2)
    axes.set_facecolor("none")
    axes.set_xlabel("after step", color=theme.ink)
    axes.set_xticks(range(steps))
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=theme.ink, length=0)
    return image


def class_forgetting_figure(entry: Entry, theme: Theme) -> Figure:
    """Forgetting of each class (best IoU at an earlier step minus the last, points), most forgotten first, mean over
    the runs; of more than `BARS` classes the `ENDS` most and least forgotten."""
    one, names = entry.first, entry.first.classes
    step, lost = frames.taught(one), entry.forgetting()
    ranked = sorted(lost, key=lambda c: (-lost[c], c))
    shown: list[int | None] = list(ranked)
    if len(ranked) > BARS:
        shown = [*ranked[:ENDS], None, *ranked[-ENDS:]]
    figure = Figure(figsize=(7.2, 0.9 + 0.19 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for row, c in enumerate(shown):
        if c is not None:
            worse = lost[c] > 0
            axes.barh(
                row, 100 * lost[c], 0.75, color=LOST if worse else WON, hatch="" if worse else "///",
                edgecolor=theme.page, linewidth=0,
            )  # fmt: skip
    left_out = f"… {len(ranked) - 2 * ENDS} classes between …"
    labels = [left_out if c is None else f"{legible(names[c], NAME)}  {step[c]}" for c in shown]
    axes.set_yticks(range(len(shown)), labels, fontsize=7.5)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    dress(axes, theme, "", "forgetting, points of IoU")
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x", color=theme.grid, linewidth=0.6)
    axes.axvline(0, color=theme.ink, linewidth=0.8)
    low, high = axes.get_xlim()
    axes.set_xlim(low, max(high, low + LEAST))
    axes.tick_params(axis="y", length=0)
    return figure


def old_new_figure(found: Sequence[Entry], theme: Theme) -> Figure:
    """Base (x) against incremental (y) mIoU after the last step, one mark per run; lines of equal "all"."""
    figure = Figure(figsize=(5.4, 4.2), layout="constrained")
    axes = figure.subplots()
    handles: dict[str, Any] = {}
    points = []
    for entry, style in _styles(found, theme):
        for one in entry.members:
            base, later = one.scores[-1]["base"], one.scores[-1]["incremental"]
            if base is not None and later is not None:
                points.append((100 * base, 100 * later))
                (handles[with_n(entry)],) = axes.plot(*points[-1], **style)
    dress(axes, theme, "", "base classes, mIoU %")
    axes.grid(visible=False)
    axes.set_ylabel("incremental classes, mIoU %", color=theme.ink)
    low, high = np.min(points, axis=0), np.max(points, axis=0)
    room = np.maximum(0.12 * (high - low), 2)
    axes.set_xlim(max(0, low[0] - room[0]), high[0] + room[0])
    axes.set_ylim(max(0, low[1] - room[1]), high[1] + room[1])
    weights = all_weights(found[0].first.protocol, found[0].first.setting.groups)
    if weights:
        x, y = np.meshgrid(np.linspace(*axes.get_xlim(), 60), np.linspace(*axes.get_ylim(), 60))
        level = (weights[0] * x + weights[1] * y) / sum(weights)
        ticks = MaxNLocator(7).tick_values(level.min(), level.max())
        lines = axes.contour(x, y, level, levels=ticks, colors=theme.oracle, linewidths=0.6, linestyles=":")
        axes.clabel(lines, fmt=lambda value: f"all {value:g}", fontsize=7)
    legend(figure, handles, theme)
    return figure


def all_weights(protocol: Protocol, groups: Sequence[Sequence[int]]) -> tuple[int, int] | None:
    """Classes in base and in incremental, by which "all" is their weighted mean; None where it is no such mean."""
    if protocol.all_mean == "nonzero" or protocol.background == "all":
        return None
    return len(groups[0]) + (protocol.background == "base"), sum(map(len, groups[1:]))


def cost_figure(found: Sequence[Entry], theme: Theme) -> Figure:
    """ "all" after the last step against training time and against the number of parameters, one mark per run."""
    figure = Figure(figsize=(7.2, 3.3), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    handles: dict[str, Any] = {}
    longest = max(
        (seconds for e in found for o in e.members if (seconds := frames.cost(o)["train_seconds"])), default=1
    )
    unit, name = (3600, "hours") if longest >= 7200 else (60, "minutes") if longest >= 120 else (1, "seconds")
    wanted = (("train_seconds", unit, f"training, {name}"), ("parameters", 1e6, "parameters, millions"))
    for axes, (key, divisor, title) in zip(panels, wanted, strict=True):
        for entry, style in _styles(found, theme):
            for one in entry.members:
                value, mean = frames.cost(one)[key], one.scores[-1]["all"]
                if value is not None and mean is not None:
                    (handles[with_n(entry)],) = axes.plot(value / divisor, 100 * mean, **style)
        dress(axes, theme, "", title)
        axes.margins(0.12)
        axes.set_xlim(0, axes.get_xlim()[1])
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("all classes, mIoU %", color=theme.ink)
    legend(figure, handles, theme)
    return figure


def _styles(found: Sequence[Entry], theme: Theme) -> list[tuple[Entry, dict[str, Any]]]:
    """Each entry with the look of its marks: the learners as in the figures over steps, oracles hollow and grey."""
    styles, oracles, learners = [], 0, 0
    for entry in found:
        if entry.oracle:
            look = {"marker": "*hp8"[oracles % 4], "color": theme.oracle, "markerfacecolor": "none", "markersize": 9}
            oracles += 1
        else:
            look = {"marker": MARKERS[learners % 9], "color": COLOURS[learners % 7], "markersize": 7}
            look |= {"markeredgecolor": theme.page, "markeredgewidth": 0.6}
            learners += 1
        styles.append((entry, look | {"linestyle": "none", "clip_on": False, "zorder": 3}))
    return styles


def mask_figure(sample: Sample, theme: Theme) -> Figure:
    """Image, truth and, for each run, the prediction after each step above a map of what is wrong in it."""
    steps = len(sample.rows[0].predictions)
    height, width = sample.truth.shape[:2]
    gap = max(2, width // 25)
    place = {(0, 0): sample.image, (0, 1): sample.colours[sample.truth]}
    for number, row in enumerate(sample.rows):
        for t, (predicted, wrong) in enumerate(zip(row.predictions, row.errors, strict=True)):
            if predicted is not None and wrong is not None:
                place[2 * number, t + 2] = sample.colours[predicted]
                place[2 * number + 1, t + 2] = VERDICT_COLOURS[wrong]
    rows, columns = 2 * len(sample.rows), steps + 2
    canvas = np.zeros((rows * (height + gap), columns * (width + gap), 4), np.uint8)
    for (line, column), picture in place.items():
        y, x = line * (height + gap), column * (width + gap)
        canvas[y : y + height, x : x + width] = opaque(picture, height, width)
    wide = min(1.25, 9 / columns)
    figure = Figure(figsize=(columns * wide, rows * wide * height / width + 1.3), layout="constrained")
    axes = figure.subplots()
    axes.imshow(canvas, interpolation="nearest")
    axes.set_axis_off()
    for column, title in enumerate(["image", "truth", *(f"step {t}" for t in range(steps))]):
        axes.text(
            column * (width + gap) + width / 2, -gap, title, ha="center", va="bottom", color=theme.ink, fontsize=8
        )
    for number, row in enumerate(sample.rows):
        y, label = 2 * number * (height + gap) + (height if number else height + 3 * gap), legible(row.label, 30)
        axes.text(
            2 * width, y, f"{label}\nprediction, errors", ha="right", va="center" if number else "top",
            color=theme.ink, fontsize=8,
        )  # fmt: skip
    swatches = [*sample.legend, *verdict_legend()]
    handles = {}
    for swatch in swatches:
        name = swatch.name if swatch.step is None else f"{swatch.name}  {swatch.step}"
        handles[name] = Rectangle((0, 0), 1, 1, facecolor=swatch.colour, edgecolor=theme.oracle, linewidth=0.5)
    legend(figure, handles, theme)
    return figure


def opaque(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """(h, w, 3) uint8 -> (height, width, 4), by the nearest pixels."""
    rows = np.arange(height) * picture.shape[0] // height
    columns = np.arange(width) * picture.shape[1] // width
    return np.dstack([picture[rows][:, columns], np.full((height, width), 255, np.uint8)])
