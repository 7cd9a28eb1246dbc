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
class TrainTransform:
    """(image (H, W, 3) uint8, label (H, W) uint8) -> (image (3, S, S) float32, label (S, S) int64), S = config.crop."""

    config: AugmentConfig
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        config = self.config
        picture, truth = to_tensor(image), torch.from_numpy(np.array(label))
        size = self._random_size(truth, rng)
        picture, truth = resize(picture, size), resize_label(truth, size)
        rows, columns = self._random_crop(truth, rng)
        picture, truth = picture[:, rows, columns], truth[rows, columns]
        if rng.random() < config.flip:
            picture, truth = picture.flip(-1), truth.flip(-1)
        if config.photometric:
            picture = photometric_distortion(picture, rng)
        return self._pad(normalise(picture, self.mean, self.std), truth)

    def _random_size(self, label: Tensor, rng: np.random.Generator) -> tuple[int, int]:
        factor = rng.uniform(*self.config.scale)
        short = self.config.short_side or min(label.shape)
        return short_side_size(label.shape, max(1, round(short * factor)))

    def _random_crop(self, label: Tensor, rng: np.random.Generator) -> tuple[slice, slice]:
        """A window in which no label fills more than the limit; the tenth redraw is taken as it is (mmsegmentation).

        Labels are those that the learner sees, background included; 255 is not counted.
        """
        side, (height, width) = self.config.crop, label.shape
        window = slice(0, height), slice(0, width)
        for _ in range(11):
            top, left = (int(rng.integers(0, max(extent - side, 0) + 1)) for extent in (height, width))
            window = slice(top, min(top + side, height)), slice(left, min(left + side, width))
            counts = torch.bincount(label[window].flatten(), minlength=256)[:IGNORE]
            if (counts > 0).sum() > 1 and counts.max() < self.config.max_category_share * counts.sum():
                break
            if self.config.max_category_share >= 1 or (height <= side and width <= side):
                break  # no limit, or every draw would be the same
        return window

    def _pad(self, picture: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Right and below: image with 0 (the mean colour), label with 255."""
        side, (height, width) = self.config.crop, label.shape
        border = (0, side - width, 0, side - height)
        picture = torch.nn.functional.pad(picture, border)
        return picture, torch.nn.functional.pad(label.long(), border, value=IGNORE)


def photometric_distortion(image: Tensor, rng: np.random.Generator) -> Tensor:
    """(3, H, W) uint8 -> the same: brightness, contrast, saturation, hue, each with probability 1/2; contrast comes
    before or after the colour changes with equal chance (Liu et al. 2016, SSD)."""
    brightness, contrast, saturation, hue = rng.random(4) < 0.5
    early = rng.random() < 0.5
    amounts = rng.uniform([0.75, 0.5, 0.5, -0.1], [1.25, 1.5, 1.5, 0.1])
    if brightness:
        image = F.adjust_brightness(image, float(amounts[0]))
    if contrast and early:
        image = F.adjust_contrast(image, float(amounts[1]))
    if saturation:
        image = F.adjust_saturation(image, float(amounts[2]))
    if hue:
        image = F.adjust_hue(image, float(amounts[3]))
    if contrast and not early:
        image = F.adjust_contrast(image, float(amounts[1]))
    return image
