"""ADE20K scene parsing: 20,210 / 2,000 images, 150 classes (Zhou et al. 2017, 2019), as ADEChallengeData2016."""

from __future__ import annotations

from pathlib import Path

from cssbench.data.archive import Archive
from cssbench.data.base import SegDataset, read_classes

OFFICIAL = "ADEChallengeData2016"
TERMS = """\
ADE20K, in the form of the MIT Scene Parsing Benchmark (https://sceneparsing.csail.mit.edu), is given out by MIT CSAIL
for non-commercial research and education. Whoever uses it answers for that use, images included, whose authors keep
their rights, and cites Zhou et al., Scene Parsing through ADE20K Dataset, CVPR 2017, and Semantic Understanding of
Scenes through the ADE20K Dataset, IJCV 2019. That is a summary. What counts are the terms themselves:
https://ade20k.csail.mit.edu/terms/"""
# No SHA-256 of this archive is published. SHA-1: the preparation scripts of several projects, such as Segmenter
# (rstrudel/segmenter, segm/scripts/prepare_ade20k.py); MD5: several data loaders in the manner of torchvision; size:
# what the server told them.
ARCHIVE = Archive(
    url="https://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
    folder=OFFICIAL,
    terms=TERMS,
    size=967_382_037,
    digests={"sha1": "219e1696abb36c8ba3a3afe7fb2f4b4606a897c7", "md5": "7328b3957e407ddae1d3cbf487f149ef"},
    limit=2**32,
    images={"train": 20210, "val": 2000},
)


class ADE20K(SegDataset):
    """The official folder, or its parent. Stored labels 1..150 are class ids, 0 is void; 255 is kept as ignored.

    Class names are the first synonyms and colours those of the official palette (which gives classes 7 and 49 one).
    """

    name = "ade20k"
    archive = ARCHIVE
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
