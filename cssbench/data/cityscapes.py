"""Cityscapes, fine annotations: 2,975 / 500 street images of 2048 x 1024 px, 19 classes (Cordts et al. 2016)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cssbench.data.base import SegDataset, class_ids, read_classes
from cssbench.errors import DataError

IMAGE, LABEL = "_leftImg8bit.png", "_gtFine_{}.png"
OFFICIAL_LABELS = 33


class Cityscapes(SegDataset):
    """leftImg8bit/<split>/<city>/*_leftImg8bit.png with gtFine/<split>/<city>/*_gtFine_labelIds.png, or
    *_gtFine_labelTrainIds.png where there are none of the former.

    Class id = train id + 1. Labels without a train id (unlabelled, ego vehicle, ...) are 255, ignored, in both
    encodings, as in the official evaluation. The test split has no public labels.
    """

    name = "cityscapes"
    classes, palette = read_classes("cityscapes.csv")
    archive = "its archives are given to registered users of cityscapes-dataset.com only"

    def __init__(self, root: str | Path):
        super().__init__(root)
        fine = self.root / "gtFine"
        found = [k for k in ("labelIds", "labelTrainIds") if any(fine.glob(f"*/*/*{LABEL.format(k)}"))]
        self.encoding = found[0] if found else "labelIds"

    def layout(self) -> str:
        return (
            f"Cityscapes is expected as {self.root}/leftImg8bit/train|val/<city>/*{IMAGE} and gtFine/train|val/<city>/*"
            f"{LABEL.format('labelIds')} (or {LABEL.format('labelTrainIds')}), as in leftImg8bit_trainvaltest.zip and "
            f"gtFine_trainvaltest.zip, unpacked into one folder."
        )

    def folders(self, split: str) -> tuple[Path, Path]:
        return self.root / "leftImg8bit" / split, self.root / "gtFine" / split

    def image_files(self, split: str) -> dict[str, list[Path]]:
        if split in self.splits and split not in self._files:
            found: dict[str, list[Path]] = {}
            for path in sorted(self.folders(split)[0].glob("*/[!.]*.png")):
                if not path.name.endswith(IMAGE):
                    raise DataError(f"{path} is not named <city>_<sequence>_<frame>{IMAGE}. {self.layout()}")
                found.setdefault(path.name.removesuffix(IMAGE), []).append(path)
            self._files[split] = dict(sorted(found.items()))
        return super().image_files(split)

    def label_path(self, split: str, stem: str) -> Path:
        images = self.image_files(split).get(stem)
        city = images[0].parent.name if images else stem.split("_")[0]
        return self.folders(split)[1] / city / f"{stem}{LABEL.format(self.encoding)}"

    def stray_labels(self, split: str) -> list[Path]:
        there = set(self.folders(split)[1].glob(f"*/[!.]*{LABEL.format(self.encoding)}"))
        return sorted(there - {self.label_path(split, stem) for stem in self.image_files(split)})

    def raw_table(self) -> np.ndarray:
        table = np.full(256, -1, np.int16)
        table[255] = 255
        if self.encoding == "labelTrainIds":
            table[: self.num_classes] = np.arange(1, 1 + self.num_classes)
        else:
            table[: OFFICIAL_LABELS + 1] = 255
            table[list(class_ids("cityscapes.csv"))] = np.arange(1, 1 + self.num_classes)
        return table
