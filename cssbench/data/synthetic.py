"""A synthetic world to learn in two minutes on a laptop: textured shapes between a sky and a floor.

A class is a role (sky, floor or thing), a colour, a pattern and, for things, a shape. Things stand on the floor, nearer
ones lower, larger and in front, and keep company with their home floor, so that a class is told by its pixels and by
its surroundings. Frequencies fall like rank^-0.6 within each role. Looks and class order depend on the number of
classes alone; the seed changes the scenes. Our own design; no outside data.
"""

from __future__ import annotations

import colorsys
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from cssbench.data.base import SegDataset, distinct_colours
from cssbench.data.parallel import parallel_map
from cssbench.errors import DataError

VERSION = 1  # raise it whenever the scenes change: it is part of the cache folder's name
MAX_CLASSES = 150
MIN_SIDE = 16

Role = Literal["sky", "floor", "thing"]
COLOURS = ("red", "orange", "yellow", "lime", "green", "mint", "cyan", "azure", "blue", "violet", "magenta", "rose")
PATTERNS = ("striped", "plain", "checked", "barred", "dotted", "slanted")
SHAPES = ("disc", "box", "diamond", "tower", "triangle", "slab")
# (saturation, value) of the two colours that a pattern mixes, and the shift in hue of the second
TONES = {
    "sky": ((0.35, 1.0), (0.12, 0.95), 0.0),
    "floor": ((0.7, 0.5), (0.5, 0.3), 0.0),
    "thing": ((0.9, 0.85), (0.45, 0.95), 0.03),
}


@dataclass(frozen=True)
class Look:
    """What a class looks like. `weight`: relative frequency within its role; `home`: rank of a thing's home floor."""

    name: str
    role: Role
    weight: float
    hue: float
    pattern: str
    shape: str
    home: int

    def colours(self, hue_shift: float = 0.0, value: float = 1.0) -> np.ndarray:
        """(2, 3) float32 RGB in 0..1: the two colours of the pattern."""
        first, second, turn = TONES[self.role]
        hue = self.hue + hue_shift
        pair = [colorsys.hsv_to_rgb(h % 1, s, min(1, v * value)) for h, (s, v) in ((hue, first), (hue + turn, second))]
        return np.array(pair, np.float32)

    def mean_colour(self) -> np.ndarray:
        """(3,) RGB in 0..255, over many instances."""
        share = {"plain": 1.0, "dotted": 0.3}.get(self.pattern, 0.5)
        return 255 * np.array([share, 1 - share]) @ self.colours()


@cache
def world(classes: int) -> tuple[Look, ...]:
    """The looks of class ids 1..classes.

    Ids are dealt so that any run of consecutive ids, hence every step of a scenario, holds skies, floors and things,
    frequent and rare ones, in about their overall proportion.
    """
    floors = max(1, round(0.15 * classes))
    skies = round(0.15 * classes)
    sizes: dict[Role, int] = {"sky": skies, "floor": floors, "thing": classes - skies - floors}
    dealt = []
    for offset, (role, size) in zip((0.25, 0.75, 0.5), sizes.items(), strict=True):
        # the golden ratio visits ranks 0..size-1 so that every stretch of the visit covers frequent and rare evenly
        visit = np.argsort((np.arange(size) * 0.6180339887 + 0.3) % 1)
        dealt += [((place + offset) / size, _look(role, int(rank), floors)) for place, rank in enumerate(visit)]
    return tuple(look for _, look in sorted(dealt, key=lambda pair: pair[0]))


