"""`cssbench scenario show|explain`: which classes and images each step holds, and what a learner sees of an image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cssbench.cli import complete
from cssbench.errors import ConfigError, ScenarioError

app = typer.Typer(help="Look at scenarios: steps, image sets, labels.", no_args_is_help=True)

Name = Annotated[
    str,
    typer.Argument(
        help="A scenario's name (`cssbench list scenarios`), or a path to its TOML.", autocompletion=complete.scenario
    ),
]
Mode = Annotated[str | None, typer.Option(help="overlapped, disjoint, sequential or partitioned.")]
Root = Annotated[Path | None, typer.Option("--data", help="Data root.")]
DataOption = Annotated[list[str] | None, typer.Option("--option", help="Option of the dataset, key=value.")]


@app.command()
def show(
    name: Name,
    mode: Mode = None,
    data: Root = None,
    index: Annotated[
        Path | None, typer.Option(help="Class lists `name id id ...`, 0-based, instead of images.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    option: DataOption = None,
) -> None:
    """Print the class ids of each step and, with --data or --index, the number of training images and their digest."""
    from cssbench import registry, scenario

    scene = scenario.load(name, mode=mode)
    stems = _step_stems(scene, data, index, option)
    rows = []
    for step in scene.steps:
        row: dict[str, Any] = {"new": list(step.new)}
        if stems is not None:
            images = stems[step.index]
            row |= {"images": len(images), "sha256": scenario.stems_digest(images)}
        rows.append(row)
    background = getattr(registry.load("datasets", scene.dataset), "background_class", False)
    if as_json:
        known = {"background_class": True} if background else {}
        typer.echo(json.dumps({"scenario": scene.name, "mode": scene.mode, "steps": rows, **known}))
        return
    table = Table(title=f"{scene.name} ({scene.mode}) on {scene.dataset}", title_justify="left", box=None)
    for heading in ("step", "new classes", "images", "SHA-256 of the sorted names"):
        table.add_column(heading, justify="right" if heading in ("step", "images") else "left", overflow="fold")
    for number, row in enumerate(rows):
        table.add_row(str(number), _short(row["new"]), str(row.get("images", "-")), row.get("sha256", "-"))
    Console().print(table)
    if background:
        typer.echo(
            f"Label 0 of {scene.dataset} is background, a class of every step that is scored: base classes are "
            f"{1 + len(scene.groups[0])} with it under plop@1, the default here."
        )


def _step_stems(scene: Any, data: Path | None, index: Path | None, option: list[str] | None) -> list[list[str]] | None:
    """Training image names of each step; None when neither images nor an index are given."""
    from cssbench.data import presence

    if data and index:
        raise ConfigError("Give --data or --index, not both.")
    if index:
        found = presence.from_class_lists(index, scene.num_classes_max)
    elif data:
        found = presence.build(open_dataset(scene.dataset, data, option), "train")
    else:
        return None
    return [[found.stems[i] for i in indices] for indices in scene.images(found.table)]


def open_dataset(name: str, root: Path, option: list[str] | None) -> Any:
    """The dataset at `root` with `key=value` options."""
    from cssbench.data.registry import make_dataset
    from cssbench.recipes import override

    return make_dataset(name, str(root), override({}, option or []))


def _short(ids: list[int]) -> str:
    """1, 2, 3, 7 -> '1-3, 7'."""
    runs: list[list[int]] = []
    for i in ids:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


@app.command()
def explain(
    name: Name,
    image: Annotated[str, typer.Option(help="Name of a training image, without suffix.")],
    step: Annotated[int, typer.Option(help="Step, from 0.")],
    data: Annotated[Path, typer.Option("--data", help="Data root.")],
    out: Annotated[
        Path | None, typer.Option(help="PNG to write; default: explain-SCENARIO-IMAGE-stepT.png here.")
    ] = None,
    mode: Mode = None,
    option: DataOption = None,
) -> None:
    """Write a picture of one training image: the image, its full labels, and what the learner sees at a step."""
    from cssbench import scenario
    from cssbench.data.picture import explain_picture
    from cssbench.results import atomic_path, image_name

    scene = scenario.load(name, mode=mode)
    if not 0 <= step < len(scene.steps):
        raise ScenarioError(f"Scenario {scene.name!r} has steps 0 to {len(scene.steps) - 1}; there is no step {step}.")
    source = open_dataset(scene.dataset, data, option)
    picture = explain_picture(scene, scene.steps[step], source, image)
    out = out or Path(f"{image_name(f'explain-{scene.name}-{image}-step{step}')}.png")
    with atomic_path(out) as temporary:
        picture.save(temporary, format="PNG")
    typer.echo(out)
