"""Is a data root whole? Every image and label map is opened; every fault is named, not only the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cssbench.data.base import SegDataset
from cssbench.data.parallel import parallel_map
from cssbench.errors import DataError


@dataclass(frozen=True)
class Problem:
    """One faulty file (or an empty folder), and what is wrong with it."""

    path: Path
    what: str


def verify(dataset: SegDataset, splits: Sequence[str] | None = None, progress: bool = True) -> list[Problem]:
    """Every fault of the given splits (default: all that the dataset has), in the order of splits and names.

    Found are: splits without images, images without a label map and label maps without an image, and files that are
    unreadable, truncated, of another size than their partner, not 8-bit single-channel, or out of range.
    Raises DataError only for a split that the dataset does not know.
    """
    problems = []
    for split in splits or dataset.splits:
        if split not in dataset.splits:
            dataset.stems(split)  # raises, naming the splits there are
        problems += _listing(dataset, split)
        stems = sorted(dataset.image_files(split))
        found = parallel_map(partial(_check, dataset, split), stems, f"Checking {split}", progress=progress)
        problems += [problem for pair in found for problem in pair]
    return problems


def _listing(dataset: SegDataset, split: str) -> list[Problem]:
    """What the folders' listings alone tell: nothing there, one image twice, label maps without an image."""
    problems = []
    try:
        dataset.stems(split)
    except DataError as error:
        problems.append(_problem(dataset.folders(split)[0], error))
    return problems + [Problem(path, "label map without an image") for path in dataset.stray_labels(split)]


def _check(dataset: SegDataset, split: str, stem: str) -> list[Problem]:
    image_path, label_path = dataset.image_path(split, stem), dataset.label_path(split, stem)
    problems, sizes = [], []
    if not image_path.exists():
        problems.append(Problem(image_path, "the image is missing"))
    if not label_path.exists():
        problems.append(Problem(image_path, f"image without a label map (expected at {label_path})"))
    for path, read in ((image_path, dataset.image), (label_path, dataset.label)):
        try:
            if path.exists():
                sizes.append(read(split, stem).shape[:2])
        except DataError as error:
            problems.append(_problem(path, error))
    if len(set(sizes)) == 2:
        (h, w), (label_h, label_w) = sizes
        problems.append(Problem(label_path, f"the label map is {label_w}x{label_h} px, its image {w}x{h} px"))
    return problems


def _problem(path: Path, error: DataError) -> Problem:
    """The path is told beside the sentence: leave it out there."""
    return Problem(path, str(error).replace(f" {path}", "").replace(f"{path} holds", "The folder holds"))
