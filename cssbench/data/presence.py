"""The presence index: which classes each label map of a split shows. Built once, in parallel, and cached.

Scenario sizes are exact from it without reading an image again, or, imported from class lists, without any image.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from cssbench.data.base import SegDataset
from cssbench.data.parallel import parallel_map
from cssbench.errors import DataError, RunError
from cssbench.results import image_name, write_bytes


@dataclass(frozen=True)
class PresenceIndex:
    """stems: image names; table: (n, K+1) bool, does image i show class id c (column 0: void)."""

    stems: list[str]
    table: np.ndarray

    def subset(self, indices: Sequence[int] | np.ndarray) -> PresenceIndex:
        """The index of some images, in the order given."""
        rows = np.asarray(indices, dtype=np.int64)
        return PresenceIndex([self.stems[i] for i in rows], self.table[rows])

    def showing(self, classes: Sequence[int]) -> list[str]:
        """Names of the images that show any of the class ids."""
        return [self.stems[i] for i in np.flatnonzero(self.table[:, list(classes)].any(axis=1))]


def cache_folder() -> Path:
    """$CSSBENCH_CACHE, or ~/.cache/cssbench."""
    return Path(os.environ.get("CSSBENCH_CACHE") or Path.home() / ".cache" / "cssbench")


def build(
    dataset: SegDataset, split: str, cache_dir: Path | None = None, deep: bool = False, progress: bool = True
) -> PresenceIndex:
    """The index of a split: from the cache where files are unchanged (names, sizes, mtimes; contents with `deep`),
    else from one pass over the label maps. Raises DataError at an unreadable or out-of-range label map.

    A cache that cannot be written is done without; a damaged one is built again.
    """
    stems = dataset.stems(split)
    mark = dataset.fingerprint(split, deep=deep, times=True)
    name = image_name(f"presence-{dataset.name}-{dataset.num_classes}-{split}-{mark}")  # a stranger's names, perhaps
    path = (cache_dir or cache_folder()) / f"{name}.npz"
    table = _read(path, (len(stems), dataset.num_classes + 1))
    if table is None:
        rows = parallel_map(partial(_row, dataset, split), stems, f"Indexing {split} labels", progress=progress)
        table = np.stack(rows)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, table=table)
        with contextlib.suppress(RunError, OSError):  # a read-only home costs time at the next start, nothing else
            write_bytes(path, buffer.getvalue())
    return PresenceIndex(list(stems), table)


def _row(dataset: SegDataset, split: str, stem: str) -> np.ndarray:
    return dataset.shown(split, stem)[: dataset.num_classes + 1]


def _read(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The cached table; None when there is none, or it is damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            table = arrays["table"]
    except Exception:  # a damaged file makes zipfile, zlib and NumPy raise almost anything
        return None
    return table if table.shape == shape and table.dtype == bool else None


def from_class_lists(path: str | Path, num_classes: int) -> PresenceIndex:
    """Import class lists: one image per line, `name id id ...`, ids 0-based (class id - 1), as published with SSUL.

    Void cannot be told from such a list: column 0 stays False. Raises DataError naming the line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The class list {str(path)!r} cannot be read ({error}).") from None
    stems: list[str] = []
    known: set[str] = set()
    table = np.zeros((len(lines), num_classes + 1), bool)
    for number, line in enumerate(lines, 1):
        name, *ids = line.split() or [""]
        if not name:
            continue
        if not all(i.isdecimal() for i in ids):
            raise DataError(f"{path}, line {number}: expected `name id id ...` with whole numbers, not {line[:80]!r}.")
        classes = [int(i) + 1 for i in ids]
        if any(c > num_classes for c in classes):
            raise DataError(
                f"{path}, line {number}: id {max(classes) - 1} is out of range; ids are 0 to {num_classes - 1}."
            )
        if name in known:
            raise DataError(f"{path}, line {number}: the image {name!r} is listed twice.")
        table[len(stems), classes] = True
        known.add(name)
        stems.append(name)
    if not stems:
        raise DataError(f"The class list {str(path)!r} is empty; expected one line `name id id ...` per image.")
    return PresenceIndex(stems, table[: len(stems)])
