"""COCO-Stuff 10K, version 1.1: 9,000 / 1,000 images, 171 classes (80 things, 91 stuff) of Caesar et al. 2018.

Class ids 1..171 are the official label ids 1..182 without the 11 that COCO never annotated, in order.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cssbench.data.base import SegDataset, class_ids, read_classes
from cssbench.data.listed import ListedDataset
from cssbench.data.matlab import read_matrix
from cssbench.errors import DataError

NESTED = {"train": "train2014", "test": "test2014"}
OFFICIAL_LABELS = 182
TRAIN_IDS = "_labelTrainIds.png"


class COCOStuff10K(ListedDataset):
    """Three encodings, told apart by their files. Stored 0, unlabelled, is void in all.

    official    images/*.jpg, annotations/*.mat (matrix S of label ids 0..182), imageLists/train|test.txt
    as PNG      the same with annotations/*.png: S as it is
    converted   images/train2014|test2014/*.jpg, annotations/train2014|test2014/*_labelTrainIds.png: 0..171, as
                mmsegmentation converts them; 255 is ignored
    """

    name = "coco-stuff-10k"
    splits = ("train", "test")
    classes, palette = read_classes("coco_stuff_10k.csv")
    archive = "its archive, cocostuff-10k-v1.1.zip, has no published checksum"

    def __init__(self, root: str | Path):
        super().__init__(root)
        annotations = self.root / "annotations"
        self.converted = (annotations / NESTED["train"]).is_dir()
        self.suffix = TRAIN_IDS if self.converted else ".png" if any(annotations.glob("*.png")) else ".mat"

    def layout(self) -> str:
        return (
            f"COCO-Stuff 10K is expected as {self.root}/images/*.jpg, annotations/*.mat (or the same maps as *.png), "
            f"and imageLists/train|test.txt, as in cocostuff-10k-v1.1.zip; or as mmsegmentation converts it, images/"
            f"train2014|test2014/*.jpg and annotations/train2014|test2014/*{TRAIN_IDS}."
        )

    def lists(self, split: str) -> list[Path]:
        return [self.root / "imageLists" / f"{split}.txt"]

    def folders(self, split: str) -> tuple[Path, Path]:
        part = NESTED[split] if self.converted else ""
        return self.root / "images" / part, self.root / "annotations" / part

    def image_files(self, split: str) -> dict[str, list[Path]]:
        if self.converted and split in self.splits and split not in self._files:
            folder = self.folders(split)[0]
            self._files[split] = {path.stem: [path] for path in sorted(folder.glob("[!.]*.jpg"))}
        return super().image_files(split)

    def stems(self, split: str) -> list[str]:
        return SegDataset.stems(self, split) if self.converted else super().stems(split)

    def label_path(self, split: str, stem: str) -> Path:
        return self.folders(split)[1] / f"{stem}{self.suffix}"

    def raw_label(self, split: str, stem: str) -> np.ndarray:
        path = self.label_path(split, stem)
        if self.suffix != ".mat" or not path.exists():
            return super().raw_label(split, stem)
        labels = read_matrix(path, "S")
        if labels.min() < 0 or labels.max() > OFFICIAL_LABELS:
            raise DataError(
                f"The label map {path} holds the value {int(labels.max())}; expected are label ids 0 to "
                f"{OFFICIAL_LABELS}. Fetch that file again."
            )
        return labels.astype(np.uint8)

    def raw_table(self) -> np.ndarray:
        if self.converted:
            return super().raw_table()
        table = np.full(256, -1, np.int16)
        table[0] = 0
        table[list(class_ids("coco_stuff_10k.csv"))] = np.arange(1, 1 + self.num_classes)
        return table
