"""Label values through tables, and which of them occur: against NumPy's plain indexing and `unique`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cssbench.data.base import SegDataset, look_up
from cssbench.data.presence import build
from cssbench.errors import DataError

NOWHERE = Path("a.png")


class Tabled(SegDataset):
    """Label maps under one folder, with a table of one's own."""

    name = "tabled"
    splits = ("train",)

    def __init__(self, root: Path, table: np.ndarray, classes: int):
        super().__init__(root)
        self.table, self.classes = table, tuple(f"c{i}" for i in range(classes))

    def layout(self) -> str:
        return ""

    def folders(self, split: str) -> tuple[Path, Path]:
        return self.root, self.root

    def raw_table(self) -> np.ndarray:
        return self.table


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (7, 5), (2, 3, 4)])
def test_look_up_is_indexing(shape: tuple[int, ...]):
    rng = np.random.default_rng(0)
    table = rng.permutation(256).astype(np.uint8)
    values = rng.integers(0, 256, shape, dtype=np.uint8)
    for seen in (values, values.T, values[..., ::2]):
        found = look_up(table, seen)
        np.testing.assert_array_equal(found, table[seen])
        assert found.dtype == np.uint8
    found.fill(0)  # a new array that may be written; the input is left alone
    np.testing.assert_array_equal(look_up(table, values.astype(np.int64)), table[values])


def test_every_forbidden_value_is_found_even_with_all_class_ids_in_use(tmp_path):
    """254 classes and void: no value of a byte is free but those that are forbidden ones."""
    table = np.arange(256, dtype=np.int16)
    data = Tabled(tmp_path, table, 254)
    values = np.arange(256, dtype=np.uint8)[None]
    np.testing.assert_array_equal(data.to_ids(values, NOWHERE), values)
    table[[0, 17, 255]] = -1
    allowed = np.delete(values, [0, 17, 255], axis=1)
    np.testing.assert_array_equal(data.to_ids(allowed, NOWHERE), allowed)
    for wrong in (0, 17, 255):
        with pytest.raises(DataError, match=rf"a\.png holds the value\(s\) \[{wrong}\].*allowed: 1-16, 18-254\)"):
            data.to_ids(np.array([[5, wrong, 5]], np.uint8), NOWHERE)
    with pytest.raises(DataError, match=r"value\(s\) \[0, 17, 255\]"):
        data.to_ids(values, NOWHERE)


@pytest.mark.parametrize("cell", [1, 3, 8, 40])
def test_shown_classes_are_all_values_that_occur(tmp_path, cell: int):
    """Noise, small and large areas, single odd pixels at every place of a word, sizes that are no multiple of eight."""
    rng = np.random.default_rng(cell)
    table = np.append(rng.integers(0, 255, 255), 255).astype(np.int16)
    data = Tabled(tmp_path, table, 254)
    for number in range(40):
        height, width = rng.integers(1, 50, 2)
        raw = np.kron(rng.integers(0, 256, (50 // cell + 1,) * 2), np.ones((cell, cell)))[:height, :width]
        raw = raw.astype(np.uint8)
        raw.flat[rng.integers(raw.size)] = rng.integers(256)
        Image.fromarray(raw).save(tmp_path / f"{number}.png")
        expected = sorted({int(table[value]) for value in raw.ravel().tolist()})
        assert np.flatnonzero(data.shown("train", str(number))).tolist() == expected


def test_shown_refuses_what_label_refuses(tmp_path):
    table = np.arange(256, dtype=np.int16)
    table[9] = -1
    Image.fromarray(np.array([[1] * 30 + [9] + [1] * 30], np.uint8)).save(tmp_path / "x.png")
    data = Tabled(tmp_path, table, 254)
    for read in (data.label, data.shown):
        with pytest.raises(DataError, match=r"x\.png holds the value\(s\) \[9\]"):
            read("train", "x")


def test_a_plug_in_with_label_maps_of_its_own_is_asked(tmp_path):
    class Own(Tabled):
        def label(self, split: str, stem: str) -> np.ndarray:
            return np.array([[3, 255]], np.uint8)

    Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / "x.png")
    data = Own(tmp_path, np.arange(256, dtype=np.int16), 4)
    assert np.flatnonzero(data.shown("train", "x")).tolist() == [3, 255]
    assert build(data, "train", tmp_path / "cache", progress=False).table.tolist() == [[False] * 3 + [True, False]]
