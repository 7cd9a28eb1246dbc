"""The sample images: image, truth, the prediction after each step and what is wrong in it, with legends of colours."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from cssbench import scoring
from cssbench.errors import RunError
from cssbench.reports.scored import Scored, sample_files

SIDE = 320  # longest side embedded, px
SHARE = 0.005  # a class gets into a legend from this share of one picture on
NO_CLASS = (210, 210, 210)  # 255, and ids that the scenario does not have
# What an error map says of a pixel: name, colour. Told apart by lightness too.
VERDICTS = (
    ("void: not judged", (0, 0, 0)),
    ("class not learned yet: not judged", (150, 156, 163)),
    ("right", (222, 236, 247)),
    ("wrong", (213, 94, 0)),
    ("wrong, right after an earlier step", (94, 27, 120)),
)
VOID, FUTURE, RIGHT, WRONG, FORGOTTEN = range(5)
VERDICT_COLOURS = np.array([colour for _, colour in VERDICTS], np.uint8)


@dataclass(frozen=True)
class Swatch:
    """One legend entry: name, CSS colour, and the step that teaches the class (None: no class of a step)."""

    name: str
    colour: str
    step: int | None


@dataclass(frozen=True)
class Row:
    """The predictions of one run, one panel per step of the setting, None where there is none; an oracle's stands last.

    predictions: (h, w) uint8 class ids; errors: (h, w) uint8 indices of `VERDICTS`; depths: (h, w) uint8, how many
    blocks the token at a pixel went through, of models that drop tokens.
    """

    label: str
    oracle: bool
    predictions: tuple[np.ndarray | None, ...]
    errors: tuple[np.ndarray | None, ...]
    depths: tuple[np.ndarray | None, ...]


@dataclass(frozen=True)
class Sample:
    """One image (h, w, 3) uint8, its truth (h, w) uint8 class ids, the rows of the runs, the classes that any panel
    shows. colours: (256, 3) uint8, class id -> colour."""

    stem: str
    image: np.ndarray
    truth: np.ndarray
    colours: np.ndarray
    rows: tuple[Row, ...]
    legend: tuple[Swatch, ...]


def samples(scored: Sequence[Scored]) -> list[Sample]:
    """The sample images of the runs of one setting, every run once. Raises RunError on an unreadable picture.

    Runs whose truths of an image differ, one having evaluated all of it and another a crop, get a sample each.
    """
    runs = list({one.label: one for one in scored}.values())
    views: dict[tuple[str, tuple[int, ...], bytes], list[tuple[Scored, Path, np.ndarray, dict[int, Path]]]] = {}
    for one in runs:
        for stem, (image, truth, predictions) in sample_files(one.run, one.run.records()).items():
            ids = _ids(truth)
            views.setdefault((stem, ids.shape, ids.tobytes()), []).append((one, image, ids, predictions))
    colours = _colours(runs[0])
    found, times = [], Counter[str]()
    for (stem, _, _), there in sorted(views.items(), key=lambda view: view[0][0]):
        rows, (_, image, ids, _) = [], there[0]
        shown = [ids]
        for one, _, _, files in there:
            predicted = {step: _ids(path, ids.shape) for step, path in files.items()}
            shown += predicted.values()
            maps = {record.index: record.depth_maps().get(stem) for record in one.run.records()}
            depths = {step: _ids(path, ids.shape) for step, path in maps.items() if path}
            rows.append(_row(one, ids, predicted, depths))
        picture = np.asarray(_open(image, ("RGB", "RGBA", "L", "P"), Image.Resampling.LANCZOS))
        times[stem] += 1
        name = stem if times[stem] == 1 else f"{stem} (view {times[stem]})"
        found.append(Sample(name, picture, ids, colours, tuple(rows), _legend(runs[0], colours, _filled(shown))))
    return found


def _row(one: Scored, truth: np.ndarray, predictions: dict[int, np.ndarray], depths: dict[int, np.ndarray]) -> Row:
    groups = one.setting.groups
    panels: list[np.ndarray | None] = [None] * len(groups)
    errors: list[np.ndarray | None] = [None] * len(groups)
    deep: list[np.ndarray | None] = [None] * len(groups)
    before = np.zeros(truth.shape, bool)
    for step, predicted in predictions.items():
        reached = len(groups) - 1 if one.oracle else step
        seen = [c for group in groups[: reached + 1] for c in group]
        background = [0] if scoring.has_background_class(one.run) else []
        found = verdicts(truth, predicted, background + seen, before)
        before |= found == RIGHT
        panels[reached], errors[reached], deep[reached] = predicted, found, depths.get(step)
    return Row(one.shown_as, one.oracle, tuple(panels), tuple(errors), tuple(deep))


def verdicts(truth: np.ndarray, predicted: np.ndarray, seen: Sequence[int], before: np.ndarray) -> np.ndarray:
    """(h, w) uint8 indices of `VERDICTS`. truth, predicted: class ids; before: where an earlier one was right; seen: 0
    among them where it is background, a class, and not void."""
    found = np.where(truth == predicted, RIGHT, np.where(before, FORGOTTEN, WRONG)).astype(np.uint8)
    found[~np.isin(truth, seen)] = FUTURE
    found[(truth == 255) | ((truth == 0) & (0 not in seen))] = VOID
    return found


def verdict_legend() -> tuple[Swatch, ...]:
    return tuple(Swatch(name, _hex(colour), None) for name, colour in VERDICTS)


def _filled(pictures: Iterable[np.ndarray]) -> list[int]:
    """The ids that fill at least `SHARE` of any picture."""
    found = set()
    for ids in pictures:
        values, counts = np.unique(ids, return_counts=True)
        found |= {int(c) for c in values[counts >= SHARE * ids.size]}
    return sorted(found)


def _colours(one: Scored) -> np.ndarray:
    """(256, 3) uint8: class id -> colour; 0 black; a scenario.json without a usable palette gives seeded colours."""
    table = np.full((256, 3), NO_CLASS, np.uint8)
    table[0] = 0
    count = max(one.classes)
    try:
        palette = np.asarray(one.run.scenario.get("palette"), float).reshape(-1, 3)[:count]
    except (TypeError, ValueError):
        palette = np.empty((0, 3))
    if len(palette) < count or not np.isfinite(palette).all():
        palette = np.random.default_rng(0).integers(40, 250, (count, 3))
    table[1 : 1 + count] = np.clip(palette, 0, 255).astype(np.uint8)
    return table


def _legend(one: Scored, colours: np.ndarray, ids: Iterable[int]) -> tuple[Swatch, ...]:
    taught = {c: t for t, group in enumerate(one.setting.groups) for c in group}
    names = one.classes | {0: "background" if scoring.has_background_class(one.run) else "void / background"}
    known = sorted((c for c in ids if c in names), key=lambda c: (taught.get(c, -1), c))
    return tuple(Swatch(names[c], _hex(colours[c]), taught.get(c)) for c in known)


def _hex(colour: Iterable[int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _ids(path: Path, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """(h, w) uint8 class ids; RunError where they do not have the `shape` of the truth."""
    ids = np.asarray(_open(path, ("P", "L"), Image.Resampling.NEAREST))
    if shape is not None and ids.shape != shape:
        raise RunError(f"The sample picture {path} and its truth differ in size. Restore it, or remove it.")
    return ids


def _open(path: Path, modes: Sequence[str], resampling: Image.Resampling) -> Image.Image:
    """A PNG, no larger than SIDE on its longest side. Raises RunError when it cannot be read."""
    try:
        with Image.open(path, formats=["PNG"]) as stored:
            stored.load()
            if stored.mode not in modes:
                raise ValueError(f"pixel mode {stored.mode}")
            picture = stored.convert("RGB") if "RGB" in modes else stored
            scale = min(1.0, SIDE / max(picture.size))
            size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
            return picture.resize(size, resampling)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RunError(f"The sample picture {path} cannot be read ({error}). Restore it, or remove it.") from None


def photo_uri(picture: np.ndarray) -> str:
    return _uri(Image.fromarray(picture), "jpeg", quality=88, subsampling=0)


def map_uri(ids: np.ndarray, colours: np.ndarray) -> str:
    """(h, w) uint8 in `colours`, as a palette PNG."""
    picture = Image.fromarray(ids)
    picture.putpalette(colours.tobytes())
    return _uri(picture, "png", optimize=True)


def _uri(picture: Image.Image, kind: str, **options: int | bool) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
