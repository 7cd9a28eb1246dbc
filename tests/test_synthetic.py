"""Synthetic scenes: reproducible, complete or absent, balanced enough to learn from."""

from __future__ import annotations

import numpy as np
import pytest

from cssbench.data import parallel
from cssbench.data import synthetic as module
from cssbench.data.synthetic import Synthetic, scene, world
from cssbench.errors import DataError


def test_layout_and_content(synthetic):
    assert [len(synthetic.stems(split)) for split in ("train", "val")] == [24, 8]
    stem = synthetic.stems("train")[0]
    image, label = synthetic.image("train", stem), synthetic.label("train", stem)
    assert image.shape == (32, 32, 3)
    assert label.shape == (32, 32)
    assert label.max() <= 6
    assert synthetic.palette.shape == (6, 3)
    assert synthetic.folder.name == f"synthetic-v{module.VERSION}-c6-32x32-t24-v8-s0"
    assert [p.name for p in synthetic.root.iterdir()] == [synthetic.folder.name]  # no temporary folder left


def test_files_hold_the_scene_of_seed_split_and_index(synthetic):
    for split, index in (("train", 5), ("val", 5)):
        image, label = scene(6, (32, 32), np.random.default_rng([0, split == "val", index]))
        assert (synthetic.image(split, f"{split}_{index:05d}") == image).all()
        assert (synthetic.label(split, f"{split}_{index:05d}") == label).all()


def test_same_files_whatever_the_number_of_threads(tmp_path, synthetic, monkeypatch):
    monkeypatch.setattr(parallel, "cores", lambda: 3)
    again = Synthetic(tmp_path / "new" / "root", classes=6, size=[32, 32], train=24, val=8)
    for split in again.splits:
        assert again.fingerprint(split, deep=True) == synthetic.fingerprint(split, deep=True)


def test_reopening_does_not_generate(synthetic, monkeypatch):
    monkeypatch.setattr(Synthetic, "_generate", None)
    again = Synthetic(synthetic.root, classes=6, size=32, train=24, val=8)
    assert again.stems("val") == synthetic.stems("val")


def test_parameters_have_folders_of_their_own(tmp_path):
    folders = {
        Synthetic(tmp_path, train=1, val=1, **options).folder
        for options in ({}, {"seed": 1}, {"size": 32}, {"size": [32, 48]}, {"classes": 3})
    }
    assert len(folders) == 5


def test_seed_and_split_change_the_scenes():
    drawn = [scene(6, (32, 32), np.random.default_rng([seed, split, 0]))[0] for seed in (0, 1) for split in (0, 1)]
    assert all((a != b).any() for i, a in enumerate(drawn) for b in drawn[:i])


def test_a_broken_generation_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write_scene", fail)
    with pytest.raises(DataError, match="No space left on device"):
        Synthetic(tmp_path, train=2, val=1)
    assert list(tmp_path.iterdir()) == []


def test_another_process_may_be_quicker(tmp_path, monkeypatch):
    """The folder appears while ours is being written: it is used, ours is dropped."""
    other = Synthetic(tmp_path / "other", size=16, train=2, val=1)
    real = module._write_scene

    def write(*args):
        if not (tmp_path / other.folder.name).exists():
            other.folder.rename(tmp_path / other.folder.name)
        real(*args)

    monkeypatch.setattr(module, "_write_scene", write)
    data = Synthetic(tmp_path, size=16, train=2, val=1)
    assert len(data.stems("train")) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([other.folder.name, "other"])


def test_deleted_images_are_noticed(tmp_path):
    data = Synthetic(tmp_path, size=16, train=3, val=1)
    data.image_path("train", data.stems("train")[0]).unlink()
    with pytest.raises(DataError, match=r"holds 2 images where 3 were generated\. Delete"):
        Synthetic(tmp_path, size=16, train=3, val=1)


@pytest.mark.parametrize(
    "options",
    [
        {"classes": 0},
        {"classes": 151},
        {"size": 15},
        {"size": [64]},
        {"size": "64"},
        {"size": [64, 8]},
        {"train": 0},
        {"val": 0},
        {"seed": -1},
    ],
)
def test_options_out_of_range(tmp_path, options):
    with pytest.raises(DataError, match=str(next(iter(options.values()))).replace("[", r"\[")):
        Synthetic(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_root_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be created"):
        Synthetic(tmp_path / "file")


@pytest.mark.parametrize("classes", [1, 2, 3, 4, 5, 11, 20, 21, 60, 150])
def test_any_number_of_classes(classes):
    looks = world(classes)
    assert len({look.name for look in looks}) == len(looks) == classes
    assert sum(look.role == "floor" for look in looks) >= 1
    for size in ((16, 16), (24, 70)):
        image, label = scene(classes, size, np.random.default_rng(classes))
        assert image.shape == (*size, 3)
        assert image.dtype == label.dtype == np.uint8
        assert label.shape == size
        assert 0 < label.max() <= classes


def test_every_step_has_stuff_and_things_frequent_and_rare():
    looks = world(20)
    rank = {
        role: sorted((k.weight for k in looks if k.role == role), reverse=True) for role in ("sky", "floor", "thing")
    }
    for group in (looks[:10], looks[10:15], looks[15:]):
        things = [rank["thing"].index(k.weight) for k in group if k.role == "thing"]
        assert any(k.role != "thing" for k in group)
        assert min(things) < 7 <= max(things)


def test_class_frequencies_are_long_tailed_and_bounded():
    """Of 300 scenes: every class in 6 % or more (120 of 2000), the most frequent in 3 times as many; 1 to 6 % void."""
    labels = [scene(20, (64, 64), np.random.default_rng([0, 0, i]))[1] for i in range(300)]
    counts = np.array([np.bincount(label.ravel(), minlength=21) for label in labels])
    images = (counts > 0).mean(axis=0)[1:]
    assert images.min() >= 0.06
    assert images.max() >= 3 * images.min()
    assert 0.01 < counts[:, 0].sum() / counts.sum() < 0.06


def test_palette_is_near_the_true_colours_and_distinct(synthetic):
    stems = synthetic.stems("train")
    images = np.concatenate([synthetic.image("train", s).reshape(-1, 3) for s in stems])
    labels = np.concatenate([synthetic.label("train", s).ravel() for s in stems])
    for class_id in range(1, 7):
        mean = images[labels == class_id].mean(axis=0)
        assert abs(mean - synthetic.palette[class_id - 1]).max() < 45
    assert len(np.unique(synthetic.palette, axis=0)) == 6
