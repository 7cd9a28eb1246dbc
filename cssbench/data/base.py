"""What a dataset is: named splits of images with label maps, read with every check.

Label maps come out in class ids: 1..K, 0 = void (of some datasets background, a class), 255 = ignored (see
`cssbench.scenario`).
"""

from __future__ import annotations

import csv
import hashlib
import struct
from abc import ABC, abstractmethod
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cssbench.data.archive import Archive
from cssbench.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
# what Pillow raises at a damaged file
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class SegDataset(ABC):
    """A data root with splits. A plug-in derives from it, registers under `cssbench.datasets` and is built as
    `cls(root, **options)`. One that is stored otherwise than in flat folders overrides `image_files`, `label_path`,
    `raw_label` or `raw_table`, which all else is made from.

    Attributes: `name`; `classes`, the K class names (class id c is `classes[c - 1]`); `palette`, (K, 3) uint8 RGB;
    `background_class`: label 0 is background, a class that is scored (as on PASCAL VOC), and not void;
    `archive`, what it is published as, for `cssbench data fetch`, or one clause that says why it cannot be fetched.
    """

    name: str
    classes: tuple[str, ...]
    palette: np.ndarray
    splits: tuple[str, ...] = ("train", "val")
    background_class: bool = False
    archive: Archive | str | None = None

    def __init__(self, root: str | Path):
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(f"The data root {str(root)!r} is not a folder. {self.layout()}")
        self._files: dict[str, dict[str, list[Path]]] = {}

    @abstractmethod
    def layout(self) -> str:
        """One sentence: which files are expected where below the root. Ends every error about a missing one."""

    @abstractmethod
    def folders(self, split: str) -> tuple[Path, Path]:
        """(image folder, label folder) of a split."""

    def raw_table(self) -> np.ndarray:
        """(256,) int16: label value as stored -> class id, or -1 where that value must not occur."""
        table = np.full(256, -1, np.int16)
        table[: len(self.classes) + 1] = np.arange(len(self.classes) + 1)
        table[255] = 255
        return table

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def stems(self, split: str) -> list[str]:
        """File names without suffix of a split's images, sorted. Raises DataError when there is none, or one twice."""
        files = self.image_files(split)
        if not files:
            raise DataError(f"No image (.jpg, .jpeg, .png) in {self.folders(split)[0]}. {self.layout()}")
        twice = [paths for paths in files.values() if len(paths) > 1]
        if twice:
            raise DataError(
                f"{self.folders(split)[0]} holds images that share a name but for the suffix, for instance "
                f"{' and '.join(p.name for p in twice[0])} ({len(twice)} such names). Keep one of each."
            )
        return list(files)

    def has_images(self, split: str) -> bool:
        return bool(self.image_files(split))

    def image_files(self, split: str) -> dict[str, list[Path]]:
        """Stem -> files, sorted by stem; read from the disk once. Raises DataError for an unknown split."""
        if split not in self.splits:
            raise DataError(f"Dataset {self.name!r} has no split {split!r}. It has: {', '.join(self.splits)}.")
        if split not in self._files:
            folder = self.folders(split)[0]
            found: dict[str, list[Path]] = {}
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                # a leading dot: what macOS and rsync leave beside the files
                if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."):
                    found.setdefault(path.stem, []).append(path)
            self._files[split] = dict(sorted(found.items()))
        return self._files[split]

    def image_path(self, split: str, stem: str) -> Path:
        paths = self.image_files(split).get(stem)
        if not paths:
            raise DataError(f"No image {stem!r} in {self.folders(split)[0]}. {self.layout()}")
        return paths[0]

    def label_path(self, split: str, stem: str) -> Path:
        return self.folders(split)[1] / f"{stem}.png"

    def stray_labels(self, split: str) -> list[Path]:
        """Label maps in a split's folder that are of no image, sorted."""
        folder = self.folders(split)[1]
        there = {p for p in folder.iterdir() if p.suffix == ".png" and p.name[0] != "."} if folder.is_dir() else set()
        return sorted(there - {self.label_path(split, stem) for stem in self.image_files(split)})

    def image(self, split: str, stem: str) -> np.ndarray:
        """(H, W, 3) uint8 RGB. Raises DataError on a missing, truncated or unreadable file."""
        path = self.image_path(split, stem)
        try:
            with Image.open(path) as picture:
                return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))
        except UNREADABLE as error:
            raise DataError(f"The image {path} cannot be read ({error}). Fetch that file again.") from None

    def label(self, split: str, stem: str) -> np.ndarray:
        """(H, W) uint8 class ids. Raises DataError on a missing, unreadable, 16-bit, RGB or out-of-range label map."""
        return self.to_ids(self.raw_label(split, stem), self.label_path(split, stem))

    def pair(self, split: str, stem: str) -> tuple[np.ndarray, np.ndarray]:
        """Image (H, W, 3) and label (H, W). Raises DataError when they differ in size, and as `image`, `label` do."""
        image, label = self.image(split, stem), self.label(split, stem)
        if image.shape[:2] != label.shape:
            raise DataError(
                f"The image {self.image_path(split, stem)} is {image.shape[1]}x{image.shape[0]} px, its label map "
                f"{label.shape[1]}x{label.shape[0]}. Fetch both again; `cssbench data verify` finds all such files."
            )
        return image, label

    def raw_label(self, split: str, stem: str) -> np.ndarray:
        """(H, W) uint8 as stored."""
        path = self.label_path(split, stem)
        if not path.exists():
            raise DataError(f"The image {stem!r} has no label map at {path}. {self.layout()}")
        try:
            with Image.open(path) as picture:
                mode, raw = picture.mode, np.asarray(picture)
        except UNREADABLE as error:
            raise DataError(f"The label map {path} cannot be read ({error}). Fetch that file again.") from None
        if mode not in ("L", "P"):
            raise DataError(
                f"The label map {path} has pixel mode {mode!r}; expected 8-bit single-channel (L or P), one class "
                f"index per pixel. Convert it, for instance from colours back to indices."
            )
        return raw

    def to_ids(self, raw: np.ndarray, path: Path) -> np.ndarray:
        """`raw_table` applied to a uint8 array: class ids, a new array. Raises DataError naming `path` where a value
        must not occur."""
        table = self.raw_table()
        allowed = table >= 0
        if not allowed.all():
            # some value is left to mark what is forbidden, since not all 256 can be class ids of an allowed one
            unused = np.ones(256, bool)
            unused[table[allowed]] = False
            mark = unused.argmax()
            ids = look_up(np.where(allowed, table, mark).astype(np.uint8), raw)
            if (ids == mark).any():
                wrong = np.intersect1d(raw, np.flatnonzero(~allowed)).tolist()
                raise DataError(
                    f"The label map {path} holds the value(s) {wrong[:8]}, which dataset {self.name!r} does not have "
                    f"(allowed: {_ranges(np.flatnonzero(allowed))}). Is this the right dataset, and the right "
                    f"encoding?"
                )
            return ids
        return look_up(table.astype(np.uint8), raw)

    def shown(self, split: str, stem: str) -> np.ndarray:
        """(256,) bool: which class ids a label map shows, 0 and 255 included. Raises as `label` does."""
        if type(self).label is not SegDataset.label:  # a plug-in that makes label maps its own way
            return _occurring(self.label(split, stem)) > 0
        raw = np.flatnonzero(_occurring(self.raw_label(split, stem)))
        ids = self.raw_table()[raw]
        if (ids < 0).any():
            self.to_ids(raw.astype(np.uint8), self.label_path(split, stem))  # raises
        shown = np.zeros(256, bool)
        shown[ids] = True
        return shown

    def version(self, split: str, stem: str) -> tuple[Any, ...]:
        """Plain values that change when the image does: dataset, name, size and time of change of its file."""
        stat = self.image_path(split, stem).stat()
        return self.name, stem, stat.st_size, stat.st_mtime_ns

    def fingerprint(self, split: str, deep: bool = False, times: bool = False) -> str:
        """SHA-256 (hex) over the label table and the names and sizes of the split's files; with `times` also mtimes,
        with `deep` contents.
        """
        digest = hashlib.sha256(self.raw_table().tobytes())
        for stem in self.stems(split):
            for path in (self.image_path(split, stem), self.label_path(split, stem)):
                if not path.exists():
                    digest.update(f"{path.name} missing\n".encode())
                    continue
                stat = path.stat()
                digest.update(f"{path.name} {stat.st_size}{f' {stat.st_mtime_ns}' if times else ''}\n".encode())
                if deep:
                    digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()


