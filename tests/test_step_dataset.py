"""The training data of one step: labels as the learner sees them, exact batches on any number of processes, holdout."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cssbench.config import AugmentConfig
from cssbench.data.base import SegDataset
from cssbench.data.step_dataset import (
    BatchStream,
    HoldoutDataset,
    StepDataset,
    make_loader,
    one_pass,
    split_holdout,
    stem_number,
)
from cssbench.data.transforms import TrainTransform
from cssbench.scenario import from_dict

torch.set_num_threads(1)
RAW = ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))
TOY = {"dataset": "toy", "classes": 4, "base": 2, "increment": 1}
IDS = np.array([[0, 1, 2, 255], [3, 4, 0, 1], [2, 3, 4, 0], [1, 1, 1, 255]], np.uint8)


class Source(SegDataset):
    """Label maps given; images hold the class id in every channel."""

    def __init__(self, **labels: np.ndarray):
        self.labels = labels

    def layout(self) -> str:
        return ""

    def folders(self, split: str) -> tuple[Path, Path]:
        return Path("images"), Path("labels")

    def label(self, split: str, stem: str) -> np.ndarray:
        assert split == "train"
        return self.labels[stem]

    def image(self, split: str, stem: str) -> np.ndarray:
        return np.repeat(self.label(split, stem)[..., None], 3, axis=-1)


def plain(crop: int) -> TrainTransform:
    config = AugmentConfig(crop=crop, scale=(1.0, 1.0), flip=0.0, photometric=False, max_category_share=1.0)
    return TrainTransform(config, *RAW)


def labels_seen(table: np.ndarray) -> list[list[int]]:
    source = Source(a=IDS)
    return StepDataset(source, "train", ["a"], table, plain(4), 0)[0, 0]["labels"].tolist()


def test_the_learner_sees_new_classes_alone():
    scene = from_dict("toy", TOY)
    assert [labels_seen(scene.train_table(step)) for step in scene.steps] == [
        [[0, 1, 2, 255], [0, 0, 0, 1], [2, 0, 0, 0], [1, 1, 1, 255]],
        [[0, 0, 0, 255], [3, 0, 0, 0], [0, 3, 0, 0], [0, 0, 0, 255]],
        [[0, 0, 0, 255], [0, 4, 0, 0], [0, 0, 4, 0], [0, 0, 0, 255]],
    ]


def test_the_learner_sees_positions_and_ignored_void():
    scene = from_dict("toy", TOY | {"order": [4, 2, 1, 3], "void": "ignore", "mode": "sequential"})
    # positions: 4 -> 1, 2 -> 2, 1 -> 3; class 3 comes later
    assert labels_seen(scene.train_table(scene.steps[1])) == [
        [255, 3, 2, 255],
        [0, 1, 255, 3],
        [2, 0, 1, 255],
        [3, 3, 3, 255],
    ]


def test_items_name_their_image_and_keep_its_pixels():
    source = Source(a=IDS, b=IDS.T.copy())
    data = StepDataset(source, "train", ["b", "a"], np.arange(256, dtype=np.uint8), plain(4), 0)
    assert len(data) == 2
    assert data[0, 1]["names"] == "a"
    item = data[3, 0]
    assert item["names"] == "b"
    np.testing.assert_allclose(item["images"][0], IDS.T, rtol=1e-5)


def keys(stream: Iterable[list[tuple[int, int]]]) -> list[tuple[int, int]]:
    return list(chain.from_iterable(stream))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 12), batch=st.integers(1, 9), number=st.integers(1, 12), seed=st.integers(0, 2**62))
def test_every_epoch_is_a_permutation_and_batches_run_across(n: int, batch: int, number: int, seed: int):
    stream = BatchStream(n, seed, batch, number)
    batches = list(stream)
    assert len(stream) == len(batches) == number
    assert {len(b) for b in batches} == {batch}  # no short batch at the end of an epoch, none dropped
    found = keys(batches)
    for epoch in range(len(found) // n):
        part = found[epoch * n : (epoch + 1) * n]
        assert {e for e, _ in part} == {epoch}
        assert sorted(i for _, i in part) == list(range(n))
    rest = found[len(found) // n * n :]
    assert len({i for _, i in rest}) == len(rest)
    assert list(stream) == batches  # a second walk is the same


def test_epochs_and_seeds_differ():
    found = keys(BatchStream(30, 0, 30, 2))
    assert [i for _, i in found[:30]] != [i for _, i in found[30:]]
    assert found != keys(BatchStream(30, 1, 30, 2))
    assert [i for _, i in found[:30]] != list(range(30))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_same_global_batch_in_order(world: int):
    n, size, number = 11, 8, 6
    whole = list(BatchStream(n, 7, size, number))
    shares = [list(BatchStream(n, 7, size // world, number, rank, world)) for rank in range(world)]
    assert all(len(batch) == size // world for share in shares for batch in share)
    for index, batch in enumerate(whole):
        assert [key for share in shares for key in share[index]] == batch


@pytest.mark.parametrize("world", [2, 4])
def test_processes_make_the_passes_that_one_makes_in_turn(world: int):
    alone = list(BatchStream(11, 7, 2, 20))
    shares = [list(BatchStream(11, 7, 2, 20 // world, rank, world)) for rank in range(world)]
    assert [share[turn] for turn in range(20 // world) for share in shares] == alone


def test_accumulated_passes_make_the_same_optimiser_step():
    """batch 8 at once, as 2 passes of 4, or as 2 passes of 2 on 2 processes: the same 8 images per optimiser step."""
    whole = [set(b) for b in BatchStream(13, 1, 8, 5)]
    accumulated = list(BatchStream(13, 1, 4, 10))
    ranks = [list(BatchStream(13, 1, 2, 10, rank, 2)) for rank in range(2)]
    for step, expected in enumerate(whole):
        passes = slice(2 * step, 2 * step + 2)
        assert set(keys(accumulated[passes])) == expected
        assert set(keys(ranks[0][passes] + ranks[1][passes])) == expected


def test_an_empty_set_is_refused_and_does_not_hang():
    with pytest.raises(ValueError, match="at least one image"):
        BatchStream(0, 0, 4, 1)


def test_one_pass_is_every_image_once_in_order():
    assert one_pass(5, 2) == [[(0, 0), (0, 1)], [(0, 2), (0, 3)], [(0, 4)]]
    assert one_pass(4, 2) == [[(0, 0), (0, 1)], [(0, 2), (0, 3)]]
    assert one_pass(0, 2) == []


def test_loader_stacks_explicit_batches():
    source = Source(a=IDS, b=IDS, c=IDS)
    data = StepDataset(source, "train", ["a", "b", "c"], np.arange(256, dtype=np.uint8), plain(4), 0)
    batches = list(make_loader(data, one_pass(3, 2), 0))
    assert [b["names"] for b in batches] == [["a", "b"], ["c"]]
    assert batches[0]["images"].shape == (2, 3, 4, 4)
    assert batches[0]["labels"].shape == (2, 4, 4)
    assert batches[0]["labels"].dtype == torch.int64
    endless = make_loader(data, BatchStream(3, 0, 2, 1000), 0)
    assert all(len(b["names"]) == 2 for b in islice(endless, 4))


STEMS = [f"img_{i:05d}" for i in range(2000)]


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.9])
def test_holdout_is_a_partition_of_about_that_share(share: float):
    kept, held = split_holdout(STEMS, share)
    assert sorted(kept + held) == STEMS
    assert not set(kept) & set(held)
    assert kept == sorted(kept)  # the order of the input
    assert held == sorted(held)
    assert abs(len(held) / len(STEMS) - share) < 0.03
    assert bool(held) == bool(share)


def test_holdout_hangs_on_the_name_alone():
    held = set(split_holdout(STEMS, 0.2)[1])
    part = STEMS[::-3]
    assert split_holdout(part, 0.2)[1] == [s for s in part if s in held]
    assert held < set(split_holdout(STEMS, 0.4)[1])  # a larger share keeps what was held out
    # and on no library: the first 64 bits of a SHA-256, as a fraction
    fractions = [int(sha256(f"holdout {s}".encode()).hexdigest()[:16], 16) / 2**64 for s in STEMS]
    assert held == {s for s, fraction in zip(STEMS, fractions, strict=True) if fraction < 0.2}


def test_stem_numbers_never_change():
    """Worked out once with sha256sum: another number would draw other crops and hold out other images."""
    assert stem_number("a") == 0xCA978112CA1BBDCA >> 1
    assert stem_number("") == 0xE3B0C44298FC1C14 >> 1


def test_held_out_views_are_not_augmented():
    label = np.zeros((4, 6), np.uint8)
    label[:, 3:] = 4
    label[0, 1] = 255
    source = Source(a=label)
    transform = TrainTransform(AugmentConfig(crop=4, scale=(0.3, 3.0), flip=1.0), *RAW)
    scene = from_dict("toy", TOY)
    data = HoldoutDataset(source, ["a"], scene.train_table(scene.steps[2]), transform)
    item = data[0]
    assert len(data) == 1
    assert item["names"] == "a"
    assert item["labels"].tolist() == [[255, 0, 4, 4], [0, 0, 4, 4], [0, 0, 4, 4], [0, 0, 4, 4]]
    np.testing.assert_allclose(item["images"][1], label[:, 1:5], rtol=1e-5)  # the centre
    assert torch.equal(data[0]["images"], item["images"])


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (30, 20), (8, 8)])
def test_held_out_views_are_square_whatever_the_image(shape: tuple[int, int]):
    source = Source(a=np.full(shape, 3, np.uint8))
    scene = from_dict("toy", TOY)
    item = HoldoutDataset(source, ["a"], scene.train_table(scene.steps[1]), plain(8))[0]
    assert item["images"].shape == (3, 8, 8)
    assert item["labels"].dtype == torch.int64
    assert (item["labels"] == 3).all()
    torch.testing.assert_close(item["images"], torch.full((3, 8, 8), 3.0))
