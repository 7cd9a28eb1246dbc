"""A training view as a draw and its application: the same numbers, in the same order, as the whole in one go."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from cssbench.config import AugmentConfig
from cssbench.data.transforms import TrainTransform

torch.set_num_threads(1)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"short_side": 24},
    {"max_category_share": 1.0, "flip": 1.0},
    {"photometric": False, "scale": (1.0, 1.0)},
    {"scale": (0.2, 0.5), "flip": 0.0},  # smaller than the crop: padded
)


def sample(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An image of noise and a label map of blocks, some windows of which one label rules."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(20, 60, 2)
    label = np.kron(rng.choice([0, 1, 2, 255], (8, 8), p=[0.6, 0.2, 0.1, 0.1]), np.ones((8, 8)))
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8), label[:height, :width].astype(np.uint8)


def in_one_go(
    config: AugmentConfig, image: np.ndarray, label: np.ndarray, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """The augmentation as it was before draws were kept apart: written down once, on purpose in one piece."""
    height, width = label.shape
    factor = rng.uniform(config.scale[0], config.scale[1])
    short = max(1, round((config.short_side or min(height, width)) * factor))
    height, width = max(1, round(height * short / min(label.shape))), max(1, round(width * short / min(label.shape)))
    picture = torch.tensor(image).permute(2, 0, 1)
    if picture.shape[1:] != (height, width):
        picture = F.resize(picture, [height, width], InterpolationMode.BILINEAR, antialias=True)
    truth = F.resize(torch.tensor(label)[None], [height, width], InterpolationMode.NEAREST_EXACT)[0]
    side = config.crop
    for attempt in range(11):
        top = int(rng.integers(0, max(height - side, 0) + 1))
        left = int(rng.integers(0, max(width - side, 0) + 1))
        window = truth[top : top + side, left : left + side].numpy()
        counts = np.unique(window[window != 255], return_counts=True)[1]
        if len(counts) > 1 and counts.max() / counts.sum() < config.max_category_share:
            break
        if config.max_category_share >= 1 or (height <= side and width <= side) or attempt == 10:
            break
    picture, truth = picture[:, top : top + side, left : left + side], truth[top : top + side, left : left + side]
    if rng.random() < config.flip:
        picture, truth = picture.flip(2), truth.flip(1)
    if config.photometric:
        brightness, contrast, saturation, hue = rng.random(4) < 0.5
        early = rng.random() < 0.5
        amounts = rng.uniform([0.75, 0.5, 0.5, -0.1], [1.25, 1.5, 1.5, 0.1]).tolist()
        steps = [
            (brightness, F.adjust_brightness, amounts[0]),
            (contrast and early, F.adjust_contrast, amounts[1]),
            (saturation, F.adjust_saturation, amounts[2]),
            (hue, F.adjust_hue, amounts[3]),
            (contrast and not early, F.adjust_contrast, amounts[1]),
        ]
        for used, change, amount in steps:
            picture = change(picture, amount) if used else picture
    mean, scale = 255.0 * torch.tensor(MEAN)[:, None, None], 255.0 * torch.tensor(STD)[:, None, None]
    out, labels = torch.zeros(3, side, side), torch.full((side, side), 255)
    rows, columns = truth.shape
    out[:, :rows, :columns] = (picture.to(torch.float32) - mean) / scale
    labels[:rows, :columns] = truth
    return out, labels


@pytest.mark.parametrize("settings", SETTINGS)
def test_views_are_bit_equal_to_the_whole_in_one_go(settings: dict[str, Any]):
    config = AugmentConfig(crop=32, **settings)
    made = TrainTransform(config, MEAN, STD)
    for seed in range(30):
        image, label = sample(seed)
        one, other = np.random.default_rng(seed), np.random.default_rng(seed)
        picture, truth = made(image, label, one)
        wanted, labels = in_one_go(config, image, label, other)
        assert torch.equal(picture, wanted)
        assert torch.equal(truth, labels)
        assert one.bit_generator.state == other.bit_generator.state  # no number more or less


def test_a_draw_applied_apart_is_the_call():
    made = TrainTransform(AugmentConfig(crop=24), MEAN, STD)
    image, label = sample(3)
    for seed in range(10):
        drawn = made.draw(label, np.random.default_rng(seed))
        picture, truth = made(image, label, np.random.default_rng(seed))
        assert torch.equal(made.picture(image, drawn), picture)
        assert torch.equal(made.truth(label, drawn), truth)
        assert truth.dtype == torch.int64


def test_a_draw_is_plain_numbers_and_a_key():
    """Features are cached under it: equal draws are one key, and it survives JSON."""
    made = TrainTransform(AugmentConfig(crop=24), MEAN, STD)
    label = sample(4)[1]
    draws = [made.draw(label, np.random.default_rng(seed)) for seed in range(200)]
    assert draws[7] == made.draw(label, np.random.default_rng(7))
    assert len(set(draws)) > 190
    for drawn in draws:
        assert drawn.photometric is not None
        numbers = [*drawn.size, *drawn.rows, *drawn.columns, drawn.flip, *asdict(drawn.photometric).values()]
        assert {type(value) for value in numbers} <= {int, float, bool, type(None)}
    assert len({json.dumps(asdict(drawn)) for drawn in draws}) == len(set(draws))


def test_an_unused_order_of_contrast_makes_no_second_key():
    made = TrainTransform(AugmentConfig(crop=24), MEAN, STD)
    label = sample(4)[1]
    drawn = [made.draw(label, np.random.default_rng(seed)).photometric for seed in range(60)]
    assert {(p.contrast is None, p.early) for p in drawn if p} == {(True, False), (False, False), (False, True)}


def test_the_crop_hangs_on_the_labels_and_the_size_on_their_shape_alone():
    made = TrainTransform(AugmentConfig(crop=16), MEAN, STD)
    label = sample(5)[1]
    other = np.where(label == 0, 3, 0).astype(np.uint8)
    first = [made.draw(label, np.random.default_rng(seed)) for seed in range(40)]
    second = [made.draw(other, np.random.default_rng(seed)) for seed in range(40)]
    assert [d.size for d in first] == [d.size for d in second]
    assert any(a.rows != b.rows for a, b in zip(first, second, strict=True))
