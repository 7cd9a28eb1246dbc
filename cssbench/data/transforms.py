"""Joint image/label transforms, drawn from one generator per (seed, epoch, image): the same whatever the workers.

Training: random resize, random crop with the category limit, flip, photometric distortion, normalise, pad, in the order
of the public SegViT code. Photometric distortion is torchvision's arithmetic with mmsegmentation's probabilities and
ranges (multiplicative brightness of 1 +- 32/128 where mmsegmentation adds +-32; contrast about the mean).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from cssbench.config import AugmentConfig
from cssbench.scenario import IGNORE


def to_tensor(image: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def normalise(image: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(3, H, W) uint8 -> float32, (x / 255 - mean) / std."""
    scale = torch.tensor(std).mul_(255.0)[:, None, None]
    return image.float().sub_(torch.tensor(mean).mul_(255.0)[:, None, None]).div_(scale)


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, antialiased. Returns the image itself when it has that size."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return F.resize(image, list(size), InterpolationMode.BILINEAR, antialias=True)


def resize_label(label: Tensor, size: tuple[int, int]) -> Tensor:
    """(H, W) labels, nearest neighbour by pixel centres (as PIL's NEAREST)."""
    if tuple(label.shape) == tuple(size):
        return label
    return F.resize(label[None], list(size), InterpolationMode.NEAREST_EXACT)[0]


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
class Photometric:
    """Photometric distortion as drawn: factors of brightness, contrast and saturation, hue shift in turns; None = left
    as it is. early: contrast comes first of the last three, else last (False without contrast)."""

    brightness: float | None
    contrast: float | None
    saturation: float | None
    hue: float | None
    early: bool


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
        truth = torch.from_numpy(np.array(label))
        size = self._random_size(truth.shape, rng)
        rows, columns = self._random_crop(resize_label(truth, size), rng)
        flip = bool(rng.random() < self.config.flip)
        return Draw(size, rows, columns, flip, draw_photometric(rng) if self.config.photometric else None)

    def picture(self, image: np.ndarray, draw: Draw) -> Tensor:
        """(3, S, S) float32. image: (H, W, 3) uint8, of the size of the label that was drawn for."""
        picture = resize(to_tensor(image), draw.size)[:, slice(*draw.rows), slice(*draw.columns)]
        if draw.flip:
            picture = picture.flip(-1)
        if draw.photometric is not None:
            picture = distort(picture, draw.photometric)
        return self._pad(normalise(picture, self.mean, self.std), 0)  # 0 is the mean colour

    def truth(self, label: np.ndarray, draw: Draw) -> Tensor:
        """(S, S) int64. label: (H, W) uint8; 255 where the crop reaches beyond it."""
        truth = resize_label(torch.from_numpy(np.array(label)), draw.size)[slice(*draw.rows), slice(*draw.columns)]
        return self._pad((truth.flip(-1) if draw.flip else truth).long(), IGNORE)

    def _random_size(self, shape: Sequence[int], rng: np.random.Generator) -> tuple[int, int]:
        factor = rng.uniform(*self.config.scale)
        short = self.config.short_side or min(shape)
        return short_side_size(shape, max(1, round(short * factor)))

    def _random_crop(self, label: Tensor, rng: np.random.Generator) -> tuple[tuple[int, int], tuple[int, int]]:
        """(start, stop) of rows and columns of a window in which no label fills more than the limit; the tenth redraw
        is taken as it is (mmsegmentation).

        Labels are those that the learner sees, background included; 255 is not counted.
        """
        side, (height, width) = self.config.crop, label.shape
        rows, columns = (0, height), (0, width)
        for _ in range(11):
            top, left = (int(rng.integers(0, max(extent - side, 0) + 1)) for extent in (height, width))
            rows, columns = (top, min(top + side, height)), (left, min(left + side, width))
            counts = torch.bincount(label[slice(*rows), slice(*columns)].flatten(), minlength=256)[:IGNORE]
            if (counts > 0).sum() > 1 and counts.max() < self.config.max_category_share * counts.sum():
                break
            if self.config.max_category_share >= 1 or (height <= side and width <= side):
                break  # no limit, or every draw would be the same
        return rows, columns

    def _pad(self, cut: Tensor, value: float) -> Tensor:
        """(..., h, w) -> (..., S, S), filled up right and below."""
        border = (0, self.config.crop - cut.shape[-1], 0, self.config.crop - cut.shape[-2])
        return torch.nn.functional.pad(cut, border, value=value)


def draw_photometric(rng: np.random.Generator) -> Photometric:
    """Brightness, contrast, saturation, hue, each with probability 1/2; contrast comes before or after the colour
    changes with equal chance (Liu et al. 2016, SSD)."""
    chosen = rng.random(4) < 0.5
    early = bool(rng.random() < 0.5)
    amounts = rng.uniform([0.75, 0.5, 0.5, -0.1], [1.25, 1.5, 1.5, 0.1])
    brightness, contrast, saturation, hue = (
        float(amount) if used else None for amount, used in zip(amounts, chosen, strict=True)
    )
    return Photometric(brightness, contrast, saturation, hue, early and contrast is not None)


def distort(image: Tensor, drawn: Photometric) -> Tensor:
    """(3, H, W) uint8 -> the same, distorted."""
    if drawn.brightness is not None:
        image = F.adjust_brightness(image, drawn.brightness)
    if drawn.contrast is not None and drawn.early:
        image = F.adjust_contrast(image, drawn.contrast)
    if drawn.saturation is not None:
        image = F.adjust_saturation(image, drawn.saturation)
    if drawn.hue is not None:
        image = F.adjust_hue(image, drawn.hue)
    if drawn.contrast is not None and not drawn.early:
        image = F.adjust_contrast(image, drawn.contrast)
    return image
