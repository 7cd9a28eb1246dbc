"""The dataset contract on hand-made files, on every built-in dataset, and on the real data where they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cssbench import registry
from cssbench.data.ade20k import ADE20K
from cssbench.data.base import SegDataset, distinct_colours
from cssbench.data.camvid import CamVid
from cssbench.data.folder import EXAMPLE, Folder
from cssbench.errors import DataError


def put(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def gray(value: int, size: tuple[int, int] = (4, 6)) -> np.ndarray:
    return np.full((*size, 3), value, np.uint8)


def make_ade(root: Path) -> ADE20K:
    """One training image whose label map holds 0, 1, 150 and 255."""
    put(root / "images/training/a.jpg", gray(100))
    put(root / "annotations/training/a.png", np.array([[0, 1, 150, 255, 1, 1]] * 4, np.uint8))
    return ADE20K(root)


def make_camvid(root: Path) -> CamVid:
    put(root / "train/a.png", gray(100))
    put(root / "trainannot/a.png", np.array([[0, 10, 11]], np.uint8))
    return CamVid(root)


def make_folder(root: Path, toml: str, labels: np.ndarray | None = None) -> Folder:
    put(root / "photos/train/a.jpg", gray(7))
    if labels is not None:
        put(root / "masks/train/a.png", labels)
    (root / "dataset.toml").write_text(toml)
    return Folder(root)


SPLIT = '[splits.train]\nimages = "photos/train"\nlabels = "masks/train"\n'


def test_ade_labels_are_class_ids(tmp_path):
    data = make_ade(tmp_path)
    assert data.num_classes == 150
    assert data.classes[:2] == ("wall", "building")
    assert data.classes[-1] == "flag"
    assert len(set(data.classes)) == 150
    assert data.palette[2].tolist() == [6, 230, 230]  # sky
    assert data.stems("train") == ["a"]
    assert data.label("train", "a")[0].tolist() == [0, 1, 150, 255, 1, 1]
    assert data.image("train", "a").shape == (4, 6, 3)


def test_ade_accepts_the_parent_folder(tmp_path):
    make_ade(tmp_path / "ADEChallengeData2016")
    assert ADE20K(tmp_path).stems("train") == ["a"]


def test_camvid_moves_labels_up_by_one(tmp_path):
    data = make_camvid(tmp_path)
    assert data.label("train", "a").tolist() == [[1, 11, 0]]
    assert data.classes[0] == "sky"
    assert data.classes[10] == "bicyclist"
    assert data.palette[0].tolist() == [128, 128, 128]


@pytest.mark.parametrize("value", [12, 254, 255])
def test_camvid_refuses_other_values(tmp_path, value):
    data = make_camvid(tmp_path)
    put(tmp_path / "trainannot/a.png", np.full((1, 3), value, np.uint8))
    with pytest.raises(DataError, match=rf"a\.png holds the value\(s\) \[{value}\].*allowed: 0-11"):
        data.label("train", "a")


def test_palette_images_are_indices(tmp_path):
    data = make_ade(tmp_path)
    picture = Image.fromarray(np.array([[3, 4]], np.uint8)).convert("P")
    picture.putpalette([9] * 768)
    picture.save(tmp_path / "annotations/training/a.png")
    raw = np.asarray(picture)
    assert data.label("train", "a").tolist() == raw.tolist()


@pytest.mark.parametrize(("array", "mode"), [(np.ones((4, 6), np.uint16), "I;16"), (gray(1), "RGB")])
def test_wrong_label_modes_are_named(tmp_path, array, mode):
    data = make_ade(tmp_path)
    put(tmp_path / "annotations/training/a.png", array)
    with pytest.raises(DataError, match=f"a.png has pixel mode '{mode}'; expected 8-bit"):
        data.label("train", "a")


def test_out_of_range_label(tmp_path):
    data = make_ade(tmp_path)
    put(tmp_path / "annotations/training/a.png", np.array([[151, 200, 3]], np.uint8))
    with pytest.raises(DataError, match=r"\[151, 200\].*allowed: 0-150, 255"):
        data.label("train", "a")


def test_truncated_files_are_named(tmp_path):
    data = make_ade(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for path, read in (("images/training/a.jpg", data.image), ("annotations/training/a.png", data.label)):
        file = put(tmp_path / path, noise if path.endswith("jpg") else noise[..., 0])
        file.write_bytes(file.read_bytes()[:700])
        with pytest.raises(DataError, match=f"{file.name} cannot be read .*Fetch that file again"):
            read("train", "a")


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(DataError, match=r"not a folder. ADE20K is expected as"):
        ADE20K(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"No image \(.jpg, .jpeg, .png\) in .*ADE20K is expected as"):
        ADE20K(tmp_path).stems("train")
    data = make_ade(tmp_path)
    (tmp_path / "annotations/training/a.png").unlink()
    with pytest.raises(DataError, match="image 'a' has no label map at"):
        data.label("train", "a")
    with pytest.raises(DataError, match="No image 'b'"):
        data.image("train", "b")
    with pytest.raises(DataError, match=r"no split 'test'\. It has: train, val"):
        data.stems("test")
    assert data.has_images("train")
    assert not data.has_images("val")


def test_one_name_twice_is_refused(tmp_path):
    make_ade(tmp_path)
    put(tmp_path / "images/training/a.png", gray(1))
    with pytest.raises(DataError, match=r"a\.jpg and a\.png"):
        ADE20K(tmp_path).stems("train")


def test_stray_files_are_no_images(tmp_path):
    make_ade(tmp_path)
    (tmp_path / "images/training/._a.jpg").write_bytes(b"resource fork")
    (tmp_path / "images/training/Thumbs.db").write_bytes(b"")
    put(tmp_path / "images/training/0.JPG", gray(1))
    assert ADE20K(tmp_path).stems("train") == ["0", "a"]


def test_grey_images_become_rgb(tmp_path):
    data = make_ade(tmp_path)
    put(tmp_path / "images/training/a.jpg", np.full((4, 6), 9, np.uint8))
    image = data.image("train", "a")
    assert image.shape == (4, 6, 3)
    assert image.flags.writeable


def test_fingerprint_sees_what_it_says(tmp_path):
    data = make_ade(tmp_path)
    plain, timed, deep = (
        data.fingerprint("train"),
        data.fingerprint("train", times=True),
        data.fingerprint("train", True),
    )
    path = tmp_path / "annotations/training/a.png"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # same size, other content
    path.write_bytes(content)
    assert data.fingerprint("train") == plain
    assert data.fingerprint("train", times=True) != timed
    assert data.fingerprint("train", deep=True) != deep
    path.write_bytes(content + b"x")
    assert data.fingerprint("train") != plain


def test_folder_example_is_valid(tmp_path):
    data = make_folder(tmp_path, EXAMPLE, np.array([[0, 1, 2, 255]], np.uint8))
    assert data.name == "orchard"
    assert data.classes == ("trunk", "leaf", "fruit")
    assert data.splits == ("train",)
    assert data.label("train", "a").tolist() == [[1, 2, 3, 0]]
    assert Folder(tmp_path / "dataset.toml").stems("train") == ["a"]


@pytest.mark.parametrize(
    ("keys", "stored", "ids"),
    [
        ("", [0, 1, 2, 255], [0, 1, 2, 255]),
        ("offset = -10", [0, 11, 12, 255], [0, 1, 2, 255]),
        ("values = [7, 3]", [0, 3, 7], [0, 2, 1]),
        ("values = [7, 3]\nvoid = [0, 1, 255]", [0, 1, 3, 7, 255], [0, 0, 2, 1, 0]),
        ("values = [0, 255]", [0, 255], [1, 2]),
    ],
)
def test_folder_mappings(tmp_path, keys, stored, ids):
    data = make_folder(tmp_path, f'classes = ["x", "y"]\n{keys}\n{SPLIT}', np.array([stored], np.uint8))
    assert data.label("train", "a").tolist() == [ids]


def test_folder_refuses_undeclared_values(tmp_path):
    data = make_folder(tmp_path, f'classes = ["x", "y"]\nvoid = [9]\n{SPLIT}', np.array([[0, 1]], np.uint8))
    with pytest.raises(DataError, match=r"\[0\].*allowed: 1-2, 9, 255"):
        data.label("train", "a")


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ('classes = ["x"]\nofset = 1\n' + SPLIT, "unknown key 'ofset' .did you mean 'offset'"),
        ('classes = ["x"]\n', "'splits' is missing"),
        ("classes = []\n" + SPLIT, "'classes'"),
        ('classes = ["x", "x"]\n' + SPLIT, "repeats one"),
        ('classes = ["x"]\ncolours = [[1, 2, 3], [4, 5, 6]]\n' + SPLIT, "2 entries for 1 classes"),
        ('classes = ["x"]\ncolours = [[1, 2, 300]]\n' + SPLIT, "less than or equal to 255"),
        ('classes = ["x"]\nvalues = [1, 2]\n' + SPLIT, "2 entries for 1 classes"),
        ('classes = ["x", "y"]\nvalues = [1, 1]\n' + SPLIT, "two classes the same stored value"),
        ('classes = ["x"]\nvalues = [1]\noffset = 1\n' + SPLIT, "not both"),
        ('classes = ["x"]\noffset = 2\n' + SPLIT, "stored values -1 to -1"),
        ('classes = ["x"]\nvoid = [1]\n' + SPLIT, "stored value 1 is a class and void"),
        ("classes = [", "not valid TOML"),
    ],
)
def test_folder_explains_a_bad_toml(tmp_path, toml, message):
    with pytest.raises(DataError, match=message) as caught:
        make_folder(tmp_path, toml)
    assert "dataset.toml" in str(caught.value)


def test_folder_without_toml_shows_one(tmp_path):
    with pytest.raises(DataError, match=r"(?s)dataset.toml cannot be read.*splits.train"):
        Folder(tmp_path)


def test_folder_palettes(tmp_path):
    names = [f"c{i}" for i in range(200)]
    made = make_folder(tmp_path, f"classes = {names}\n{SPLIT}").palette
    assert made.shape == (200, 3)
    assert len(np.unique(made, axis=0)) == 200
    given = make_folder(tmp_path, f'classes = ["x"]\ncolours = [[1, 2, 3]]\n{SPLIT}').palette
    assert given.tolist() == [[1, 2, 3]]


def test_distinct_colours_keep_what_is_free():
    wanted = np.array([[200, 0, 0], [200, 0, 0], [0, 0, 0]])
    found = distinct_colours(wanted).astype(int)
    assert found[0].tolist() == [200, 0, 0]
    with_black = np.vstack([found, [[0, 0, 0]]])
    gaps = abs(with_black[:, None] - with_black[None]).max(axis=2)
    assert (gaps + 99 * np.eye(4) >= 12).all()


@pytest.mark.parametrize("name", sorted(registry.parts("datasets")))
def test_registered_datasets_keep_the_contract(name):
    cls = registry.load("datasets", name)
    assert issubclass(cls, SegDataset)
    assert "train" in cls.splits
    assert cls.__doc__


def test_real_camvid(shared_data):
    data = CamVid(shared_data / "camvid")
    assert [len(data.stems(split)) for split in data.splits] == [367, 101, 233]
    stem = data.stems("val")[0]
    label = data.label("val", stem)
    assert label.shape == data.image("val", stem).shape[:2] == (360, 480)
    assert set(np.unique(label)) <= set(range(12))


def test_real_ade_sample(shared_data):
    data = ADE20K(shared_data / "ade20k_sample")
    assert data.stems("val") == [f"ADE_val_{i:08d}" for i in (1, 2, 3)]
    for split in data.splits:
        for stem in data.stems(split):
            assert data.label(split, stem).shape == data.image(split, stem).shape[:2]
    colours = np.loadtxt(shared_data / "ade20k_sample/color150.csv", int, delimiter=",", skiprows=1)
    assert data.palette.tolist() == colours.tolist()
