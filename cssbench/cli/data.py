"""`cssbench data fetch|verify|index|stats`: get data, are they whole, which classes show where and how often."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cssbench.cli import complete
from cssbench.cli.text import plain
from cssbench.errors import ConfigError, DataError, ScenarioError

app = typer.Typer(help="Fetch, check and count data.", no_args_is_help=True)

Root = Annotated[Path, typer.Argument(help="Data root.")]
Dataset = Annotated[
    str | None,
    typer.Option(
        "--dataset", help="Which dataset it is; default: told from its folders.", autocompletion=complete.dataset
    ),
]
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
    "voc": ("SegmentationClass", "VOC2012", "VOCdevkit/VOC2012", "ImageSets/Segmentation"),
}


@app.command()
def fetch(
    name: Annotated[
        str,
        typer.Argument(
            help="Dataset that is published as an archive, such as ade20k.", autocompletion=complete.dataset
        ),
    ],
    root: Annotated[Path, typer.Option("--root", help="Folder for it: the data root afterwards.")],
    accept_terms: Annotated[bool, typer.Option("--accept-terms", help="The terms of the data are accepted.")] = False,
    keep: Annotated[bool, typer.Option("--keep-archive", help="Leave the archive beside the data.")] = False,
    sha256: Annotated[
        str | None, typer.Option(help="SHA-256 that the archive must have, instead of the published checksums.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="Address of a mirror.")] = None,
) -> None:
    """Download, check and unpack a dataset's official archive; a download that was cut short goes on."""
    from cssbench.data import fetch as fetching

    _, archive = fetching.official(name)
    typer.echo(archive.terms)
    if not accept_terms:
        raise ConfigError(
            f"Nothing was downloaded: the terms above must be accepted first. When you have read and accept them, say "
            f"so: cssbench data fetch {name} --root {root} --accept-terms"
        )
    folder = fetching.fetch(name, root, url, sha256, keep)
    typer.echo(f"{folder}: ready. `cssbench data verify {root}` opens every file.")


@app.command()
def verify(root: Root, dataset: Dataset = None, option: DataOption = None) -> None:
    """Name every missing, unreadable, size-mismatched or out-of-range file; exit code 2 when there is one."""
    from cssbench.data.archive import Archive
    from cssbench.data.verify import verify as find_problems

    source = _open(root, dataset, option)
    problems = find_problems(source)
    for problem in problems:
        typer.echo(plain(f"{problem.path}: {problem.what}"))
    counted = {split: len(source.image_files(split)) for split in source.splits if source.has_images(split)}
    sizes = ", ".join(f"{count} {split}" for split, count in counted.items()) or "no"
    typer.echo(f"{source.name} at {root}: {sizes} images, {len(problems)} problems")
    whole = source.archive.images if isinstance(source.archive, Archive) else {}
    for split, expected in whole.items():
        if counted.get(split, 0) != expected:
            typer.echo(f"The official {source.name} has {expected} {split} images, here are {counted.get(split, 0)}.")
    if problems:
        count = "1 fault" if len(problems) == 1 else f"{len(problems)} faults"
        raise DataError(
            f"The data root {root} is not whole: {count}, listed above. Fetch those files again, or remove image and "
            f"label map together."
        )


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
    background = [(0, "background")] if source.background_class else []
    for class_id, name in [*background, *enumerate(source.classes, 1)]:
        table.add_row(str(class_id), plain(name), *(str(int(i.table[:, class_id].sum())) for i in found.values()))
    Console(markup=False).print(table)


@app.command()
def stats(
    root: Root,
    scenario: Annotated[
        str,
        typer.Option("--scenario", help="Name of a scenario, or path to its TOML.", autocompletion=complete.scenario),
    ],
    mode: Annotated[
        str | None, typer.Option(help="Mode instead of the scenario's; `all`: every mode, one after the other.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for a CSV and a picture of each mode.")] = None,
    option: DataOption = None,
) -> None:
    """Print how many training images and pixels each class has at each step, and what the learner sees them as."""
    from typing import get_args

    from cssbench import registry
    from cssbench import scenario as scenarios
    from cssbench.data.statistics import StepFrequencies, count_pixels, frequencies

    modes = [None] if mode is None else get_args(scenarios.Mode) if mode == "all" else [mode]
    scenes = [scenarios.load(scenario, mode=one) for one in modes]
    source = _open(root, scenes[0].dataset, option)
    counts = count_pixels(source)
    found: dict[str, list[StepFrequencies]] = {}
    for scene in scenes:
        try:
            found[scene.mode] = frequencies(scene, counts, source.classes, source.background_class)
        except ScenarioError as error:
            if mode != "all":
                raise
            typer.echo(f"{scene.mode}: {error}", err=True)
    if not found:
        raise ScenarioError(f"Scenario {scenes[0].name!r} has a step without images in every mode.")
    for steps in found.values():
        _print_stats(f"{scenes[0].name} ({steps[0].mode}) on {source.name} at {root}", steps)
    if out is not None:
        write = registry.load("tools", "data-frequencies")
        for path in write(found, scenes[0].name, out):
            typer.echo(path)


def _print_stats(title: str, steps: list[Any]) -> None:
    """One line for each step, then one for each class that the learner has labels of."""
    from rich.console import Console
    from rich.table import Table

    def table(heading: str, *headings: str) -> Table:
        made = Table(title=heading, title_justify="left", box=None, header_style="bold")
        for name in headings:
            made.add_column(name, justify="left" if name == "class" else "right", overflow="fold")
        return made

    shares = {"new": ("new",), "old": ("old",), "future": ("future",), "void": ("void",)}
    whole = table(
        f"{title}: training images, and pixels in % by what they are; bg: seen as background",
        "step", "images", "new", "old labelled", "old bg", "future bg", "void bg", "ignored",
    )  # fmt: skip
    classes = table("classes with labels, by step", "step", "id", "class", "learned", "images", "pixels", "% of step")
    for step in steps:
        background = [step.share(*kinds, seen_as="background") for name, kinds in shares.items() if name != "new"]
        ignored = step.share("old", "future", "void", "padding", seen_as="ignored")
        labelled = [step.share(name, seen_as="class") for name in ("new", "old")]
        cells = [f"{100 * share:.2f}" for share in (*labelled, *background, ignored)]
        whole.add_row(str(step.step), str(step.images), *cells)
        for row in step.labelled:
            learned = "-" if row.learned is None else str(row.learned)
            cells = [
                str(row.class_id),
                plain(row.name),
                learned,
                str(row.images),
                str(row.pixels),
                f"{100 * row.share:.3f}",
            ]
            classes.add_row(str(step.step), *cells)
    console = Console(markup=False, highlight=False)
    console.print(whole)
    console.print(classes)


def _open(root: Path, dataset: str | None, option: list[str] | None):
    from cssbench.cli.scenario import open_dataset

    return open_dataset(dataset or _guess(root), root, option)


def _guess(root: Path) -> str:
    """Which built-in dataset lies at `root`, by its folders. Raises DataError."""
    if not root.exists():
        raise DataError(f"The data root {str(root)!r} does not exist. Name the folder that the data lie in.")
    if root.suffix == ".toml":
        return "folder"
    for name, signs in SIGNS.items():
        if any((root / sign).exists() for sign in signs):
            return name
    told = ", ".join(f"{name} ({signs[0]})" for name, signs in SIGNS.items())
    raise DataError(f"What lies at {str(root)!r} is not told by its folders: {told}. Give --dataset NAME.")
