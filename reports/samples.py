"""The sample images for the page: image, truth and the prediction after each step, with a legend of colours."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from cssbench.errors import RunError
from cssbench.reports.scored import Scored, sample_files

SIDE = 320  # longest side embedded, px
SHARE = 0.005  # a class gets into a legend from this share of one picture on
NO_CLASS = (210, 210, 210)  # 255, and ids that the scenario does not have


@dataclass(frozen=True)
class Swatch:
    """One legend entry: class name, CSS colour, and the step that teaches the class (None: background)."""

    name: str
    colour: str
    step: int | None


@dataclass(frozen=True)
class Sample:
    """One image. rows: (run as shown, is it an oracle, data URI or None for each step); an oracle's stands last."""

    stem: str
    image: str
    truth: str
    rows: tuple[tuple[str, bool, tuple[str | None, ...]], ...]
    legend: tuple[Swatch, ...]


def samples(scored: Sequence[Scored]) -> list[Sample]:
    """The sample images of the runs of one setting, every run once. Raises RunError on an unreadable picture."""
    runs = list({one.label: one for one in scored}.values())
    files = {one.label: sample_files(one.run, one.run.records()) for one in runs}
    stems = sorted({stem for there in files.values() for stem in there})
    colours, steps = _colours(runs[0]), len(runs[0].setting.groups)
    found = []
    for stem in stems:
        image, truth, _ = next(there[stem] for there in files.values() if stem in there)
        shown = dict.fromkeys(range(256), 0.0)
        truth_uri = _label_uri(truth, colours, shown)
        rows = []
        for one in runs:
            if stem not in files[one.label]:
                continue
            panels: list[str | None] = [None] * steps
            for step, path in files[one.label][stem][2].items():
                panels[steps - 1 if one.oracle else step] = _label_uri(path, colours, shown)
            rows.append((one.shown_as, one.oracle, tuple(panels)))
        legend = _legend(runs[0], colours, [c for c, share in shown.items() if share >= SHARE])
        found.append(Sample(stem, _image_uri(image), truth_uri, tuple(rows), legend))
    return found


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
    names = one.classes | {0: "void / background"}
    known = sorted((c for c in ids if c in names), key=lambda c: (taught.get(c, -1), c))
    return tuple(Swatch(names[c], "#{:02x}{:02x}{:02x}".format(*colours[c]), taught.get(c)) for c in known)


def _label_uri(path: Path, colours: np.ndarray, shown: dict[int, float]) -> str:
    """A palette PNG of class ids in our colours; raises the shares in `shown` to what this picture holds."""
    ids = np.asarray(_open(path, ("P", "L"), Image.Resampling.NEAREST))
    for c, count in zip(*np.unique(ids, return_counts=True), strict=True):
        shown[int(c)] = max(shown[int(c)], count / ids.size)
    picture = Image.fromarray(ids)
    picture.putpalette(colours.tobytes())
    return _uri(picture, "png", optimize=True)


def _image_uri(path: Path) -> str:
    picture = _open(path, ("RGB", "RGBA", "L", "P"), Image.Resampling.LANCZOS)
    return _uri(picture, "jpeg", quality=88, subsampling=0)


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


def _uri(picture: Image.Image, kind: str, **options: int | bool) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