def _look(role: Role, rank: int, floors: int) -> Look:
    """The look of the class at frequency rank `rank` (0: the most frequent) of its role; no two are alike."""
    start = {"sky": 7, "floor": 1, "thing": 0}[role]
    hue = (start + 5 * rank) % 12  # neighbours in rank are far in hue
    pattern = PATTERNS[(rank // 2 + rank // 12) % 6]  # the next round of hues takes the next patterns
    shape = SHAPES[(rank + rank // 12 + rank // 72) % 6] if role == "thing" else role
    tone = {"sky": "pale ", "floor": "dark ", "thing": ""}[role]
    weight = max((rank + 1) ** -0.6, 0.05)
    return Look(f"{pattern} {tone}{COLOURS[hue]} {shape}", role, weight, hue / 12, pattern, shape, rank % floors)


class Synthetic(SegDataset):
    """`train` + `val` scenes of `size` (side, or [height, width], px), written once below `root`, then read as files.

    Every scene depends only on (seed, split, index) and the options, not on the number of threads. The cache folder
    appears by one rename, complete; a killed generation leaves at most a hidden `.tmp` folder to delete.
    """

    name = "synthetic"
    archive = "its scenes are generated in the data root when they are first needed"

    def __init__(
        self,
        root: str | Path,
        classes: int = 20,
        size: int | list[int] | tuple[int, int] = 64,
        train: int = 2000,
        val: int = 300,
        seed: int = 0,
    ):
        height, width = _check_options(classes, size, train, val, seed)
        self.looks = world(classes)
        self.classes = tuple(look.name for look in self.looks)
        self.palette = distinct_colours(np.array([look.mean_colour() for look in self.looks]))
        self.counts = {"train": train, "val": val}
        try:
            Path(root).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"The data root {str(root)!r} cannot be created: {error.strerror}.") from None
        super().__init__(root)
        self.folder = self.root / f"synthetic-v{VERSION}-c{classes}-{height}x{width}-t{train}-v{val}-s{seed}"
        if not self.folder.exists():
            self._generate(height, width, seed)
        for split, count in self.counts.items():
            if len(self.stems(split)) != count:
                raise DataError(
                    f"{self.folders(split)[0]} holds {len(self.stems(split))} images where {count} were generated. "
                    f"Delete {self.folder}; it will be generated again."
                )

    def layout(self) -> str:
        return f"The scenes lie in {self.folder}; delete that folder and they will be generated again."

    def folders(self, split: str) -> tuple[Path, Path]:
        return self.folder / "images" / split, self.folder / "labels" / split

    def _generate(self, height: int, width: int, seed: int) -> None:
        """Write all scenes into a temporary folder, then rename it. Raises DataError, e.g. when the disk is full."""
        jobs = [(split, index) for split, count in self.counts.items() for index in range(count)]
        try:
            temporary = Path(tempfile.mkdtemp(prefix=f".{self.folder.name}.", suffix=".tmp", dir=self.root))
            try:
                for part in ("images", "labels"):
                    for split in self.counts:
                        (temporary / part / split).mkdir(parents=True)
                write = partial(_write_scene, temporary, len(self.classes), (height, width), seed)
                parallel_map(write, jobs, "Generating scenes")
                temporary.chmod(0o755)
                os.rename(temporary, self.folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        except OSError as error:
            if not self.folder.is_dir():  # else another process was quicker, with the same scenes
                raise DataError(
                    f"The scenes could not be written below {self.root}: {error.strerror or error}."
                ) from error


def _check_options(classes: int, size: object, train: int, val: int, seed: int) -> tuple[int, int]:
    """(height, width) in px; raises DataError for options out of range."""
    sides = [size, size] if isinstance(size, int) else size
    if not (
        isinstance(sides, list | tuple) and len(sides) == 2 and all(isinstance(s, int) and s >= MIN_SIDE for s in sides)
    ):
        raise DataError(
            f"The size of synthetic scenes must be a side or [height, width] of at least 16 px, not {size!r}."
        )
    if not 1 <= classes <= MAX_CLASSES:
        raise DataError(
            f"The synthetic dataset has 1 to {MAX_CLASSES} classes, not {classes}. Choose `classes` in that range."
        )
    if train < 1 or val < 1 or seed < 0:
        raise DataError(f"Synthetic scenes need train >= 1, val >= 1 and seed >= 0, not {train}, {val} and {seed}.")
    return sides[0], sides[1]


def _write_scene(folder: Path, classes: int, size: tuple[int, int], seed: int, job: tuple[str, int]) -> None:
    split, index = job
    image, label = scene(classes, size, np.random.default_rng([seed, split == "val", index]))
    name = f"{split}/{split}_{index:05d}.png"
    Image.fromarray(image).save(folder / "images" / name, compress_level=1)
    Image.fromarray(label).save(folder / "labels" / name, compress_level=1)


def scene(classes: int, size: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One scene: (H, W, 3) uint8 RGB and (H, W) uint8 class ids, 0 = void. Lengths scale with the shorter side."""
    canvas = _Canvas(world(classes), size, rng)
    canvas.ground()
    canvas.things()
    canvas.clutter()
    return canvas.finish()


class _Canvas:
    """A scene while it is painted. `unit` is the shorter side in px; x, y are pixel indices, y downwards."""

    def __init__(self, looks: tuple[Look, ...], size: tuple[int, int], rng: np.random.Generator):
        self.looks, self.rng = looks, rng
        self.height, self.width = size
        self.unit = min(size)
        self.image = np.zeros((*size, 3), np.float32)
        self.label = np.zeros(size, np.uint8)
        self.y, self.x = (a.astype(np.float32) for a in np.ogrid[: size[0], : size[1]])

    def draw(self, role: Role, count: int, floor: int = -1) -> list[int]:
        """`count` distinct class ids of a role by frequency; those at home on class `floor` four times as often."""
        ids = [c for c, look in enumerate(self.looks, 1) if look.role == role]
        weights = np.array([self.looks[c - 1].weight for c in ids])
        if role == "thing" and floor > 0:
            floors = sorted((look for look in self.looks if look.role == "floor"), key=lambda look: -look.weight)
            home = floors.index(self.looks[floor - 1])
            weights *= [4.0 if self.looks[c - 1].home == home else 1.0 for c in ids]
        count = min(count, len(ids))
        return [] if not count else self.rng.choice(ids, count, replace=False, p=weights / weights.sum()).tolist()

    def paint(self, class_id: int, mask: np.ndarray, top: int = 0, left: int = 0) -> None:
        """Fill `mask`, (h, w) bool whose corner is at (top, left), with a fresh instance of a class."""
        rng, look = self.rng, self.looks[class_id - 1]
        first, second = look.colours(rng.normal() * 0.01, rng.uniform(0.85, 1.1))
        box = slice(top, top + mask.shape[0]), slice(left, left + mask.shape[1])
        share = self.pattern(look.pattern, self.y[box[0]], self.x[:, box[1]])
        texture = second + share[..., None] * (first - second)
        np.copyto(self.image[box], texture, where=mask[..., None])
        self.label[box][mask] = class_id

    def pattern(self, name: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """(h, w) or broadcastable: share of the first colour, 0..1."""
        turn = 2 * np.pi / max(3.0, 0.12 * self.unit)  # radians per px
        a, b = self.rng.uniform(0, 2 * np.pi, 2).astype(np.float32)
        waves = {
            "plain": lambda: np.full((len(y), x.shape[1]), 0.6, np.float32),
            "striped": lambda: np.sin(y * turn + a) + 0 * x,
            "barred": lambda: np.sin(x * turn + a) + 0 * y,
            "slanted": lambda: np.sin((x + y) * (0.7 * turn) + a),
            "checked": lambda: 1.5 * np.sin(x * (0.6 * turn) + a) * np.sin(y * (0.6 * turn) + b),
            "dotted": lambda: np.sin(x * turn + a) + np.sin(y * turn + b) - 0.6,
        }
        return np.clip(0.5 + 0.8 * waves[name](), 0, 1)

    def ground(self) -> None:
        """A sky above a wavy horizon (where the world has skies), one floor or two side by side below."""
        rng = self.rng
        wave = np.sin(self.x * (rng.uniform(2, 5) / self.width) + rng.uniform(0, 6))
        skies = self.draw("sky", 1)
        line = self.height * (rng.uniform(0.3, 0.55) + 0.05 * wave)
        self.horizon = float(line.mean()) if skies else 0.0
        above = np.broadcast_to(self.y < line, self.label.shape) if skies else np.zeros(self.label.shape, bool)
        self.floors = self.draw("floor", 1 + (rng.uniform() < 0.4))
        self.paint(self.floors[0], ~above)
        if len(self.floors) > 1:
            edge = self.width * rng.uniform(0.3, 0.7) + (self.y - self.height) * rng.uniform(-0.7, 0.7)
            self.paint(self.floors[1], ~above & (self.x > edge))
        if skies:
            self.paint(skies[0], above)

    def things(self) -> None:
        """Two to four things, far ones first: high in the picture, small, and behind the others."""
        classes = self.draw("thing", int(self.rng.integers(2, 5)), self.floors[0])
        self.rng.shuffle(classes)
        for class_id, depth in zip(classes, np.sort(self.rng.uniform(0, 1, len(classes))), strict=True):
            y = self.horizon + (0.05 + 0.85 * depth) * (self.height - self.horizon)
            x = self.rng.uniform(0.02, 0.98) * self.width
            radius = self.unit * (0.18 + 0.12 * depth) * self.rng.uniform(0.9, 1.2)
            self.paint(class_id, *self.shape(self.looks[class_id - 1].shape, y, x, radius))

    def shape(self, name: str, y: float, x: float, r: float) -> tuple[np.ndarray, int, int]:
        """Mask of a shape of about radius `r` px around (y, x), cut at the border, and its top-left corner."""
        reach = 1.5 * r
        top, left = max(0, int(y - reach)), max(0, int(x - reach))
        dy = self.y[top : int(y + reach) + 1] - y
        dx = self.x[:, left : int(x + reach) + 1] - x
        masks = {
            "disc": lambda: dx**2 + dy**2 < r**2,
            "box": lambda: np.maximum(abs(dx), abs(dy)) < 0.9 * r,
            "diamond": lambda: abs(dx) + abs(dy) < 1.25 * r,
            "tower": lambda: (abs(dx) < 0.75 * r) & (abs(dy) < 1.2 * r),
            "triangle": lambda: (dy < 0.9 * r) & (abs(dx) < 0.6 * (dy + 1.4 * r)),
            "slab": lambda: (dx / 1.3) ** 2 + (dy / 0.85) ** 2 < r**2,
        }
        return masks[name](), top, left

    def clutter(self) -> None:
        """In every other scene an unlabelled grey lump: the few percent of void."""
        if self.rng.uniform() < 0.5:
            y, x = self.rng.uniform(0, 1, 2) * self.label.shape
            mask, top, left = self.shape("slab", y, x, self.unit * self.rng.uniform(0.1, 0.2))
            box = slice(top, top + mask.shape[0]), slice(left, left + mask.shape[1])
            self.image[box][mask] = self.rng.uniform(0.25, 0.75)
            self.label[box][mask] = 0

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Light falling off to one side, noise, and 8 bits."""
        light = self.rng.uniform(0.85, 1.1) * (1 + self.rng.uniform(-0.12, 0.12) * (2 * self.x / self.width - 1))
        noise = self.rng.standard_normal(self.image.shape, np.float32)
        image = self.image * light[..., None].astype(np.float32) + 0.04 * noise
        return (np.clip(image, 0, 1) * 255).round().astype(np.uint8), self.label
