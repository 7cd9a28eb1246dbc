"""The presence index: counts by hand, its cache, and the import of class lists."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from cssbench.data import presence
from cssbench.data.ade20k import ADE20K
from cssbench.data.camvid import CamVid
from cssbench.data.presence import build, from_class_lists
from cssbench.errors import DataError


@pytest.fixture
def camvid(tmp_path):
    """Two images: a shows sky (stored 0) and void, b shows sky and bicyclist (stored 10)."""
    for stem, stored in (("b", [0, 10]), ("a", [0, 11])):
        for folder, array in (("val", np.zeros((1, 2, 3), np.uint8)), ("valannot", np.array([stored], np.uint8))):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(array).save(tmp_path / folder / f"{stem}.png")
    return CamVid(tmp_path)


def test_table_by_hand(camvid, tmp_path):
    index = build(camvid, "val", tmp_path / "cache")
    assert index.stems == ["a", "b"]
    assert index.table.shape == (2, 12)
    assert [np.flatnonzero(row).tolist() for row in index.table] == [[0, 1], [1, 11]]
    part = index.subset([1])
    assert part.stems == ["b"]
    assert part.table.tolist() == index.table[1:].tolist()
    assert index.subset(np.array([], int)).stems == []


def test_second_build_reads_no_label(camvid, tmp_path, monkeypatch):
    first = build(camvid, "val", tmp_path / "cache")
    monkeypatch.setattr(CamVid, "label", None)
    assert (build(camvid, "val", tmp_path / "cache").table == first.table).all()
    assert len(list((tmp_path / "cache").iterdir())) == 1  # and no temporary file


def test_changed_labels_are_read_again(camvid, tmp_path):
    build(camvid, "val", tmp_path / "cache")
    Image.fromarray(np.array([[4, 4, 4]], np.uint8)).save(camvid.label_path("val", "a"))
    assert np.flatnonzero(build(camvid, "val", tmp_path / "cache").table[0]).tolist() == [5]


def test_another_label_table_is_another_cache(camvid, tmp_path, monkeypatch):
    build(camvid, "val", tmp_path / "cache")
    monkeypatch.setattr(CamVid, "raw_table", lambda self: np.full(256, 3, np.int16))
    assert np.flatnonzero(build(camvid, "val", tmp_path / "cache").table[0]).tolist() == [3]


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut off"])
def test_damaged_cache_is_built_again(camvid, tmp_path, content):
    first = build(camvid, "val", tmp_path / "cache")
    (cached,) = (tmp_path / "cache").iterdir()
    sound = cached.read_bytes()
    for damaged in (content, sound[: len(sound) // 2], sound[:-3], sound[:60] + b"\xff" * 9 + sound[69:]):
        cached.write_bytes(damaged)
        assert (build(camvid, "val", tmp_path / "cache").table == first.table).all()
        assert cached.read_bytes() == sound


@pytest.mark.parametrize("arrays", [{}, {"table": np.zeros((2, 5), bool)}, {"table": np.array([None], object)}])
def test_foreign_cache_is_built_again(camvid, tmp_path, arrays):
    first = build(camvid, "val", tmp_path / "cache")
    (cached,) = (tmp_path / "cache").iterdir()
    np.savez(cached, **arrays)
    assert (build(camvid, "val", tmp_path / "cache").table == first.table).all()


def test_cache_is_the_one_of_the_environment(camvid, tmp_path, monkeypatch):
    monkeypatch.setenv("CSSBENCH_CACHE", str(tmp_path / "elsewhere"))
    build(camvid, "val")
    assert [p.suffix for p in (tmp_path / "elsewhere").iterdir()] == [".npz"]
    monkeypatch.delenv("CSSBENCH_CACHE")
    assert presence.cache_folder().parts[-2:] == (".cache", "cssbench")


def test_unwritable_cache_is_done_without(camvid, tmp_path):
    (tmp_path / "file").write_text("")
    assert build(camvid, "val", tmp_path / "file" / "cache").table.sum() == 4


def test_bad_label_is_named(camvid, tmp_path):
    Image.fromarray(np.array([[77]], np.uint8)).save(camvid.label_path("val", "b"))
    with pytest.raises(DataError, match=r"b\.png holds the value\(s\) \[77\]"):
        build(camvid, "val", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_synthetic_agrees_with_its_labels(synthetic, tmp_path):
    index = build(synthetic, "train", tmp_path, deep=True)
    for stem, row in zip(index.stems, index.table, strict=True):
        assert np.flatnonzero(row).tolist() == np.unique(synthetic.label("train", stem)).tolist()


def test_class_lists_by_hand(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("a 0 2\n\nb\nc 1\n")
    index = from_class_lists(path, 3)
    assert index.stems == ["a", "b", "c"]
    assert [np.flatnonzero(row).tolist() for row in index.table] == [[1, 3], [], [2]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a 0\nb 3\n", "line 2: id 3 is out of range; ids are 0 to 2"),
        ("a 0\nb -1\n", "line 2: expected `name id id"),
        ("a 0\nb x\n", "line 2: expected `name id id"),
        ("a 0,1\n", "line 1: expected `name id id"),
        ("a 0\n\na 1\n", "line 3: the image 'a' is listed twice"),
        ("\n", "is empty"),
        ("", "is empty"),
    ],
)
def test_bad_class_lists(tmp_path, text, message):
    path = tmp_path / "list.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        from_class_lists(path, 3)


def test_class_list_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        from_class_lists(tmp_path / "nothing.txt", 3)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        from_class_lists(tmp_path / "binary", 3)


def test_real_labels_agree_with_the_published_lists(shared_data, tmp_path):
    data = ADE20K(shared_data / "ade20k_sample")
    for split, name in (("train", "train_cls.txt"), ("val", "val_cls.txt")):
        listed = from_class_lists(shared_data / "ade20k_index" / name, 150)
        rows = [listed.stems.index(stem) for stem in data.stems(split)]
        assert (build(data, split, tmp_path).table[:, 1:] == listed.subset(rows).table[:, 1:]).all()


def test_real_camvid_counts(shared_data, tmp_path):
    index = build(CamVid(shared_data / "camvid"), "val", tmp_path)
    assert len(index.stems) == 101
    assert index.table[:, 4].all()  # road is in every image
