"""Datasets whose splits are lists of names: one folder of images, and one of label maps, for all splits."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cssbench.data.base import SegDataset
from cssbench.errors import DataError


class ListedDataset(SegDataset):
    """A subclass says in `lists` where a split's list may lie; images are `<name>.jpg`."""

    _whole: frozenset[str] = frozenset()  # splits whose images were looked for

    @abstractmethod
    def lists(self, split: str) -> Sequence[Path]:
        """Where the list of a split may lie; the first that exists is read."""

    def list_file(self, split: str) -> Path | None:
        """The list of a split; None where there is none."""
        return next((path for path in self.lists(split) if path.is_file()), None)

    def image_files(self, split: str) -> dict[str, list[Path]]:
        if split in self.splits and split not in self._files:
            path, folder = self.list_file(split), self.folders(split)[0]
            names = read_names(path) if path else []
            self._files[split] = {name: [folder / f"{name}.jpg"] for name in names}
        return super().image_files(split)

    def stems(self, split: str) -> list[str]:
        """The names of a split, sorted. Raises DataError where its list, or an image that it names, is missing."""
        files = self.image_files(split)
        if not files:
            wanted = " or ".join(str(path) for path in self.lists(split))
            raise DataError(f"There is no list of the {split} images with a name in it at {wanted}. {self.layout()}")
        if split not in self._whole:
            folder = self.folders(split)[0]
            there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
            missing = [name for name in files if f"{name}.jpg" not in there]
            if missing:
                raise DataError(
                    f"{self.list_file(split)} names {len(missing)} images that are not in {folder}, the first being "
                    f"{missing[0]}.jpg. {self.layout()}"
                )
            self._whole |= {split}
        return list(files)

    def stray_labels(self, split: str) -> list[Path]:
        """None are known: the folder holds the label maps of other splits, and of images of no split."""
        return []


def read_names(path: Path) -> list[str]:
    """Names of a list, sorted: one per line, alone or as the path of the image before that of its label map.

    Raises DataError when the file is no text or names an image twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The list {path} cannot be read ({error}). Fetch it again.") from None
    names = [Path(line.split()[0]).name.removesuffix(".jpg") for line in lines if line.strip()]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"The list {path} names {twice[0]!r} twice ({len(twice)} such names). Keep one of each.")
    return sorted(names)


def find_root(root: Path, sign: str, inside: Sequence[str]) -> Path:
    """`root`, or the first of the folders `inside` it, that holds the folder `sign`; `root` where none does."""
    return next((root / part for part in ("", *inside) if (root / part / sign).is_dir()), root)
