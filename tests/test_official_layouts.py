"""PASCAL VOC, PASCAL-Context, COCO-Stuff 10K and Cityscapes: layouts and encodings as published, and their mistakes."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from dataset_trees import augment, city_tree, gray, mat, photo, png, voc_tree

from cssbench import scenario
from cssbench.data.base import class_ids, read_classes
from cssbench.data.cityscapes import Cityscapes
from cssbench.data.coco_stuff import COCOStuff10K
from cssbench.data.matlab import read_matrix
from cssbench.data.pascal_context import PascalContext, PascalContext60
from cssbench.data.statistics import count_pixels, frequencies
from cssbench.data.voc import VOC
from cssbench.errors import ConfigError, DataError

MAP = gray([0, 0, 255, 20], [1, 255, 15, 20])
LABELS = {"train": {"2007_000032": MAP, "2007_000039": gray([0, 5])}, "val": {"2007_000033": gray([0, 255, 7])}}


# PASCAL VOC


@pytest.mark.parametrize("given", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc_keeps_background_classes_and_borders(tmp_path, given):
    voc_tree(tmp_path, LABELS)
    data = VOC(tmp_path / given)
    assert data.stems("train") == ["2007_000032", "2007_000039"]
    assert data.stems("val") == ["2007_000033"]
    assert data.label("train", "2007_000032").tolist() == MAP.tolist()
    assert data.pair("val", "2007_000033")[0].shape == (1, 3, 3)
    assert data.background_class
    assert (data.classes[0], data.classes[14], data.classes[19]) == ("aeroplane", "person", "tvmonitor")
    assert data.palette[14].tolist() == [192, 128, 128]  # person, as in the development kit


@pytest.mark.parametrize(
    ("place", "form"),
    [
        ("VOCdevkit/VOC2012/ImageSets/Segmentation/trainaug.txt", "{0}"),
        ("list/train_aug.txt", "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png"),
    ],
)
def test_the_augmented_list_is_read_where_it_is(tmp_path, place, form):
    voc = voc_tree(tmp_path, LABELS)
    augment(voc, {"2008_000001": gray([0, 9])}, tmp_path / place, form)
    png(voc / "SegmentationClassAug/2007_000032.png", gray([0, 1]))  # VOC's own annotation goes before SBD's
    for option in ({}, {"train": "trainaug"}):
        data = VOC(tmp_path, **option)
        assert data.stems("train") == ["2007_000032", "2007_000039", "2008_000001"]
        assert data.label("train", "2008_000001").tolist() == [[0, 9]]
        assert data.label("train", "2007_000032").tolist() == MAP.tolist()
        assert data.stems("val") == ["2007_000033"]
    assert VOC(tmp_path, train="train").stems("train") == ["2007_000032", "2007_000039"]


def test_what_the_augmented_list_lacks_is_named(tmp_path):
    voc = voc_tree(tmp_path, LABELS)
    with pytest.raises(DataError, match=r"no list .*trainaug\.txt.*SBD.*or set 'train'"):
        VOC(tmp_path, train="trainaug")
    (voc / "ImageSets/Segmentation/trainaug.txt").write_text("2007_000032\n")
    with pytest.raises(DataError, match=r"no folder .*SegmentationClassAug"):
        VOC(tmp_path, train="trainaug")
    assert len(VOC(tmp_path).stems("train")) == 2  # auto takes VOC's own
    with pytest.raises(ConfigError, match=r"must be auto, train, trainaug, not 'aug'"):
        VOC(tmp_path, train="aug")


def test_voc_mistakes(tmp_path):
    with pytest.raises(DataError, match=r"no list of the train images .*train\.txt\. VOC 2012 is expected as"):
        VOC(tmp_path).stems("train")
    assert not VOC(tmp_path).has_images("train")
    voc = voc_tree(tmp_path, LABELS)
    (voc / "JPEGImages/2007_000039.jpg").unlink()
    with pytest.raises(DataError, match=r"train\.txt names 1 images that are not in .*JPEGImages.*2007_000039\.jpg"):
        VOC(tmp_path).stems("train")
    (voc / "SegmentationClass/2007_000033.png").unlink()
    with pytest.raises(DataError, match="'2007_000033' has no label map at"):
        VOC(tmp_path).label("val", "2007_000033")
    png(voc / "SegmentationClass/2007_000032.png", np.zeros((2, 4, 3), np.uint8))
    with pytest.raises(DataError, match="has pixel mode 'RGB'; expected 8-bit single-channel"):
        VOC(tmp_path).label("train", "2007_000032")
    png(voc / "SegmentationClass/2007_000032.png", gray([21, 0]))
    with pytest.raises(DataError, match=r"\[21\].*allowed: 0-20, 255"):
        VOC(tmp_path).label("train", "2007_000032")
    names = voc / "ImageSets/Segmentation/train.txt"
    names.write_text("2007_000032\n2007_000032\n")
    with pytest.raises(DataError, match="names '2007_000032' twice"):
        VOC(tmp_path).stems("train")
    names.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"The list .*train\.txt cannot be read"):
        VOC(tmp_path).stems("train")


def test_verify_names_every_missing_file_of_a_list(tmp_path, command):
    voc = voc_tree(tmp_path, LABELS)
    assert command("data", "verify", tmp_path)[1] == f"voc at {tmp_path}: 2 train, 1 val images, 0 problems\n"
    (voc / "JPEGImages/2007_000039.jpg").unlink()
    (voc / "SegmentationClass/2007_000033.png").unlink()
    code, out, _ = command("data", "verify", tmp_path)
    assert (code, "2007_000039.jpg: the image is missing" in out) == (2, True)
    assert "2007_000033.jpg: image without a label map" in out
    assert "2 train, 1 val images, 3 problems" in out  # the list that names a missing image is one too


# PASCAL-Context


def context_tree(root, kind):
    voc = root / "VOC2010"
    for split, name in (("train", "2008_000002"), ("val", "2008_000003")):
        photo(voc / "JPEGImages" / f"{name}.jpg", (1, 4))
        sets = voc / "ImageSets" / ("SegmentationContext" if kind == "png" else "Main") / f"{split}.txt"
        sets.parent.mkdir(parents=True, exist_ok=True)
        sets.write_text(f"{name}\n")
        if kind == "png":
            png(voc / f"SegmentationClassContext/{name}.png", gray([0, 1, 59, 37]))
        else:  # 431 is none of the 59
            mat(root / "trainval" / f"{name}.mat", LabelMap=np.array([[431, 2, 458, 284]], "u2"))
    return root


@pytest.mark.parametrize("kind", ["png", "mat"])
def test_both_encodings_of_context_are_the_same(tmp_path, kind):
    data = PascalContext(context_tree(tmp_path, kind))
    assert (data.stems("train"), data.stems("val")) == (["2008_000002"], ["2008_000003"])
    assert data.label("train", "2008_000002").tolist() == [[0, 1, 59, 37]]
    assert [data.classes[i - 1] for i in (1, 59, 37)] == ["aeroplane", "wood", "person"]
    assert (data.background_class, PascalContext60(tmp_path).background_class) == (False, True)
    assert PascalContext60(tmp_path).label("val", "2008_000003").tolist() == [[0, 1, 59, 37]]


def test_context_mistakes(tmp_path):
    context_tree(tmp_path, "mat")
    data = PascalContext(tmp_path)
    mat(tmp_path / "trainval/2008_000002.mat", LabelMap=np.array([[460, 2]], "u2"))
    with pytest.raises(DataError, match="holds the value 460; expected are the official labels 1 to 459"):
        data.label("train", "2008_000002")
    (tmp_path / "trainval/2008_000002.mat").unlink()
    with pytest.raises(DataError, match=r"has no label map at .*PASCAL-Context is expected as"):
        data.label("train", "2008_000002")


def test_the_59_classes_are_in_the_order_of_the_official_459():
    ids = class_ids("pascal_context.csv")
    names, colours = read_classes("pascal_context.csv")
    assert (len(ids), list(ids)) == (59, sorted(set(ids)))
    assert list(names) == sorted(names)
    assert dict(zip(names, ids, strict=True))["person"] == 284
    assert len({tuple(c) for c in colours.tolist()}) == 59


# COCO-Stuff 10K

THINGS = {"train": "COCO_train2014_000000000077", "test": "COCO_train2014_000000000086"}


def stuff_tree(root, kind):
    official = np.array([[0, 1, 13, 90], [92, 182, 31, 11]], "u2")
    for split, name in THINGS.items():
        part = f"{split}2014/" if kind == "converted" else ""
        photo(root / f"images/{part}{name}.jpg", (2, 4))
        if kind == "mat":
            mat(root / f"annotations/{name}.mat", names=np.zeros((1, 1)), S=official)
        elif kind == "png":
            png(root / f"annotations/{name}.png", official.astype(np.uint8))
        else:
            converted = gray([0, 1, 12, 80], [81, 171, 27, 11])
            png(root / f"annotations/{part}{name}_labelTrainIds.png", converted)
        if kind != "converted":
            (root / "imageLists").mkdir(exist_ok=True)
            (root / f"imageLists/{split}.txt").write_text(name + "\n")
    return root


@pytest.mark.parametrize("kind", ["mat", "png", "converted"])
def test_all_encodings_of_coco_stuff_are_the_same(tmp_path, kind):
    data = COCOStuff10K(stuff_tree(tmp_path, kind))
    assert data.splits == ("train", "test")
    for split, name in THINGS.items():
        assert data.stems(split) == [name]
        assert data.label(split, name).tolist() == [[0, 1, 12, 80], [81, 171, 27, 11]]
    named = [data.classes[i - 1] for i in (1, 12, 80, 81, 171, 27)]
    assert named == ["person", "stop sign", "toothbrush", "banner", "wood", "handbag"]


@pytest.mark.parametrize("kind", ["mat", "png", "converted"])
def test_coco_stuff_mistakes(tmp_path, kind):
    stuff_tree(tmp_path, kind)
    name = THINGS["train"]
    data = COCOStuff10K(tmp_path)
    if kind == "mat":
        mat(tmp_path / f"annotations/{name}.mat", S=np.array([[300]], "u2"))
        expected = "holds the value 300; expected are label ids 0 to 182"
    elif kind == "png":
        png(tmp_path / f"annotations/{name}.png", gray([12, 66]))  # labels that COCO never annotated
        expected = r"holds the value\(s\) \[12, 66\]"
    else:
        png(tmp_path / f"annotations/train2014/{name}_labelTrainIds.png", gray([172]))
        expected = "allowed: 0-171, 255"
    with pytest.raises(DataError, match=expected):
        data.label("train", name)
    with pytest.raises(DataError, match=r"no split 'val'\. It has: train, test"):
        data.stems("val")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="COCO-Stuff 10K is expected as"):
        COCOStuff10K(tmp_path / "empty").stems("train")


# MAT-files

SCIPY = (
    "AAAAAAAAAAAAAUlNDwAAADUAAAB4nONjYGDIAGI2IOYAYkYGCGBF4sMwiJ+cWFCSmZ9XzAdkGyDpY8GjDwQEgKxEIA0AH5wE0Q8AAAAzAAAAeJzj"
    "Y2BgcABiNiDmAGJuBghghfKZgJgZiBmBMBhIswAxD1iFDiMjUNU2BnYwDwAxOwHP"
)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("kind", ["u1", "u2", "i2", "f8"])
def test_matrices_are_read_column_by_column(tmp_path, compress, kind):
    values = np.array([[1, 2, 3], [4, 5, 250 if kind == "u1" else 300]], kind)
    path = mat(tmp_path / "a.mat", compress, other=np.zeros((2, 2), "f8"), S=values)
    assert read_matrix(path, "S").tolist() == values.tolist()


def test_a_file_that_scipy_wrote(tmp_path):
    """savemat({"captions": {"a"}, "S": uint16 [[0, 1, 182], [300, 5, 7]]}, do_compression=True) of SciPy 1.17.1, from
    byte 116 on; before it is text."""
    path = tmp_path / "a.mat"
    path.write_bytes(b"MATLAB 5.0 MAT-file".ljust(116) + base64.b64decode(SCIPY))
    assert read_matrix(path, "S").tolist() == [[0, 1, 182], [300, 5, 7]]
    with pytest.raises(DataError, match="'captions' is not a 2-D matrix of real numbers"):
        read_matrix(path, "captions")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c[:200], "it is cut off|it is damaged"),
        (lambda c: b"MATLAB 7.3 MAT-file" + c[19:], "it is of version 7.3, which is HDF5"),
        (lambda c: b"hello", "it is not a MAT-file of version 5"),
        (lambda c: c[:150] + bytes(40) + c[190:], "it is damaged|it has no variable"),
    ],
)
def test_damaged_mat_files_are_one_data_error(tmp_path, damage, message):
    noise = np.random.default_rng(0).integers(0, 180, (40, 40)).astype("u1")
    path = mat(tmp_path / "a.mat", S=noise)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=rf"a\.mat cannot be read \(({message})"):
        read_matrix(path, "S")


def test_a_mat_file_without_the_variable_names_what_it_has(tmp_path):
    path = mat(tmp_path / "a.mat", LabelMap=np.zeros((2, 2), "u1"))
    with pytest.raises(DataError, match=r"no variable 'S', only LabelMap"):
        read_matrix(path, "S")
    with pytest.raises(DataError, match="No such file"):
        read_matrix(tmp_path / "b.mat", "S")


# Cityscapes

STREETS = {
    ("train", "aachen", "000000"): [[7, 8, 33, 0], [1, 26, 9, 23]],
    ("train", "zurich", "000001"): [[17, 17, 17, 4]],
    ("val", "frankfurt", "000000"): [[31, 30, 24, 25]],
}
CLASSES = {
    "aachen_000000_000019": [[1, 2, 19, 255], [255, 14, 255, 11]],
    "zurich_000001_000019": [[6, 6, 6, 255]],
    "frankfurt_000000_000019": [[17, 255, 12, 13]],
}


@pytest.mark.parametrize("kind", ["labelIds", "labelTrainIds"])
def test_cityscapes_reads_both_encodings(tmp_path, kind):
    official = dict(zip(class_ids("cityscapes.csv"), range(19), strict=True))
    stored = {
        key: gray(*([official.get(v, 255) if kind == "labelTrainIds" else v for v in row] for row in rows))
        for key, rows in STREETS.items()
    }
    data = Cityscapes(city_tree(tmp_path, kind, stored))
    assert data.stems("train") == ["aachen_000000_000019", "zurich_000001_000019"]
    assert data.stems("val") == ["frankfurt_000000_000019"]
    for split in data.splits:
        for stem in data.stems(split):
            assert data.label(split, stem).tolist() == CLASSES[stem]
            assert data.pair(split, stem)[0].shape[2] == 3
    assert (data.classes[0], data.classes[18]) == ("road", "bicycle")
    assert data.palette[10].tolist() == [70, 130, 180]  # sky


def test_cityscapes_prefers_label_ids_and_finds_strays(tmp_path, command):
    stored = {key: gray(*rows) for key, rows in STREETS.items()}
    city_tree(tmp_path, "labelTrainIds", {key: gray([0] * 4) for key in STREETS})
    city_tree(tmp_path, "labelIds", stored)
    assert Cityscapes(tmp_path).label("train", "zurich_000001_000019").tolist() == [[6, 6, 6, 255]]
    png(tmp_path / "gtFine/train/aachen/aachen_000009_000019_gtFine_labelIds.png", gray([7]))
    code, out, _ = command("data", "verify", tmp_path)
    assert (code, "aachen_000009_000019_gtFine_labelIds.png: label map without an image" in out) == (2, True)
    assert "cityscapes at" in out


def test_cityscapes_mistakes(tmp_path):
    with pytest.raises(DataError, match=r"Cityscapes is expected as .*unpacked into one folder"):
        Cityscapes(tmp_path).stems("train")
    city_tree(tmp_path, "labelIds", {("train", "bonn", "000000"): gray([34, 7])})
    data = Cityscapes(tmp_path)
    with pytest.raises(DataError, match=r"\[34\].*allowed: 0-33, 255"):
        data.label("train", "bonn_000000_000019")
    with pytest.raises(DataError, match="no split 'test'"):
        data.stems("test")
    photo(tmp_path / "leftImg8bit/train/bonn/bonn_1.png", (1, 2))
    with pytest.raises(DataError, match=r"bonn_1\.png is not named <city>_<sequence>_<frame>_leftImg8bit\.png"):
        Cityscapes(tmp_path).stems("train")


# what the command line tells


@pytest.mark.parametrize("name", ["voc", "pascal-context", "coco-stuff-10k", "cityscapes"])
def test_the_command_line_tells_them_from_their_folders(tmp_path, command, name):
    if name == "voc":
        voc_tree(tmp_path, LABELS)
    elif name == "pascal-context":
        context_tree(tmp_path, "mat")
    elif name == "coco-stuff-10k":
        stuff_tree(tmp_path, "converted")
    else:
        city_tree(tmp_path, "labelIds", {key: gray(*rows) for key, rows in STREETS.items()})
    for verb in ("verify", "index"):
        code, out, _ = command("data", verb, tmp_path)
        assert (code, f"{name} at" in out) == (0, True)
    assert ("0  background" in out) == (name == "voc")


def test_stats_name_background_where_it_is_a_class(tmp_path):
    voc_tree(tmp_path, LABELS)
    data, scene = (
        VOC(tmp_path),
        scenario.from_dict("two", {"dataset": "voc", "classes": 20, "base": 5, "increment": 15}),
    )
    for named, expected in ((data.background_class, "background"), (False, "void")):
        first, _ = frequencies(scene, count_pixels(data), data.classes, named)
        zero = next(row for row in first.rows if row.class_id == 0)
        assert (zero.name, zero.seen_as, zero.pixels) == (expected, "background", 3)


SIZES = {
    "voc-19-1": [19, 1],
    "voc-15-5": [15, 5],
    "voc-15-1": [15, 1, 1, 1, 1, 1],
    "voc-10-1": [10] + [1] * 10,
    "cityscapes-14-1": [14, 1, 1, 1, 1, 1],
    "cityscapes-10-1": [10] + [1] * 9,
    "pascal-context-39-10": [39, 10, 10],
    "pascal-context-60-39-10": [39, 10, 10],
    "coco-stuff-10k-80-91": [80, 91],
}


@pytest.mark.parametrize("name", SIZES)
def test_published_step_lists(name):
    found = scenario.load(name)
    assert [len(group) for group in found.groups] == SIZES[name]
    assert (found.mode, found.order) == ("overlapped", tuple(range(1, 1 + sum(SIZES[name]))))
    assert scenario.load(f"{found.dataset}-joint").num_classes == found.num_classes
