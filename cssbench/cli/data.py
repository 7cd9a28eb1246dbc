"""`cssbench data verify|index|stats`: is a data root whole, which classes do its images show, and how much of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cssbench.errors import UnknownNameError

if TYPE_CHECKING:
    from cssbench.data.base import SegDataset

app = typer.Typer(help="Check and index data roots.", no_args_is_help=True)

Root = Annotated[Path, typer.Argument(help="Data root.")]
Dataset = Annotated[str | None, typer.Option("--dataset", help="Which dataset it is; default: told from its folders.")]
DataOption = Annotated[list[str] | None, typer.Option("--option", help="Option of the dataset, key=value.")]


# Dataset -> files or folders below the root, one of which tells it. The first that fits is taken.
SIGNS = {
    "folder": ("dataset.toml",),
    "ade20k": ("annotations/validation", "ADEChallengeData2016/annotations/validation"),
    "camvid": ("trainannot",),
    "cityscapes": ("gtFine", "leftImg8bit"),
    "coco-stuff-10k": ("imageLists", "annotations/train2014"),
    "pascal-context": (
        "SegmentationClassContext",
        "VOC2010",
        "VOCdevkit/VOC2010",
        "ImageSets/SegmentationContext",
        "trainval",
    ),
    "voc": ("VOC2012", "VOCdevkit/VOC2012", "SegmentationClass", "ImageSets/Segmentation"),
}


@app.command()
def verify(root: Root, dataset: Dataset = None, option: DataOption = None) -> None:
    """Name every missing, unreadable, size-mismatched or out-of-range file; exit code 2 when there is one."""
    from cssbench.data.verify import verify as find_problems

    source = _open(root, dataset, option)
    problems = find_problems(source)
    for problem in problems:
        typer.echo(f"{problem.path}: {problem.what}")
    counted = {split: len(source.image_files(split)) for split in source.splits if source.has_images(split)}
    sizes = ", ".join(f"{count} {split}" for split, count in counted.items()) or "no"
    typer.echo(f"{source.name} at {root}: {sizes} images, {len(problems)} problems")
    if problems:
        raise typer.Exit(2)


@app.command()
def index(
    root: Root,
    dataset: Dataset = None,
    option: DataOption = None,
    deep: Annotated[bool, typer.Option(help="Fingerprint the files' contents, not names, sizes and times.")] = False,
) -> None:
    """Build (or read from the cache) which classes each label map holds, and print how many images show each class."""
    from rich.console import Console
    from rich.table import Table

    from cssbench.data.presence import build

    source = _open(root, dataset, option)
    splits = [split for split in source.splits if source.has_images(split)]
    found = {split: build(source, split, deep=deep) for split in splits}
    table = Table(title=f"{source.name} at {root}: images that show each class", title_justify="left", box=None)
    for heading in ("id", "class", *(f"{split} ({len(i.stems)})" for split, i in found.items())):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    for class_id, name in _ids(source):
        table.add_row(str(class_id), name, *(str(int(i.table[:, class_id].sum())) for i in found.values()))
    Console().print(table)


@app.command()
def stats(root: Root, dataset: Dataset = None, option: DataOption = None) -> None:
    """Read every label map, and print image sizes and the share of pixels of each class, void and ignored ones."""
    from rich.console import Console
    from rich.table import Table

    from cssbench.data.base import IGNORED
    from cssbench.data.statistics import measure

    source = _open(root, dataset, option)
    found = {split: measure(source, split) for split in source.splits if source.has_images(split)}
    for split, one in found.items():
        sides = "; ".join(f"{name} {low} to {high}, median {mid}" for name, (low, mid, high) in one.sizes().items())
        typer.echo(f"{split}: {len(one.shapes)} images; {sides} px")
    table = Table(title=f"{source.name} at {root}: % of all pixels", title_justify="left", box=None)
    for heading in ("id", "class", *found):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    rest = [] if source.background_class else [(0, "void")]
    for class_id, name in [*_ids(source), *rest, (IGNORED, "ignored")]:
        table.add_row(str(class_id), name, *(f"{100 * one.share(class_id):.3f}" for one in found.values()))
    Console().print(table)


def _ids(source: SegDataset) -> list[tuple[int, str]]:
    """(class id, name) of every class, background first where it is one."""
    return [*([(0, "background")] if source.background_class else []), *enumerate(source.classes, 1)]


def _open(root: Path, dataset: str | None, option: list[str] | None) -> SegDataset:
    from cssbench.cli.scenario import open_dataset

    return open_dataset(dataset or _guess(root), root, option)


def _guess(root: Path) -> str:
    """Which built-in dataset lies at `root`, by its folders."""
    if root.suffix == ".toml":
        return "folder"
    for name, signs in SIGNS.items():
        if any((root / sign).exists() for sign in signs):
            return name
    raise UnknownNameError(f"dataset at {str(root)!r} that its folders tell (give --dataset)", "", SIGNS)
