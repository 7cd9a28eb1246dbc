"""What a dataset is: named splits of images with label maps, read with every check.

Label maps come out in class ids: 1..K, 0 = void, 255 = ignored (see `cssbench.scenario`).
"""

from __future__ import annotations

import csv
import hashlib
import struct
from abc import ABC, abstractmethod
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from cssbench.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
# what Pillow raises at a damaged file
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class SegDataset(ABC):
    """A data root with splits. A plug-in derives from it, registers under `cssbench.datasets` and is built as
    `cls(root, **options)`. One that is stored otherwise than in flat folders overrides `image_files`, `label_path`,
    `raw_label` or `raw_table`, which all else is made from.

    Attributes: `name`; `classes`, the K class names (class id c is `classes[c - 1]`); `palette`, (K, 3) uint8 RGB.
    """

    name: str
    classes: tuple[str, ...]
    palette: np.ndarray
    splits: tuple[str, ...] = ("train", "val")

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

    def image(self, split: str, stem: str) -> np.ndarray:
        """(H, W, 3) uint8 RGB. Raises DataError on a missing, truncated or unreadable file."""
        path = self.image_path(split, stem)
        try:
            with Image.open(path) as picture:
                return np.array(picture.convert("RGB"))
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
        ids = self.raw_table().take(raw, mode="clip")  # clip: 8-bit values cannot be out of its range; twice as fast
        if (ids < 0).any():
            wrong = sorted(set(np.unique(raw[ids < 0]).tolist()))
            allowed = np.flatnonzero(self.raw_table() >= 0)
            raise DataError(
                f"The label map {path} holds the value(s) {wrong[:8]}, which dataset {self.name!r} does not have "
                f"(allowed: {_ranges(allowed)}). Is this the right dataset, and the right encoding?"
            )
        return ids.astype(np.uint8)

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


def _ranges(values: np.ndarray) -> str:
    """[0, 1, 2, 5] -> '0-2, 5'."""
    runs = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def read_classes(resource: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and (K, 3) uint8 colours from a package-data CSV with the columns name, r, g, b."""
    text = (resources.files("cssbench.data") / resource).read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    return tuple(r["name"] for r in rows), np.array([[int(r[c]) for c in "rgb"] for r in rows], np.uint8)


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
