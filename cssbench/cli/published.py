"""`cssbench published lint` and `cssbench import plop-csv`: other people's numbers, as printed and as logged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cssbench.cli import complete
from cssbench.cli.text import plain_lines

published = typer.Typer(help="Published numbers: check them.", no_args_is_help=True)
imports = typer.Typer(help="Make run folders of other people's logs.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.add_typer(published, name="published")
    app.add_typer(imports, name="import")


@published.command()
def lint(
    files: Annotated[list[Path] | None, typer.Argument(help="YAML files; default: all that cssbench ships.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 when a row is flagged.")] = False,
) -> None:
    """Say of each printed row which convention fits it, and flag what contradicts itself."""
    from cssbench import registry

    text, flagged = registry.load("tools", "published-lint")(files or [])
    typer.echo(plain_lines(text))
    if strict and flagged:
        raise typer.Exit(1)


@imports.command("plop-csv")
def plop_csv(
    file: Annotated[Path, typer.Argument(help="Log of one run: step, IoU per class (x: unseen), overall mIoU.")],
    scenario: Annotated[
        str, typer.Option(help="Name of a scenario, or path to its TOML.", autocompletion=complete.scenario)
    ],
    out: Annotated[Path, typer.Option("--out", help="Run folder to make.")],
    mode: Annotated[str | None, typer.Option(help="Mode of the run, where it is not the scenario's.")] = None,
    method: Annotated[str | None, typer.Option(help="What to call the method; default: the file's name.")] = None,
    model: Annotated[str, typer.Option(help="What to call the model.")] = "unknown",
) -> None:
    """Make a run folder, marked as imported, of the log that PLOP, REMINDER, RCIL and EWF write; print its scores."""
    from cssbench import imported, scoring
    from cssbench import protocol as protocols
    from cssbench.cli.run import percent
    from cssbench.metrics.continual import average
    from cssbench.scenario import load

    log = imported.read_plop_csv(file, load(scenario, mode=mode))
    folder = imported.write_run(log, out, method or file.stem, model, scenario)
    protocol = protocols.get(imported.PROTOCOL)
    scores = scoring.run_scores(folder, protocol)
    for step, means in enumerate(scores):
        shown = ", ".join(f"{name} {percent(means[name])}" for name in ("base", "incremental", "all"))
        typer.echo(f"step {step}: {'no line in the log' if step in log.missing else shown}")
    typer.echo(f"{out}: imported from {file}; mIoU in % under {protocol.id}; avg {percent(average(scores))}")
    if log.missing:
        typer.echo(
            f"No line for step {', '.join(map(str, log.missing))}: avg, and what was forgotten since, is unknown."
        )
    if not log.finished:
        typer.echo(
            f"The log ends before step {len(log.scenario.steps) - 1}: it is an unfinished run, avg is of its steps."
        )
