"""Photometric distortion of a training view: torchvision's arithmetic, bit for bit, in fewer passes over the image.

Probabilities and ranges are mmsegmentation's (multiplicative brightness of 1 +- 32/128 where mmsegmentation adds
+-32; contrast about the mean). Every change ends in whole numbers 0..255, as it does for uint8 images; here they are
kept in float32 from the first change to the normalisation. What torchvision spends on a change of hue goes to integer
gathers and to `fmod`; here it is arithmetic and bit masks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Photometric:
    """Photometric distortion as drawn: factors of brightness, contrast and saturation, hue shift in turns; None = left
    as it is. early: contrast comes before the colour changes, else after them (False without contrast)."""

    brightness: float | None
    contrast: float | None
    saturation: float | None
    hue: float | None
    early: bool


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
    """Distort (3, H, W) float32, whole numbers 0..255, contiguous, in place; returns it."""
    if drawn.brightness is not None:
        _whole(image.mul_(drawn.brightness))
    if drawn.contrast is not None and drawn.early:
        _blend(image, _grey(image)[None].mean((-3, -2, -1), keepdim=True), drawn.contrast)
    if drawn.saturation is not None:
        _blend(image, _grey(image), drawn.saturation)
    if drawn.hue is not None:
        image.copy_(torch.from_numpy(shift_hue(image.to(torch.uint8).numpy(), drawn.hue)))
    if drawn.contrast is not None and not drawn.early:
        _blend(image, _grey(image)[None].mean((-3, -2, -1), keepdim=True), drawn.contrast)
    return image


def _whole(values: Tensor) -> Tensor:
    """In place: what a conversion to uint8 leaves."""
    return values.clamp_(0, 255).floor_()


def _grey(image: Tensor) -> Tensor:
    """(H, W) luma of (3, H, W), whole numbers."""
    red, green, blue = image
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()


def _blend(image: Tensor, other: Tensor, share: float) -> None:
    """In place: share x image + (1 - share) x other."""
    _whole(image.mul_(share).add_(other, alpha=1.0 - share))


def shift_hue(image: np.ndarray, shift: float) -> np.ndarray:
    """(3, H, W) uint8 -> the same, hue in HSV shifted by `shift` turns.

    Operation by operation the float32 results of torchvision's `adjust_hue`; where that selects among several, here a
    product with 0 or 1 or a mask of bits does.
    """
    single = np.float32
    red, green, blue = image
    top, low = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    is_red = top == red
    is_green = (top == green) & ~is_red
    grey = top == low
    unit = single(1 / 255)
    value = top * unit
    span = value - low * unit
    divisor = span + grey  # 1 where the span is 0
    from_red, from_green, from_blue = ((value - channel * unit) / divisor for channel in image)
    hue = (from_blue - from_green) * is_red
    hue += (from_red + single(2) - from_blue) * is_green
    hue += (from_green + single(4) - from_red) * ~(is_red | is_green)
    hue *= single(1 / 6)
    _fraction(hue, 1.0)
    _fraction(hue, shift)
    hue *= single(6)
    sector = np.floor(hue)
    hue -= sector
    saturation = span / (value + grey)
    part, rest = saturation * hue, single(1) - saturation
    falling, rising, least = (_bytes(share * value) for share in (single(1) - part, part + rest, rest))
    one, two, three, four, five = (np.negative((sector == index).view(np.uint8)) for index in range(1, 6))
    zero = ~(one | two | three | four | five)  # sectors 0 and 6 are one
    return np.stack([
        top & (zero | five) | falling & one | least & (two | three) | rising & four,
        top & (one | two) | rising & zero | falling & three | least & (four | five),
        top & (three | four) | rising & two | least & (zero | one) | falling & five,
    ])  # fmt: skip


def _fraction(turns: np.ndarray, more: float) -> None:
    """In place: the fractional part of `turns` + `more`."""
    turns += np.float32(more)
    turns -= np.floor(turns)


def _bytes(shares: np.ndarray) -> np.ndarray:
    """0..1 -> 0..255, uint8, as torchvision converts."""
    return (shares.clip(0, 1) * np.float32(256 - 1e-3)).astype(np.uint8)
