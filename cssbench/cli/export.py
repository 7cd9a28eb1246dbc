"""`cssbench export | predict`: a trained model out of its run folder, and onto pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cssbench.errors import ConfigError, DataError


def register(app: typer.Typer) -> None:
    app.command()(export)
    app.command()(predict)


def export(
    folder: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to make.")],
    step: Annotated[int | None, typer.Option(help="Finished step, from 0; default: the last one.")] = None,
) -> None:
    """Write a step's model as a folder that PyTorch and timm load without cssbench, with a model card."""
    from cssbench.export import export as write

    typer.echo(write(folder, out, step))


def predict(
    model: Annotated[Path, typer.Argument(help="Run folder, or a folder of `cssbench export`.")],
    images: Annotated[list[Path], typer.Argument(help="Images, or folders of them.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the masks and legend.png.")],
    step: Annotated[int | None, typer.Option(help="Of a run: finished step, from 0; default: the last one.")] = None,
    overlay: Annotated[bool, typer.Option("--overlay", help="Also write each image under its mask.")] = False,
    rule: Annotated[
        Literal["all", "foreground"] | None,
        typer.Option(help="all: background where it is likelier; foreground: never. Default: as the data is scored."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
) -> None:
    """Write coloured masks of images of any size. Exit code 2 where an image could not be read; the others are done."""
    from cssbench import export as exported
    from cssbench.predicting import find_images, place, predict_images
    from cssbench.results import RunFolder

    found = find_images(images)
    if (model / "config.toml").exists():
        run = RunFolder.read(model)
        made = exported.from_run(run, len(run.records()) - 1 if step is None else step)
    elif step is not None:
        raise ConfigError(f"--step chooses a step of a run folder; {model} holds the model of one step.")
    else:
        made = exported.from_folder(model)
    place(made, device)
    done = predict_images(made, found, out, rule, overlay)
    for path in done.written:
        typer.echo(path)
    if done.broken:
        named = "; ".join(f"{path} ({what})" for path, what in done.broken.items())
        raise DataError(
            f"{len(done.broken)} of {len(found)} images were skipped: {named}. The masks of the others are in {out}."
        )
