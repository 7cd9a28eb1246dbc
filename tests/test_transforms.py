"""Training transforms: worked out by hand, joint for image and label, and the same whatever the number of workers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from cssbench.config import AugmentConfig
from cssbench.data import transforms
from cssbench.data.photometric import distort, draw_photometric
from cssbench.data.step_dataset import BatchStream, StepDataset, make_loader
from cssbench.data.synthetic import Synthetic
from cssbench.data.transforms import TrainTransform, short_side_size

torch.set_num_threads(1)
RAW = ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))  # mean and std that leave 0..255 as it is
PLAIN: dict[str, Any] = {"scale": (1.0, 1.0), "flip": 0.0, "photometric": False, "max_category_share": 1.0}


def transform(crop: int, **changes: Any) -> TrainTransform:
    return TrainTransform(AugmentConfig(crop=crop, **PLAIN | changes), *RAW)


def coordinates(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """An image that holds (row, column, 0) and a label that follows from both: it tells where a pixel came from."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([rows, columns, np.zeros_like(rows)], axis=-1).astype(np.uint8)
    return image, label_at(rows, columns).astype(np.uint8)


def label_at(rows: Any, columns: Any) -> Any:
    return (17 * rows + columns) % 250


def draw(made: TrainTransform, image: np.ndarray, label: np.ndarray, seed: int = 0):
    return made(image, label, np.random.default_rng(seed))


def stripes(*columns: int, height: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """A label map by columns, and an image whose first channel is the column."""
    label = np.tile(np.array(columns, np.uint8), (height, 1))
    return coordinates(*label.shape)[0], label


def left_edges(made: TrainTransform, image: np.ndarray, label: np.ndarray, seeds: int = 40) -> set[int]:
    return {int(draw(made, image, label, seed)[0][1, 0, 0].round()) for seed in range(seeds)}


def test_normalise_by_hand():
    image = torch.tensor([0, 255, 51], dtype=torch.uint8)[:, None, None]
    out = transforms.normalise(image, (0.5, 0.5, 0.1), (0.5, 0.25, 0.2))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.flatten(), torch.tensor([-1.0, 2.0, 0.5]))
    assert image.flatten().tolist() == [0, 255, 51]  # the input is not changed in place


def test_flip_is_joint():
    image, label = coordinates(4, 4)
    flipped, labels = draw(transform(4, flip=1.0), image, label)
    np.testing.assert_allclose(flipped, image[:, ::-1].transpose(2, 0, 1), atol=1e-4)
    np.testing.assert_array_equal(labels, label[:, ::-1])
    assert flipped.dtype == torch.float32
    assert labels.dtype == torch.int64
    same, labels = draw(transform(4), image, label)
    np.testing.assert_allclose(same, image.transpose(2, 0, 1), atol=1e-4)
    np.testing.assert_array_equal(labels, label)


def test_flip_has_its_probability():
    image, label = coordinates(2, 2)
    flips = sum(int(draw(transform(2, flip=0.25), image, label, seed)[1][0, 0] == 1) for seed in range(400))
    assert 70 <= flips <= 130  # 100 expected, standard deviation 8.7


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (5, 4), (9, 9)])
def test_every_pixel_keeps_its_label(shape: tuple[int, int], flip: float):
    image, label = coordinates(*shape)
    corners = set()
    for seed in range(20):
        out, labels = draw(transform(6, flip=flip), image, label, seed)
        assert out.shape == (3, 6, 6)
        assert labels.shape == (6, 6)
        real = labels != 255
        assert real.sum() == min(6, shape[0]) * min(6, shape[1])
        where = out[:2, real].round().long()
        assert torch.equal(labels[real], label_at(where[0], where[1]))
        corners.add(tuple(where.min(dim=1).values.tolist()))
    possible = max(shape[0] - 6, 0) + 1, max(shape[1] - 6, 0) + 1
    assert corners <= {(top, left) for top in range(possible[0]) for left in range(possible[1])}
    assert len(corners) > 0.5 * possible[0] * possible[1]


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_a_small_image_is_padded_right_and_below(flip: float):
    image, label = coordinates(3, 5)
    mean, std = (0.2, 0.4, 0.6), (0.1, 0.2, 0.3)
    made = TrainTransform(AugmentConfig(crop=8, **PLAIN | {"flip": flip}), mean, std)
    out, labels = draw(made, image, label)
    assert (labels[3:] == 255).all()
    assert (labels[:, 5:] == 255).all()
    assert (labels[:3, :5] != 255).all()
    # exactly 0, which is the mean colour: not normalised black
    assert (out[:, 3:] == 0).all()
    assert (out[:, :, 5:] == 0).all()
    torch.testing.assert_close(out[2, 0, 0], torch.tensor(-2.0))  # channel 2 is 0 everywhere: (0 - 0.6) / 0.3


