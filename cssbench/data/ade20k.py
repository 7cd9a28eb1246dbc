"""ADE20K scene parsing: 20,210 / 2,000 images, 150 classes (Zhou et al. 2017, 2019), as ADEChallengeData2016."""

from __future__ import annotations

from pathlib import Path

from cssbench.data.base import SegDataset, read_classes

OFFICIAL = "ADEChallengeData2016"


class ADE20K(SegDataset):
    """The official folder, or its parent. Stored labels 1..150 are class ids, 0 is void; 255 is kept as ignored.

    Class names are the first synonyms and colours those of the official palette (which gives classes 7 and 49 one).
    """

    name = "ade20k"
    classes, palette = read_classes("ade20k.csv")

    def __init__(self, root: str | Path):
        super().__init__(root)
        if (self.root / OFFICIAL).is_dir():
            self.root = self.root / OFFICIAL

    def layout(self) -> str:
        return (
            f"ADE20K is expected as {self.root}/images/training|validation/*.jpg with annotations/training|validation/"
            f"*.png beside it, as in {OFFICIAL}.zip; give that folder, or its parent, as the data root."
        )

    def folders(self, split: str) -> tuple[Path, Path]:
        folder = {"train": "training", "val": "validation"}[split]
        return self.root / "images" / folder, self.root / "annotations" / folder
