"""Photometric distortion against torchvision's own functions on uint8 images: the same numbers, every one."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from cssbench.data.photometric import Photometric, distort, shift_hue

torch.set_num_threads(1)


def colours() -> torch.Tensor:
    """(3, 60, 1000) uint8: the corners and edges of the colour cube, all greys, and colours at random."""
    edges = [torch.tensor(corner) for corner in product([0, 1, 127, 128, 254, 255], repeat=3)]
    greys = torch.arange(256).repeat(3, 1).T
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 256, (60000 - len(edges) - 256, 3), generator=generator)
    near = (drawn[:, :1] + torch.randint(-1, 2, drawn.shape, generator=generator)).clamp(0, 255)
    drawn[::2] = near[::2]  # almost grey: where the hue is a quotient of small numbers
    return torch.cat([torch.stack(edges), greys, drawn]).T.reshape(3, 60, 1000).to(torch.uint8)


def theirs(image: torch.Tensor, drawn: Photometric) -> torch.Tensor:
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


@pytest.mark.parametrize("shift", [-0.1, -1 / 12, -1e-9, 0.0, 1e-9, 0.0123, 1 / 12, 0.1])
def test_hue_is_torchvisions(shift: float):
    image = colours()
    found = shift_hue(image.numpy(), shift)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, F.adjust_hue(image, shift))


@pytest.mark.parametrize(
    "drawn",
    [
        Photometric(0.75, None, None, None, False),
        Photometric(1.25, None, None, None, False),
        Photometric(None, 0.5, None, None, True),
        Photometric(None, 1.5, None, None, False),
        Photometric(None, None, 0.5, None, False),
        Photometric(None, None, 1.5, None, False),
        Photometric(1.1371, 0.6113, 1.2917, 0.0719, True),
        Photometric(0.8713, 1.4511, 0.7331, -0.0517, False),
        Photometric(None, None, None, None, False),
    ],
)
def test_distortions_are_torchvisions(drawn: Photometric):
    image = colours()
    found = distort(image.float(), drawn)
    assert found.dtype == torch.float32
    assert torch.equal(found, theirs(image, drawn).float())


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 5), (17, 33), (33, 64)])
def test_odd_sizes_are_torchvisions(shape: tuple[int, int]):
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    drawn = Photometric(1.1, 1.3, 0.7, 0.05, False)
    assert torch.equal(distort(image.float(), drawn), theirs(image, drawn).float())


def test_hue_by_hand():
    """Red a third of a turn further is green; grey has no hue; a sixth before red is magenta."""
    image = np.array([[255, 10], [0, 10], [0, 10]], np.uint8)[..., None]
    assert shift_hue(image, 1 / 3)[..., 0].T.tolist() == [[0, 255, 0], [10, 10, 10]]
    assert shift_hue(image, -1 / 6)[..., 0].T.tolist() == [[255, 0, 255], [10, 10, 10]]
