"""`cssbench data stats --out`: class frequencies of each step as CSV and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from cssbench.reports import plots
from cssbench.reports.formats import file_part
from cssbench.reports.plots import COLOURS, HATCHES, Theme, dress, legible
from cssbench.results import write_bytes

PARTS = {
    "new classes": (("new",), "class", COLOURS[0]),
    "old classes, labelled": (("old",), "class", COLOURS[4]),
    "background: old classes": (("old",), "background", COLOURS[1]),
    "background: future classes": (("future",), "background", COLOURS[5]),
    "background: void": (("void",), "background", "#b4bac2"),
    "ignored": (("void", "padding", "future"), "ignored", "#6b727b"),
}
NAMED = 40  # classes that still get their name on the axis


def write(modes: dict[str, Sequence[Any]], title: str, out_dir: Path) -> list[Path]:
    """frequencies.csv of all modes, and frequencies.<mode>.png of each; the files written.

    modes: mode -> its steps (`cssbench.data.statistics.StepFrequencies`).
    """
    rows = [asdict(row) for steps in modes.values() for step in steps for row in step.rows]
    written = [Path(out_dir) / "frequencies.csv"]
    frame = pd.DataFrame(rows).astype({"learned": "Int64"})
    write_bytes(written[0], frame.to_csv(index=False, lineterminator="\n").encode())
    for mode, steps in modes.items():
        written.append(Path(out_dir) / f"frequencies.{file_part(mode)}.png")
        _, drawn = plots.render(partial(draw, steps, f"{title}, {mode}"))
        write_bytes(written[-1], drawn["png"])
    return written


def draw(steps: Sequence[Any], title: str, theme: Theme) -> Figure:
    """Three panels: pixels and images of each class at the step that introduces it; what the pixels of a step are."""
    new = [row for step in steps for row in step.rows if row.kind == "new"]
    figure = Figure(figsize=(min(14.0, max(7.2, 2.5 + 0.16 * len(new))), 8.2), layout="constrained")
    figure.suptitle(legible(title, 100), color=theme.ink, fontsize=10)
    pixels, images, parts = figure.subplots(3, 1)
    places = range(len(new))
    for axes, what in ((pixels, "pixels"), (images, "images")):
        for step in steps:
            mine = [place for place in places if new[place].step == step.step]
            axes.bar(
                [1 + place for place in mine], [getattr(new[place], what) for place in mine], width=0.8,
                color=COLOURS[step.step % 7], hatch=HATCHES[step.step // 7 % len(HATCHES)], edgecolor=theme.page,
                linewidth=0.3,
            )  # fmt: skip
        dress(axes, theme, f"{what} of each class at the step that introduces it (colour: step)", "")
        axes.set_ylabel(what, color=theme.ink)
        _name_classes(axes, new, theme)
    pixels.set_yscale("log")
    least = min((row.pixels for row in new if row.pixels), default=1)
    pixels.set_ylim(bottom=10 ** math.floor(math.log10(least)))
    pixels.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}".replace("e+0", "e")))
    pixels.yaxis.set_minor_formatter(NullFormatter())
    images.yaxis.set_major_locator(MaxNLocator(integer=True))
    _compose(parts, steps, theme)
    return figure


def _name_classes(axes: Any, new: Sequence[Any], theme: Theme) -> None:
    if len(new) <= NAMED:
        axes.set_xticks(
            range(1, 1 + len(new)), [legible(row.name, 16) for row in new], rotation=60, ha="right", fontsize=7
        )
        axes.set_xlabel("")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("classes in the order of learning", color=theme.ink)
    axes.set_xlim(0.3, len(new) + 0.7)


def _compose(axes: Any, steps: Sequence[Any], theme: Theme) -> None:
    """Stacked bars: of all pixels of a step, in %, what the learner sees them as, and what they are."""
    low = [0.0] * len(steps)
    for label, (kinds, seen_as, colour) in PARTS.items():
        heights = [100 * step.share(*kinds, seen_as=seen_as) for step in steps]
        if any(heights):
            axes.bar([s.step for s in steps], heights, bottom=low, width=0.8, color=colour, label=label)
            low = [a + b for a, b in zip(low, heights, strict=True)]
    dress(axes, theme, "what the pixels of each step are to the learner", "step (images)")
    axes.set_xticks([s.step for s in steps], [f"{s.step}\n({s.images})" for s in steps])
    axes.set_ylabel("pixels, %", color=theme.ink)
    axes.set_ylim(0, 100)
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=3, fontsize=7, frameon=False, labelcolor=theme.ink
    )
