"""Pictures of labels: class colours, legends, and what a learner sees of an image. PIL only."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cssbench.data.base import SegDataset
from cssbench.errors import DataError
from cssbench.scenario import IGNORE, Scenario, Step

BACKGROUND_COLOUR, IGNORE_COLOUR = (0, 0, 0), (255, 255, 255)
PANEL = 480  # px, width of one panel
LINE = 22  # px, height of a line of text


def colour(ids: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """(H, W) class ids -> (H, W, 3) uint8: 0 black, 255 white, classes in the palette's colours."""
    table = np.zeros((256, 3), np.uint8)
    table[0], table[IGNORE] = BACKGROUND_COLOUR, IGNORE_COLOUR
    table[1 : 1 + len(palette)] = palette
    return table[ids]


def explain_picture(scenario: Scenario, step: Step, source: SegDataset, stem: str) -> Image.Image:
    """Three panels with legends: a training image, its full labels, and the labels that the learner sees at `step`.

    Raises DataError when the dataset has no training image of that name.
    """
    if stem not in set(source.stems("train")):
        raise DataError(f"There is no training image {stem!r} in {source.folders('train')[0]}.")
    image, label = source.pair("train", stem)
    seen = scenario.train_table(step)[label]  # positions
    ids = np.zeros(256, np.uint8)
    ids[: 1 + scenario.num_classes], ids[IGNORE] = [0, *scenario.order], IGNORE
    learner = ids[seen]
    rule = "" if set(np.unique(label).tolist()) & set(step.new) else "\nnot in this step: shows none of its classes"
    new = ", ".join(source.classes[c - 1] for c in step.new[:4]) + (", ..." if len(step.new) > 4 else "")
    panels = [
        _panel(Image.fromarray(image), stem, []),
        _panel(Image.fromarray(colour(label, source.palette)), "full labels", _legend(label, source)),
        _panel(
            Image.fromarray(colour(learner, source.palette)),
            f"what the learner sees at step {step.index} ({new}){rule}",
            _legend(learner, source),
        ),
    ]
    sheet = Image.new("RGB", (sum(p.width for p in panels), max(p.height for p in panels)), "white")
    for number, panel in enumerate(panels):
        sheet.paste(panel, (number * PANEL, 0))
    return sheet


def _legend(ids: np.ndarray, source: SegDataset) -> list[tuple[tuple[int, ...], str]]:
    """(colour, text) of every value that occurs, the most frequent first."""
    values, counts = np.unique(ids, return_counts=True)
    entries: list[tuple[tuple[int, ...], str]] = []
    for value in values[np.argsort(-counts)].tolist():
        if value == 0:
            entries.append((BACKGROUND_COLOUR, "0 background" if source.background_class else "0 background / void"))
        elif value == IGNORE:
            entries.append((IGNORE_COLOUR, "255 ignored"))
        else:
            entries.append((tuple(source.palette[value - 1].tolist()), f"{value} {source.classes[value - 1]}"))
    return entries


def draw_legend(entries: list[tuple[tuple[int, ...], str]]) -> Image.Image:
    """(colour, text) pairs as a picture of their own, in columns of at most 20."""
    font = ImageFont.load_default(14)
    rows = min(len(entries), 20)
    width = 40 + max(int(font.getlength(text)) for _, text in entries)
    sheet = Image.new("RGB", (width * -(-len(entries) // rows), 8 + rows * LINE), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (fill, text) in enumerate(entries):
        x, y = 8 + number // rows * width, 4 + number % rows * LINE
        draw.rectangle((x, y + 2, x + 14, y + 16), fill=fill, outline="black")
        draw.text((x + 20, y), text, fill="black", font=font)
    return sheet


def _panel(picture: Image.Image, title: str, legend: list[tuple[tuple[int, ...], str]]) -> Image.Image:
    """Title lines, the picture at PANEL width, and the legend in two columns."""
    font = ImageFont.load_default(14)
    height = round(picture.height * (PANEL - 16) / picture.width)
    lines = title.split("\n")
    rows = (len(legend) + 1) // 2
    top = LINE * 2 + 6
    panel = Image.new("RGB", (PANEL, top + height + 8 + rows * LINE), "white")
    draw = ImageDraw.Draw(panel)
    for number, line in enumerate(lines[:2]):
        draw.text((8, 4 + number * LINE), line[:64], fill="black", font=font)
    resample = Image.Resampling.NEAREST if legend else Image.Resampling.BILINEAR
    panel.paste(picture.resize((PANEL - 16, height), resample), (8, top))
    for number, (fill, text) in enumerate(legend):
        x, y = 8 + (number % 2) * (PANEL // 2), top + height + 8 + (number // 2) * LINE
        draw.rectangle((x, y + 2, x + 14, y + 16), fill=fill, outline="black")
        draw.text((x + 20, y), text[:28], fill="black", font=font)
    return panel
