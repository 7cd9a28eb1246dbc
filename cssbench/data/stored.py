"""Decoded images and label maps in files that are mapped into memory: decoded once for all epochs, steps and runs.

ROOT/<dataset>-<digest>/<split>/<digest[:2]>/<digest>.pair   a header, image (H, W, 3), class ids (H, W), uint8

A file is written beside its place and renamed, so a crash leaves nothing half written; its header names the originals
(names, sizes, times of change) and holds a sum of its content. One that is damaged, or whose originals changed, is
made again. All processes of a machine share the pages that any of them has read.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import shutil
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from time import time
from typing import Any

import numpy as np
import torch

from cssbench.data.base import SegDataset
from cssbench.data.parallel import parallel_map
from cssbench.data.presence import cache_folder
from cssbench.data.transforms import resize, resize_label, short_side_size, to_tensor
from cssbench.progress import say, size_text
from cssbench.results import image_name

GIB = 2**30
SUFFIX = ".pair"
HEADER = struct.Struct("<16sQII32s")  # magic, sum of the content, height, width, digest of the originals
MAGIC = b"cssbench pair 01"
SAMPLE = 16  # images that the estimate is made from

Pair = tuple[np.ndarray, np.ndarray]


class StoredDataset(SegDataset):
    """A dataset whose images and label maps are taken from files written by `fill`, and from `source` where there are
    none: the same arrays either way.

    side: images with a longer short side are resized to it (bilinear, antialiased; label maps by nearest neighbour),
    stored or not; None: the source's very pixels.
    """

    def __init__(self, source: SegDataset, side: int | None = None, options: dict[str, Any] | None = None):
        self.source, self.side, self.root, self.name = source, side, source.root, source.name
        self.classes, self.palette, self.splits = source.classes, source.palette, source.splits
        self.background_class = source.background_class
        self._files = {}
        kind = type(source)
        facts = (kind.__module__, kind.__qualname__, str(source.root.resolve()), sorted((options or {}).items()), side)
        digest = hashlib.sha256(repr(facts).encode() + source.raw_table().tobytes()).hexdigest()
        self.folder = cache_folder() / "images" / image_name(f"{source.name}-{digest[:16]}")

    def layout(self) -> str:
        return self.source.layout()

    def folders(self, split: str) -> tuple[Path, Path]:
        return self.source.folders(split)

    def image_files(self, split: str) -> dict[str, list[Path]]:
        return self.source.image_files(split)

    def label_path(self, split: str, stem: str) -> Path:
        return self.source.label_path(split, stem)

    def raw_table(self) -> np.ndarray:
        return self.source.raw_table()

    def version(self, split: str, stem: str) -> tuple[Any, ...]:
        return (*self.source.version(split, stem), self.side)

    def image(self, split: str, stem: str) -> np.ndarray:
        found = self._taken(split, stem)
        return self._reduced(self.source.image(split, stem)) if found is None else found[0]

    def label(self, split: str, stem: str) -> np.ndarray:
        found = self._taken(split, stem)
        return self._reduced_label(self.source.label(split, stem)) if found is None else found[1]

    def pair(self, split: str, stem: str) -> Pair:
        found = self._taken(split, stem)
        return self._made(split, stem) if found is None else found

    def _taken(self, split: str, stem: str) -> Pair | None:
        """The stored pair; None where there is none. One that is damaged is made again."""
        path, key = self._place(split, stem), self._originals(split, stem)
        if key is None or not path.exists():
            return None
        if (found := read(path, key)) is not None:
            return found
        made = self._made(split, stem)
        say(f"{path} is damaged, or older than its original: made again")
        try:
            write(path, key, made)
        except OSError as error:
            say(f"  it cannot be written ({error.strerror or error}): the original is read instead")
        return made

    def _made(self, split: str, stem: str) -> Pair:
        image, label = self.source.pair(split, stem)
        return self._reduced(image), self._reduced_label(label)

    def _reduced(self, image: np.ndarray) -> np.ndarray:
        small = resize(to_tensor(image), self._reduced_size(image.shape[:2]))
        return small.permute(1, 2, 0).contiguous().numpy()

    def _reduced_label(self, label: np.ndarray) -> np.ndarray:
        return resize_label(torch.from_numpy(np.array(label)), self._reduced_size(label.shape)).numpy()

    def _reduced_size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        if self.side is None or min(shape) <= self.side:
            return shape[0], shape[1]
        return short_side_size(shape, self.side)

    def _place(self, split: str, stem: str) -> Path:
        name = hashlib.sha256(stem.encode()).hexdigest()[:32]
        return self.folder / image_name(split) / name[:2] / f"{name}{SUFFIX}"

    def _originals(self, split: str, stem: str) -> bytes | None:
        """Digest of names, sizes and times of change of the image and the label map; None where a file is missing."""
        facts: list[Any] = []
        try:
            for path in (self.image_path(split, stem), self.label_path(split, stem)):
                stat = path.stat()
                facts += [path.name, stat.st_size, stat.st_mtime_ns]
        except OSError:
            return None
        return hashlib.sha256(repr(facts).encode()).digest()

    def fill(self, images: Sequence[tuple[str, str]], max_gib: float) -> None:
        """Store the (split, stem) of `images` that are not stored yet, as long as all that is stored on this machine,
        of any dataset, stays below `max_gib`. Says beforehand how much it will be, and what does not fit or work."""
        missing = [item for item in images if not self._has(*item)]
        if not missing:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            say(f"{self.folder} cannot be made ({error.strerror or error}): images are decoded each time")
            return
        room = int(max_gib * GIB) - stored_bytes(self.folder.parent)
        free = shutil.disk_usage(self.folder).free
        sample = missing[:: max(1, len(missing) // SAMPLE)][:SAMPLE]
        mean = np.mean([_size(self._made(*item)[1].shape) for item in sample])
        say(
            f"storing {len(missing)} decoded images, about {size_text(float(mean) * len(missing))}, in {self.folder} "
            f"(data.stored {max_gib:g} GiB, of which {size_text(max(room, 0))} are left; "
            f"{size_text(free)} free on the disk)"
        )
        filling = _Filling(self, room)
        kept = sum(parallel_map(filling, missing, "Storing decoded images"))
        if kept < len(missing):
            say(f"  {len(missing) - kept} of them are not stored and are decoded each time: {filling.reason}")

    def _has(self, split: str, stem: str) -> bool:
        """Whether a file of the right size and originals is there; its content is looked at when it is read."""
        try:
            with self._place(split, stem).open("rb") as file:
                return _fits(file.read(HEADER.size), os.fstat(file.fileno()).st_size, self._originals(split, stem))
        except OSError:
            return False


class _Filling:
    """Called with (split, stem) by several threads: whether the pair was stored."""

    def __init__(self, data: StoredDataset, room: int):
        self.data, self.room, self.lock, self.reason = data, room, Lock(), ""

    def __call__(self, item: tuple[str, str]) -> bool:
        key = self.data._originals(*item)
        if self.reason or key is None:
            self.reason = self.reason or "they have no files of their own"
            return False
        made = self.data._made(*item)
        with self.lock:
            if (size := _size(made[1].shape)) > self.room:
                self.reason = "data.stored is reached"
                return False
            self.room -= size
        try:
            write(self.data._place(*item), key, made)
        except OSError as error:
            self.reason = str(error.strerror or error)
            return False
        return True


def read(path: Path, key: bytes) -> Pair | None:
    """The arrays of a file, mapped: writing to them does not change it. None where it is damaged or not of `key`."""
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError):  # an empty file cannot be mapped
        return None
    if not _fits(content[: HEADER.size], len(content), key):
        return None
    _, known, height, width, _ = HEADER.unpack_from(content)
    payload = np.frombuffer(content, np.uint8, offset=HEADER.size)
    if _sum(payload) != known:
        return None
    image, label, _ = np.split(payload, [3 * height * width, 4 * height * width])
    return image.reshape(height, width, 3), label.reshape(height, width)


def write(path: Path, key: bytes, pair: Pair) -> None:
    """Write a pair beside its place and rename it. Raises OSError."""
    image, label = pair
    payload = np.zeros(_size(label.shape) - HEADER.size, np.uint8)
    payload[: image.size], payload[image.size : image.size + label.size] = image.ravel(), label.ravel()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(HEADER.pack(MAGIC, _sum(payload), *label.shape, key))
            file.write(payload.data)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _size(shape: tuple[int, ...]) -> int:
    """Bytes of the file of an (H, W) image: the content is filled up to whole 64-bit words."""
    return HEADER.size + -(-4 * shape[0] * shape[1] // 8) * 8


def _fits(header: bytes, size: int, key: bytes | None) -> bool:
    if len(header) < HEADER.size:
        return False
    magic, _, height, width, known = HEADER.unpack(header)
    return magic == MAGIC and known == key and size == _size((height, width))


def _sum(payload: np.ndarray) -> int:
    """Sum of all 64-bit words modulo 2^64: an order faster than a CRC, and sees pages that were never written."""
    return int(payload.view(np.uint64).sum(dtype=np.uint64))


def stored_bytes(root: Path) -> int:
    """Bytes of all files below `root`; what killed processes left half written, an hour ago or more, is removed."""
    total = 0
    for folder, _, names in os.walk(root):
        for path in (Path(folder, name) for name in names):
            with suppress(OSError):
                stat = path.stat()
                if path.suffix == ".tmp" and stat.st_mtime < time() - 3600:
                    path.unlink()
                else:
                    total += stat.st_size
    return total
