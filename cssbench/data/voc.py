"""PASCAL VOC 2012 segmentation: 1,464 / 1,449 images, or 10,582 / 1,449 with SBD's annotations; 20 classes, background.

Everingham et al. 2010; the augmented training list is that of Hariharan et al. 2011 (SBD) without VOC's own validation
images, which MiB, PLOP and nearly every published table train on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from cssbench.data.base import read_classes
from cssbench.data.listed import ListedDataset, find_root
from cssbench.errors import ConfigError, DataError

Train = Literal["auto", "train", "trainaug"]
INSIDE = ("VOC2012", "VOCdevkit/VOC2012")
AUGMENTED = "SegmentationClassAug"
AUGMENTED_LISTS = (
    "ImageSets/Segmentation/trainaug.txt",
    "ImageSets/Segmentation/train_aug.txt",
    "list/train_aug.txt",
    "splits/train_aug.txt",
)


class VOC(ListedDataset):
    """The folder VOC2012, VOCdevkit, or its parent. Stored labels: 0 background, a class that is scored; 1..20 classes;
    255, borders and difficult objects, ignored.

    train: `trainaug` reads the augmented list (`trainaug.txt` or `train_aug.txt` in ImageSets/Segmentation, or `list`
    or `splits` as in the public code) and takes VOC's own annotation where there is one, else that of
    `SegmentationClassAug`; `train` reads VOC's own list; `auto` takes the augmented one where both are there.
    """

    name = "voc"
    classes, palette = read_classes("voc.csv")
    background_class = True
    archive = "VOC 2012 and SBD's annotations are two archives on two sites, without published checksums"

    def __init__(self, root: str | Path, train: Train = "auto"):
        if train not in get_args(Train):
            raise ConfigError(f"data.options.train of voc must be {', '.join(get_args(Train))}, not {train!r}.")
        super().__init__(root)
        self.given, self.root = self.root, find_root(self.root, "JPEGImages", INSIDE)
        self.augmentation = self._find_augmentation(required=train == "trainaug") if train != "train" else None
        own = self.root / "SegmentationClass"
        self._own = {path.name for path in own.iterdir()} if own.is_dir() else set()

    def _find_augmentation(self, required: bool) -> tuple[Path, Path] | None:
        """(list, folder of label maps). Raises DataError where one is missing and `required`."""
        places = (self.root, self.given)
        names = next((p / name for p in places for name in AUGMENTED_LISTS if (p / name).is_file()), None)
        labels = next((p / AUGMENTED for p in places if (p / AUGMENTED).is_dir()), None)
        if names and labels:
            return names, labels
        if required:
            missing = f"folder {self.root / AUGMENTED}" if names else f"list {self.root / AUGMENTED_LISTS[0]}"
            raise DataError(
                f"data.options.train is 'trainaug', but there is no {missing}. The augmented annotations of SBD are "
                f"not part of VOC's archive: add the list trainaug.txt and the folder {AUGMENTED}, or set 'train'."
            )
        return None

    def layout(self) -> str:
        return (
            f"VOC 2012 is expected as {self.root}/JPEGImages/*.jpg, SegmentationClass/*.png and ImageSets/Segmentation/"
            f"train|val.txt, as in VOCdevkit/VOC2012 of the official archive; for SBD's annotations also {AUGMENTED} "
            f"and trainaug.txt."
        )

    def lists(self, split: str) -> list[Path]:
        if split == "train" and self.augmentation:
            return [self.augmentation[0]]
        return [self.root / "ImageSets" / "Segmentation" / f"{split}.txt"]

    def folders(self, split: str) -> tuple[Path, Path]:
        return self.root / "JPEGImages", self.root / "SegmentationClass"

    def label_path(self, split: str, stem: str) -> Path:
        if self.augmentation and f"{stem}.png" not in self._own:
            return self.augmentation[1] / f"{stem}.png"
        return super().label_path(split, stem)
