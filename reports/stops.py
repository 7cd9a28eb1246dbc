"""Where tokens stopped: pictures of the sample images in the form of thesis Figures 5.1 and 5.4."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cssbench.reports.charts import opaque
from cssbench.reports.plots import Theme, legend, legible
from cssbench.reports.samples import Sample, Swatch

DARK = 0.25  # brightness left to tokens that go on


@dataclass(frozen=True)
class Stops:
    """One run on one image after its last step. prediction: (h, w) class ids; depths: (h, w) uint8, the number of
    blocks that the token at a pixel went through; panels: one (h, w, 3) picture per item of `StopSample.stages`, None
    where the run has no such stage."""

    label: str
    prediction: np.ndarray
    depths: np.ndarray
    panels: tuple[np.ndarray | None, ...]


@dataclass(frozen=True)
class StopSample:
    """A sample image with the runs that dropped tokens on it. stages: the depths at which any of them stopped some, but
    for the last; colours: (256, 3) uint8, depth -> colour, named in `legend`."""

    sample: Sample
    rows: tuple[Stops, ...]
    stages: tuple[int, ...]
    colours: np.ndarray
    legend: tuple[Swatch, ...]


def stop_samples(samples: Sequence[Sample]) -> list[StopSample]:
    """Those of `samples` for which any run kept depths."""
    shown = [{row.label: _last(row.depths) for row in sample.rows} for sample in samples]
    every = sorted(
        {int(d) for each in shown for depths in each.values() if depths is not None for d in np.unique(depths)}
    )
    colours, stages = depth_colours(every), tuple(every[:-1])
    named = tuple(Swatch(_words(d, every), "#{:02x}{:02x}{:02x}".format(*colours[d]), None) for d in every)
    found = []
    for sample, each in zip(samples, shown, strict=True):
        rows = []
        for row in sample.rows:
            depths, prediction = each[row.label], _last(row.predictions)
            if depths is not None and prediction is not None:
                picture = opaque(sample.image, *depths.shape)[..., :3]
                there = set(np.unique(depths).tolist())
                panels = tuple(stage_panel(picture, depths, d) if d in there else None for d in stages)
                rows.append(Stops(row.label, prediction, depths, panels))
        if rows:
            found.append(StopSample(sample, tuple(rows), stages, colours, named))
    return found


def _last(panels: Sequence[np.ndarray | None]) -> np.ndarray | None:
    return next((panel for panel in reversed(panels) if panel is not None), None)


def _words(depth: int, every: Sequence[int]) -> str:
    return f"all {depth} blocks" if depth == every[-1] else f"stopped {_after(depth)}"


def _after(stage: int) -> str:
    return f"after {stage} block{'s' * (stage != 1)}"


def depth_colours(every: Sequence[int]) -> np.ndarray:
    """(256, 3) uint8: bright for what stops first, dark for what goes through all (cividis, colour-blind-safe)."""
    table = np.zeros((256, 3), np.uint8)
    ramp = matplotlib.colormaps["cividis"]
    for number, depth in enumerate(every):
        bright = 1 - number / max(len(every) - 1, 1)
        table[depth] = [round(255 * part) for part in ramp(bright)[:3]]
    return table


def stage_panel(image: np.ndarray, depths: np.ndarray, stage: int) -> np.ndarray:
    """The image, (h, w, 3), as it is where tokens have stopped after `stage` blocks or earlier, dark elsewhere."""
    return np.where((depths <= stage)[..., None], image, (DARK * image).astype(np.uint8))


def stops_figure(found: StopSample, theme: Theme) -> Figure:
    """Above image and truth; below for each run the prediction, the map of depths, and a panel per stage."""
    sample, columns = found.sample, 2 + len(found.stages)
    height, width = sample.truth.shape
    gap, line = max(2, width // 25), max(6, width // 6)  # px between pictures; px for a line of headings
    lines = [[sample.image, sample.colours[sample.truth]]]
    lines += [[sample.colours[row.prediction], found.colours[row.depths], *row.panels] for row in found.rows]
    tops = [0, *(height + gap + line + number * (height + gap) for number in range(len(found.rows)))]
    canvas = np.zeros((tops[-1] + height, columns * (width + gap), 4), np.uint8)
    for top, pictures in zip(tops, lines, strict=True):
        for column, picture in enumerate(pictures):
            if picture is not None:
                x = column * (width + gap)
                canvas[top : top + height, x : x + width] = opaque(picture, height, width)
    wide = min(1.6, 7 / columns) / width  # inches per px
    figure = Figure(figsize=(canvas.shape[1] * wide + 1.7, canvas.shape[0] * wide + 0.7), layout="constrained")
    axes = figure.subplots()
    axes.imshow(canvas, interpolation="nearest")
    axes.set_axis_off()
    look: dict[str, Any] = {"color": theme.ink, "fontsize": 8}
    headings = (["image", "truth"], ["prediction", "depth", *map(_after, found.stages)])
    for top, titles in zip(tops, headings, strict=False):
        for column, title in enumerate(titles):
            axes.text(column * (width + gap) + width / 2, top - gap, title, ha="center", va="bottom", **look)
    for top, row in zip(tops[1:], found.rows, strict=True):
        label = "\n".join(textwrap.wrap(legible(row.label, 72), 26))
        axes.text(-2 * gap, top + height / 2, label, ha="right", va="center", **look)
    handles = {
        swatch.name: Rectangle((0, 0), 1, 1, facecolor=swatch.colour, edgecolor=theme.oracle, linewidth=0.5)
        for swatch in found.legend
    }
    legend(figure, handles, theme)
    return figure
