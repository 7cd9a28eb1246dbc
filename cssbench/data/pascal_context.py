"""PASCAL-Context (Mottaghi et al. 2014): 4,998 / 5,105 images of VOC 2010, 59 classes, with or without background.

The 59 most frequent of 459 labels, in the order of the official 459 (which is alphabetical), as mmsegmentation's
converter numbers them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cssbench.data.base import class_ids, read_classes
from cssbench.data.listed import ListedDataset, find_root
from cssbench.data.matlab import read_matrix
from cssbench.errors import DataError

INSIDE = ("VOC2010", "VOCdevkit/VOC2010")
OFFICIAL_LABELS = 459
CONVERTED = "SegmentationClassContext"


class PascalContext(ListedDataset):
    """VOC2010 (or VOCdevkit, or its parent) with labels in one of two encodings: `SegmentationClassContext/*.png`,
    0 for any other label and 1..59, as mmsegmentation converts them; or the official `trainval/*.mat` of 459 labels, of
    which those outside the 59 are 0. Here 0 is void; 255 is ignored.
    """

    name = "pascal-context"
    classes, palette = read_classes("pascal_context.csv")
    archive = "its images (VOC 2010) and its labels are two archives on two sites, without published checksums"

    def __init__(self, root: str | Path):
        super().__init__(root)
        given, self.root = self.root, find_root(self.root, "JPEGImages", INSIDE)
        places = (self.root / CONVERTED, self.root / "trainval", given / "trainval")
        self.labels = next((folder for folder in places if folder.is_dir()), places[0])
        self.suffix = ".png" if self.labels.name == CONVERTED else ".mat"

    def layout(self) -> str:
        return (
            f"PASCAL-Context is expected as {self.root}/JPEGImages/*.jpg of VOC 2010, and {CONVERTED}/*.png with "
            f"ImageSets/SegmentationContext/train|val.txt, or the official trainval/*.mat with ImageSets/Main/"
            f"train|val.txt."
        )

    def lists(self, split: str) -> list[Path]:
        sets = self.root / "ImageSets"
        return [sets / folder / f"{split}.txt" for folder in ("SegmentationContext", "Main")]

    def folders(self, split: str) -> tuple[Path, Path]:
        return self.root / "JPEGImages", self.labels

    def label_path(self, split: str, stem: str) -> Path:
        return self.labels / f"{stem}{self.suffix}"

    def raw_label(self, split: str, stem: str) -> np.ndarray:
        path = self.label_path(split, stem)
        if self.suffix == ".png" or not path.exists():
            return super().raw_label(split, stem)
        official = read_matrix(path, "LabelMap")
        if official.min() < 0 or official.max() > OFFICIAL_LABELS:
            raise DataError(
                f"The label map {path} holds the value {int(official.max())}; expected are the official labels 1 to "
                f"{OFFICIAL_LABELS}. Fetch that file again."
            )
        table = np.zeros(OFFICIAL_LABELS + 1, np.uint8)
        table[list(class_ids("pascal_context.csv"))] = np.arange(1, 1 + self.num_classes)
        return table[official.astype(np.int64)]


class PascalContext60(PascalContext):
    """The same with label 0, whatever is none of the 59 classes, as background: a class that is scored."""

    name = "pascal-context-60"
    background_class = True