def look_up(table: np.ndarray, values: np.ndarray) -> np.ndarray:
    """table[values] for a (256,) uint8 table and values of any shape: a new array; five times as fast for uint8."""
    if values.dtype != np.uint8:
        return table[values]
    found = bytearray(values.tobytes()).translate(table.tobytes())
    return np.frombuffer(found, np.uint8).reshape(values.shape)


def _occurring(labels: np.ndarray) -> np.ndarray:
    """(256,) int64, above 0 where a uint8 array holds the value. Only where eight pixels differ from the eight before,
    and of those where one differs from the one before, is there anything to look at: labels come in areas."""
    flat = labels.ravel()
    whole = flat.size // 8 * 8
    eights = flat[:whole].view(np.uint64)
    changed = eights[np.flatnonzero(eights[1:] != eights[:-1]) + 1].view(np.uint8)
    seen = changed[np.flatnonzero(changed[1:] != changed[:-1]) + 1]
    return np.bincount(np.concatenate([flat[:8], changed[:1], seen, flat[whole:]]), minlength=256)


def _ranges(values: np.ndarray) -> str:
    """[0, 1, 2, 5] -> '0-2, 5'."""
    runs = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def read_classes(resource: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and (K, 3) uint8 colours from a package-data CSV with the columns name, r, g, b."""
    rows = _rows(resource)
    return tuple(r["name"] for r in rows), np.array([[int(r[c]) for c in "rgb"] for r in rows], np.uint8)


def class_ids(resource: str) -> tuple[int, ...]:
    """The official label of each class, from the column id of such a CSV."""
    return tuple(int(row["id"]) for row in _rows(resource))


def _rows(resource: str) -> list[dict[str, str]]:
    text = (resources.files("cssbench.data") / resource).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def distinct_colours(wanted: np.ndarray, gap: int = 12) -> np.ndarray:
    """(K, 3) uint8 colours near the (K, 3) wanted ones (0..255), any two `gap` or more apart in some channel.

    Black is kept for void. A colour that is taken is nudged at random (fixed seed), ever further.
    """
    rng = np.random.default_rng(0)
    taken = np.zeros((1, 3))
    for colour in np.asarray(wanted, float):
        spread, found = 0.0, colour.round()
        while abs(taken - found).max(axis=1).min() < gap:
            spread += 1
            found = np.clip(colour + spread * rng.normal(size=3), 0, 255).round()
        taken = np.vstack([taken, found])
    return taken[1:].astype(np.uint8)
