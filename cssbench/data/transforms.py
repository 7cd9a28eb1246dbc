"""Joint image/label transforms, drawn from one generator per (seed, epoch, image): the same whatever the workers.

Training: random resize, random crop with the category limit, flip, photometric distortion (see `photometric`),
normalise, pad, in the order of the public SegViT code.

Images stay as they are decoded, pixel by pixel, until they are resized and cut: that is two to three times as fast as
resizing planes, and gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from cssbench.config import AugmentConfig
from cssbench.data.photometric import Photometric, distort, draw_photometric
from cssbench.scenario import IGNORE


def to_tensor(image: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) uint8, not contiguous: a view of `image` unless that cannot be written."""
    return _shared(image).permute(2, 0, 1)


def _shared(array: np.ndarray) -> Tensor:
    """A tensor over the array's own memory, or over a copy where torch would warn: not writable, or turned round."""
    fits = array.flags.writeable and array.flags.c_contiguous
    return torch.from_numpy(array if fits else np.array(array))


def normalise(image: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(3, H, W) uint8 -> float32, contiguous, (x / 255 - mean) / std."""
    return _normalise(image.to(torch.float32, memory_format=torch.contiguous_format), mean, std)


def _normalise(image: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """In place, of float32."""
    scale = torch.tensor(std).mul_(255.0)[:, None, None]
    return image.sub_(torch.tensor(mean).mul_(255.0)[:, None, None]).div_(scale)


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, antialiased. Returns the image itself when it has that size."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return F.resize(image, list(size), InterpolationMode.BILINEAR, antialias=True)


def resize_label(label: Tensor, size: tuple[int, int]) -> Tensor:
    """(H, W) labels, nearest neighbour by pixel centres (as PIL's NEAREST)."""
    if tuple(label.shape) == tuple(size):
        return label
    rows, columns = (torch.from_numpy(_nearest(*sides)) for sides in zip(label.shape, size, strict=True))
    return label.index_select(0, rows).index_select(1, columns)


@lru_cache(512)
def _nearest(side: int, resized: int) -> np.ndarray:
    """(resized,) int64: which of `side` pixels each pixel of the resized side takes its label from."""
    positions = torch.arange(side, dtype=torch.float32)[None, None]
    return F.resize(positions, [1, resized], InterpolationMode.NEAREST_EXACT).flatten().long().numpy()


def short_side_size(shape: Sequence[int], short: int, longest: int | None = None) -> tuple[int, int]:
    """Size whose short side is `short`, aspect of `shape` (H, W) kept; smaller where the long side is too long."""
    height, width = shape
    factor = short / min(height, width)
    if longest is not None:
        factor = min(factor, longest / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def centre_crop(image: Tensor, side: int) -> Tensor:
    """(..., H, W) -> (..., side, side); H and W must be at least `side`."""
    top, left = (image.shape[-2] - side) // 2, (image.shape[-1] - side) // 2
    return image[..., top : top + side, left : left + side]


@dataclass(frozen=True)
class Draw:
    """One augmented view of an image, in plain numbers: equal draws of one image give equal pictures.

    size: (H, W) that the image is resized to. rows, columns: (start, stop) of the window cut out of that.
    """

    size: tuple[int, int]
    rows: tuple[int, int]
    columns: tuple[int, int]
    flip: bool
    photometric: Photometric | None


@dataclass(frozen=True)
class TrainTransform:
    """(image (H, W, 3) uint8, label (H, W) uint8) -> (image (3, S, S) float32, label (S, S) int64), S = config.crop.

    A call is a draw, which depends on the label through the category limit, and its application, which is not random.
    """

    config: AugmentConfig
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        draw = self.draw(label, rng)
        return self.picture(image, draw), self.truth(label, draw)

    def draw(self, label: np.ndarray, rng: np.random.Generator) -> Draw:
        """label: (H, W) uint8 as the learner sees it, 255 = ignored; H, W are the image's too."""
        size = self._random_size(label.shape, rng)
        rows, columns = self._random_crop(label, size, rng)
        flip = bool(rng.random() < self.config.flip)
        return Draw(size, rows, columns, flip, draw_photometric(rng) if self.config.photometric else None)

    def picture(self, image: np.ndarray, draw: Draw) -> Tensor:
        """(3, S, S) float32. image: (H, W, 3) uint8, of the size of the label that was drawn for."""
        view = resize(to_tensor(image), draw.size)[:, slice(*draw.rows), slice(*draw.columns)]
        if draw.flip:
            view = view.flip(-1)
        view = view.to(torch.float32, memory_format=torch.contiguous_format)
        if draw.photometric is not None:
            distort(view, draw.photometric)
        return self._pad(_normalise(view, self.mean, self.std), 0)  # 0 is the mean colour

    def truth(self, label: np.ndarray, draw: Draw) -> Tensor:
        """(S, S) int64. label: (H, W) uint8; 255 where the crop reaches beyond it."""
        cut = _window(label, draw.size, draw.rows, draw.columns)
        return self._pad(torch.from_numpy(cut[:, ::-1].copy() if draw.flip else cut).long(), IGNORE)

    def _random_size(self, shape: Sequence[int], rng: np.random.Generator) -> tuple[int, int]:
        factor = rng.uniform(*self.config.scale)
        short = self.config.short_side or min(shape)
        return short_side_size(shape, max(1, round(short * factor)))

    def _random_crop(
        self, label: np.ndarray, size: tuple[int, int], rng: np.random.Generator
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """(start, stop) of rows and columns of a window of the label map resized to `size`, in which no label fills
        more than the limit; the tenth redraw is taken as it is (mmsegmentation).

        Labels are those that the learner sees, background included; 255 is not counted.
        """
        side, (height, width), limit = self.config.crop, size, self.config.max_category_share
        rows, columns = (0, height), (0, width)
        for _ in range(11):
            top, left = (int(rng.integers(0, max(extent - side, 0) + 1)) for extent in (height, width))
            rows, columns = (top, min(top + side, height)), (left, min(left + side, width))
            if limit >= 1 or (height <= side and width <= side):
                break  # no limit, or every draw would be the same
            counts = _counts(_window(label, size, rows, columns))[:IGNORE]
            # single precision, as ever: the draw at the very limit must not change
            if (counts > 0).sum() > 1 and counts.max() < np.float32(limit) * np.float32(counts.sum()):
                break
        return rows, columns

    def _pad(self, cut: Tensor, value: float) -> Tensor:
        """(..., h, w) -> (..., S, S), filled up right and below."""
        border = (0, self.config.crop - cut.shape[-1], 0, self.config.crop - cut.shape[-2])
        return torch.nn.functional.pad(cut, border, value=value) if any(border) else cut


def _window(label: np.ndarray, size: tuple[int, int], rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
    """What `resize_label` makes of (H, W) labels, within a window alone; a new array."""
    height, width = label.shape
    return label[_nearest(height, size[0])[slice(*rows)]][:, _nearest(width, size[1])[slice(*columns)]]


def _counts(labels: np.ndarray) -> np.ndarray:
    """(256,) float64: how many pixels of a uint8 array have each value. Counted in runs: labels come in long ones."""
    flat = labels.ravel()
    last = np.append(np.flatnonzero(flat[1:] != flat[:-1]), flat.size - 1)  # of each run
    return np.bincount(flat[last], weights=np.diff(last, prepend=-1), minlength=256)
