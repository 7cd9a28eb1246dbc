"""Tiny data roots in the official layouts and encodings: what a downloaded archive looks like, a few pixels large."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

MAT_TYPES = {
    "u1": (2, 9),
    "i2": (3, 10),
    "u2": (4, 11),
    "f8": (9, 6),
}  # types of element and array


def gray(*rows: list[int]) -> np.ndarray:
    return np.array(rows, np.uint8)


def photo(path: Path, shape: tuple[int, int], colour: tuple[int, int, int] = (90, 120, 60)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*shape, 3), colour, np.uint8)).save(path)
    return path


def png(path: Path, labels: np.ndarray, palette: bool = False) -> Path:
    """8-bit indices; `palette`: with the colours of VOC, as its own files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(labels)
    if palette:
        picture = picture.convert("P")
        picture = Image.frombytes("P", picture.size, labels.tobytes())
        picture.putpalette([(37 * i) % 256 for i in range(768)])
    picture.save(path)
    return path


def mat(path: Path, compress: bool = True, **variables: np.ndarray) -> Path:
    """A MAT-file of level 5 as MATLAB writes it: column by column, each variable compressed unless told otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = b"MATLAB 5.0 MAT-file, Platform: GLNXA64".ljust(116) + bytes(8) + struct.pack("<H", 0x0100) + b"IM"
    for name, values in variables.items():
        kind, number = MAT_TYPES[values.dtype.str[1:]]
        parts = _element(6, struct.pack("<II", number, 0)) + _element(5, struct.pack("<ii", *values.shape))
        parts += _element(1, name.encode()) + _element(kind, values.tobytes(order="F"))
        matrix = struct.pack("<II", 14, len(parts)) + parts
        packed = zlib.compress(matrix)
        content += struct.pack("<II", 15, len(packed)) + packed if compress else matrix
    path.write_bytes(content)
    return path


def _element(kind: int, data: bytes) -> bytes:
    if len(data) <= 4:  # the short form
        return struct.pack("<HH", kind, len(data)) + data.ljust(4, b"\0")
    return struct.pack("<II", kind, len(data)) + data.ljust(-(-len(data) // 8) * 8, b"\0")


def voc_tree(root: Path, labels: dict[str, dict[str, np.ndarray]], inside: str = "VOCdevkit/VOC2012") -> Path:
    """labels: split -> name -> stored labels. Returns the folder VOC2012."""
    there = root / inside
    for split, maps in labels.items():
        for name, stored in maps.items():
            photo(there / "JPEGImages" / f"{name}.jpg", stored.shape)
            png(there / "SegmentationClass" / f"{name}.png", stored, palette=True)
        names = there / "ImageSets" / "Segmentation" / f"{split}.txt"
        names.parent.mkdir(parents=True, exist_ok=True)
        names.write_text("".join(f"{name}\n" for name in maps))
    return there


def augment(voc: Path, labels: dict[str, np.ndarray], names: Path, form: str = "{0}") -> None:
    """SBD's maps for images that VOC has not annotated, and the augmented list at `names`, a line per image."""
    for name, stored in labels.items():
        photo(voc / "JPEGImages" / f"{name}.jpg", stored.shape)
        png(voc / "SegmentationClassAug" / f"{name}.png", stored)
    own = (voc / "ImageSets/Segmentation/train.txt").read_text().split()
    names.parent.mkdir(parents=True, exist_ok=True)
    names.write_text("".join(form.format(name) + "\n" for name in [*own, *labels]))


def city_tree(root: Path, kind: str, labels: dict[tuple[str, str, str], np.ndarray]) -> Path:
    """labels: (split, city, number) -> stored labels."""
    for (split, city, number), stored in labels.items():
        stem = f"{city}_{number}_000019"
        photo(root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", stored.shape)
        png(root / "gtFine" / split / city / f"{stem}_gtFine_{kind}.png", stored)
        png(root / "gtFine" / split / city / f"{stem}_gtFine_color.png", stored)
    return root
