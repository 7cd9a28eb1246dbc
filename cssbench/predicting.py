"""`cssbench predict`: coloured masks, overlays and a legend of pictures of any size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from cssbench.data.base import IMAGE_SUFFIXES, UNREADABLE
from cssbench.data.picture import BACKGROUND_COLOUR, draw_legend
from cssbench.errors import ConfigError, DataError
from cssbench.portable import Portable
from cssbench.results import atomic_path

LEGEND = "legend.png"


@dataclass
class Predicted:
    """written: files, in order; broken: image -> what is wrong with it; shown: class ids in any mask."""

    written: list[Path] = field(default_factory=list)
    broken: dict[Path, str] = field(default_factory=dict)
    shown: set[int] = field(default_factory=set)


def find_images(given: Sequence[Path]) -> list[Path]:
    """The files given, and of folders the images in them, sorted. Raises DataError where there is none."""
    found: list[Path] = []
    for path in given:
        inside = sorted(p for p in path.iterdir() if _is_image(p)) if path.is_dir() else [path]
        if not inside:
            raise DataError(f"There is no image ({', '.join(IMAGE_SUFFIXES)}) in {path}.")
        found += inside
    return list(dict.fromkeys(found))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB, turned as its EXIF says, transparent parts as they are below. Raises DataError."""
    try:
        with Image.open(path) as stored:
            picture = ImageOps.exif_transpose(stored)
            if picture.mode.startswith("I;16"):
                return np.repeat((np.asarray(picture) >> 8).astype(np.uint8)[..., None], 3, axis=2)
            if picture.mode in ("I", "F"):
                raise DataError(f"pixels of mode {picture.mode}, whose range is not known; convert it to 8 bits")
            if picture.mode == "P":
                picture = picture.convert("RGBA" if "transparency" in picture.info else "RGB")
            return np.array(picture.convert("RGB"))
    except UNREADABLE as error:
        missing = isinstance(error, FileNotFoundError)
        raise DataError("there is no such file" if missing else f"it cannot be read: {error}") from None


def place(model: Portable, device: str) -> None:
    """Move a model to a device. Raises ConfigError where there is no such device."""
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {device!r} cannot be used ({str(error).splitlines()[0]}). Try cpu.") from None


def predict_images(
    model: Portable, images: Iterable[Path], out: Path, rule: str | None = None, overlay: bool = False
) -> Predicted:
    """Write OUT/<name>.png, a palette picture whose values are class ids, for each image, overlays on request, and the
    legend of all of them. An image that cannot be read is named in the result, and the others go on.

    Raises DataError where `out` cannot be written to.
    """
    found, colours = Predicted(), palette(model)
    names: set[str] = {Path(LEGEND).stem}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in images:
            try:
                image = read_image(path)
            except DataError as error:
                found.broken[path] = str(error)
                continue
            ids = model.predict(image, rule)
            found.shown |= set(np.unique(ids).tolist())
            name = _free(path.stem, names)
            found.written.append(_save(_indexed(ids, colours), out / f"{name}.png"))
            if overlay:
                blended = (0.5 * image + 0.5 * colours[ids]).round().astype(np.uint8)
                found.written.append(_save(Image.fromarray(blended), out / f"{name}.overlay.png"))
        if found.shown:
            found.written.append(_save(draw_legend(_entries(model, found.shown, colours)), out / LEGEND))
    except OSError as error:
        raise DataError(f"{out} cannot be written to ({error.strerror or error}).") from None
    return found


def palette(model: Portable) -> np.ndarray:
    """(256, 3) uint8: class id -> colour; 0 black, ids without a class grey."""
    table = np.full((256, 3), 128, np.uint8)
    table[0] = BACKGROUND_COLOUR
    for class_id, colour in model.palette.items():
        table[class_id] = colour
    return table


def _entries(model: Portable, shown: set[int], colours: np.ndarray) -> list[tuple[tuple[int, ...], str]]:
    names = {0: "background"} | model.classes
    return [(tuple(colours[c].tolist()), f"{c} {names.get(c, '?')}") for c in sorted(shown)]


def _indexed(ids: np.ndarray, colours: np.ndarray) -> Image.Image:
    picture = Image.frombytes("P", (ids.shape[1], ids.shape[0]), np.ascontiguousarray(ids).tobytes())
    picture.putpalette(colours.ravel().tolist())
    return picture


def _free(name: str, taken: set[str]) -> str:
    """`name`, or `name_2`, ...: two folders may hold images of one name."""
    wanted, number = name, 1
    while wanted in taken or wanted.removesuffix(".overlay") in taken:
        number += 1
        wanted = f"{name}_{number}"
    taken.add(wanted)
    return wanted


def _save(picture: Image.Image, path: Path) -> Path:
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")
    return path
