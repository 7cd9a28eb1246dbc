"""`cssbench data verify|index`: is a data root whole, and which classes do its images show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cssbench.errors import UnknownNameError

app = typer.Typer(help="Check and index data roots.", no_args_is_help=True)

Root = Annotated[Path, typer.Argument(help="Data root.")]
Dataset = Annotated[str | None, typer.Option("--dataset", help="Which dataset it is; default: told from its folders.")]
DataOption = Annotated[list[str] | None, typer.Option("--option", help="Option of the dataset, key=value.")]


@app.command()
def verify(root: Root, dataset: Dataset = None, option: DataOption = None) -> None:
    """Name every missing, unreadable, size-mismatched or out-of-range file; exit code 2 when there is one."""
    from cssbench.data.verify import verify as find_problems

    source = _open(root, dataset, option)
    problems = find_problems(source)
    for problem in problems:
        typer.echo(f"{problem.path}: {problem.what}")
    counted = {split: len(source.stems(split)) for split in source.splits if source.has_images(split)}
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
    for class_id, name in enumerate(source.classes, 1):
        table.add_row(str(class_id), name, *(str(int(i.table[:, class_id].sum())) for i in found.values()))
    Console().print(table)


def _open(root: Path, dataset: str | None, option: list[str] | None):
    from cssbench.cli.scenario import open_dataset

    return open_dataset(dataset or _guess(root), root, option)


def _guess(root: Path) -> str:
    """Which built-in dataset lies at `root`, by its folders."""
    signs = {
        "folder": "dataset.toml",
        "ade20k": "annotations/validation",
        "camvid": "trainannot",
    }
    for name, sign in signs.items():
        if (root / sign).exists() or (root / "ADEChallengeData2016" / sign).exists() or root.suffix == ".toml":
            return name
    raise UnknownNameError(f"dataset at {str(root)!r} that its folders tell (give --dataset)", "", signs)