def test_a_crop_ruled_by_one_label_is_avoided():
    # 14 of the 25 windows of 8 columns have no label on 3/4 or more of them
    image, label = stripes(*[1] * 16, *[2, 3] * 8, height=8)

    def ruled(share: float) -> int:
        crops = [draw(transform(8, max_category_share=share), image, label, seed)[1] for seed in range(60)]
        return sum(int(torch.bincount(c.flatten()).max()) >= 0.75 * 64 for c in crops)

    assert ruled(0.75) == 0
    assert ruled(1.0) > 15


def test_the_share_must_lie_below_the_limit():
    case = stripes(1, 1, 1, 2, 2)  # windows: 3/4 of label 1, or half and half
    assert left_edges(transform(4, max_category_share=0.75), *case) == {1}
    assert left_edges(transform(4, max_category_share=0.76), *case) == {0, 1}


def test_ignored_pixels_do_not_count_for_the_limit():
    image, label = stripes(255, 255, 255, 1, 1)
    label[2:, 3] = 2  # windows: labels 1 and 2 half and half (3/4 ignored), or 3/4 of label 1 (half ignored)
    assert left_edges(transform(4, max_category_share=0.75), image, label) == {0}


def test_a_crop_of_one_label_is_avoided_whatever_the_limit():
    assert left_edges(transform(4, max_category_share=0.99), *stripes(1, 1, 1, 1, 2)) == {1}


def test_ten_redraws_and_the_last_is_taken():
    class Counting:
        calls = 0

        def integers(self, low: int, high: int) -> int:
            self.calls += 1
            return 0

    rng: Any = Counting()
    label = np.ones((8, 8), np.uint8)
    window = transform(4, max_category_share=0.75)._random_crop(label, (8, 8), rng)
    assert window == ((0, 4), (0, 4))
    assert rng.calls == 11 * 2  # mmsegmentation: one draw of two numbers, and ten more


def test_resize_range_keeps_the_aspect():
    image, label = coordinates(20, 30)
    label %= 7
    made = transform(128, scale=(0.5, 2.0), short_side=16)
    sizes = []
    for seed in range(150):
        labels = draw(made, image, label, seed)[1]
        real = labels != 255
        height, width = int(real.any(dim=1).sum()), int(real.any(dim=0).sum())
        assert real.sum() == height * width
        assert width == round(1.5 * height) or abs(width - 1.5 * height) <= 0.5
        sizes.append(height)
    assert 8 <= min(sizes) <= 9
    assert 31 <= max(sizes) <= 32
    assert 18 < np.mean(sizes) < 22  # uniform in the factor: mean 20


def test_without_a_short_side_images_are_scaled_as_stored():
    image, label = coordinates(12, 10)
    labels = draw(transform(40, scale=(2.0, 2.0)), image, label % 5)[1]
    assert int((labels != 255).sum()) == 24 * 20


def test_nearest_labels_keep_their_values():
    label = np.random.default_rng(0).choice(np.array([3, 200, 255], np.uint8), (11, 17))
    for size in ((22, 34), (7, 9), (16, 23), (11, 5), (1, 1)):
        out = transforms.resize_label(torch.from_numpy(label), size)
        assert out.dtype == torch.uint8
        assert set(out.unique().tolist()) <= {3, 200, 255}
        pil = Image.fromarray(label).resize(size[::-1], Image.Resampling.NEAREST)
        np.testing.assert_array_equal(out, pil)


def test_labels_by_index_are_torchvisions_nearest():
    """Also where a pixel's centre falls between two pixels: 3/4, 1/2, 2/3 of the side."""
    rng = np.random.default_rng(0)
    sizes = [(n * k, m * k) for n, m in ((4, 3), (2, 1), (3, 2), (3, 4)) for k in (1, 4, 9, 37)]
    sizes += [(int(n), int(m)) for n, m in rng.integers(1, 300, (40, 2))]
    for side, resized in sizes:
        label = torch.from_numpy(rng.integers(0, 256, (side, 23), dtype=np.uint8))
        for shape, size in ((label, (resized, 31)), (label.T.contiguous(), (16, resized))):
            expected = F.resize(shape[None], list(size), InterpolationMode.NEAREST_EXACT)[0]
            assert torch.equal(transforms.resize_label(shape, size), expected)


def test_a_fitting_size_is_not_resampled():
    image, label = torch.randint(0, 255, (3, 5, 7), dtype=torch.uint8), torch.zeros(5, 7, dtype=torch.uint8)
    assert transforms.resize(image, (5, 7)) is image
    assert transforms.resize_label(label, (5, 7)) is label
    assert transforms.resize(image, (10, 14)).shape == (3, 10, 14)


