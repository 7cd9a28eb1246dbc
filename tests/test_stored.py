"""Stored images: the source's very arrays, whatever becomes of the files; their bound; and what reads them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from cssbench.data import stored
from cssbench.data.base import SegDataset
from cssbench.data.camvid import CamVid
from cssbench.data.stored import StoredDataset
from cssbench.errors import DataError

torch.set_num_threads(1)
STEMS = ("a", "b", "c")
ALL = [("train", stem) for stem in STEMS]
SHAPES = {"a": (9, 7), "b": (20, 31), "c": (16, 16)}


@pytest.fixture
def camvid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CamVid:
    monkeypatch.setenv("CSSBENCH_CACHE", str(tmp_path / "cache"))
    return make(tmp_path / "data", 0)


def make(root: Path, seed: int) -> CamVid:
    rng = np.random.default_rng(seed)
    for stem, shape in SHAPES.items():
        for folder, array in (
            ("train", rng.integers(0, 256, (*shape, 3), dtype=np.uint8)),
            ("trainannot", rng.integers(0, 12, shape, dtype=np.uint8)),
        ):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(root / folder / f"{stem}.png")
    return CamVid(root)


def files(data: StoredDataset) -> list[Path]:
    return sorted(path for path in data.folder.rglob("*") if path.is_file())


def same(found: tuple[np.ndarray, np.ndarray], wanted: tuple[np.ndarray, np.ndarray]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == np.uint8
        np.testing.assert_array_equal(one, other)


def agrees(data: StoredDataset, source: SegDataset) -> None:
    for item in ALL:
        same(data.pair(*item), source.pair(*item))
        same((data.image(*item), data.label(*item)), source.pair(*item))


def decoding_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("an original was read")

    for name in ("pair", "image", "label", "raw_label"):
        monkeypatch.setattr(CamVid, name, refuse)


def test_stored_pixels_are_the_source_s(camvid, monkeypatch, capfd):
    data = StoredDataset(camvid)
    agrees(data, camvid)
    assert not data.folder.exists()  # nothing is written but by `fill`
    expected = [camvid.pair(*item) for item in ALL]
    data.fill(ALL, 1.0)
    assert len(files(data)) == 3
    assert "storing 3 decoded images" in capfd.readouterr().err
    data.fill(ALL, 1.0)
    assert capfd.readouterr().err == ""  # all there
    decoding_fails(monkeypatch)
    again = StoredDataset(CamVid(camvid.root))  # another run, or a worker
    for item, pair in zip(ALL, expected, strict=True):
        same(again.pair(*item), pair)
    image, label = again.pair(*ALL[0])
    image[:], label[:] = 1, 1  # in memory alone
    same(again.pair(*ALL[0]), expected[0])


def test_a_side_makes_large_images_small_stored_or_not(camvid, monkeypatch):
    """Short side 12: 20 x 31 becomes 12 x 19, 16 x 16 becomes 12 x 12, 9 x 7 stays."""
    data = StoredDataset(camvid, side=12)
    before = {stem: data.pair("train", stem) for stem in STEMS}
    assert {stem: label.shape for stem, (_, label) in before.items()} == {"a": (9, 7), "b": (12, 19), "c": (12, 12)}
    for stem in ("b", "c"):
        image, label = camvid.pair("train", stem)
        size = list(before[stem][1].shape)
        planes = F.resize(torch.tensor(image).permute(2, 0, 1), size, InterpolationMode.BILINEAR, antialias=True)
        np.testing.assert_array_equal(before[stem][0], planes.permute(1, 2, 0))
        nearest = F.resize(torch.tensor(label)[None], size, InterpolationMode.NEAREST_EXACT)[0].numpy()
        np.testing.assert_array_equal(before[stem][1], nearest)
        np.testing.assert_array_equal(data.label("train", stem), nearest)
    same(before["a"], camvid.pair("train", "a"))
    data.fill(ALL, 1.0)
    assert data.version("train", "b") != camvid.version("train", "b") != StoredDataset(camvid, 13).version("train", "b")
    decoding_fails(monkeypatch)
    for stem in STEMS:
        same(data.pair("train", stem), before[stem])


@pytest.mark.parametrize("what", ["empty", "cut", "header", "pixel", "zeros", "magic"])
def test_a_damaged_file_is_made_again_and_said(camvid, capfd, what):
    data = StoredDataset(camvid)
    data.fill(ALL, 1.0)
    for path in files(data):
        sound = path.read_bytes()
        damaged = bytearray(sound)
        if what == "header":
            del damaged[30:]
        elif what == "pixel":
            damaged[100] ^= 64
        elif what == "zeros":  # a page that a power cut kept from the disk
            damaged[80:] = bytes(len(damaged) - 80)
        elif what == "magic":
            damaged[0] ^= 1
        path.write_bytes({"empty": b"", "cut": sound[:-8]}.get(what, bytes(damaged)))
        capfd.readouterr()
        agrees(data, camvid)
        said = capfd.readouterr().err
        assert said.count("made again") == 1
        assert str(path) in said.replace("\n", "")
        assert path.read_bytes() == sound


def test_changed_originals_are_read_again(camvid, tmp_path):
    data = StoredDataset(camvid)
    data.fill(ALL, 1.0)
    make(tmp_path / "data", 1)
    for folder in ("train", "trainannot"):
        for path in (tmp_path / "data" / folder).iterdir():
            os.utime(path, ns=(1, 1))
    agrees(StoredDataset(CamVid(camvid.root)), make(tmp_path / "other", 1))


def test_what_determines_the_arrays_has_a_folder_of_its_own(camvid, tmp_path, monkeypatch):
    other = make(tmp_path / "other", 1)
    folders = {
        StoredDataset(camvid).folder,
        StoredDataset(camvid, 12).folder,
        StoredDataset(camvid, options={"size": 3}).folder,
        StoredDataset(other).folder,
    }
    monkeypatch.setattr(CamVid, "raw_table", lambda self: np.full(256, 3, np.int16))
    assert len(folders | {StoredDataset(camvid).folder}) == 5


def test_the_bound_counts_all_that_is_stored(camvid, capfd):
    """Of 256, 2480 and 1024 bytes, and 64 of header each: 3952 for all three; 3000 hold any two but the last."""
    data = StoredDataset(camvid)
    data.fill(ALL, 3000 / 2**30)
    said = capfd.readouterr().err
    assert "storing 3 decoded images, about 0.0 MiB" in said
    left = 3 - len(files(data))
    assert left in (1, 2)
    assert f"{left} of them are not stored and are decoded each time: data.stored is reached" in said
    assert sum(path.stat().st_size for path in files(data)) <= 3000
    agrees(data, camvid)
    # another dataset's images count too: nothing more fits
    small = StoredDataset(camvid, side=7)
    small.fill(ALL, 3000 / 2**30)
    assert stored.stored_bytes(data.folder.parent) <= 3000
    agrees(StoredDataset(camvid), camvid)


def test_a_folder_that_cannot_be_written_is_done_without(camvid, tmp_path, capfd):
    (tmp_path / "cache").write_text("a file in the way")
    data = StoredDataset(camvid)
    data.fill(ALL, 1.0)
    assert "images are decoded each time" in capfd.readouterr().err
    agrees(data, camvid)


def test_leavings_of_a_killed_process_go_after_an_hour(camvid):
    data = StoredDataset(camvid)
    data.fill(ALL, 1.0)
    old, new = (data.folder / name for name in (".x.pair.1.tmp", ".y.pair.1.tmp"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    stored.stored_bytes(data.folder)
    assert not old.exists()
    assert new.exists()


def test_faults_of_originals_are_still_named(camvid):
    camvid.label_path("train", "b").unlink()
    with pytest.raises(DataError, match="has no label map"):
        StoredDataset(camvid).pair("train", "b")


def test_what_a_plug_in_makes_of_its_files_is_stored(camvid):
    class Made(CamVid):
        def pair(self, split: str, stem: str) -> tuple[np.ndarray, np.ndarray]:
            image, label = super().pair(split, "a")
            return image[::-1].copy(), label[::-1].copy()

    source = Made(camvid.root)
    data = StoredDataset(source)
    data.fill([("train", "a")], 1.0)
    assert len(files(data)) == 1
    same(data.pair("train", "a"), source.pair("train", "a"))
    image, label = camvid.pair("train", "a")
    same(data.pair("train", "a"), (image[::-1], label[::-1]))
