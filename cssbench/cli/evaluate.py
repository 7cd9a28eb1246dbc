"""`cssbench evaluate`: the weights of a run under other options, as a run of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cssbench.cli import complete


def register(app: typer.Typer) -> None:
    app.command()(evaluate)


def evaluate(
    folder: Annotated[Path, typer.Argument(help="Run folder with weights.", autocompletion=complete.run_folder)],
    out: Annotated[Path, typer.Option("--out", help="Run folder to make.")],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override, such as model.p0=0.8 or evaluate.inference=slide. May repeat."),
    ] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Data root; replaces the run's.")] = None,
) -> None:
    """Evaluate a run's stored weights again under changed options of evaluation and model; nothing is trained."""
    from cssbench.provenance import this_command
    from cssbench.reevaluate import evaluate_again

    if not evaluate_again(folder, out, changes or [], data, this_command()):
        typer.echo(f"{out} is finished: it has every step that {folder} has finished.")