@pytest.mark.parametrize(
    ("shape", "short", "longest", "size"),
    [
        ((100, 200), 50, None, (50, 100)),
        ((200, 100), 50, None, (100, 50)),
        ((100, 200), 50, 100, (50, 100)),
        ((100, 200), 50, 80, (40, 80)),  # the long side rules
        ((333, 500), 512, 2048, (512, 769)),
        ((1, 1000), 1, 10, (1, 10)),  # never 0
    ],
)
def test_short_side_size_by_hand(shape, short, longest, size):
    assert short_side_size(shape, short, longest) == size


def test_short_side_is_met_exactly():
    for height in range(1, 400, 7):
        for width in range(height, 400, 13):
            assert min(short_side_size((height, width), 144)) == 144


def test_centre_crop_by_hand():
    image = torch.arange(30).view(5, 6)
    assert transforms.centre_crop(image, 4)[[0, -1], [0, -1]].tolist() == [1, 22]
    assert transforms.centre_crop(image[None].expand(3, 5, 6), 2).shape == (3, 2, 2)


def photometric_distortion(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    return distort(image.float(), draw_photometric(rng)).to(torch.uint8)


def test_photometric_distortion_leaves_the_shape_and_changes_something():
    image = torch.randint(0, 256, (3, 9, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before, changed = image.clone(), 0
    for seed in range(160):
        out = photometric_distortion(image, np.random.default_rng(seed))
        assert out.shape == image.shape
        changed += not torch.equal(out, image)
    assert torch.equal(image, before)
    assert 140 <= changed < 160  # 15 in 16 change something


def test_photometric_distortion_of_grey_is_brightness_alone():
    grey = torch.full((3, 4, 4), 128, dtype=torch.uint8)
    found = [photometric_distortion(grey, np.random.default_rng(seed)) for seed in range(200)]
    assert all((out == out[0, 0, 0]).all() for out in found)
    values = np.array([int(out[0, 0, 0]) for out in found])
    assert values.min() >= 96 - 1  # 128 x (1 - 32/128); contrast may round down by one
    assert values.max() <= 160
    assert np.ptp(values) > 50
    assert 70 < np.isin(values, (127, 128)).sum() < 130  # half are not touched


def test_photometric_distortion_leaves_the_geometry():
    image, label = coordinates(20, 30)
    common = {"scale": (0.5, 2.0), "flip": 0.5, "max_category_share": 0.75}
    different = 0
    for seed in range(10):
        plain, before = draw(transform(12, **common), image, label, seed)
        distorted, after = draw(transform(12, **common, photometric=True), image, label, seed)
        assert torch.equal(before, after)
        different += not torch.equal(plain, distorted)
    assert different > 5


def test_inputs_are_left_alone():
    image, label = coordinates(9, 12)
    copies = image.copy(), label.copy()
    draw(transform(6, scale=(0.5, 2.0), flip=1.0, photometric=True), image, label)
    np.testing.assert_array_equal(image, copies[0])
    np.testing.assert_array_equal(label, copies[1])


def test_read_only_arrays_are_welcome():
    """A data set may hand out views of its cache; torch would warn of them, and warnings are errors here."""
    image, label = coordinates(4, 4)
    image.flags.writeable = label.flags.writeable = False
    draw(transform(4, photometric=True), image, label)


@pytest.fixture(scope="module")
def scenes(synthetic: Synthetic) -> StepDataset:
    augment = AugmentConfig(crop=24, short_side=28)
    made = TrainTransform(augment, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return StepDataset(synthetic, "train", synthetic.stems("train")[:6], np.arange(256, dtype=np.uint8), made, seed=3)


def test_a_draw_depends_on_seed_epoch_and_image_alone(scenes: StepDataset):
    def again(stems: list[str], seed: int) -> StepDataset:
        return StepDataset(scenes.source, scenes.split, stems, scenes.table, scenes.transform, seed)

    first = scenes[0, 2]["images"]
    scenes[1, 4]
    assert torch.equal(scenes[0, 2]["images"], first)
    # its place in the list does not matter, so that an image is drawn alike at every step
    assert torch.equal(again(scenes.stems[2:], 3)[0, 0]["images"], first)
    assert not torch.equal(scenes[1, 2]["images"], first)
    assert not torch.equal(again(scenes.stems, 4)[0, 2]["images"], first)


def test_batches_do_not_depend_on_the_workers(scenes: StepDataset):
    def batches(workers: int) -> list[dict[str, Any]]:
        return list(make_loader(scenes, BatchStream(len(scenes), 5, 4, 4), workers))

    alone, shared = batches(0), batches(2)
    assert [b["names"] for b in alone] == [b["names"] for b in shared]
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one["images"], other["images"])
        assert torch.equal(one["labels"], other["labels"])
