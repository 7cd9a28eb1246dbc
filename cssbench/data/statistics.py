"""How large the images of a split are, and how many of its pixels each class fills."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from cssbench.data.base import SegDataset
from cssbench.data.parallel import parallel_map


@dataclass(frozen=True)
class Statistics:
    """shapes: (n, 2) int64, height and width of each label map; pixels: (256,) int64, how many bear each class id."""

    shapes: np.ndarray
    pixels: np.ndarray

    def sizes(self) -> dict[str, tuple[int, int, int]]:
        """ "width" and "height" -> (smallest, median, largest), px."""
        columns = {"width": self.shapes[:, 1], "height": self.shapes[:, 0]}
        return {name: (int(c.min()), int(np.median(c)), int(c.max())) for name, c in columns.items()}

    def share(self, class_id: int) -> float:
        """Of all pixels, ignored ones too, in [0, 1]."""
        return float(self.pixels[class_id] / self.pixels.sum())


def measure(dataset: SegDataset, split: str, progress: bool = True) -> Statistics:
    """Read every label map of a split. Raises DataError at one that cannot be read."""
    found = parallel_map(partial(_one, dataset, split), dataset.stems(split), f"Measuring {split}", progress=progress)
    return Statistics(np.array([shape for shape, _ in found]), np.sum([counts for _, counts in found], axis=0))


def _one(dataset: SegDataset, split: str, stem: str) -> tuple[tuple[int, ...], np.ndarray]:
    label = dataset.label(split, stem)
    return label.shape, np.bincount(label.ravel(), minlength=256)
