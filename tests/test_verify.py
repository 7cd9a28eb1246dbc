"""Every fault of a data root is named, with the file it is in."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from cssbench.data.ade20k import ADE20K
from cssbench.data.camvid import CamVid
from cssbench.data.verify import verify
from cssbench.errors import DataError


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def ade(tmp_path):
    """A root with 12 sound training pairs and one sound validation pair."""
    noise = np.random.default_rng(0).integers(0, 151, (20, 30, 3), dtype=np.uint8)
    for folder, count in (("training", 12), ("validation", 1)):
        for i in range(count):
            save(tmp_path / f"images/{folder}/{i:02d}.jpg", noise)
            save(tmp_path / f"annotations/{folder}/{i:02d}.png", noise[..., 0])
    return tmp_path


def test_sound_roots_have_no_problem(ade, synthetic):
    assert verify(ADE20K(ade)) == []
    assert verify(synthetic) == []


def test_every_fault_is_named(ade):
    images, labels = ade / "images/training", ade / "annotations/training"
    (labels / "00.png").unlink()
    (images / "01.jpg").unlink()
    (images / "02.jpg").write_bytes((images / "02.jpg").read_bytes()[:-200])
    (labels / "03.png").write_bytes((labels / "03.png").read_bytes()[:200])
    save(labels / "04.png", np.zeros((20, 30), np.uint16))
    save(labels / "05.png", np.zeros((20, 30, 3), np.uint8))
    save(labels / "06.png", np.zeros((30, 20), np.uint8))
    save(labels / "07.png", np.full((20, 30), 151, np.uint8))
    (images / "08.jpg").write_bytes(b"")
    (labels / "08.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    save(images / "09.png", np.zeros((20, 30, 3), np.uint8))
    (labels / "._00.png").write_bytes(b"a resource fork is nobody's label map")
    expected = [
        ("training", "09.jpg and 09.png"),
        ("01.png", "label map without an image"),
        ("00.jpg", f"image without a label map (expected at {labels / '00.png'})"),
        ("02.jpg", "The image cannot be read (image file is truncated"),
        ("03.png", "The label map cannot be read"),
        ("04.png", "The label map has pixel mode 'I;16'"),
        ("05.png", "The label map has pixel mode 'RGB'"),
        ("06.png", "the label map is 20x30 px, its image 30x20 px"),
        ("07.png", "The label map holds the value(s) [151]"),
        ("08.jpg", "The image cannot be read"),
        ("08.png", "The label map cannot be read"),
    ]
    problems = verify(ADE20K(ade))
    assert [p.path.name for p in problems] == [name for name, _ in expected]
    for problem, (_, text) in zip(problems, expected, strict=True):
        assert text in problem.what
        assert not problem.what.startswith(f"The image {problem.path}")
    assert verify(ADE20K(ade), ["val"]) == []


def test_missing_folders_are_a_problem_each(ade):
    (ade / "images/validation/00.jpg").unlink()
    (ade / "annotations/validation/00.png").unlink()
    (problem,) = verify(ADE20K(ade))
    assert problem.path == ade / "images/validation"
    assert "No image" in problem.what
    assert len(verify(CamVid(ade))) == 3


def test_unknown_split(ade):
    with pytest.raises(DataError, match="no split 'test'"):
        verify(ADE20K(ade), ["test"])


def test_real_sample_is_whole(shared_data):
    assert verify(ADE20K(shared_data / "ade20k_sample")) == []
    assert verify(CamVid(shared_data / "camvid"), ["val"]) == []
