"""Your own data: folders of images and label maps, described by one TOML file. See `FolderSpec` and `EXAMPLE`."""

from __future__ import annotations

import colorsys
import tomllib
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cssbench.config import explain_validation
from cssbench.data.base import SegDataset, distinct_colours
from cssbench.errors import DataError, fault
from cssbench.scenario import MAX_CLASSES

EXAMPLE = """\
name = "orchard"
classes = ["trunk", "leaf", "fruit"]
offset = 1          # stored 0 is class 1; or: values = [10, 20, 30]
void = [255]        # stored values that mean "unlabelled", or background with: background = true
[splits.train]
images = "photos/train"
labels = "masks/train"
"""

NAME = r"^[A-Za-z0-9][A-Za-z0-9_\-]{0,99}$"  # what may become part of a file's name in the cache
Byte = Annotated[int, Field(ge=0, le=255)]


class SplitSpec(BaseModel):
    """Folders of one split, absolute or below the TOML file. A label map bears its image's name, with `.png`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    images: str
    labels: str


class FolderSpec(BaseModel):
    """The content of dataset.toml. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field("folder", pattern=NAME)
    classes: list[Annotated[str, Field(min_length=1)]] = Field(min_length=1, max_length=MAX_CLASSES)
    splits: dict[Annotated[str, Field(pattern=NAME)], SplitSpec] = Field(
        min_length=1, description="train, val, test, as many as there are"
    )
    colours: list[tuple[Byte, Byte, Byte]] | None = Field(None, description="RGB per class; None: a made palette")
    offset: int | None = Field(None, description="class id = stored value + offset; None: 0, unless `values` is given")
    values: list[Byte] | None = Field(None, description="stored value of each class, in the order of `classes`")
    void: list[Byte] | None = Field(None, description="stored values that are void; None: 0, unless it is a class")
    background: bool = Field(False, description="those values are background, a class that is scored, and not void")

    @model_validator(mode="after")
    def _consistent(self) -> FolderSpec:
        count = len(self.classes)
        if len(set(self.classes)) < count:
            raise ValueError("every class needs a name of its own, but `classes` repeats one")
        if self.colours is not None and len(self.colours) != count:
            raise ValueError(f"`colours` has {len(self.colours)} entries for {count} classes")
        if self.values is not None and self.offset is not None:
            raise ValueError("give `offset` or `values`, not both")
        stored = self.stored()
        if len(stored) != count:
            raise ValueError(f"`values` has {len(stored)} entries for {count} classes")
        if len(set(stored)) < count:
            raise ValueError("`values` gives two classes the same stored value")
        if not 0 <= min(stored) <= max(stored) <= 255:
            raise ValueError(f"that `offset` means stored values {min(stored)} to {max(stored)}, outside 0 to 255")
        both = sorted(set(stored) & set(self.void or ()))
        if both:
            raise ValueError(f"the stored value {both[0]} is a class and void")
        return self

    def stored(self) -> list[int]:
        """Stored value of each class."""
        return self.values or [class_id - (self.offset or 0) for class_id in range(1, 1 + len(self.classes))]


class Folder(SegDataset):
    """Images and 8-bit label maps as `dataset.toml` in the root says; `root` may also be the path of such a TOML file.

    Stored 255 is ignored unless it is a class or void; any other value that is not declared is an error.
    """

    def __init__(self, root: str | Path):
        path = Path(root)
        path = path if path.suffix == ".toml" else path / "dataset.toml"
        self.spec = _read(path)
        self.name = self.spec.name
        self.classes = tuple(self.spec.classes)
        self.palette = _palette(self.spec)
        self.splits = tuple(self.spec.splits)
        self.background_class = self.spec.background
        super().__init__(path.parent)

    def layout(self) -> str:
        return f"The folders are those that {self.root / 'dataset.toml'} names for each split."

    def folders(self, split: str) -> tuple[Path, Path]:
        named = self.spec.splits[split]
        return self.root / named.images, self.root / named.labels

    def raw_table(self) -> np.ndarray:
        table = np.full(256, -1, np.int16)
        table[255] = 255
        table[0] = 0
        if self.spec.void is not None:
            table[0] = -1
            table[self.spec.void] = 0
        table[self.spec.stored()] = np.arange(1, 1 + self.num_classes)
        return table


def _read(path: Path) -> FolderSpec:
    try:
        return FolderSpec.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}). A folder dataset is described by a file dataset.toml in its "
            f"root, for instance:\n{EXAMPLE}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not valid TOML: {fault(error)}. Mend that line.") from None
    except ValidationError as error:
        raise DataError(explain_validation(str(path), error, FolderSpec)) from None


def _palette(spec: FolderSpec) -> np.ndarray:
    """(K, 3) uint8: the given colours, or hues a golden angle apart in three tones."""
    if spec.colours is not None:
        return np.array(spec.colours, np.uint8)
    tones = ((0.75, 0.9), (0.5, 1.0), (0.9, 0.6))
    made = [colorsys.hsv_to_rgb(i * 0.618034 % 1, *tones[i % 3]) for i in range(len(spec.classes))]
    return distinct_colours(255 * np.array(made))
