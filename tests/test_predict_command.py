"""`cssbench predict`: masks, overlays and legend of pictures as people have them; broken ones are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_export import made_up

from cssbench import export
from cssbench.data.picture import draw_legend
from cssbench.portable import Portable
from cssbench.predicting import predict_images, read_image

pytestmark = pytest.mark.usefixtures("_one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    return export.export(made_up(root / "run", "vit-linear").path, root / "out")


@pytest.fixture(scope="module")
def model(folder: Path) -> Portable:
    return export.from_folder(folder)


@pytest.fixture
def photo() -> np.ndarray:
    """(30, 44, 3): smooth, so that JPEG and conversions change little."""
    y, x = np.mgrid[:30, :44]
    return np.stack([5 * x, 8 * y, 255 - 5 * x], -1).clip(0, 255).astype(np.uint8)


def test_every_kind_of_picture_becomes_rgb(tmp_path: Path, photo: np.ndarray):
    rgb = Image.fromarray(photo)
    grey = np.asarray(rgb.convert("L"))
    kinds = {
        "rgb.png": rgb,
        "grey.png": rgb.convert("L"),
        "rgba.png": rgb.convert("RGBA"),
        "one.png": rgb.convert("1"),
        "palette.png": rgb.quantize(256),
        "cmyk.jpg": rgb.convert("CMYK"),
        "sixteen.png": Image.fromarray(grey.astype(np.uint16) * 257),
        "a.bmp": rgb,
        "a.webp": rgb,
    }
    for name, picture in kinds.items():
        picture.save(tmp_path / name, **({"quality": 100} if name[-3:] == "jpg" else {}))
        found = read_image(tmp_path / name)
        assert (found.shape, found.dtype) == ((30, 44, 3), np.uint8), name
    assert (read_image(tmp_path / "rgb.png") == photo).all()
    assert (read_image(tmp_path / "sixteen.png") == grey[..., None]).all()


@pytest.mark.parametrize(("orientation", "turn"), [(3, 180), (6, 90), (8, 270)])
def test_pictures_are_turned_as_their_exif_says(tmp_path: Path, photo: np.ndarray, orientation: int, turn: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(photo).rotate(turn, expand=True).save(tmp_path / "a.png", exif=exif)
    assert (read_image(tmp_path / "a.png") == photo).all()


def test_masks_hold_class_ids_in_class_colours(tmp_path: Path, model: Portable, photo: np.ndarray):
    Image.fromarray(photo).save(tmp_path / "a.png")
    done = predict_images(model, [tmp_path / "a.png"], tmp_path / "out", "foreground", overlay=True)
    assert [path.name for path in done.written] == ["a.png", "a.overlay.png", "legend.png"]
    mask = Image.open(tmp_path / "out/a.png")
    ids = np.asarray(mask)
    assert (mask.mode, ids.shape) == ("P", (30, 44))
    assert (ids == model.predict(photo, "foreground")).all()
    colours = np.asarray(mask.convert("RGB"))
    for class_id in np.unique(ids).tolist():
        assert (colours[ids == class_id] == model.palette[class_id]).all()
    shown = np.asarray(Image.open(tmp_path / "out/a.overlay.png")).astype(int)
    assert abs(shown - (photo / 2 + colours / 2)).max() <= 0.5


def test_a_legend_has_a_line_per_class():
    colours = [(10 * i, 0, 0) for i in range(23)]
    sheet = np.asarray(draw_legend([(colour, f"{i} thing") for i, colour in enumerate(colours)]))
    assert all((sheet == colour).all(axis=2).sum() >= 100 for colour in colours[1:])
    assert sheet.shape[0] < sheet.shape[1] * 5
    assert draw_legend([((1, 2, 3), "1 sky")]).size[1] == 30


def test_the_command_names_what_it_skips_and_does_the_rest(
    tmp_path: Path, folder: Path, photo: np.ndarray, command: Callable
):
    pictures, more = tmp_path / "pictures", tmp_path / "more"
    pictures.mkdir()
    more.mkdir()
    for path in (pictures / "a.png", more / "a.jpg", more / "legend.png"):
        Image.fromarray(photo).save(path)
    (pictures / "b.jpg").write_bytes(b"\xff\xd8 no")
    (pictures / "c.png").write_bytes((pictures / "a.png").read_bytes()[:60])
    Image.fromarray(photo[..., 0].astype(np.float32)).save(pictures / "d.tiff")
    (pictures / "notes.txt").write_text("x")
    out = tmp_path / "out"
    words = ("predict", folder, pictures, pictures / "d.tiff", more, tmp_path / "gone.png", "--out", out)
    code, printed, err = command(*words)
    assert code == 2
    assert "4 of 7 images were skipped" in err, err
    for name, what in [("b.jpg", "cannot be read"), ("c.png", "cannot be read"), ("gone.png", "no such file")]:
        assert f"{name} ({'it ' if 'cannot' in what else 'there is '}{what}" in err
    assert "d.tiff (pixels of mode F, whose range is not known" in err
    assert sorted(p.name for p in out.iterdir()) == ["a.png", "a_2.png", "legend.png", "legend_2.png"]
    assert len(printed.split()) == 4


def test_a_run_folder_is_as_good(tmp_path: Path, folder: Path, photo: np.ndarray, command: Callable):
    Image.fromarray(photo).save(tmp_path / "a.png")
    run = folder.parent / "run"
    for model, out in ((run, "x"), (folder, "y")):
        assert command("predict", model, tmp_path / "a.png", "--out", tmp_path / out)[0] == 0
    first, second = (np.asarray(Image.open(tmp_path / out / "a.png")) for out in "xy")
    assert (first == second).all()
    assert command("predict", run, tmp_path / "a.png", "--step", 0, "--out", tmp_path / "z")[0] == 0
    assert set(np.unique(np.asarray(Image.open(tmp_path / "z/a.png")))) <= {5, 2, 3}


def test_mistakes(tmp_path: Path, folder: Path, photo: np.ndarray, command: Callable):
    Image.fromarray(photo).save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for words, message in [
        ((folder, tmp_path / "empty", "--out", tmp_path / "o"), "There is no image"),
        ((folder, tmp_path / "a.png", "--out", tmp_path / "o", "--step", 0), "--step chooses a step of a run folder"),
        ((tmp_path, tmp_path / "a.png", "--out", tmp_path / "o"), "neither a run folder nor"),
        (
            (folder, tmp_path / "a.png", "--out", tmp_path / "o", "--device", "abacus"),
            "--device 'abacus' cannot be used",
        ),
        ((folder, tmp_path / "a.png", "--out", tmp_path / "file"), "cannot be written to"),
    ]:
        code, _, err = command("predict", *words)
        assert (code, message in err) == (2, True), err
