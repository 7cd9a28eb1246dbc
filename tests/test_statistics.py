"""`cssbench data stats`: classes counted by hand, in every mode."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cssbench.data.statistics import count_pixels, frequencies
from cssbench.errors import ScenarioError
from cssbench.scenario import from_dict

NAMES = ["sky", "road", "car"]
# Four label maps of two by four pixels: class 1 and 2 at step 0, class 3 at step 1, 0 = void, 255 = ignored.
MAPS = {
    "a": [[1, 1, 1, 1], [2, 2, 0, 255]],
    "b": [[1, 1, 3, 3], [3, 3, 0, 0]],
    "c": [[3, 3, 3, 3], [3, 3, 3, 3]],
    "d": [[0, 0, 0, 0], [0, 0, 0, 2]],
}
COUNTS = np.stack([np.bincount(np.ravel(m), minlength=256) for m in MAPS.values()])


def scene(**changes):
    return from_dict("tiny", {"dataset": "folder", "classes": 3, "base": 2, "increment": 1} | changes)


def shown(mode: str, **changes) -> list[tuple[int, dict[str, tuple[str, str, int, int]]]]:
    steps = frequencies(scene(mode=mode, **changes), COUNTS, NAMES)
    return [(s.images, {r.name: (r.kind, r.seen_as, r.images, r.pixels) for r in s.rows}) for s in steps]


def test_overlapped_by_hand():
    first, second = shown("overlapped")
    assert first == (3, {  # a, b, d
        "sky": ("new", "class", 2, 6), "road": ("new", "class", 2, 3), "car": ("future", "background", 1, 4),
        "void": ("void", "background", 3, 10), "padding": ("padding", "ignored", 1, 1),
    })  # fmt: skip
    assert second == (2, {  # b, c
        "sky": ("old", "background", 1, 2), "car": ("new", "class", 2, 12), "void": ("void", "background", 1, 2),
    })  # fmt: skip


def test_disjoint_and_sequential_by_hand():
    first, second = shown("disjoint")
    assert first == (2, {  # a, d: b shows the later class
        "sky": ("new", "class", 1, 4), "road": ("new", "class", 2, 3), "void": ("void", "background", 2, 8),
        "padding": ("padding", "ignored", 1, 1),
    })  # fmt: skip
    assert second[1]["sky"] == ("old", "background", 1, 2)
    assert shown("sequential")[1][1]["sky"] == ("old", "class", 1, 2), "old labels are kept there"


def test_partitioned_uses_each_image_once_and_void_can_be_ignored():
    assert sum(images for images, _ in shown("partitioned")) == len(MAPS)
    assert shown("overlapped", void="ignore")[0][1]["void"] == ("void", "ignored", 3, 10)


def test_shares_add_up():
    for step in frequencies(scene(), COUNTS, NAMES):
        assert sum(row.share for row in step.rows) == pytest.approx(1)
    assert step.share("new") == pytest.approx(12 / 16)
    assert step.share("old", seen_as="background") == pytest.approx(2 / 16)
    assert step.share("old", seen_as="class") == 0
    with pytest.raises(ScenarioError, match="no training image"):
        frequencies(scene(), COUNTS[:1], NAMES)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The four label maps as a folder dataset, and a scenario."""
    root = tmp_path / "data"
    for name, values in MAPS.items():
        for folder, array in (("x", np.zeros((2, 4, 3))), ("y", np.array(values))):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array.astype(np.uint8)).save(root / folder / f"{name}.png")
    (root / "dataset.toml").write_text(
        'classes = ["sky", "road", "car"]\n[splits.train]\nimages = "x"\nlabels = "y"\n', encoding="utf-8"
    )
    (root / "tiny.toml").write_text('dataset = "folder"\nclasses = 3\nbase = 2\nincrement = 1\n', encoding="utf-8")
    return root


def test_the_command_writes_a_table_and_a_picture_of_every_mode(command, root: Path, tmp_path: Path):
    words = ["data", "stats", root, "--scenario", root / "tiny.toml", "--mode", "all", "--out", tmp_path / "out"]
    code, out, err = command(*words)
    assert (code, err) == (0, "")
    modes = ("overlapped", "disjoint", "sequential", "partitioned")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        ["frequencies.csv", *(f"frequencies.{mode}.png" for mode in modes)]
    )
    with Image.open(tmp_path / "out" / "frequencies.overlapped.png") as picture:
        assert min(picture.size) > 500
    rows = list(csv.DictReader((tmp_path / "out" / "frequencies.csv").read_text(encoding="utf-8").splitlines()))
    (car,) = [r for r in rows if (r["mode"], r["step"], r["name"]) == ("overlapped", "1", "car")]
    assert (car["class_id"], car["learned"], car["images"], car["pixels"]) == ("3", "1", "2", "12")
    assert float(car["share"]) == 0.75
    assert "75.000" in out


def test_without_out_nothing_is_written(command, root: Path):
    before = sorted(root.rglob("*"))
    assert command("data", "stats", root, "--scenario", root / "tiny.toml")[0] == 0
    assert sorted(root.rglob("*")) == before


def test_counts_of_a_dataset(synthetic):
    counts = count_pixels(synthetic, "val", progress=False)
    assert counts.shape == (8, 256)
    assert (counts.sum(axis=1) == 32 * 32).all()
